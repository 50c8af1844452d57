"""What is in a dataset of shards: its numbers, its duplicates, and a page of its photos.

In: a finished dataset folder. Out: `DatasetInfo` (and its text), `NearTwins` of the splits, a self-contained HTML page.
One pass over the records, by shards; photos are decoded only for near duplicates and for the page. It changes nothing.
S samples, N and M photos of two splits.
"""

import base64
import dataclasses
import hashlib
import io
from collections import Counter
from collections.abc import Callable
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from diffcap_dist.data.shard_format import ShardIndex, ShardInfo, atomic_write, open_shard
from shards.workers import in_processes

if TYPE_CHECKING:
    from PIL import Image

    from diffcap_dist.data.captions import CaptionTokenizer

MAX_LENGTHS = (16, 24, 32)  # tokens of a caption that models are trained with, [SEP] included
LISTED = 10  # of each kind of duplicate; the counts are of all
TWIN_SPLIT = "train"
# Of 64 bits. On 1,000 photos of Flickr8k (499,500 pairs) no two differ in 11 bits or fewer, two pairs in 12; copies
# that were scaled or re-encoded differ in 4 at most, 96% of those cut by 2% at each edge in 8 at most, 71% at 4%.
MAX_TWIN_DISTANCE = 8
HASH_SIDE, HASH_PIXELS = 8, 32
PAIRS_AT_ONCE = 1 << 22  # 32 MB of distances
THUMBNAIL = 320  # pixels of the longer side: sharp on a screen of double density


@dataclasses.dataclass
class SplitFacts:
    shards: int = 0
    samples: int = 0
    photos: int = 0  # samples that have one
    captions: int = 0
    tar_bytes: int = 0
    photo_bytes: int = 0
    widths: tuple[int, int] | None = None  # (least, most); None: no record says it
    heights: tuple[int, int] | None = None
    per_photo: Counter[int] = dataclasses.field(default_factory=Counter)  # captions of a sample -> samples
    truncated: dict[int, int] = dataclasses.field(default_factory=lambda: dict.fromkeys(MAX_LENGTHS, 0))


@dataclasses.dataclass(frozen=True)
class NearTwins:
    """Photos of `split` that have one in train at most MAX_TWIN_DISTANCE bits away."""

    split: str
    photos: int
    with_twin: int
    nearest: list[tuple[int, str, str]]  # (distance, key in the split, key in train), LISTED at most


@dataclasses.dataclass
class DatasetInfo:
    directory: Path
    splits: dict[str, SplitFacts]
    words: Counter[int]  # words of a caption -> captions
    tokenizer: str
    identical: list[list[tuple[str, str]]]  # (split, key) of the photos of equal bytes, two or more each
    shared_captions: list[tuple[int, str]]  # (photos, caption), two photos or more, most first
    leaks: dict[str, int]  # split -> how many of its samples are of photos that are in train too
    rejected: dict[str, dict[str, int]]
    features: dict[str, str]
    undecodable: list[str]  # keys; filled only with near duplicates
    near_twins: list[NearTwins] | None  # None: not asked for


@dataclasses.dataclass(frozen=True)
class _Record:
    key: str
    captions: list[str]
    photo_bytes: int | None  # None: captions only
    sha256: bytes | None
    size: tuple[int, int] | None
    hash64: int | None
    shares_photo: bool  # with the sample of this key in another split: captions were split, not photos


# ---- info ----


def dataset_info(
    directory: Path,
    tokenizer: str = "words",
    near_duplicates: bool = False,
    workers: int = 1,
    progress: Callable[[int], object] | None = None,
) -> DatasetInfo:
    """Read all records once. `progress` is told the bytes of each tar that is done."""
    index = ShardIndex.load(directory)
    encode = _tokenizer(tokenizer)
    info = _empty_info(directory, index, tokenizer)
    places: dict[bytes, list[tuple[str, str]]] = {}
    split_photos: dict[str, list[str]] = {}
    captions: Counter[str] = Counter()
    hashes: dict[str, list[tuple[str, int]]] = {split: [] for split in info.splits}
    read = partial(_read_shard, directory, near_duplicates)
    for shard, records in zip(index.shards, in_processes(read, index.shards, workers)):
        _add_shard(info, shard, records, encode)
        for record in records:
            captions.update(set(record.captions))
            if record.shares_photo:
                split_photos.setdefault(record.key, []).append(shard.split)
            if record.sha256 is not None:
                places.setdefault(record.sha256, []).append((shard.split, record.key))
            if record.hash64 is not None:
                hashes[shard.split].append((record.key, record.hash64))
            elif near_duplicates and record.photo_bytes is not None:
                info.undecodable.append(record.key)
        if progress is not None:
            progress(shard.bytes)
    info.identical = [found for found in places.values() if len(found) > 1]
    info.leaks = _leaks(info.identical, split_photos)
    info.shared_captions = [(count, text) for text, count in captions.most_common() if count > 1]
    if near_duplicates:
        info.near_twins = _all_near_twins(hashes)
    return info


