"""The report page: whole, closed in itself, honest about what a run lacks."""

import dataclasses
import html
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffcap_dist.config import Config, ConfigError, load_config, save_config
from diffcap_dist.report import (
    BOTTOM,
    TOP,
    RunData,
    changed_words,
    chart,
    charts,
    compact,
    draft_rows,
    duration,
    last_of_each_step,
    main,
    picture_uri,
    round_ticks,
    score_tile,
    spread,
    thinned,
    write_report,
)
from diffcap_dist.run_dir import RunDir
from shards.output import Folder
from shards.scenes import generate
from shards.writer import ShardSettings, Source, write_dataset

NUM_TEST = 30
EVIL = "<script>alert('1')</script> & a red circle"
ROW = {"bleu_4": 0.25, "cider_d": 0.5, "scene_accuracy": 0.4}
SCORES: dict[str, Any] = {
    **{"split": "test", "photos": NUM_TEST, "bleu_4": 0.5, "cider_d": 1.5, "scene_accuracy": 0.75},
    **{"num_inference_steps": 7, "guidance_scale": 1.5, "candidates": 1, "step": 20, "world_size": 2},
    **{"seconds": 425.0, "captions_per_second": 30.0, "gap_closed": 0.625, "hardware": {"cpus": 2, "gpu": None}},
    **{"floor": {**ROW, "caption": "a <b>floor</b>"}, "human": {"bleu_4": 0.65, "cider_d": 3.0, "scene_accuracy": 1.0}},
}


class Tags(HTMLParser):
    """Every start tag of a page with its attributes, and the tags left open at the end."""

    VOID = ("meta", "link", "img", "line", "path", "br")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def count(self, tag: str, css_class: str) -> int:
        return sum(name == tag and css_class in (attrs.get("class") or "").split() for name, attrs in self.found)


def write_shards(folder: Path, with_images: bool) -> list[tuple[str, dict[str, Any]]]:
    """A dataset of scenes; returns (key, record) of the test split."""
    samples = list(generate(4, 4, NUM_TEST, seed=1, image_size=16))
    if not with_images:
        samples = [dataclasses.replace(sample, image=None, scene=None) for sample in samples]
    source = Source(samples, [], {"command": "test"}, [])
    write_dataset(source, Folder(folder), ShardSettings(samples_per_shard=20))  # the test split fills two shards
    return [(one.photo_id, {"captions": one.captions, "scene": one.scene}) for one in samples if one.split == "test"]


