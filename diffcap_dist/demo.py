"""`diffcap demo`: the whole road on an embedded default, without a GPU or a download.

In: nothing. Out: ``runs/demo/`` with shards, a small CLIP, features, a trained captioner, ``scores.json`` and
``report.html``. Every stage is one of the project's own commands, run as a user would; a stage that is done is not done
again, so an interrupted demo continues.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "demo.yaml"

# What a demo should reach; measured at the end of every one and printed beside what it reached.
GOALS = {"gap_closed": 0.5, "scene_accuracy": 0.75}
GOAL_SECONDS = 8 * 60


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="diffcap demo", description=__doc__)
    parser.add_argument("settings", nargs="*", metavar="key=value", help="changes to configs/demo.yaml")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder of the demo (default: runs/demo)")
    parser.add_argument("--ranks", type=int, default=2, help="processes that train and evaluate (default: 2)")
    parser.add_argument("--train", type=int, default=6000, help="training pictures (default: 6000)")
    parser.add_argument("--clip-steps", type=int, help="training steps of the small CLIP (default: train-clip's own)")
    args = parser.parse_args(argv)
    if not CONFIG.is_file():
        raise ValueError(f"{CONFIG} is missing: run the demo from a clone of the repository (pip install -e .)")
    args.out.mkdir(parents=True, exist_ok=True)
    return Demo(args.out, args.ranks, args.settings).run(args.train, args.clip_steps)


class Demo:
    """The stages, and how long each took (``stages.json``)."""

    def __init__(self, out: Path, ranks: int, settings: Sequence[str]) -> None:
        self.out, self.ranks, self.settings = out, ranks, settings
        self.record = out / "stages.json"
        self.seconds: dict[str, float] = json.loads(self.record.read_text()) if self.record.is_file() else {}

    def run(self, num_train: int, clip_steps: int | None) -> int:
        shards, clip = str(self.out / "shards"), str(self.out / "clip")
        paths = [f"run_dir={self.out}", f"data.shards={shards}", f"encoder.name={clip}"]
        clip_length = [] if clip_steps is None else ["--steps", str(clip_steps)]
        held_out = max(100, num_train // 20)
        sizes = ["--train", str(num_train), "--val", str(held_out), "--test", str(held_out)]
        stages = {
            "scenes": ("shards.make_shards", "scenes", "--out", shards, *sizes),
            "clip": ("diffcap_dist", "train-clip", shards, "--out", clip, *clip_length),
            "features": ("shards.make_shards", "features", shards, "--encoder", clip),
            "train": self._launched("diffcap_dist.train", str(CONFIG), *paths, *self.settings),
            "evaluate": self._launched("diffcap_dist.evaluate", str(self.out)),
        }
        for number, (name, command) in enumerate(stages.items(), start=1):
            self._stage(f"[{number}/{len(stages) + 1}]", name, command)
        self._stamp_scores()
        self._stage(f"[{len(stages) + 1}/{len(stages) + 1}]", "report", ("diffcap_dist", "report", str(self.out)))
        self._conclude()
        return 0

    def _launched(self, module: str, *words: str) -> tuple[str, ...]:
        """``deepspeed --module MODULE ...`` on this machine, on a port of its own."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        launcher = ("deepspeed.launcher.runner", "--quiet", "--num_gpus", str(self.ranks), "--master_port", port)
        return (*launcher, "--module", module, *words)

    def _stage(self, title: str, name: str, command: tuple[str, ...]) -> None:
        if name in self.seconds:
            print(f"{title} {name}: done before, in {self.seconds[name]:.0f} s", flush=True)
            return
        print(
            f"{title} {name}: {' '.join(command[1:] if command[0] != 'diffcap_dist' else ('diffcap', *command[1:]))}",
            flush=True,
        )
        started = time.perf_counter()
        # OpenMP threads that wait by spinning take the core from those that work, where other programs run too; ones
        # that sleep at once are slower where none do. A small CLIP's step, seconds alone / beside a busy process:
        # 0.10 / 0.28 with this, 0.10 / 0.35 to 1.4 with libgomp's default, 0.15 / 0.24 with OMP_WAIT_POLICY=PASSIVE.
        environment = {"GOMP_SPINCOUNT": "2000", **os.environ}
        subprocess.run([sys.executable, "-m", *command], check=True, env=environment)
        self.seconds[name] = time.perf_counter() - started
        self.record.write_text(json.dumps(self.seconds, indent=2))
        print(f"{title} {name}: {self.seconds[name]:.0f} s", flush=True)

    def _stamp_scores(self) -> None:
        """``seconds`` of a demo's scores is the whole demo up to the report, not the captioning alone."""
        path = self.out / "scores.json"
        scores = json.loads(path.read_text())
        scores["seconds"] = round(sum(s for name, s in self.seconds.items() if name != "report"), 1)
        path.write_text(json.dumps(scores, indent=2))

    def _conclude(self) -> None:
        scores = json.loads((self.out / "scores.json").read_text())
        total = sum(self.seconds.values())
        print()
        for name, goal in GOALS.items():
            print(
                f"{name:<15} {scores[name]:.3f}   goal {goal:.2f}   {'reached' if scores[name] >= goal else 'MISSED'}"
            )
        print(
            f"{'seconds':<15} {total:.0f}     goal {GOAL_SECONDS}    {'reached' if total <= GOAL_SECONDS else 'MISSED'}"
        )
        print(f"\nreport: {(self.out / 'report.html').resolve()}")


if __name__ == "__main__":
    sys.exit(main())
