"""Samples in, a finished dataset out: SPLIT-000000.tar and .idx.npz, rejected.jsonl, index.json last.

The samples of a split are cut into chunks; each chunk becomes one shard in one worker process, so the bytes are the
same for any number of workers, for an interrupted run that goes on, and for the parts of a job array. The tars are
plain USTAR with integer times; webdataset reads them too. It does not know any raw dataset.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any

import numpy as np
from isal.isal_zlib import crc32
from tqdm import tqdm

from diffcap_dist.data.shard_format import INDEX_FILE, TAR_BLOCK, Member, MemberIndex, ShardIndex, ShardInfo, safe_key
from shards.output import UNFINISHED, Output, Write, write_file
from shards.photos import StoredPhoto, UnusablePhoto, check_photo, shrink_photo
from shards.workers import in_processes

REQUEST_FILE = f"{UNFINISHED}/request.json"
REJECTED_FILE = "rejected.jsonl"
FLUSH_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True)
class RawSample:
    """A photo with its captions as a source gives it. `image` is called in a worker process, so it must pickle;
    None: captions only."""

    photo_id: str
    captions: list[str]
    split: str
    source: str
    image: Callable[[], bytes] | None
    scene: dict[str, Any] | None = None  # ground truth of a rendered picture
    url: str | None = None
    references: list[str] | None = None  # all captions of the photo, where `captions` are those of this split only


class Unavailable(ValueError):
    """Raised by `RawSample.image`: the photo is not to be had."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


@dataclasses.dataclass(frozen=True)
class Rejected:
    """An input that became no sample. A blank caption of a photo that is kept counts 0 photos, 1 caption."""

    photo_id: str
    reason: str  # one of few, they are counted
    photos: int
    captions: int
    detail: str = ""
    by_choice: bool = False  # left out by what was asked (not in the split file): no fault of the data


@dataclasses.dataclass(frozen=True)
class Source:
    """What a reader of a raw dataset gives. The samples are cheap; photos are read later, in the workers."""

    samples: Iterable[RawSample]
    rejected: list[Rejected]  # may grow while `samples` is read
    provenance: dict[str, Any]  # arguments and hashes of what was read: equal for equal datasets
    notes: list[str]
    prepare: Callable[[list[RawSample]], None] | None = None  # once per shard, in its worker, first
    retried: frozenset[str] = frozenset()  # reasons: finished shards with such rejections are made again


@dataclasses.dataclass(frozen=True)
class ShardSettings:
    """What decides the bytes of a dataset beside its source."""

    samples_per_shard: int = 1000
    min_side: int = 16  # pixels; smaller photos are rejected
    resize: int | None = None  # shorter side in pixels; None: the source's bytes, untouched
    quality: int = 90  # of the JPEGs, where photos are resized


@dataclasses.dataclass(frozen=True)
class Written:
    """`index` is None where other parts of the array are still at work."""

    index: ShardIndex | None
    already_complete: bool
    shards_kept: int  # found complete from an interrupted run


def write_dataset(
    source: Source,
    output: Output,
    settings: ShardSettings,
    max_rejected: float = 0.01,
    workers: int = 1,
    part: tuple[int, int] = (0, 1),
) -> Written:
    """Write all samples, or the shards of one part (i, n) of them; whoever finishes the last shard writes the index.

    A second run of the same source and settings continues; another one in the same place is refused. Fails before
    index.json where more than `max_rejected` of the photos are rejected (not counting those left out by choice).
    """
    _check_settings(settings, max_rejected, workers, part)
    request = {**source.provenance, **dataclasses.asdict(settings)}
    finished = _finished_index(output, request)
    if finished is not None and not _leftovers(output, finished):  # nothing to write: it may be read-only by now
        return Written(finished, already_complete=True, shards_kept=len(finished.shards))
    if finished is None:
        _require_free(output, request)
    with output.reserve(*part):
        with output.merging():  # parts that start together would write one file aside
            finished = _finished_index(output, request)
            if finished is not None:
                output.delete(_leftovers(output, finished))
                return Written(finished, already_complete=True, shards_kept=len(finished.shards))
            if output.size(REQUEST_FILE) is None:
                write_file(output, REQUEST_FILE, _request_bytes(request))
        jobs = (
            _Job(name, samples, output, settings, source.prepare)
            for name, samples in _chunks(source.samples, settings.samples_per_shard)
        )
        reports, kept, owed = _make_shards(jobs, workers, part, source.retried)
        with output.merging():
            index = _finished_index(output, request)  # another part may have been the last
            if index is None and not owed:
                index = _merge(output, request, reports, source.rejected, max_rejected)
            if index is not None:
                output.delete(_leftovers(output, index))
    return Written(index, already_complete=False, shards_kept=kept)


