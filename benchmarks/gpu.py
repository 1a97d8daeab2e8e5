"""Everything that wants a GPU, in one run without a network: the tests of tests/gpu, each kernel beside its reference,
the paper's field at 512 pixels, and whole rounds with a UNet of Stable Diffusion 2.1's size and random weights.

    bash benchmarks/gpu.sh                # on a machine with a GPU; prints a page of Markdown
    bash benchmarks/gpu.sh --smoke        # on the CPU, tiny sizes, kernels in Triton's interpreter: tries it out

Each part runs in a process of its own, so that one which fails, or breaks the GPU's context, costs only itself.
`--smoke` says nothing about speed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import yaml

from benchmarks.gpu_kernels import FULL, SMOKE, kernel_table, milliseconds, render_table
from benchmarks.machine import machine
from benchmarks.phases import launch
from benchmarks.random_sd import random_sd21
from distvsd.config import load_config
from distvsd.particles.base import parameter_counts
from distvsd.run.parts import blank_particle

ROOT = Path(__file__).parents[1]
DID_NOT_RUN = "did not run, see the messages below"
UNET_PHASES = ("prior", "score", "score training")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes on the CPU, to test this script")
    parser.add_argument("--part", choices=PARTS, action="append", help="only this part; may be given repeatedly")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the page here")
    parser.add_argument("--inner", type=Path, metavar="FILE", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.inner:
        if args.smoke:  # one core: on a busy machine, threads that wait for each other take minutes for small networks
            os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        with args.inner.open("w", encoding="utf-8") as page:
            for line in PARTS[args.part[0]](args.smoke, _device(args.smoke)):
                print(line, file=page, flush=True)
        return 0
    if not args.smoke and not torch.cuda.is_available():
        print("no CUDA here; `--smoke` tries the script out on the CPU", file=sys.stderr)
        return 2
    lines, worst = [_head(args.smoke)], 0
    print(lines[0], flush=True)
    for part in args.part or PARTS:
        text, code = _in_a_process(part, args.smoke)
        print(text, flush=True)
        lines.append(text)
        worst = max(worst, code)
    if args.out:
        args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return worst


def _in_a_process(part: str, smoke: bool) -> tuple[str, int]:
    """A part's heading and text, and 1 where it failed. What its libraries print is shown only where something did not
    run."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    if smoke:
        environment |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}
    with tempfile.TemporaryDirectory() as folder:
        page, log = Path(folder) / "page.md", Path(folder) / "log.txt"
        command = [sys.executable, str(Path(__file__)), "--inner", str(page), "--part", part]
        with log.open("wb") as sink:
            code = subprocess.run(
                command + ["--smoke"] * smoke, env=environment, cwd=ROOT, stdout=sink, stderr=sink, check=False
            ).returncode
        text = f"\n## {part}\n" + (page.read_text(encoding="utf-8").rstrip() if page.exists() else "")
        if code or DID_NOT_RUN in text:
            words = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
            text += f"\n\nIts messages, which end with code {code}:\n```\n{words}\n```"
    return text, int(code != 0)


def _device(smoke: bool) -> torch.device:
    return torch.device("cpu" if smoke else "cuda")


def _head(smoke: bool) -> str:
    where = "the CPU, tiny sizes: a test of the script, no measurement" if smoke else torch.cuda.get_device_name()
    return f"# On {where}\n{machine()}"


def tests(smoke: bool, device: torch.device) -> Iterator[str]:
    """Without CUDA they are skipped, which the summary says."""
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-rfE", "tests/gpu"]
    environment = os.environ | ({} if smoke else {"DISTVSD_TEST_GPU": "1"})
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    yield "```"
    yield from done.stdout.strip().splitlines()[-30:]
    yield "```"


def kernels(smoke: bool, device: torch.device) -> Iterator[str]:
    sizes = SMOKE if smoke else FULL
    yield (
        f"{sizes.particles} particles, {sizes.points} points each, {sizes.grid.levels} levels of at most "
        f"2^{sizes.grid.log2_table_size} entries; pictures of {sizes.edge} pixels, {sizes.grid.samples_per_ray} steps, "
        f"{sizes.cells}^3 cells. Medians of {sizes.repeats}.\n"
    )
    yield from kernel_table(sizes, device)


def field(smoke: bool, device: torch.device) -> Iterator[str]:
    yield "One particle, one view; every step of every ray is read.\n"
    yield from render_table(SMOKE if smoke else FULL, device)


