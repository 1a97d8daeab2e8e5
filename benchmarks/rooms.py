"""Rooms of the embedded prior, trained with cameras at fixed ranges and with adaptive ones.

    python -m benchmarks.rooms --out runs/rooms [--particles 8] [--rounds 200] [--seed 0] [--arms centre,adaptive,wide]

The prompts are drawn by the seed, walls and floor of two colours. The arms differ in where training cameras stand:
`centre` has the ranges of the prior's own pictures, `wide` those that the paper uses in its scenes (0.1 to 2.3 from the
centre in a hollow of radius 2.5), in proportion, and `adaptive` draws them in the free space of each particle. Updates,
seeds and initial states are the same. Every arm is judged from the same held-out cameras, drawn as those of the prior's
rooms are; and from cameras all over its own free space. `drawn` is a room that the prior's world itself draws from the
first ones: what the classifier can read of a perfect room.

An arm is trained once; a second call goes on with what is missing. Prints one JSON object an arm; --page writes them
down.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import machine
from distvsd.cameras import AdaptiveSampler, Cameras, CameraSampler, Field, SceneSampler
from distvsd.config import Config, load_config
from distvsd.looking.images import contact_sheet, save_png
from distvsd.looking.labels import Expected, expected_labels
from distvsd.looking.opened import Opened, load_particles
from distvsd.looking.views import inspection, render_group
from distvsd.run.custom import Custom
from distvsd.run.parts import make_cameras
from distvsd.run.train import train
from distvsd.shapes import world
from distvsd.shapes.captions import article
from distvsd.shapes.classifier import SCENES, Classifier, Predictions, load_classifier
from distvsd.vsd.rng import Purpose, generator

ROOM = Path(__file__).parents[1] / "configs" / "room.yaml"
HELD_OUT = 32  # views a particle
HELD_OUT_SEED = 1_000_000
TRIED = 1000  # cameras a particle whose places are looked at
SHOWN = 4  # views a particle in the picture
WIDE = (0.1 / 2.5, 2.3 / 2.5)  # of the hollow's radius
BACKGROUND = 0.5
WHERE, HEADS = ("prior_cameras", "free_space"), ("scene", "wall", "floor")
SEEN = ("in_matter", "in_solid", "facing")
SOLID = 1.0  # optical depth of a cell from which a camera counts as inside solid matter


@dataclass
class Counted:
    """A sampler, and what its training cameras saw."""

    sampler: CameraSampler
    ruler: AdaptiveSampler
    views: int = 0
    in_matter: int = 0
    in_solid: int = 0
    facing: int = 0

    def sample(self, seed: int, ids: Tensor, step: int, views: int, field: Field | None) -> Cameras:
        assert field is not None, "rooms have a density"
        cameras = self.sampler.sample(seed, ids, step, views, field)
        places, backward = cameras.extrinsics[..., :3, 3], cameras.extrinsics[..., :3, 2]
        ahead = torch.linspace(0, self.ruler.config.adaptive.clearance, 12)[:, None]
        depth = field(places) * self.ruler.edge
        along = field((places[:, :, None] - backward[:, :, None] * ahead).flatten(1, 2)) * self.ruler.edge
        limit = self.ruler.config.adaptive.optical_depth
        self.views += depth.numel()
        self.in_matter += int((depth >= limit).sum())
        self.in_solid += int((depth >= SOLID).sum())
        self.facing += int((along.unflatten(1, (views, -1)) >= SOLID).any(-1).sum())
        return cameras

    def inspection(self, views: int) -> Cameras:
        return self.sampler.inspection(views)

    def shares(self) -> dict[str, float]:
        return {name: round(getattr(self, name) / self.views, 4) for name in SEEN}


def draw_prompts(count: int, seed: int) -> list[str]:
    """`count` rooms whose walls and floor have two colours; each colour as often as any other on the walls, up to
    one."""
    rng = random.Random(seed)
    walls: list[str] = []
    while len(walls) < count:
        walls += rng.sample(world.COLORS, len(world.COLORS))
    floors = [rng.choice([color for color in world.COLORS if color != wall]) for wall in walls[:count]]
    return [
        f"inside a room with {wall} walls and {article(floor)} floor"
        for wall, floor in zip(walls, floors, strict=False)
    ]


def configured(arm: str, arguments: argparse.Namespace) -> Config:
    """The configuration of one arm."""
    rounds = arguments.rounds
    settings = [
        f"run.dir={arguments.out / arm}",
        f"run.seed={arguments.seed}",
        f"prompt={json.dumps(draw_prompts(arguments.particles, arguments.seed))}",
        f"particles.count={arguments.particles}",
        f"schedule.rounds={rounds}",
        f"log.every={max(rounds // 10, 1)}",
        f"cameras.kind={'adaptive' if arm == 'adaptive' else 'scene'}",
        *arguments.overrides,
    ]
    config = load_config(ROOM, settings)
    if arm != "wide":
        return config
    low, high = wide(config)
    return load_config(ROOM, [*settings, f"cameras.distance=[{low}, {high}]"])


def wide(config: Config) -> tuple[float, float]:
    """The distances that the paper has in its scenes, in proportion to this hollow."""
    low, high = (share * config.particles.nerf.blob_radius for share in WIDE)
    return low, high


def trained(config: Config) -> Custom:
    """The parts that the run was trained with; trains it where it is not there yet, and notes what was counted."""
    ruler = AdaptiveSampler(replace(config.cameras, kind="adaptive"))
    counted = Counted(make_cameras(config.cameras), ruler)
    custom = Custom(cameras=counted)
    notes = Path(config.run.dir) / "notes.json"
    if not notes.exists():
        start = time.monotonic()
        train(config, resume="never", custom=custom)
        notes.write_text(json.dumps({"seconds": round(time.monotonic() - start), **counted.shares()}))
    return custom


def held_out(count: int, seed: int) -> Cameras:
    """Cameras `[count]` as the prior's rooms have them."""
    draws = generator(seed, Purpose.EVALUATE)
    return world.sample_cameras(world.sample_labels(count, draws, rooms=1.0), draws)


