"""The training objective: loss terms as pure functions, and the module that puts them together for a batch.

In: caption ids, image features, times and noise. Out: named loss terms, their weighted sum under ``loss``. Where the
randomness comes from is here too (``Draws``): every choice is a function of the seed and the sample's position, so a
step's loss does not depend on how the batch is spread over ranks, micro batches or restarts.

Letters: N photos, C captions per photo, K timesteps per caption, B = N C K rows, L, D, V as in the denoiser.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from diffcap_dist.config import DiffusionConfig
from diffcap_dist.data.order import draw, draw_uniform
from diffcap_dist.diffusion.schedule import NoiseSchedule
from diffcap_dist.model.denoiser import Denoiser, ImageFeatures

GOLDEN_RATIO = 0.6180339887498949
SMALL_LOGITS = 1 << 22  # below this many logits (16 MiB) one piece is faster than chunks
CHUNK_TOKENS = 256


def restore_loss(x0_hat_BLD: Tensor, x0_BLD: Tensor, kind: str) -> Tensor:
    """Mean |hat x0 - x0| (the paper, section 3.1) or mean squared error (Ho et al. 2020)."""
    return F.l1_loss(x0_hat_BLD, x0_BLD) if kind == "l1" else F.mse_loss(x0_hat_BLD, x0_BLD)


def rounding_loss(input_BLD: Tensor, table_VD: Tensor, ids_BL: Tensor) -> Tensor:
    """-log p(w | hat x0), mean over all positions, PAD included (L_R of eq. 5).

    The tokens x vocabulary logits never exist whole: torch's fused kernel where it is there (>= 2.13), else chunks of
    tokens that are computed again in the backward pass.
    """
    tokens_TD, ids_T = input_BLD.flatten(0, -2), ids_BL.flatten()
    table_VD = table_VD.to(tokens_TD.dtype)
    if tokens_TD.shape[0] * table_VD.shape[0] <= SMALL_LOGITS:
        return F.cross_entropy((tokens_TD @ table_VD.T).float(), ids_T)
    if hasattr(F, "linear_cross_entropy"):
        # Its own choice is 8 rows at 640 tokens on a CPU, 2.5 times slower than these (benchmarks/train_step.py).
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=CHUNK_TOKENS, chunking_method=None)
        return F.linear_cross_entropy(tokens_TD, table_VD, ids_T, options=options)
    chunks = zip(tokens_TD.split(CHUNK_TOKENS), ids_T.split(CHUNK_TOKENS))
    sums = [checkpoint(_chunk_cross_entropy, tokens, table_VD, ids, use_reentrant=False) for tokens, ids in chunks]
    return torch.stack(sums).sum() / ids_T.numel()


def _chunk_cross_entropy(tokens_TD: Tensor, table_VD: Tensor, ids_T: Tensor) -> Tensor:
    return F.cross_entropy((tokens_TD @ table_VD.T).float(), ids_T, reduction="sum")


@dataclass(frozen=True)
class Draws:
    """The random choices for N photos: t_B, noise_BLD, image_dropped_N, and whether this step self-conditions."""

    t_B: Tensor
    noise_BLD: Tensor
    image_dropped_N: Tensor
    self_condition: bool

    @classmethod
    def at(
        cls,
        positions: list[int],
        rows_per_photo: int,
        shape: tuple[int, int],
        seed: int,
        step: int,
        config: DiffusionConfig,
        device: torch.device,
    ) -> Draws:
        """The draws for the photos at ``positions``; ``shape`` is (L, D).

        Times are a golden-ratio sequence over positions, stratified over a photo's rows: any batch of consecutive
        positions covers [0, 1] evenly. The self-conditioning coin is one per step, the same on all ranks: a per-sample
        coin would cost every rank the extra forward at every step.
        """
        offset = draw_uniform(seed, "timestep")
        start_N = torch.tensor([(offset + GOLDEN_RATIO * p) % 1.0 for p in positions], dtype=torch.float64)
        strata = torch.arange(rows_per_photo, dtype=torch.float64) / rows_per_photo
        t_B = ((start_N[:, None] + strata) % 1.0).flatten().float()
        dropped = [draw_uniform(seed, "image drop", p) < config.image_drop_rate for p in positions]
        coin = draw_uniform(seed, "self-conditioning", step) < config.self_conditioning_rate
        return cls(
            t_B.to(device),
            position_noise(seed, "noise", positions, (rows_per_photo, *shape), device).flatten(0, 1),
            torch.tensor(dropped, device=device),
            coin,
        )


def position_noise(
    seed: int, purpose: str, positions: list[int], shape: tuple[int, ...], device: torch.device
) -> Tensor:
    """Gaussian noise (len(positions), *shape); each row a function of (seed, purpose, its position) alone."""
    generator = torch.Generator(device)
    noise = torch.empty(len(positions), *shape, device=device)
    for row, position in zip(noise, positions):
        row.normal_(generator=generator.manual_seed(draw(seed, purpose, position)))
    return noise


class DiffusionObjective(nn.Module):
    """Denoiser + schedule -> loss terms; the module that the engine wraps (its one forward is one loss)."""

    def __init__(self, denoiser: Denoiser, config: DiffusionConfig) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.config = config
        self.schedule = NoiseSchedule(config.schedule, config.noise_scale)

    def forward(self, ids_NCL: Tensor, image: ImageFeatures, draws: Draws) -> dict[str, Tensor]:
        """Loss terms of the captions ids_NCL of N photos: ``restore``, ``first_step``, ``rounding`` and ``loss``.

        The image tokens are made once per photo and serve its C K rows.
        """
        config, denoiser = self.config, self.denoiser
        N = ids_NCL.shape[0]
        rows_per_photo = draws.t_B.shape[0] // N
        ids_BL = ids_NCL.repeat_interleave(rows_per_photo // ids_NCL.shape[1], dim=1).flatten(0, 1)
        dtype = image.pooled_NF.dtype
        x0_BLD = denoiser.embed(ids_BL).to(dtype)
        x_BLD = self.schedule.add_noise(x0_BLD, draws.noise_BLD.to(dtype), draws.t_B)
        previous_x0_BLD = None
        if draws.self_condition and denoiser.config.self_conditioning:
            with torch.no_grad():
                earlier_BLD = denoiser(x_BLD, draws.t_B, image, None, draws.image_dropped_N)
                previous_x0_BLD = denoiser.clean_estimate(earlier_BLD)
        hidden_BLD = denoiser(x_BLD, draws.t_B, image, previous_x0_BLD, draws.image_dropped_N)
        terms = {"rounding": rounding_loss(denoiser.rounding_input(hidden_BLD), denoiser.embedding_matrix(), ids_BL)}
        if config.restore_weight:
            terms["restore"] = restore_loss(denoiser.clean_estimate(hidden_BLD), x0_BLD, config.restore_loss)
        if config.first_step_weight:
            terms["first_step"] = self._first_step_loss(x0_BLD, draws, image, rows_per_photo // ids_NCL.shape[1])
        terms["loss"] = (
            config.rounding_weight * terms["rounding"]
            + config.restore_weight * terms.get("restore", 0.0)
            + config.first_step_weight * terms.get("first_step", 0.0)
        )
        return terms

    def _first_step_loss(self, x0_BLD: Tensor, draws: Draws, image: ImageFeatures, timesteps: int) -> Tensor:
        """|mu(x_1, 1) - x0|: the paper's x_1 restoring term, at t = 1/T; once per caption, not per timestep."""
        x0_BLD, noise_BLD = x0_BLD[::timesteps], draws.noise_BLD[::timesteps].to(x0_BLD.dtype)
        t_B = torch.full(x0_BLD.shape[:1], 1 / self.config.num_timesteps, device=x0_BLD.device)
        x1_BLD = self.schedule.add_noise(x0_BLD, noise_BLD, t_B)
        hidden_BLD = self.denoiser(x1_BLD, t_B, image, None, draws.image_dropped_N)
        return restore_loss(self.denoiser.clean_estimate(hidden_BLD), x0_BLD, self.config.restore_loss)
