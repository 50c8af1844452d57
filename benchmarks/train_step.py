"""One training step of this project against a plain implementation of the paper's step, on one batch: time and memory.

In: a size (``--size``). Out: on the screen and as JSON (``--out``) the ratios plain / ours of time and of peak memory,
with hardware, load and versions. Both steps must first give the same loss from the same weights, or there is no result.

Ours is what `diffcap train` runs: a photo is encoded once and its image token made once; no tokens x vocabulary tensor.
Plain is the paper's step (arXiv:2210.04559) as one would write it down: features repeated for every timestep, all
logits by a Linear head and cross_entropy, and the frozen encoder run again for every timestep. The published code read
stored features instead; ``plain, photos encoded once`` is the comparison with that last saving taken out.

Both follow the objective where the published code does something else: no dropout; no attention mask, PAD counts; L1
is a mean over the width too, not a sum over positions; no cross entropy at x_1; no text token; LayerNorm before the
image projection. Both follow the published code in drawing the K timesteps once for all captions and one noise per
caption, shared by its K timesteps; the x_1 term of a caption is thus one number, which plain computes once. Not
measured: loading data, drawing noise, DeepSpeed, the moving average.

Letters: N photos (one caption each), K timesteps per caption, B = N K rows, L, D, V, F, T tokens.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import gc
import json
import math
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DistilBertConfig, DistilBertModel

from diffcap_dist.config import DiffusionConfig, ModelConfig
from diffcap_dist.data.shard_format import atomic_write
from diffcap_dist.diffusion.objective import DiffusionObjective, Draws
from diffcap_dist.diffusion.schedule import NoiseSchedule
from diffcap_dist.model.denoiser import Denoiser, ImageFeatures
from diffcap_dist.model.image_encoder import ImageEncoder

NUM_STEPS_T = 1000
ROUNDING_WEIGHT = 0.3  # lambda of the paper's best run
RELATIVE_TOLERANCE = 1e-4
M_MMAP_THRESHOLD = -3  # of glibc's malloc.h
TITLES = {
    "ours": "this project",
    "plain": "plain step of the paper",
    "plain_encoding_once": "plain, photos encoded once",
}


@dataclass(frozen=True)
class Size:
    """How large everything is. Head width 64 and ffn 4 x width as in DistilBERT, patches of 32 x 32 as in ViT-B/32."""

    width: int
    num_layers: int
    vocab_size: int
    num_timesteps: int  # K
    num_photos: int  # N
    vit_width: int
    vit_layers: int
    image_size: int = 224
    max_length: int = 16


SIZES = {
    "tiny": Size(64, 1, 300, 3, 2, vit_width=64, vit_layers=1, image_size=64),
    # About the paper's proportion of encoder work to body work, and its vocabulary.
    "small": Size(256, 4, 30522, 10, 4, vit_width=256, vit_layers=6),
    "paper": Size(768, 6, 30522, 100, 8, vit_width=768, vit_layers=12),
}


@dataclass(frozen=True)
class Batch:
    """What both steps are given: photos, captions, the K times and one noise per caption."""

    ids_NL: Tensor
    pixels_NCHW: Tensor
    t_K: Tensor
    noise_NLD: Tensor

    @classmethod
    def random(cls, size: Size, device: torch.device) -> Batch:
        generator = torch.Generator().manual_seed(1)
        N, L = size.num_photos, size.max_length
        return cls(
            torch.randint(size.vocab_size, (N, L), generator=generator).to(device),
            torch.randint(0, 256, (N, 3, size.image_size, size.image_size), generator=generator, dtype=torch.uint8).to(
                device
            ),
            (torch.randint(NUM_STEPS_T, (size.num_timesteps,), generator=generator) / NUM_STEPS_T).to(device),
            torch.randn(N, L, size.width, generator=generator).to(device),
        )


class OurStep(nn.Module):
    """The project's own modules, set to the paper's loss."""

    def __init__(self, denoiser: Denoiser, encoder: ImageEncoder) -> None:
        super().__init__()
        config = DiffusionConfig(
            kind="continuous", num_timesteps=NUM_STEPS_T, noise_scale=1.0, restore_loss="l1", restore_weight=1.0,
            first_step_weight=1.0, rounding_weight=ROUNDING_WEIGHT, image_drop_rate=0.0, self_conditioning_rate=0.0,
        )  # fmt: skip
        self.encoder, self.objective = encoder, DiffusionObjective(denoiser, config, pad_id=0)

    def forward(self, batch: Batch) -> Tensor:
        N, K = len(batch.ids_NL), len(batch.t_K)
        pooled_NF, _ = self.encoder(batch.pixels_NCHW)
        image = ImageFeatures(pooled_NF.clone())  # an inference tensor can't be saved for the backward pass
        no_photo_dropped_N = torch.zeros(N, dtype=torch.bool, device=pooled_NF.device)
        draws = Draws(batch.t_K.repeat(N), batch.noise_NLD.repeat_interleave(K, dim=0), no_photo_dropped_N, False)
        loss: Tensor = self.objective(batch.ids_NL[:, None], image, draws)["loss"]
        return loss


class PlainStep(nn.Module):
    """The paper's step, rows ordered timestep by timestep as published; the weights are those of a ``Denoiser``."""

    def __init__(self, denoiser: Denoiser, encoder: ImageEncoder, encode_every_timestep: bool) -> None:
        super().__init__()
        V, H = denoiser.vocab_size, denoiser.embedding_dim
        self.encoder = encoder
        self.encode_every_timestep = encode_every_timestep
        self.body = DistilBertModel(DistilBertConfig(**{**denoiser.body.config.to_dict(), "vocab_size": V}))
        self.body.load_state_dict(denoiser.body.state_dict(), strict=False)
        image_width = encoder.pooled_dim
        self.pooled_projection = nn.Sequential(nn.LayerNorm(image_width), nn.Linear(image_width, H))
        self.pooled_projection.load_state_dict(denoiser.pooled_projection.state_dict())
        self.segments = nn.Embedding(2, H)
        self.segments.load_state_dict(denoiser.segments.state_dict())
        self.embedding = self.body.embeddings.word_embeddings.requires_grad_(False)
        self.embedding.weight.copy_(denoiser.embedding_matrix().detach())
        self.head = nn.Linear(H, V, bias=False).requires_grad_(False)
        self.head.weight = self.embedding.weight

    def forward(self, batch: Batch) -> Tensor:
        x0_NLD, K = self.embedding(batch.ids_NL), len(batch.t_K)
        alpha_bar_K111 = NoiseSchedule("cosine").alpha_bar(batch.t_K)[:, None, None, None]
        x_KNLD = alpha_bar_K111.sqrt() * x0_NLD + (1 - alpha_bar_K111).sqrt() * batch.noise_NLD
        pooled_NF = self._encode(batch.pixels_NCHW)
        pooled_BF = pooled_NF.repeat(K, 1)
        if self.encode_every_timestep:
            pooled_BF = torch.cat([pooled_NF, *(self._encode(batch.pixels_NCHW) for _ in range(K - 1))])
        hidden_BLD = self._denoise(x_KNLD.flatten(0, 1), pooled_BF)
        restore = F.l1_loss(hidden_BLD, x0_NLD.repeat(K, 1, 1))
        logits_BLV = self.head(hidden_BLD)
        rounding = F.cross_entropy(logits_BLV.flatten(0, 1), batch.ids_NL.repeat(K, 1).flatten())
        alpha_bar = NoiseSchedule("cosine").alpha_bar(torch.tensor(1 / NUM_STEPS_T))
        x1_NLD = alpha_bar.sqrt() * x0_NLD + (1 - alpha_bar).sqrt() * batch.noise_NLD
        first_step = F.l1_loss(self._denoise(x1_NLD, pooled_NF), x0_NLD)
        return restore + first_step + ROUNDING_WEIGHT * rounding

    def _denoise(self, x_BLD: Tensor, pooled_BF: Tensor) -> Tensor:
        image_B1D = self.pooled_projection(pooled_BF)[:, None] + self.segments.weight[1]
        tokens_BTD = torch.cat([x_BLD + self.segments.weight[0], image_B1D], dim=1)
        hidden_BTD: Tensor = self.body(inputs_embeds=tokens_BTD).last_hidden_state
        return hidden_BTD[:, :-1]

    @torch.no_grad()
    def _encode(self, pixels_NCHW: Tensor) -> Tensor:
        pooled_NF: Tensor = self.encoder.clip.encode_image(self.encoder.normalised(pixels_NCHW), normalize=True)
        return pooled_NF