def read(opened: Opened, cameras: Cameras, classifier: Classifier) -> list[Predictions]:
    """What the classifier reads of each particle from its cameras, row i of `[P, V]`."""
    edge = opened.config.final_resolution
    return [
        classifier.classify(opened.render([i], cameras[row : row + 1], edge, BACKGROUND)[0][0].clamp(0, 1))
        for row, i in enumerate(opened.ids)
    ]


def accuracy(read: list[Predictions], expected: list[Expected], cameras: Cameras) -> dict[str, float]:
    """Shares of the views `[P, V]` of all particles that show a room and its walls, and of those that look down, its
    floor: in the others a perfect room may show none."""
    down = cameras.extrinsics[..., 2, 2] >= 0
    shown: dict[str, list[Tensor]] = {head: [] for head in HEADS}
    for predictions, wanted in zip(read, expected, strict=True):
        is_room = predictions.scene == SCENES.index("room")
        for head, value in wanted.known().items():
            shown[head].append(is_room & (predictions[head] == value))
    shares = {head: torch.stack(views) for head, views in shown.items()}
    among = {head: down.expand_as(views) if head == "floor" else views | True for head, views in shares.items()}
    return {head: round(float(views[among[head]].float().mean()), 4) for head, views in shares.items()}


def drawn(cameras: Cameras, expected: list[Expected], classifier: Classifier) -> list[Predictions]:
    """What the classifier reads of the world's own rooms from cameras `[V]`."""
    count = len(cameras.fovy)
    none, nothing = torch.full((count,), -1), torch.zeros(count, dtype=torch.int64)
    found = []
    for wanted in expected:
        assert wanted.wall is not None and wanted.floor is not None, "the prompt names both"
        labels = world.Labels(none, none, nothing, nothing + wanted.wall, nothing + wanted.floor)
        found.append(classifier.classify(world.draw(labels, cameras, torch.full((count,), BACKGROUND))))
    return found