def _check_settings(settings: ShardSettings, max_rejected: float, workers: int, part: tuple[int, int]) -> None:
    if settings.samples_per_shard < 1:
        raise ValueError(f"samples per shard is {settings.samples_per_shard}, it must be at least 1")
    if settings.resize is not None and settings.resize < max(1, settings.min_side):
        raise ValueError(f"resize is {settings.resize}, it must be at least the smallest side, {settings.min_side}")
    if not 1 <= settings.quality <= 100:
        raise ValueError(f"quality is {settings.quality}, it must lie in 1 to 100")
    if not 0 <= max_rejected <= 1:
        raise ValueError(f"max rejected is {max_rejected}, it is a share and must lie in 0 to 1")
    if workers < 1 or not 0 <= part[0] < part[1]:
        raise ValueError(f"workers is {workers}, part is {part[0]}/{part[1]}: expected workers >= 1 and 0 <= i < n")


# ---- the place ----


def _require_free(output: Output, request: dict[str, Any]) -> None:
    """Raises ValueError unless the place is empty or holds an interrupted run of the same request."""
    # Listed first: a part that runs at the same time leaves its request before it writes anything else.
    strangers = [name for name in output.names() if not name.startswith(f"{UNFINISHED}/")]
    if output.size(REQUEST_FILE) is not None:
        _require_same(output, json.loads(output.read(REQUEST_FILE)), request)
        return
    if strangers and output.size(INDEX_FILE) is None:  # else the last part has finished it this moment
        raise ValueError(
            f"{output} holds files ({', '.join(strangers[:3])}), but no dataset of ours. Choose an empty or new folder"
        )


def _request_bytes(request: dict[str, Any]) -> bytes:
    return (json.dumps(request, indent=1, ensure_ascii=False) + "\n").encode()


def _finished_index(output: Output, request: dict[str, Any]) -> ShardIndex | None:
    if output.size(INDEX_FILE) is None:
        return None
    index = ShardIndex.from_bytes(output.read(INDEX_FILE), f"{output}/{INDEX_FILE}")
    _require_same(output, index.provenance.get("request", {}), request)
    for shard in index.shards:
        if output.size(f"{shard.name}.tar") != shard.bytes or output.size(f"{shard.name}.idx.npz") is None:
            raise ValueError(
                f"{output}/{shard.name}.tar, or its member index, is missing or cut short though {INDEX_FILE} lists "
                f"it. Delete {INDEX_FILE} and the folder's other files, then run this again"
            )
    return index


def _require_same(output: Output, found: dict[str, Any], request: dict[str, Any]) -> None:
    request = json.loads(_request_bytes(request))  # as it comes back from a file
    if found == request:
        return
    keys = [key for key in {**found, **request} if found.get(key) != request.get(key)]
    differences = "; ".join(f"{key} {found.get(key)!r}, now {request.get(key)!r}" for key in keys)
    raise ValueError(
        f"{output} holds another dataset ({differences}). It is never overwritten: "
        "choose another folder, or delete that one yourself"
    )


def _leftovers(output: Output, index: ShardIndex) -> list[str]:
    """What interrupted runs left behind, once the index is there. Files of others (features in the making, their
    locks) are none."""
    own = {f"{shard.name}{ending}" for shard in index.shards for ending in (".tar", ".idx.npz")}
    own |= {INDEX_FILE, REJECTED_FILE}
    return [
        name
        for name in output.names()
        if (name.startswith(f"{UNFINISHED}/") and not name.startswith(f"{UNFINISHED}/lock"))
        or (name.endswith(".tmp") and name.removesuffix(".tmp") in own)
    ]


# ---- the plan: which samples make which shard ----