def _empty_info(directory: Path, index: ShardIndex, tokenizer: str) -> DatasetInfo:
    features = {}
    for name, feature in index.features.items():
        patches = "" if feature.patches is None else f", patches {feature.patches[0]} x {feature.patches[1]}"
        features[name] = f"width {feature.pooled_dim}{patches}, of {feature.source}"
    rejected = index.provenance.get("counts", {}).get("rejected", {})
    splits = {split: SplitFacts() for split in index.splits()}
    return DatasetInfo(directory, splits, Counter(), tokenizer, [], [], {}, rejected, features, [], None)


def _leaks(identical: list[list[tuple[str, str]]], split_photos: dict[str, list[str]]) -> dict[str, int]:
    """By the photos' bytes, and where there are none by the keys of photos whose captions were split."""
    groups = [*identical, *([(split, key) for split in splits] for key, splits in split_photos.items())]
    leaking = {place for group in groups if TWIN_SPLIT in dict(group) for place in group if place[0] != TWIN_SPLIT}
    return dict(sorted(Counter(split for split, _ in leaking).items()))


def _tokenizer(name: str) -> "CaptionTokenizer":
    from diffcap_dist.data.captions import CaptionTokenizer

    # Lengths are all that is asked, and an unknown word is one token as a known one is: any vocabulary does.
    return CaptionTokenizer.from_captions(["a"]) if name == "words" else CaptionTokenizer.load(name)


def _read_shard(directory: Path, hashed: bool, info: ShardInfo) -> list[_Record]:
    shard = open_shard(directory, info)
    records = []
    for sample in range(len(shard)):
        record, size = shard.record(sample), shard.image_size(sample)
        sha256 = bytes.fromhex(record["sha256"]) if record.get("sha256") else None
        hash64 = None
        if size is not None and (hashed or sha256 is None):
            image = shard.image_bytes(sample) or b""
            sha256 = sha256 or hashlib.sha256(image).digest()
            hash64 = _hash_of_bytes(image) if hashed else None
        width, height = record.get("width"), record.get("height")
        pixels = (width, height) if width and height else None
        shares = "references" in record
        records.append(_Record(shard.key(sample), record["captions"], size, sha256, pixels, hash64, shares))
    shard.close()
    return records


def _add_shard(info: DatasetInfo, shard: ShardInfo, records: list[_Record], tokenizer: "CaptionTokenizer") -> None:
    facts = info.splits[shard.split]
    captions = [caption for record in records for caption in record.captions]
    photo_sizes = [record.photo_bytes for record in records if record.photo_bytes is not None]
    pixels = [record.size for record in records if record.size is not None]
    facts.shards += 1
    facts.samples += len(records)
    facts.photos += len(photo_sizes)
    facts.captions += len(captions)
    facts.tar_bytes += shard.bytes
    facts.photo_bytes += sum(photo_sizes)
    facts.widths = _range([width for width, _ in pixels], facts.widths)
    facts.heights = _range([height for _, height in pixels], facts.heights)
    facts.per_photo.update(len(record.captions) for record in records)
    info.words.update(len(caption.split()) for caption in captions)
    if captions:
        _, mask_SL = tokenizer.encode(captions, max(MAX_LENGTHS) + 1)  # one more: longer ones fill it
        for length in MAX_LENGTHS:
            facts.truncated[length] += int((mask_SL.sum(1) > length).sum())


def _range(values: list[int], known: tuple[int, int] | None) -> tuple[int, int] | None:
    values = [*values, *(known or ())]
    return (min(values), max(values)) if values else None


# ---- near duplicates ----


def perceptual_hash(image: "Image.Image") -> int:
    """64 bits: which of the 8 x 8 lowest frequencies of the grey picture are above their median (a DCT hash)."""
    from PIL import Image

    grey = image.convert("L").resize((HASH_PIXELS, HASH_PIXELS), Image.Resampling.BOX)
    waves = np.cos(np.pi * np.outer(np.arange(HASH_SIDE), 2 * np.arange(HASH_PIXELS) + 1) / (2 * HASH_PIXELS))
    frequencies = (waves @ np.asarray(grey, np.float64) @ waves.T).ravel()
    median = np.median(frequencies[1:])  # without the mean brightness, which is far above the rest
    return int.from_bytes(np.packbits(frequencies > median).tobytes())


def _hash_of_bytes(data: bytes) -> int | None:
    from diffcap_dist.data.photo import decode_photo

    try:
        return perceptual_hash(decode_photo(data))
    except Exception:  # PIL's decoders raise errors of many families; the caller lists the key
        return None


