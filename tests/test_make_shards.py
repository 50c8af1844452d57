"""`make-shards` and what it is made of: reading captions and splits, rejecting, resuming, features.

Raw datasets and features are made here; the encoder is a stand-in with the real one's interface.
"""

import csv
import io
import json
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from diffcap_dist.data.shard_format import ShardIndex, open_shard, verify
from shards import features, sources
from shards.make_shards import main
from shards.writer import UNFINISHED_FILE, RawSample, Rejected, write_dataset

WORDS = [
    "dog",
    "cat",
    "man",
    "woman",
    "boy",
    "girl",
    "ball",
    "water",
    "snow",
    "grass",
    "beach",
    "street",
    "red",
    "blue",
    "green",
    "black",
    "runs",
    "sits",
]
NUM_PHOTOS = 300


def jpeg(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.RandomState(seed).randint(0, 256, (8, 8, 3), np.uint8)).save(buffer, "JPEG")
    return buffer.getvalue()


def write_captions(path: Path, rows: list[tuple[str, str]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("image", "caption"), *rows])
    return path


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Ten photos with two captions each, and a split file for them."""
    (tmp_path / "photos").mkdir()
    for i in range(10):
        (tmp_path / "photos" / f"{i}.jpg").write_bytes(jpeg(i))
    rows = [(f"{i}.jpg", f'a "{word}" , number {i}') for i in range(10) for word in ("dog", "cat")]
    write_captions(tmp_path / "captions.txt", rows)
    (tmp_path / "split.txt").write_text("".join(f"{i}.jpg {'test' if i > 7 else 'train'}\n" for i in range(10)))
    return tmp_path


def flickr8k(raw: Path, *more: str, split: str | None = None) -> int:
    split = split or str(raw / "split.txt")
    where = [
        "--images",
        str(raw / "photos"),
        "--captions",
        str(raw / "captions.txt"),
        "--out",
        str(raw / "out"),
    ]
    return main(["flickr8k", *where, "--split", split, *more])


def records(directory: Path) -> dict[str, dict]:
    shards = [open_shard(directory, info) for info in ShardIndex.load(directory).shards]
    found = [shard.record(i) for shard in shards for i in range(len(shard))]
    return {record["photo_id"]: record for record in found}


# ---- the command ----


def test_flickr8k_end_to_end(raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert flickr8k(raw, "--samples-per-shard", "3") == 0
    out = capsys.readouterr().out
    assert "photos: 10 = 10 in shards + 0 rejected" in out
    assert "captions: 20 = 20 in shards + 0 rejected" in out
    assert "test 2, train 8" in out
    assert records(raw / "out")["9"]["captions"] == ['a "dog" , number 9', 'a "cat" , number 9']
    assert [shard.name for shard in ShardIndex.load(raw / "out").split("train")] == [
        "train-000000",
        "train-000001",
        "train-000002",
    ]
    assert main(["verify", str(raw / "out")]) == 0


def test_second_run_has_nothing_to_do_and_another_is_refused(raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert flickr8k(raw) == 0
    before = {path.name: path.stat().st_mtime_ns for path in (raw / "out").iterdir()}
    assert flickr8k(raw) == 0
    assert "is complete, nothing to do: 2 shards are skipped" in capsys.readouterr().out
    assert flickr8k(raw, split="random:0") == 2
    assert "holds another dataset (split" in capsys.readouterr().err
    (raw / "captions.txt").write_text((raw / "captions.txt").read_text().replace("dog", "fox"))
    assert flickr8k(raw) == 2
    assert before == {path.name: path.stat().st_mtime_ns for path in (raw / "out").iterdir()}


def test_complete_dataset_that_lost_a_shard_is_not_called_complete(
    raw: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert flickr8k(raw) == 0
    (raw / "out" / "test-000000.tar").unlink()
    assert flickr8k(raw) == 2
    assert "test-000000.tar" in capsys.readouterr().err


def test_verify_reports_damage(raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert flickr8k(raw) == 0
    tar = raw / "out" / "test-000000.tar"
    tar.write_bytes(tar.read_bytes().replace(b"number 9", b"number 8", 1))
    assert main(["verify", str(raw / "out")]) == 1
    captured = capsys.readouterr()
    assert "sample 9" in captured.err and "damages: 1" in captured.out


def test_scenes_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def generate(num_train: int, num_val: int, num_test: int, **_: object) -> Iterator[tuple[str, bytes, dict]]:
        for split, count in (("train", num_train), ("val", num_val), ("test", num_test)):
            for i in range(count):
                yield f"{split}{i}", jpeg(i), {"captions": ["a"], "split": split, "scene": {"objects": [i]}}

    monkeypatch.setattr("shards.scenes.generate", generate)
    arguments = ["scenes", "--out", str(tmp_path / "out"), "--train", "5", "--val", "2", "--test", "1"]
    assert main(arguments) == 0
    assert "splits: test 1, train 5, val 2" in capsys.readouterr().out
    assert records(tmp_path / "out")["val1"]["scene"] == {"objects": [1]}
    assert main([*arguments, "--seed", "1"]) == 2


def test_help_answers_at_once() -> None:
    start = time.perf_counter()
    program = "import sys, shards.make_shards as m\ntry: m.main(['--help'])\nfinally: print(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert {"torch", "numpy", "PIL"}.isdisjoint(out.split())
    assert time.perf_counter() - start < 5  # half a second on an idle machine


@pytest.mark.parametrize(
    ("more", "split", "message"),
    [
        ((), "nowhere.txt", "no such file"),
        ((), "karpathy", "needs dataset_flickr8k.json"),
        ((), "random:x", "seed must be a whole number"),
        (("--captions", "nowhere.txt"), None, "nowhere.txt"),
        (("--images", "nowhere"), None, "no folder of photos"),
        (("--samples-per-shard", "0"), None, "at least 1"),
        (("--out", str(Path(sources.__file__).parent / "made")), None, "which holds code"),
    ],
)
def test_user_errors_are_one_line(
    raw: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], split: str | None, message: str
) -> None:
    assert flickr8k(raw, *more, split=split) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and "Traceback" not in err


# ---- photos and captions that don't match ----


def test_missing_photos_stop_it_unless_allowed(raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (raw / "photos" / "3.jpg").unlink()
    assert flickr8k(raw) == 2
    err = capsys.readouterr().err
    assert "2 of 20 captions have no photo" in err and "10.0%" in err and "--allow-missing" in err
    assert not (raw / "out").exists()
    assert flickr8k(raw, "--allow-missing") == 0
    out = capsys.readouterr().out
    assert "photos: 10 = 9 in shards + 1 rejected" in out and "captions: 20 = 18 in shards + 2 rejected" in out
    (line,) = (raw / "out" / "rejected.jsonl").read_text().splitlines()
    assert json.loads(line)["photo_id"] == "3" and json.loads(line)["reason"] == sources.NO_PHOTO


def test_photos_without_caption_stop_it_unless_allowed(raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (raw / "photos" / "new.jpg").write_bytes(jpeg(99))
    (raw / "photos" / "notes.txt").write_text("no photo")
    assert flickr8k(raw) == 2
    assert "1 of 11 photos" in capsys.readouterr().err
    assert flickr8k(raw, "--allow-missing") == 0
    out = capsys.readouterr().out
    assert "photos: 11 = 10 in shards + 1 rejected" in out
    assert "1 entries of" in out and "notes.txt" in out


@pytest.mark.parametrize(("num_missing", "stops"), [(2, False), (3, True)])
def test_the_threshold_is_one_percent(tmp_path: Path, num_missing: int, stops: bool) -> None:
    texts = {str(i): ["a"] for i in range(200)}
    available = {str(i) for i in range(200 - num_missing)}
    if stops:
        with pytest.raises(ValueError, match=r"3 of 200 captions have no photo.*1\.5%"):
            sources._match(texts, available, "photos", allow_missing=False)
    else:
        usable, rejected = sources._match(texts, available, "photos", allow_missing=False)
        assert (len(usable), len(rejected)) == (198, 2)


def test_broken_photos_are_rejected_with_a_reason(raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.effect_noise((64, 64), 50).save(raw / "photos" / "1.jpg")
    whole = (raw / "photos" / "1.jpg").read_bytes()
    (raw / "photos" / "1.jpg").write_bytes(whole[: len(whole) * 2 // 3])
    (raw / "photos" / "2.jpg").write_bytes(b"<html>not found</html>")
    (raw / "photos" / "3.jpg").write_bytes(b"")
    Image.new("RGB", (4, 4)).save(raw / "photos" / "4.jpg", "BMP")
    assert flickr8k(raw) == 0
    assert "photos: 10 = 6 in shards + 4 rejected" in capsys.readouterr().out
    lines = [json.loads(line) for line in (raw / "out" / "rejected.jsonl").read_text().splitlines()]
    details = {line["photo_id"]: line["detail"] for line in lines}
    assert "truncated" in details["1"] and "<html>" in details["2"] and "BMP" in details["4"]
    assert records(raw / "out").keys() == {"0", "5", "6", "7", "8", "9"}


def test_a_png_called_jpg_is_kept_as_png(raw: Path) -> None:
    Image.new("RGB", (4, 4)).save(raw / "photos" / "0.jpg", "PNG")
    assert flickr8k(raw) == 0
    assert b"0.png\0" in (raw / "out" / "train-000000.tar").read_bytes()


def test_photos_outside_the_split_file_are_counted(raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (raw / "split.txt").write_text("0.jpg train\n1 test\nelsewhere.jpg test\n")
    assert flickr8k(raw) == 0
    out = capsys.readouterr().out
    assert "photos: 10 = 2 in shards + 8 rejected" in out and sources.NOT_IN_SPLIT in out
    assert "1 photos of the split file have no captions here" in out


def test_nothing_left_is_an_error(raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (raw / "split.txt").write_text("elsewhere.jpg train\n")
    assert flickr8k(raw) == 2
    assert "no sample is left" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"no index\.json"):
        ShardIndex.load(raw / "out")


# ---- captions.txt ----

captions_text = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), min_size=1, max_size=40).filter(
    lambda text: text == text.strip() and text
)
photo_names = st.from_regex(r"[a-z0-9_]{1,12}\.(jpg|png|JPEG)", fullmatch=True)


@settings(deadline=None)
@given(
    st.lists(st.tuples(photo_names, captions_text), min_size=1, max_size=20),
    st.sampled_from(["\n", "\r\n"]),
    st.booleans(),
    st.booleans(),
)
def test_any_captions_survive_the_csv(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[tuple[str, str]],
    end: str,
    bom: bool,
    quote_all: bool,
) -> None:
    buffer = io.StringIO()
    quoting = csv.QUOTE_ALL if quote_all else csv.QUOTE_MINIMAL
    csv.writer(buffer, lineterminator=end, quoting=quoting).writerows([("image", "caption"), *rows])
    path = tmp_path_factory.mktemp("csv") / "captions.txt"
    path.write_bytes(buffer.getvalue().encode("utf-8-sig" if bom else "utf-8"))
    expected: dict[str, list[str]] = {}
    for name, caption in rows:
        expected.setdefault(Path(name).stem, []).append(caption)
    assert sources.read_captions(path) == (expected, [])


def test_bare_commas_and_inner_quotes_are_part_of_the_caption(tmp_path: Path) -> None:
    path = tmp_path / "captions.txt"
    path.write_text('Image , Caption\n1.jpg,A dog , a cat , and a "bird" .\n\n1.jpg,"He says "" hi "" , twice"\n')
    texts, _ = sources.read_captions(path)
    assert texts == {"1": ['A dog , a cat , and a "bird" .', 'He says " hi " , twice']}


def test_blank_captions_are_rejected_by_line(tmp_path: Path) -> None:
    path = tmp_path / "captions.txt"
    path.write_text("image,caption\n1.jpg,a\n1.jpg, \n2.jpg,\n")
    texts, rejected = sources.read_captions(path)
    assert texts == {"1": ["a"]}
    assert [(one.photo_id, one.photos, one.captions, one.detail) for one in rejected] == [
        ("1", 0, 1, "line 3"),
        ("2", 0, 1, "line 4"),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected the header image,caption"),
        (b"1.jpg#0\ta dog\n", "expected the header image,caption"),
        (b"image,caption\n", "no captions"),
        (b"image,caption\n1.jpg\n", "line 2: '1.jpg' is no image name and caption"),
        (b'image,caption\n1.jpg,a\n2.jpg,"never closed\n3.jpg,b\n', "line 3.*quote"),
        (b'image,caption\n1.jpg,"open\n2.jpg,closed"\n', "line 2: a quote opens here and closes in line 3"),
        (b"image,caption\n1.jpg,caf\xe9\n", "not UTF-8"),
    ],
)
def test_bad_captions_files_say_where(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "captions.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        sources.read_captions(path)


# ---- splits ----


@settings(deadline=None)
@given(st.dictionaries(photo_names.map(lambda name: Path(name).stem), st.sampled_from(["train", "val", "test"])))
def test_split_files_of_both_kinds_say_the_same(
    tmp_path_factory: pytest.TempPathFactory, split_of: dict[str, str]
) -> None:
    folder = tmp_path_factory.mktemp("split")
    (folder / "lines").write_text("".join(f"{one}.jpg\t{split}\n" for one, split in split_of.items()))
    images = [{"filename": f"{one}.jpg", "split": split} for one, split in split_of.items()]
    (folder / "json").write_text(json.dumps({"images": images}))
    assert sources.read_split_file(folder / "lines") == split_of
    assert sources.read_split_file(folder / "json") == split_of


def test_restval_is_training_data(tmp_path: Path) -> None:
    path = tmp_path / "json"
    path.write_text(json.dumps({"images": [{"filename": "1.jpg", "split": "restval"}]}))
    assert sources.read_split_file(path) == {"1": "train"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1.jpg train\n1 test\n", "is in 'train' and in 'test'"),
        ("1.jpg\n", "line 1.*expected"),
        ("1.jpg ../up\n", "line 1.*expected"),
        ('{"photos": []}', "no Karpathy split file"),
    ],
)
def test_bad_split_files(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "split").write_text(text)
    with pytest.raises(ValueError, match=message):
        sources.read_split_file(tmp_path / "split")


@settings(deadline=None)
@given(st.integers(5, 400), st.integers(0, 2**32 - 1), st.randoms(use_true_random=False))
def test_random_splits_are_exact_and_independent_of_order(num_photos: int, seed: int, chance: object) -> None:
    photo_ids = [f"p{i}" for i in range(num_photos)]
    held_out = round(0.1 * num_photos)
    if held_out == 0:
        with pytest.raises(ValueError, match="too few"):
            sources.random_splits(photo_ids, seed)
        return
    split_of = sources.random_splits(photo_ids, seed)
    counts = [list(split_of.values()).count(split) for split in ("train", "val", "test")]
    assert counts == [num_photos - 2 * held_out, held_out, held_out]
    shuffled = photo_ids.copy()
    chance.shuffle(shuffled)  # type: ignore[attr-defined]
    assert sources.random_splits(shuffled, seed) == split_of


def test_random_split_never_changes() -> None:
    split_of = sources.random_splits([f"p{i}" for i in range(20)], 0)
    assert {one for one, split in split_of.items() if split == "val"} == {"p1", "p8"}
    assert sources.random_splits([f"p{i}" for i in range(20)], 1) != split_of


# ---- the writer ----


def samples(count: int, stop_after: int | None = None) -> Iterator[RawSample]:
    for i in range(count):
        if i == stop_after:
            raise KeyboardInterrupt
        yield RawSample(f"p{i}", ["a"], "train", "made", jpeg(i))


def test_an_interrupted_write_is_continued(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        write_dataset(samples(20, stop_after=13), tmp_path / "a", 5, {"command": "x"}, [])
    assert sorted(path.name for path in (tmp_path / "a").glob("*.tar")) == [
        "train-000000.tar",
        "train-000001.tar",
    ]
    with pytest.raises(ValueError, match=r"no index\.json"):
        ShardIndex.load(tmp_path / "a")
    (tmp_path / "a" / "train-000001.tar").write_bytes(b"half")  # what a copy tool might leave
    kept = (tmp_path / "a" / "train-000000.tar").stat().st_mtime_ns
    written = write_dataset(samples(20), tmp_path / "a", 5, {"command": "x"}, [])
    assert written.shards_kept == 1
    assert (tmp_path / "a" / "train-000000.tar").stat().st_mtime_ns == kept
    write_dataset(samples(20), tmp_path / "b", 5, {"command": "x"}, [])
    for path in (tmp_path / "b").iterdir():
        assert path.read_bytes() == (tmp_path / "a" / path.name).read_bytes()
    assert not list(tmp_path.glob(f"*/{UNFINISHED_FILE}")) and not list(tmp_path.glob("*/*.tmp"))


def test_an_interrupted_write_is_not_continued_by_another(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        write_dataset(samples(20, stop_after=13), tmp_path, 5, {"command": "x"}, [])
    with pytest.raises(ValueError, match="another dataset"):
        write_dataset(samples(20), tmp_path, 4, {"command": "x"}, [])


def test_a_folder_of_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "train-000000.tar").write_bytes(b"mine")
    with pytest.raises(ValueError, match="no dataset of ours"):
        write_dataset(samples(3), tmp_path, 5, {"command": "x"}, [])
    assert [path.name for path in tmp_path.iterdir()] == ["train-000000.tar"]


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (RawSample("p0", ["a"], "train", "made", None), "comes twice"),
        (RawSample("p", ["a"], "../train", "made", None), "split"),
        (RawSample("p", [], "train", "made", None), "has no caption"),
    ],
)
def test_samples_that_a_source_must_not_give(tmp_path: Path, sample: RawSample, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_dataset(iter([*samples(1), sample]), tmp_path, 5, {}, [])


def test_rejections_of_the_source_are_in_the_index(tmp_path: Path) -> None:
    rejected = [Rejected("q", "why", 1, 5), Rejected("r", "why", 0, 1)]
    counts = write_dataset(samples(3), tmp_path, 5, {}, rejected).index.provenance["counts"]
    assert (counts["photos"], counts["rejected_photos"], counts["rejected_captions"]) == (3, 1, 6)
    assert counts["rejected"] == {"why": {"photos": 1, "captions": 6}}


# ---- features ----


def made_captions(seed: int) -> list[tuple[str, str]]:
    chance = np.random.RandomState(seed)
    return [(f"{i}.jpg", " ".join(chance.choice(WORDS, 5))) for i in range(NUM_PHOTOS) for _ in range(2)]


def made_features(rows: list[tuple[str, str]]) -> np.ndarray:
    """features_NF: a random projection of each photo's words, with as much noise."""
    chance = np.random.RandomState(7)
    words_NV = np.zeros((NUM_PHOTOS, len(WORDS)))
    for name, caption in rows:
        for word in caption.split():
            words_NV[int(Path(name).stem), WORDS.index(word)] = 1
    signal_NF = words_NV @ chance.randn(len(WORDS), 32)
    return (signal_NF + signal_NF.std() * chance.randn(NUM_PHOTOS, 32)).astype(np.float32)


