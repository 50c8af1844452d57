"""CLIPScore and RefCLIPScore: numbers by hand, the published formulas, and in `evaluate`, where a CLIP can be had."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from diffcap_dist import __main__ as diffcap
from diffcap_dist import evaluate
from diffcap_dist.config import Config
from diffcap_dist.data.captions import CaptionTokenizer
from diffcap_dist.data.stream import ShardReader, evaluation_photos
from diffcap_dist.evaluation.captioner import export_captioner, feature_identity, load_captioner
from diffcap_dist.evaluation.clip_score import (
    ClipFeatures,
    clip_score,
    clip_scores,
    human_clip_scores,
    prompted,
    ref_clip_score,
)
from diffcap_dist.model.denoiser import Denoiser
from diffcap_dist.model.image_encoder import ImageEncoder
from diffcap_dist.run_dir import RunDir
from diffcap_dist.training.distributed import Ranks
from shards import make_shards
from tests.conftest import launch
from tests.test_image_encoder import saved_clip

CPU = torch.device("cpu")
NAMES = ("clip_score", "ref_clip_score")


def at_angle(degrees: float, length: float = 1.0) -> np.ndarray:
    return length * np.array([np.cos(np.radians(degrees)), np.sin(np.radians(degrees))], dtype=np.float32)


# ---- The formulas ----


def test_by_hand() -> None:
    photo, caption = at_angle(0, 3.0), at_angle(60, 0.5)  # cosine 1/2, whatever the lengths
    assert clip_score(photo, caption) == pytest.approx(2.5 / 2)
    references = np.stack([at_angle(150), at_angle(120)])  # cosines with the caption 0 and 1/2
    assert ref_clip_score(photo, caption, references) == pytest.approx(2 * 1.25 * 0.5 / 1.75)
    assert clip_score(photo, at_angle(120)) == 0.0  # a negative cosine counts as none
    assert ref_clip_score(photo, at_angle(120), references) == 0.0
    assert ref_clip_score(photo, caption, np.stack([at_angle(240)])) == 0.0
    assert prompted(["a dog"]) == ["A photo depicts a dog"]


def test_equals_the_published_formulas_on_random_features() -> None:
    draw = np.random.default_rng(0)
    photos_NF, captions_NF, references_NRF = (draw.normal(size=s) + 0.3 for s in ((40, 12), (40, 12), (40, 5, 12)))
    unit = torch.nn.functional.normalize
    v, c, r = (unit(torch.from_numpy(x), dim=-1) for x in (photos_NF, captions_NF, references_NRF))
    clip_N = 2.5 * (v * c).sum(-1).clamp(min=0)
    nearest_N = torch.einsum("nrf,nf->nr", r, c).amax(1).clamp(min=0)
    ref_clip_N = 2 / (1 / clip_N + 1 / nearest_N)  # 1 / inf = 0: where one is 0, so is the mean
    photos = [ClipFeatures(v_F, r_RF) for v_F, r_RF in zip(photos_NF, references_NRF)]
    scores = clip_scores(captions_NF, photos)
    assert [scores[name] for name in NAMES] == pytest.approx([clip_N.mean().item(), ref_clip_N.mean().item()])


def test_people_take_turns() -> None:
    references = np.stack([at_angle(0), at_angle(60), at_angle(90)])
    two = ClipFeatures(at_angle(0), references[:2])
    scores = human_clip_scores([two, ClipFeatures(at_angle(0), references[2:])])  # a single caption has no turn
    assert scores["clip_score"] == pytest.approx((2.5 + 1.25) / 2)
    expected = (2 * 2.5 * 0.5 / 3.0 + 2 * 1.25 * 0.5 / 1.75) / 2
    assert scores["ref_clip_score"] == pytest.approx(expected)
    with pytest.raises(ValueError, match="no human row"):
        human_clip_scores([ClipFeatures(at_angle(0), references[:1])])
    with pytest.raises(ValueError, match="1 captions for 2 photos"):
        clip_scores(references[:1], [two, two])


# ---- In `evaluate` ----


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoder") / "clip"
    weights = saved_clip("vit", folder).state_dict()
    weights["text_projection"] = -weights["text_projection"]  # as it was made, most cosines are negative: scores of 0
    save_file(weights, folder / "open_clip_model.safetensors")
    return folder


@pytest.fixture(scope="module")
def shards(scene_shards: Path, clip_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scenes with features of the small CLIP beside the imported ones."""
    folder = tmp_path_factory.mktemp("clip scenes") / "shards"
    shutil.copytree(scene_shards, folder)
    assert make_shards.main(["features", str(folder), "--encoder", str(clip_folder)]) == 0
    return folder


