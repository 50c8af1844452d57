"""What all tests share: one thread each (they run beside others), no network, small shards made on the spot."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from diffcap_dist.data.shard_format import ShardIndex, open_shard
from shards import make_shards

TINY_SETTINGS = """
run_dir: {run}
data: {{shards: {shards}, features: oracle, max_length: 18, num_workers: 0, canonical_spans: 4, shuffle_window: 16}}
encoder: {{name: "", pretrained: ""}}
model: {{width: 32, num_layers: 2, num_heads: 2, ffn_width: 64, embedding_dim: 32}}
optimizer: {{learning_rate: 2e-3, final_learning_rate: 1e-4, warmup_steps: 4}}
sampler: {{num_inference_steps: 3}}
training: {{num_steps: 20, global_batch_size: 16, validate_every: 10, validation_images: 8, save_every: 10,
            log_every: 1, ema_decay: 0.9, precision: fp32}}
"""


@pytest.hookimpl(tryfirst=True)  # after pytest-xdist's own hook, which reads the marks, they would be in vain
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """For pytest-xdist: a file's tests stay in one process, and so do all that use the SLURM of the tests; files of
    slow ones alone come first, then those with some, so that no process is left with them at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    quick = {item.path for item in items if not item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path not in slow, item.path in quick))
    for item in items:
        group = "cluster" if "cluster" in item.path.parts else item.path.name
        item.add_marker(pytest.mark.xdist_group(group))


def pytest_collection_finish(session: pytest.Session) -> None:
    if getattr(session.config.option, "loadgroup", False) and any("@" not in item.nodeid for item in session.items):
        raise pytest.UsageError("this pytest-xdist does not group with this pytest: install those of constraints.txt")


@pytest.fixture(scope="session")
def scene_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 + 12 + 12 scenes, with imported features that state the scene (``oracle``)."""
    folder = tmp_path_factory.mktemp("scenes") / "shards"
    sizes = ["--train", "64", "--val", "12", "--test", "12"]
    assert make_shards.main(["scenes", "--out", str(folder), *sizes]) == 0
    npz = folder.parent / "oracle.npz"
    write_oracle_features(folder, npz)
    assert make_shards.main(["features", str(folder), "--npz", str(npz), "--name", "oracle"]) == 0
    return folder


@pytest.fixture(scope="session")
def bucket() -> Iterator[str]:
    """A bucket on a local S3 server; one for all tests, since fsspec remembers its address for the process."""
    moto_server = pytest.importorskip("moto.server")
    import boto3

    server = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    environment = {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
    environment |= {"AWS_DEFAULT_REGION": "us-east-1"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        boto3.client("s3").create_bucket(Bucket="captions")
        yield "s3://captions"
    server.stop()


@pytest.fixture
def tiny_config(scene_shards: Path, tmp_path: Path) -> Path:
    """A config file of a run that trains in seconds, in ``tmp_path / "run"``."""
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY_SETTINGS.format(run=tmp_path / "run", shards=scene_shards))
    return path


def write_oracle_features(shards: Path, npz: Path) -> None:
    """Features that are a fixed random projection of each scene's attributes, place by place."""
    projection = np.random.default_rng(0).normal(size=(5000, 24))
    names, rows = [], []
    for info in ShardIndex.load(shards).shards:
        shard = open_shard(shards, info)
        for sample in range(len(shard)):
            record = shard.record(sample)
            row = np.zeros(24)
            for place, thing in enumerate(sorted(record["scene"]["objects"], key=lambda o: o["x"])):
                for word in (thing["color"], thing["shape"], thing["size"]):
                    row += projection[hash_of(f"{place} {word}")]
            names.append(record["photo_id"])
            rows.append(row + projection[hash_of(record["scene"]["background"])])
    np.savez(npz, names=np.array(names), features=np.stack(rows).astype(np.float32))


def hash_of(text: str) -> int:
    return sum(ord(c) * 31**i for i, c in enumerate(text)) % 5000


def launch(ranks: int, module: str, *words: str, timeout: int = 240) -> subprocess.CompletedProcess[str]:
    """``module`` under the real deepspeed launcher; the output is shown when it fails."""
    command = launch_command(ranks, module, *words)
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=rank_environment())
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-8000:]}"
    return done


def launch_command(ranks: int, module: str, *words: str) -> list[str]:
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks)]
    return [*launcher, "--master_port", str(free_port()), "--module", module, *words]


def rank_environment() -> dict[str, str]:
    root = str(Path(__file__).resolve().parents[1])
    return {**os.environ, "PYTHONPATH": root, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
