"""The denoiser: noised caption embeddings, times and image features -> what the clean embeddings were.

In: x_BLD, t_B in [0, 1], ``ImageFeatures`` (a pooled vector, and patch tokens where the run has them). Out:
hidden_BLD, from which ``logits`` and ``clean_estimate`` (hat x0) are read. It holds the embedding table, which gives
x_0 of a caption and, transposed, the logits of the rounding term. The body is DistilBERT's transformer, of any size.
Knows no schedule, no loss and no sampler.

Letters: B rows, N photos, L caption length, D embedding width, H body width, V vocabulary, F feature width, P patches.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoModelForMaskedLM, DistilBertConfig, DistilBertForMaskedLM, DistilBertModel

from diffcap_dist.config import ModelConfig
from diffcap_dist.model import packed

TIME_FREQUENCIES = 64
DISTILBERT_INIT = (0.02, 768)  # DistilBERT's initial std, and the width it was chosen for


class ImageFeatures(NamedTuple):
    """Features of N photos: pooled_NF, and patches_NPF or None."""

    pooled_NF: Tensor
    patches_NPF: Tensor | None = None

    def to(self, device: torch.device, dtype: torch.dtype) -> ImageFeatures:
        pooled_NF = self.pooled_NF.to(device, dtype, non_blocking=True)
        if self.patches_NPF is None:
            return ImageFeatures(pooled_NF)
        return ImageFeatures(pooled_NF, self.patches_NPF.to(device, dtype, non_blocking=True))


class TextGuide(NamedTuple):
    """Features of the rows' true captions, text_BF, and which rows may see theirs (section 5.1; training only)."""

    text_BF: Tensor
    kept_B: Tensor


class WordEmbeddings(nn.Module):
    """The table, frozen or trained. A module that is called, since ZeRO-3 gathers weights for calls of their module."""

    def __init__(self, table_VD: Tensor, config: ModelConfig) -> None:
        super().__init__()
        self.trained, self.std = config.train_embeddings, config.embedding_std or 1.0
        if self.trained:
            self.weight = nn.Parameter(table_VD)
        else:
            self.register_buffer("weight", table_VD)

    def forward(self) -> Tensor:
        """table_VD. A trained one is normalised per word to ``embedding_std``: it can't collapse or run away."""
        if not self.trained:
            return self.weight
        return nn.functional.layer_norm(self.weight, self.weight.shape[1:]) * self.std


def resultant_length(table_VD: Tensor) -> float:
    """The mean resultant length of the words' directions: the length of the mean of their unit vectors. About 0 where
    the words point everywhere, 1 where all have collapsed into one direction."""
    return nn.functional.normalize(table_VD.float(), dim=-1).mean(0).norm().item()


