"""Tars from elsewhere (img2dataset, other people's WebDatasets) become a dataset where they are.

In: a folder of tars, or URLs of tars. Out: for each tar its member index (NAME.idx.npz), rejected.jsonl with every
sample that is left out, and index.json last. Each tar is read once from end to end, never held in memory, never
changed, and no name in it is used as a path. It decodes no photo: that they are images is not checked here.
"""

import dataclasses
import hashlib
import json
import re
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import urlsplit

from isal.isal_zlib import crc32

from diffcap_dist.data.shard_format import (
    IMAGE_SUFFIXES,
    INDEX_FILE,
    RECORD_SUFFIXES,
    Member,
    MemberIndex,
    ShardIndex,
    ShardInfo,
    atomic_write,
    foreign_record,
    is_our_record,
    member_index_path,
    tar_path,
)
from shards.output import UNFINISHED
from shards.workers import in_processes
from shards.writer import REJECTED_FILE, Rejected, count_by_reason, counts_of, rejected_lines

NO_IMAGE, NO_CAPTION, BAD_RECORD = "no photo", "no caption", "captions can't be read"
CHUNK = 1 << 20
MAX_TEXT = 64 << 20  # bytes of a json or txt member, or of a header: more is no caption, and would fill the memory
SECONDS_WITHOUT_DATA = 60  # of a URL, then it is tried again
ATTEMPTS = 3
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
# The key is all up to the first dot of the file name, as webdataset has it.
MEMBER_NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)", re.DOTALL)
SPLIT_IN_NAME = re.compile(r"(?:^|[^a-z])(train|val|valid|validation|dev|test)(?:[^a-z]|$)")
SPLIT_OF_WORD = {"valid": "val", "validation": "val", "dev": "val"}


@dataclasses.dataclass(frozen=True)
class Tar:
    """One tar to index: `place` is its path or URL."""

    name: str
    split: str
    place: str
    remote: bool


@dataclasses.dataclass(frozen=True)
class Scanned:
    """What one tar holds; its member index is already written."""

    info: ShardInfo
    captions: int
    rejected: list[Rejected]
    unused: Counter[str]  # suffixes of members that nothing here reads


@dataclasses.dataclass(frozen=True)
class Indexed:
    directory: Path
    index: ShardIndex
    rejected: list[Rejected]
    unused: Counter[str]
    empty: list[str]  # tars of which no sample is left: they are not in the index


class _Sample:
    def __init__(self) -> None:
        self.members: dict[str, Member] = {}
        self.texts: dict[str, bytes] = {}


def index_tars(
    places: list[str],
    out: Path | None = None,
    split: str | None = None,
    workers: int = 1,
    progress: Callable[[int], object] | None = None,
) -> Indexed:
    """Index one folder in place, or tars at URLs into `out`. `split` None: by the tar's name, else train.
    `progress` is told the bytes of each tar that is done."""
    directory, tars = tars_to_index(places, out, split)
    directory.mkdir(parents=True, exist_ok=True)
    scanned = []
    for one in in_processes(partial(scan_tar_patiently, directory), tars, workers):
        scanned.append(one)
        if progress is not None:
            progress(one.info.bytes)
    rejected = [rejection for one in scanned for rejection in one.rejected]
    kept = [one for one in scanned if one.info.samples]
    if not kept:
        raise ValueError(f"no sample is left of {len(tars)} tars; left out: {count_by_reason(rejected)}")
    atomic_write(directory / REJECTED_FILE, rejected_lines(rejected))
    index = ShardIndex([one.info for one in kept], {}, _provenance(kept, rejected, split))
    index.save(directory)
    empty = [one.info.name for one in scanned if not one.info.samples]
    return Indexed(directory, index, rejected, sum((one.unused for one in scanned), Counter()), empty)


