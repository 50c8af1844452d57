"""The numbers of a dataset are those of its making, twins are found and strangers are not, the page shows all.

Every dataset is made here, of small drawn pictures.
"""

from __future__ import annotations

import dataclasses
import html
import io
import json
import os
import re
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from diffcap_dist.data.shard_format import (
    FeatureInfo,
    Member,
    MemberIndex,
    ShardIndex,
    ShardInfo,
    atomic_write,
    file_sha256,
)
from shards import make_shards
from shards.foreign import index_tars
from shards.inspection import (
    MAX_TWIN_DISTANCE,
    _spread,
    dataset_info,
    format_info,
    near_pairs,
    perceptual_hash,
    write_contact_sheet,
)
from tests.test_foreign import write_tar

HOSTILE = "<script>alert('x')</script> \"&amp;"


def drawing(seed: int) -> Image.Image:
    """A picture with large shapes, as photos have."""
    chance = np.random.RandomState(seed)
    image = Image.new("RGB", (120, 90), tuple(chance.randint(0, 256, 3).tolist()))
    draw = ImageDraw.Draw(image)
    for _ in range(8):
        (x, y), (width, height) = chance.randint(0, (110, 80)), chance.randint(15, 60, 2)
        draw.ellipse((x - 20, y - 20, x + width, y + height), fill=tuple(chance.randint(0, 256, 3).tolist()))
    return image


def encoded(image: Image.Image, quality: int = 90) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


Sample = tuple[str, list[str], bytes | None]


def write_shards(folder: Path, splits: dict[str, list[list[Sample]]]) -> Path:
    """A dataset in our format, of (key, captions, photo) by split and shard, made without the writer."""
    index = ShardIndex([], {}, {"counts": {"rejected": {"no caption": {"photos": 2, "captions": 0}}}})
    for split, shards in splits.items():
        for number, samples in enumerate(shards):
            name = f"{split}-{number:06d}"
            index.shards.append(
                ShardInfo(name, split, len(samples), *write_shard(folder / f"{name}.tar", split, samples))
            )
    index.save(folder)
    return folder


def write_shard(path: Path, split: str, samples: list[Sample]) -> tuple[int, str]:
    """(bytes, sha256) of the tar; its member index is beside it."""
    members = {}
    for key, captions, photo in samples:
        width, height = Image.open(io.BytesIO(photo)).size if photo else (None, None)
        record = {"photo_id": key, "captions": captions, "split": split, "width": width, "height": height}
        members |= {f"{key}.jpg": photo} if photo else {}
        members[f"{key}.json"] = json.dumps(record).encode()
    write_tar(path, members)
    rows: dict[str, list[Member]] = {}
    with tarfile.open(path) as tar:
        for one in tar:
            key, suffix = one.name.split(".")
            rows.setdefault(key, []).append(Member(suffix, one.offset_data, one.size, zlib.crc32(members[one.name])))
    size = path.stat().st_size
    atomic_write(path.with_suffix(".idx.npz"), MemberIndex.from_members(list(rows.items()), size).to_bytes())
    return size, file_sha256(path)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    photo = drawing(0)
    train: list[Sample] = [(f"t{i}", [f"a thing {i}", "the same words"], encoded(drawing(i))) for i in range(6)]
    train.append(("long", [" ".join(["word"] * n) for n in (15, 16, 23, 24, 31, 32)], encoded(drawing(50))))
    test: list[Sample] = [
        ("copy", ["x"], encoded(photo)),
        ("small", ["x"], encoded(photo.resize((60, 45)), 60)),
        ("cut", ["x"], encoded(photo.crop((2, 1, 118, 88)))),
        ("other", [HOSTILE], encoded(drawing(99))),
        ("words", ["only words"], None),
    ]
    return write_shards(tmp_path_factory.mktemp("inspect"), {"train": [train[:4], train[4:]], "test": [test]})


def test_numbers_are_those_of_the_making(dataset: Path) -> None:
    info = dataset_info(dataset)
    train, test = info.splits["train"], info.splits["test"]
    assert (train.shards, train.samples, train.photos, train.captions) == (2, 7, 7, 18)
    assert (test.shards, test.samples, test.photos, test.captions) == (1, 5, 4, 5)
    assert test.photo_bytes == sum(len(encoded(i, q)) for i, q in (
        (drawing(0), 90), (drawing(0).resize((60, 45)), 60), (drawing(0).crop((2, 1, 118, 88)), 90), (drawing(99), 90)
    ))  # fmt: skip
    assert (train.widths, train.heights, test.widths) == ((120, 120), (90, 90), (60, 120))
    assert dict(train.per_photo) == {2: 6, 6: 1}
    # n words and [SEP] are n + 1 tokens: of 15, 16, 23, 24, 31, 32 words
    assert train.truncated == {16: 5, 24: 3, 32: 1}
    assert sum(info.words.values()) == 23 and info.words[3] == 12 and info.words[32] == 1
    assert info.rejected == {"no caption": {"photos": 2, "captions": 0}}
    assert info.near_twins is None