def exported_run(root: Path, shards: Path, encoder: str, features: str, split: str = "test") -> RunDir:
    """A run whose captioner was never trained: it writes something all the same."""
    config = Config(run_dir=str(root))
    config.data = dataclasses.replace(config.data, shards=str(shards), features=features, max_length=8)
    config.encoder = dataclasses.replace(config.encoder, name=encoder, pretrained="", patches=False)
    sizes = {"width": 16, "num_layers": 1, "num_heads": 2, "ffn_width": 16, "embedding_dim": 8}
    config.model = dataclasses.replace(config.model, **sizes)
    config.sampler = dataclasses.replace(config.sampler, num_inference_steps=2)
    run = RunDir(root)
    run.begin(config)
    online = None if features else ImageEncoder(encoder)
    transform = online.pixel_transform() if online else None
    reader = ShardReader(str(shards), split, features, transform=transform)
    texts = [text for photo in evaluation_photos(reader) for text in photo.record["captions"]]
    tokenizer = CaptionTokenizer.from_captions(texts)
    width = online.pooled_dim if online else reader.feature_info.pooled_dim  # type: ignore[union-attr]
    torch.manual_seed(0)
    denoiser = Denoiser(config.model, tokenizer.vocab_size, 8, (width, None)).eval()
    about = {"step": 0, "feature_widths": (width, None), **feature_identity(reader.feature_info, online)}
    export_captioner(run.export, denoiser.state_dict(), denoiser, config, tokenizer, about)
    return run


def evaluated(run: RunDir, *words: str) -> dict:
    assert diffcap.main(["evaluate", str(run.root), *words]) == 0
    return json.loads(run.scores.read_text())


