"""Checkpoints: tensors in named files keyed by particle id, signed by a manifest, published by one rename."""

from distvsd.checkpoint.format import Manifest, content_digest, particle_file, particle_of
from distvsd.checkpoint.reader import Checkpoint, newest, open_checkpoint
from distvsd.checkpoint.saver import Saver
from distvsd.checkpoint.verify import verify_run

__all__ = [
    "Checkpoint",
    "Manifest",
    "Saver",
    "content_digest",
    "newest",
    "open_checkpoint",
    "particle_file",
    "particle_of",
    "verify_run",
]
