"""`diffcap train CONFIG key=value ...`: train a denoiser, in one process or on the ranks that a launcher made.

In: a config and shards. Out: a run directory with metrics, checkpoints and the exported captioner. The same command
again continues the run. `deepspeed --module diffcap_dist.train CONFIG` and `torchrun -m diffcap_dist.train CONFIG` run
this same function.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from diffcap_dist.training.preemption import FROM_SCHEDULERS, StopFlag

if __name__ == "__main__":  # a launcher's rank: a signal in the seconds that torch takes to import would kill it
    EARLY_STOP = StopFlag().install(FROM_SCHEDULERS)

import torch
from tqdm import tqdm

from diffcap_dist.config import Config, load_config
from diffcap_dist.data.captions import CaptionTokenizer
from diffcap_dist.data.shard_format import ShardDamage
from diffcap_dist.data.stream import Batch, CaptionStream, Damage, ShardReader, all_records
from diffcap_dist.diffusion.objective import Draws, Objective, build_network, build_objective
from diffcap_dist.diffusion.reward import RewardObjective
from diffcap_dist.diffusion.schedule import knots_of_losses
from diffcap_dist.evaluation.captioner import Captioner, begin_with, export_captioner, feature_identity
from diffcap_dist.evaluation.reward import CiderReward
from diffcap_dist.evaluation.trained_run import code_commit
from diffcap_dist.evaluation.validation import Validation
from diffcap_dist.model.autoregressive import AutoregressiveModel
from diffcap_dist.model.denoiser import Denoiser, ImageFeatures
from diffcap_dist.model.image_encoder import ImageEncoder, slug
from diffcap_dist.run_dir import RunDir
from diffcap_dist.training import checkpoint, distributed
from diffcap_dist.training.checkpoint import TrainState
from diffcap_dist.training.distributed import Ranks
from diffcap_dist.training.ema import EMA
from diffcap_dist.training.engine import (
    BatchSplit,
    build_engine,
    choose_precision,
    full_state,
    set_learning_rate,
    split_batch,
)
from diffcap_dist.training.learning_rate import learning_rate
from diffcap_dist.training.watchdog import Watchdog

log = logging.getLogger("diffcap")

REWARD_PHOTOS = 20_000  # about so many tell how rare an n-gram is


class TooMuchDamage(RuntimeError):
    """More of the training samples are damaged than data.max_bad_fraction; the last good checkpoint is kept."""


class NonFiniteLoss(RuntimeError):
    """The loss is NaN or infinite; the last good checkpoint is kept."""


def main(argv: Sequence[str] | None = None, stop: StopFlag | None = None) -> int:
    parser = argparse.ArgumentParser(prog="diffcap train", description=__doc__)
    parser.add_argument("config", type=Path, help="a YAML of settings, e.g. configs/demo.yaml")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="e.g. training.num_steps=100")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher adds it; LOCAL_RANK says it
    args = parser.parse_intermixed_args(argv)
    # A scheduler's signal ends the run at its first step, saved. Ctrl-C ends it at once as long as there is no loop.
    stop = stop or StopFlag().install(FROM_SCHEDULERS)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    config = load_config(args.config, args.settings)
    ranks = distributed.init_ranks(config.training.stall_seconds)
    try:
        with distributed.naming_lost_ranks(ranks):
            Trainer(config, ranks, stop).train()
    finally:
        distributed.finish()
    return 0


@dataclass
class Data:
    """What the run reads, opened and checked before anything is built."""

    train: ShardReader
    val: ShardReader
    tokenizer: CaptionTokenizer
    encoder: ImageEncoder | None  # None: features are read
    text_encoder: ImageEncoder | None  # None: no text guidance
    feature_widths: tuple[int, int | None]


class Trainer:
    """One run: built once, then ``train()``. Every step of the road is a method; the loop reads as an outline."""

    def __init__(self, config: Config, ranks: Ranks, stop: StopFlag | None = None) -> None:
        self.config, self.ranks = config, ranks
        self.run_dir = RunDir(config.run_dir)
        if ranks.is_first:
            self.run_dir.begin(config)
        distributed.barrier()
        self.split: BatchSplit = split_batch(config.training, ranks.world_size)
        self.dtype, self.precision_reason = choose_precision(config.training.precision, ranks.device)
        self.data = build_data(config, self.run_dir, ranks)
        torch.manual_seed(config.seed)  # the same first weights on every rank
        tokenizer = self.data.tokenizer
        network = build_network(config, tokenizer.vocab_size, self.data.feature_widths)
        self.new_weights = begin_with(network, Path(config.model.init_from)) if config.model.init_from else []
        self.objective = self._objective(network)
        self.parameters = {
            "trainable": sum(p.numel() for p in self.objective.parameters() if p.requires_grad),
            "frozen": sum(p.numel() for p in self.objective.parameters() if not p.requires_grad)
            + sum(b.numel() for b in self.objective.buffers() if b.is_floating_point())
            + (sum(p.numel() for p in self.data.encoder.parameters()) if self.data.encoder else 0),
        }
        self.engine = build_engine(self.objective, config.training, config.optimizer, self.split, self.dtype, ranks)
        self.ema = EMA(self.engine.module, config.training.ema_decay)
        self.state: TrainState = checkpoint.load_latest(self.engine, self.ema, self.run_dir.checkpoints, ranks)
        self.state.rounding_weight = self.state.rounding_weight or config.diffusion.rounding_weight
        self.stream = CaptionStream(
            self.data.train,
            self.data.tokenizer,
            config.data,
            config.seed,
            self.split.total,
            ranks.rank,
            ranks.world_size,
            self.split.micro,
        )
        self.stream.load_state_dict({"samples_seen": self.state.samples_seen})
        self.validation = Validation(
            self.data.val,
            self.data.tokenizer,
            self.data.encoder,
            ranks,
            config.training.validation_images,
            config.seed,
        )
        self.captioner = Captioner(network, config, tokenizer)
        if self.state.schedule_knots:
            self._spread_times(self.state.schedule_knots)
        self.stop = (stop or StopFlag()).install()
        self.metrics = Metrics(self.run_dir, ranks)
        self.step_keys: list[str] = []  # of this rank's samples of the step

    def _objective(self, network: Denoiser | AutoregressiveModel) -> Objective:
        config, tokenizer = self.config, self.data.tokenizer
        if not config.diffusion.reward_samples:
            return build_objective(network, config, tokenizer.pad_id, tokenizer.mask_id)
        if not config.model.init_from:
            raise ValueError(
                "diffusion.reward_samples: all captions of fresh weights are equally bad; set model.init_from to a run "
                "that was trained without"
            )
        damages: list[ShardDamage] | None = [] if config.data.damage == "replace" else None
        every = max(1, sum(self.data.train.counts) // REWARD_PHOTOS)  # whole shards: remote ones are fetched for it
        reward = CiderReward(tokenizer, (r["captions"] for _, r in all_records(self.data.train, damages, every)))
        for damage in damages or []:
            log.info("not in the idf of the reward, for it is damaged: %s", damage)
        special = (tokenizer.pad_id, tokenizer.mask_id, tokenizer.sep_id, tokenizer.special_ids)
        return RewardObjective(network, config.diffusion, *special, reward)

    def train(self) -> None:
        """The loop: batches -> loss -> step -> log, validate, save when due."""
        training = self.config.training
        if self.ranks.is_first:
            self._say_everything()
        if self.state.step >= training.num_steps or self.state.early_stopped:
            log.info("already trained to step %d; nothing to do", self.state.step)
            return
        batches = iter(self.stream)
        skipped = self.engine.skipped_steps
        started = time.perf_counter() - self.state.seconds
        with self._progress_bar() as bar, Watchdog(training.stall_seconds, self.ranks) as watchdog:
            while self.state.step < training.num_steps and not self.state.early_stopped:
                watchdog.alive(self.state.step)
                terms, grad_norm, damages = self._step(batches)
                self.state.step += 1
                self.state.samples_seen += self.split.total
                self.state.seconds = time.perf_counter() - started
                stopped_by = self._agree_to_go_on(terms, damages, bar)
                self._follow_losses(terms)
                if self.engine.skipped_steps > skipped:
                    skipped = self.engine.skipped_steps
                    self._say_skipped(bar)
                step, last = self.state.step, self.state.step == training.num_steps
                if step % training.log_every == 0 or last:
                    self.metrics.training(self.state, terms, grad_norm, self._rate(step - 1), bar)
                else:
                    bar.update()
                if step % training.validate_every == 0 or last:
                    self._validate(bar)
                last = last or self.state.early_stopped
                if step % training.save_every == 0 or last or stopped_by or self.state.best_step == step:
                    self._save()
                if stopped_by:
                    log.info("stopped by %s at step %d, saved; the same command continues", stopped_by, step)
                    self.metrics.say_cost_of_saves()
                    return
        if self.ranks.is_first:
            log.info("trained to step %d; captioner in %s", self.state.step, self.run_dir.export)
            self.metrics.say_cost_of_saves()
            if bad := self.state.bad_samples:
                log.info("damaged, others stood in for them: %d samples: %s", sum(bad.values()), ", ".join(bad))

    def _step(self, batches: Iterator[Batch]) -> tuple[dict[str, float], float, list[Damage]]:
        """One optimizer step over the accumulated micro batches: (mean loss terms of this rank, gradient norm, what of
        its samples was damaged)."""
        config, step = self.config, self.state.step
        self.engine.train()
        set_learning_rate(self.engine, self._rate(step))
        if config.model.dropout:  # the only randomness that is not a function of the position
            torch.manual_seed(hash((config.seed, step, self.ranks.rank)) & 0x7FFFFFFF)
        sums: dict[str, torch.Tensor] = {}
        damages: list[Damage] = []
        self.step_keys = []
        for _ in range(self.split.accumulation):
            batch = next(batches)
            damages += batch.damages
            self.step_keys += batch.keys
            ids_NCL, draws = batch.ids_NCL.to(self.ranks.device), self._draws(batch, step)
            weight = self.state.rounding_weight
            given = {"references": batch.references} if config.diffusion.reward_samples else {}
            terms = self.engine(ids_NCL, self._features(batch), draws, self._text_features(batch), weight, **given)
            self.engine.backward(terms["loss"])
            self.engine.step()  # updates at the last micro batch only
            for name, term in terms.items():
                sums[name] = sums.get(name, 0.0) + term.detach().float()
        self.ema.update(step)
        grad_norm = self.engine.get_global_grad_norm()
        means = {name: (total / self.split.accumulation).item() for name, total in sums.items()}
        return means, float(grad_norm) if grad_norm is not None else math.nan, damages

    def _features(self, batch: Batch) -> ImageFeatures:
        if self.data.encoder is not None:
            assert batch.images_NCHW is not None
            pooled_NF, patches_NPF = self.data.encoder(batch.images_NCHW.to(self.ranks.device, non_blocking=True))
            patches = patches_NPF if self.config.encoder.patches else None
            return ImageFeatures(pooled_NF, patches).to(self.ranks.device, self.dtype)
        assert batch.pooled_NF is not None
        return ImageFeatures(batch.pooled_NF, batch.patches_NPF).to(self.ranks.device, self.dtype)

    def _text_features(self, batch: Batch) -> torch.Tensor | None:
        """text_NCF of the true captions, for the paper's guidance; None without it."""
        if self.data.text_encoder is None:
            return None
        text_BF = self.data.text_encoder.encode_text([caption for some in batch.captions for caption in some])
        return text_BF.unflatten(0, (len(batch.captions), -1)).to(self.ranks.device, self.dtype)

    def _draws(self, batch: Batch, step: int) -> Draws:
        config = self.config
        counts = (config.data.captions_per_image, config.diffusion.timesteps_per_caption)
        shape = self.objective.noise_shape
        return Draws.at(batch.positions, *counts, shape, config.seed, step, config.diffusion, self.ranks.device)

    def _agree_to_go_on(self, terms: dict[str, float], damages: list[Damage], bar: tqdm) -> str | None:
        """Every rank learns of any rank's signal, NaN or damage at this step boundary; errors are on all of them."""
        flags = [self.stop.requested is not None, not math.isfinite(terms["loss"]), bool(damages)]
        stop, not_finite, damaged = distributed.largest([float(flag) for flag in flags], self.ranks.device)
        if damaged:
            self._note([damage for some in distributed.gather(damages) for damage in some], bar)
        if not_finite:
            self._end_at_loss(terms["loss"])
        return (self.stop.requested or "a signal to another rank") if stop else None

    def _end_at_loss(self, loss: float) -> NoReturn:
        """Write down the samples of the ranks whose loss is not finite, and end all of them."""
        gathered = distributed.gather([] if math.isfinite(loss) else self.step_keys)
        keys = {f"rank {rank}": some for rank, some in enumerate(gathered) if some}
        if self.ranks.is_first:
            self.run_dir.log({"kind": "not_finite", "step": self.state.step, "keys": keys})
        raise NonFiniteLoss(
            f"the loss is not finite at step {self.state.step} on {', '.join(keys)}; its samples' keys are in the last "
            f"line of {self.run_dir.metrics}. The last checkpoint in {self.run_dir.checkpoints} is good; lower "
            "optimizer.learning_rate or optimizer.max_grad_norm, or set training.precision=fp32"
        )

    def _say_skipped(self, bar: tqdm) -> None:
        """Above ZeRO 0 DeepSpeed leaves the weights alone where a gradient in bf16 is not finite, and only warns."""
        if self.ranks.is_first:
            first, last = self.state.samples_seen - self.split.total, self.state.samples_seen - 1
            self.run_dir.log({"kind": "skipped", "step": self.state.step, "positions": [first, last]})
            bar.write(
                f"step {self.state.step} changed no weight: its gradient is not finite, though its loss is; samples at "
                f"positions {first} to {last} of the order. If that goes on, lower optimizer.learning_rate or set "
                "training.precision=fp32"
            )

    def _follow_losses(self, terms: dict[str, float]) -> None:
        """What depends on the losses of all ranks: the paper's dynamic lambda, and its early stop."""
        dynamic = self.config.diffusion.dynamic_rounding
        if not dynamic and not self.config.training.early_stop_ratio:
            return
        means = dict(zip(terms, distributed.mean(list(terms.values()), self.ranks.device)))
        if dynamic:
            simple = means.get("restore", 0.0) + means.get("first_step", 0.0)
            self.state.rounding_weight = dynamic * simple / means["rounding"]
        self.state.loss_sum += means["loss"]
        self.state.loss_steps += 1

    def _stop_early(self, val_loss: float) -> None:
        """The paper's end of training: the validation loss is above the training loss since the last validation."""
        state, ratio = self.state, self.config.training.early_stop_ratio
        if ratio and val_loss > ratio * state.loss_sum / max(1, state.loss_steps):
            state.early_stopped = True
            log.info(
                "early stop at step %d: validation loss %.4f, training loss %.4f",
                state.step,
                val_loss,
                state.loss_sum / max(1, state.loss_steps),
            )
        state.loss_sum, state.loss_steps = 0.0, 0

    def _note(self, damages: list[Damage], bar: tqdm) -> None:
        """Count, log and bound the samples that others stood in for."""
        self.state.bad_samples |= {damage.key: damage.samples for damage in damages}
        for damage in damages if self.ranks.is_first else []:
            self.run_dir.log({"kind": "damage", "step": self.state.step, **damage._asdict()})
            bar.write(f"damaged, another sample stands in: {damage.key}: {damage.found}")
        bad, total = sum(self.state.bad_samples.values()), sum(self.data.train.counts)
        limit = self.config.data.max_bad_fraction
        if bad > limit * total:
            raise TooMuchDamage(
                f"{bad} of {total} training samples are damaged, more than data.max_bad_fraction={limit:g}: "
                f"{', '.join(list(self.state.bad_samples)[:10])}. All that were met are in {self.run_dir.metrics}. "
                "Find the others with `make-shards verify`, and fetch or make those shards again"
            )

    def _validate(self, bar: tqdm) -> None:
        self.engine.eval()
        with self.ema.swapped():
            if self.config.diffusion.learn_schedule:
                self._learn_schedule()
            scores = self.validation.run(self.engine.module, self.captioner, self.dtype)
            best = (self.state.best_bleu_4, -self.state.best_val_loss)
            if self.config.training.export == "last" or (scores["bleu_4"], -scores["val_loss"]) > best:
                self.state.best_bleu_4, self.state.best_val_loss = scores["bleu_4"], scores["val_loss"]
                self.state.best_step = self.state.step
                weights = full_state(self.engine.module.network)
                if self.ranks.is_first:
                    self._export(self.run_dir.export, weights, scores)
        self.metrics.validation(self.state, scores, bar)
        self._stop_early(scores["val_loss"])

    def _learn_schedule(self) -> None:
        losses = self.validation.losses_by_time(self.engine.module, self.dtype)
        self._spread_times(knots_of_losses(losses))
        if self.ranks.is_first:
            line = {"kind": "schedule", "step": self.state.step, "losses": losses, "knots": self.state.schedule_knots}
            self.run_dir.log(line)

    def _spread_times(self, knots: list[float]) -> None:
        """Let training and sampling go through the schedule as ``knots`` say, and what is saved and exported too."""
        self.state.schedule_knots = knots
        schedule = dataclasses.replace(self.captioner.schedule, knots=tuple(knots))
        self.objective.schedule = self.captioner.schedule = schedule

    def _export(self, folder: Path, weights: dict[str, torch.Tensor], scores: dict[str, float]) -> None:
        about = {
            "step": self.state.step,
            "validation": scores,
            "feature_widths": self.data.feature_widths,
            **feature_identity(self.data.train.feature_info, self.data.encoder),
        }
        knots = list(self.captioner.schedule.knots)
        config = dataclasses.replace(
            self.config, diffusion=dataclasses.replace(self.config.diffusion, schedule_knots=knots)
        )
        export_captioner(folder, weights, self.objective.network, config, self.data.tokenizer, about)

    def _save(self) -> None:
        started = time.perf_counter()
        every = self.config.training.evaluate_every
        if every and self.state.step % every == 0:  # before the checkpoint: after a kill in between it is done again
            self._leave_for_evaluation()
        folder, keep = self.run_dir.checkpoints, self.config.training.keep_last
        saved = checkpoint.save(self.engine, self.ema, self.state, folder, self.ranks, keep)
        self.metrics.save(self.state, saved, time.perf_counter() - started)

    def _leave_for_evaluation(self) -> None:
        """The captioner of this step, for `diffcap evaluate --steps`: checkpoints go before a queued job may start."""
        with self.ema.swapped():
            weights = full_state(self.engine.module.network)
        here = self.run_dir.evaluation(self.state.step)
        if not self.ranks.is_first:
            return
        # A run that continued from before this step left it already; it is scored first, then its weights go.
        if not (here.export / "model.safetensors").exists() and not here.scores.exists():
            here.begin(self.config)
            self._export(here.export, weights, {})

    def _rate(self, step: int) -> float:
        return learning_rate(step, self.config.training.num_steps, self.config.optimizer)

    def _progress_bar(self) -> tqdm:
        return tqdm(
            total=self.config.training.num_steps,
            initial=self.state.step,
            disable=not self.ranks.is_first,
            unit="step",
            dynamic_ncols=True,
            mininterval=0.1 if sys.stderr.isatty() else 30,  # a log keeps every state of it
        )

    def _say_everything(self) -> None:
        """Every derived number, once, at the start."""
        training, photos = self.config.training, sum(self.data.train.counts)
        seen = "features " + self.config.data.features if self.config.data.features else "the encoder, online"
        facts = {
            "run": str(self.run_dir.root) + (f", continued at step {self.state.step}" if self.state.step else ""),
            "parameters": f"{self.parameters['trainable']:,} trainable, {self.parameters['frozen']:,} frozen",
            "data": f"{photos:,} photos in {len(self.data.train.shards)} shards, {self.data.train.bytes / 1e6:,.1f} MB;"
            f" photos seen through {seen}; vocabulary {self.data.tokenizer.vocab_size:,}",
            "batch": f"{self.split.total} photos = {self.split.micro} x {self.split.accumulation} accumulated x "
            f"{self.split.world_size} ranks; {photos / self.split.total:.1f} steps per epoch, "
            f"{training.num_steps * self.split.total / photos:.1f} epochs",
            "precision": f"{str(self.dtype).removeprefix('torch.')} ({self.precision_reason})",
            "spread": f"ZeRO stage {training.zero_stage} over {self.ranks.world_size} ranks on"
            f" {self.ranks.device.type}, {torch.get_num_threads()} threads each",
            "commit": code_commit() or "unknown: the code is in no git checkout",
        }
        if self.config.model.init_from:
            facts["begun with"] = f"{self.config.model.init_from}; new: {', '.join(self.new_weights) or 'nothing'}"
        for name, value in facts.items():
            log.info("%-11s %s", name, value)
        self.run_dir.log({"kind": "start", "step": self.state.step, **facts})


