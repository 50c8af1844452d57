"""Sources: caption files of every layout, splits, photos that don't match, and Flickr30k + Flickr8k as one.

All datasets are made here, with photos of a few bytes (sources only list them). The real files are tried where
DIFFCAP_DATA names their folder.
"""

import csv
import dataclasses
import io
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shards import sources
from shards.caption_files import BLANK_CAPTION, NOT_UTF8, read_captions
from shards.sources import Given, photo_id_of
from shards.splits import SPLITS, random_splits, read_split_file, read_splits, row_splits
from shards.writer import RawSample, Rejected, Source

captions_text = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), min_size=1, max_size=40).filter(
    lambda text: text == text.strip()
)
photo_names = st.from_regex(r"[a-z0-9_]{1,12}\.(jpg|png|JPEG)", fullmatch=True)
caption_rows = st.lists(st.tuples(photo_names, captions_text), min_size=1, max_size=20)


def by_name(rows: list[tuple[str, str]]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, caption in rows:
        found.setdefault(name, []).append(caption)
    return found


def made(folder: Path, names: list[str]) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())
    return folder


def captions_csv(path: Path, names: list[str], per_photo: int = 2) -> Path:
    rows = [f"{name},caption {i} of {name}\n" for name in names for i in range(per_photo)]
    path.write_text("image,caption\n" + "".join(rows))
    return path


def karpathy_json(path: Path, images: list[tuple[str, str, list[str]]], **more: str) -> Path:
    content = [
        {"filename": name, "split": split, "sentences": [{"raw": one, "tokens": one.split()} for one in texts], **more}
        for name, split, texts in images
    ]
    path.write_text(json.dumps({"images": content, "dataset": "coco"}))
    return path


def samples_of(source: Source) -> list[RawSample]:
    return list(source.samples)


def totals(source: Source) -> tuple[int, int]:
    """(photos, captions) of samples and rejections together."""
    photos = len(samples_of(source)) + sum(one.photos for one in source.rejected)
    captions = sum(len(one.captions) for one in samples_of(source)) + sum(one.captions for one in source.rejected)
    return photos, captions


def splits_of(source: Source) -> dict[str, str]:
    return {one.photo_id: one.split for one in samples_of(source)}


def reasons(source: Source) -> set[tuple[str, str]]:
    return {(one.photo_id, one.reason) for one in source.rejected}


# ---- caption files ----


@settings(deadline=None, max_examples=40)
@given(caption_rows, st.sampled_from(["\n", "\r\n"]), st.booleans(), st.booleans())
def test_any_captions_survive_the_csv(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]], end: str, bom: bool, quote_all: bool
) -> None:
    buffer = io.StringIO()
    quoting = csv.QUOTE_ALL if quote_all else csv.QUOTE_MINIMAL
    csv.writer(buffer, lineterminator=end, quoting=quoting).writerows([("image", "caption"), *rows])
    path = tmp_path_factory.mktemp("csv") / "captions.txt"
    path.write_bytes(buffer.getvalue().encode("utf-8-sig" if bom else "utf-8"))
    read = read_captions(path)
    assert read.captions == by_name(rows)
    assert list(read.captions) == list(by_name(rows))
    assert not read.rejected and not read.notes and not read.splits


def as_token(rows: list[tuple[str, str]]) -> str:
    return "".join(f"{name}#{i}\t{caption}\n" for i, (name, caption) in enumerate(rows))


def as_results(rows: list[tuple[str, str]]) -> str:
    return "image_name| comment_number| comment\n" + "".join(f"{name}| 0| {caption}\n" for name, caption in rows)


def as_jsonl(rows: list[tuple[str, str]]) -> str:
    one_each = [json.dumps({"file_name": name, "text": caption, "more": 1}) for name, caption in rows]
    return "\n".join(one_each) + "\n"


def as_jsonl_lists(rows: list[tuple[str, str]]) -> str:
    return "".join(
        json.dumps({"image": name, "captions": texts}, ensure_ascii=False) + "\r\n"
        for name, texts in by_name(rows).items()
    )


def as_karpathy(rows: list[tuple[str, str]]) -> str:
    images = [
        {"filename": name, "split": "train", "sentences": [{"raw": one} for one in texts]}
        for name, texts in by_name(rows).items()
    ]
    return json.dumps({"dataset": "made", "images": images}, indent=1)


