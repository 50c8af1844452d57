"""The engine: DeepSpeed around the objective. The only module that imports deepspeed.

In: a ``DiffusionObjective``, settings and the ranks. Out: an engine whose forward, backward and step are spread
over the ranks, and the parameters whole again for export. ``deepspeed_config`` is pure: what DeepSpeed is told, in one
place.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import chdir, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from diffcap_dist.config import OptimizerConfig, TrainingConfig
from diffcap_dist.training.distributed import Ranks
from diffcap_dist.training.ema import local_piece


@dataclass(frozen=True)
class BatchSplit:
    """``global_batch_size`` photos, cut: ``micro`` per forward, ``accumulation`` forwards, ``world_size`` ranks."""

    micro: int
    accumulation: int
    world_size: int

    @property
    def total(self) -> int:
        return self.micro * self.accumulation * self.world_size


def split_batch(config: TrainingConfig, world_size: int) -> BatchSplit:
    """The global batch is fixed; the share of a rank and its micro batches follow. ValueError where they don't fit."""
    total, micro = config.global_batch_size, config.micro_batch_size
    if total % world_size:
        raise ValueError(
            f"training.global_batch_size={total} can't be shared equally by {world_size} ranks: "
            f"use a multiple of {world_size}"
        )
    share = total // world_size
    micro = micro or share
    if share % micro:
        raise ValueError(
            f"training.micro_batch_size={micro} does not divide the {share} photos of a rank "
            f"(global_batch_size {total} / {world_size} ranks)"
        )
    return BatchSplit(micro, share // micro, world_size)


def choose_precision(setting: str, device: torch.device) -> tuple[torch.dtype, str]:
    """(dtype, why) for training.precision. ``auto`` is bf16 where the device multiplies it natively, else fp32."""
    if setting != "auto":
        return (torch.bfloat16 if setting == "bf16" else torch.float32), "as set"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, f"auto: {torch.cuda.get_device_name(device)} has native bf16"
        return torch.float32, f"auto: {torch.cuda.get_device_name(device)} has no native bf16"
    return (
        torch.float32,
        "auto: a CPU (small matrices gain little from bf16, and emulated it is 100 times slower)",
    )


def deepspeed_config(
    training: TrainingConfig, optimizer: OptimizerConfig, split: BatchSplit, dtype: torch.dtype
) -> dict[str, Any]:
    """DeepSpeed's JSON as a dict; a pure function of the settings."""
    return {
        "train_batch_size": split.total,
        "train_micro_batch_size_per_gpu": split.micro,
        "gradient_accumulation_steps": split.accumulation,
        "gradient_clipping": optimizer.max_grad_norm,
        "steps_per_print": 1_000_000_000,  # our loop reports
        "bf16": {"enabled": dtype == torch.bfloat16},
        "zero_allow_untested_optimizer": True,  # torch's own AdamW: nothing to compile, same maths everywhere
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": training.zero_stage,
            # EMA and export work on partitions; a parameter kept whole beside its partition would fall out of step.
            "stage3_param_persistence_threshold": 0,
        },
    }


def build_engine(
    objective: nn.Module,
    training: TrainingConfig,
    optimizer: OptimizerConfig,
    split: BatchSplit,
    dtype: torch.dtype,
    ranks: Ranks,
) -> Any:
    """The DeepSpeed engine. Always call it itself: training through ``engine.module`` would leave gradients local."""
    os.environ.setdefault("DS_ACCELERATOR", ranks.device.type)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed

    # On CPUs it would compile an all-reduce for inference, which nothing here calls, and leave 67 MB of it in /dev/shm
    # for each rank of each run. Without compatible operators nothing is compiled: no compiler is needed.
    vars(deepspeed.ops)["__compatible_ops__"] = {}
    parameters = [p for p in objective.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(
        parameters,
        lr=optimizer.learning_rate,
        betas=(optimizer.beta1, optimizer.beta2),
        weight_decay=optimizer.weight_decay,
    )
    config = deepspeed_config(training, optimizer, split, dtype)
    engine, *_ = deepspeed.initialize(model=objective, optimizer=adamw, config=config, dist_init_required=False)
    return engine


def set_learning_rate(engine: Any, rate: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = rate


@contextmanager
def gathered(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Inside, the parameters are whole on every rank; a no-op below ZeRO-3. All ranks enter."""
    partitioned = [p for p in parameters if hasattr(p, "ds_tensor")]
    if not partitioned:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned):
        yield


def full_state(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of ``module``, whole, fp32, on the CPU. All ranks enter; one parameter at a time."""
    saved = module.state_dict().keys()
    state = {name: buffer.detach().float().cpu() for name, buffer in module.named_buffers() if name in saved}
    for name, parameter in module.named_parameters():
        with gathered([parameter]):
            state[name] = parameter.detach().float().cpu().clone()
    return state


def piece_of(whole: Tensor, parameter: nn.Parameter) -> Tensor:
    """This rank's piece of a whole value of ``parameter``: the inverse of gathering it."""
    piece = local_piece(parameter)
    if piece is parameter:
        return whole.to(piece.device, torch.float32).reshape(piece.shape)
    import torch.distributed as dist

    size = piece.numel()
    flat = torch.zeros(size * dist.get_world_size())
    flat[: whole.numel()] = whole.flatten()
    start = dist.get_rank() * size
    return flat[start : start + size].to(piece.device).reshape(piece.shape)


def optimizer_and_masters(engine: Any) -> tuple[torch.optim.Optimizer, list[Tensor]]:
    """torch's own optimizer and the fp32 tensors it steps: one per trained parameter at stage 0, or partitions."""
    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    return optimizer, [master for group in optimizer.param_groups for master in group["params"]]


def convert_partitions(path: Path, target: Path) -> None:
    """A checkpoint of ZeRO 1-3 -> DeepSpeed's universal format (whole tensors) in ``target``. One rank enters.

    Paths are relative meanwhile: the converter takes them for patterns, and brackets are common in a run's name.
    """
    from deepspeed.checkpoint import ds_to_universal

    settings = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False, "strict": True}
    folders = {"input_folder": path.name, "output_folder": target.name}
    with chdir(path.parent), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        ds_to_universal.main(SimpleNamespace(**folders, **settings, inject_missing_state=True))
    (path.parent / "latest_universal").unlink()


def deepspeed_version() -> str:
    import deepspeed

    return str(deepspeed.__version__)


def load_partitions(engine: Any, folder: Path) -> None:
    """This rank's masters and optimizer state from the universal format; a ZeRO stage above 0. All ranks enter.

    Through the optimizer, not ``engine.load_checkpoint`` with ``load_universal``: under that setting later ZeRO-3 saves
    lack the files of the other ranks (DeepSpeed #7546), and no stage loads another one's checkpoint.
    """
    engine.optimizer.load_state_dict(None, checkpoint_folder=str(folder))
