"""The small CLIP: its targets and optimizer by hand, a few steps of training, and the folder it leaves."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image

from diffcap_dist import train_clip
from diffcap_dist.data.captions import CaptionTokenizer
from diffcap_dist.model.image_encoder import ImageEncoder
from diffcap_dist.training import contrastive
from diffcap_dist.training.contrastive import (
    CaptionedPhotos,
    ContrastiveTraining,
    caption_ids,
    contrastive_loss,
    export_clip,
    orthogonalised,
    phrase_targets,
    retrieval_recall,
)

NUM_STEPS = 60  # batch normalisation needs about that many to have its averages
COLORS = {"red": (220, 30, 30), "green": (30, 200, 60), "blue": (30, 60, 230), "white": (245, 245, 245)}


def color_photos() -> CaptionedPhotos:
    """12 pictures: a half of each of two colours; two captions each."""
    pixels, captions = [], []
    for left in COLORS:
        for right in COLORS:
            if left != right:
                picture_CHW = torch.zeros(3, 64, 64, dtype=torch.uint8)
                picture_CHW[:, :, :32] = torch.tensor(COLORS[left], dtype=torch.uint8).view(3, 1, 1)
                picture_CHW[:, :, 32:] = torch.tensor(COLORS[right], dtype=torch.uint8).view(3, 1, 1)
                pixels.append(picture_CHW)
                captions.append([f"{left} left of {right}", f"{right} on the right and {left} on the left"])
    return CaptionedPhotos(torch.stack(pixels), captions)


@pytest.fixture(scope="module")
def trained() -> tuple[ContrastiveTraining, list[dict[str, float]]]:
    training = ContrastiveTraining(color_photos(), num_steps=NUM_STEPS, seed=0)
    return training, list(training.steps())


def test_the_loss_falls_and_photos_find_their_captions(
    trained: tuple[ContrastiveTraining, list[dict[str, float]]],
) -> None:
    training, losses = trained
    assert len(losses) == NUM_STEPS
    assert losses[-1]["contrastive"] < 0.7 * losses[0]["contrastive"]
    assert losses[-1]["phrases"] < 0.7 * losses[0]["phrases"]
    assert retrieval_recall(training, color_photos()) > 6 / 12


def test_the_same_seed_gives_the_same_model_and_another_seed_another(
    trained: tuple[ContrastiveTraining, list[dict[str, float]]],
) -> None:
    firsts = [next(ContrastiveTraining(color_photos(), NUM_STEPS, seed).steps()) for seed in (0, 1)]
    assert firsts[0] == pytest.approx(trained[1][0], rel=1e-5)
    assert firsts[1] != pytest.approx(trained[1][0], rel=1e-5)


def test_the_exported_folder_is_the_trained_model(
    trained: tuple[ContrastiveTraining, list[dict[str, float]]], tmp_path: Path
) -> None:
    training, _ = trained
    photos = color_photos()
    export_clip(training, tmp_path / "clip")
    encoder = ImageEncoder(str(tmp_path / "clip"))
    pixels_BCHW = contrastive.normalised(photos.pixels_NCHW)
    pictures = [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in photos.pixels_NCHW]
    assert encoder.load_images(pictures).equal(photos.pixels_NCHW)
    assert contrastive.pixel_transform().of_picture(pictures[0]).equal(photos.pixels_NCHW[0])
    torch.testing.assert_close(encoder.normalised(photos.pixels_NCHW), pixels_BCHW)
    texts = [captions[0] for captions in photos.captions]
    ids_BL = torch.from_numpy(training.tokenizer.encode(texts, training.ids_NCL.shape[-1])[0])
    assert open_clip.get_tokenizer(f"local-dir:{tmp_path / 'clip'}")(texts).tolist() == ids_BL.tolist()
    with torch.no_grad():
        torch.testing.assert_close(
            encoder(photos.pixels_NCHW)[0], training.clip.encode_image(pixels_BCHW, normalize=True)
        )
        torch.testing.assert_close(encoder.encode_text(texts), training.clip.encode_text(ids_BL, normalize=True))
    assert encoder.patches_shape == (16, 128)


def test_what_stands_behind_the_end_of_a_text_is_not_read(
    trained: tuple[ContrastiveTraining, list[dict[str, float]]],
) -> None:
    training, _ = trained
    ids_BL = torch.from_numpy(training.tokenizer.encode(["red left of blue"], training.ids_NCL.shape[-1])[0])
    other_BL = ids_BL.clone()
    other_BL[0, -1] = training.tokenizer.vocab_size - 1
    assert other_BL.tolist() != ids_BL.tolist()
    with torch.no_grad():
        torch.testing.assert_close(training.clip.encode_text(ids_BL), training.clip.encode_text(other_BL))


def test_phrases_are_the_words_and_neighbours_that_tell_photos_apart() -> None:
    captions = [["a red star", "a star"], ["a blue star"], ["a red heart"]]
    tokenizer = CaptionTokenizer.from_captions(text for texts in captions for text in texts)
    ids_NCL, counts_N = caption_ids(tokenizer, captions)
    assert counts_N.tolist() == [2, 1, 1] and ids_NCL.shape == (3, 2, 4)
    assert ids_NCL[1, 1].tolist() == [tokenizer.pad_id] * 4
    targets_NT = phrase_targets(ids_NCL, tokenizer.vocab_size)
    expected = {
        "star": (1, 1, 0), "star [SEP]": (1, 1, 0), "red": (1, 0, 1), "a red": (1, 0, 1), "red star": (1, 0, 0),
        "a star": (1, 0, 0), "blue": (0, 1, 0), "a blue": (0, 1, 0), "blue star": (0, 1, 0), "heart": (0, 0, 1),
        "red heart": (0, 0, 1), "heart [SEP]": (0, 0, 1), "[SEP] [PAD]": (1, 0, 0), "[PAD] [PAD]": (0, 1, 1),
    }  # fmt: skip
    found = Counter(tuple(int(x) for x in column) for column in targets_NT.T)
    assert found == Counter(expected.values())  # "a" and "[SEP]" are everywhere, and so tell nothing


def test_contrastive_loss_by_hand() -> None:
    image_BE = torch.tensor([[2.0, 0.0], [0.0, 5.0]])
    assert contrastive_loss(image_BE, torch.eye(2), torch.tensor(1.0)).item() == pytest.approx(0.31326, abs=1e-4)
    assert contrastive_loss(image_BE, torch.eye(2).flip(0), torch.tensor(1.0)).item() == pytest.approx(
        1.31326, abs=1e-4
    )


@pytest.mark.parametrize("shape", [(8, 8), (6, 30), (30, 6)])
def test_orthogonalised_keeps_directions_and_evens_out_their_strengths(shape: tuple[int, int]) -> None:
    left, _, right = torch.linalg.svd(
        torch.randn(shape, generator=torch.Generator().manual_seed(0)), full_matrices=False
    )
    strengths = torch.linspace(0.3, 3.0, min(shape))
    result = left.T @ orthogonalised(left @ torch.diag(strengths) @ right) @ right.T
    assert result.diag().min() > 0.6 and result.diag().max() < 1.3
    assert (result - torch.diag(result.diag())).abs().max() < 1e-4


def test_the_command_trains_once(scene_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "clip"
    command = [str(scene_shards), "--out", str(out), "--steps", "2"]
    assert train_clip.main(command) == 0
    assert "R@1" in capsys.readouterr().out and not (tmp_path / "clip.tmp").exists()
    record = json.loads((out / "training.json").read_text())
    assert record["val_photos"] == 12 and 0 <= record["val_recall_at_1"] <= 1
    assert ImageEncoder(str(out)).patches_shape == (16, 128)
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    assert train_clip.main(command) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    with pytest.raises(ValueError, match="other steps"):
        train_clip.main([*command[:-1], "3"])


def test_bad_input_is_named(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with pytest.raises(ValueError, match=r"index\.json"):
        train_clip.main([str(tmp_path), "--out", str(tmp_path / "clip")])
    photos = color_photos()
    with pytest.raises(ValueError, match="no captions"):
        CaptionedPhotos(photos.pixels_NCHW, [[], *photos.captions[1:]])
    with pytest.raises(ValueError, match="captions all alike"):
        ContrastiveTraining(CaptionedPhotos(photos.pixels_NCHW, [["the same"]] * 12), 1, 0)
    with pytest.raises(ValueError, match="at least 1"):
        ContrastiveTraining(photos, 0, 0)


def test_a_folder_of_something_else_is_not_touched(scene_shards: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no model of train-clip"):
        train_clip.main([str(scene_shards), "--out", str(tmp_path)])
