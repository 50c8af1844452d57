"""The benchmark's plain step is one more reference of the objective: the same loss and gradients, and a void comparison
is refused. The stream's gives figures of readers that gave what they were asked for, and reasons for the others."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks import make_shards, padding, reward_step, stream, stream_readers, train_step
from benchmarks.stream_environments import NotInstalled
from benchmarks.train_step import SIZES, Batch, build, check_same_loss, main, peak_bytes, peaks_apart, write_clip
from diffcap_dist.diffusion import objective

CPU = torch.device("cpu")
TINY = SIZES["tiny"]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    write_clip(TINY, folder)
    return folder


@pytest.mark.parametrize("variant", ["plain", "plain_encoding_once"])
@pytest.mark.parametrize("small_logits", [objective.SMALL_LOGITS, 0])
def test_both_steps_give_the_same_loss_and_gradients(
    variant: str, small_logits: int, clip_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(objective, "SMALL_LOGITS", small_logits)
    batch, gradients = Batch.random(TINY, CPU), {}
    for name in ("ours", variant):
        step = build(name, TINY, clip_folder, CPU)
        loss = step(batch)
        loss.backward()
        trained = {n.removeprefix("objective.network."): p for n, p in step.named_parameters() if p.requires_grad}
        gradients[name] = {"loss": loss.detach()} | {n: p.grad for n, p in trained.items()}
    not_dropped = gradients["ours"].pop("no_image")  # the published model has no vector for a hidden photo
    assert not not_dropped.any()
    torch.testing.assert_close(gradients["ours"], gradients[variant], rtol=1e-4, atol=1e-6)


def test_padding_compares_what_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "padding.json"
    small = ["--width", "64", "--layers", "1", "--rows", "3,4", "--rounds", "2", "--device", "cpu"]
    assert padding.main([*small, "--out", str(out)]) == 0
    found = json.loads(out.read_text())["rows"]
    assert found.keys() == {"3", "4"} and found["3"].keys() == {"transformers", "packed", "whole rows"}
    assert all(milliseconds > 0 for way in found["4"].values() for milliseconds in way.values())
    assert capsys.readouterr().out.count("transformers / ours: packed ") == 4
    hidden_states = padding.packed.hidden_states
    monkeypatch.setattr(padding.packed, "hidden_states", lambda *given: 1.001 * hidden_states(*given))
    with pytest.raises(ValueError, match="packed: hidden states are 1"):
        padding.main(small)


def test_a_step_on_a_reward_is_timed_beside_two_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "reward.json"
    small = ["--width", "64", "--layers", "1", "--photos", "3", "--samples", "2,4", "--rounds", "2", "--device", "cpu"]
    assert reward_step.main([*small, "--out", str(out)]) == 0
    found = json.loads(out.read_text())["samples"]
    assert found.keys() == {"2", "4"}
    assert found["4"].keys() == {"cross-entropy", "reward, masked", "reward, left to right"}
    assert all(milliseconds > 0 for milliseconds in found["4"].values())
    told = capsys.readouterr().out
    assert f"{found['2']['reward, masked'] / found['2']['cross-entropy']:.2f} times one of cross-entropy" in told


def test_different_losses_are_refused(clip_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = {name: build(name, TINY, clip_folder, CPU) for name in ("ours", "plain")}
    batch = Batch.random(TINY, CPU)
    assert check_same_loss(steps, batch).keys() == steps.keys()
    monkeypatch.setattr(train_step, "ROUNDING_WEIGHT", 0.31)
    with pytest.raises(ValueError, match="different losses"):
        check_same_loss(steps, batch)


def test_main_writes_the_ratios(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # In this process: starting two takes most of the time. The slow test below starts them.
    monkeypatch.setattr(train_step, "peaks_apart", lambda names, *rest: {n: 1 + peak_bytes(n, *rest) for n in names})
    out = tmp_path / "train_step.json"
    assert main(["--size", "tiny", "--rounds", "2", "--device", "cpu", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    for ratio in ("time_ratio", "time_ratio_encoding_once", "peak_memory_ratio"):
        assert result[ratio] > 0
    assert result["peak_memory_ratio"] == result["peak_bytes"]["plain"] / result["peak_bytes"]["ours"]
    assert all(len(seconds) == 2 for seconds in result["seconds_of_rounds"].values())
    assert "plain / ours: time" in capsys.readouterr().out


@pytest.mark.slow
def test_the_peak_of_the_plain_step_holds_all_logits(clip_folder: Path) -> None:
    large = dataclasses.replace(TINY, vocab_size=30522, num_timesteps=50)
    logits_bytes = large.num_photos * large.num_timesteps * large.max_length * large.vocab_size * 4
    peaks = peaks_apart(("ours", "plain"), large, clip_folder, CPU)
    assert peaks["plain"] > 2 * logits_bytes  # and their gradient
    assert peaks["ours"] < logits_bytes


@pytest.mark.slow
def test_the_benchmark_of_make_shards_writes_the_ratios(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "make_shards.json"
    assert make_shards.main(["--photos", "12", "--size", "300", "280", "--rounds", "1", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    speed = result["mb_per_second"]
    assert result["ratios"]["ours / tar cf"] == speed["ours, 1 worker"] / speed["tar cf"]
    assert set(result["seconds_to_open"]) == {"1000", "100000"} and "ours / ShardWriter" in capsys.readouterr().out


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    (tmp_path / "photos").mkdir()
    for number in range(2):
        Image.new("RGB", (300, 280), (90 * number, 90, 90)).save(tmp_path / f"photos/{number}.jpg")
    return tmp_path / "photos"


def in_this_process(python: Path, module: str, words: list[object], scratch: Path) -> list[str]:
    """What `stream.run_module` does, without seconds of imports for each run."""
    threads, printed = torch.get_num_threads(), io.StringIO()
    with contextlib.redirect_stdout(printed):
        stream_readers.main([str(word) for word in words])
    torch.set_num_threads(threads)
    return printed.getvalue().splitlines()


STREAM_WORDS = ["--samples", "40", "--decoded-samples", "4", "--batch-size", "2", "--samples-per-shard", "10"]


def test_the_benchmark_of_the_stream_measures_or_says_why_not(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(stream, "run_module", in_this_process)
    monkeypatch.setattr(stream, "environment_of", lambda *_: NotInstalled("no network"))
    monkeypatch.setattr(stream, "sample_at_figures", functools.partial(stream.sample_at_figures, num_shards=9, calls=9))
    out = tmp_path / "stream.json"
    words = [*STREAM_WORDS, "--workers", "0", "--rounds", "1", "--photos", str(photos), "--out", str(out)]
    assert stream.main([*words, "--readers", "ours", "webdataset", "tarfile", "litdata"]) == 0
    result, text = json.loads(out.read_text()), capsys.readouterr().out
    for name, of_reader in result["medians"].items():
        assert of_reader.keys() == {"ours", "webdataset", "tarfile"}, result["not_measured"][name]
        assert result["not_measured"][name] == {"litdata": "no network"}
    undecoded = result["medians"]["undecoded"]
    ratio = result["ratios"]["undecoded, ours / webdataset (goal 5)"]
    assert ratio == undecoded["ours"] / undecoded["webdataset"]
    assert "LitData                not measured: no network" in text and "by reading and discarding" in text


def test_a_reader_that_loses_samples_is_not_measured(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "run_module", in_this_process)
    monkeypatch.setitem(stream_readers.READERS, "tarfile", lambda setup: list(stream_readers.open_tarfile(setup))[1:])
    scale, pythons = stream.Scale(40, 4, 2, 10, (0,), 1), {"tarfile": Path(sys.executable)}
    folders, pythons = stream.write_datasets(tmp_path, scale, photos, pythons)
    runs = stream.Runs(tmp_path, scale, pythons, folders)
    runs.save_states()
    runs.round()
    assert runs.missing["undecoded"] == {"tarfile": "it gave 38 different samples of 40"}
    assert not runs.figures("undecoded")


@pytest.mark.slow
def test_a_reader_runs_in_a_process_of_its_own(photos: Path, tmp_path: Path) -> None:
    scale = stream.Scale(40, 4, 2, 10, (0,), 1)
    folders, _ = stream.write_datasets(tmp_path, scale, photos, {"ours": Path(sys.executable)})
    words = [folders["small", "ours"], "--samples", 40, "--batch-size", 2]
    run = stream.run_reader(Path(sys.executable), "ours", words, tmp_path)
    assert run["different_samples"] == 40 and run["samples_per_second"] > 0
    with pytest.raises(stream.NotMeasured, match=r"no index\.json"):
        stream.run_reader(Path(sys.executable), "ours", [tmp_path / "photos"], tmp_path)
