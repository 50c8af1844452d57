"""Features: what is imported and computed, that it can be interrupted anywhere, and the check against the captions.

Photos, captions and features are made here. In one process the encoder is a stand-in with the real one's interface;
in several it is a tiny CLIP of open_clip.
"""

import io
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffcap_dist.data.photo import decode_photo
from diffcap_dist.data.shard_format import ShardIndex, open_shard
from shards import feature_import, features
from shards.feature_encoding import compute
from shards.feature_import import import_npy_dir, import_npz
from shards.output import Folder
from shards.verification import _features_of, verify
from shards.writer import RawSample, ShardSettings, Source, write_dataset
from tests.test_image_encoder import saved_clip

WORDS = ["dog", "cat", "man", "woman", "boy", "girl", "ball", "water", "snow", "grass", "beach", "street"]
WORDS += ["red", "blue", "green", "black", "runs", "sits"]
NUM_PHOTOS = 300
NAMES = np.array([f"{i}.jpg" for i in range(NUM_PHOTOS)])


def make_dataset(
    directory: Path, captions: list[list[str]], photos: list[bytes] | None, samples_per_shard: int
) -> None:
    """The one place that knows how datasets come to be: photo `i` has captions[i]; photos None: captions only."""
    samples = [
        RawSample(str(i), texts, "train", "made", None if photos is None else partial(bytes, photos[i]))
        for i, texts in enumerate(captions)
    ]
    settings = ShardSettings(samples_per_shard=samples_per_shard, min_side=1)
    write_dataset(Source(samples, [], {}, []), Folder(directory), settings)


def made_captions(seed: int) -> list[list[str]]:
    chance = np.random.RandomState(seed)
    return [[" ".join(chance.choice(WORDS, 5)) for _ in range(2)] for _ in range(NUM_PHOTOS)]


def made_features(captions: list[list[str]]) -> np.ndarray:
    """features_NF: a random projection of each photo's words, with as much noise."""
    chance = np.random.RandomState(7)
    words_NV = np.array([[word in " ".join(texts).split() for word in WORDS] for texts in captions], float)
    signal_NF = words_NV @ chance.randn(len(WORDS), 32)
    return (signal_NF + signal_NF.std() * chance.randn(len(captions), 32)).astype(np.float32)


FITTING_NF = made_features(made_captions(0))


@pytest.fixture(scope="module")
def dataset_without_features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("captions") / "out"
    make_dataset(directory, made_captions(0), None, 50)
    return directory


@pytest.fixture
def dataset(dataset_without_features: Path, tmp_path: Path) -> Path:
    """300 photos' captions in 6 shards."""
    for path in dataset_without_features.iterdir():
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / path.name).write_bytes(path.read_bytes())
    return tmp_path / "out"


def saved_npz(path: Path, **changes: np.ndarray) -> Path:
    np.savez(path, **{"names": NAMES, "image_features": FITTING_NF, **changes})
    return path


def saved_npy_dir(folder: Path, features_NX: np.ndarray, ending: str = ".jpg.npy") -> Path:
    folder.mkdir()
    for i, array in enumerate(features_NX):
        np.save(folder / f"{i}{ending}", array)
    return folder


def stored(directory: Path, name: str) -> tuple[np.ndarray, np.ndarray | None]:
    """pooled and patches of the photos in the order of their numbers."""
    index = ShardIndex.load(directory)
    pooled, patches = {}, {}
    for info in index.shards:
        shard = open_shard(directory, info)
        pooled_NF, patches_NPF = shard.features(index.feature(name))
        for i in range(len(shard)):
            number = int(shard.record(i)["photo_id"])
            pooled[number] = pooled_NF[i]
            if patches_NPF is not None:
                patches[number] = patches_NPF[i]
    in_order = [np.stack([rows[i] for i in range(len(rows))]) if rows else None for rows in (pooled, patches)]
    return in_order[0], in_order[1]


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


# ---- import ----


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("ending", ["", ".jpg"])
def test_npz_rows_go_to_their_photos(dataset: Path, save: Callable, ending: str) -> None:
    order = np.random.RandomState(1).permutation(NUM_PHOTOS)
    npz = dataset.parent / "fits.npz"
    save(npz, names=np.array([f"{i}{ending}" for i in order]), image_features=FITTING_NF[order])
    made = import_npz(dataset, npz, "fits")
    assert made.alignment is not None and made.alignment.z > 8 and made.notes == ()
    pooled_NF, patches_NPF = stored(dataset, "fits")
    assert patches_NPF is None
    np.testing.assert_array_equal(pooled_NF, FITTING_NF.astype(np.float16))
    assert verify(dataset) == []
    before = files_of(dataset)
    assert import_npz(dataset, npz, "fits").already_complete
    assert files_of(dataset) == before