class Metrics:
    """Where numbers go: metrics.jsonl, TensorBoard, the progress bar. Rank 0 writes; all ranks enter."""

    def __init__(self, run_dir: RunDir, ranks: Ranks) -> None:
        self.run_dir, self.ranks = run_dir, ranks
        self._board: Any = None
        self._since = (0.0, 0)
        self._saves: list[tuple[float, int]] = []  # seconds, bytes
        self._started = time.perf_counter()
        if ranks.is_first:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(run_dir.tensorboard))

    def training(self, state: TrainState, terms: dict[str, float], grad_norm: float, rate: float, bar: tqdm) -> None:
        means = distributed.mean(list(terms.values()), self.ranks.device)
        if not self.ranks.is_first:
            return
        seconds, samples = self._since
        # The first interval of a start holds only what this start did.
        speed = (state.samples_seen - samples) / max(1e-9, state.seconds - seconds) if samples else math.nan
        self._since = (state.seconds, state.samples_seen)
        record = dict(zip(terms, means)) | {
            "learning_rate": rate,
            "grad_norm": grad_norm,
            "samples_per_second": speed,
            "seconds": state.seconds,
        }
        self._write("training", state.step, record)
        shown = {name: f"{value:.3f}" for name, value in zip(terms, means)} | {"lr": f"{rate:.1e}"}
        if "reward" in shown:
            del shown["loss"]  # of a reward only its gradient means something
        bar.set_postfix(shown | ({"photos/s": f"{speed:.0f}"} if samples else {}), refresh=False)
        bar.update(state.step - bar.n)

    def validation(self, state: TrainState, scores: dict[str, float], bar: tqdm) -> None:
        if self.ranks.is_first:
            self._write("validation", state.step, scores)
            text = ", ".join(f"{name} {value:.3f}" for name, value in scores.items())
            bar.write(f"step {state.step}: {text}" + (" (best so far)" if state.best_step == state.step else ""))

    def save(self, state: TrainState, saved: Path, seconds: float) -> None:
        """What a checkpoint cost: no rank trains meanwhile."""
        if self.ranks.is_first:
            size = sum(file.stat().st_size for file in saved.rglob("*") if file.is_file())
            self._saves.append((seconds, size))
            self._write("save", state.step, {"seconds": seconds, "bytes": size})

    def say_cost_of_saves(self) -> None:
        if not self._saves:
            return
        seconds, size = [seconds for seconds, _ in self._saves], self._saves[-1][1] / 1e6
        share = sum(seconds) / (time.perf_counter() - self._started)
        words = "%d checkpoints of %.1f MB stopped training for %.1f s, %.1f%% of the time; the longest for %.2f s"
        log.info(words, len(seconds), size, sum(seconds), 100 * share, max(seconds))

    def _write(self, kind: str, step: int, record: dict[str, float]) -> None:
        self.run_dir.log({"kind": kind, "step": step, **record})
        for name, value in record.items():
            self._board.add_scalar(f"{kind}/{name}", value, step)
        self._board.flush()