def as_other_csv(rows: list[tuple[str, str]]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    writer.writerow(["", "comment", "file_name", "width"])
    writer.writerows((i, caption, name, 8) for i, (name, caption) in enumerate(rows))
    return buffer.getvalue()


LAYOUTS = [as_token, as_results, as_jsonl, as_jsonl_lists, as_karpathy, as_other_csv]


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(deadline=None, max_examples=15)
@given(rows=caption_rows)
def test_any_captions_survive_every_layout(
    tmp_path_factory: pytest.TempPathFactory,
    layout: Callable[[list[tuple[str, str]]], str],
    rows: list[tuple[str, str]],
) -> None:
    path = tmp_path_factory.mktemp("layout") / "a name that says nothing"
    path.write_bytes(layout(rows).encode())
    read = read_captions(path)
    assert read.captions == by_name(rows)
    assert not read.rejected and not read.notes
    assert dict(read.splits) == (dict.fromkeys(by_name(rows), "train") if layout is as_karpathy else {})


def test_bare_commas_and_inner_quotes_are_part_of_the_caption(tmp_path: Path) -> None:
    path = tmp_path / "captions.txt"
    path.write_text('Image , Caption\n1.jpg,A dog , a cat , and a "bird" .\n\n1.jpg,"He says "" hi "" , twice"\n')
    assert read_captions(path).captions == {"1.jpg": ['A dog , a cat , and a "bird" .', 'He says " hi " , twice']}


def test_only_a_newline_ends_a_row(tmp_path: Path) -> None:
    path = tmp_path / "captions.txt"
    path.write_text("image,caption\n1.jpg,one\u2028line\x85 still\n", encoding="utf-8")
    assert read_captions(path).captions == {"1.jpg": ["one\u2028line\x85 still"]}


def test_a_repeated_row_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "captions.txt"
    path.write_text("image,caption\n1.jpg,A dog .\n1.jpg,A dog .\n")
    assert read_captions(path).captions == {"1.jpg": ["A dog .", "A dog ."]}


def test_the_row_of_flickr30k_without_separator_is_repaired_and_said(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    path.write_text(
        "image_name| comment_number| comment\n"
        "2199200615.jpg| 3| A dog runs | or walks .\n"
        "2199200615.jpg| 4   A dog runs across the grass .\n"
    )
    read = read_captions(path)
    assert read.captions == {"2199200615.jpg": ["A dog runs | or walks .", "A dog runs across the grass ."]}
    assert read.notes == ["results.csv line 3 lacks a separator, read as 2199200615.jpg: A dog runs across the grass ."]


@pytest.mark.parametrize(
    "content",
    [
        b"image,caption\n1.jpg,a\n1.jpg,caf\xe9\n2.jpg, \n",
        b'image,caption\n1.jpg,a\n1.jpg,"caf\xe9, x"\n2.jpg,\n',
        b"image_name| comment_number| comment\n1.jpg| 0| a\n1.jpg| 1| caf\xe9\n2.jpg| 0| \n",
        b'{"image": "1.jpg", "caption": "a"}\n{"image": "1.jpg", "caption": "caf\xe9"}\n'
        b'{"image": "2.jpg", "caption": ""}\n',
        b"\n1.jpg#0\ta\n1.jpg#1\tcaf\xe9\n2.jpg#0\t\n",
    ],
)
def test_blank_and_undecodable_captions_are_rejected_by_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "captions"
    path.write_bytes(content)
    read = read_captions(path)
    assert read.captions == {"1.jpg": ["a"], "2.jpg": []}
    first = 2 if content.startswith(b"{") else 3
    assert read.rejected == [
        Rejected("1.jpg", NOT_UTF8, 0, 1, f"line {first}"),
        Rejected("2.jpg", BLANK_CAPTION, 0, 1, f"line {first + 1}"),
    ]


def test_half_a_surrogate_pair_and_an_undecodable_name_are_rejected_and_can_be_written(tmp_path: Path) -> None:
    path = tmp_path / "captions.jsonl"
    path.write_bytes(b'{"image": "1.jpg", "captions": ["a", "\\ud83d"]}\n{"image": "\xe9.jpg", "caption": "b"}\n')
    read = read_captions(path)
    assert read.captions["1.jpg"] == ["a"]
    assert [(one.reason, one.detail) for one in read.rejected] == [(NOT_UTF8, "line 1"), (NOT_UTF8, "line 2")]
    "".join([*read.captions, *(one.photo_id for one in read.rejected)]).encode()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no captions file.*image,caption"),
        (b"\xff\xfei\0m\0", "no captions file"),
        (b"\x89PNG\r\n\x1a\n", "no captions file"),
        (b"photo,words\n1.jpg,a\n", "no captions file"),
        (b"image,caption\n", "has no captions"),
        (b"image,caption\n1.jpg, \n", r"has no captions \(1 photos, 1 captions rejected\)"),
        (b"image,caption\n1.jpg\n", "line 2: '1.jpg' is no row of image,caption"),
        (b"image,caption\n,a dog\n", "line 2: ',a dog' is no row"),
        (b"caption,image\na, dog,1.jpg\n", "line 2: 'a, dog,1.jpg' is no row"),
        (b'image,caption\n1.jpg,a\n2.jpg,"never closed\n3.jpg,b\n', "line 3.*quote"),
        (b'image,caption\n1.jpg,"open\n2.jpg,closed"\n', "line 2.*quote opened here"),
        (b"1.jpg#0\ta\n1.jpg\tb\n", "line 2.*expected `name.jpg#0<TAB>caption`"),
        (b"image_name| comment_number| comment\n1.jpg| a\n", r"line 2.*expected `name.jpg\| 0\| caption`"),
        (b'{"image": "1.jpg", "caption": "a"}\n{"image": "1.jpg"\n', "line 2: no JSON"),
        (b'{"image": "1.jpg", "caption": "a"}\n{"image": "1.jpg", "caption": 3}\n', "line 2.*expected"),
        (b'{"image": "1.jpg", "caption": "a"}\n["1.jpg"]\n', "line 2.*expected"),
        (b'{"images": []}', "`images` is empty"),
        (b'{"images": [{"file_name": "1.jpg", "id": 1}], "annotations": []}', r"images\[0\].*take dataset_coco.json"),
        (b'{"images": [{"filename": "1.jpg", "split": "../up"}]}', r"images\[0\] is not as in Karpathy's"),
    ],
)
def test_bad_captions_files_say_where(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "captions.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_captions(path)
    assert str(path) in str(error.value)


# ---- splits ----


@settings(deadline=None, max_examples=40)
@given(st.dictionaries(photo_names.map(photo_id_of), st.sampled_from(SPLITS), min_size=1))
def test_splits_of_all_kinds_say_the_same(tmp_path_factory: pytest.TempPathFactory, split_of: dict[str, str]) -> None:
    folder = tmp_path_factory.mktemp("split")
    (folder / "lines").write_text("".join(f"{one}.jpg\t{split}\n" for one, split in split_of.items()))
    karpathy_json(folder / "dataset_made.json", [(f"{one}.jpg", split, []) for one, split in split_of.items()])
    for prefix, ending, val in (("f30k_", "", "val"), ("Flickr_8k.", ".jpg", "dev")):
        for split in SPLITS:
            listed = [f"{one}{ending}\r\n" for one in split_of if split_of[one] == split]
            name = f"{val if split == 'val' else split}{'Images' if val == 'dev' else ''}"
            (folder / f"{prefix}{name}.txt").write_text("".join(listed))
    captions = folder / "captions.txt"
    asked = ["lines", "dataset_made.json", "f30k", "f30k_", "Flickr_8k"]
    for split in [*(str(folder / one) for one in asked), "karpathy", "official"]:
        assert read_splits(split, captions, list(split_of), photo_id_of).of == split_of


def test_a_name_in_a_split_file_may_hold_spaces(tmp_path: Path) -> None:
    (tmp_path / "split").write_text("my photo.jpg train\n")
    assert read_split_file(tmp_path / "split", photo_id_of) == {"my photo": "train"}


@pytest.mark.parametrize("prefix", ["f30k_", "flickr30k_", ""])
def test_a_folder_of_lists(tmp_path: Path, prefix: str) -> None:
    for i, split in enumerate(SPLITS):
        (tmp_path / f"{prefix}{split}.txt").write_text(f"{i}\n")
    (tmp_path / "constrain.txt").write_text("not a list")
    splits = read_splits(str(tmp_path), tmp_path / "captions.txt", [])
    assert splits.of == {"0": "train", "1": "val", "2": "test"}
    assert isinstance(splits.provenance, dict) and list(splits.provenance) == list(SPLITS)


def test_official_lists_may_be_in_the_parent_folder(tmp_path: Path) -> None:
    captions = tmp_path / "text" / "Flickr8k.token.txt"
    captions.parent.mkdir()
    with pytest.raises(ValueError, match=r"needs Flickr_8k\.trainImages\.txt"):
        read_splits("official", captions, [])
    for name, photo in (("train", "1.jpg"), ("dev", "2.jpg"), ("test", "3.jpg")):
        (tmp_path / f"Flickr_8k.{name}Images.txt").write_text(f"{photo}\n")
    assert read_splits("official", captions, [], photo_id_of).of == {"1": "train", "2": "val", "3": "test"}


def test_karpathy_takes_the_file_of_the_dataset(tmp_path: Path) -> None:
    captions = tmp_path / "captions.txt"
    with pytest.raises(ValueError, match=r"needs dataset_flickr8k\.json"):
        read_splits("karpathy", captions, [], dataset="flickr8k")
    karpathy_json(tmp_path / "dataset_flickr8k.json", [("1.jpg", "val", [])])
    karpathy_json(tmp_path / "dataset_flickr30k.json", [("1.jpg", "test", [])])
    assert read_splits("karpathy", captions, [], photo_id_of, dataset="flickr8k").of == {"1": "val"}
    with pytest.raises(ValueError, match=r"found dataset_flickr30k\.json, dataset_flickr8k\.json"):
        read_splits("karpathy", captions, [])


def test_one_split_for_all(tmp_path: Path) -> None:
    assert read_splits("test", tmp_path / "c", ["1", "2"]).of == {"1": "test", "2": "test"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1.jpg train\n1 test\n", "is in 'train' and in 'test'"),
        ("1.jpg\n", "line 1.*expected"),
        ("\n1.jpg ../up\n", "line 2.*expected"),
        ('{"photos": []}', "line 1.*expected"),
        ('{"images": [{"filename": "1.jpg"}]}', r"images\[0\]"),
    ],
)
def test_bad_split_files(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "split").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_split_file(tmp_path / "split", photo_id_of)