def format_indexed(made: Indexed) -> str:
    counts = made.index.provenance["counts"]
    lines = []
    for what in ("photos", "captions"):
        kept, left = counts[what], counts[f"rejected_{what}"]
        lines.append(f"{what}: {kept + left} = {kept} in shards + {left} left out")
    for reason, count in counts["rejected"].items():
        lines.append(f"  {reason}: {count['photos']} photos, {count['captions']} captions ({REJECTED_FILE})")
    if made.unused:
        found = ", ".join(f".{suffix} {count}" for suffix, count in sorted(made.unused.items()))
        lines.append(f"members that are not used: {found}")
    if made.empty:
        lines.append(f"tars without a usable sample, not in the index: {', '.join(made.empty)}")
    splits = ", ".join(f"{split} {made.index.num_samples(split)}" for split in made.index.splits())
    total = sum(shard.bytes for shard in made.index.shards)
    lines += [f"splits: {splits}", f"{len(made.index.shards)} shards, {total:,} bytes indexed in {made.directory}"]
    return "\n".join(lines)


# ---- which tars ----


def tars_to_index(places: list[str], out: Path | None, split: str | None) -> tuple[Path, list[Tar]]:
    """The folder where the index goes, and the tars in the order of their names."""
    if split is not None and not re.fullmatch(r"[A-Za-z0-9_]+", split):
        raise ValueError(f"split {split!r} must be of letters, digits and _")
    urls = [place for place in places if "://" in place]
    if urls and len(urls) < len(places):
        raise ValueError("folders and URLs can't be in one index. Run it once for each")
    if urls:
        directory, names = _require_out(out), {url: Path(urlsplit(url).path).name for url in urls}
    else:
        directory = _only_folder(places, out)
        names = {str(path): path.name for path in sorted(directory.iterdir()) if _is_tar_name(path.name)}
    _require_no_dataset(directory)
    if not names:
        raise ValueError(f"{directory} holds no *.tar. Give the folder in which the tars are")
    tars = [Tar(_stem(name, place), split or _split_of(name), place, bool(urls)) for place, name in names.items()]
    twice = [name for name, count in Counter(tar.name for tar in tars).items() if count > 1]
    if twice or len(names) < len(places):
        raise ValueError(f"several tars have one name ({', '.join(twice) or places[0]}). Index them apart")
    return directory, sorted(tars, key=lambda tar: tar.name)


def _require_out(out: Path | None) -> Path:
    if out is None:
        raise ValueError("tars at URLs need --out DIR, a local folder for their index")
    return out


def _only_folder(places: list[str], out: Path | None) -> Path:
    if out is not None:
        raise ValueError("--out is for URLs: a local folder is indexed in place")
    if len(places) != 1 or not Path(places[0]).is_dir():
        raise ValueError(f"{', '.join(places)}: expected one folder of tars, or URLs (https://..., s3://...)")
    return Path(places[0])


def _require_no_dataset(directory: Path) -> None:
    for name in (INDEX_FILE, UNFINISHED):
        if (directory / name).exists():
            raise ValueError(f"{directory / name} is there: this is a dataset already. To index it again, delete that")


def _is_tar_name(name: str) -> bool:
    return re.search(r"\.(tar|tgz|tar\.\w+)$", name) is not None and not name.endswith(".tmp")


def _stem(name: str, place: str) -> str:
    if not name.endswith(".tar"):
        raise _refusal(place, 0, None, "its name doesn't end in .tar, and compressed tars can't be read by offset")
    return name.removesuffix(".tar")


def _split_of(name: str) -> str:
    found = SPLIT_IN_NAME.search(name.lower())
    return "train" if found is None else SPLIT_OF_WORD.get(found[1], found[1])


# ---- one tar ----


def scan_tar_patiently(directory: Path, tar: Tar) -> Scanned:
    """A tar at a URL is read again from its start where the network failed."""
    for attempt in range(1, ATTEMPTS if tar.remote else 1):
        try:
            return scan_tar(directory, tar)
        except Unreachable:
            time.sleep(2.0**attempt)
    return scan_tar(directory, tar)


