"""DeepSpeed's ZeRO: each rank keeps a part of the optimiser (1), of the gradient (2), and of the network (3)."""

from __future__ import annotations

import functools
import logging
import math
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distvsd.config import ParallelConfig
from distvsd.errors import BackendError
from distvsd.faults import fault, poison
from distvsd.parallel.collectives import all_gather_rows, device_timeout
from distvsd.parallel.world import World
from distvsd.score.base import StepResult
from distvsd.score.optimizer import AdapterOptimizer
from distvsd.score.strategies.base import Trained, together, total_loss
from distvsd.score.work import Work

# ZeRO-3 leaves tensors of up to this many numbers whole on every rank: gathering them costs more than it saves.
PERSISTENT = 100_000
MOMENTS = ("exp_avg", "exp_avg_sq")


class DeepSpeed:
    """A DeepSpeedEngine that owns what is trained from `begin` on; before that `local` does.

    The engine itself reduces, clips, leaves out steps that are not finite, and steps, in float32 whatever the network's
    dtype. network: stage 3 partitions it, and every call of it is then collective. config: the stage, and the timeout
    of the group that DeepSpeed opens.
    """

    def __init__(self, world: World, config: ParallelConfig, network: nn.Module, local: AdapterOptimizer) -> None:
        self._world = world
        self._stage = config.zero_stage
        self._network = network
        self._local = local
        self._timeout_s = config.timeout_s
        self._engine: Any = None

    @property
    def optimizer(self) -> DeepSpeed:
        """See `score.base.Strategy`."""
        return self

    def begin(self) -> None:
        """On the first call, hands the parameters to DeepSpeed, with the moments of a resumed run. Collective then."""
        if self._engine is None:
            with together(self._world):
                self._engine = self._opened()

    def calling(self) -> AbstractContextManager[None]:
        """See `score.base.Strategy`. Network calls are collective with stage 3."""
        return together(self._world) if self._stage == 3 else nullcontext()

    def step(self, work: Work, learning_rate: float) -> StepResult:
        """See `score.base.Strategy`. Without a finite norm of the reduced gradient DeepSpeed leaves the step out."""
        self.begin()
        engine = self._engine
        fault("reduce")
        with together(self._world):
            engine.optimizer.override_loss_scale(work.scale)
            # DeepSpeed averages over ranks, but the ranks' parts must be summed.
            objective, rows = engine(work, float(self._world.size))
            loss = total_loss(self._world, rows)
            objective = poison("reduce", objective[None]).sum()
            for group in engine.optimizer.param_groups:
                group["lr"] = self._local.rate(learning_rate)
            # A loss beyond float32 can have a finite gradient, and no other strategy would take that step.
            engine.backward(objective if math.isfinite(loss) else objective * math.nan)
            engine.step()
        usable = bool(engine.was_step_applied())
        self._local.num_steps += usable
        return StepResult(usable, loss, rows, None)

    @property
    def num_steps(self) -> int:
        """See `score.base.OptimizerState`."""
        return self._local.num_steps

    def values(self) -> Mapping[str, Tensor]:
        """See `score.base.OptimizerState`."""
        if self._engine is None or self._stage < 3:
            return self._local.values()
        from deepspeed.utils import safe_get_local_fp32_param

        return self._gathered(safe_get_local_fp32_param)

    def moments(self) -> Mapping[str, Mapping[str, Tensor]]:
        """See `score.base.OptimizerState`."""
        if self._engine is None or not self.num_steps:
            return self._local.moments()
        from deepspeed.utils import safe_get_full_optimizer_state, safe_get_local_optimizer_state

        wholes = {}
        for moment in MOMENTS:
            if self._stage == 3:
                wholes[moment] = self._gathered(
                    functools.partial(safe_get_local_optimizer_state, optim_state_key=moment)
                )
            else:
                named = self._local.trainable.items()
                wholes[moment] = {name: safe_get_full_optimizer_state(parameter, moment) for name, parameter in named}
        step = torch.tensor(float(self.num_steps))
        return {
            name: {"step": step} | {moment: wholes[moment][name] for moment in MOMENTS}
            for name in self._local.trainable
        }

    def restore(
        self, values: Mapping[str, Tensor], moments: Mapping[str, Mapping[str, Tensor]], num_steps: int
    ) -> None:
        """See `score.base.OptimizerState`."""
        assert self._engine is None, "a state is restored before the first step"
        self._local.restore(values, moments, num_steps)

    def _gathered(self, part_of: Callable[[Any], Tensor]) -> dict[str, Tensor]:
        """Whole tensors from every rank's parts, in one collective; DeepSpeed's own way takes one for each tensor."""
        trained: Mapping[str, Any] = self._local.trainable  # with attributes that stage 3 gives them
        parts = [part_of(parameter).flatten() for parameter in trained.values()]
        rows = all_gather_rows(self._world, torch.cat(parts)[None]).wait()[:, 0]
        wholes = torch.split(rows, [len(part) for part in parts], dim=1)
        return {
            name: whole.flatten()[: parameter.ds_numel].view(parameter.ds_shape)
            for (name, parameter), whole in zip(trained.items(), wholes, strict=True)
        }

    def _opened(self) -> Any:
        deepspeed = _imported(self._world.device.type)
        local = self._local
        moments = local.release()
        trained = list(local.trainable.values())
        config = self._config(sum(parameter.numel() for parameter in trained))
        model = Spread(self._network) if self._stage == 3 else Trained(local.trainable)
        if self._stage == 3:
            # Partitions tensor by tensor; the engine would first put the whole network on the device.
            deepspeed.zero.Init(module=model, config_dict_or_path=config)
            for buffer in model.buffers():  # Init does not move them
                buffer.data = buffer.data.to(self._world.device)
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=local.new_adamw(trained),
            config=config,
            dist_init_required=False,
        )
        # The group is DeepSpeed's own copy of the world's, with a default timeout of half an hour.
        patience = device_timeout(self._timeout_s) if self._world.device.type == "cuda" else self._timeout_s
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=patience), engine.data_parallel_group)
        if moments:
            self._hand_over(engine, moments)
        return engine

    def _config(self, num_trained: int) -> dict[str, Any]:
        return {
            "train_micro_batch_size_per_gpu": 1,  # only DeepSpeed's own counting of samples reads it
            "gradient_clipping": self._local.max_grad_norm,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {
                "stage": self._stage,
                "overlap_comm": False,
                # Buckets are allocated in full; the default is half a billion numbers.
                "reduce_bucket_size": num_trained,
                "allgather_bucket_size": num_trained,
                "stage3_param_persistence_threshold": PERSISTENT,
            },
        }

    def _hand_over(self, engine: Any, moments: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Copies whole moments into the parts that this rank keeps; AdamW would start with zeros in its first step."""
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        zero, adamw = engine.optimizer, engine.optimizer.optimizer
        parts = zero.fp32_partitioned_groups_flat if self._stage == 3 else zero.single_partition_of_fp32_groups
        for part in parts:
            adamw.state[part] = {"step": torch.tensor(float(self.num_steps))} | {
                moment: torch.zeros_like(part) for moment in MOMENTS
            }
        if self._stage < 3:
            zero._lazy_init_hp_params_optimizer_state()
        for name, parameter in self._local.trainable.items():
            for moment in MOMENTS:
                whole = moments[name][moment]
                if self._stage < 3:
                    safe_set_full_optimizer_state(parameter, whole, moment)
                else:
                    safe_set_local_optimizer_state(parameter, self._part(whole, parameter), moment)

    def _part(self, whole: Tensor, parameter: Any) -> Tensor:
        """This rank's part of a tensor that belongs to a parameter: all parts are equally long, with padding."""
        length = parameter.ds_tensor.numel()
        padding = length * self._world.size - whole.numel()
        padded = torch.nn.functional.pad(whole.flatten(), (0, padding))
        return padded[length * self._world.rank :][:length]


def _imported(device: str) -> Any:
    if device == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read at import; without it DeepSpeed looks for a GPU
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    found = deepspeed.get_accelerator().device_name()
    if found != device:
        raise BackendError(
            f"this run computes on {device} and DeepSpeed on {found}: another package imported DeepSpeed before the "
            f"run chose its device; start with DS_ACCELERATOR={device} in the environment, or set "
            "parallel.strategy=flat"
        )
    if device == "cpu":
        # Else it compiles its own CPU reduction for one machine at the first run: two minutes, and a C++ compiler.
        deepspeed.ops.__compatible_ops__ = {}
    return deepspeed


class Spread(nn.Module):
    """The whole network, for stage 3 to partition; its modules are called as usual and gather their own parameters."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, work: Work, factor: float) -> tuple[Tensor, Tensor]:
        return work.weighted_loss(factor)
