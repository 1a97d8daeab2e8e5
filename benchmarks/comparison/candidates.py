"""Four ways to save and resume the task. Each follows the documentation of its library and well-known training loops.

All keep two checkpoints, and restore the random state if their files have one. No weakness is added to any of them. The
docstring of each class says which pattern it follows.
"""

from __future__ import annotations

import re
import shutil
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from benchmarks.comparison.task import FEATURES, PARTICLES, SEED, Task
from distvsd.checkpoint import Saver, particle_file
from distvsd.parallel.collectives import barrier
from distvsd.parallel.reduce import reduce_gradients
from distvsd.parallel.world import World
from distvsd.vsd.rng import Purpose, normal

KEEP = 2


class Candidate(ABC):
    """One rank of a run with one way to save it. All ranks call every method except `fill` and `is_of`."""

    name: str
    written_as: str  # the source of the pattern

    def __init__(self, folder: Path, world: World) -> None:
        self.folder, self.world = folder, world
        self.task = Task(world.rank, world.size)

    @abstractmethod
    def step(self, number: int) -> None:
        """One round."""

    @abstractmethod
    def save(self, step: int) -> None: ...

    @abstractmethod
    def load(self) -> int:
        """Restores the checkpoint that a restarted program takes for the newest, and returns its step."""

    def fill(self, step: int, variant: int = 0) -> None:
        """Replaces the trained state by one in which everything encodes the step and the variant."""
        self.task.fill(step, variant)

    def is_of(self, step: int, variant: int = 0) -> bool:
        """Whether everything from which training continues has the bits that `fill` gives it."""
        return self.task.is_of(step, variant)


class Loop(Candidate):
    """The common part of the programs other than distvsd: DDP for the network, and the global generator for noise,
    seeded by rank."""

    def __init__(self, folder: Path, world: World) -> None:
        super().__init__(folder, world)
        self.wrapped = self._wrap()
        torch.manual_seed(SEED + 1 + world.rank)

    def _wrap(self) -> nn.Module:
        if self.world.size == 1:
            return self.task.network
        return nn.parallel.DistributedDataParallel(self.task.network)

    def step(self, number: int, nan: int | None = None, absent: int | None = None) -> None:
        """nan: a particle whose render is NaN in this round. absent: a particle that skips this round."""
        task, samples, noises = self.task, [], []
        for particle in task.ids:
            noise = torch.randn(FEATURES)
            if particle == absent:
                continue
            features = task.features(particle, noise)
            if particle == nan:
                features = features * torch.nan
            task.move(particle, features)
            samples.append(features.detach())
            noises.append(noise)
        task.network_optimizer.zero_grad()
        self._backward((self.wrapped(torch.stack(samples)) - torch.stack(noises)).square().mean())
        task.network_optimizer.step()

    def _backward(self, loss: Tensor) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def fill(self, step: int, variant: int = 0) -> None:
        super().fill(step, variant)
        torch.manual_seed(self._seed(step, variant))

    def is_of(self, step: int, variant: int = 0) -> bool:
        expected = torch.Generator().manual_seed(self._seed(step, variant)).get_state()
        return super().is_of(step, variant) and torch.equal(torch.get_rng_state(), expected)

    def _seed(self, step: int, variant: int) -> int:
        return 10_000 * self.world.rank + 1000 * variant + step

    def _particles(self) -> dict[str, Tensor]:
        return {name: value for name, value in self.task.state().items() if name.startswith("particle/")}

    def _restore_particles(self, saved: dict[str, Tensor]) -> None:
        """Raises KeyError if the file lacks a particle of this rank, instead of leaving that particle unchanged."""
        for name, value in self._particles().items():
            value.copy_(saved[name])


class Accelerate(Loop):
    """`Accelerator.save_state` on every rank into `checkpoint-STEP`.

    It resumes the folder with the highest number, and deletes old folders before it writes the new one. save_state
    saves registered objects of the main rank only, so each rank writes its particles to its own file in the folder.
    """

    name = "accelerate"
    written_as = (
        "accelerate's guide to checkpointing (`save_state`, `load_state`); names, choice and deletion of folders as in "
        "diffusers' `train_text_to_image_lora.py`; each rank adds its particles to the folder with `torch.save`"
    )

    def __init__(self, folder: Path, world: World) -> None:
        self.accelerator = Accelerator(cpu=True)
        super().__init__(folder, world)
        self.task.network_optimizer = self.accelerator.prepare_optimizer(self.task.network_optimizer)

    def _wrap(self) -> nn.Module:
        wrapped: nn.Module = self.accelerator.prepare_model(self.task.network)
        return wrapped

    def _backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)

    def save(self, step: int) -> None:
        if self.accelerator.is_main_process:
            for old in self._folders()[: -(KEEP - 1)]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()
        folder = self.folder / f"checkpoint-{step}"
        self.accelerator.save_state(str(folder))
        torch.save(self._particles(), folder / f"particles_{self.world.rank}.pt")
        self.accelerator.wait_for_everyone()

    def load(self) -> int:
        newest = self._folders()[-1]
        self.accelerator.load_state(str(newest))
        self._restore_particles(torch.load(newest / f"particles_{self.world.rank}.pt", weights_only=True))
        return int(newest.name.partition("-")[2])

    def _folders(self) -> list[Path]:
        return sorted(self.folder.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))