def scan_tar(directory: Path, tar: Tar) -> Scanned:
    """Read the tar to its end and write its member index into `directory`."""
    with _open(tar) as file:
        reader = _Reader(tar.place, file)
        samples, unused = _samples(reader)
        reader.require_zeros_to_the_end()
    kept, rejected, captions = [], [], 0
    for key, sample in samples.items():
        found = _captions_of(sample, key)
        if isinstance(found, int):
            captions += found
            kept.append((key, list(sample.members.values())))
        else:
            offset = min(member.offset for member in sample.members.values())
            rejected.append(Rejected(key, found, 1, 0, f"{tar.name}.tar at byte {offset}"))
    if kept:
        path = member_index_path(tar_path(directory, tar.name))
        atomic_write(path, MemberIndex.from_members(kept, reader.position).to_bytes())
    url = tar.place if tar.remote else ""
    info = ShardInfo(tar.name, tar.split, len(kept), reader.position, reader.sha256.hexdigest(), url)
    return Scanned(info, captions, rejected, unused)


def _captions_of(sample: _Sample, key: str) -> int | str:
    """How many captions, or why the sample can't be used."""
    if not sample.members.keys() & set(IMAGE_SUFFIXES):
        return NO_IMAGE
    try:
        content = json.loads(sample.texts["json"]) if "json" in sample.texts else None
        record = content if is_our_record(content) else foreign_record(content, sample.texts.get("txt"), key, "")
    except ValueError:  # no JSON, or no UTF-8
        return BAD_RECORD
    return len(record["captions"]) or NO_CAPTION


def _samples(reader: "_Reader") -> tuple[dict[str, _Sample], Counter[str]]:
    samples: dict[str, _Sample] = {}
    unused: Counter[str] = Counter()
    for member in _members(reader):
        if member.isdir():
            continue
        named = MEMBER_NAME.fullmatch(member.name)
        suffix = named[2].lower() if named else "?"
        if named is None or suffix not in IMAGE_SUFFIXES + RECORD_SUFFIXES:
            unused[suffix] += 1
            continue
        key = named[1]
        _require_readable(reader, member, key)
        sample = samples.setdefault(key, _Sample())
        if suffix in sample.members or (suffix in IMAGE_SUFFIXES and sample.members.keys() & set(IMAGE_SUFFIXES)):
            what = f"a second {'photo' if suffix in IMAGE_SUFFIXES else suffix} of this key ({member.name})"
            raise _refusal(reader.place, member.offset, key, what)
        crc32, text = reader.content(member.size, keep=suffix in RECORD_SUFFIXES)
        sample.members[suffix] = Member(suffix, member.offset_data, member.size, crc32)
        if text is not None:
            sample.texts[suffix] = text
    return samples, unused


def _require_readable(reader: "_Reader", member: tarfile.TarInfo, key: str) -> None:
    if member.issym() or member.islnk():
        raise _refusal(reader.place, member.offset, key, f"a link to {member.linkname!r}, its bytes are elsewhere")
    if not member.isreg() or member.issparse():
        raise _refusal(reader.place, member.offset, key, "no plain file (a device, a pipe or a sparse file)")
    if not member.name.isprintable():  # bytes that are no UTF-8 are among these
        raise _refusal(reader.place, member.offset, ascii(key), "characters in its name that can't be printed")


def _members(reader: "_Reader") -> Iterable[tarfile.TarInfo]:
    """All headers in order; the reader then stands at the member's data."""
    magic, file = reader.peek(), cast(Any, reader)  # it has the few methods of a file that tarfile calls
    for start, kind in COMPRESSED.items():
        if magic.startswith(start):
            raise _refusal(reader.place, 0, None, f"{kind}-compressed data, in which no sample can be read by offset")
    try:
        with tarfile.open(fileobj=file, mode="r:", tarinfo=_Header, encoding="utf-8") as tar:
            while (member := tar.next()) is not None:
                yield member
                cast(Any, tar).members.clear()  # else all headers of a huge tar stay in memory
    except (tarfile.TarError, ValueError) as error:
        if isinstance(error, BadTar):
            raise
        raise _refusal(reader.place, reader.position, None, f"a header that can't be read ({error})") from error


class _Header(tarfile.TarInfo):
    """Without it tarfile takes a broken header, or the end of the file, for the end of the tar."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> "_Header":  # type: ignore[override]
        reader: Any = tarfile_.fileobj
        start = reader.position
        try:
            return super().fromtarfile(tarfile_)  # type: ignore[return-value]
        except tarfile.HeaderError as error:
            if type(error).__name__ == "EOFHeaderError":  # the block of zeros that ends a tar
                raise
            at_end = type(error).__name__ in ("EmptyHeaderError", "TruncatedHeaderError")
            what = "the end of the file, the tar's own end is missing" if at_end else f"no tar header ({error})"
            raise _refusal(reader.place, start, None, what) from error


class BadTar(ValueError):
    """A tar that can't be indexed; `key` is None when no one sample is to blame."""