def measure(config: Config, classifier: Classifier) -> tuple[dict[str, Any], Tensor]:
    """The figures of one arm, and pictures `[P, SHOWN, 3, H, W]` from the centre."""
    custom = trained(config)
    opened = load_particles(Path(config.run.dir), custom=custom)
    ids, expected = torch.tensor(opened.ids), [expected_labels(prompt) for prompt in config.prompts]
    rows = torch.zeros(len(ids), dtype=torch.int64)
    same = held_out(HELD_OUT, HELD_OUT_SEED)
    states = [opened.ensemble.parameters_of(i) for i in opened.ids]
    stacked = {name: torch.stack([state[name] for state in states]) for name in states[0]}
    field = opened.particle.field(stacked)
    assert field is not None, "rooms have a density"
    ruler = AdaptiveSampler(replace(config.cameras, kind="adaptive"))
    with torch.no_grad():
        everywhere = ruler.sample(HELD_OUT_SEED, ids, 0, HELD_OUT, field)
        free = ruler.free_space(field, ids).flatten(1).sum(1) * ruler.edge**3
        far = Counted(SceneSampler(replace(config.cameras, kind="scene", distance=wide(config))), ruler)
        far.sample(HELD_OUT_SEED, ids, 0, TRIED, field)
    result = {
        "prior_cameras": accuracy(read(opened, same[None][rows], classifier), expected, same[None]),
        "free_space": accuracy(read(opened, everywhere, classifier), expected, everywhere),
        "wide": far.shares(),
        "free_volume": round(float(free.mean()), 3),
        **json.loads((Path(config.run.dir) / "notes.json").read_text()),
    }
    pictures, _ = render_group(opened, opened.ids, inspection(opened, SHOWN))
    return result, pictures.clamp(0, 1)


def page(arguments: argparse.Namespace, rows: list[dict[str, Any]]) -> str:
    """The results page."""

    def line(row: dict[str, Any]) -> str:
        seen = [f"{row[where][head]:.1%}" if where in row else "" for where in WHERE for head in HEADS]
        shares = [f"{row[name]:.1%}" if name in row else "" for name in SEEN]
        shares += [f"{row['wide'][name]:.1%}" if "wide" in row else "" for name in SEEN]
        return " | ".join([row["arm"], *seen, *shares, str(row.get("free_volume", "")), str(row.get("seconds", ""))])

    table = "\n".join(f"| {line(row)} |" for row in rows)
    settings = " ".join(arguments.overrides)
    return f"""# Do cameras in the free space of each particle make better rooms?

{machine()}

    python -m benchmarks.rooms --out DIR --particles {arguments.particles} --rounds {arguments.rounds} \
--seed {arguments.seed} --arms {arguments.arms} --page benchmarks/rooms.md {settings}

`configs/room.yaml`, {arguments.particles} radiance fields of as many prompts in a run with one score network, \
{arguments.rounds} rounds. Share of {HELD_OUT} views a particle in which the classifier reads a room, the asked walls \
and the asked floor; from cameras drawn as the prior's rooms have them, the same for all arms, and from cameras all \
over each particle's own free space. Floors are read in the views that do not look up.

"In matter": the optical depth of a cell of the grid is at least `cameras.adaptive.optical_depth`; "in solid matter": \
at least {SOLID:g}; "facing a wall": solid matter nearer than `cameras.adaptive.clearance` in the middle of the view. \
Under "paper's ranges" are the shares of {TRIED} cameras a particle that stand where the paper's would in the trained \
room: 0.1 to 2.3 from the centre of a hollow of 2.5, in proportion.

| cameras | room | walls | floor | free space: room | walls | floor | training views in matter | in solid matter | \
facing a wall | paper's ranges: in matter | in solid matter | facing a wall | free volume | s |
|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|
{table}

![{arguments.arms}](rooms.png)

From left to right: {arguments.arms}; a row a particle, four sides from the centre.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--particles", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--arms", default="centre,adaptive")
    parser.add_argument("--page", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    args = parser.parse_args()
    classifier = load_classifier()
    expected = [expected_labels(prompt) for prompt in draw_prompts(args.particles, args.seed)]
    cameras = held_out(HELD_OUT, HELD_OUT_SEED)
    perfect = accuracy(drawn(cameras, expected, classifier), expected, cameras[None])
    rows: list[dict[str, Any]] = [{"arm": "drawn", "prior_cameras": perfect}]
    print(json.dumps(rows[0]), flush=True)
    sheets = []
    for arm in args.arms.split(","):
        result, pictures = measure(configured(arm, args), classifier)
        rows.append({"arm": arm} | result)
        sheets.append(torch.cat((pictures, torch.ones_like(pictures[:, :1])), dim=1))
        print(json.dumps(rows[-1]), flush=True)
    sheet = contact_sheet(torch.cat(sheets, dim=1)[:, :-1]).reduce(2).quantize(256)
    save_png(sheet, args.out, "rooms.png")
    if args.page:
        args.page.write_text(page(args, rows), encoding="ascii")
        save_png(sheet, args.page.parent, "rooms.png")


if __name__ == "__main__":
    main()