@pytest.mark.parametrize("ending", [".npy", ".jpg.npy"])
def test_a_folder_of_npy_files(dataset: Path, ending: str) -> None:
    folder = saved_npy_dir(dataset.parent / "npy", FITTING_NF, ending)
    made = import_npy_dir(dataset, folder, "fits")
    assert made.alignment is not None and made.alignment.z > 8 and made.info.patches is None
    np.testing.assert_array_equal(stored(dataset, "fits")[0], FITTING_NF.astype(np.float16))
    assert verify(dataset) == [] and import_npy_dir(dataset, folder, "fits").already_complete


def test_patch_files_are_kept_and_their_mean_is_pooled(dataset: Path) -> None:
    patches_NPF = np.stack([FITTING_NF - 1, FITTING_NF + 1, FITTING_NF], axis=1)
    made = import_npy_dir(dataset, saved_npy_dir(dataset.parent / "npy", patches_NPF), "grid")
    assert made.info.patches == (3, 32) and made.info.pooled_dim == 32
    found_NF, found_NPF = stored(dataset, "grid")
    np.testing.assert_array_equal(found_NPF, patches_NPF.astype(np.float16))
    np.testing.assert_allclose(found_NF, FITTING_NF, rtol=2e-3, atol=1e-3)
    assert verify(dataset) == []