def build(variant: str, size: Size, clip_folder: Path, device: torch.device) -> nn.Module:
    """The step ``variant``, with the same weights whichever it is."""
    encoder = ImageEncoder(str(clip_folder))
    torch.manual_seed(0)
    model = ModelConfig(
        width=size.width, num_layers=size.num_layers, num_heads=size.width // 64, ffn_width=4 * size.width,
        embedding_dim=size.width, length_head=False, time_embedding=False, self_conditioning=False, x0_from="body",
    )  # fmt: skip
    denoiser = Denoiser(model, size.vocab_size, size.max_length, (encoder.pooled_dim, None))
    if variant == "ours":
        return OurStep(denoiser, encoder).to(device)
    with torch.no_grad():
        return PlainStep(denoiser, encoder, variant == "plain").to(device)


def write_clip(size: Size, folder: Path) -> None:
    """A CLIP of random weights, in a folder that ``ImageEncoder`` reads. Its text tower is never used: tiny."""
    import open_clip

    torch.manual_seed(2)
    vision = {
        "image_size": size.image_size, "patch_size": 32, "width": size.vit_width, "layers": size.vit_layers,
        "head_width": 64,
    }  # fmt: skip
    text = {"context_length": 8, "vocab_size": 16, "width": 64, "heads": 1, "layers": 1}
    # ViT-B/32 gives 512 numbers per photo from a width of 768.
    config = {"embed_dim": size.vit_width * 2 // 3, "vision_cfg": vision, "text_cfg": text}
    torch.save(open_clip.CLIP(**config).state_dict(), folder / "open_clip_pytorch_model.bin")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))


