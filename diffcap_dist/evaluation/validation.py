"""Validation: the loss at fixed times and noise, and quick scores of captions, on some held-out photos.

In: a split, a denoiser (with whatever weights it holds) and the ranks. Out: ``val_loss`` and caption scores, the same
for any number of ranks. All ranks do the same number of forwards, so a partitioned (ZeRO-3) denoiser works too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from diffcap_dist.data.captions import CaptionTokenizer
from diffcap_dist.data.shard_format import references_of
from diffcap_dist.data.stream import Photo, ShardReader, evaluation_photos
from diffcap_dist.diffusion.objective import DiffusionObjective, Draws, Objective
from diffcap_dist.evaluation.captioner import Captioner
from diffcap_dist.evaluation.scene_facts import scene_scores
from diffcap_dist.evaluation.scores import score_captions
from diffcap_dist.model.denoiser import ImageFeatures, resultant_length
from diffcap_dist.model.image_encoder import ImageEncoder
from diffcap_dist.training import distributed
from diffcap_dist.training.distributed import Ranks

BATCH_PHOTOS = 64
TIME_INTERVALS = 20  # a learned schedule is straight in each
ROWS_PER_PHOTO = 4  # fixed times per photo: the loss is then smooth enough to compare


def photo_features(
    photos: list[Photo], encoder: ImageEncoder | None, device: torch.device, dtype: torch.dtype
) -> ImageFeatures:
    """Stored features, or the encoder's own, of some photos."""
    if encoder is not None:
        pooled_NF, patches_NPF = encoder(
            torch.stack([p.image_CHW for p in photos if p.image_CHW is not None]).to(device)
        )
        return ImageFeatures(pooled_NF, patches_NPF).to(device, dtype)
    pooled = torch.stack([p.pooled_F for p in photos if p.pooled_F is not None])
    patches = [p.patches_PF for p in photos if p.patches_PF is not None]
    return ImageFeatures(pooled, torch.stack(patches) if patches else None).to(device, dtype)


class Validation:
    """A fixed set of held-out photos: at most ``num_photos``, cut to a multiple of the ranks."""

    def __init__(
        self,
        reader: ShardReader,
        tokenizer: CaptionTokenizer,
        encoder: ImageEncoder | None,
        ranks: Ranks,
        num_photos: int,
        seed: int,
    ) -> None:
        self.tokenizer, self.encoder, self.ranks, self.seed = tokenizer, encoder, ranks, seed
        total = min(num_photos, sum(reader.counts))
        if total < ranks.world_size:
            raise ValueError(f"validation has {total} photos for {ranks.world_size} ranks; at least one for each")
        self.num_photos = total - total % ranks.world_size
        self.photos = list(evaluation_photos(reader, ranks.rank, ranks.world_size, self.num_photos))

    def run(self, objective: Objective, captioner: Captioner, dtype: torch.dtype) -> dict[str, float]:
        """``val_loss`` and scores; of a trained table its ``resultant_length``, which shows a collapse. The captions'
        noise and the times depend on the photo alone."""
        losses: list[float] = []
        captions: dict[str, str] = {}
        for start, photos in self._batches():
            features = photo_features(photos, self.encoder, self.ranks.device, dtype)
            terms = self._terms(objective, photos, features, start, ROWS_PER_PHOTO, None)
            losses.append(terms["loss"].item() * len(photos))
            captions.update(zip([p.key for p in photos], captioner.caption(features, [p.key for p in photos])))
        val_loss = distributed.mean([sum(losses) / len(self.photos)], self.ranks.device)[0]
        records = {p.key: p.record for p in self.photos}
        gathered = distributed.gather_to_first((captions, records), self.ranks)
        scores = _scores(gathered) if gathered is not None else None
        found = {"val_loss": val_loss, **distributed.from_first(scores)}
        if objective.network.config.train_embeddings:
            with torch.no_grad():
                found["resultant_length"] = resultant_length(objective.network.embedding_matrix())
        return found

    def losses_by_time(self, objective: DiffusionObjective, dtype: torch.dtype) -> list[float]:
        """The rounding loss at the times 0, 1/n, ..., 1 of the schedule itself, however it is spread now."""
        spread, objective.schedule = objective.schedule, dataclasses.replace(objective.schedule, knots=())
        sums = [0.0] * (TIME_INTERVALS + 1)
        for start, photos in self._batches():
            features = photo_features(photos, self.encoder, self.ranks.device, dtype)
            for k in range(len(sums)):
                terms = self._terms(objective, photos, features, start, 1, k / TIME_INTERVALS)
                sums[k] += terms["rounding"].item() * len(photos)
        objective.schedule = spread
        return distributed.mean([total / len(self.photos) for total in sums], self.ranks.device)

    def _batches(self) -> Iterator[tuple[int, list[Photo]]]:
        for start in range(0, len(self.photos), BATCH_PHOTOS):
            yield start, self.photos[start : start + BATCH_PHOTOS]

    @torch.no_grad()
    def _terms(
        self, objective: Objective, photos: list[Photo], features: ImageFeatures, start: int, rows: int, t: float | None
    ) -> dict[str, torch.Tensor]:
        """Loss terms of some photos' first captions, each at ``rows`` times: spread over [0, 1], or all ``t``."""
        captions = [photo.record["captions"][0] for photo in photos]
        ids_NL = torch.from_numpy(self.tokenizer.encode(captions, objective.network.max_length)[0]).to(
            self.ranks.device
        )
        world = self.ranks.world_size
        positions = [(start + i) * world + self.ranks.rank for i in range(len(photos))]
        shape = objective.noise_shape
        draws = Draws.at(positions, 1, rows, shape, self.seed, 0, objective.config, self.ranks.device)
        draws = dataclasses.replace(
            draws,
            image_dropped_N=torch.zeros_like(draws.image_dropped_N),
            self_condition=False,
            t_B=draws.t_B if t is None else torch.full_like(draws.t_B, t),
        )
        return objective(ids_NL[:, None], features, draws)


def _scores(gathered: list[tuple[dict, dict]]) -> dict[str, float]:
    captions = dict(sorted(item for part, _ in gathered for item in part.items()))
    records = {key: record for _, part in gathered for key, record in part.items()}
    scores = score_captions(captions, {key: references_of(record) for key, record in records.items()})
    kept = {name: scores[name] for name in ("bleu_4", "cider_d")}
    if all("scene" in record for record in records.values()):
        scenes = {key: record["scene"] for key, record in records.items()}
        kept["scene_accuracy"] = scene_scores(captions, scenes)["scene_accuracy"]
    return kept