def test_one_shards_features_at_a_time(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are read in the order of the shards, and each shard is written before the next is read."""
    folder = saved_npy_dir(dataset.parent / "npy", FITTING_NF)
    events: list[str] = []
    read, write = feature_import._read_npy, features.atomic_write

    def noted_write(path: Path, data: bytes) -> None:
        events.append("write")
        write(path, data)

    monkeypatch.setattr(feature_import, "_read_npy", lambda path: events.append("read") or read(path))
    monkeypatch.setattr(features, "atomic_write", noted_write)
    import_npy_dir(dataset, folder, "fits")
    assert events == ["read"] + (["read"] * 50 + ["write"]) * 6


def test_extra_photos_and_other_files_are_counted(dataset: Path) -> None:
    folder = saved_npy_dir(dataset.parent / "npy", np.concatenate([FITTING_NF, FITTING_NF[:2]]))
    (folder / "README").write_text("made by hand")
    made = import_npy_dir(dataset, folder, "fits")
    assert any("1 entries" in note and "README" in note for note in made.notes)
    assert any("2 photos that are not in the dataset" in note for note in made.notes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"names": NAMES[:-2], "image_features": FITTING_NF[:-2]}, "lacks features of 2.*298, 299"),
        ({"names": NAMES[:-1]}, "299 names, but image_features has 300 rows"),
        ({"names": np.array(["1.jpg", *NAMES[1:]])}, "photo 1 is named more than once"),
        ({"more": FITTING_NF}, "one 2-d float array.*image_features, more"),
        ({"image_features": np.arange(300)}, "one 2-d float array.*none"),
        ({"image_features": FITTING_NF * 1e6}, r"bad\.npz: photo 0 .*not finite in fp16"),
    ],
)
def test_bad_npz_files(dataset: Path, change: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        import_npz(dataset, saved_npz(dataset.parent / "bad.npz", **change), "bad")
    assert ShardIndex.load(dataset).features == {}


def test_an_npz_without_names_or_with_a_flipped_byte(dataset: Path) -> None:
    np.savez(dataset.parent / "bad.npz", image_features=FITTING_NF)
    with pytest.raises(ValueError, match="no `names`"):
        import_npz(dataset, dataset.parent / "bad.npz", "bad")
    content = bytearray(saved_npz(dataset.parent / "flip.npz").read_bytes())
    content[content.index(FITTING_NF[150].tobytes())] ^= 1
    (dataset.parent / "flip.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"flip\.npz.*image_features is damaged"):
        import_npz(dataset, dataset.parent / "flip.npz", "bad")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), r"lacks features of 1 .*17\.npy"),
        (lambda path: np.save(path, np.full(32, np.nan)), r"17\.jpg\.npy.*not finite"),
        (lambda path: np.save(path, np.full(32, 1e6)), r"17\.jpg\.npy.*not finite"),
        (lambda path: np.save(path, np.zeros(31)), r"17\.jpg\.npy.*shape \(31,\).*shape \(32,\)"),
        (lambda path: np.save(path, np.zeros((2, 32))), r"17\.jpg\.npy.*shape \(2, 32\)"),
        (lambda path: np.save(path, np.zeros(32, int)), r"17\.jpg\.npy.*type int64"),
        (lambda path: path.write_bytes(path.read_bytes()[:100]), r"17\.jpg\.npy can't be read"),
        (lambda path: path.write_bytes(b""), r"17\.jpg\.npy can't be read"),
        (lambda path: np.save(path.with_name("17.npy"), np.zeros(32)), "photo 17 is named more than once"),
    ],
)
def test_bad_npy_files_are_named(dataset: Path, damage: Callable[[Path], object], message: str) -> None:
    folder = saved_npy_dir(dataset.parent / "npy", FITTING_NF)
    damage(folder / "17.jpg.npy")
    with pytest.raises(ValueError, match=message):
        import_npy_dir(dataset, folder, "bad")
    assert ShardIndex.load(dataset).features == {}


def test_no_npy_folder(dataset: Path) -> None:
    with pytest.raises(ValueError, match=r"no folder of \.npy"):
        import_npy_dir(dataset, dataset.parent / "nowhere", "bad")
    with pytest.raises(ValueError, match=r"has no \.npy files"):
        import_npy_dir(dataset, dataset, "bad")


def test_registered_features_are_never_overwritten(dataset: Path) -> None:
    import_npz(dataset, saved_npz(dataset.parent / "a.npz"), "fits")
    folder = saved_npy_dir(dataset.parent / "npy", FITTING_NF)
    import_npy_dir(dataset, folder, "dir")
    np.save(folder / "0.jpg.npy", FITTING_NF[0] * 2)
    before = files_of(dataset)
    with pytest.raises(ValueError, match="already there, and not the same"):
        import_npz(dataset, saved_npz(dataset.parent / "a.npz", image_features=FITTING_NF * 2), "fits")
    with pytest.raises(ValueError, match="already there, and not the same"):
        import_npy_dir(dataset, folder, "dir")
    assert files_of(dataset) == before


def test_damaged_features_are_found(dataset: Path) -> None:
    import_npz(dataset, saved_npz(dataset.parent / "a.npz"), "fits")
    path = dataset / "train-000003.fits.npy"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    (damage,) = verify(dataset)
    assert path.name in damage and "sha256" in damage


@pytest.mark.skipif("DIFFCAP_DATA" not in os.environ, reason="needs the real features: set DIFFCAP_DATA")
def test_the_real_features_of_flickr8k(tmp_path: Path) -> None:
    from shards.sources import photo_id_of

    folder = Path(os.environ["DIFFCAP_DATA"]) / "flickr8k"
    texts: dict[str, list[str]] = {}
    for line in (folder / "captions.txt").read_text(encoding="utf-8").splitlines()[1:]:
        name, caption = line.split(",", 1)
        texts.setdefault(photo_id_of(name), []).append(caption)
    with np.load(folder / "image_features_512.npz") as arrays:
        photo_ids = [photo_id_of(str(name)) for name in arrays["names"]]
    make_dataset(tmp_path / "out", [texts[one] for one in photo_ids], None, 1000)
    by_number = tmp_path / "numbers.npz"
    with np.load(folder / "image_features_512.npz") as arrays:
        (array_NF,) = (arrays[name] for name in arrays.files if name != "names")
    for shift, fits in ((0, True), (1, False)):
        np.savez(by_number, names=np.arange(len(array_NF)).astype(str), features=np.roll(array_NF, shift, axis=0))
        if fits:
            measured = import_npz(tmp_path / "out", by_number, "fits").alignment
            assert measured is not None and measured.z > 9 and measured.samples == len(array_NF)
        else:
            with pytest.raises(ValueError, match="don't fit the captions"):
                import_npz(tmp_path / "out", by_number, "shifted")


# ---- the check against the captions ----


@pytest.mark.parametrize("shift", [1, 7])
def test_shifted_features_are_not_registered(dataset: Path, shift: int) -> None:
    npz = saved_npz(dataset.parent / "shifted.npz", image_features=np.roll(FITTING_NF, shift, axis=0))
    with pytest.raises(ValueError, match="don't fit the captions"):
        import_npz(dataset, npz, "shifted")
    assert ShardIndex.load(dataset).features == {}


def test_alignment_is_chance_for_unrelated_captions() -> None:
    for seed in range(1, 6):
        assert not features.alignment(FITTING_NF, made_captions(seed)).fits


def test_large_sets_are_sampled_evenly_over_all_shards(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import_npz(dataset, saved_npz(dataset.parent / "a.npz"), "fits")
    index = ShardIndex.load(dataset)
    seen: list[tuple[np.ndarray, list[list[str]]]] = []
    monkeypatch.setattr(features, "MAX_ALIGNMENT_SAMPLES", 100)
    monkeypatch.setattr(features, "alignment", lambda pooled_NF, captions: seen.append((pooled_NF, captions)))
    features._measure(dataset, index, index.feature("fits"))
    ((pooled_NF, captions),) = seen
    chosen = range(0, NUM_PHOTOS, 3)
    np.testing.assert_array_equal(pooled_NF, FITTING_NF[chosen].astype(np.float16))
    assert captions == [made_captions(0)[i] for i in chosen]


def test_a_photo_in_two_splits_is_measured_once(tmp_path: Path) -> None:
    """Else the fit would know its features, and rows that are shifted would seem to match."""
    captions = made_captions(0)
    samples = [
        RawSample(str(i), [text], split, "made", None, references=texts)
        for i, texts in enumerate(captions)
        for split, text in zip(("train", "val"), texts)
    ]
    write_dataset(Source(samples, [], {"command": "x"}, []), Folder(tmp_path), ShardSettings(), workers=1)
    made = import_npz(tmp_path, saved_npz(tmp_path / "a.npz"), "fits")
    assert made.alignment == features.alignment(FITTING_NF.astype(np.float16), captions)
    with pytest.raises(ValueError, match="don't fit the captions"):
        import_npz(tmp_path, saved_npz(tmp_path / "b.npz", image_features=np.roll(FITTING_NF, 1, axis=0)), "shifted")


# ---- computed, in this process ----


def install_encoder(monkeypatch: pytest.MonkeyPatch, fail_at: int | None = None, value: float | None = None) -> list:
    """A stand-in for the encoder module: a photo's size says which row of features it has."""
    features_NF = torch.from_numpy(FITTING_NF)
    encoded: list[int] = []

    class ImageEncoder:
        name, source, weights_sha256, preprocessing = "toy", "toy / made", "00", "none"
        pooled_dim, patches_shape = features_NF.shape[1], (2, 3)

        def __init__(self, name: str, pretrained: str) -> None:
            assert (name, pretrained) == ("toy", "made")

        def to(self, device: object) -> None:
            pass

        def pixel_transform(self) -> Callable[[bytes], torch.Tensor]:
            def number(data: bytes) -> torch.Tensor:
                image = decode_photo(data)
                return torch.tensor(image.width + 100 * image.height)

            number.described = "nobody"  # type: ignore[attr-defined]
            return number

        def __call__(self, images_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            if fail_at is not None and len(encoded) >= fail_at:
                raise KeyboardInterrupt
            encoded.extend(images_BCHW.tolist())
            numbers_B = images_BCHW.cpu() - 101
            pooled_BF = features_NF[numbers_B] if value is None else torch.full((len(numbers_B), 32), value)
            return pooled_BF, numbers_B.half()[:, None, None].expand(-1, 2, 3)

    module = types.ModuleType("diffcap_dist.model.image_encoder")
    module.ImageEncoder = ImageEncoder  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return encoded


def numbered_photo(number: int) -> bytes:
    """A PNG whose size is its number: width - 1 + 100 * (height - 1)."""
    buffer = io.BytesIO()
    Image.new("L", (number % 100 + 1, number // 100 + 1)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """300 numbered photos in 3 shards."""
    make_dataset(tmp_path / "photos", made_captions(0), [numbered_photo(i) for i in range(NUM_PHOTOS)], 100)
    return tmp_path / "photos"


def compute_toy(directory: Path, patches: bool = True) -> features.Registered:
    return compute(directory, "toy", "made", patches, workers=1)


def test_computed_features_resume_and_are_checked(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_encoder(monkeypatch, fail_at=150)
    with pytest.raises(KeyboardInterrupt):
        compute_toy(photos)
    assert ShardIndex.load(photos).features == {}
    encoded = install_encoder(monkeypatch)
    made = compute_toy(photos)
    assert len(encoded) == 200 and made.shards_kept == 1
    pooled_NF, patches_NPF = stored(photos, "toy")
    np.testing.assert_array_equal(pooled_NF, FITTING_NF.astype(np.float16))
    assert patches_NPF is not None and patches_NPF[:, 1, 2].tolist() == list(range(NUM_PHOTOS))
    assert compute_toy(photos).already_complete and len(encoded) == 200
    assert verify(photos) == [] and not list(photos.glob("*unfinished*")) and not list(photos.glob("*.tmp"))


@pytest.mark.parametrize("damage", ["file", "cut line", "other tar", "gone"])
def test_what_is_not_sure_to_be_finished_is_encoded_again(
    photos: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    install_encoder(monkeypatch, fail_at=250)  # two shards are finished
    with pytest.raises(KeyboardInterrupt):
        compute_toy(photos)
    progress = photos / "toy.unfinished.jsonl"
    if damage == "file":
        path = photos / "train-000001.toy.patches.npy"
        path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    elif damage == "cut line":
        progress.write_bytes(progress.read_bytes()[:-20])
    elif damage == "other tar":
        progress.write_text(progress.read_text().replace(ShardIndex.load(photos).shards[1].sha256, "0" * 64))
    else:
        (photos / "train-000001.toy.npy").unlink()
        (photos / "train-000001.toy.npy.tmp").write_bytes(b"half")
    encoded = install_encoder(monkeypatch, fail_at=150)
    with pytest.raises(KeyboardInterrupt):
        compute_toy(photos)
    encoded = install_encoder(monkeypatch)
    assert compute_toy(photos).shards_kept == 2 and len(encoded) == 100
    assert verify(photos) == [] and not list(photos.glob("*.tmp"))
    np.testing.assert_array_equal(stored(photos, "toy")[0], FITTING_NF.astype(np.float16))


def test_parts_of_an_array_are_merged_by_the_last(
    photos: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The same bytes as one run writes, whatever was left by parts of another number, or damaged meanwhile."""
    whole = tmp_path / "whole"
    shutil.copytree(photos, whole)
    encoded = install_encoder(monkeypatch)

    def part(number: int, num_parts: int) -> features.Registered:
        return compute(photos, "toy", "made", True, 1, (number, num_parts))

    assert part(1, 2).shards_owed == 2 and len(encoded) == 100
    assert part(0, 3).shards_owed == 1 and part(0, 3).shards_kept == 1 and len(encoded) == 200
    assert ShardIndex.load(photos).features == {}
    file = photos / f"{ShardIndex.load(photos).shards[0].name}.toy.npy"
    intact = file.read_bytes()
    file.write_bytes(intact[:-1])
    assert part(2, 3).shards_owed == 1 and ShardIndex.load(photos).features == {}
    last = part(0, 3)
    assert file.read_bytes() == intact and last.alignment is not None and last.shards_owed == 0
    assert part(1, 3).already_complete and len(encoded) == 400
    assert compute_toy(whole).info == last.info
    for name in (path.name for path in whole.glob("*.npy")):
        assert (whole / name).read_bytes() == (photos / name).read_bytes()
    assert verify(photos) == [] and not list(photos.glob("*unfinished*"))


def test_a_kill_between_the_index_and_the_end_leaves_nothing(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_encoder(monkeypatch)
    compute_toy(photos)
    (photos / "toy.unfinished.jsonl").write_text("")
    assert compute_toy(photos).already_complete and not list(photos.glob("*unfinished*"))


def test_patches_join_pooled_features_that_stay_untouched(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_encoder(monkeypatch)
    compute_toy(photos, patches=False)
    pooled = {path.name: path.stat().st_mtime_ns for path in photos.glob("*.toy.npy")}
    made = compute_toy(photos)
    assert made.info.patches == (2, 3) and verify(photos) == []
    assert {path.name: path.stat().st_mtime_ns for path in photos.glob("*.toy.npy")} == pooled


def test_features_that_are_not_finite_are_not_written(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_encoder(monkeypatch, value=float("nan"))
    with pytest.raises(ValueError, match=r"train-000000\.toy\.npy: the features of sample 0 are not finite"):
        compute_toy(photos)


def test_captions_only_have_nothing_to_encode(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_encoder(monkeypatch)
    with pytest.raises(ValueError, match=r"sample 0 has no photo to encode.*--npz"):
        compute_toy(dataset)


def test_a_number_of_workers_that_is_none(photos: Path) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        compute(photos, "toy", "made", False, workers=0)


# ---- computed, in several processes ----

COMPUTE = "import sys; from pathlib import Path; from shards.feature_encoding import compute"


def noisy_photo(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.RandomState(number).randint(0, 256, (40, 40, 3), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def noise(tmp_path: Path) -> Path:
    """60 photos in 20 shards: too few for the check against the captions, which they would fail."""
    make_dataset(tmp_path / "noise", [["a"]] * 60, [noisy_photo(i) for i in range(60)], 3)
    saved_clip("resnet", tmp_path / "clip")
    return tmp_path / "noise"


def children() -> Iterator[int]:
    for process in multiprocessing.active_children():
        if process.pid is not None:
            yield process.pid


@pytest.mark.slow
def test_a_dead_worker_is_an_error_at_once_and_any_number_of_workers_gives_the_same_bytes(
    noise: Path, tmp_path: Path
) -> None:
    clip, alone = str(tmp_path / "clip"), tmp_path / "alone"
    alone.mkdir()
    for name, content in files_of(noise).items():
        (alone / name).write_bytes(content)
    progress = noise / "clip.unfinished.jsonl"
    with ThreadPoolExecutor(1) as thread:
        failing = thread.submit(compute, noise, clip, "", True, 2)
        while not failing.done() and (not progress.exists() or len(progress.read_text().splitlines()) < 2):
            time.sleep(0.005)
        os.kill(next(children()), signal.SIGKILL)
        with pytest.raises(ValueError, match="a worker process died"):
            failing.result(timeout=60)
    assert list(children()) == [] and ShardIndex.load(noise).features == {}
    made = compute(noise, clip, "", True, 2)
    assert 1 <= made.shards_kept < 20
    compute(alone, clip, "", True, 1)
    assert files_of(noise) == files_of(alone)
    assert verify(noise) == []


@pytest.mark.slow
def test_workers_end_with_a_parent_that_is_killed(noise: Path, tmp_path: Path) -> None:
    program = f"{COMPUTE}\nif __name__ == '__main__': compute(Path(sys.argv[1]), sys.argv[2], '', False, 2)"
    (tmp_path / "run.py").write_text(program)
    command = [sys.executable, str(tmp_path / "run.py"), str(noise), str(tmp_path / "clip")]
    environment = {**os.environ, "PYTHONPATH": str(Path(features.__file__).parents[1])}
    # The workers hold the write end of stdout: it ends when the last of them does.
    parent = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    progress = noise / "clip.unfinished.jsonl"
    while parent.poll() is None and (not progress.exists() or len(progress.read_text().splitlines()) < 2):
        time.sleep(0.005)
    parent.kill()
    assert parent.stdout is not None
    watchdog = threading.Timer(30, parent.stdout.close)
    watchdog.start()
    assert parent.stdout.read() == b"" and watchdog.is_alive()
    watchdog.cancel()
    parent.wait()
    kept = compute(noise, str(tmp_path / "clip"), "", False, 1).shards_kept
    assert 1 <= kept < 20 and verify(noise) == [] and not list(noise.glob("*.tmp"))


def test_two_runs_may_write_different_features_at_once(dataset: Path, tmp_path: Path) -> None:
    npz = saved_npz(tmp_path / "f.npz")
    with ThreadPoolExecutor(4) as pool:  # locks are of open files, so threads stand for processes
        runs = [pool.submit(import_npz, dataset, npz, f"f{number}") for number in range(4)]
        assert all(run.result().alignment is not None for run in runs)
    assert ShardIndex.load(dataset).features.keys() == {"f0", "f1", "f2", "f3"} and verify(dataset) == []
    assert not list(dataset.glob("unfinished/*"))


def test_a_shard_is_verified_with_its_own_feature_files_only(dataset: Path, tmp_path: Path) -> None:
    """All files of all shards for each shard would be quadratic."""
    import_npz(dataset, saved_npz(tmp_path / "f.npz"), "f")
    (info,) = _features_of(ShardIndex.load(dataset), "train-000002")
    assert info.files.keys() == {"train-000002"}


def test_two_runs_do_not_write_the_same_features_at_once(dataset: Path, tmp_path: Path) -> None:
    npz = saved_npz(tmp_path / "f.npz")
    with features.alone(dataset, "f"), pytest.raises(ValueError, match="another run is writing"):
        import_npz(dataset, npz, "f")
    assert import_npz(dataset, npz, "f").alignment is not None
