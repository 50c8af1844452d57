"""`make-shards` as it is typed: raw folders in, datasets and messages out."""

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffcap_dist.data.shard_format import ShardIndex, open_shard
from shards import sources
from shards.make_shards import main


def jpeg(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.RandomState(seed).randint(0, 256, (20, 24, 3), np.uint8)).save(buffer, "JPEG")
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
    return main(["flickr8k", *where, "--split", split, "--workers", "1", *more])


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


def test_scenes_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["scenes", "--out", str(tmp_path / "out"), "--train", "5", "--val", "2", "--test", "1"]
    assert main([*arguments, "--workers", "1"]) == 0
    assert "splits: test 1, train 5, val 2" in capsys.readouterr().out
    assert records(tmp_path / "out")["scene-val-000001"]["scene"]["objects"]
    assert main([*arguments, "--workers", "1", "--seed", "1"]) == 2


def test_help_answers_at_once() -> None:
    start = time.perf_counter()
    program = "import sys, shards.make_shards as m\ntry: m.main(['--help'])\nfinally: print(*sys.modules)"
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert {"torch", "numpy", "PIL"}.isdisjoint(out.split())
    assert time.perf_counter() - start < 5  # half a second on an idle machine


@pytest.mark.parametrize(
    ("more", "split", "message"),
    [
        ((), "nowhere.txt", "nowhere.txt"),
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


def test_broken_photos_are_rejected_with_a_reason(raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.effect_noise((64, 64), 50).save(raw / "photos" / "1.jpg")
    whole = (raw / "photos" / "1.jpg").read_bytes()
    (raw / "photos" / "1.jpg").write_bytes(whole[: len(whole) * 2 // 3])
    (raw / "photos" / "2.jpg").write_bytes(b"<html>not found</html>")
    (raw / "photos" / "3.jpg").write_bytes(b"")
    Image.new("RGB", (20, 20)).save(raw / "photos" / "4.jpg", "BMP")
    assert flickr8k(raw) == 2
    err = capsys.readouterr().err
    assert "4 of 10 photos were rejected (40.00%, more than 1%)" in err and "--max-rejected" in err
    assert not (raw / "out" / "index.json").exists()
    assert flickr8k(raw, "--max-rejected", "0.4") == 0
    out = capsys.readouterr().out
    assert "photos: 10 = 6 in shards + 4 rejected" in out and "continued: 2 of 2 shards" in out
    lines = [json.loads(line) for line in (raw / "out" / "rejected.jsonl").read_text().splitlines()]
    details = {line["photo_id"]: line["detail"] for line in lines}
    assert "truncated" in details["1"] and "<html>" in details["2"] and "BMP" in details["4"]
    assert records(raw / "out").keys() == {"0", "5", "6", "7", "8", "9"}


def test_a_png_called_jpg_is_kept_as_png(raw: Path) -> None:
    Image.new("RGB", (20, 20)).save(raw / "photos" / "0.jpg", "PNG")
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


# ---- other datasets ----


def test_a_folder_and_what_is_said_of_it(raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [json.dumps({"image": f"{i}.jpg", "captions": [f"photo {i}"]}) for i in range(10)]
    (raw / "captions.jsonl").write_text("\n".join(lines))
    where = ["--images", str(raw / "photos"), "--captions", str(raw / "captions.jsonl"), "--workers", "1"]
    assert main(["folder", *where, "--split", "random:0", "--out", str(raw / "out")]) == 0
    assert "photos: 10 = 10 in shards" in capsys.readouterr().out
    assert main(["info", str(raw / "out"), "--near-duplicates", "--workers", "1"]) == 0
    out = capsys.readouterr().out
    assert "test photos have a near twin in train" in out and "cut at max_length" in out
    assert main(["show", str(raw / "out"), "-n", "4", "--out", str(tmp_path / "sheet.html")]) == 0
    assert (tmp_path / "sheet.html").read_text().count("data:image/") == 4
    (raw / "out" / "index.json").unlink()
    (raw / "out" / "rejected.jsonl").unlink()
    assert main(["index", str(raw / "out"), "--workers", "1"]) == 0
    assert main(["verify", str(raw / "out"), "--workers", "1"]) == 0


def test_resized_photos_are_small_and_upright(raw: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.effect_noise((100, 60), 50).save(raw / "photos" / "0.jpg", exif=exif)
    assert flickr8k(raw, "--out", str(raw / "as_is")) == 0
    found = records(raw / "as_is")["0"]
    assert (found["width"], found["height"], found["orientation"]) == (60, 100, 6)
    assert flickr8k(raw, "--resize", "30", "--quality", "80") == 0
    found = records(raw / "out")["0"]
    assert (found["width"], found["height"]) == (30, 50) and "orientation" not in found


def test_interrupting_it_leaves_a_message_and_no_processes(raw: Path) -> None:
    """Ctrl-C in a terminal reaches the workers too."""
    program = [sys.executable, "-m", "shards.make_shards", "scenes", "--train", "20000", "--workers", "2"]
    program += ["--samples-per-shard", "50", "--out", str(raw / "out")]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored, where the tests run in the background
    try:
        running = subprocess.Popen(program, stderr=subprocess.PIPE, text=True, start_new_session=True)
    finally:
        signal.signal(signal.SIGINT, before)
    while not list((raw / "out").glob("*.tar")):
        time.sleep(0.05)
        assert running.poll() is None
    os.killpg(running.pid, signal.SIGINT)
    err = running.communicate(timeout=30)[1]
    assert running.returncode == 130 and "interrupted. Run the same command again" in err and "Traceback" not in err
    end = time.monotonic() + 10  # multiprocessing's own tracker ends a moment later
    while time.monotonic() < end and processes_of_group(running.pid):
        time.sleep(0.05)
    assert not processes_of_group(running.pid)


def processes_of_group(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