@pytest.mark.parametrize(
    ("split", "files", "message"),
    [
        ("nowhere.txt", [], "no such file"),
        ("trian", [], r"no such file.*Expected FILE\|DIR\|official"),
        ("random:x", [], "seed must be a whole number"),
        ("random:4294967296", [], "below 2"),
        ("DIR", [], "found none"),
        ("DIR", ["f30k_train.txt", "f30k_test.txt"], "for train, test are there, for val not"),
        ("DIR", ["f30k_train.txt", "f8k_train.txt"], "found several: 'f30k', 'f8k'"),
        ("DIR", ["val.txt", "dev.txt"], "dev.txt and val.txt both list the photos of val"),
        ("DIR", ["train.txt", "val.txt", "test.txt"], "test.txt line 1: photo 1.jpg is also in 'train'"),
    ],
)
def test_bad_splits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, split: str, files: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in files:
        (tmp_path / name).write_text("" if "val" in name else "1.jpg\n")
    with pytest.raises(ValueError, match=message):
        read_splits(str(tmp_path) if split == "DIR" else split, tmp_path / "captions.txt", ["1"])


@settings(deadline=None, max_examples=40)
@given(st.integers(5, 400), st.integers(0, 2**32 - 1), st.randoms(use_true_random=False))
def test_random_splits_are_exact_and_independent_of_order(num_photos: int, seed: int, chance: object) -> None:
    photo_ids = [f"p{i}" for i in range(num_photos)]
    held_out = round(0.1 * num_photos)
    if held_out == 0:
        with pytest.raises(ValueError, match="too few"):
            random_splits(photo_ids, seed)
        return
    split_of = random_splits(photo_ids, seed)
    counts = [list(split_of.values()).count(split) for split in SPLITS]
    assert counts == [num_photos - 2 * held_out, held_out, held_out]
    shuffled = photo_ids.copy()
    chance.shuffle(shuffled)  # type: ignore[attr-defined]
    assert random_splits(shuffled, seed) == split_of


