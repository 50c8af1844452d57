"""Tars of other tools: indexed where they are they read as webdataset reads them; what can't be read is refused.

Every tar is made here, with webdataset's writers or with tarfile.
"""

from __future__ import annotations

import gzip
import importlib.util
import io
import json
import shutil
import tarfile
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from diffcap_dist.data.photo import decode_photo
from diffcap_dist.data.shard_format import ShardIndex, foreign_record, open_shard
from diffcap_dist.data.stream import ShardReader, all_records
from shards.foreign import BAD_RECORD, NO_CAPTION, NO_IMAGE, BadTar, Tar, format_indexed, index_tars, scan_tar
from shards.verification import verify


def to_tensor(data: bytes) -> torch.Tensor:
    return torch.from_numpy(np.array(decode_photo(data)))


def picture(seed: int, image_format: str = "JPEG") -> bytes:
    pixels = np.random.RandomState(seed).randint(0, 256, (12, 16, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, image_format)
    return buffer.getvalue()


def write_img2dataset(folder: Path, tars: int = 3, samples: int = 4) -> None:
    """The layout of img2dataset: KEY.jpg, KEY.txt, KEY.json whose sha256 is of the original, not of the jpg."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(tars):
        with webdataset.TarWriter(str(folder / f"{number:05d}.tar")) as writer:
            for i in range(samples):
                key = f"{number:05d}{i:04d}"
                record = {"caption": f"photo “{i}” of {number}", "url": f"http://x/{key}.jpg", "key": key, "width": 16}
                record |= {"height": 12, "status": "success", "sha256": "0" * 64, "exif": "{}", "error_message": None}
                photo = picture(number * samples + i)
                writer.write({"__key__": key, "jpg": photo, "txt": record["caption"], "json": json.dumps(record)})


def write_tar(path: Path, members: dict[str, bytes], tar_format: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tar_format) as tar:
        for name, data in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    return path


def pair(key: str, caption: str = "a dog", suffix: str = "jpg") -> dict[str, bytes]:
    return {f"{key}.{suffix}": picture(len(key)), f"{key}.txt": caption.encode()}


def test_img2dataset_tars_read_as_webdataset_reads_them(tmp_path: Path) -> None:
    write_img2dataset(tmp_path)
    tars = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    made = index_tars([str(tmp_path)])
    assert {name: (tmp_path / name).read_bytes() for name in tars} == tars
    assert (made.index, verify(tmp_path)) == (ShardIndex.load(tmp_path), [])
    expected = list(webdataset.WebDataset([str(tmp_path / name) for name in sorted(tars)], shardshuffle=False))
    shards = [open_shard(tmp_path, info) for info in made.index.shards]
    found = [(shard, i) for shard in shards for i in range(len(shard))]
    assert len(found) == len(expected) == 12
    for (shard, i), sample in zip(found, expected):
        record = shard.record(i)
        assert shard.key(i) == record["photo_id"] == sample["__key__"]
        assert shard.image_bytes(i) == sample["jpg"]
        assert record["captions"] == [sample["txt"].decode()] and record["split"] == "train"
        assert (record["width"], record["height"]) == (16, 12) and record["url"].endswith(f"{sample['__key__']}.jpg")
        assert record["sha256"] is None
    assert "photos: 12 = 12 in shards + 0 left out" in format_indexed(made)


def test_the_stream_reads_them(tmp_path: Path) -> None:
    write_img2dataset(tmp_path)
    index_tars([str(tmp_path)], split="test")
    reader = ShardReader(tmp_path, "test", transform=to_tensor)
    assert reader.photo(1, 2).image_CHW.shape == (12, 16, 3)  # type: ignore[union-attr]
    assert [record["captions"] for _, record in all_records(reader)][:2] == [["photo “0” of 0"], ["photo “1” of 0"]]


def test_any_number_of_workers_makes_the_same_files(tmp_path: Path) -> None:
    write_img2dataset(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    sizes: list[int] = []
    index_tars([str(tmp_path / "a")])
    index_tars([str(tmp_path / "b")], workers=2, progress=sizes.append)
    assert sum(sizes) == sum(path.stat().st_size for path in (tmp_path / "b").glob("*.tar"))
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "b").iterdir()) and "00001.idx.npz" in names
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_kind_of_tar_and_name(tmp_path: Path, tar_format: int) -> None:
    long = "folder/" * 12 + "x" * (90 if tar_format == tarfile.USTAR_FORMAT else 150)
    keys = {"./a": "jpg", "../b": "JPEG", "c/d": "png", "/e": "webp", "f-é": "jpg", long: "jpg"}
    members = {name: data for key, suffix in keys.items() for name, data in pair(key, suffix=suffix).items()}
    write_tar(tmp_path / "data" / "x.tar", members, tar_format)
    made = index_tars([str(tmp_path / "data")])
    shard = open_shard(tmp_path / "data", made.index.shards[0])
    assert [shard.key(i) for i in range(len(shard))] == list(keys)
    assert [shard.image_bytes(i) for i in range(len(shard))] == [picture(len(key)) for key in keys]
    assert sorted(path.name for path in tmp_path.rglob("*")) == [
        "data",
        "index.json",
        "rejected.jsonl",
        "x.idx.npz",
        "x.tar",
    ]


def test_members_of_a_sample_may_lie_apart(tmp_path: Path) -> None:
    write_tar(tmp_path / "x.tar", {"a.jpg": picture(0), "b.jpg": picture(1), "b.txt": b"of b", "a.txt": b"of a"})
    shard = open_shard(tmp_path, index_tars([str(tmp_path)]).index.shards[0])
    assert [(shard.key(i), shard.record(i)["captions"], shard.image_bytes(i)) for i in range(2)] == [
        ("a", ["of a"], picture(0)),
        ("b", ["of b"], picture(1)),
    ]


@pytest.mark.parametrize(
    ("content", "text", "captions"),
    [
        ({"captions": ["a ", " ", "b"]}, b"c", ["a", "b"]),
        ({"captions": "a"}, None, ["a"]),
        ({"caption": "a"}, b"c", ["a"]),
        ({"caption": ["a", "b"]}, None, ["a", "b"]),
        ({"caption": None, "text": "a"}, None, ["a"]),
        ({"caption": ""}, b"c\n", ["c"]),
        ({"caption": 3}, None, []),
        (["a"], "“c”".encode(), ["“c”"]),
        (None, b" \n", []),
        (None, None, []),
    ],
)
def test_where_captions_are_looked_for(content: object, text: bytes | None, captions: list[str]) -> None:
    record = foreign_record(content, text, "k", "val")
    assert (record["captions"], record["photo_id"], record["split"]) == (captions, "k", "val")


def test_what_is_left_out_is_counted_and_listed(tmp_path: Path) -> None:
    members = {**pair("good"), "silent.jpg": picture(0), "blank.jpg": picture(1), "blank.txt": b" "}
    members |= {"words.txt": b"only words", "broken.jpg": picture(2), "broken.json": b"{"}
    members |= {"latin.jpg": picture(3), "latin.txt": b"caf\xe9", "good.cls": b"3", "._good.jpg": b"mac", "README": b""}
    write_tar(tmp_path / "x.tar", members)
    write_tar(tmp_path / "y.tar", {"silent2.jpg": picture(0)})
    made = index_tars([str(tmp_path)])
    lines = [json.loads(line) for line in (tmp_path / "rejected.jsonl").read_text().splitlines()]
    found = {line["photo_id"]: line["reason"] for line in lines}
    assert found == {
        **dict.fromkeys(("silent", "blank", "silent2"), NO_CAPTION),
        **dict.fromkeys(("broken", "latin"), BAD_RECORD),
        "words": NO_IMAGE,
    }
    assert lines[0]["detail"].startswith("x.tar at byte ")
    assert [shard.name for shard in made.index.shards] == ["x"] and made.index.num_samples("train") == 1
    text = format_indexed(made)
    assert "photos: 7 = 1 in shards + 6 left out" in text and "not in the index: y" in text
    assert ".? 2, .cls 1" in text and f"{NO_CAPTION}: 3 photos" in text
    assert verify(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "split"),
    [("00000", "train"), ("val-000", "val"), ("coco_validation_3", "val"), ("dev1", "val"), ("testimony", "train"),
     ("x-test", "test"), ("TRAIN-0", "train")],
)  # fmt: skip
def test_split_by_name(tmp_path: Path, name: str, split: str) -> None:
    write_tar(tmp_path / f"{name}.tar", pair("a"))
    (shard,) = index_tars([str(tmp_path)]).index.shards
    assert shard.split == split and open_shard(tmp_path, shard).record(0)["split"] == split


# ---- refusals ----


def tar_of(*members: tarfile.TarInfo | tuple[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                header = tarfile.TarInfo(member[0])
                header.size = len(member[1])
                tar.addfile(header, io.BytesIO(member[1]))
    return buffer.getvalue()


def link(name: str, kind: bytes) -> tarfile.TarInfo:
    header = tarfile.TarInfo(name)
    header.type, header.linkname = kind, "/etc/passwd"
    return header


GOOD = tar_of(("a.jpg", b"1" * 600), ("a.txt", b"dog"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(GOOD, mtime=0), r"byte 0: gzip-compressed"),
        (tar_of(("a.jpg", b"1"), ("a.jpg", b"2")), r"sample a: found at byte 1024: a second photo"),
        (tar_of(("a.jpg", b"1"), ("a.png", b"2")), r"sample a: found at byte 1024: a second photo .*a\.png"),
        (tar_of(("a.txt", b"1"), ("b.txt", b"1"), ("a.txt", b"2")), r"sample a: found at byte 2048: a second txt"),
        (tar_of(("a.txt", b"1"), link("a.jpg", tarfile.SYMTYPE)), r"sample a: found at byte 1024: a link to '/etc/p"),
        (tar_of(link("d/a.json", tarfile.LNKTYPE)), r"sample d/a: found at byte 0: a link"),
        (tar_of(link("a.txt", tarfile.FIFOTYPE)), r"sample a: found at byte 0: no plain file"),
        (tar_of(link("a.jpg", tarfile.GNUTYPE_SPARSE)), r"sample a: found at byte 0: no plain file"),
        (GOOD[:700], r"byte 700: the end of the file, 412 bytes too early"),
        (GOOD[:1536], r"byte 1536: the end of the file, the tar's own end is missing"),
        (GOOD + GOOD, r"data behind the end of the tar"),
        (b"no tar at all" * 100, r"byte 0: no tar header"),
        (b"", r"byte 0: the end of the file"),
        (tar_of(("a\n.jpg", b"1")), r"characters in its name"),
        (b"\0" * 10240, r"no sample is left of 1 tars"),
    ],
    ids=lambda value: "" if isinstance(value, bytes) else value,  # every test process has to find the same names
)  # fmt: skip
def test_refused_with_the_place_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "bad.tar").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        index_tars([str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["bad.tar"]


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 512 * 6 - 1))
def test_a_tar_cut_anywhere_is_refused(tmp_path_factory: pytest.TempPathFactory, length: int) -> None:
    folder = tmp_path_factory.mktemp("cut")
    (folder / "x.tar").write_bytes(GOOD[:length])  # its own end begins at block 5
    with pytest.raises(BadTar, match=r"x\.tar"):
        scan_tar(folder, Tar("x", "train", str(folder / "x.tar"), remote=False))


@pytest.mark.parametrize("start", [0, 1536])
def test_a_damaged_header_is_not_the_end_of_the_tar(tmp_path: Path, start: int) -> None:
    for at in range(0, 345, 7):
        damaged = bytearray(GOOD)
        damaged[start + at] ^= 1
        (tmp_path / "x.tar").write_bytes(damaged)
        with pytest.raises(BadTar, match=f"byte {start}: no tar header"):
            index_tars([str(tmp_path)])


def test_a_huge_text_member_does_not_fill_the_memory(tmp_path: Path) -> None:
    header = tarfile.TarInfo("a.json")
    header.size = 1 << 33
    (tmp_path / "x.tar").write_bytes(header.tobuf() + b"{" * 512)
    with pytest.raises(BadTar, match="text of 8589934592 bytes"):
        index_tars([str(tmp_path)])


@pytest.mark.parametrize(
    ("prepare", "arguments", "message"),
    [
        (lambda d: write_tar(d / "x.tar.gz", pair("a")), {}, r"x\.tar\.gz.*doesn't end in \.tar"),
        (lambda d: (d / "index.json").write_text("{}"), {}, "a dataset already"),
        (lambda d: (d / "unfinished").mkdir(), {}, "a dataset already"),
        (lambda d: None, {}, r"holds no \*\.tar"),
        (lambda d: write_tar(d / "x.tar", pair("a")), {"split": "../x"}, "letters, digits"),
        (lambda d: write_tar(d / "x.tar", pair("a")), {"out": Path("o")}, "--out is for URLs"),
    ],
)
def test_folders_that_are_refused(
    tmp_path: Path, prepare: Callable[[Path], object], arguments: dict, message: str
) -> None:
    prepare(tmp_path)
    with pytest.raises(ValueError, match=message):
        index_tars([str(tmp_path)], **arguments)


@pytest.mark.parametrize(
    ("places", "message"),
    [
        (["nowhere"], "expected one folder"),
        (["a", "b"], "expected one folder"),
        (["http://x/a.tar", "b"], "can't be in one index"),
        (["http://x/a.tar"], "need --out"),
    ],
)
def test_places_that_are_refused(places: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        index_tars(places)


# ---- URLs ----

needs_http = pytest.mark.skipif(importlib.util.find_spec("aiohttp") is None, reason="fsspec reads http with aiohttp")


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    folder = tmp_path / "served"
    write_img2dataset(folder, tars=2)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", folder
    server.shutdown()
    server.server_close()
    thread.join()


@needs_http
def test_tars_at_urls_get_the_index_that_local_ones_get(served: tuple[str, Path], tmp_path: Path) -> None:
    address, folder = served
    urls = [f"{address}/0000{number}.tar?token=a/b.tar" for number in (1, 0)]
    made = index_tars(urls, tmp_path / "out", split="val")
    assert [shard.url for shard in made.index.shards] == urls[::-1]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "00000.idx.npz", "00001.idx.npz", "index.json", "rejected.jsonl"
    ]  # fmt: skip
    local = index_tars([str(folder)], split="val").index
    for there, here in zip(made.index.shards, local.shards):
        assert (there.sha256, there.bytes, there.samples) == (here.sha256, here.bytes, here.samples)
        assert (tmp_path / "out" / f"{here.name}.idx.npz").read_bytes() == (
            folder / f"{here.name}.idx.npz"
        ).read_bytes()
    index = ShardIndex.load(tmp_path / "out")
    reader = ShardReader(tmp_path / "out", "val", transform=to_tensor, cache=str(tmp_path / "cache"))
    local_reader = ShardReader(folder, "val", transform=to_tensor)
    for shard, count in enumerate(local_reader.counts):
        for sample in range(count):
            there, here = reader.photo(shard, sample), local_reader.photo(shard, sample)
            assert there.record == here.record and torch.equal(there.image_CHW, here.image_CHW)
    with pytest.raises(ValueError, match=r"shard 00000 is at http://.*only training and evaluation fetch"):
        open_shard(tmp_path / "out", index.shards[0])
    with pytest.raises(ValueError, match="only training and evaluation fetch"):
        verify(tmp_path / "out")


@needs_http
def test_a_url_that_does_not_answer_is_named(served: tuple[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"http://127.*/nowhere\.tar"):
        index_tars([f"{served[0]}/nowhere.tar"], tmp_path / "out")
    assert not (tmp_path / "out" / "index.json").exists()


def test_a_url_of_any_file_system(tmp_path: Path) -> None:
    import fsspec

    write_img2dataset(tmp_path, tars=1)
    with fsspec.open("memory://bucket/00000.tar", "wb") as file:
        file.write((tmp_path / "00000.tar").read_bytes())
    (shard,) = index_tars(["memory://bucket/00000.tar"], tmp_path / "out").index.shards
    assert (shard.samples, shard.url) == (4, "memory://bucket/00000.tar")


def test_two_urls_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"one name \(0\)"):
        index_tars(["memory://a/0.tar", "memory://b/0.tar"], tmp_path / "out")


class _Stumbling(_Quiet):
    """Answers 503 to the first request of each file."""

    asked: ClassVar[set[str]] = set()

    def do_GET(self) -> None:
        if self.path in self.asked:
            return super().do_GET()
        self.asked.add(self.path)
        return self.send_error(503)


@needs_http
def test_a_server_in_trouble_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr("shards.foreign.time.sleep", waits.append)
    write_img2dataset(tmp_path / "served", tars=2)
    _Stumbling.asked.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Stumbling, directory=str(tmp_path / "served")))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    made = index_tars([f"{address}/00000.tar", f"{address}/00001.tar"], tmp_path / "out")
    assert made.index.num_samples("train") == 8 and waits == [2.0, 2.0]
    with pytest.raises(BadTar, match="gone"):
        index_tars([f"{address}/gone.tar"], tmp_path / "other")
    server.shutdown()
    server.server_close()