@pytest.fixture
def captions_only(tmp_path: Path) -> Path:
    """Captions of 300 photos, features that fit them in `fits.npz`, and a dataset made of both in `out`."""
    rows = made_captions(0)
    write_captions(tmp_path / "captions.txt", rows)
    names = np.array([f"{i}.jpg" for i in range(NUM_PHOTOS)])
    np.savez(tmp_path / "fits.npz", names=names, image_features=made_features(rows))
    arguments = [
        "--captions",
        str(tmp_path / "captions.txt"),
        "--split",
        "random:0",
        "--samples-per-shard",
        "50",
    ]
    made = ["flickr8k", *arguments, "--npz", str(tmp_path / "fits.npz"), "--out", str(tmp_path / "out")]
    assert main(made) == 0
    return tmp_path


def test_npz_route_makes_captions_and_features(captions_only: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected_NF = made_features(made_captions(0)).astype(np.float16)
    index = ShardIndex.load(captions_only / "out")
    info = index.feature("fits")
    for shard_info in index.shards:
        shard = open_shard(captions_only / "out", shard_info)
        pooled_NF, patches_NPF = shard.features(info)
        assert patches_NPF is None
        for i in range(len(shard)):
            assert shard.image_bytes(i) is None and shard.record(i)["sha256"] is None
            np.testing.assert_array_equal(pooled_NF[i], expected_NF[int(shard.record(i)["photo_id"])])
    assert verify(captions_only / "out") == []
    again = [
        "features",
        str(captions_only / "out"),
        "--npz",
        str(captions_only / "fits.npz"),
        "--name",
        "fits",
    ]
    capsys.readouterr()
    assert main(again) == 0
    assert "features fits are complete, nothing to do" in capsys.readouterr().out


def test_damaged_features_are_found(captions_only: Path) -> None:
    path = captions_only / "out" / "val-000000.fits.npy"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    (damage,) = verify(captions_only / "out")
    assert "val-000000.fits.npy" in damage and "sha256" in damage


@pytest.mark.parametrize("shift", [1, 7])
def test_shifted_features_are_not_registered(
    captions_only: Path, capsys: pytest.CaptureFixture[str], shift: int
) -> None:
    arrays = dict(np.load(captions_only / "fits.npz"))
    shifted = np.roll(arrays["image_features"], shift, axis=0)
    np.savez(captions_only / "shifted.npz", names=arrays["names"], image_features=shifted)
    assert main(["features", str(captions_only / "out"), "--npz", str(captions_only / "shifted.npz")]) == 2
    assert "don't fit the captions" in capsys.readouterr().err
    assert ShardIndex.load(captions_only / "out").features.keys() == {"fits"}


def test_other_features_of_the_same_name_are_refused(captions_only: Path) -> None:
    arrays = dict(np.load(captions_only / "fits.npz"))
    np.savez(captions_only / "fits.npz", names=arrays["names"], image_features=arrays["image_features"] * 2)
    with pytest.raises(ValueError, match="already there, and not the same"):
        features.import_npz(captions_only / "out", captions_only / "fits.npz", "fits")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda a: {**a, "names": a["names"][:-2], "image_features": a["image_features"][:-2]},
            "lacks features of 2",
        ),
        (lambda a: {**a, "names": a["names"][:-1]}, "299 names, but image_features has 300 rows"),
        (lambda a: {**a, "names": np.array(["1.jpg", *a["names"][1:]])}, "photo 1 is named more than once"),
        (lambda a: {**a, "more": a["image_features"]}, "one 2-d float array.*image_features, more"),
        (lambda a: {"names": a["names"]}, "one 2-d float array.*none"),
        (lambda a: {"image_features": a["image_features"]}, "no `names`"),
        (lambda a: {**a, "image_features": a["image_features"] * 1e6}, "not finite in fp16"),
    ],
)
def test_bad_feature_files(
    captions_only: Path, change: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]], message: str
) -> None:
    np.savez(captions_only / "bad.npz", **change(dict(np.load(captions_only / "fits.npz"))))
    with pytest.raises(ValueError, match=message):
        features.import_npz(captions_only / "out", captions_only / "bad.npz", "bad")
    assert "bad" not in ShardIndex.load(captions_only / "out").features