class Unreachable(BadTar):
    """The network's fault, perhaps: another attempt may succeed."""


def _refusal(place: str, offset: int, key: str | None, found: str) -> BadTar:
    where = place if key is None else f"{place}: sample {key}"
    return BadTar(f"{where}: found at byte {offset}: {found}. Make this tar again, or leave it out")


class _Reader:
    """A file read forward only, as tarfile wants it: counts, hashes and bounds what passes."""

    def __init__(self, place: str, file: BinaryIO) -> None:
        self.place, self.position, self.sha256 = place, 0, hashlib.sha256()
        self._file, self._ahead = file, b""

    def tell(self) -> int:
        return self.position

    def read(self, size: int) -> bytes:
        if size > MAX_TEXT:
            raise _refusal(self.place, self.position, None, f"a header or text of {size} bytes")
        parts = [self._ahead[:size]]
        self._ahead = self._ahead[size:]
        missing = size - len(parts[0])
        while missing and (data := self._next(missing)):
            parts.append(data)
            missing -= len(data)
        data = b"".join(parts)
        self.sha256.update(data)
        self.position += len(data)
        return data

    def seek(self, position: int) -> None:
        while self.position < position and self.read(min(CHUNK, position - self.position)):
            pass

    def close(self) -> None:
        """Whoever opened the file closes it."""

    def peek(self) -> bytes:
        while len(self._ahead) < 8 and (data := self._next(8 - len(self._ahead))):
            self._ahead += data
        return self._ahead

    def content(self, size: int, keep: bool) -> tuple[int, bytes | None]:
        """crc32 of the next `size` bytes, and the bytes themselves when they are to be kept."""
        if keep:
            data = self.read(size)
            checksum, found = crc32(data), len(data)
        else:
            data, checksum, found = None, 0, 0
            while found < size and (part := self.read(min(CHUNK, size - found))):
                checksum, found = crc32(part, checksum), found + len(part)
        if found < size:
            raise _refusal(self.place, self.position, None, f"the end of the file, {size - found} bytes too early")
        return checksum, data

    def require_zeros_to_the_end(self) -> None:
        """tarfile stops at the first block of zeros: two tars behind each other would lose the second."""
        while data := self.read(CHUNK):
            if any(data):
                raise _refusal(self.place, self.position - len(data), None, "data behind the end of the tar")

    def _next(self, size: int) -> bytes:
        try:
            return self._file.read(size)
        except Exception as error:  # remote file systems raise errors of many families
            what = f"bytes that can't be read ({type(error).__name__}: {error})"
            raise Unreachable(str(_refusal(self.place, self.position, None, what))) from error


def _open(tar: Tar) -> BinaryIO:
    if not tar.remote:
        return Path(tar.place).open("rb")
    import fsspec

    options: dict[str, Any] = {}
    if tar.place.startswith(("http://", "https://")):
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=SECONDS_WITHOUT_DATA, sock_read=SECONDS_WITHOUT_DATA)
        # block size 0: one request read to its end, which every server can answer
        options = {"client_kwargs": {"timeout": timeout}, "block_size": 0}
    try:
        return fsspec.open(tar.place, "rb", **options).open()
    except ImportError as error:
        raise ValueError(f"{tar.place}: {error}") from error
    except Exception as error:  # as in _Reader
        lost = isinstance(error, (FileNotFoundError, PermissionError))
        kind = BadTar if lost else Unreachable
        raise kind(f"{tar.place} can't be opened ({type(error).__name__}: {error})") from error


def _provenance(kept: list[Scanned], rejected: list[Rejected], split: str | None) -> dict[str, Any]:
    counts = counts_of([one.info for one in kept], sum(one.captions for one in kept), rejected)
    return {"request": {"command": "index", "split": split}, "counts": counts}
