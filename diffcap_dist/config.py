"""The typed tree of settings: what a run can be told, with its defaults.

In: a YAML file and ``key.sub=value`` words. Out: one checked ``Config``. Defaults here < YAML < words; unknown keys and
wrong types are errors with a suggestion. Each part goes whole to its owner; nobody gets the tree. No torch here.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException


class ConfigError(ValueError):
    """A setting is unknown, of the wrong type, or does not fit another one."""


@dataclass
class TrainShards:
    """One dataset of a training mix."""

    shards: str = "???"
    repeat: float = 1.0  # how often its samples come in an epoch of the mix; 0.25 = a quarter of them


@dataclass
class DataConfig:
    """What is read, and in which order."""

    shards: str = "???"  # folder or URL (s3://, https://, ...) with index.json, made by make-shards
    train: list[TrainShards] = field(default_factory=list)  # several datasets to train on; empty: `shards` alone
    train_split: str = "train"
    val_split: str = "val"
    features: str = ""  # name of the features beside the shards; empty: the encoder runs online
    tokenizer: str = "words"  # 'words' (of the training captions), a folder, or a Hugging Face id
    min_word_count: int = 1  # for 'words': rarer words become [UNK]
    max_length: int = 24  # L; 1.7% of Flickr8k captions are longer, 26% at the paper's 16
    begin_token: bool = False  # caption rows begin with [CLS], as the paper's do
    captions: str = (
        ""  # JSON lines {key, captions} to train on instead of the shards' own (a teacher's: diffcap distill)
    )
    captions_per_image: int = 1  # captions of a photo used at each visit; the next visit goes on with the next ones
    canonical_spans: int = 64
    shuffle_window: int = 4096
    decode: Literal["fast", "exact"] = "fast"  # JPEGs by torchvision (1 of 255 levels from PIL), or by PIL
    flip_rate: float = 0.0  # in training, share of visits that mirror the photo, and left and right in its captions
    crop_scale: float = 1.0  # in training, smallest share of a photo's area that a random crop keeps; 1 = no crops
    color_jitter: float = 0.0  # in training, brightness, contrast and saturation times 1 - this .. 1 + this
    num_workers: int = 2  # loader processes per rank; 0 = in the rank itself
    worker_timeout: float = 10.0  # seconds without a batch of local shards before a stalled worker is an error
    damage: Literal["raise", "replace"] = "raise"  # stop at a damaged sample, or let the next good one stand in
    max_bad_fraction: float = 0.001  # of the training samples; above it damage stops the run all the same
    cache: str = ""  # folder for shards from URLs, shared by a node's processes; empty: in the system's scratch folder
    cache_gb: float = 0.0  # size limit of the cache; 0 = none


@dataclass
class EncoderConfig:
    """The frozen image encoder (open_clip)."""

    name: str = "ViT-B-32"  # open_clip model, hf-hub:ORG/MODEL, or a folder with open_clip_config.json
    pretrained: str = "openai"  # open_clip tag or weights file; empty for folders and hub ids
    patches: bool = False  # give the denoiser the patch tokens beside the pooled vector


@dataclass
class ModelConfig:
    """The network's body and embedding table."""

    kind: Literal["denoiser", "autoregressive"] = "denoiser"  # autoregressive: the same body, left to right
    body: str = "random"  # 'random', or a Hugging Face id / folder of a DistilBERT
    init_from: str = ""  # a run of the same sizes (of any kind), whose weights are begun with
    width: int = 768
    num_layers: int = 6
    num_heads: int = 12
    ffn_width: int = 3072
    dropout: float = 0.0
    embeddings: str = "random"  # 'random', or a Hugging Face id / folder whose word embeddings are taken
    train_embeddings: bool = False
    embedding_dim: int = 768  # D; the table's own width when embeddings are pretrained
    fusion: Literal["concat", "add"] = "concat"
    time_embedding: bool = True
    self_conditioning: bool = False  # continuous diffusion is also shown its last estimate
    # hat x0: the expected embedding under the logits, the body's output, or that of DistilBERT's head (the paper's)
    x0_from: Literal["logits", "body", "head"] = "logits"
    embedding_std: float = 1.0  # of the table's entries; 0 takes a pretrained table as it is (DistilBERT's: about 0.05)
    position_init_std: float = 0.5  # of a random body; DistilBERT's own is 0.02 (docs/results.md has what that costs)
    normalize_features: bool = True  # LayerNorm before the image features' projection; the paper has none
    # in training nothing attends to [PAD] (the paper's code), at inference everything; with length_head nothing ever
    mask_padding: bool = False
    length_head: bool = True  # the length is foretold from the photo; what is behind it is then given, not denoised
    # a word is foretold where the one before it stands, as in the control, so that a control's weights fit (init_from)
    shifted: bool = False
    text_token: bool = False  # in training the text feature of the true caption beside the image's (section 5.1)


