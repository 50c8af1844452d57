"""The training objective: loss terms as pure functions, and the module that puts them together for a batch.

In: caption ids, image features, times and noise. Out: named loss terms, their weighted sum under ``loss``. Where the
randomness comes from is here too (``Draws``): every choice is a function of the seed and the sample's position, so a
step's loss does not depend on how the batch is spread over ranks, micro batches or restarts.

Letters: N photos, C captions per photo, K timesteps per caption, B = N C K rows, L, D, V as in the denoiser.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from diffcap_dist.config import Config, DiffusionConfig
from diffcap_dist.data.order import GAMMA, LAST_SHIFT, MIXING, draw, draw_uniform
from diffcap_dist.diffusion.length import open_positions
from diffcap_dist.diffusion.schedule import NoiseSchedule
from diffcap_dist.model.autoregressive import AutoregressiveModel
from diffcap_dist.model.denoiser import Denoiser, ImageFeatures, TextGuide

GOLDEN_RATIO = 0.6180339887498949
SMALL_LOGITS = 1 << 22  # below this many logits (16 MiB) one piece is faster than chunks
CHUNK_TOKENS = 256
LOW_24_BITS = (1 << 24) - 1  # as many as a float32 holds


def restore_loss(x0_hat_BLD: Tensor, x0_BLD: Tensor, kind: str) -> Tensor:
    """Mean |hat x0 - x0| (the paper, section 3.1) or mean squared error (Ho et al. 2020)."""
    return F.l1_loss(x0_hat_BLD, x0_BLD) if kind == "l1" else F.mse_loss(x0_hat_BLD, x0_BLD)


def rounding_loss(input_BLD: Tensor, table_VD: Tensor, ids_BL: Tensor, counted_BL: Tensor | None = None) -> Tensor:
    """-log p(w | hat x0), mean over all positions, PAD included (L_R of eq. 5).

    Positions where ``counted_BL`` is False count as 0, and still as positions: the mean over a batch is then the mean
    of its parts' means, however it is cut. The tokens x vocabulary logits never exist whole: torch's fused kernel where
    it is there (>= 2.13), else chunks of tokens that are computed again in the backward pass.
    """
    tokens_TD, ids_T = input_BLD.flatten(0, -2), ids_BL.flatten()
    if counted_BL is not None:
        index_T = counted_BL.flatten().nonzero().squeeze(1)
        if not len(index_T):
            return (input_BLD * 0).sum()
        return rounding_loss(tokens_TD[index_T], table_VD, ids_T[index_T]) * (len(index_T) / len(ids_T))
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


def _where_open(open_BL: Tensor | None, x_BLD: Tensor, known_BLD: Tensor) -> Tensor:
    """What is known, but x_BLD where there is something to denoise (None: everywhere)."""
    return x_BLD if open_BL is None else torch.where(open_BL[..., None], x_BLD, known_BLD)


def _chunk_cross_entropy(tokens_TD: Tensor, table_VD: Tensor, ids_T: Tensor) -> Tensor:
    return F.cross_entropy((tokens_TD @ table_VD.T).float(), ids_T, reduction="sum")


def reduction_scales(kind: str, num_timesteps: int, length: int, width: int) -> tuple[float, float, float]:
    """What the mean terms (restore, first step, rounding) are multiplied by to become the paper's sums.

    ``series_sum_sample_mean``: the published code's, a sum over the L positions, for all its results but one.
    ``series_sum``: its last version, where the x_1 term is divided by K and the rounding term multiplied by it.
    ``printed``: equation 5 as it stands, sums over K, L and (restore terms) D. K, L, D as in the paper.
    """
    K, L, D = num_timesteps, length, width
    return {
        "mean": (1.0, 1.0, 1.0),
        "series_sum_sample_mean": (L, L, L),
        "series_sum": (L, L / K, L * K),
        "printed": (K * L * D, L * D, K * L),
    }[kind]


@dataclass(frozen=True)
class Draws:
    """The random choices for N photos, B rows: t_B, noise (B, *an objective's ``noise_shape``), image_dropped_N,
    text_kept_B, and whether this step self-conditions. A photo's rows: its captions, each with its timesteps."""

    t_B: Tensor
    noise: Tensor
    image_dropped_N: Tensor
    self_condition: bool
    text_kept_B: Tensor | None = None

    @classmethod
    def at(
        cls,
        positions: list[int],
        num_captions: int,
        num_timesteps: int,
        shape: tuple[int, ...],
        seed: int,
        step: int,
        config: DiffusionConfig,
        device: torch.device,
    ) -> Draws:
        """The draws for the photos at ``positions``, C captions of each with K timesteps; ``shape`` is the noise's.

        The self-conditioning coin is one per step, the same on all ranks: a per-sample coin would cost every rank the
        extra forward at every step.
        """
        C, K = num_captions, num_timesteps
        rate = config.image_drop_rate
        dropped = [rate > 0 and draw_uniform(seed, "image drop", p) < rate for p in positions]
        coin = draw_uniform(seed, "self-conditioning", step) < config.self_conditioning_rate
        noises = (C, 1 if config.shared_noise else K, *shape)
        noise = position_noise(seed, "noise", positions, noises, device)
        kept_B = None
        if config.text_guidance:
            kept = [draw_uniform(seed, "text drop", p, c) >= config.text_drop_rate for p in positions for c in range(C)]
            kept_B = torch.tensor(kept, device=device).repeat_interleave(K)
        return cls(
            _timesteps(positions, C, K, seed, step, config).to(device),
            noise.expand(-1, -1, K, *shape).flatten(0, 2),
            torch.tensor(dropped, device=device),
            coin,
            kept_B,
        )


def _timesteps(positions: list[int], C: int, K: int, seed: int, step: int, config: DiffusionConfig) -> Tensor:
    """t_B in [0, 1], by ``diffusion.timesteps``."""
    T = config.num_timesteps
    if config.timesteps == "shared":  # K of 0..T-1, with repeats, for all captions of the step alike
        t_K = torch.tensor([draw(seed, "timestep", step, k) % T for k in range(K)], dtype=torch.float64) / T
        return t_K.repeat(len(positions) * C).float()
    if config.timesteps == "subset":  # K of 1..T, none twice, for each caption its own
        rows = [
            np.random.default_rng(draw(seed, "timestep", p, c)).choice(T, K, replace=False) + 1
            for p in positions
            for c in range(C)
        ]
        return (torch.from_numpy(np.concatenate(rows)).double() / T).float()
    # A golden-ratio sequence over positions, stratified over a photo's rows: any batch covers [0, 1] evenly.
    offset = draw_uniform(seed, "timestep")
    start_N = torch.tensor([(offset + GOLDEN_RATIO * p) % 1.0 for p in positions], dtype=torch.float64)
    strata = torch.arange(C * K, dtype=torch.float64) / (C * K)
    return ((start_N[:, None] + strata) % 1.0).flatten().float()


def position_noise(
    seed: int, purpose: str, positions: list[int], shape: tuple[int, ...], device: torch.device
) -> Tensor:
    """Gaussian noise (len(positions), *shape); each row a function of (seed, purpose, its position) alone, the same on
    every device but for rounding.

    All rows at once, since a generator seeded for each is a kernel's launch for each on a GPU: SplitMix64 (Steele
    et al. 2014) from the row's ``draw``, two normals of each of its numbers (Box & Muller 1958).
    """
    count = math.prod(shape)
    states_N1 = torch.tensor([draw(seed, purpose, position) for position in positions], device=device)[:, None]
    bits_NI = splitmix64(states_N1, torch.arange(1, (count + 1) // 2 + 1, device=device))
    radius_NI = ((1 + (bits_NI >> 40 & LOW_24_BITS)) / (LOW_24_BITS + 1)).log().mul_(-2).sqrt_()
    angle_NI = (bits_NI & LOW_24_BITS) * (2 * math.pi / (LOW_24_BITS + 1))
    noise = torch.cat([radius_NI * angle_NI.cos(), radius_NI * angle_NI.sin()], dim=1)
    return noise[:, :count].reshape(len(positions), *shape)


def splitmix64(state: Tensor, number: Tensor) -> Tensor:
    """The 64 bits (an int64) that SplitMix64 gives as its ``number``-th, from 1, beginning at ``state``."""
    z = state + number * (GAMMA - (1 << 64))
    for shift, multiplier in MIXING:
        z ^= z >> shift & ((1 << 64 - shift) - 1)  # >> alone would shift the sign in
        z *= multiplier - (1 << 64)
    z ^= z >> LAST_SHIFT & ((1 << 64 - LAST_SHIFT) - 1)
    return z


class DiffusionObjective(nn.Module):
    """Denoiser + schedule -> loss terms; the module that the engine wraps (its one forward is one loss).

    ``pad_id`` tells where captions end, for ``model.mask_padding`` and ``model.length_head``; ``mask_id`` is what
    masked diffusion writes over a word.
    """

    def __init__(self, network: Denoiser, config: DiffusionConfig, pad_id: int, mask_id: int = -1) -> None:
        super().__init__()
        self.network, self.config, self.pad_id, self.mask_id = network, config, pad_id, mask_id
        self.schedule = NoiseSchedule.of(config)
        self.scales = reduction_scales(
            config.loss_reduction, config.timesteps_per_caption, network.max_length, network.embedding_dim
        )

    @property
    def noise_shape(self) -> tuple[int, ...]:
        """Of a caption's noise in ``Draws``."""
        if self.config.kind == "masked":
            return (self.network.max_length,)
        return self.network.max_length, self.network.embedding_dim

    def forward(
        self,
        ids_NCL: Tensor,
        image: ImageFeatures,
        draws: Draws,
        text_NCF: Tensor | None = None,
        rounding_weight: float | None = None,
    ) -> dict[str, Tensor]:
        """Loss terms of the captions ids_NCL of N photos: ``restore``, ``first_step``, ``rounding`` and ``loss``.

        The image tokens are made once per photo and serve its C K rows. ``text_NCF``, features of the captions
        themselves, guide where ``diffusion.text_guidance`` is on. ``rounding_weight``: lambda, if not the setting's.
        """
        config, network = self.config, self.network
        K = draws.t_B.shape[0] // ids_NCL[..., 0].numel()
        ids_BL = ids_NCL.flatten(0, 1).repeat_interleave(K, dim=0)
        text_BF = None if text_NCF is None else text_NCF.flatten(0, 1).repeat_interleave(K, dim=0)
        rows = _Rows(ids_BL, image, draws.image_dropped_N, text_BF, draws.text_kept_B)
        dtype, t_B = image.pooled_NF.dtype, self.schedule.spread(draws.t_B)
        open_BL = self._open(ids_BL)
        if config.kind == "masked":
            # A standard normal is below its t-quantile with probability t.
            masked_BL = torch.special.ndtr(draws.noise) < t_B[:, None]
            counted_BL = masked_BL if open_BL is None else masked_BL & open_BL
            x_BLD = network.embed(ids_BL.masked_fill(counted_BL, self.mask_id)).to(dtype)
        else:
            counted_BL = open_BL
            x0_BLD, noise_BLD = network.embed(ids_BL).to(dtype), draws.noise.to(dtype)
            x_BLD = _where_open(open_BL, self._noised(x0_BLD, noise_BLD, t_B), x0_BLD)
        previous_x0_BLD = None
        if draws.self_condition and network.config.self_conditioning:
            with torch.no_grad():
                previous_x0_BLD = network.clean_estimate(self._hidden(x_BLD, t_B, rows))
                # Known words stay clean in it, as at inference.
                previous_x0_BLD = _where_open(open_BL, previous_x0_BLD, network.embed(ids_BL).to(dtype))
        hidden_BLD = self._hidden(x_BLD, t_B, rows, previous_x0_BLD)
        rounding = rounding_loss(network.rounding_input(hidden_BLD), network.embedding_matrix(), ids_BL, counted_BL)
        terms = {"rounding": rounding}
        if network.length_head is not None:
            lengths_B = (ids_NCL != self.pad_id).sum(-1).flatten()
            logits_BL = network.length_logits(image).repeat_interleave(ids_NCL.shape[1], dim=0)
            terms["length"] = F.cross_entropy(logits_BL.float(), lengths_B - 1)
        if config.restore_weight:
            target_BLD = self._target(x0_BLD, noise_BLD, t_B)
            estimate_BLD = _where_open(open_BL, network.clean_estimate(hidden_BLD), target_BLD)
            terms["restore"] = restore_loss(estimate_BLD, target_BLD, config.restore_loss)
        if config.first_step_weight:
            terms["first_step"] = self._first_step_loss(x0_BLD[::K], noise_BLD[::K], rows.every(K))
        for name, scale in zip(("restore", "first_step", "rounding"), self.scales):
            if name in terms:
                terms[name] = terms[name] * scale
        terms["loss"] = (
            (config.rounding_weight if rounding_weight is None else rounding_weight) * terms["rounding"]
            + config.restore_weight * terms.get("restore", 0.0)
            + config.first_step_weight * terms.get("first_step", 0.0)
            + config.length_weight * terms.get("length", 0.0)
        )
        return terms

    def _open(self, ids_BL: Tensor) -> Tensor | None:
        """Where there is something to denoise: everywhere (None), or at the words, where the length is foretold."""
        if self.network.length_head is None:
            return None
        lengths_B1 = (ids_BL != self.pad_id).sum(-1, keepdim=True)
        return open_positions(lengths_B1, ids_BL.shape[1])

    def _noised(self, x0_BLD: Tensor, noise_BLD: Tensor, t_B: Tensor) -> Tensor:
        return self.schedule.add_noise(x0_BLD, noise_BLD, t_B, as_printed=self.config.noising == "as_printed")

    def _target(self, x0_BLD: Tensor, noise_BLD: Tensor, t_B: Tensor) -> Tensor:
        """x_0, or x_{t-n} on the same path; x_0 where t <= n (section 5.4)."""
        if not self.config.predict_steps_back:
            return x0_BLD
        earlier_B = (t_B.double() - self.config.predict_steps_back / self.config.num_timesteps).clamp(min=0.0)
        return self.schedule.add_noise(x0_BLD, noise_BLD, earlier_B)

    def _hidden(self, x_BLD: Tensor, t_B: Tensor, rows: _Rows, previous_x0_BLD: Tensor | None = None) -> Tensor:
        """hidden_BLD; with text guidance (1 + w) f(x, text) - w f(x) (section 5.1, in training as published)."""
        masks_padding = self.network.config.mask_padding or self.network.length_head is not None
        mask_BL = rows.ids_BL != self.pad_id if masks_padding else None
        inputs = (x_BLD, t_B, rows.image, previous_x0_BLD, rows.image_dropped_N, mask_BL)
        if rows.text_BF is None or (w := self.config.text_guidance) == 0:
            return self.network(*inputs)
        assert rows.text_kept_B is not None
        plain_BLD = self.network(*inputs)
        guided_BLD = self.network(*inputs, TextGuide(rows.text_BF, rows.text_kept_B))
        return (1 + w) * guided_BLD - w * plain_BLD

    def _first_step_loss(self, x0_BLD: Tensor, noise_BLD: Tensor, rows: _Rows) -> Tensor:
        """|mu(x_1, 1) - x0|: the paper's x_1 restoring term, at t = 1/T; once per caption, not per timestep."""
        t_B = torch.full(x0_BLD.shape[:1], 1 / self.config.num_timesteps, device=x0_BLD.device)
        open_BL = self._open(rows.ids_BL)
        hidden_BLD = self._hidden(_where_open(open_BL, self._noised(x0_BLD, noise_BLD, t_B), x0_BLD), t_B, rows)
        estimate_BLD = _where_open(open_BL, self.network.clean_estimate(hidden_BLD), x0_BLD)
        return restore_loss(estimate_BLD, x0_BLD, self.config.restore_loss)


class AutoregressiveObjective(nn.Module):
    """The control's loss: cross-entropy of each word after those before it. Of the draws it takes none."""

    noise_shape = ()

    def __init__(self, network: AutoregressiveModel, config: DiffusionConfig, pad_id: int) -> None:
        super().__init__()
        self.network, self.config, self.pad_id = network, config, pad_id

    def forward(
        self,
        ids_NCL: Tensor,
        image: ImageFeatures,
        draws: Draws,
        text_NCF: Tensor | None = None,
        rounding_weight: float | None = None,
    ) -> dict[str, Tensor]:
        """``rounding`` and ``loss``, which are the same: mean over all positions, [PAD] counted as 0."""
        ids_BL = ids_NCL.flatten(0, 1).repeat_interleave(draws.t_B.shape[0] // ids_NCL[..., 0].numel(), dim=0)
        mask_BL = ids_BL != self.pad_id
        hidden_BLD = self.network(ids_BL, image, mask_BL)
        table_VD = self.network.embedding_matrix()
        loss = rounding_loss(self.network.rounding_input(hidden_BLD), table_VD, ids_BL, mask_BL)
        return {"rounding": loss, "loss": loss}


Objective = DiffusionObjective | AutoregressiveObjective


def build_network(
    config: Config, vocab_size: int, feature_widths: tuple[int, int | None]
) -> Denoiser | AutoregressiveModel:
    """The network of ``model.kind``, with fresh weights."""
    kind = AutoregressiveModel if config.model.kind == "autoregressive" else Denoiser
    return kind(config.model, vocab_size, config.data.max_length, feature_widths)


def build_objective(network: Denoiser | AutoregressiveModel, config: Config, pad_id: int, mask_id: int) -> Objective:
    """What ``network`` is trained by."""
    if isinstance(network, AutoregressiveModel):
        return AutoregressiveObjective(network, config.diffusion, pad_id)
    return DiffusionObjective(network, config.diffusion, pad_id, mask_id)


@dataclass(frozen=True)
class _Rows:
    """What the B rows of a step are conditioned on, and their words."""

    ids_BL: Tensor
    image: ImageFeatures
    image_dropped_N: Tensor
    text_BF: Tensor | None
    text_kept_B: Tensor | None

    def every(self, K: int) -> _Rows:
        """One row of K: one per caption."""
        text_BF = None if self.text_BF is None else self.text_BF[::K]
        kept_B = None if self.text_kept_B is None else self.text_kept_B[::K]
        return _Rows(self.ids_BL[::K], self.image, self.image_dropped_N, text_BF, kept_B)