class Runner:
    """A built step with its optimizer: calling it makes one training step and returns the loss."""

    def __init__(self, step: nn.Module, batch: Batch) -> None:
        self.step, self.batch = step, batch
        self.optimizer = torch.optim.AdamW([p for p in step.parameters() if p.requires_grad], lr=5e-5)

    def __call__(self) -> float:
        self.optimizer.zero_grad()
        loss: Tensor = self.step(self.batch)
        loss.backward()
        self.optimizer.step()
        return loss.item()  # also waits for the GPU


def peak_bytes(variant: str, size: Size, clip_folder: Path, device: torch.device) -> int:
    """Peak memory of two steps over that of the built model: gradients, AdamW's state and activations.

    On a CPU it is the resident memory of the process, so call it in a process of its own.
    """
    if device.type == "cpu":  # glibc then gives every freed tensor back at once: resident is what is in use
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 20)
    step, batch = build(variant, size, clip_folder, device), Batch.random(size, device)
    Runner(step, batch)()  # libraries and modules that load at their first use (100 MiB) are no part of the step
    step.zero_grad()
    gc.collect()
    before = _memory_in_use(device)
    _forget_peak(device)
    run = Runner(step, batch)
    for _ in range(2):  # only the second step finds AdamW's state
        run()
    return (torch.cuda.max_memory_allocated() if device.type == "cuda" else _status_bytes("VmHWM")) - before


