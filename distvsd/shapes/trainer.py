"""Training of the UNet and the text encoder: weights, moving average, optimiser, and the files they are written to."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

EMA = 0.998
WARMUP = 300


class PriorTrainer:
    """The models, their moving average and the optimiser, saved and loaded together."""

    def __init__(self, modules: torch.nn.ModuleDict, learning_rate: float, steps: int) -> None:
        self.modules = modules
        self.learning_rate = learning_rate
        self.steps = steps
        self.device = next(modules.parameters()).device
        self.average = {name: value.detach().clone() for name, value in modules.named_parameters()}
        self.optimizer = torch.optim.AdamW(modules.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=1e-2)
        self.step = 0

    def update(self, noisy: Tensor, timesteps: Tensor, tokens: Tensor, target: Tensor, weight: Tensor) -> float:
        progress = self.step / self.steps
        decay = 0.5 * (1 + math.cos(math.pi * progress))
        self.optimizer.param_groups[0]["lr"] = self.learning_rate * min(1.0, (self.step + 1) / WARMUP) * decay
        text: Tensor = self.modules["text_encoder"](tokens.to(self.device))[0]
        predicted = self.modules["unet"](noisy.to(self.device), timesteps.to(self.device), text).sample
        loss = (weight.to(self.device) * (predicted - target.to(self.device)).square()).mean()
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.modules.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        # The average follows faster at first, to forget the random start.
        towards = 1 - min(EMA, (self.step + 1) / (self.step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.average.values()), list(self.modules.parameters()), towards)
        return float(loss.detach())

    def save(self, path: Path) -> None:
        tensors = {f"model/{name}": value.detach() for name, value in self.modules.named_parameters()}
        tensors |= {f"average/{name}": value for name, value in self.average.items()}
        for (name, _), moments in zip(self.modules.named_parameters(), self.optimizer.state.values(), strict=True):
            tensors |= {f"{key}/{name}": moments[key] for key in ("exp_avg", "exp_avg_sq")}
        save_atomically({"step": torch.tensor(self.step)} | {k: v.contiguous() for k, v in tensors.items()}, path)

    def load(self, path: Path) -> None:
        if not path.exists():
            return
        with safe_open(path, "pt") as file:
            self.step = int(file.get_tensor("step"))
            for name, value in self.modules.named_parameters():
                value.data.copy_(file.get_tensor(f"model/{name}"))
                self.average[name].copy_(file.get_tensor(f"average/{name}"))
                self.optimizer.state[value] = {
                    "step": torch.tensor(float(self.step)),
                    "exp_avg": file.get_tensor(f"exp_avg/{name}").to(self.device),
                    "exp_avg_sq": file.get_tensor(f"exp_avg_sq/{name}").to(self.device),
                }

    def write(self, folder: Path) -> None:
        """The moving average, in half precision, in the layout of a diffusers pipeline."""
        live = {name: value.detach().clone() for name, value in self.modules.named_parameters()}
        for name, value in self.modules.named_parameters():
            value.data.copy_(self.average[name])
        for part in ("unet", "text_encoder"):
            module: Any = self.modules[part]
            # Saved in half precision from a copy of the weights, so that training goes on in single precision.
            module.half().save_pretrained(folder / part, safe_serialization=True)
            module.float()
            for file in (folder / part).iterdir():
                file.chmod(0o644)  # the libraries write weights that only their owner can read
        for name, value in self.modules.named_parameters():
            value.data.copy_(live[name])
        index = {
            "_class_name": "StableDiffusionPipeline",
            "scheduler": ["diffusers", "DDIMScheduler"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["distvsd.networks.patch_codec", "PatchCodec"],
        }
        (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def save_atomically(tensors: dict[str, Tensor], path: Path) -> None:
    """Writes a file atomically: a reader finds the whole file or none."""
    staged = path.with_suffix(".staged")
    save_file(tensors, staged)
    staged.replace(path)