class TorchSave(Loop):
    """One `torch.save` per rank, `ckpt_STEP_rankR.pt`, with all state including the random state. Old files are deleted
    after all ranks have saved."""

    name = "DDP + torch.save"
    written_as = (
        "PyTorch's tutorial on saving a general checkpoint; one file per rank, `ckpt_{step}_rank{rank}.pt`, as in "
        "gsplat's distributed trainer"
    )

    def save(self, step: int) -> None:
        task = self.task
        state = {
            "step": step,
            "particles": self._particles(),
            "network": task.network.state_dict(),
            "optimizer": task.network_optimizer.state_dict(),
            "rng": torch.get_rng_state(),
        }
        torch.save(state, self._path(step))
        barrier(self.world)
        for old in self._steps()[:-KEEP]:
            self._path(old).unlink(missing_ok=True)

    def load(self) -> int:
        saved: dict[str, Any] = torch.load(self._path(self._steps()[-1]), weights_only=True)
        self.task.network.load_state_dict(saved["network"])
        self.task.network_optimizer.load_state_dict(saved["optimizer"])
        self._restore_particles(saved["particles"])
        torch.set_rng_state(saved["rng"])
        return int(saved["step"])

    def _steps(self) -> list[int]:
        """The steps for which any rank has a file. With only its own files each rank could take another newest step."""
        found = [re.fullmatch(r"ckpt_(\d+)_rank\d+\.pt", path.name) for path in self.folder.iterdir()]
        return sorted({int(match.group(1)) for match in found if match})

    def _path(self, step: int) -> Path:
        return self.folder / f"ckpt_{step}_rank{self.world.rank}.pt"


class Dcp(Loop):
    """`torch.distributed.checkpoint` into `step-N`. It resumes the newest folder with a `.metadata` file, and deletes
    old folders after a save.

    Particles are keyed by id, so another number of ranks can load them. The random state is keyed by rank.
    """

    name = "torch DCP"
    written_as = (
        "PyTorch's recipe for DCP (`get_state_dict`, `save`, `load`, `set_state_dict`), with particles keyed by id; it "
        "resumes the newest folder with a `.metadata` file and deletes old folders, as torchtitan does"
    )

    def save(self, step: int) -> None:
        state_dict_saver.save(self._state(), checkpoint_id=self.folder / f"step-{step}")
        if self.world.rank == 0:
            for old in self._steps()[:-KEEP]:
                shutil.rmtree(self.folder / f"step-{old}")

    def load(self) -> int:
        step = self._steps()[-1]
        folder, state = self.folder / f"step-{step}", self._state()
        mine = f"rng/{self.world.rank}"
        if mine not in FileSystemReader(folder).read_metadata().state_dict_metadata:  # more ranks than before
            del state[mine]
        state_dict_loader.load(state, checkpoint_id=folder)
        set_state_dict(
            self.task.network,
            self.task.network_optimizer,
            model_state_dict=state["network"],
            optim_state_dict=state["optimizer"],
        )
        if mine in state:
            torch.set_rng_state(state[mine])
        return step

    def _state(self) -> dict[str, Any]:
        network, optimizer = get_state_dict(self.task.network, self.task.network_optimizer)
        shared = {"network": network, "optimizer": optimizer, f"rng/{self.world.rank}": torch.get_rng_state()}
        return shared | self._particles()

    def _steps(self) -> list[int]:
        found = [path.parent.name for path in self.folder.glob("step-*/.metadata")]
        return sorted(int(name.partition("-")[2]) for name in found)


class Distvsd(Candidate):
    """The same task with distvsd's Saver, keyed random numbers and fixed-point reduction."""

    name = "distvsd"
    written_as = (
        "the same task with `distvsd.checkpoint.Saver`, `distvsd.vsd.rng` and `reduce_gradients(numerics='exact')`; "
        "its own trainer for the guarantees that the trainer implements (NaN, lost ranks)"
    )

    def __init__(self, folder: Path, world: World) -> None:
        super().__init__(folder, world)
        self.saver = Saver(folder, world, KEEP)

    def step(self, number: int) -> None:
        task, parameters = self.task, list(self.task.network.parameters())
        vectors = []
        for particle in task.ids:
            noise = normal(SEED, Purpose.NOISE, [particle], number, (FEATURES,))[0]
            features = task.features(particle, noise)
            task.move(particle, features)
            loss = (task.network(features.detach()[None])[0] - noise).square().mean()
            vectors.append(nn.utils.parameters_to_vector(torch.autograd.grad(loss, parameters)))
        sums = torch.zeros(len(vectors), 1, dtype=torch.float64)
        length = sum(parameter.numel() for parameter in parameters)
        total = reduce_gradients(self.world, vectors, length, "exact", sums)
        parts = total.gradient.div(PARTICLES).split([parameter.numel() for parameter in parameters])
        for parameter, gradient in zip(parameters, parts, strict=True):
            parameter.grad = gradient.reshape(parameter.shape)
        task.network_optimizer.step()

    def save(self, step: int) -> None:
        metadata = {"config": {}, "config_digest": "0" * 64, "prior_identity": "0" * 64, "metrics_bytes": 0}
        self.saver.begin(step, self._files(), {}, metadata)
        self.saver.finish()

    def load(self) -> int:
        checkpoint = self.saver.load()
        if checkpoint is None:
            raise FileNotFoundError(f"no checkpoint in {self.folder}")
        for file, tensors in self._files().items():
            saved = checkpoint.read(file)
            for name, tensor in tensors.items():
                tensor.copy_(saved[name])
        return checkpoint.manifest.step

    def _files(self) -> dict[str, dict[str, Tensor]]:
        files: dict[str, dict[str, Tensor]] = {}
        for name, tensor in self.task.state().items():
            kind, key, *_ = name.split("/")
            file = particle_file(int(key)) if kind == "particle" else f"score/{kind}.safetensors"
            files.setdefault(file, {})[name] = tensor
        return files


CANDIDATES: dict[str, type[Candidate]] = {kind.name: kind for kind in (Distvsd, Accelerate, TorchSave, Dcp)}