def rounds(smoke: bool, device: torch.device) -> Iterator[str]:
    """The trainer's own loop, measured by benchmarks/phases.py."""
    peak = matrix_rate(256 if smoke else 8192, device)
    yield f"bfloat16 matrix product, {peak / 1e12:.3g} TFLOP/s; utilisation is of it.\n"
    counts = (1, 2) if smoke else (1, 2, 4, 8, 16, 32, 64)
    with tempfile.TemporaryDirectory() as folder:
        prior = random_sd21(Path(folder) / "prior", smoke, device)
        for edge in (8,) if smoke else (64, 512):
            config = write_config(Path(folder) / f"{edge}.yaml", prior, edge, smoke)
            yield f"### Rendered at {edge} pixels\n"
            yield from sweep(config, counts, peak, device)


def matrix_rate(size: int, device: torch.device) -> float:
    """Operations a second of one large product of bfloat16 matrices."""
    left, right = torch.randn(2, size, size, device=device, dtype=torch.bfloat16)
    return 2 * size**3 / milliseconds(lambda: (left @ right,), device, 20) * 1000


def write_config(path: Path, prior: Path, edge: int, smoke: bool) -> Path:
    """The paper's first stage on this prior, rendered at `edge` pixels and enlarged to what the prior takes. smoke: in
    float32, because CPUs may take minutes for bfloat16."""
    given: dict[str, Any] = yaml.safe_load((ROOT / "configs" / "prolificdreamer.yaml").read_text(encoding="utf-8"))
    del given["stages"]
    given["run"] = {"dir": str(path.parent / "run")}
    given["prior"] |= {"path": str(prior), "dtype": "float32" if smoke else "bfloat16"}
    given["render"] |= {"resolution": edge}
    given["particles"]["network_learning_rate"] = 1e-3
    if smoke:
        given["particles"]["nerf"] |= {"levels": 2, "log2_table_size": 9, "base_resolution": 4, "max_resolution": 8}
        given["particles"]["nerf"] |= {"samples_per_ray": 4}
    path.write_text(yaml.safe_dump(given), encoding="utf-8")
    return path


def sweep(config: Path, counts: Sequence[int], peak: float, device: torch.device) -> Iterator[str]:
    """One line a number of particles, then the phases of the largest number that fitted."""
    yield "| particles | updates/s | ms a round | ms an update | UNet TFLOP/s | utilisation | peak GiB | could reside |"
    yield "|---:|---:|---:|---:|---:|---:|---:|---:|"
    last: dict[str, Any] | None = None
    for count in counts:
        asked = SimpleNamespace(config=str(config), overrides=[f"particles.count={count}"], stage=1)
        asked.rounds, asked.warmup = (1, 1) if device.type == "cpu" else (10, 3)
        try:
            last = launch(asked, 1)  # type: ignore[arg-type]
        except subprocess.CalledProcessError:
            yield f"| {count} | {DID_NOT_RUN} | | | | | | |"
            break
        yield _row(last, peak, residents(config, last, device))
    if last is not None:
        yield f"\n| phase, {last['particles']} particles | ms | share | TFLOP/s | peak GiB |\n|---|---:|---:|---:|---:|"
        whole = sum(last["phase_s"].values())
        for phase, seconds in last["phase_s"].items():
            rate = f"{last['flops'][phase] / seconds / 1e12:.3g}" if last["flops"][phase] and seconds else "-"
            yield (
                f"| {phase} | {1000 * seconds:.2f} | {seconds / whole:.1%} | {rate} "
                f"| {last['peak_bytes'][phase] / 2**30:.2f} |"
            )
        yield ""


def _row(found: dict[str, Any], peak: float, could_reside: str) -> str:
    count, seconds = found["particles"], found["round_s"]
    in_unet = sum(found["phase_s"][phase] for phase in UNET_PHASES)
    rate = sum(found["flops"][phase] for phase in UNET_PHASES) / in_unet
    return (
        f"| {count} | {count / seconds:.2f} | {1000 * seconds:.1f} | {1000 * seconds / count:.1f} | {rate / 1e12:.3g} "
        f"| {rate / peak:.1%} | {found['peak_allocated_bytes'] / 2**30:.2f} | {could_reside} |"
    )


def residents(config: Path, found: dict[str, Any], device: torch.device) -> str:
    """Particles with Adam's moments that fit beside what this round allocated, counted from their sizes."""
    if device.type == "cpu":
        return "-"
    trained, frozen = parameter_counts(blank_particle(load_config(config), None))
    each = 4 * (3 * trained + frozen)
    room = torch.cuda.get_device_properties(device).total_memory - found["peak_allocated_bytes"]
    return f"{found['particles'] + room // each}"


PARTS: dict[str, Callable[[bool, torch.device], Iterator[str]]] = {
    "tests": tests,
    "kernels": kernels,
    "field": field,
    "rounds": rounds,
}

if __name__ == "__main__":
    sys.exit(main())