def _chunks(samples: Iterable[RawSample], samples_per_shard: int) -> Iterator[tuple[str, list[RawSample]]]:
    """(shard name, its samples) in an order that depends on the samples alone."""
    growing: dict[str, list[RawSample]] = {}
    numbers: Counter[str] = Counter()
    seen: set[int] = set()
    for sample in samples:
        _check(sample, seen)
        chunk = growing.setdefault(sample.split, [])
        chunk.append(sample)
        if len(chunk) == samples_per_shard:
            yield f"{sample.split}-{numbers[sample.split]:06d}", growing.pop(sample.split)
            numbers[sample.split] += 1
    for split, chunk in growing.items():
        yield f"{split}-{numbers[split]:06d}", chunk


def _check(sample: RawSample, seen: set[int]) -> None:
    # A photo whose captions are split, and no other, is in several splits. 64 bits: millions of ids fit into memory.
    identity = hash(sample.photo_id if sample.references is None else (sample.split, sample.photo_id))
    if identity in seen:
        raise ValueError(f"{sample.source}: photo {sample.photo_id!r} comes twice. Make the photo ids unique")
    seen.add(identity)
    if not re.fullmatch(r"[A-Za-z0-9_]+", sample.split):
        raise ValueError(f"photo {sample.photo_id!r}: split {sample.split!r} must be of letters, digits and _")
    if not sample.captions:
        raise ValueError(f"{sample.source}: photo {sample.photo_id!r} has no caption")


# ---- shards, by worker processes ----


@dataclasses.dataclass(frozen=True)
class _Job:
    name: str
    samples: list[RawSample]
    output: Output
    settings: ShardSettings
    prepare: Callable[[list[RawSample]], None] | None

    @property
    def report_file(self) -> str:
        return f"{UNFINISHED}/{self.name}.json"


@dataclasses.dataclass(frozen=True)
class _Report:
    """What became of one chunk. `shard` is None where nothing of it was fit to be kept."""

    shard: ShardInfo | None
    captions: int
    rejected: list[Rejected]
    member_index_bytes: int

    def to_bytes(self) -> bytes:
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> _Report:
        content = json.loads(data)
        shard = ShardInfo(**content["shard"]) if content["shard"] else None
        rejected = [Rejected(**one) for one in content["rejected"]]
        return cls(shard, content["captions"], rejected, content["member_index_bytes"])


def _make_shards(
    jobs: Iterable[_Job], workers: int, part: tuple[int, int], retried: frozenset[str]
) -> tuple[dict[str, _Report], int, list[str]]:
    """(reports by shard in the plan's order, how many of this part's shards were already there, the shards that other
    parts still owe)."""
    plan: dict[str, _Job] = {}
    reports: dict[str, _Report | None] = {}
    kept = 0

    def unfinished() -> Iterator[_Job]:
        nonlocal kept
        for number, job in enumerate(jobs):
            plan[job.name] = dataclasses.replace(job, samples=[])
            report = reports[job.name] = _finished_report(job)
            if number % part[1] == part[0]:
                if report is None or any(one.reason in retried for one in report.rejected):
                    yield job
                else:
                    kept += report.shard is not None

    with tqdm(desc="shards", unit="photo", unit_scale=True, disable=None) as progress:
        for name, photos, report in in_processes(make_shard, unfinished(), workers):
            reports[name] = report
            progress.update(photos)
    for name in [name for name, report in reports.items() if report is None]:
        reports[name] = _finished_report(plan[name])  # another part may have made it meanwhile
    done = {name: report for name, report in reports.items() if report is not None}
    return done, kept, [name for name in reports if name not in done]


def _finished_report(job: _Job) -> _Report | None:
    """What a run before this one, or another part, left of this chunk, if its files are whole."""
    try:
        report = _Report.from_bytes(job.output.read(job.report_file))
    except FileNotFoundError:
        return None
    expected = (report.shard.bytes, report.member_index_bytes) if report.shard else (None, None)
    found = job.output.size(f"{job.name}.tar"), job.output.size(f"{job.name}.idx.npz")
    return report if found == expected else None