def test_duplicates_are_found_within_and_across_splits(dataset: Path) -> None:
    info = dataset_info(dataset)
    assert info.identical == [[("train", "t0"), ("test", "copy")]]
    assert info.shared_captions == [(6, "the same words"), (3, "x")]


def test_near_twins(dataset: Path) -> None:
    info = dataset_info(dataset, near_duplicates=True)
    assert info.near_twins is not None
    (twins,) = info.near_twins
    assert (twins.split, twins.photos, twins.with_twin) == ("test", 4, 3)
    assert [(own, train) for _, own, train in twins.nearest] == [(key, "t0") for key in ("copy", "small", "cut")]
    assert twins.nearest[0][0] == 0 and twins.nearest[-1][0] <= MAX_TWIN_DISTANCE


def test_workers_change_nothing(dataset: Path) -> None:
    sizes: list[int] = []
    assert dataset_info(dataset, near_duplicates=True, workers=2, progress=sizes.append) == dataset_info(
        dataset, near_duplicates=True
    )
    assert sizes == [shard.bytes for shard in ShardIndex.load(dataset).shards]


def test_info_as_text(dataset: Path) -> None:
    text = format_info(dataset_info(dataset, near_duplicates=True))
    for line in (
        r"^train +2 +7 +7 +18 +2-6 +0\.0 +\d\.\d +120 +90$",
        r"cut at max_length \(train, tokenizer words\): 27\.8% at 16, 16\.7% at 24, 5\.6% at 32",
        r"identical photos: 2 in 1 groups, 1 of them across splits\n  train: t0, test: copy",
        r"captions that several photos have: 2\n  6 photos: the same words",
        r"3 of 4 test photos have a near twin in train\n     0 bits: copy ~ t0",
        r"no caption: 2 photos, 0 captions",
        r"features: none",
        r"   1-3  #{40}  \d+",
    ):
        assert re.search(line, text, re.MULTILINE), f"{line}\n{text}"


