"""One rank of `benchmarks/scaling.py`: it builds what it is told to, makes steps of the real trainer, and says what
they took and what they communicated. In: orders, a line of JSON each, on stdin. Out: a line of JSON for each on stdout.

It binds itself to one core, whichever world it is in: a rank of two then has no less than a rank alone.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

CORE = int(os.environ["SCALING_CORE"])
os.sched_setaffinity(0, {CORE})  # before torch counts cores

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn.parallel import DistributedDataParallel  # noqa: E402
from tqdm import tqdm  # noqa: E402

from benchmarks.traffic import Collectives, ring_bytes, sent_on_sockets  # noqa: E402
from diffcap_dist import train  # noqa: E402
from diffcap_dist.config import DiffusionConfig, ModelConfig, OptimizerConfig, TrainingConfig, load_config  # noqa: E402
from diffcap_dist.diffusion.objective import DiffusionObjective, Draws  # noqa: E402
from diffcap_dist.model.denoiser import Denoiser, ImageFeatures  # noqa: E402
from diffcap_dist.training import distributed  # noqa: E402
from diffcap_dist.training.distributed import Ranks  # noqa: E402
from diffcap_dist.training.engine import BatchSplit, build_engine, deepspeed_config, split_batch  # noqa: E402

NUM_WORDS, IMAGE_WIDTH = 30522, 512  # of the full size: distilbert-base-uncased, CLIP ViT-B/32
DDP = "ddp"
LINEAR = nn.functional.linear  # ZeRO-3 replaces it for the whole process, and so slows the other engines down


class PlainEngine:
    """DistributedDataParallel and AdamW behind the calls that the trainer makes of DeepSpeed's engine."""

    def __init__(
        self, objective: nn.Module, _: TrainingConfig, optimizer: OptimizerConfig, split: BatchSplit, *__: Any
    ) -> None:
        assert split.accumulation == 1
        self.module = objective
        # Buffers (the embedding table) never change; sending them at every step would be unfair to DDP.
        self.parallel = DistributedDataParallel(objective, broadcast_buffers=False)
        self.parameters = [p for p in objective.parameters() if p.requires_grad]
        betas = (optimizer.beta1, optimizer.beta2)
        self.optimizer = torch.optim.AdamW(self.parameters, betas=betas, weight_decay=optimizer.weight_decay)
        self.max_grad_norm, self.norm = optimizer.max_grad_norm, torch.tensor(math.nan)

    def __call__(self, *args: Any) -> Any:
        return self.parallel(*args)

    def train(self) -> None:
        self.parallel.train()

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        self.norm = nn.utils.clip_grad_norm_(self.parameters, self.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def get_global_grad_norm(self) -> Tensor:
        return self.norm

    def zero_optimization_stage(self) -> int:
        return 0


class Timed(Iterator[Any]):
    """An iterator that adds up the seconds its items took."""

    def __init__(self, items: Iterator[Any]) -> None:
        self.items, self.seconds = items, 0.0

    def __next__(self) -> Any:
        started = time.perf_counter()
        item = next(self.items)
        self.seconds += time.perf_counter() - started
        return item


class Measured:
    """A trainer whose steps are made one by one."""

    def __init__(self, engine: str, config: Path, words: list[str], ranks: Ranks) -> None:
        words = [*words, f"training.zero_stage={0 if engine == DDP else engine}"]
        builder: Callable[..., Any] = PlainEngine if engine == DDP else build_engine
        nn.functional.linear = LINEAR
        with mock.patch.object(train, "build_engine", builder):
            self.trainer = train.Trainer(load_config(config, words), ranks)
        self.linear = nn.functional.linear
        self.batches = Timed(iter(self.trainer.stream))
        self.bar = tqdm(disable=True)

    def update(self) -> dict[str, float]:
        """What `Trainer.train` does for a step, up to the flags; the loss terms."""
        nn.functional.linear = self.linear
        terms, self.norm, self.damages = self.trainer._step(self.batches)
        return terms

    def agree(self, terms: dict[str, float]) -> None:
        trainer = self.trainer
        trainer.state.step += 1
        trainer.state.samples_seen += trainer.split.total
        trainer._agree_to_go_on(terms, self.damages, self.bar)
        trainer._follow_losses(terms)

    def log(self, terms: dict[str, float]) -> None:
        self.trainer.metrics.training(self.trainer.state, terms, self.norm, 0.0, self.bar)

    def steps(self, count: int) -> dict[str, list[float]]:
        """Seconds of ``count`` steps, in all and for the batch."""
        seconds: dict[str, list[float]] = {"step": [], "input": []}
        for _ in range(count):
            self.batches.seconds, started = 0.0, time.perf_counter()
            self.agree(self.update())
            seconds["step"].append(time.perf_counter() - started)
            seconds["input"].append(self.batches.seconds)
        return seconds

    def traffic(self) -> dict[str, Any]:
        """What a step communicates: the engine, the trainer's flags, and its logged losses."""
        terms: dict[str, float] = {}
        traffic = {"engine": counted(lambda: terms.update(self.update()))}
        traffic["flags"] = counted(lambda: self.agree(terms))
        traffic["log"] = counted(lambda: self.log(terms))
        return traffic | {"parameters": self.trainer.parameters["trainable"]}


def counted(act: Callable[[], Any]) -> dict[str, Any]:
    """What ``act`` communicates on this rank."""
    dist.barrier()
    before = sent_on_sockets()
    with Collectives() as collectives:
        act()
    dist.barrier()  # all that was sent is out now; its own few hundred bytes are counted with the rest
    return {
        "calls": collectives.calls,
        "payload": collectives.payload,
        "ring": ring_bytes(collectives.payload, dist.get_world_size()),
        "sockets": sent_on_sockets() - before,
    }


def full_size_traffic(stage: int, more: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    """What a step in bf16 at DistilBERT's size communicates: the third one, for ZeRO-3 learns its order before.

    ``more`` goes into DeepSpeed's zero_optimization.
    """
    training = TrainingConfig(zero_stage=stage, global_batch_size=ranks.world_size)
    dtype = torch.bfloat16
    model = ModelConfig(embedding_std=0.05, length_head=False)
    diffusion = DiffusionConfig(kind="continuous")
    torch.manual_seed(0)
    objective = DiffusionObjective(Denoiser(model, NUM_WORDS, 4, (IMAGE_WIDTH, None)), diffusion, pad_id=0)
    parameters = sum(p.numel() for p in objective.parameters() if p.requires_grad)
    split, config = split_batch(training, ranks.world_size), OptimizerConfig()
    told = deepspeed_config(training, config, split, dtype)
    told["zero_optimization"] |= more
    with mock.patch("diffcap_dist.training.engine.deepspeed_config", return_value=told):
        engine = build_engine(objective, training, config, split, dtype, ranks)
    engine.train()

    def step(number: int) -> None:
        draws = Draws.at([ranks.rank], 1, 1, (4, model.embedding_dim), 0, number, diffusion, ranks.device)
        image = ImageFeatures(torch.randn(1, IMAGE_WIDTH, dtype=dtype))
        engine.backward(engine(torch.ones(1, 1, 4, dtype=torch.long), image, draws)["loss"])
        engine.step()

    step(0)
    step(1)
    traffic = counted(lambda: step(2))
    engine.destroy()
    return traffic | {"parameters": parameters, "bytes_per_parameter": dtype.itemsize}


def collective(kind: str, size: int, repeats: int) -> dict[str, Any]:
    """Seconds of one collective over ``size`` bytes, each time, and what one communicates."""
    whole, piece = torch.ones(size // 4), torch.ones(size // 4 // dist.get_world_size())
    acts: dict[str, Callable[[], Any]] = {
        "all-reduce": lambda: dist.all_reduce(whole),
        "all-gather": lambda: dist.all_gather_into_tensor(whole, piece),
        "reduce-scatter": lambda: dist.reduce_scatter_tensor(piece, whole),
        "broadcast": lambda: dist.broadcast(whole, 0),
    }
    seconds = []
    for _ in range(repeats):
        dist.barrier()
        started = time.perf_counter()
        acts[kind]()
        seconds.append(time.perf_counter() - started)
    return {"seconds": seconds, "traffic": counted(acts[kind])}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries print where they like
    ranks = distributed.init_ranks()
    built: dict[str, Measured] = {}
    for line in sys.stdin:
        order = json.loads(line)
        name = order.get("name")
        answer: Any = None
        match order["do"]:
            case "build":
                built[name] = Measured(order["engine"], Path(order["config"]), order["words"], ranks)
            case "steps":
                answer = built[name].steps(order["count"])
            case "traffic":
                answer = built[name].traffic()
            case "collective":
                answer = collective(order["kind"], order["size"], order["repeats"])
            case "full":
                answer = full_size_traffic(order["stage"], order["more"], ranks)
        answers.write(json.dumps(answer) + "\n")
    distributed.finish()


if __name__ == "__main__":
    main()