def make_shard(job: _Job) -> tuple[str, int, _Report]:
    """One chunk of samples as a shard in the output, and the report of it, last. (name, samples, report)."""
    if job.prepare is not None:
        job.prepare(job.samples)
    rejected: list[Rejected] = []
    usable = _usable(job.samples, job.settings, rejected)
    first = next(usable, None)
    if first is None:
        report = _Report(None, 0, rejected, 0)
    else:
        captions = 0
        with job.output.create(f"{job.name}.tar") as write:
            tar = TarStream(write)
            for sample, members in chain([first], usable):
                tar.add(safe_key(sample.photo_id), members)
                captions += len(sample.captions)
            tar.end()
        member_index = MemberIndex.from_members(tar.samples, tar.size).to_bytes()
        write_file(job.output, f"{job.name}.idx.npz", member_index)
        split = job.samples[0].split
        info = ShardInfo(job.name, split, len(tar.samples), tar.size, tar.sha256.hexdigest())
        report = _Report(info, captions, rejected, len(member_index))
    write_file(job.output, job.report_file, report.to_bytes())
    return job.name, len(job.samples), report


def _usable(
    samples: list[RawSample], settings: ShardSettings, rejected: list[Rejected]
) -> Iterator[tuple[RawSample, dict[str, bytes]]]:
    for sample in samples:
        try:
            yield sample, sample_members(sample, settings)
        except (UnusablePhoto, Unavailable) as error:
            rejected.append(Rejected(sample.photo_id, error.reason, 1, len(sample.captions), error.detail))


def sample_members(sample: RawSample, settings: ShardSettings) -> dict[str, bytes]:
    """The tar members by suffix: the photo (if any) and the JSON record. Raises UnusablePhoto, Unavailable."""
    photo = None if sample.image is None else _stored(sample.image(), settings)
    record: dict[str, Any] = {
        "photo_id": sample.photo_id,
        "captions": sample.captions,
        **({} if sample.references is None else {"references": sample.references}),
        "split": sample.split,
        "source": sample.source,
        "width": photo.width if photo else None,
        "height": photo.height if photo else None,
        "sha256": hashlib.sha256(photo.data).hexdigest() if photo else None,
    }
    if photo and photo.orientation != 1:
        record["orientation"] = photo.orientation
    if sample.scene is not None:
        record["scene"] = sample.scene
    if sample.url is not None:
        record["url"] = sample.url
    members = {photo.suffix: photo.data} if photo else {}
    return {**members, "json": json.dumps(record, ensure_ascii=False).encode()}


def _stored(data: bytes, settings: ShardSettings) -> StoredPhoto:
    if settings.resize is None:
        return check_photo(data, settings.min_side)
    return shrink_photo(data, settings.min_side, settings.resize, settings.quality)


# ---- one tar ----