def test_a_photo_in_two_splits_is_said_first(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By its bytes; and where there are no photos by its key, if it is its captions that were split."""
    first = "THE SPLITS LEAK: {} are in train too. Scores on them are not of unseen photos."
    info = dataset_info(dataset)
    assert info.leaks == {"test": 1}
    assert format_info(info).split("\n\n")[1] == first.format("1 of 5 test photos")
    captions = tmp_path / "captions.csv"
    captions.write_text("image,caption\n" + "".join(f"{i}.jpg,caption {j}\n" for i in range(6) for j in range(5)))
    np.savez(tmp_path / "f.npz", names=np.array([f"{i}.jpg" for i in range(7)]), features=np.ones((7, 4)))
    where = ["--captions", str(captions), "--npz", str(tmp_path / "f.npz"), "--allow-missing"]
    for split, counts in (("rows:0", {"val": 5}), ("train", {})):
        out = tmp_path / split.partition(":")[0]
        assert make_shards.main(["flickr8k", *where, "--split", split, "--out", str(out)]) == 0
        assert "f.npz has features of 1 photos that are not in the dataset" in capsys.readouterr().out
        info = dataset_info(out)
        assert info.leaks == counts and ("THE SPLITS LEAK" in format_info(info)) == bool(counts)
    assert make_shards.main(["verify", str(tmp_path / "rows"), "--workers", "1"]) == 0


def test_different_drawings_are_no_twins() -> None:
    hashes_N = np.array([perceptual_hash(drawing(i)) for i in range(150)], np.uint64)
    distances = [int(hashes_N[i] ^ hashes_N[j]).bit_count() for i in range(150) for j in range(i)]
    assert min(distances) > MAX_TWIN_DISTANCE


@pytest.mark.skipif("DIFFCAP_DATA" not in os.environ, reason="needs real photos")
def test_few_different_photos_are_twins_and_most_copies_are() -> None:
    paths = sorted(Path(os.environ["DIFFCAP_DATA"], "flickr8k", "photos").glob("*.jpg"))[:300]
    photos = [Image.open(path).convert("RGB") for path in paths]
    hashes_N = np.array([perceptual_hash(photo) for photo in photos], np.uint64)
    near = np.bitwise_count(hashes_N[:, None] ^ hashes_N[None]) <= MAX_TWIN_DISTANCE
    assert near.sum() <= len(photos) + 2
    halves_N = np.array([perceptual_hash(one.resize((one.width // 2, one.height // 2))) for one in photos], np.uint64)
    assert (np.bitwise_count(halves_N ^ hashes_N) <= MAX_TWIN_DISTANCE).all()


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 2**64 - 1), max_size=12), st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=12))
def test_nearest_is_that_of_a_plain_search(own: list[int], others: list[int]) -> None:
    distance_N, nearest_N = near_pairs(np.array(own, np.uint64), np.array(others, np.uint64))
    for number, distance, nearest in zip(own, distance_N.tolist(), nearest_N.tolist()):
        expected = [(number ^ other).bit_count() for other in others]
        assert (distance, nearest) == (min(expected), expected.index(min(expected)))


def test_search_in_parts_finds_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    chance = np.random.default_rng(0)
    own_N, others_M = (chance.integers(0, 2**64 - 1, n, np.uint64) for n in (50, 30))
    whole = near_pairs(own_N, others_M)
    monkeypatch.setattr("shards.inspection.PAIRS_AT_ONCE", 70)
    np.testing.assert_array_equal(near_pairs(own_N, others_M), whole)


def test_undecodable_and_foreign_photos_are_counted(tmp_path: Path) -> None:
    photo = encoded(drawing(1))
    write_tar(tmp_path / "train-0.tar", {"a.jpg": photo, "a.txt": b"a", "b.jpg": b"broken", "b.txt": b"b"})
    write_tar(tmp_path / "val-0.tar", {"c.jpg": photo, "c.txt": b"c"})
    index_tars([str(tmp_path)])
    info = dataset_info(tmp_path, near_duplicates=True)
    assert info.identical == [[("train", "a"), ("val", "c")]] and info.undecodable == ["b"]
    assert "1 photos can't be decoded: b" in format_info(info)
    write_contact_sheet(tmp_path, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "no image format known to PIL" in page and page.count("data:image/jpeg;base64,") == 2


# ---- the page ----


def test_the_page_shows_all_and_escapes_all(dataset: Path, tmp_path: Path) -> None:
    assert write_contact_sheet(dataset, tmp_path / "page.html", num=100) == 12
    page = (tmp_path / "page.html").read_text()
    assert page.count("<article>") == 12 and page.count("data:image/jpeg;base64,") == 11
    assert page.count("<p>captions only</p>") == 1 and "<script" not in page
    assert HOSTILE in html.unescape(page) and "120 × 90" in page
    for key in ("t0", "long", "copy", "words"):
        assert f"<b>{key}</b>" in page
    assert not re.search(r"(src|href)=\"(?!data:)", page)


def test_the_page_of_one_split(dataset: Path, tmp_path: Path) -> None:
    assert write_contact_sheet(dataset, tmp_path / "page.html", num=2, split="test") == 2
    page = (tmp_path / "page.html").read_text()
    assert re.findall(r"<b>(\w+)</b>", page) == ["small", "other"]
    with pytest.raises(ValueError, match="split 'val' has no samples"):
        write_contact_sheet(dataset, tmp_path / "page.html", split="val")
    with pytest.raises(ValueError, match="at least 1"):
        write_contact_sheet(dataset, tmp_path / "page.html", num=0)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=8), st.integers(1, 40))
def test_samples_are_spread_evenly(counts: list[int], num: int) -> None:
    shards = [ShardInfo(str(i), "a", count, 0, "") for i, count in enumerate(counts)]
    chosen = _spread(shards, num)
    starts = np.cumsum([0, *counts])
    positions = [int(starts[int(info.name)]) + row for info, rows in chosen for row in rows]
    assert len(positions) == min(num, sum(counts)) and all(row < info.samples for info, rows in chosen for row in rows)
    assert len(set(positions)) == len(positions) and positions == sorted(positions)
    if len(positions) > 1:
        steps = np.diff(positions)
        assert steps.max() - steps.min() <= 1


def test_features_are_listed_and_an_empty_split_is_no_error(tmp_path: Path) -> None:
    features = {"f": FeatureInfo("f", "clip", None, 4, (2, 3), "", {})}
    ShardIndex([ShardInfo("val-0", "val", 0, *write_shard(tmp_path / "val-0.tar", "val", []))], features, {}).save(
        tmp_path
    )
    index = MemberIndex.from_members([("k", [Member("json", 0, 0, 0)])], (tmp_path / "val-0.tar").stat().st_size)
    none = {name: getattr(index, name)[:0] for name in ("keys", "offset", "size", "crc32")}
    atomic_write(tmp_path / "val-0.idx.npz", dataclasses.replace(index, **none).to_bytes())
    text = format_info(dataset_info(tmp_path, near_duplicates=True))
    assert "f: width 4, patches 2 x 3, of clip" in text and re.search(r"^val +1 +0 +0 +0 +- ", text, re.MULTILINE)