@dataclass
class DiffusionConfig:
    """The forward process and the loss."""

    kind: Literal["masked", "continuous"] = "masked"  # words behind [MASK], or Gaussian noise over their embeddings
    schedule: Literal["cosine", "sqrt"] = "cosine"
    learn_schedule: bool = False  # continuous: each validation spreads the times anew, so that the loss rises evenly
    # the times of the schedule that even times 0, 1/n, ..., 1 are spread to; learned ones are written into the export
    schedule_knots: list[float] = field(default_factory=list)
    num_timesteps: int = 1000  # T: the x_1 term is at t = 1/T
    noise_scale: float = 4.0
    noising: Literal["standard", "as_printed"] = "standard"  # noise times sqrt(1 - alpha_bar), or without the root
    timesteps_per_caption: int = 1  # K; the paper's is 100
    # over [0, 1] evenly in every batch; K of 1..T without repeats (the paper); the same K for all captions (its code)
    timesteps: Literal["stratified", "subset", "shared"] = "stratified"
    shared_noise: bool = False  # one noise for all timesteps of a caption (the paper's code)
    predict_steps_back: int = 0  # n: x_{t-n} instead of x_0 is predicted (section 5.4: 100)
    restore_loss: Literal["l1", "l2"] = "l2"
    restore_weight: float = 0.0  # weight of |hat x0 - x0| at the drawn timesteps
    first_step_weight: float = 0.0  # weight of the restore term at t = 1/T (the paper's x_1 term)
    rounding_weight: float = 1.0  # lambda
    length_weight: float = 0.1  # of the length head's cross-entropy: it must not shape the photo's projection
    dynamic_rounding: float = 0.0  # C: lambda = C L'_simple / L_R after each step (section 5.3); 0 = constant
    # means; sums over positions (the paper's code, in its two versions); sums over all but captions (equation 5)
    loss_reduction: Literal["mean", "series_sum_sample_mean", "series_sum", "printed"] = "mean"
    text_guidance: float = 0.0  # w: (1 + w) f(x, text) - w f(x) in the training loss (section 5.1, model.text_token)
    text_drop_rate: float = 0.2  # p_uncond: share of captions whose text is left out there
    self_conditioning_rate: float = 0.5
    image_drop_rate: float = 0.0  # share of samples trained without their image, for sampler.guidance_scale
    # S: so many captions of each photo are drawn, and those of higher CIDEr-D made likelier; a second stage (init_from)
    reward_samples: int = 0


@dataclass
class SamplerConfig:
    """How captions are drawn from the trained denoiser."""

    name: Literal["ddim", "x0_feedback"] = "ddim"  # of continuous diffusion; the other kinds have one each
    num_inference_steps: int = 10
    guidance_scale: float = 1.0  # 1 = no guidance
    time_difference: float = 0.0  # the denoiser is told t + this (asymmetric time intervals)
    eta: float = 0.0  # 0 = DDIM, 1 = DDPM
    temperature: float = 0.0  # of masked diffusion and the autoregressive control: 0 takes the likeliest words
    revise: bool = False  # masked diffusion: words of little confidence are masked again, whenever they were written
    num_beams: int = 1  # of the autoregressive control; 1 is greedy
    candidates: int = 1  # captions drawn per image; the one most like the others is kept
    remove_repeats: bool = False  # drop a word that repeats the one before it
    precision: Literal["fp32", "bf16"] = "fp32"  # of an exported captioner; in bf16 near-ties may fall either way
    compile: bool = False  # an exported denoiser by torch.compile, on GPUs as CUDA graphs; it takes a minute to begin
    seed: int = 0