class TarStream:
    """A tar written as it grows, hashed on the way, with the places of its members."""

    def __init__(self, write: Write) -> None:
        self.samples: list[tuple[str, list[Member]]] = []  # (key, members)
        self.sha256, self.size = hashlib.sha256(), 0
        self._write = write
        self._small = bytearray()  # headers, records and padding that wait for the next photo

    def add(self, key: str, members: dict[str, bytes]) -> None:
        self.samples.append((key, [self._append(key, suffix, data) for suffix, data in members.items()]))

    def end(self) -> None:
        self._small += bytes(2 * TAR_BLOCK)
        self.size += 2 * TAR_BLOCK
        self._flush()

    def _append(self, key: str, suffix: str, data: bytes) -> Member:
        self._small += tar_header(f"{key}.{suffix}", len(data))
        self.size += TAR_BLOCK
        member = Member(suffix, self.size, len(data), crc32(data))
        if len(data) > 8 * TAR_BLOCK:
            self._flush()
            self._write(data)
            self.sha256.update(data)
        else:
            self._small += data
        self._small += _PADDING[len(data) % TAR_BLOCK]
        if len(self._small) > FLUSH_BYTES:
            self._flush()
        self.size += -(-len(data) // TAR_BLOCK) * TAR_BLOCK
        return member

    def _flush(self) -> None:
        self._write(self._small)
        self.sha256.update(self._small)
        self._small.clear()


_PADDING = [bytes(-used % TAR_BLOCK) for used in range(TAR_BLOCK)]
# POSIX ustar: mode 0644, uid and gid 0, mtime 0, an ordinary file: nothing of this machine or hour.
_BEFORE_SIZE = b"0000644\0" + b"0000000\0" * 2
_MODIFIED, _BLANK_CHECKSUM = b"00000000000\0", b" " * 8
_BEHIND_CHECKSUM = (b"0" + bytes(100) + b"ustar\00000").ljust(TAR_BLOCK - 156, b"\0")
_CONSTANT_SUM = sum(_BEFORE_SIZE + _MODIFIED + _BLANK_CHECKSUM + _BEHIND_CHECKSUM)


def tar_header(name: str, size: int) -> bytes:
    """A USTAR header: what tarfile gives for such a member, in a fraction of its time."""
    encoded, octal = name.encode(), b"%011o\0" % size
    if len(encoded) > 100 or len(octal) > 12:
        raise ValueError(f"tar member {name!r} of {size} bytes: a USTAR header holds 100 bytes of name and 8 GiB")
    checksum = b"%06o\0 " % (sum(encoded) + sum(octal) + _CONSTANT_SUM)
    return encoded.ljust(100, b"\0") + _BEFORE_SIZE + octal + _MODIFIED + checksum + _BEHIND_CHECKSUM


# ---- the index ----


def _merge(
    output: Output,
    request: dict[str, Any],
    reports: dict[str, _Report],
    rejected_by_source: list[Rejected],
    max_rejected: float,
) -> ShardIndex:
    rejected = rejected_by_source + [one for report in reports.values() for one in report.rejected]
    write_file(output, REJECTED_FILE, rejected_lines(rejected))
    shards = sorted((report.shard for report in reports.values() if report.shard), key=lambda info: info.name)
    counts = counts_of(shards, sum(report.captions for report in reports.values()), rejected)
    if not shards:
        raise ValueError(f"no sample is left to write to {output}; rejected: {counts['rejected']}")
    _check_rejections(output, counts["photos"], rejected, max_rejected)
    index = ShardIndex(shards, {}, {"request": request, "versions": _versions(), "counts": counts})
    write_file(output, INDEX_FILE, index.to_bytes())
    return index


def _check_rejections(output: Output, photos: int, rejected: list[Rejected], max_rejected: float) -> None:
    faults = [one for one in rejected if one.photos and not one.by_choice]
    share = len(faults) / (photos + len(faults))
    if share <= max_rejected:
        return
    reasons = ", ".join(f"{count} {reason}" for reason, count in Counter(one.reason for one in faults).most_common())
    first = "; ".join(f"{one.photo_id}: {one.reason} {one.detail}".strip() for one in faults[:3])
    raise ValueError(
        f"{len(faults)} of {photos + len(faults)} photos were rejected ({100 * share:.2f}%, more than "
        f"{100 * max_rejected:g}%): {reasons}. E.g. {first}. All are in {output}/{REJECTED_FILE}. "
        "Accept it with a higher --max-rejected (what is finished is kept), or mend them and choose another folder"
    )


def count_by_reason(rejected: list[Rejected]) -> dict[str, dict[str, int]]:
    counts: dict[str, dict[str, int]] = {}
    for one in rejected:
        count = counts.setdefault(one.reason, {"photos": 0, "captions": 0})
        count["photos"] += one.photos
        count["captions"] += one.captions
    return counts


def rejected_lines(rejected: list[Rejected]) -> bytes:
    """The content of rejected.jsonl."""
    return "".join(json.dumps(dataclasses.asdict(one), ensure_ascii=False) + "\n" for one in rejected).encode()


def counts_of(shards: list[ShardInfo], captions: int, rejected: list[Rejected]) -> dict[str, Any]:
    return {
        "photos": sum(shard.samples for shard in shards),
        "captions": captions,
        "rejected_photos": sum(one.photos for one in rejected),
        "rejected_captions": sum(one.captions for one in rejected),
        "rejected": count_by_reason(rejected),
    }


def _versions() -> dict[str, str]:
    try:
        own = importlib.metadata.version("diffcap-dist")
    except importlib.metadata.PackageNotFoundError:
        own = "not installed"  # run from a source tree
    return {"diffcap-dist": own, "pillow": importlib.metadata.version("pillow"), "numpy": np.__version__}