def metrics() -> list[dict[str, Any]]:
    training = [
        {"kind": "training", "step": step, "loss": 9.0 / step, "rounding": 8.0 / step, "learning_rate": 1e-3}
        | {"grad_norm": 1.0, "samples_per_second": None if step == 1 else 50.0, "seconds": 2.0 * step}
        for step in range(1, 21)
    ]
    validation = [
        {"kind": "validation", "step": step, "val_loss": 1.0, "bleu_4": 0.3, "cider_d": 1.0, "scene_accuracy": 0.6}
        for step in (10, 20)
    ]
    return [{"kind": "start", "step": 0, "run": "r", "batch": "128 photos"}, *training, *validation]


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A whole run: 30 captioned pictures, one caption of them hostile, six emergences."""
    return make_run(tmp_path, with_images=True)


def make_run(folder: Path, with_images: bool) -> RunDir:
    records = write_shards(folder / "shards", with_images)
    run = RunDir(folder / "runs" / "tiny")
    config = Config(run_dir=str(run.root))
    config.data.shards = str(folder / "shards")
    run.begin(config)
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in metrics()))
    run.scores.write_text(json.dumps(SCORES))
    run.predictions.mkdir()
    captions = [EVIL, *(record["captions"][0] for _, record in records[1:])]
    lines = [
        {"key": key, "caption": caption, "references": record["captions"]}
        for (key, record), caption in zip(records, captions)
    ]
    (run.predictions / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    emergences = [
        {"key": key, "drafts": [draft(0, 1.0, "a a a", [0.1, 0.2, 0.3]), draft(1, 0.5, caption)]}
        for (key, _), caption in zip(records[:6], captions)
    ]
    (run.predictions / "emergence.json").write_text(json.dumps(emergences))
    return run


@pytest.mark.parametrize(
    "words, title, noise",
    [
        ([], "Captions that fill in from blanks", "a share t of the words is hidden"),
        (["diffusion.kind=continuous"], "Captions that emerge from noise", "cosine schedule, 1000 timesteps"),
        (["model.kind=autoregressive"], "Captions written left to right", "none: left to right"),
    ],
)
def test_a_report_says_what_kind_of_model_it_is_of(words: list[str], title: str, noise: str, run: RunDir) -> None:
    save_config(load_config(run.config, words), run.config)
    assert main([str(run.root)]) == 0
    text = text_of(run.report.read_text())
    assert title in text and noise in text
    assert ("denoising steps" in text) == (words != ["model.kind=autoregressive"])


def draft(step: int, t: float, caption: str, confidence: list[float] | None = None) -> dict[str, Any]:
    return {"step": step, "t": t, "caption": caption} | ({} if confidence is None else {"confidence": confidence})


def text_of(page: str) -> str:
    page = re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL)
    return html.unescape(re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page)))


# ---- The page ----


def test_main_prints_the_path_of_the_page(run: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run.root)]) == 0
    assert capsys.readouterr().out.strip() == str(run.report)
    assert run.report.read_text().startswith("<!doctype html>")
    assert not list(run.root.glob("*.tmp"))


def test_page_is_closed_in_itself(run: RunDir) -> None:
    page = write_report(run).read_text()
    tags = Tags(page)
    assert tags.open == []
    targets = [attrs[name] for _, attrs in tags.found for name in ("src", "href", "srcset") if name in attrs]
    assert len(targets) > 24
    assert all(str(target).startswith("data:") for target in targets)
    assert not re.search(r"https?://|url\(|@import|<script|\son\w+=", page)


def test_page_has_all_pictures_and_numbers(run: RunDir) -> None:
    page = write_report(run).read_text()
    tags, text = Tags(page), text_of(page)
    assert tags.count("article", "shot") == 24
    assert tags.count("article", "emergence") == 6
    assert tags.count("img", "picture") == 24 + 6 + 1  # and the one beside the title
    assert tags.count("figure", "chart") == 6
    assert tags.count("p", "missing") == 0
    for said in ("0.500", "floor 0.250 · human 0.650", "75.0%", "62%", "7 min 5 s", "training 40 s", "128 photos"):
        assert said in text
    assert text.count("5 references") == 24


def test_texts_are_escaped(run: RunDir) -> None:
    page = write_report(run).read_text()
    assert EVIL in text_of(page)
    assert "<script" not in page
    assert "<b>floor" not in page


def test_facts_are_judged_against_the_picture(run: RunDir) -> None:
    page = write_report(run).read_text()
    shots = re.findall(r'<article class="shot.*?</article>', page, flags=re.DOTALL)
    assert all(re.search(r"✓ (\d+)/\1 facts true", shot) for shot in shots[1:])  # a reference states no falsehood
    emergence = page[page.index('<article class="emergence') :]
    assert "facts true" in emergence[: emergence.index("</article>")]


def test_captions_without_pictures(tmp_path: Path) -> None:
    page = write_report(make_run(tmp_path, with_images=False)).read_text()
    tags = Tags(page)
    assert tags.count("img", "picture") == 0
    assert tags.count("article", "text-only") == 24 + 6
    assert "facts true" not in page


def test_an_empty_run_says_what_it_lacks(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    config = Config(run_dir=str(run.root))
    config.data.shards = "nowhere"
    run.begin(config)
    text = text_of(write_report(run).read_text())
    for file in ("metrics.jsonl", "scores.json", "predictions/test.jsonl", "predictions/emergence.json"):
        assert f"No {file} in this run" in text
    assert "scores.json does not record the hardware" in text
    assert "BLEU-4" not in text


def test_lost_shards_missing_rows_and_curves_are_said(run: RunDir) -> None:
    run.scores.write_text(json.dumps({"split": "test", "bleu_4": 0.5}))
    run.metrics.write_text(json.dumps({"kind": "training", "step": 1, "loss": None}) + "\n")
    (Path(run.load_config().data.shards) / "index.json").unlink()
    page = write_report(run).read_text()
    text = text_of(page)
    assert "The pictures could not be read" in text
    assert "no floor row" in text
    assert "no human row" in text
    assert text.count("metrics.jsonl has no line with this") == 6
    assert Tags(page).count("article", "shot") == 24  # the captions are there all the same


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.yaml"):
        main([str(tmp_path)])
    assert list(tmp_path.iterdir()) == []


def test_retrieval_rows_become_columns(run: RunDir) -> None:
    run.scores.write_text(json.dumps({**SCORES, "retrieval": {"nearest neighbour": {"bleu_4": 0.123}}}))
    page = write_report(run).read_text()
    assert re.findall(r"<th class=\"\w*\">(.*?)</th>", page) == ["floor", "nearest neighbour", "model", "human"]
    assert "0.123" in page


def test_what_the_times_cover(run: RunDir) -> None:
    assert "for everything · training 40 s" in write_report(run).read_text()  # 30 photos at 30/s are not 425 s
    run.scores.write_text(json.dumps({**SCORES, "seconds": 1.0}))
    assert "for captioning · training 40 s" in write_report(run).read_text()


# ---- Its parts ----


def test_of_a_step_logged_twice_the_last_line_counts() -> None:
    steps = [(1, 5.0), (2, 4.0), (3, 3.0), (2, 2.0), (3, 1.0)]
    records = [{"kind": "training", "step": step, "loss": loss} for step, loss in steps]
    records.insert(4, {"kind": "validation", "step": 2, "loss": 9.0})
    kept = last_of_each_step(records, "training")
    assert [(line["step"], line["loss"]) for line in kept] == [(1, 5.0), (2, 2.0), (3, 1.0)]


def test_changed_words_are_a_shortest_edit() -> None:
    assert changed_words(["a", "red", "a"], ["a", "red", "star"]) == {2}
    assert changed_words(["red", "star"], ["a", "red", "star"]) == {0}  # what moved along has not changed
    assert changed_words(["a", "b", "c"], ["a", "c"]) == set()


def test_draft_rows_mark_changes_and_doubt() -> None:
    rows = draft_rows(
        {"key": "k", "drafts": [draft(0, 1.0, "a cat", [0.0, 1.0]), draft(1, 0.5, "a dog"), draft(2, 0, "")]}
    )
    assert [[(word.text, word.changed) for word in row.words] for row in rows] == [
        [("a", False), ("cat", False)],  # before the first draft there was nothing to change
        [("a", False), ("dog", True)],
        [],
    ]
    assert rows[0].words[0].opacity < rows[0].words[1].opacity == rows[1].words[0].opacity == 1


def test_a_confidence_too_few_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"key 'k', step 4: 2 words but 1 confidences"):
        draft_rows({"key": "k", "drafts": [draft(4, 1.0, "a cat", [0.5])]})


@pytest.mark.parametrize("top", [1e-4, 0.0021, 0.3, 0.64, 1.0, 7.3, 999.0, 1400.0, 123456.0])
def test_ticks_are_few_round_and_reach_the_top(top: float) -> None:
    ticks = round_ticks(top)
    assert 3 <= len(ticks) <= 6
    assert ticks[0] == 0
    assert top <= ticks[-1] * (1 + 1e-9) < 2 * top
    assert all(len(compact(tick)) <= 6 for tick in ticks)


def test_a_curve_breaks_where_there_is_no_value() -> None:
    drawn = chart("c", "", {"loss": [(0, 4.0), (1, None), (2, 2.0), (4, 0.0)], "empty": [(0, None)]}, {"floor": 1.0})
    assert [curve.name for curve in drawn.curves] == ["loss"]
    assert re.sub(r"[\d. ]+", "", drawn.curves[0].path) == "MML"
    heights = [y for _, y, _ in drawn.curves[0].dots]
    assert heights == [TOP, (TOP + BOTTOM) / 2, BOTTOM]
    assert drawn.levels == [("floor", "1", BOTTOM - (BOTTOM - TOP) / 4)]


def test_a_run_on_a_reward_has_its_curve_and_no_loss_of_training() -> None:
    training = [{"step": 1, "loss": -0.1, "reward": 0.5}, {"step": 2, "loss": 0.2, "reward": 0.6}]
    validation = [{"step": 2, "val_loss": 3.0, "bleu_4": 0.1, "cider_d": 0.4}]
    given = (Path("r"), Config(run_dir="r"), "", {}, training, validation, {}, {}, [], {}, {})
    drawn = {one.title: [curve.name for curve in one.curves] for one in charts(RunData(*given))}
    assert drawn["Loss"] == ["validation"] and drawn["Reward"] == ["reward"]
    plain = [{"step": 1, "loss": 2.0, "rounding": 1.9}]
    drawn = {one.title: [curve.name for curve in one.curves] for one in charts(RunData(*given[:4], plain, *given[5:]))}
    assert drawn["Loss"] == ["loss", "rounding", "validation"] and "Reward" not in drawn


def test_long_runs_are_thinned_to_means() -> None:
    points = [(float(i), None if i == 7 else 2.0 * i) for i in range(1001)]
    few = thinned(points, most=100)
    assert len(few) <= 100
    assert few[1] == (16.0, 32.0)
    assert few[0] == (5.0, pytest.approx(2 * (55 - 7) / 10))
    assert thinned(points, most=2000) == points


def test_score_tile_puts_its_marks_on_one_scale() -> None:
    tile = score_tile("bleu_4", {"bleu_4": 0.8, "floor": {"bleu_4": 0.2}, "human": {"bleu_4": 0.4}})
    assert (tile.value, tile.fill) == ("0.800", 100)
    assert tile.marks == {"floor": pytest.approx(25), "human": pytest.approx(50)}
    assert score_tile("bleu_4", {}).value == "–"


def test_spread_is_even_and_without_repeats() -> None:
    assert spread(range(10), 5) == [0, 2, 4, 6, 8]
    assert spread([1, 2], 5) == [1, 2]
    assert len(set(spread(range(25), 24))) == 24


def test_big_photos_are_embedded_smaller_small_ones_untouched() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (600, 900, 3), dtype=np.uint8)
    big, small = io.BytesIO(), io.BytesIO()
    Image.fromarray(noise).save(big, "PNG")
    Image.fromarray(noise[:40, :40]).save(small, "PNG")
    assert picture_uri(big.getvalue()).startswith("data:image/jpeg;base64,")
    assert len(picture_uri(big.getvalue())) < len(big.getvalue()) / 3
    assert picture_uri(small.getvalue()).startswith("data:image/png;base64,")


def test_durations() -> None:
    assert [duration(s) for s in (None, 9.4, 431.2, 7322)] == ["–", "9 s", "7 min 11 s", "2 h 2 min"]


def test_config_of_the_run_is_shown_whole(run: RunDir) -> None:
    config = run.load_config()
    config.seed = 424242
    save_config(config, run.config)
    assert "seed: 424242" in text_of(write_report(run).read_text())
