"""What does a training step on a reward cost? Masked diffusion beside cross-entropy, and beside a left-to-right model.

In: a body's size, N photos with 5 captions each of made-up words, S captions to draw of each photo. Out: milliseconds
of a step (forward and backward, the reward on CPUs) of cross-entropy, of masked diffusion's reward and of the same for
the control, which draws its captions word by word from its cache and reads them once more; medians, timed in turn in
one process, and the reward's ratio to both others.

    python -m benchmarks.reward_step --samples 2,8,32
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.train_step import hardware
from diffcap_dist.config import Config, DataConfig, DiffusionConfig, ModelConfig
from diffcap_dist.data.captions import CaptionTokenizer
from diffcap_dist.data.shard_format import atomic_write
from diffcap_dist.diffusion.length import foretold_lengths
from diffcap_dist.diffusion.objective import DiffusionObjective, Draws, build_network
from diffcap_dist.diffusion.reward import RewardObjective
from diffcap_dist.evaluation.reward import CiderReward
from diffcap_dist.model.autoregressive import AutoregressiveModel
from diffcap_dist.model.denoiser import Denoiser, ImageFeatures

WORDS, CAPTIONS, LENGTHS, FEATURE_WIDTH = 1000, 5, (8, 19), 512  # about Flickr8k's
MAX_LENGTH = 20


class Steps:
    """The three ways to train on the same photos."""

    def __init__(self, width: int, layers: int, photos: int, samples: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)

        def caption() -> str:
            length = int(torch.randint(*LENGTHS, (1,), generator=generator))
            return " ".join(f"w{i}" for i in torch.randint(WORDS, (length,), generator=generator).tolist())

        self.references = [[caption() for _ in range(CAPTIONS)] for _ in range(photos)]
        self.tokenizer = tokenizer = CaptionTokenizer.from_captions(c for some in self.references for c in some)
        self.reward = CiderReward(tokenizer, self.references)
        self.samples, self.image = samples, ImageFeatures(torch.randn(photos, FEATURE_WIDTH, generator=generator))
        ids_BL, _ = tokenizer.encode([some[0] for some in self.references], MAX_LENGTH)
        self.ids_NCL = torch.from_numpy(ids_BL)[:, None].to(device)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.image = self.image.to(device, dtype)
        sizes = {"width": width, "num_layers": layers, "num_heads": width // 64, "ffn_width": 4 * width}
        self.config = DiffusionConfig(reward_samples=samples)

        def network(**kind: Any) -> Denoiser | AutoregressiveModel:
            model = ModelConfig(embedding_dim=width, **sizes, **kind)
            config = Config(run_dir="", data=DataConfig(shards="", max_length=MAX_LENGTH), model=model)
            torch.manual_seed(0)
            return build_network(config, tokenizer.vocab_size, (FEATURE_WIDTH, None)).to(device, dtype)

        ids = (tokenizer.pad_id, tokenizer.mask_id)
        self.plain = DiffusionObjective(network(), self.config, *ids).train()
        special = (tokenizer.sep_id, tokenizer.special_ids)
        self.rewarded = RewardObjective(network(), self.config, *ids, *special, self.reward).train()
        control = network(kind="autoregressive")
        assert isinstance(control, AutoregressiveModel)
        self.control = control

    def cross_entropy(self) -> Tensor:
        """Cross-entropy of the hidden words."""
        return self.plain(self.ids_NCL, self.image, self._draws(self.plain))["loss"]

    def masked(self) -> Tensor:
        """The reward, of captions drawn in one look."""
        draws = self._draws(self.rewarded)
        return self.rewarded(self.ids_NCL, self.image, draws, references=self.references)["loss"]

    def left_to_right(self) -> Tensor:
        """The reward, of captions drawn word by word (Rennie et al. 2017, with the others as the baseline)."""
        control, tokenizer, S = self.control, self.tokenizer, self.samples
        never = [i for i in tokenizer.special_ids if i != tokenizer.sep_id]

        with torch.no_grad():  # captions as long as masked diffusion's: fresh weights never end one
            lengths_B = foretold_lengths(self.rewarded.network.length_logits(self.image))[:, 0].repeat_interleave(S)

        def choose(position: int, logits_BV: Tensor) -> Tensor:
            drawn_B = torch.multinomial(logits_BV.softmax(-1), 1)[:, 0]
            return torch.where(lengths_B == position + 1, tokenizer.sep_id, drawn_B)

        ids_BL = control.write(self.image, tokenizer.sep_id, tokenizer.pad_id, 1, never, choose, rows_per_photo=S)
        reward_SN = self.reward(ids_BL.unflatten(0, (-1, S)).transpose(0, 1), self.references)
        advantage_B = ((reward_SN - reward_SN.mean(0)) * (S / (S - 1))).T.flatten()
        counts_BL = ids_BL != tokenizer.pad_id
        logits_BLV = control.logits(control(ids_BL, self.image, counts_BL)).float()
        log_probability_BL = logits_BLV.log_softmax(-1).gather(-1, ids_BL[..., None])[..., 0]
        return -(advantage_B[:, None] * log_probability_BL * counts_BL).sum() / len(ids_BL)

    def _draws(self, objective: DiffusionObjective) -> Draws:
        positions = list(range(len(self.references)))
        return Draws.at(positions, 1, 1, objective.noise_shape, 0, 0, self.config, self.ids_NCL.device)


def measure(steps: Steps, rounds: int) -> dict[str, float]:
    """Milliseconds of a step of each way. ValueError where a loss is not finite."""
    ways: dict[str, Callable[[], Tensor]] = {
        "cross-entropy": steps.cross_entropy,
        "reward, masked": steps.masked,
        "reward, left to right": steps.left_to_right,
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            started = time.perf_counter()
            loss = way()
            loss.backward()
            if steps.ids_NCL.is_cuda:
                torch.cuda.synchronize()
            if number:  # the first warms up
                seconds[name].append(time.perf_counter() - started)
            if not loss.isfinite():
                raise ValueError(f"{name}: the loss is {loss.item()}; nothing was measured")
    return {name: 1e3 * statistics.median(of) for name, of in seconds.items()}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--photos", type=int, default=64)
    parser.add_argument("--samples", type=lambda text: [int(one) for one in text.split(",")], default=[2, 8, 32])
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", type=Path, help="JSON to write")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    result: dict[str, Any] = {"hardware": hardware(device), "width": args.width, "layers": args.layers, "samples": {}}
    for samples in args.samples:
        found = measure(Steps(args.width, args.layers, args.photos, samples, device), args.rounds)
        result["samples"][samples] = found
        reward = found["reward, masked"]
        print(
            f"{samples} captions of {args.photos} photos: a step on their reward takes {reward:.1f} ms, "
            f"{reward / found['cross-entropy']:.2f} times one of cross-entropy; left to right "
            f"{found['reward, left to right'] / reward:.2f} times that"
        )
    print(result["hardware"])
    if args.out:
        atomic_write(args.out, json.dumps(result, indent=1).encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