class Denoiser(nn.Module):
    """mu(x_t, t, image) of the paper's section 4, with what later work adds as settings of ``ModelConfig``."""

    def __init__(
        self, config: ModelConfig, vocab_size: int, max_length: int, feature_widths: tuple[int, int | None]
    ) -> None:
        super().__init__()
        pooled_width, patch_width = feature_widths
        if config.fusion == "add" and patch_width:
            raise ValueError("model.fusion=add takes the pooled feature only: set encoder.patches=false")
        self.config, self.vocab_size, self.max_length = config, vocab_size, max_length
        table_VD = _embedding_table(config, vocab_size)
        self.word_embeddings = WordEmbeddings(table_VD, config)
        self.embedding_dim = table_VD.shape[1]
        self.body, self.head = _body(config)
        H = self.body.config.dim
        self.pooled_projection = _projection(pooled_width, H, config.normalize_features)
        self.text_projection = _projection(pooled_width, H, config.normalize_features) if config.text_token else None
        self.patch_projection = _projection(patch_width, H, config.normalize_features) if patch_width else None
        self.no_image = nn.Parameter(torch.zeros(H))
        self.segments = nn.Embedding(2, H) if config.fusion == "concat" else None  # caption, features (section 5.5)
        self.time_mlp = (
            nn.Sequential(nn.Linear(TIME_FREQUENCIES, H), nn.SiLU(), nn.Linear(H, H)) if config.time_embedding else None
        )
        # The paper feeds x_t to the body as it is; that needs D = H and no second input.
        straight = self.embedding_dim == H and not config.self_conditioning
        inputs = self.embedding_dim * (2 if config.self_conditioning else 1)
        self.input_projection = nn.Identity() if straight else nn.Linear(inputs, H)
        self.output_projection = nn.Identity() if straight else nn.Linear(H, self.embedding_dim)
        if self.head is not None and self.embedding_dim != H:
            raise ValueError(
                f"model.x0_from=head gives vectors of the body's width {H}, the embeddings have {self.embedding_dim}: "
                "set model.embedding_dim and model.width alike"
            )
        self.length_head = (
            nn.Sequential(nn.Linear(H, H), nn.GELU(), nn.Linear(H, max_length)) if config.length_head else None
        )
        self._init_new_weights()
        self.begin = nn.Embedding(1, self.embedding_dim) if config.shifted else None  # stands before the first word
        if self.begin is not None:
            nn.init.normal_(self.begin.weight, std=config.embedding_std or 1.0)

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return self.no_image.dtype

    def embed(self, ids_BL: Tensor) -> Tensor:
        """Clean embeddings x0_BLD of caption ids."""
        return nn.functional.embedding(ids_BL, self.embedding_matrix())

    def embedding_matrix(self) -> Tensor:
        """The table_VD."""
        return self.word_embeddings()

    def forward(
        self,
        x_BLD: Tensor,
        t_B: Tensor,
        image: ImageFeatures,
        previous_x0_BLD: Tensor | None = None,
        image_dropped_N: Tensor | None = None,
        mask_BL: Tensor | None = None,
        guide: TextGuide | None = None,
    ) -> Tensor:
        """hidden_BLD at the caption positions. B is a multiple of the N photos: rows of one photo stand together.

        L may be less than ``max_length``, where the rest is padding that nothing would attend to. A shifted denoiser
        reads word i one place further on, behind what foretells it, and the photo's tokens see each other alone: the
        control's places and sight (of language models: Gong et al. 2024, arXiv:2410.17891).
        ``previous_x0_BLD`` is an earlier estimate (self-conditioning; Chen et al. 2022, arXiv:2208.04202), zeros where
        there is none. Where ``image_dropped_N`` is True the photo is hidden from its rows. Nothing attends to caption
        positions where ``mask_BL`` is False; with a length head, what is given there means nothing. ``guide`` needs
        ``model.text_token``.
        """
        B, L, D = x_BLD.shape
        num_photos = image.pooled_NF.shape[0]
        if self.max_length < L or self.embedding_dim != D or t_B.shape != (B,) or B % num_photos:
            raise ValueError(
                f"expected x of shape (B, {self.max_length} or less, {self.embedding_dim}), t of shape (B,), and B a "
                f"multiple of the photos; got x {tuple(x_BLD.shape)}, t {tuple(t_B.shape)}, {num_photos} photos"
            )
        if self.config.self_conditioning:
            previous = torch.zeros_like(x_BLD) if previous_x0_BLD is None else previous_x0_BLD.to(x_BLD.dtype)
            x_BLD = torch.cat([x_BLD, previous], dim=-1)
        if self.begin is not None:
            x_BLD = torch.cat([self._begin(B)[:, None].to(x_BLD.dtype), x_BLD], dim=1)
            mask_BL = torch.ones_like(t_B[:, None].expand(-1, L), dtype=torch.bool) if mask_BL is None else mask_BL
            mask_BL = torch.cat([torch.ones_like(mask_BL[:, :1]), mask_BL], dim=1)
        words = x_BLD.shape[1]
        features_BPH = self._image_tokens(image, image_dropped_N).repeat_interleave(B // num_photos, dim=0)
        tokens_BSH, mask_BS = self._fused(self.input_projection(x_BLD), features_BPH, mask_BL, guide)
        if self.time_mlp is not None:
            tokens_BSH = tokens_BSH + self.time_mlp(_sinusoids(t_B).to(x_BLD.dtype))[:, None]
        at_S = torch.arange(tokens_BSH.shape[1], device=x_BLD.device)
        at_S[words:] += self.max_length - words  # features keep their places
        if mask_BS is None or self.length_head is None:
            hidden_BSH = self.body(
                inputs_embeds=tokens_BSH, attention_mask=mask_BS, position_ids=at_S[None]
            ).last_hidden_state
        else:  # where padding is foretold, nobody asks what stands there
            sees = mask_BS[:, None, None]
            if self.begin is not None:
                of_photo_S = torch.arange(len(at_S), device=at_S.device) >= words
                sees = sees & (of_photo_S | ~of_photo_S[:, None])
            hidden_BSH = packed.hidden_states(self.body, tokens_BSH, mask_BS, sees, at_S)
        hidden_BLD = self.output_projection(hidden_BSH[:, :L])
        return hidden_BLD if self.head is None else self.head(hidden_BLD)

    def _begin(self, rows: int) -> Tensor:
        """What stands before the first word, (rows, D)."""
        assert self.begin is not None
        return self.begin(torch.zeros(rows, dtype=torch.long, device=self.begin.weight.device))

    def _fused(
        self, caption_BLH: Tensor, features_BPH: Tensor, mask_BL: Tensor | None, guide: TextGuide | None
    ) -> tuple[Tensor, Tensor | None]:
        """Section 5.5: features behind the caption as tokens of their own segment, or added to each of its positions.
        Returns tokens_BSH and which of them may be attended to (None: all)."""
        text_BH = None
        if guide is not None:
            if self.text_projection is None:
                raise ValueError("this denoiser has no text token (model.text_token); it was given text features")
            text_BH = self.text_projection(guide.text_BF)
        if self.segments is None:
            if text_BH is not None and guide is not None:
                features_BPH = features_BPH + (text_BH * guide.kept_B[:, None].to(text_BH.dtype))[:, None]
            return caption_BLH + features_BPH, mask_BL
        if text_BH is not None:
            features_BPH = torch.cat([features_BPH, text_BH[:, None]], dim=1)
        of_caption, of_features = self.segments.weight
        tokens_BSH = torch.cat([caption_BLH + of_caption, features_BPH + of_features], dim=1)
        if mask_BL is None and guide is None:
            return tokens_BSH, None
        mask_BS = torch.ones(tokens_BSH.shape[:2], dtype=torch.bool, device=tokens_BSH.device)
        if mask_BL is not None:
            mask_BS[:, : mask_BL.shape[1]] = mask_BL
        if guide is not None:
            mask_BS[:, -1] = guide.kept_B
        return tokens_BSH, mask_BS

    def length_logits(self, image: ImageFeatures) -> Tensor:
        """logits_NL of how many tokens a caption of each photo has, [SEP] among them: 1 .. L.

        Non-autoregressive translation does the same (Ghazvininejad et al. 2019, arXiv:1904.09324, section 3.3).
        """
        assert self.length_head is not None
        return self.length_head(self._image_tokens(image, None).mean(dim=1))

    def rounding_input(self, hidden_BLD: Tensor) -> Tensor:
        """What is multiplied with the embedding matrix to give logits."""
        if self.config.x0_from != "logits":
            return hidden_BLD
        return hidden_BLD * self.embedding_dim**-0.5  # unit-variance words: keeps the first logits near N(0, 1)

    def logits(self, hidden_BLD: Tensor) -> Tensor:
        """logits_BLV, materialised: for sampling, not for training."""
        return self.rounding_input(hidden_BLD) @ self.embedding_matrix().T.to(hidden_BLD.dtype)

    def clean_estimate(self, hidden_BLD: Tensor, logits_BLV: Tensor | None = None) -> Tensor:
        """hat x0_BLD: the expected embedding under the logits (Dieleman et al. 2022, arXiv:2211.15089, section 3.1),
        or the output itself (the paper). ``logits_BLV`` saves computing them where the caller has them."""
        if self.config.x0_from != "logits":
            return hidden_BLD
        logits_BLV = self.logits(hidden_BLD) if logits_BLV is None else logits_BLV
        probability_BLV = logits_BLV.float().softmax(dim=-1)
        return (probability_BLV @ self.embedding_matrix().float()).to(hidden_BLD.dtype)

    def _image_tokens(self, image: ImageFeatures, dropped_N: Tensor | None) -> Tensor:
        tokens_NPH = self.pooled_projection(image.pooled_NF)[:, None]
        if self.patch_projection is not None:
            if image.patches_NPF is None:
                raise ValueError("this denoiser was built with patch tokens (encoder.patches); the features have none")
            tokens_NPH = torch.cat([tokens_NPH, self.patch_projection(image.patches_NPF)], dim=1)
        if dropped_N is None:
            return tokens_NPH
        return torch.where(dropped_N[:, None, None], self.no_image, tokens_NPH)

    def _init_new_weights(self) -> None:
        for module in (self.pooled_projection, self.text_projection, self.patch_projection, self.time_mlp):
            for layer in module.modules() if module is not None else ():
                if isinstance(layer, nn.Linear):
                    nn.init.zeros_(layer.bias)
        if self.segments is not None:
            nn.init.normal_(self.segments.weight, std=0.02)


def _sinusoids(t_B: Tensor) -> Tensor:
    """Sines and cosines of 1000 t, (B, TIME_FREQUENCIES) (Vaswani et al. 2017; Ho et al. 2020)."""
    half = TIME_FREQUENCIES // 2
    frequency = torch.exp(-math.log(10000.0) * torch.arange(half, device=t_B.device) / (half - 1))
    angle = 1000.0 * t_B.float()[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


def _projection(width: int, H: int, normalise: bool) -> nn.Module:
    linear = nn.Linear(width, H)
    return nn.Sequential(nn.LayerNorm(width), linear) if normalise else linear


def _body(config: ModelConfig) -> tuple[DistilBertModel, nn.Module | None]:
    """DistilBERT's transformer and, where hat x0 is taken behind it, its head up to the word embeddings."""
    if config.body == "random":
        std, at_width = DISTILBERT_INIT
        model = DistilBertForMaskedLM(
            DistilBertConfig(
                vocab_size=1,
                dim=config.width,
                n_layers=config.num_layers,
                n_heads=config.num_heads,
                hidden_dim=config.ffn_width,
                dropout=config.dropout,
                attention_dropout=config.dropout,
                initializer_range=std * math.sqrt(at_width / config.width),
            )
        )
        nn.init.normal_(model.distilbert.embeddings.position_embeddings.weight, std=config.position_init_std)
    else:
        options = {"dropout": config.dropout, "attention_dropout": config.dropout}
        model, missing = _pretrained(config.body, "model.body", **options)
        if config.x0_from == "head" and "vocab_transform" in missing:
            raise ValueError(
                f"model.body={config.body} has no language-model head, which model.x0_from=head takes hat x0 from: "
                "use one that was saved with it (distilbert-base-uncased), or model.x0_from=body"
            )
    body = model.distilbert
    body.embeddings.word_embeddings = nn.Identity()  # type: ignore[assignment]  # ours is the only table
    head = nn.Sequential(model.vocab_transform, model.activation, model.vocab_layer_norm)
    return body, head if config.x0_from == "head" else None


def _embedding_table(config: ModelConfig, vocab_size: int) -> Tensor:
    if config.embeddings == "random":
        # Every word equally long: the nearest word and the likeliest word are then the same.
        table_VD = nn.functional.layer_norm(torch.randn(vocab_size, config.embedding_dim), (config.embedding_dim,))
        return table_VD * (config.embedding_std or 1.0)
    model, _ = _pretrained(config.embeddings, "model.embeddings")
    table_VD = model.distilbert.embeddings.word_embeddings.weight.detach().clone()
    if table_VD.shape[0] != vocab_size:
        raise ValueError(
            f"model.embeddings={config.embeddings} has {table_VD.shape[0]} words, the tokenizer {vocab_size}: "
            "set data.tokenizer to the same name"
        )
    return table_VD * (config.embedding_std / table_VD.std()) if config.embedding_std else table_VD


def _pretrained(name: str, setting: str, **overrides: float) -> tuple[DistilBertForMaskedLM, set[str]]:
    """The model, and the modules that its files don't hold."""
    try:
        model, loading = AutoModelForMaskedLM.from_pretrained(name, output_loading_info=True, **overrides)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{setting}={name!r} is neither a local folder nor reachable: {str(error).strip().splitlines()[0]}\n"
            f"On a machine with network run:  hf download {name}   and copy the Hugging Face cache here, or set "
            f"{setting} to a local folder, or to 'random'."
        ) from error
    if not isinstance(model, DistilBertForMaskedLM):
        raise ValueError(f"{setting}={name!r} is a {type(model).__name__}; a DistilBERT is expected")
    return model, {key.split(".")[0] for key in loading["missing_keys"]}