def test_names_without_ending_fit_too(captions_only: Path) -> None:
    arrays = dict(np.load(captions_only / "fits.npz"))
    bare = np.array([Path(name).stem for name in arrays["names"]])
    np.savez(captions_only / "bare.npz", names=bare, image_features=arrays["image_features"])
    assert features.import_npz(captions_only / "out", captions_only / "bare.npz", "bare").alignment.z > 4


def test_alignment_is_chance_for_unrelated_captions() -> None:
    features_NF = made_features(made_captions(0))
    for seed in range(1, 6):
        rows = made_captions(seed)
        captions = [[caption for _, caption in rows[2 * i : 2 * i + 2]] for i in range(NUM_PHOTOS)]
        assert abs(features.alignment(features_NF, captions).z) < features.MIN_ALIGNMENT_Z


def install_encoder(monkeypatch: pytest.MonkeyPatch, rows: list[tuple[str, str]], fail_at: int | None = None) -> list:
    """A stand-in for the encoder module: a photo's first pixel says which row of features it has."""
    import torch

    features_NF = torch.from_numpy(made_features(rows))
    encoded: list[int] = []

    class ImageEncoder:
        name, source, weights_sha256, preprocessing = "toy", "toy / made", "00", "none"
        pooled_dim, patches_shape = features_NF.shape[1], (2, 3)

        def __init__(self, name: str, pretrained: str) -> None:
            assert (name, pretrained) == ("toy", "made")

        def to(self, device: object) -> None:
            pass

        def load_images(self, images: list[Image.Image]) -> torch.Tensor:
            return torch.tensor([image.width + 100 * image.height for image in images])

        def __call__(self, images_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            if fail_at is not None and len(encoded) >= fail_at:
                raise KeyboardInterrupt
            encoded.extend(images_BCHW.tolist())
            numbers_B = images_BCHW.cpu() - 101
            return features_NF[numbers_B], numbers_B.half()[:, None, None].expand(-1, 2, 3)

    module = types.ModuleType("diffcap_dist.model.image_encoder")
    module.ImageEncoder = ImageEncoder  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return encoded


def numbered_photo(number: int) -> bytes:
    """A PNG whose size is its number: width - 1 + 100 * (height - 1)."""
    buffer = io.BytesIO()
    Image.new("L", (number % 100 + 1, number // 100 + 1)).save(buffer, "PNG")
    return buffer.getvalue()


def test_computed_features_resume_and_are_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = made_captions(0)
    raw = [RawSample(str(i), [rows[2 * i][1]], "train", "made", numbered_photo(i)) for i in range(NUM_PHOTOS)]
    write_dataset(iter(raw), tmp_path, 100, {}, [])
    command = ["features", str(tmp_path), "--encoder", "toy", "--pretrained", "made", "--patches"]
    install_encoder(monkeypatch, rows, fail_at=150)
    with pytest.raises(KeyboardInterrupt):
        main(command)
    assert ShardIndex.load(tmp_path).features == {}
    encoded = install_encoder(monkeypatch, rows)
    assert main(command) == 0
    assert len(encoded) == 200
    assert "1 of 3 shards were complete and are kept" in capsys.readouterr().out
    index = ShardIndex.load(tmp_path)
    pooled_NF, patches_NPF = open_shard(tmp_path, index.shards[2]).features(index.feature("toy"))
    np.testing.assert_array_equal(pooled_NF, made_features(rows)[200:].astype(np.float16))
    assert patches_NPF is not None and patches_NPF[:, 1, 2].tolist() == list(range(200, 300))
    assert main(command) == 0 and len(encoded) == 200
    assert verify(tmp_path) == [] and not list(tmp_path.glob("*unfinished*"))


def test_captions_only_have_nothing_to_encode(
    captions_only: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install_encoder(monkeypatch, made_captions(0))
    assert main(["features", str(captions_only / "out"), "--encoder", "toy", "--pretrained", "made"]) == 2
    assert "no photo to encode" in capsys.readouterr().err
