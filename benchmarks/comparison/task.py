"""The task of the comparison: particles divided among ranks, and one network that all ranks train on all particles.

It has the structure of variational score distillation at a fraction of the cost. The state consists of float32 tensors
with plain names, so two states can be compared bit for bit, and a known state can replace a trained one.
"""

from __future__ import annotations

import hashlib
import itertools
import zlib

import torch
from torch import Tensor, nn

from distvsd.parallel.assign import owners

PARTICLES = 7
NUMBERS = 2**17  # in one particle: 512 KiB, and twice that for Adam
FEATURES = 64
WIDTH = 384  # gives the network 0.9 million parameters, as a small LoRA has; enough for several buckets of DDP
SEED = 5


class Network(nn.Sequential):
    """Takes the place of the score network."""

    def __init__(self) -> None:
        sizes = [FEATURES, *[WIDTH] * 6, FEATURES]
        layers: list[nn.Module] = []
        for inner, outer in itertools.pairwise(sizes):
            layers += [nn.Linear(inner, outer), nn.Tanh()]
        super().__init__(*layers[:-1])


class Task:
    """One rank's particles, the network, and their optimisers. All ranks start with the same network."""

    def __init__(self, rank: int, size: int) -> None:
        self.ids = owners(PARTICLES, size)[rank]
        torch.manual_seed(SEED)
        self.network: nn.Module = Network()
        every = [nn.Parameter(torch.randn(NUMBERS)) for _ in range(PARTICLES)]
        self.particles = {particle: every[particle] for particle in self.ids}
        self.particle_optimizers = {
            particle: torch.optim.Adam([value], lr=0.02) for particle, value in self.particles.items()
        }
        self.network_optimizer = torch.optim.Adam(self.network.parameters(), lr=1e-3)
        for optimizer in [*self.particle_optimizers.values(), self.network_optimizer]:
            _make_state(optimizer)

    def features(self, particle: int, noise: Tensor) -> Tensor:
        """`[FEATURES]`, differentiable. Takes the place of a render."""
        return self.particles[particle].reshape(FEATURES, -1).sum(1) / 64 + 0.1 * noise

    def move(self, particle: int, features: Tensor) -> None:
        """One step of a particle along a distillation gradient. The network is evaluated but not trained."""
        with torch.no_grad():
            target = torch.linspace(-1, 1, FEATURES) * (particle + 1)
            gradient = features - target + self.network(features[None])[0]
        optimizer = self.particle_optimizers[particle]
        optimizer.zero_grad()
        (features * gradient).sum().backward()
        optimizer.step()

    def state(self) -> dict[str, Tensor]:
        """Every tensor of this rank that training changes, by name. They are not copies."""
        found: dict[str, Tensor] = {}
        for particle, value in self.particles.items():
            found |= self.particle_state(particle, value)
        for name, parameter in self.network.named_parameters():
            found[f"network/{name}"] = parameter.data
            for key, tensor in self.network_optimizer.state[parameter].items():
                found[f"optimizer/{name}/{key}"] = tensor
        return found

    def particle_state(self, particle: int, value: nn.Parameter) -> dict[str, Tensor]:
        """The part of `state` that belongs to one particle."""
        moments = self.particle_optimizers[particle].state[value]
        return {f"particle/{particle}/{key}": tensor for key, tensor in {"value": value.data, **moments}.items()}

    def fill(self, step: int, variant: int = 0) -> None:
        """Replaces the trained state by one in which every tensor encodes the step and the variant."""
        for name, tensor in self.state().items():
            tensor.copy_(_known(name, tensor, step, variant))

    def is_of(self, step: int, variant: int = 0) -> bool:
        """Whether every tensor has the bits that `fill` gives it."""
        return all(torch.equal(tensor, _known(name, tensor, step, variant)) for name, tensor in self.state().items())

    def digests(self) -> dict[str, str]:
        """SHA-256 of every tensor, by name."""
        return {
            name: hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()
            for name, tensor in self.state().items()
        }


def _known(name: str, tensor: Tensor, step: int, variant: int) -> Tensor:
    if tensor.ndim == 0:
        return torch.tensor(float(step + 1000 * variant))
    offset = step + 1000 * variant + zlib.crc32(name.encode()) % 97
    return torch.linspace(offset, offset + 1, tensor.numel()).reshape(tensor.shape)


def _make_state(optimizer: torch.optim.Optimizer) -> None:
    """Creates Adam's moments as zeros, so that a state can be loaded into them before the first step."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for state in optimizer.state.values():
        state["step"].zero_()
    optimizer.zero_grad()
