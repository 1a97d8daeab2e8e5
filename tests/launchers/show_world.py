"""Started by the tests through launchers. Opens the world as a run does and writes the result to one file per
process."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

from distvsd.errors import RankError
from distvsd.parallel import collectives
from distvsd.parallel.world import open_world


def main(folder: Path) -> int:
    found: dict[str, object] = {}
    try:
        with open_world(30) as world:
            found = {
                "rank": world.rank,
                "size": world.size,
                "local_size": world.local_size,
                "device": str(world.device),
            }
            found["sum"] = float(collectives.all_reduce_sum_(world, torch.tensor(1.0 + world.rank)))
        found["closed"] = not torch.distributed.is_initialized()
        return 0
    except RankError as error:
        found = {"error": str(error)}
        return error.exit_code
    finally:
        (folder / f"{os.getpid()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
