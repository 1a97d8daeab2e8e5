"""The same small task saved and resumed four ways, and the same accidents for each: what survives, and what is noticed.

python -m benchmarks.comparison
"""