def test_every_row_has_the_scores_that_the_clip_gives(
    shards: Path, clip_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = exported_run(tmp_path / "run", shards, str(clip_folder), "clip")
    scores = evaluated(run, "--retrieval")
    rows = {"model": scores, "floor": scores["floor"], "human": scores["human"], **scores["retrieval"]}
    assert all(set(evaluate.TEXT_SCORES) <= set(row) for row in rows.values())
    clip = ImageEncoder(str(clip_folder))
    photos = {p.key: p for p in evaluation_photos(ShardReader(str(shards), "test", "clip"))}
    lines = [json.loads(line) for line in (run.predictions / "test.jsonl").read_text().splitlines()]
    for row, captions in (
        ("model", [line["caption"] for line in lines]),
        ("floor", [scores["floor"]["caption"]] * len(lines)),
    ):
        expected = []
        for line, caption in zip(lines, captions):
            photo_F = torch.nn.functional.normalize(photos[line["key"]].pooled_F, dim=-1)  # type: ignore[arg-type]
            text_F, *references = clip.encode_text([f"A photo depicts {t}" for t in [caption, *line["references"]]])
            fits = 2.5 * max(float(photo_F @ text_F), 0)
            agrees = max(0.0, *(float(reference_F @ text_F) for reference_F in references))
            expected.append((fits, 2 * fits * agrees / (fits + agrees) if fits + agrees else 0.0))
        assert [rows[row][name] for name in NAMES] == pytest.approx(np.mean(expected, axis=0).tolist(), abs=1e-6)
    assert all(row["clip_score"] > 0 for row in rows.values()), rows
    assert scores["floor"]["unique_captions"] == 1 / 12 and scores["human"]["repeated_words"] == 0
    printed = capsys.readouterr().out
    assert "ref_clip_score" in printed and "distinct_2" in printed
    assert diffcap.main(["report", str(run.root)]) == 0
    assert "RefCLIPScore" in run.report.read_text() and "Distinct pairs" in run.report.read_text()

    without = evaluated(run, "--no-clip-score")
    assert not set(NAMES) & set(without)
    unchanged = set(evaluate.SCORES + evaluate.TEXT_SCORES) - set(NAMES)
    assert {name: without[name] for name in unchanged} == {name: scores[name] for name in unchanged}
    assert diffcap.main(["report", str(run.root)]) == 0
    assert "RefCLIPScore" not in run.report.read_text() and "Distinct pairs" in run.report.read_text()


def test_the_share_of_a_rank_does_not_change_a_bit(
    shards: Path, clip_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "CLIP_PHOTOS_AT_ONCE", 5)
    clip, reader = ImageEncoder(str(clip_folder)), ShardReader(str(shards), "test", "clip")
    whole = evaluate._clip_share(clip, reader, None, Ranks(0, 0, 1, CPU))
    assert len(whole) == 12
    for world_size in (2, 3, 5):
        parts = [evaluate._clip_share(clip, reader, None, Ranks(r, r, world_size, CPU)) for r in range(world_size)]
        assert sum(map(len, parts)) == 12
        for key, one in ((key, one) for part in parts for key, one in part.items()):
            assert np.array_equal(one.photo_F, whole[key].photo_F)
            assert np.array_equal(one.references_RF, whole[key].references_RF)


def test_where_no_clip_can_be_had_one_line_says_why(
    shards: Path, clip_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved_clip("resnet", tmp_path / "other")
    cases = {
        "oracle": (str(clip_folder), "'oracle' were imported"),
        "clip": (str(tmp_path / "other"), "'clip' are of another encoder than"),
    }
    caplog.set_level(logging.INFO, "diffcap")
    for features, (encoder, message) in cases.items():
        run = exported_run(tmp_path / features, shards, encoder, features)
        caplog.clear()
        scores = evaluated(run)
        said = [record.getMessage() for record in caplog.records if "no CLIPScore" in record.getMessage()]
        assert len(said) == 1 and message in said[0] and "\n" not in said[0]
        assert not set(NAMES) & (set(scores) | set(scores["human"])) and "distinct_1" in scores["human"]
    run = exported_run(tmp_path / "gone", shards, str(clip_folder), "clip")
    captioner = load_captioner(run.export, [f"encoder.name={tmp_path / 'nowhere'}"])
    caplog.clear()
    reader = ShardReader(str(shards), "test", "clip")
    assert evaluate._find_clip(captioner, reader, None, Ranks(0, 0, 1, CPU)) is None
    assert len(caplog.records) == 1 and "\n" not in caplog.records[0].getMessage()


@pytest.mark.slow
@pytest.mark.parametrize("features", ["clip", ""])
def test_two_ranks_score_the_same_floats_as_one(features: str, shards: Path, clip_folder: Path, tmp_path: Path) -> None:
    """With stored features and with the encoder online."""
    run = exported_run(tmp_path / "run", shards, str(clip_folder), features)
    launch(2, "diffcap_dist.evaluate", str(run.root))
    two = json.loads(run.scores.read_text())
    one = evaluated(run, "--batch-size", "5")
    assert (two["world_size"], one["world_size"]) == (2, 1) and "clip_score" in one
    names = set(evaluate.SCORES + evaluate.TEXT_SCORES) & set(one)
    for ours, theirs in ((one, two), (one["floor"], two["floor"]), (one["human"], two["human"])):
        assert {name: ours[name] for name in names} == {name: theirs[name] for name in names}
    assert one["clip_score"] > 0