def test_random_split_never_changes() -> None:
    split_of = random_splits([f"p{i}" for i in range(20)], 0)
    assert {one for one, split in split_of.items() if split == "val"} == {"p1", "p8"}
    assert random_splits([f"p{i}" for i in range(20)], 1) != split_of


# ---- photos and captions that don't match ----


@pytest.fixture
def ten(tmp_path: Path) -> Given:
    """Ten photos with two captions each, and a split file for them."""
    names = [f"{i}.jpg" for i in range(10)]
    (tmp_path / "split.txt").write_text("".join(f"{name} {'test' if name > '8' else 'train'}\n" for name in names))
    captions = captions_csv(tmp_path / "captions.txt", names)
    return Given(captions, str(tmp_path / "split.txt"), images=made(tmp_path / "photos", names), allow_missing=True)


def test_samples_are_in_order_and_their_photos_are_read_elsewhere(ten: Given) -> None:
    source = sources.flickr8k(ten)
    samples = samples_of(source)
    assert [one.photo_id for one in samples] == [str(i) for i in range(10)]
    assert samples[3].captions == ["caption 0 of 3.jpg", "caption 1 of 3.jpg"]
    assert {one.source for one in samples} == {"flickr8k"}
    assert [one.split for one in samples].count("test") == 2
    assert [pickle.loads(pickle.dumps(one.image))() for one in samples] == [f"{i}.jpg".encode() for i in range(10)]
    assert not source.rejected and not source.notes


@pytest.mark.parametrize(("num_missing", "stops"), [(2, False), (3, True)])
def test_the_threshold_is_one_percent(tmp_path: Path, num_missing: int, stops: bool) -> None:
    names = [f"{i}.jpg" for i in range(200)]
    photos = made(tmp_path / "photos", names[: 200 - num_missing])
    asked = Given(captions_csv(tmp_path / "captions.txt", names, 1), "train", images=photos)
    if stops:
        with pytest.raises(ValueError, match=r"3 of 200 captions have no photo.*1\.5%.*--allow-missing"):
            sources.flickr8k(asked)
    else:
        source = sources.flickr8k(asked)
        assert (len(samples_of(source)), len(source.rejected)) == (198, 2)


def test_photos_without_caption_stop_it_unless_allowed(tmp_path: Path) -> None:
    captions = captions_csv(tmp_path / "captions.txt", ["1.jpg"])
    photos = made(tmp_path / "photos", ["1.jpg", "2.jpg", "._1.jpg", "notes.txt"])
    with pytest.raises(ValueError, match=r"1 of 2 photos.*50\.0%"):
        sources.flickr8k(Given(captions, "train", images=photos))
    source = sources.flickr8k(Given(captions, "train", images=photos, allow_missing=True))
    assert source.rejected == [Rejected("2", sources.NO_CAPTION, 1, 0, by_choice=True)]
    assert source.notes == [f"2 entries of {photos} are no photos: ._1.jpg, notes.txt"]


def test_a_photo_whose_captions_are_all_rejected_counts_once(ten: Given) -> None:
    ten.captions.write_text("image,caption\n1.jpg,a\n2.jpg, \nelsewhere.jpg,\n")
    source = sources.flickr8k(ten)
    assert splits_of(source) == {"1": "train"}
    assert totals(source) == (11, 3)


def test_photos_outside_the_split_file_are_left_out_by_choice(ten: Given) -> None:
    Path(ten.split).write_text("0.jpg train\n1 test\nelsewhere.jpg test\n")
    source = sources.flickr8k(ten)
    assert splits_of(source) == {"0": "train", "1": "test"}
    assert {(one.reason, one.by_choice) for one in source.rejected} == {(sources.NOT_IN_SPLIT, True)}
    assert totals(source) == (10, 20)
    assert source.notes == ["1 photos of the split file have no captions here"]


