"""Frozen networks read from a folder: the denoiser, the image codec, the text encoder."""
