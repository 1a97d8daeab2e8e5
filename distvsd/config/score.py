"""The student: the shared score network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from distvsd.config.ranges import Betas, Count, Measured, Positive, Range, Rate, Share, Weight


@dataclass(frozen=True)
class ScoreConfig:
    """The shared score network: a LoRA adapter of a frozen network with a camera condition."""

    base: str = ""
    """A diffusers pipeline folder whose network is adapted; empty: the prior's. It must have the prior's latents, text
    encoder and noise schedule, but may have another prediction type. The paper uses SD 2.1 base as the prior and SD 2.1
    here."""
    rank: Annotated[int, Range(1, 1024)] = 4
    """Rank of the adapter."""
    init: Literal["normal", "kaiming"] = "normal"
    """How the adapter's first factor begins. normal: standard deviation 1 / rank, as in the paper's code; kaiming:
    uniform with standard deviation 1 / sqrt(3 inputs), peft's own, which learns more slowly at first."""
    steps_per_round: Positive = 1
    """Optimiser steps of the adapter per round (K)."""
    batch_size: Count = 0
    """Renders of a round that each of its steps trains on, dealt so that steps take different ones; 0 is all, in every
    step. Rounded down to whole particles with all their views, but at least one. K steps on a K-th each cost what one
    step on all does, and the score follows the particles sooner."""
    learning_rate: Rate = 1e-4
    """AdamW's rate after the warm-up."""
    warmup: Count = 500
    """Steps over which the rate grows linearly from 0."""
    weight_decay: Annotated[float, Range(0, 1)] = 1e-2
    """AdamW's weight decay."""
    betas: Betas = (0.9, 0.999)
    """AdamW's decay rates of the two moments."""
    eps: Annotated[float, Range(0, 1, above=True)] = 1e-8
    """AdamW's epsilon."""
    camera_drop: Share = 0.1
    """Probability with which the camera condition is zeroed in training."""
    replay_rounds: Count = 8
    """Rounds of renders kept for replay."""
    replay_share: Annotated[float, Range(0, 0.99)] = 0.0
    """Share of each score batch drawn from the replay; above 0 needs replay_rounds."""
    micro_batch: Measured = "auto"
    """Samples per call of either UNet, for the particles' gradient and in the score's training; fewer need less memory.
    0: all samples of a group, and all that a rank trains on, in one call; any other number needs parallel.strategy
    flat. auto: 0 for the gradient; for the training measured as particles.micro_batch is, 0 where the strategy is not
    flat. numerics exact always takes one particle a call."""
    learning_rate_scaling: Literal["none", "sqrt", "linear"] = "none"
    """How the learning rate grows with the samples of a step, relative to one sample."""
    max_grad_norm: Weight = 0.0
    """Gradients are clipped to this norm; 0 is off."""
    max_skipped: Positive = 20
    """The run ends after this many optimiser steps in a row were skipped because a gradient was not finite."""

    def fresh(self, particles: int, views: int) -> int:
        """Of a round's particles, how many a step trains on: whole ones, with all their views."""
        return min(max(self.batch_size // views, 1), particles) if self.batch_size else particles

    def replayed(self, fresh: int) -> int:
        """Particles from the replay that come to so many fresh ones."""
        return round(fresh * self.replay_share / (1 - self.replay_share))

    def rows_a_step(self, particles: int, views: int) -> int:
        """Samples that one step trains on, replayed ones with them."""
        fresh = self.fresh(particles, views)
        return (fresh + self.replayed(fresh)) * views