def test_a_photo_that_comes_twice_is_rejected_and_named(tmp_path: Path) -> None:
    photos = made(tmp_path / "photos", ["1.jpg", "1.png", "2.jpg", "2.webp"])
    captions = captions_csv(tmp_path / "captions.txt", ["1.png", "2.jpg", "2.webp"])
    source = sources.flickr8k(Given(captions, "train", images=photos))
    assert [one.image() for one in samples_of(source) if one.image] == [b"1.png", b"2.jpg"]
    assert source.rejected == [
        Rejected("2", sources.DUPLICATE, 1, 2, "2.jpg is kept, 2.webp is not"),
        Rejected("1", sources.DUPLICATE, 1, 0, "1.png is kept, 1.jpg is not"),
    ]
    assert totals(source) == (4, 6)


some_names = st.lists(st.from_regex(r"[a-d]\.(jpg|png|webp)", fullmatch=True), min_size=1, unique=True)


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(captioned=some_names, there=some_names, listed=st.lists(st.sampled_from("abcd"), unique=True))
def test_totals_add_up(
    tmp_path_factory: pytest.TempPathFactory, captioned: list[str], there: list[str], listed: list[str]
) -> None:
    """Photos are files or, where captions name one that is not there, names; a.jpg and a.png are one if one of them
    is only a file and the other only a name."""
    folder = tmp_path_factory.mktemp("totals")
    (folder / "split").write_text("".join(f"{one} train\n" for one in listed))
    photos = made(folder / "photos", there)
    captions = captions_csv(folder / "captions.csv", captioned)
    source = sources.flickr8k(Given(captions, str(folder / "split"), images=photos, allow_missing=True))
    num_photos, num_captions = totals(source)
    assert num_captions == 2 * len(captioned)
    one_under_two_names = sum(
        bool(names_of(captioned, one) and names_of(there, one)) and not names_of(captioned, one) & names_of(there, one)
        for one in "abcd"
    )
    assert num_photos == len({*captioned, *there}) - one_under_two_names
    kept = splits_of(source)
    assert len(samples_of(source)) == len(kept)
    assert kept.keys() == {one for one in listed if names_of(captioned, one) and names_of(there, one)}


def names_of(names: list[str], photo_id: str) -> set[str]:
    return {name for name in names if photo_id_of(name) == photo_id}


def test_without_photos_captions_go_with_the_names_of_features(tmp_path: Path) -> None:
    captions = captions_csv(tmp_path / "captions.txt", ["1.jpg", "2.jpg"])
    np.savez(tmp_path / "features.npz", names=np.array(["2.jpg", "1"]), features=np.zeros((2, 4)))
    for dataset in (sources.flickr8k, sources.flickr30k, sources.folder):
        source = dataset(Given(captions, "train", npz=tmp_path / "features.npz"))
        assert [(one.photo_id, one.image) for one in samples_of(source)] == [("1", None), ("2", None)]
        assert "npz" in source.provenance
        with pytest.raises(ValueError, match="neither --images nor --npz"):
            dataset(Given(captions, "train"))


@pytest.mark.parametrize(
    ("names", "message"),
    [([], "no folder of photos"), (["Images/1.jpg"], "It holds Images: is one of them the folder")],
)
def test_folders_without_photos(tmp_path: Path, names: list[str], message: str) -> None:
    captions = captions_csv(tmp_path / "captions.txt", ["1.jpg"])
    with pytest.raises(ValueError, match=message):
        sources.flickr8k(Given(captions, "train", images=made(tmp_path / "photos", names)))


def test_provenance_tells_captions_photos_and_split_apart(ten: Given) -> None:
    def provenance() -> dict:
        return sources.flickr8k(ten).provenance

    seen = [provenance(), provenance()]
    assert seen[0] == seen[1]
    ten.captions.write_text(ten.captions.read_text() + "9.jpg,one more\n")
    seen.append(provenance())
    (ten.captions.parent / "photos" / "3.jpg").write_bytes(b"another size")
    seen.append(provenance())
    Path(ten.split).write_text("9.jpg train\n")
    seen.append(provenance())
    for key, before, after in (("captions", 1, 2), ("photos", 2, 3), ("split", 3, 4)):
        changed = {one for one in seen[before] if seen[before][one] != seen[after][one]}
        assert changed == {key}
    assert str(ten.captions.parent) not in json.dumps(seen)


# ---- datasets ----


def test_flickr8k_as_its_authors_published_it(tmp_path: Path) -> None:
    names = ["1_a.jpg", "2_b.jpg", "3_c.jpg", "2258277193_586949ec62.jpg.1"]
    text = tmp_path / "Flickr8k.token.txt"
    text.write_text("".join(f"{name}#{i}\tA dog {i} .\n" for name in names for i in range(5)))
    for split, listed in (("train", "1_a.jpg"), ("dev", "2_b.jpg"), ("test", "3_c.jpg")):
        (tmp_path / f"Flickr_8k.{split}Images.txt").write_text(listed + "\n")
    photos = made(tmp_path / "Flicker8k_Dataset", names[:3])
    source = sources.flickr8k(Given(text, "official", images=photos, allow_missing=True))
    assert splits_of(source) == {"1_a": "train", "2_b": "val", "3_c": "test"}
    assert source.rejected == [Rejected(names[3], sources.NO_PHOTO, 1, 5, by_choice=True)]