def near_pairs(hashes_N: np.ndarray, others_M: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(distance_N, nearest_N): Hamming distance to, and number of, the first nearest of the others. O(N M) time,
    bounded memory."""
    distance_N, nearest_N = np.zeros(len(hashes_N), np.int64), np.zeros(len(hashes_N), np.int64)
    rows = max(1, PAIRS_AT_ONCE // len(others_M))
    for start in range(0, len(hashes_N), rows):
        part = slice(start, start + rows)
        distance_BM = np.bitwise_count(hashes_N[part, None] ^ others_M[None])
        nearest_N[part] = distance_BM.argmin(1)
        distance_N[part] = np.take_along_axis(distance_BM, nearest_N[part, None], 1)[:, 0]
    return distance_N, nearest_N


def _all_near_twins(hashes: dict[str, list[tuple[str, int]]]) -> list[NearTwins]:
    train = hashes.get(TWIN_SPLIT, [])
    found = []
    for split, photos in hashes.items():
        if split == TWIN_SPLIT or not photos or not train:
            continue
        own_N, train_M = (np.array([number for _, number in side], np.uint64) for side in (photos, train))
        distance_N, nearest_N = near_pairs(own_N, train_M)
        twins = np.flatnonzero(distance_N <= MAX_TWIN_DISTANCE)
        first = sorted(twins.tolist(), key=lambda row: (distance_N[row], row))[:LISTED]
        nearest = [(int(distance_N[row]), photos[row][0], train[nearest_N[row]][0]) for row in first]
        found.append(NearTwins(split, len(photos), len(twins), nearest))
    return found


# ---- info as text ----


def format_info(info: DatasetInfo) -> str:
    parts = [f"{info.directory}", *_leak_lines(info), _split_lines(info), _length_lines(info), _duplicate_lines(info)]
    if info.near_twins is not None:
        parts.append(_twin_lines(info, info.near_twins))
    rejected = [f"  {why}: {one['photos']} photos, {one['captions']} captions" for why, one in info.rejected.items()]
    parts.append(
        "\n".join(["rejected when it was made:", *rejected] if rejected else ["rejected when it was made: none"])
    )
    features = [f"  {name}: {what}" for name, what in info.features.items()]
    parts.append("\n".join(["features:", *features] if features else ["features: none"]))
    return "\n\n".join(parts)


def _split_lines(info: DatasetInfo) -> str:
    head = ("split", "shards", "samples", "photos", "captions", "a photo", "tar MB", "photo KB", "width", "height")
    rows = [head, *(_split_row(split, facts) for split, facts in info.splits.items())]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    return "\n".join(lines)


def _leak_lines(info: DatasetInfo) -> list[str]:
    if not info.leaks:
        return []
    shares = [f"{count:,} of {info.splits[split].samples:,} {split} photos" for split, count in info.leaks.items()]
    return [f"THE SPLITS LEAK: {', '.join(shares)} are in {TWIN_SPLIT} too. Scores on them are not of unseen photos."]


def _split_row(split: str, facts: SplitFacts) -> tuple[str, ...]:
    counts = (facts.shards, facts.samples, facts.photos, facts.captions)
    mean_kb = f"{facts.photo_bytes / facts.photos / 1e3:.1f}" if facts.photos else "-"
    per_photo, *ranges = map(_span, (_range(list(facts.per_photo), None), facts.widths, facts.heights))
    return (split, *(f"{count:,}" for count in counts), per_photo, f"{facts.tar_bytes / 1e6:,.1f}", mean_kb, *ranges)


def _span(edges: tuple[int, int] | None) -> str:
    if edges is None:
        return "-"
    return f"{edges[0]}" if edges[0] == edges[1] else f"{edges[0]}-{edges[1]}"


def _length_lines(info: DatasetInfo) -> str:
    total = sum(info.words.values())
    mean = sum(words * count for words, count in info.words.items()) / max(total, 1)
    lines = [f"words of a caption (mean {mean:.1f}):", *_histogram(info.words)]
    for split, facts in info.splits.items():
        shares = [f"{facts.truncated[length] / max(facts.captions, 1):.1%} at {length}" for length in MAX_LENGTHS]
        lines.append(f"cut at max_length ({split}, tokenizer {info.tokenizer}): {', '.join(shares)}")
    return "\n".join(lines)


def _histogram(words: Counter[int], bars: int = 12, width: int = 40) -> list[str]:
    """A line of # for each span of lengths; at most `bars` spans of whole words."""
    if not words:
        return []
    least, most = min(words), max(words)
    step = -(-(most - least + 1) // bars)
    starts = range(least, most + 1, step)
    counts = [sum(words[length] for length in range(start, start + step)) for start in starts]
    names = [f"{start}" if step == 1 else f"{start}-{start + step - 1}" for start in starts]
    margin = max(map(len, names))
    return [
        f"  {name.rjust(margin)}  {'#' * round(width * count / max(counts)):<{width}}  {count:,}"
        for name, count in zip(names, counts)
    ]


def _duplicate_lines(info: DatasetInfo) -> str:
    across = [group for group in info.identical if len({split for split, _ in group}) > 1]
    photos = sum(map(len, info.identical))
    lines = [f"identical photos: {photos} in {len(info.identical)} groups, {len(across)} of them across splits"]
    within = [group for group in info.identical if len({split for split, _ in group}) == 1]
    lines += [f"  {', '.join(f'{split}: {key}' for split, key in group)}" for group in (across + within)[:LISTED]]
    lines.append(f"captions that several photos have: {len(info.shared_captions):,}")
    lines += [f"  {count} photos: {text}" for count, text in info.shared_captions[:LISTED]]
    return "\n".join(lines)


def _twin_lines(info: DatasetInfo, found: list[NearTwins]) -> str:
    lines = [f"near duplicates (at most {MAX_TWIN_DISTANCE} of 64 bits of a perceptual hash differ):"]
    if not found:
        lines.append(f"  nothing to compare: photos in {TWIN_SPLIT} and in another split are needed")
    for twins in found:
        lines.append(f"  {twins.with_twin} of {twins.photos} {twins.split} photos have a near twin in {TWIN_SPLIT}")
        lines += [f"    {distance:2} bits: {own} ~ {train}" for distance, own, train in twins.nearest]
    if info.undecodable:
        lines.append(f"  {len(info.undecodable)} photos can't be decoded: {', '.join(info.undecodable[:LISTED])}")
    return "\n".join(lines)


# ---- a page of photos ----


def write_contact_sheet(directory: Path, out: Path, num: int = 16, split: str | None = None) -> int:
    """Write a self-contained page of `num` samples spread evenly over the split (None: over all); how many it shows."""
    import jinja2

    if num < 1:
        raise ValueError(f"{num} photos were asked for, expected at least 1")
    index = ShardIndex.load(directory)
    shards = index.shards if split is None else index.split(split)
    cards = [_card(directory, info, rows) for info, rows in _spread(shards, num)]
    shown = [card for of_shard in cards for card in of_shard]
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    template = environment.from_string(files("shards").joinpath("contact_sheet.html.j2").read_text(encoding="utf-8"))
    counts = {name: index.num_samples(name) for name in index.splits()}
    page = template.render(name=directory.resolve().name, split=split, counts=counts, cards=shown)
    atomic_write(out, page.encode("utf-8", "backslashreplace"))
    return len(shown)


def _spread(shards: list[ShardInfo], num: int) -> list[tuple[ShardInfo, list[int]]]:
    """Which samples of which shard: the middles of `num` equal parts of all samples."""
    ends = np.cumsum([info.samples for info in shards])
    total = int(ends[-1]) if len(ends) else 0
    num = min(num, total)
    positions = [(2 * part + 1) * total // (2 * num) for part in range(num)]
    rows: dict[int, list[int]] = {}
    for position in positions:
        shard = int(np.searchsorted(ends, position, side="right"))
        rows.setdefault(shard, []).append(position - int(ends[shard] - shards[shard].samples))
    return [(shards[shard], samples) for shard, samples in rows.items()]


def _card(directory: Path, info: ShardInfo, rows: list[int]) -> list[dict[str, Any]]:
    shard = open_shard(directory, info)
    cards = []
    for row in rows:
        image = shard.image_bytes(row)
        picture, size, trouble = (None, None, None) if image is None else _thumbnail(image)
        cards.append(
            {
                "key": shard.key(row),
                "captions": shard.record(row)["captions"],
                "split": info.split,
                "shard": info.name,
                "picture": picture,
                "size": None if size is None or image is None else f"{size[0]} × {size[1]}, {len(image) / 1e3:.1f} kB",
                "trouble": trouble,
            }
        )
    shard.close()
    return cards


def _thumbnail(data: bytes) -> tuple[str | None, tuple[int, int] | None, str | None]:
    """(data URL, size of the photo, None), or (None, None, why it can't be shown)."""
    from PIL import UnidentifiedImageError

    from diffcap_dist.data.photo import decode_photo

    try:
        image = decode_photo(data)
    except UnidentifiedImageError:  # its own message names a memory address
        return None, None, f"no image format known to PIL, it starts with {data[:8]!r}"
    except Exception as error:  # as in _hash_of_bytes; here the card says it
        return None, None, f"{type(error).__name__}: {error}"
    size, buffer = image.size, io.BytesIO()
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    image.save(buffer, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}", size, None
