"""Saves and resumes one small task in four ways, under the same faults: what survives, and what is detected.

python -m benchmarks.comparison
"""
