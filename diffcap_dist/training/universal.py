"""Universal: a checkpoint of any number of ranks at any ZeRO stage and precision, loaded by any other.

In: a checkpoint folder and the engine that wants it. Rank 0 makes whole tensors of the partitions in a folder beside
(DeepSpeed's universal format), each rank takes its pieces, the folder goes. DeepSpeed's own converter does stages 1-3
and its optimizers load the result; stage 0, which both leave out, is converted and loaded here.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffcap_dist.training import distributed
from diffcap_dist.training.distributed import Ranks
from diffcap_dist.training.ema import local_piece
from diffcap_dist.training.engine import (
    convert_partitions,
    deepspeed_version,
    load_partitions,
    optimizer_and_masters,
    piece_of,
)

MOMENTS = ("exp_avg", "exp_avg_sq")
ASIDE = "universal.tmp"


def load_universal(engine: Any, path: Path, saved_stage: int, ranks: Ranks) -> None:
    """Parameters, buffers and optimizer state of the checkpoint ``path``; all ranks enter and share rank 0's errors."""
    aside = path.with_name(ASIDE)
    found = distributed.from_first(_try_to_convert(engine, path, saved_stage, aside) if ranks.is_first else None)
    if found is not None:
        raise ValueError(f"{path} could not be converted for {ranks.world_size} ranks ({found})")
    _load_module(engine.module, path, aside)
    if engine.zero_optimization_stage():
        load_partitions(engine, aside)
    else:
        _load_plain(engine, aside)
    distributed.barrier()
    if ranks.is_first:
        shutil.rmtree(aside)


def _try_to_convert(engine: Any, path: Path, saved_stage: int, aside: Path) -> str | None:
    """Write ``aside/zero/PARAMETER/{fp32,exp_avg,exp_avg_sq,step}.pt``; what went wrong, or None."""
    shutil.rmtree(aside, ignore_errors=True)  # of a start that was killed
    try:
        if saved_stage:
            convert_partitions(path, aside)
            if saved_stage == 3:
                _as_of_other_stages(aside / "zero")
        else:
            _convert_plain(engine, path, aside / "zero")
        _write_common(engine, aside / "zero")
    except Exception as error:  # it must reach the other ranks, which wait
        return f"{type(error).__name__}: {error}"
    return None


def _convert_plain(engine: Any, path: Path, zero: Path) -> None:
    """Stage 0: torch's optimizer state is whole in rank 0's file, by the parameters' order."""
    content = torch.load(path / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=False)
    saved = content["optimizer"]
    masters = [master for group in saved.get("fp32_groups", []) for master in group]  # bf16 keeps them there
    state = saved.get("optimizer_state_dict", saved)["state"]
    for number, name in enumerate(_trained(engine.module)):
        whole = {key: state[number][key] for key in MOMENTS}
        whole["fp32"] = masters[number] if masters else content["module"][name]
        (zero / name).mkdir(parents=True)
        for key, value in whole.items():
            torch.save({"param": value.detach().float().clone()}, zero / name / f"{key}.pt")
        torch.save(state[number]["step"], zero / name / "step.pt")


def _write_common(engine: Any, zero: Path) -> None:
    """``optimizer_state.pt`` as all stages' loaders read it. The settings are this run's: both are of one config."""
    step = torch.load(zero / _trained(engine.module)[0] / "step.pt", weights_only=True)
    optimizer, _ = optimizer_and_masters(engine)
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    inner = {"state": {0: {"step": step}}, "param_groups": groups}
    common = {"param_groups": groups, "optimizer_state_dict": inner, "ds_version": deepspeed_version()}
    torch.save(common, zero / "optimizer_state.pt")


def _as_of_other_stages(zero: Path) -> None:
    """Stage 3's converter writes bare tensors, and the step only once; the other stages' loaders want these."""
    saved = torch.load(zero / "optimizer_state.pt", map_location="cpu", weights_only=False)
    for folder in filter(Path.is_dir, zero.iterdir()):
        for key in ("fp32", *MOMENTS):
            whole = torch.load(folder / f"{key}.pt", map_location="cpu", weights_only=True)
            torch.save({"param": whole}, folder / f"{key}.pt")
        torch.save(saved["optimizer_state_dict"]["state"][0]["step"], folder / "step.pt")


def _load_module(module: torch.nn.Module, path: Path, aside: Path) -> None:
    """The parameters' pieces, and the buffers, which are whole in every file of the ranks."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            local_piece(parameter).copy_(piece_of(_whole(aside, name, "fp32"), parameter))
        content = torch.load(next(path.glob("*mp_rank_00_model_states.pt")), map_location="cpu", weights_only=False)
        saved = module.state_dict().keys()
        for name, buffer in module.named_buffers():
            if name in saved:
                buffer.copy_(content["module"][name])


def _load_plain(engine: Any, aside: Path) -> None:
    optimizer, masters = optimizer_and_masters(engine)
    with torch.no_grad():
        for name, master in zip(_trained(engine.module), masters):
            master.copy_(_whole(aside, name, "fp32").reshape(master.shape))
            moments = {key: _whole(aside, name, key).reshape(master.shape).to(master.device) for key in MOMENTS}
            step = torch.load(aside / "zero" / name / "step.pt", weights_only=True)
            optimizer.state[master] = {"step": torch.as_tensor(step), **moments}


def _whole(aside: Path, name: str, key: str) -> Tensor:
    return torch.load(aside / "zero" / name / f"{key}.pt", map_location="cpu", weights_only=False)["param"]


def _trained(module: torch.nn.Module) -> list[str]:
    """Names of the trained parameters, in the optimizer's order."""
    return [name for name, parameter in module.named_parameters() if parameter.requires_grad]