@dataclass
class OptimizerConfig:
    """AdamW and its learning rate, per step."""

    learning_rate: float = 1e-4
    final_learning_rate: float = 5e-5  # where linear, log and cosine end
    # log: straight in the logarithm of the rate; log_steps: falls with the logarithm of the step
    schedule: Literal["constant", "linear", "log", "log_steps", "cosine"] = "cosine"
    hold_steps: int = 1  # steps that a rate is held for; an epoch's, for schedules by epoch
    warmup_steps: int = 100
    beta1: float = 0.9
    beta2: float = 0.98
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0  # 0 = no clipping


@dataclass
class TrainingConfig:
    """The run: how long, how spread, how often it looks up."""

    num_steps: int = 10000
    global_batch_size: int = 256  # photos per optimizer step, over all ranks
    micro_batch_size: int = 0  # photos per forward on one rank; 0 = the whole share of the rank
    zero_stage: int = 1
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    ema_decay: float = 0.999
    log_every: int = 10
    validate_every: int = 500
    validation_images: int = 256  # photos per validation (loss, and BLEU of their captions)
    save_every: int = 1000
    evaluate_every: int = 0  # the captioner of every so many steps is left in evaluations/ to be scored; 0 = none
    keep_last: int = 2
    export: Literal["best", "last"] = "best"  # the captioner that is best on validation, or the last one
    stall_seconds: float = 1800.0  # a step (its validation and checkpoint too) may take this long; 0 = for ever
    early_stop_ratio: float = 0.0  # stop where validation loss > this x training loss (the paper: 1); 0 = never


