"""One rank of a local job: train, and when that has come to its end, evaluate. submitit pickles ``LocalRank``."""

from __future__ import annotations

import os
from dataclasses import dataclass

import submitit

from diffcap_dist.run_dir import RunDir


@dataclass(frozen=True)
class LocalRank:
    """The ranks meet at one port to train, at another to score steps on the way (nobody else is there to do it
    meanwhile), at a third to evaluate."""

    run: str
    config: str
    ports: tuple[int, int, int]
    evaluate_words: list[str] | None

    def __call__(self) -> None:
        from diffcap_dist import evaluate, train
        from launch.job import is_finished

        environment = submitit.JobEnvironment()
        rank, ranks = environment.global_rank, environment.num_tasks
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(self.ports[0]))
        train.main([self.config])
        if not is_finished(RunDir(self.run)):
            return
        if RunDir(self.run).load_config().training.evaluate_every:
            os.environ.update(MASTER_PORT=str(self.ports[1]))
            evaluate.main([self.run, "--steps"])
        if self.evaluate_words is not None:
            os.environ.update(MASTER_PORT=str(self.ports[2]))
            evaluate.main([self.run, *self.evaluate_words])
