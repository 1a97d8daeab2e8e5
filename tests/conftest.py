"""One thread in the parent: tests fork ranks, and a forked child of a process with busy OpenMP threads can deadlock."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

torch.set_num_threads(1)