@dataclass
class Config:
    """A whole experiment."""

    run_dir: str = "???"
    seed: int = 0
    data: DataConfig = field(default_factory=DataConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)

    def __post_init__(self) -> None:
        for message in _conflicts(self):
            raise ConfigError(message)

    @property
    def kind(self) -> str:
        """How captions are written: ``continuous``, ``masked`` or ``autoregressive``."""
        return "autoregressive" if self.model.kind == "autoregressive" else self.diffusion.kind


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Defaults < ``path`` < ``overrides`` (``key.sub=value``). Raises ConfigError naming the setting.

    A file may begin with ``base: OTHER.yaml`` (beside it): it then holds only what differs from that one.
    """
    return merge_settings([*read_files(path), words_as_settings(overrides)], path)


def words_as_settings(words: Sequence[str]) -> Any:
    """``key.sub=value`` words as a layer for ``merge_settings``. Raises ConfigError."""
    for word in words:
        if not re.fullmatch(r"[\w.]+=.*", word, flags=re.DOTALL):
            raise ConfigError(f"{word!r} is not a setting; write key.sub=value, e.g. training.num_steps=100")
    return OmegaConf.from_dotlist([word + "''" * word.endswith("=") for word in words])


def merge_settings(layers: Sequence[Any], path: Path) -> Config:
    """Defaults < each of ``layers`` (nested mappings) in turn. Raises ConfigError naming the setting and ``path``."""
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Config), *layers)
        return OmegaConf.to_object(merged)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise ConfigError(_explain(error, path)) from error


def save_config(config: Config, path: Path) -> None:
    """Every setting, defaults included, as YAML that ``load_config`` reads back."""
    path.write_text(OmegaConf.to_yaml(OmegaConf.structured(config)), encoding="utf-8")


def differences(old: Config, new: Config, ignoring: frozenset[str] = frozenset()) -> list[str]:
    """``key: old -> new`` for each setting that differs, but for those in ``ignoring``."""
    before, after = _flatten(dataclasses.asdict(old)), _flatten(dataclasses.asdict(new))
    return [f"{k}: {before[k]!r} -> {after[k]!r}" for k in before if before[k] != after[k] and k not in ignoring]


def _conflicts(config: Config) -> list[str]:
    model, training, data = config.model, config.training, config.data
    checks = {
        f"model.width={model.width} is not a multiple of model.num_heads={model.num_heads}": model.width
        % model.num_heads,
        f"training.zero_stage={training.zero_stage}; DeepSpeed knows 0, 1, 2 and 3": training.zero_stage
        not in (0, 1, 2, 3),
        f"data.captions_per_image={data.captions_per_image}; at least 1 (5 are all of Flickr's)": (
            data.captions_per_image < 1
        ),
        f"data.max_length={data.max_length}; at least 2 (one word and [SEP])": data.max_length < 2,
        "data.flip_rate, crop_scale and color_jitter change photos, but data.features stores what the encoder saw of "
        "them unchanged: set data.features= (the encoder then runs online), or leave these at 0, 1 and 0": (
            bool(data.features) and (data.flip_rate, data.crop_scale, data.color_jitter) != (0, 1, 0)
        ),
        f"data.flip_rate={data.flip_rate}; a share, in [0, 1]": not 0 <= data.flip_rate <= 1,
        f"data.crop_scale={data.crop_scale}; a share of the area, in (0, 1]": not 0 < data.crop_scale <= 1,
        f"data.color_jitter={data.color_jitter}; it lies in [0, 1]": not 0 <= data.color_jitter <= 1,
        f"sampler.num_inference_steps={config.sampler.num_inference_steps}; at least 1": (
            config.sampler.num_inference_steps < 1
        ),
        f"training.stall_seconds={training.stall_seconds}; at least 0": training.stall_seconds < 0,
        f"training.evaluate_every={training.evaluate_every} is no multiple of "
        f"training.save_every={training.save_every}: a step is evaluated as it is saved": (
            training.evaluate_every < 0 or training.evaluate_every % training.save_every != 0
        ),
        f"training.ema_decay={training.ema_decay}; it lies in [0, 1)": not 0 <= training.ema_decay < 1,
        f"optimizer.hold_steps={config.optimizer.hold_steps}; at least 1": config.optimizer.hold_steps < 1,
    }
    checks |= {**_recipe_conflicts(config), **_reward_conflicts(config)}
    return [message for message, wrong in checks.items() if wrong]


def _recipe_conflicts(config: Config) -> dict[str, bool]:
    """What does not fit between the model, its diffusion and its sampler: message -> whether it is so."""
    model, diffusion, sampler = config.model, config.diffusion, config.sampler
    return {
        "all loss weights are zero: set diffusion.rounding_weight or diffusion.restore_weight": not (
            diffusion.rounding_weight or diffusion.restore_weight
        ),
        "sampler.compile=true is for denoisers; model.kind=autoregressive writes word by word, by other code": (
            sampler.compile and model.kind == "autoregressive"
        ),
        f"sampler.guidance_scale={sampler.guidance_scale} needs a model that was trained with "
        "diffusion.image_drop_rate > 0, e.g. 0.1": (
            sampler.guidance_scale != 1 and not diffusion.image_drop_rate and model.kind != "autoregressive"
        ),
        "model.shifted=true is for masked diffusion that foretells lengths: set model.kind=denoiser, "
        "diffusion.kind=masked, model.length_head=true, model.fusion=concat and model.self_conditioning=false": (
            model.shifted
            and (config.kind, model.length_head, model.fusion, model.self_conditioning)
            != ("masked", True, "concat", False)
        ),
        "diffusion.text_guidance > 0 and model.text_token=true go together": (
            (diffusion.text_guidance > 0) != model.text_token
        ),
        "diffusion.kind=masked predicts words: set model.x0_from=logits, restore_weight=0 and first_step_weight=0, "
        "or diffusion.kind=continuous": (
            diffusion.kind == "masked"
            and (model.x0_from != "logits" or bool(diffusion.restore_weight or diffusion.first_step_weight))
        ),
        "diffusion.learn_schedule and schedule_knots are of model.kind=denoiser and diffusion.kind=continuous": (
            (diffusion.learn_schedule or bool(diffusion.schedule_knots))
            and (diffusion.kind != "continuous" or model.kind != "denoiser")
        ),
        "model.kind=autoregressive: set diffusion.timesteps_per_caption=1 (it has no times) and model.x0_from=logits": (
            model.kind == "autoregressive" and (diffusion.timesteps_per_caption != 1 or model.x0_from != "logits")
        ),
        f"diffusion.predict_steps_back={diffusion.predict_steps_back} steps are no part of "
        f"diffusion.num_timesteps={diffusion.num_timesteps}": not (
            0 <= diffusion.predict_steps_back < diffusion.num_timesteps
        ),
        "diffusion.predict_steps_back > 0 needs model.x0_from=body or head: no word is x_{t-n}": (
            diffusion.predict_steps_back > 0 and model.x0_from == "logits"
        ),
        f"diffusion.timesteps=subset can't draw {diffusion.timesteps_per_caption} different ones of "
        f"{diffusion.num_timesteps}": (
            diffusion.timesteps == "subset" and diffusion.timesteps_per_caption > diffusion.num_timesteps
        ),
        "diffusion.first_step_weight needs diffusion.num_timesteps >= 1": diffusion.num_timesteps < 1,
    }


def _reward_conflicts(config: Config) -> dict[str, bool]:
    """What does not go with ``diffusion.reward_samples``: message -> whether it is so."""
    model, diffusion, data = config.model, config.diffusion, config.data
    return {
        f"diffusion.reward_samples={diffusion.reward_samples}; 0, or at least 2 captions to compare": (
            diffusion.reward_samples < 0 or diffusion.reward_samples == 1
        ),
        "diffusion.reward_samples > 0 is for masked diffusion that foretells lengths, one caption of a photo and one "
        "timestep at a time: set diffusion.kind=masked, model.kind=denoiser, model.length_head=true, "
        "data.captions_per_image=1, diffusion.timesteps_per_caption=1 and data.flip_rate=0": (
            diffusion.reward_samples > 0
            and (
                (config.kind, model.length_head) != ("masked", True)
                or (data.captions_per_image, diffusion.timesteps_per_caption, data.flip_rate) != (1, 1, 0)
            )
        ),
        "diffusion.reward_samples > 0 has no cross-entropy, hides no photo and shows no estimate: set diffusion."
        "dynamic_rounding=0, image_drop_rate=0, text_guidance=0, training.early_stop_ratio=0 and "
        "model.self_conditioning=false": (
            diffusion.reward_samples > 0
            and bool(
                diffusion.dynamic_rounding
                or diffusion.image_drop_rate
                or diffusion.text_guidance
                or config.training.early_stop_ratio
                or model.self_conditioning
            )
        ),
    }


def read_files(path: Path, above: tuple[Path, ...] = ()) -> list[Any]:
    """The settings of ``path`` behind those of its bases, the most basic first. Raises ConfigError."""
    if not path.is_file():
        raise ConfigError(f"no such config file: {path}" + (f" (the base of {above[-1]})" if above else ""))
    if path.resolve() in above:
        raise ConfigError(f"{path} is its own base, through {', '.join(map(str, above))}")
    content = OmegaConf.load(path)
    base = content.pop("base", None) if isinstance(content, DictConfig) else None
    return [*(read_files(path.parent / base, (*above, path.resolve())) if base else ()), content]


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(_flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat


def _explain(error: OmegaConfBaseException, path: Path) -> str:
    key = str(error.full_key or "")
    known = list(_flatten(OmegaConf.to_container(OmegaConf.structured(Config))))  # type: ignore[arg-type]
    message = str(error).splitlines()[0]
    if key and key not in known:
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
        suggestion = f"; did you mean {near[0]!r}?" if near else ""
        return f"unknown setting {key!r}{suggestion} (file {path} and the words after it)"
    if "mandatory" in message.lower() or "missing" in message.lower():
        return f"setting {key!r} has no default: give it in {path} or as {key}=VALUE"
    return f"setting {key!r}: {message}"
