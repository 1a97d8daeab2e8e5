"""Standard input, output and error of a process that was started without some of them."""

from __future__ import annotations

import os
import sys


def open_standard_streams() -> None:
    """Opens the null device in place of each of descriptors 0, 1 and 2 that is closed (`2>&-` in a shell).

    Otherwise the next file that is opened, a checkpoint for instance, would get that number, and what is printed would
    be written into it. Python has None for the streams of closed descriptors; they become streams again.
    """
    for descriptor, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(descriptor)
        except OSError:
            # The system gives the lowest free number, which is this one. Children inherit it, as they do a real one.
            opened = os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(opened, True)
        if getattr(sys, name) is None:
            stream = open(descriptor, mode, encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)
