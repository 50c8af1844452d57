"""The preflight: a minute on all nodes that a run would get, before hours of it.

Every rank: versions of the packages, GPUs and cores, the clock, a file written into the run directory and read by the
others, a sample of the shards, an all-reduce of 64 MB. Rank 0 prints the table and what is wrong; exit status 1 then.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import os
import platform
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from diffcap_dist.config import Config, load_config
from diffcap_dist.data.pixels import Crop
from diffcap_dist.data.stream import ShardReader
from diffcap_dist.run_dir import RunDir
from diffcap_dist.training import distributed
from diffcap_dist.training.distributed import Ranks

PACKAGES = ("torch", "torchvision", "deepspeed", "transformers", "open_clip_torch", "numpy", "webdataset")
ALL_REDUCE_BYTES = 64 * 2**20
CLOCK_SECONDS = 2.0  # files' times and time limits are compared across nodes
VISIBLE_SECONDS = 60.0  # a shared file system may show a file late


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="launch.preflight", description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("--gpus-per-node", type=int, default=0)
    args = parser.parse_args(argv)
    config = load_config(args.config)
    ranks = distributed.init_ranks()
    try:
        reports = distributed.gather_to_first(examine(config, ranks, args.gpus_per_node), ranks)
        if reports is None:
            return 0
        wrong = problems(reports)
        print(table(reports))
        print("\n".join(f"WRONG: {line}" for line in wrong) or "preflight: all well", flush=True)
        return 1 if wrong else 0
    finally:
        distributed.finish()


def examine(config: Config, ranks: Ranks, expected_gpus: int) -> dict[str, Any]:
    """What this rank finds; all ranks enter."""
    versions = {name: version_of(name) for name in PACKAGES} | {"python": platform.python_version()}
    report: dict[str, Any] = {"rank": ranks.rank, "node": os.environ.get("SLURMD_NODENAME", platform.node())}
    report |= {"versions": versions, "gpus": torch.cuda.device_count(), "expected_gpus": expected_gpus}
    report |= {"gpu": torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else "none"}
    report |= {"cores": len(os.sched_getaffinity(0)), "errors": []}
    distributed.barrier()
    report["clock"] = time.time()
    report["all_reduce_gb_s"] = all_reduce_speed(ranks)
    for what, check in {"write": write_file, "run directory": see_files, "shards": check_shards}.items():
        started = time.perf_counter()
        try:
            report[what] = check(config, ranks)
        except Exception as error:  # whatever it is, it is to be shown for every node at once
            report["errors"].append(f"{what}: {type(error).__name__}: {error}")
        report[f"{what} seconds"] = time.perf_counter() - started
        distributed.barrier()
    with contextlib.suppress(OSError):
        _file_of(config, ranks.rank).unlink()
    return report


def version_of(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def all_reduce_speed(ranks: Ranks) -> float:
    """GB/s of bus bandwidth: 2 (n - 1) / n bytes a byte reduced, as NVIDIA's nccl-tests count."""
    tensor = torch.ones(ALL_REDUCE_BYTES // 4, device=ranks.device)
    dist.all_reduce(tensor)
    repeats = 3
    started = time.perf_counter()
    for _ in range(repeats):
        dist.all_reduce(tensor)
    float(tensor[0])  # waits for the GPU
    seconds = (time.perf_counter() - started) / repeats
    return 2 * (ranks.world_size - 1) / ranks.world_size * ALL_REDUCE_BYTES / seconds / 1e9


def write_file(config: Config, ranks: Ranks) -> None:
    """Of one MB, into the run directory."""
    file = _file_of(config, ranks.rank)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(os.urandom(2**20))


def see_files(config: Config, ranks: Ranks) -> str:
    """Those of all ranks, however late a shared disk shows them; how much room there is."""
    deadline = time.monotonic() + VISIBLE_SECONDS
    missing = list(range(ranks.world_size))
    while missing and time.monotonic() < deadline:
        missing = [rank for rank in missing if not _file_of(config, rank).is_file()]
        time.sleep(0.1 if missing else 0)
    folder = _file_of(config, 0).parent
    if missing:
        raise OSError(f"the files of ranks {missing} did not appear in {folder}: is it shared by the nodes?")
    return f"{shutil.disk_usage(folder).free / 1e9:,.0f} GB free"


def _file_of(config: Config, rank: int) -> Path:
    return RunDir(config.run_dir).logs / f"preflight.{rank}.tmp"


def check_shards(config: Config, ranks: Ranks) -> str:
    """The index, and one sample with its features: of another shard on each rank."""
    data = config.data
    where = [one.shards for one in data.train] or data.shards
    reader = ShardReader(where, data.train_split, data.features, False, _as_they_are, data.cache, data.cache_gb)
    filled = [shard for shard, count in enumerate(reader.counts) if count]
    reader.record(filled[ranks.rank % len(filled)], 0)
    return f"{len(reader.shards)} of {data.train_split}"


def _as_they_are(data: bytes, crop: Crop | None = None) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def problems(reports: Sequence[dict[str, Any]]) -> list[str]:
    """What is wrong, a line each."""
    first = reports[0]
    needed = [name for name, version in first["versions"].items() if version == "missing"]
    found = [f"{name} is not installed on {first['node']}" for name in needed]
    found += [f"rank {r['rank']} on {r['node']}: {error}" for r in reports for error in r["errors"]]
    for report in reports[1:]:
        for name, version in report["versions"].items():
            if version != first["versions"][name]:
                found.append(f"{name} is {first['versions'][name]} on {first['node']}, {version} on {report['node']}")
    for report in reports:
        if report["expected_gpus"] and not report["gpus"]:
            found.append(f"{report['node']} has {report['expected_gpus']} GPUs to give, but torch sees none")
    apart = max(r["clock"] for r in reports) - min(r["clock"] for r in reports)
    if apart > CLOCK_SECONDS:
        found.append(f"the nodes' clocks are {apart:.1f} s apart")
    return list(dict.fromkeys(found))


def table(reports: Sequence[dict[str, Any]]) -> str:
    """A line a rank, then what all have in common."""
    lines = [
        f"rank {r['rank']:>3}  {r['node']:<12}  {r['gpus']} GPUs ({r['gpu']})  {r['cores']} cores  "
        f"all-reduce {r['all_reduce_gb_s']:.2f} GB/s  run directory {r.get('run directory', 'FAILED')} "
        f"({r['run directory seconds']:.1f} s)  shards {r.get('shards', 'FAILED')} ({r['shards seconds']:.1f} s)"
        for r in reports
    ]
    return "\n".join([*lines, ", ".join(f"{name} {version}" for name, version in reports[0]["versions"].items())])


if __name__ == "__main__":
    sys.exit(main())