def build_data(config: Config, run_dir: RunDir, ranks: Ranks) -> Data:
    """Readers, tokenizer and, without stored features, the encoder. Raises ValueError where they don't fit together."""
    data, encoder = config.data, None
    if not data.features:
        encoder = ImageEncoder(config.encoder.name, config.encoder.pretrained).to(ranks.device)
    transform = encoder.pixel_transform(exact=data.decode == "exact") if encoder else None
    seen = (data.features, config.encoder.patches, transform, data.cache, data.cache_gb)
    train_shards = [one.shards for one in data.train] or data.shards
    readers = [
        ShardReader(train_shards, data.train_split, *seen),
        ShardReader(data.shards, data.val_split, *seen),
    ]
    info = readers[0].feature_info
    if encoder is not None:
        widths = (encoder.pooled_dim, encoder.patches_shape[1] if config.encoder.patches else None)
    else:
        assert info is not None
        expected = slug(config.encoder.name, config.encoder.pretrained)
        if info.weights_sha256 is not None and info.name != expected:
            raise ValueError(
                f"data.features={info.name} were made by encoder {info.source}; this run's encoder is {expected} "
                f"(encoder.name={config.encoder.name}, encoder.pretrained={config.encoder.pretrained}): use one of them"
            )
        widths = (info.pooled_dim, info.patches[1] if config.encoder.patches and info.patches else None)
    text_encoder = None
    if config.model.text_token:
        text_encoder = encoder or ImageEncoder(config.encoder.name, config.encoder.pretrained).to(ranks.device)
    tokenizer = build_tokenizer(config, readers[0], run_dir, ranks)
    return Data(readers[0], readers[1], tokenizer, encoder, text_encoder, widths)


def build_tokenizer(config: Config, reader: ShardReader, run_dir: RunDir, ranks: Ranks) -> CaptionTokenizer:
    """The tokenizer of the run: made or fetched by rank 0 at the first start, then read from the run directory."""
    if ranks.is_first and not (run_dir.tokenizer / "tokenizer.json").exists():
        if config.data.tokenizer == "words":
            damages: list[ShardDamage] | None = [] if config.data.damage == "replace" else None
            captions = (caption for _, record in all_records(reader, damages) for caption in record["captions"])
            tokenizer = CaptionTokenizer.from_captions(captions, config.data.min_word_count)
            for damage in damages or []:
                log.info("not in the vocabulary, for it is damaged: %s", damage)
        else:
            tokenizer = CaptionTokenizer.load(config.data.tokenizer)
        tokenizer.save(run_dir.tokenizer)
    distributed.barrier()
    return CaptionTokenizer.load(str(run_dir.tokenizer), config.data.begin_token)


if __name__ == "__main__":
    sys.exit(main(stop=EARLY_STOP))