def _memory_in_use(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed would be used again unseen
    return _status_bytes("VmRSS")


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:  # VmHWM starts anew; getrusage's ru_maxrss can't, and holds the parent's peak too
        Path("/proc/self/clear_refs").write_text("5")


def _status_bytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def peaks_apart(variants: Sequence[str], size: Size, clip_folder: Path, device: torch.device) -> dict[str, int]:
    """``peak_bytes`` of each variant, each in a fresh process."""
    with ProcessPoolExecutor(len(variants), mp_context=get_context("spawn"), max_tasks_per_child=1) as processes:
        futures = {name: processes.submit(peak_bytes, name, size, clip_folder, device) for name in variants}
        return {name: future.result() for name, future in futures.items()}


def check_same_loss(steps: dict[str, nn.Module], batch: Batch) -> dict[str, float]:
    """The loss of each step on the batch; ValueError where they differ, since the comparison would be void."""
    with torch.no_grad():
        losses = {name: step(batch).item() for name, step in steps.items()}
    for name, loss in losses.items():
        if not math.isclose(loss, losses["ours"], rel_tol=RELATIVE_TOLERANCE):
            raise ValueError(
                f"the steps compute different losses from the same weights and batch: {TITLES[name]} {loss:.6g}, "
                f"this project {losses['ours']:.6g}; they should agree to {RELATIVE_TOLERANCE}. Nothing was measured; "
                "make benchmarks/train_step.py follow the objective again"
            )
    return losses


def seconds_per_round(steps: dict[str, nn.Module], batch: Batch, num_rounds: int) -> dict[str, list[float]]:
    """Seconds of each step in each round. Every round runs all of them: a slow minute is slow for all."""
    runners = {name: Runner(step, batch) for name, step in steps.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for round_number in range(num_rounds + 1):
        for name, run in runners.items():
            started = time.perf_counter()
            run()
            if round_number > 0:  # the first one is a warm-up
                seconds[name].append(time.perf_counter() - started)
    return seconds


def measure(size: Size, device: torch.device, num_rounds: int) -> dict[str, Any]:
    """Everything that is printed and written."""
    load_before = os.getloadavg()
    with tempfile.TemporaryDirectory() as folder:
        clip_folder = Path(folder)
        write_clip(size, clip_folder)
        peaks = peaks_apart(("ours", "plain"), size, clip_folder, device)
        steps = {name: build(name, size, clip_folder, device) for name in TITLES}
    batch = Batch.random(size, device)
    losses = check_same_loss(steps, batch)
    rounds = seconds_per_round(steps, batch, num_rounds)
    return {
        "time_ratio": _median_ratio(rounds["plain"], rounds["ours"]),
        "time_ratio_encoding_once": _median_ratio(rounds["plain_encoding_once"], rounds["ours"]),
        "peak_memory_ratio": peaks["plain"] / peaks["ours"],
        "seconds": {name: statistics.median(values) for name, values in rounds.items()},
        "peak_bytes": peaks,
        "loss": losses,
        "seconds_of_rounds": rounds,
        "size": dataclasses.asdict(size),
        "load_average": {"before": load_before, "after": os.getloadavg()},
        "hardware": hardware(device),
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in ("diffcap-dist", "torch", "transformers", "open_clip_torch")},
    }


def _median_ratio(plain: list[float], ours: list[float]) -> float:
    return statistics.median(p / o for p, o in zip(plain, ours))


def hardware(device: torch.device) -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cpu": names[0] if names else platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def as_text(result: dict[str, Any]) -> str:
    lines = [f"{'':<28}{'seconds':>10}{'loss':>12}{'peak MiB':>10}"]
    for name, title in TITLES.items():
        row = f"{title:<28}{result['seconds'][name]:>10.3f}{result['loss'][name]:>12.5f}"
        peak = result["peak_bytes"].get(name)
        lines.append(row if peak is None else f"{row}{peak / 2**20:>10.0f}")
    loads = result["load_average"]
    return "\n".join(
        [
            *lines,
            f"plain / ours: time {result['time_ratio']:.2f} (photos encoded once: "
            f"{result['time_ratio_encoding_once']:.2f}); peak memory over the built model "
            f"{result['peak_memory_ratio']:.2f}",
            f"size: {result['size']}",
            f"hardware: {result['hardware']}; load average {loads['before'][0]:.1f} to {loads['after'][0]:.1f}",
            f"versions: {result['versions']}",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default_device)
    parser.add_argument("--size", choices=SIZES, help="default: small on a CPU, paper on a GPU")
    parser.add_argument("--photos", type=int, help="photos in the batch, where the size's own do not fit")
    parser.add_argument("--timesteps", type=int, help="timesteps per caption")
    parser.add_argument("--rounds", type=int, default=3, help="how often each step is timed")
    parser.add_argument("--out", type=Path, help="JSON to write")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    size = SIZES[args.size or ("paper" if device.type == "cuda" else "small")]
    size = dataclasses.replace(
        size, num_photos=args.photos or size.num_photos, num_timesteps=args.timesteps or size.num_timesteps
    )
    result = measure(size, device, args.rounds)
    print(as_text(result))
    if args.out:
        atomic_write(args.out, json.dumps(result, indent=1).encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