@pytest.fixture
def coco(tmp_path: Path) -> Given:
    """Three photos in the two folders of COCO, beside a folder that Karpathy's file doesn't mention."""
    made(tmp_path / "coco", ["train2014/1.jpg", "val2014/2.jpg", "val2014/3.jpg", "test2014/9.jpg"])
    images = [("train2014/1.jpg", "train"), ("val2014/2.jpg", "val"), ("val2014/3.jpg", "restval")]
    content = [
        {
            "filepath": name.split("/")[0],
            "filename": name.split("/")[1],
            "split": split,
            "sentences": [{"raw": "a"}, {"raw": "b"}],
        }
        for name, split in images
    ]
    (tmp_path / "dataset_coco.json").write_text(json.dumps({"images": content}))
    return Given(tmp_path / "dataset_coco.json", "karpathy", images=tmp_path / "coco")


def test_restval_is_training_data_only_on_request(coco: Given) -> None:
    source = sources.karpathy(coco)
    assert splits_of(source) == {"1": "train", "2": "val"}
    assert source.rejected == [Rejected("3", sources.LEFT_OUT_RESTVAL, 1, 2, by_choice=True)]
    assert source.notes == [f"1 entries of {coco.images} are no photos: test2014"]
    asked = sources.karpathy(Given(coco.captions, "karpathy", images=coco.images, restval=True))
    assert splits_of(asked) == {"1": "train", "2": "val", "3": "train"}
    assert [one.image() for one in samples_of(asked) if one.image][1] == b"val2014/2.jpg"
    assert asked.provenance != source.provenance


def test_restval_that_changes_nothing_is_said(ten: Given) -> None:
    given_restval = Given(ten.captions, ten.split, images=ten.images, restval=True)
    assert sources.flickr8k(given_restval).notes == ["--restval changes nothing: the split has no restval photos"]


def test_karpathy_photos_may_lie_in_one_folder(coco: Given, tmp_path: Path) -> None:
    photos = made(tmp_path / "flat", ["1.jpg", "2.jpg", "3.jpg"])
    assert len(samples_of(sources.karpathy(Given(coco.captions, "karpathy", images=photos)))) == 2
    with pytest.raises(ValueError, match="not one of Karpathy's"):
        sources.karpathy(Given(captions_csv(tmp_path / "captions.txt", ["1.jpg"]), "karpathy", images=photos))


def test_a_folder_of_folders_keeps_photos_of_the_same_name_apart(tmp_path: Path) -> None:
    photos = made(tmp_path / "photos", ["birds/1.jpg", "cats/1.jpg", "cats/2.jpg", "cats/.hidden/2.jpg"])
    captions = photos / "metadata.jsonl"
    captions.write_text(
        '{"file_name": "birds/1.jpg", "text": "a bird"}\n'
        '{"file_name": "./cats/1.jpg", "text": "a cat"}\n'
        '{"file_name": "2.jpg", "text": "two"}\n'
    )
    (tmp_path / "split").write_text("birds/1.jpg val\ncats/1.jpg train\n2.jpg test\n")
    source = sources.folder(Given(captions, str(tmp_path / "split"), images=photos))
    assert splits_of(source) == {"birds/1": "val", "cats/1": "train", "cats/2": "test"}
    assert {one.photo_id: one.captions for one in samples_of(source)}["cats/1"] == ["a cat"]
    assert source.notes == [f"2 entries of {photos} are no photos: cats/.hidden, metadata.jsonl"]


def test_a_file_name_that_is_in_two_folders_is_no_photo(tmp_path: Path) -> None:
    photos = made(tmp_path / "photos", ["birds/1.jpg", "cats/1.jpg"])
    captions = captions_csv(tmp_path / "captions.csv", ["1.jpg", "birds/1.jpg"])
    source = sources.folder(Given(captions, "train", images=photos, allow_missing=True))
    assert reasons(source) == {("1", sources.NO_PHOTO), ("cats/1", sources.NO_CAPTION)}
    assert list(splits_of(source)) == ["birds/1"]


def test_of_a_photo_named_in_two_ways_the_captions_under_its_path_are_kept(tmp_path: Path) -> None:
    photos = made(tmp_path / "photos", ["birds/1.jpg"])
    captions = captions_csv(tmp_path / "captions.csv", ["1.jpg", "birds/1.jpg"])
    source = sources.folder(Given(captions, "train", images=photos))
    assert samples_of(source)[0].captions == ["caption 0 of birds/1.jpg", "caption 1 of birds/1.jpg"]
    assert totals(source) == (2, 4)


# ---- Flickr30k and Flickr8k as one ----


def flickr(folder: Path, name: str, names: list[str], split_of: dict[str, str]) -> Given:
    (folder / f"{name}.split").write_text("".join(f"{one} {split}\n" for one, split in split_of.items()))
    captions = captions_csv(folder / f"{name}.csv", names)
    return Given(captions, str(folder / f"{name}.split"), images=made(folder / name, names))


