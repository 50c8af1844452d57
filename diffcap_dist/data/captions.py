"""Captions as numbers: the tokenizer, and texts <-> ids_BL with mask_BL.

In: texts and the name of a tokenizer (a Hugging Face id, a local folder, or ``words``: the words of the training
captions). Out: fixed-length id rows ``w_1 ... w_n [SEP] [PAD] ...``, with [CLS] before them on request, and back. Does
not know of images or models.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import AutoTokenizer, PreTrainedTokenizerFast

PAD, UNK, CLS, SEP, MASK = SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


class CaptionTokenizer:
    """A tokenizer with BERT's special tokens, seen as caption rows of fixed length."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, begin_token: bool = False) -> None:
        # Its threads would take the cores of ranks and loader workers, and it warns at every fork.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        missing = [t for t in (PAD, UNK, SEP, MASK) if tokenizer.convert_tokens_to_ids(t) in (None, -1)]
        if missing:
            raise ValueError(f"the tokenizer has no {', '.join(missing)}; a BERT-style tokenizer is expected")
        self.tokenizer = tokenizer
        self.pad_id: int = tokenizer.convert_tokens_to_ids(PAD)  # type: ignore[assignment]
        self.unk_id: int = tokenizer.convert_tokens_to_ids(UNK)  # type: ignore[assignment]
        self.mask_id: int = tokenizer.convert_tokens_to_ids(MASK)  # type: ignore[assignment]
        self.sep_id: int = tokenizer.convert_tokens_to_ids(SEP)  # type: ignore[assignment]
        self._begin = [int(tokenizer.convert_tokens_to_ids(CLS))] if begin_token else []  # type: ignore[arg-type]
        self.vocab_size = len(tokenizer)
        self.special_ids = set(tokenizer.all_special_ids)

    @classmethod
    def load(cls, name: str, begin_token: bool = False) -> CaptionTokenizer:
        """``name``: a local folder, or a Hugging Face id found in the cache or on the hub. ``begin_token``: rows begin
        with [CLS].

        Raises ValueError with the command that fetches it when it can't be found.
        """
        try:
            return cls(AutoTokenizer.from_pretrained(name), begin_token)  # type: ignore[arg-type]
        except (OSError, ValueError) as error:
            raise ValueError(
                f"tokenizer {name!r} is neither a local folder nor reachable: {_first_line(error)}\n"
                f"On a machine with network run:  hf download {name}   and copy the Hugging Face cache here, "
                "or set data.tokenizer to a local folder, or to 'words'."
            ) from error

    @classmethod
    def from_captions(cls, captions: Iterable[str], min_count: int = 1) -> CaptionTokenizer:
        """A vocabulary of whole words: those seen at least ``min_count`` times, the most frequent first."""
        counts = Counter(word for caption in captions for word in split_words(caption))
        words = sorted((w for w, n in counts.items() if n >= min_count), key=lambda w: (-counts[w], w))
        if not words:
            raise ValueError(f"no word occurs {min_count} times in the captions: no vocabulary can be made")
        vocabulary = {word: i for i, word in enumerate((*SPECIAL_TOKENS, *words))}
        tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=UNK))
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece(cleanup=False)
        names = {"pad_token": PAD, "unk_token": UNK, "cls_token": CLS, "sep_token": SEP, "mask_token": MASK}
        return cls(PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names))

    def save(self, folder: Path) -> None:
        """Writes the usual Hugging Face files; ``load(folder)`` reads them."""
        self.tokenizer.save_pretrained(folder)

    def encode(self, texts: Sequence[str], max_length: int) -> tuple[np.ndarray, np.ndarray]:
        """ids_BL (int64) and mask_BL (True on words and [SEP]); longer captions are cut before [SEP]."""
        ids_BL = np.full((len(texts), max_length), self.pad_id, dtype=np.int64)
        encoded = self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
        for row, ids in zip(ids_BL, encoded):
            ids = [*self._begin, *ids[: max_length - 1 - len(self._begin)], self.sep_id]
            row[: len(ids)] = ids
        return ids_BL, ids_BL != self.pad_id

    def decode(self, ids_BL: np.ndarray) -> list[str]:
        """The words before the first [SEP]; special tokens among them are left out."""
        rows = np.asarray(ids_BL).tolist()
        return [str(self.tokenizer.decode([row[i] for i in self.word_positions(row)])).strip() for row in rows]

    def word_positions(self, ids_L: Sequence[int]) -> list[int]:
        """Where the words of one row are: before the first [SEP], special tokens left out."""
        end = ids_L.index(self.sep_id) if self.sep_id in ids_L else len(ids_L)
        return [i for i in range(end) if ids_L[i] not in self.special_ids]


def split_words(text: str) -> list[str]:
    """Lower-case words and punctuation marks, as the ``words`` tokenizer cuts them."""
    return re.findall(r"\w+|[^\w\s]", text.lower())


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
