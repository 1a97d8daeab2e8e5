"""One thread and no GPU in the parent, because tests fork ranks.

A forked child of a process with busy OpenMP threads can deadlock, and autograd's device threads do not survive a fork:
the tests of tests/gpu run by themselves, with DISTVSD_TEST_GPU=1.
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
if os.environ.get("DISTVSD_TEST_GPU") != "1":
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch

torch.set_num_threads(1)