def test_the_union_of_four_photos(tmp_path: Path) -> None:
    f30k = flickr(tmp_path, "30k", ["1.jpg", "2.jpg", "3.jpg"], {"1": "train", "2": "val", "3": "test"})
    f8k_split = {"1_a": "test", "2_b": "train", "4_d": "val"}
    f8k = flickr(tmp_path, "8k", ["1_a.jpg", "2_b.jpg", "4_d.jpg"], f8k_split)
    source = sources.flickr30k_8k(f30k, f8k)
    assert splits_of(source) == {"1": "test", "2": "val", "3": "test", "4_d": "val"}
    assert [one.source for one in samples_of(source)] == ["flickr30k"] * 3 + ["flickr8k"]
    assert source.rejected == [
        Rejected("1_a", sources.SAME_PHOTO, 1, 2, "1 is kept, 1_a is not", by_choice=True),
        Rejected("2_b", sources.SAME_PHOTO, 1, 2, "2 is kept, 2_b is not", by_choice=True),
    ]
    assert source.notes == [
        "flickr30k: 3 photos, flickr8k: 3, in both: 2 (Flickr30k's copy and captions are kept)",
        "1 photos are in another split because of the other dataset: train -> test 1",
    ]


def test_a_test_photo_that_is_not_at_hand_still_keeps_its_copy_out_of_train(tmp_path: Path) -> None:
    f30k = flickr(tmp_path, "30k", ["1.jpg", "2.jpg"], {"1": "train", "2": "train"})
    f8k = flickr(tmp_path, "8k", ["3_c.jpg"], {"3_c": "train", "1_a": "test"})
    assert splits_of(sources.flickr30k_8k(f30k, f8k)) == {"1": "test", "2": "train", "3_c": "train"}


def test_both_datasets_in_one_folder_or_one_npz(tmp_path: Path) -> None:
    names = ["1.jpg", "2.jpg", "1_a.jpg", "3_c.jpg", "9.jpg"]
    made(tmp_path / "both", names)
    np.savez(tmp_path / "both.npz", names=np.array(names), features=np.zeros((5, 2)))
    captions30k, captions8k = (
        captions_csv(tmp_path / f"{i}.csv", part) for i, part in enumerate((names[:2], names[1:4]))
    )
    for where in ({"images": tmp_path / "both"}, {"npz": tmp_path / "both.npz"}):
        given30k, given8k = (
            Given(captions, "train", **where, allow_missing=True) for captions in (captions30k, captions8k)
        )
        source = sources.flickr30k_8k(given30k, given8k)
        assert splits_of(source) == {"1": "train", "2": "train", "3_c": "train"}
        same = {("1_a", sources.SAME_PHOTO), ("2", sources.SAME_PHOTO)}
        assert reasons(source) == {("9", sources.NO_CAPTION), *same}
        assert totals(source) == (6, 10)  # 2.jpg is a photo of each dataset


@pytest.mark.parametrize(
    ("names", "split", "message"),
    [(["cover.jpg"], "train", "not called by a Flickr photo number"), (["1_a.jpg"], "dev", "split 'dev'")],
)
def test_what_can_not_be_united(tmp_path: Path, names: list[str], split: str, message: str) -> None:
    f30k = flickr(tmp_path, "30k", ["1.jpg"], {"1": "train"})
    f8k = flickr(tmp_path, "8k", names, {names[0]: split})
    with pytest.raises(ValueError, match=message):
        sources.flickr30k_8k(f30k, f8k)


some_splits = st.dictionaries(st.integers(1, 8), st.sampled_from([*SPLITS, None]), min_size=1)


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(some_splits, some_splits)
def test_the_union_never_trains_on_a_held_out_photo(
    tmp_path_factory: pytest.TempPathFactory, splits30k: dict[int, str | None], splits8k: dict[int, str | None]
) -> None:
    """None: a photo that is in no list."""
    folder = tmp_path_factory.mktemp("union")
    f30k = flickr(folder, "30k", [f"{i}.jpg" for i in splits30k], {f"{i}": s for i, s in splits30k.items() if s})
    f8k = flickr(folder, "8k", [f"{i}_x.jpg" for i in splits8k], {f"{i}_x": s for i, s in splits8k.items() if s})
    source = sources.flickr30k_8k(f30k, f8k)
    found = {sources.flickr_number(one.photo_id): one for one in samples_of(source)}
    assert len(found) == len(samples_of(source))
    listed = {i for splits in (splits30k, splits8k) for i, split in splits.items() if split}
    assert found.keys() == listed
    for number, sample in found.items():
        both = {splits30k.get(number), splits8k.get(number)}
        assert sample.split == next(split for split in ("test", "val", "train") if split in both)
        assert sample.source == ("flickr30k" if splits30k.get(number) else "flickr8k")
    assert totals(source) == (len(splits30k) + len(splits8k), 2 * (len(splits30k) + len(splits8k)))


# ---- split by caption rows ----

row_counts = st.dictionaries(photo_names.map(photo_id_of), st.integers(0, 6), min_size=1).filter(
    lambda counts: sum(counts.values()) > 1
)


@given(row_counts, st.integers(0, 2**32 - 1))
def test_rows_are_split_80_to_20_by_the_seed_alone(counts: dict[str, int], seed: int) -> None:
    split_of = row_splits(counts, f"rows:{seed}")
    assert {one: len(splits) for one, splits in split_of.items()} == counts
    drawn = [split for splits in split_of.values() for split in splits]
    assert drawn.count("train") == int(0.8 * len(drawn)) and drawn.count("val") == len(drawn) - drawn.count("train")
    backwards = dict(reversed(counts.items()))
    assert row_splits(backwards, f"rows:{seed}") == split_of


