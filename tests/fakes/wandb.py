"""Stands in for the wandb package where a test needs one that misbehaves: put this folder on PYTHONPATH.

FAKE_WANDB says what goes wrong, `hang@log;raise@finish` (hang, raise, die, slow, each at import, init, log or finish);
every call is a line of the file FAKE_WANDB_CALLS.
"""

import json
import os
import time
from pathlib import Path
from types import SimpleNamespace

_plan = dict(reversed(entry.split("@")) for entry in os.environ.get("FAKE_WANDB", "").split(";") if entry)


def _call(name, /, **what):
    with Path(os.environ["FAKE_WANDB_CALLS"]).open("a") as calls:
        calls.write(json.dumps({"call": name, "pid": os.getpid()} | what, default=repr) + "\n")
    match _plan.get(name):
        case "hang":
            time.sleep(3600)
        case "slow":
            time.sleep(0.3)
        case "raise":
            raise RuntimeError(f"fake wandb fails in {name}")
        case "die":
            os._exit(7)


class _Run:
    url = None

    def __init__(self):
        self.summary = SimpleNamespace(update=lambda numbers: _call("summary", numbers=numbers))

    def log(self, data, step):
        _call("log", data=data, step=step)

    def mark_preempting(self):
        _call("mark_preempting")

    def finish(self, exit_code):
        _call("finish", exit_code=exit_code)


def init(**arguments):
    print("wandb prints what looks like an answer:\n{}")
    _call("init", **arguments)
    return _Run()


class Table:
    def __init__(self, columns, data):
        self.columns, self.data = columns, data

    def __repr__(self):
        return f"Table({self.columns}, {self.data})"


class Image:
    def __init__(self, path):
        self.path = path

    def __repr__(self):
        return f"{type(self).__name__}({Path(self.path).name})"


class Video(Image):
    def __init__(self, path, format):
        super().__init__(path)


_call("import")