def test_another_seed_splits_other_rows() -> None:
    counts = {f"{i}": 5 for i in range(100)}
    assert row_splits(counts, "rows:0") != row_splits(counts, "rows:1")
    for split, message in (("rows:x", "whole number below 2^32, e.g. rows:0"), ("rows:", "e.g. rows:0")):
        with pytest.raises(ValueError, match=message.replace("^", r"\^")):
            row_splits(counts, split)
    with pytest.raises(ValueError, match="1 captions are too few for 80/20"):
        row_splits({"a": 1}, "rows:0")


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(rows=st.lists(st.tuples(photo_names, captions_text), min_size=2, max_size=20), seed=st.integers(0, 9))
def test_each_row_is_in_one_split_and_each_photo_has_all_its_captions_as_references(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]], seed: int
) -> None:
    folder = tmp_path_factory.mktemp("rows")
    unique = {photo_id_of(name): name for name, _ in rows}
    rows = [(unique[photo_id_of(name)], caption) for name, caption in rows]
    with (folder / "c.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("image", "caption"), *rows])
    images = made(folder / "photos", list(unique.values()))
    samples = samples_of(sources.flickr8k(Given(folder / "c.csv", f"rows:{seed}", images=images)))
    texts = {photo_id_of(name): captions for name, captions in by_name(rows).items()}
    assert len({(one.split, one.photo_id) for one in samples}) == len(samples)
    assert all(one.references == texts[one.photo_id] and one.image is not None for one in samples)
    for photo_id, captions in texts.items():
        assert sorted(text for one in samples if one.photo_id == photo_id for text in one.captions) == sorted(captions)
    in_train = sum(len(one.captions) for one in samples if one.split == "train")
    assert in_train == int(0.8 * len(rows)) and {one.split for one in samples} == {"train", "val"}


def test_a_split_by_rows_says_that_it_leaks_and_both_flickrs_stay_apart(tmp_path: Path) -> None:
    photos30k, photos8k = [f"{i}.jpg" for i in range(6)], [f"{i}_x.jpg" for i in range(4, 8)]
    given30k, given8k = flickr(tmp_path, "30k", photos30k, {}), flickr(tmp_path, "8k", photos8k, {})
    with pytest.raises(ValueError, match="one dataset is split rows:SEED"):
        sources.flickr30k_8k(dataclasses.replace(given30k, split="rows:0"), dataclasses.replace(given8k, split="train"))
    by_rows = [dataclasses.replace(one, split="rows:0") for one in (given30k, given8k)]
    source = sources.flickr30k_8k(*by_rows)
    assert {one.photo_id for one in samples_of(source)} == {photo_id_of(name) for name in (*photos30k, *photos8k)}
    assert sum(len(one.captions) for one in samples_of(source)) == 20 and not source.rejected
    assert "2 photos are in twice, once from each dataset" in source.notes
    leaks = [note for note in source.notes if "IT LEAKS" in note]
    assert len(leaks) == 2 and leaks[0].startswith("split by caption rows: 9 in train, 3 in val")


# ---- the real files ----

DATA = Path(os.environ.get("DIFFCAP_DATA", "not set"))
needs_data = pytest.mark.skipif(not (DATA / "flickr8k").is_dir(), reason="DIFFCAP_DATA is not set")


@needs_data
def test_the_real_captions_of_flickr8k() -> None:
    read = read_captions(DATA / "flickr8k" / "captions.txt")
    assert len(read.captions) == 7091 and {len(texts) for texts in read.captions.values()} == {5}
    assert not read.rejected and not read.notes


@needs_data
def test_the_real_union(tmp_path: Path) -> None:
    lists = {split: (DATA / "flickr30k" / f"f30k_{split}.txt").read_text().split() for split in SPLITS}
    names = [f"{number}.jpg" for numbers in lists.values() for number in numbers]
    captions30k = captions_csv(tmp_path / "made.csv", names, 1)
    np.savez(tmp_path / "made.npz", names=np.array(names))
    given30k = Given(captions30k, str(DATA / "flickr30k"), npz=tmp_path / "made.npz")
    captions8k, features8k = DATA / "flickr8k" / "captions.txt", DATA / "flickr8k" / "image_features_512.npz"
    numbers8k = {sources.flickr_number(name) for name in read_captions(captions8k).captions}
    assert numbers8k <= {sources.flickr_number(name) for name in names}
    in_train, in_val, in_test = (len(numbers8k & set(map(int, lists[split]))) for split in SPLITS)
    assert in_train + in_val + in_test == 7091
    expected = {
        "train": [29783, 1000, 1000],
        "test": [29783 - in_train, 1000 - in_val, 1000 + in_train + in_val],
    }
    for split8k, counts in expected.items():
        source = sources.flickr30k_8k(given30k, Given(captions8k, split8k, npz=features8k))
        splits = list(splits_of(source).values())
        assert [splits.count(split) for split in SPLITS] == counts
        assert totals(source) == (31783 + 7091, 31783 + 5 * 7091)
