"""The frozen encoder: which features it takes from which tower, and what it says when it can't be had."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from open_clip.model import CLIP
from PIL import Image
from safetensors.torch import save_file

from diffcap_dist.model.image_encoder import ImageEncoder, slug

TEXT = {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
TOWERS = {
    "vit": {"image_size": 32, "patch_size": 8, "width": 24, "head_width": 12, "layers": 2},
    "resnet": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None, "head_width": 32},
    "timm": {"image_size": 64, "timm_model_name": "test_resnet", "timm_pool": "avg", "timm_proj": "linear"},
}


def saved_clip(tower: str, folder: Path) -> CLIP:
    """A random CLIP of open_clip's own class, and ``folder`` from which it loads."""
    config = {"embed_dim": 12, "vision_cfg": TOWERS[tower], "text_cfg": TEXT}
    torch.manual_seed(0)
    clip = CLIP(**config).eval()
    folder.mkdir()
    size = TOWERS[tower]["image_size"]
    files = {"model_cfg": config, "preprocess_cfg": {"size": size, "mean": [0.5] * 3, "std": [0.25] * 3}}
    (folder / "open_clip_config.json").write_text(json.dumps(files))
    save_file(clip.state_dict(), folder / "open_clip_model.safetensors")
    return clip


def pixels(size: int) -> torch.Tensor:
    return torch.randint(0, 256, (2, 3, size, size), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def images(size: int) -> torch.Tensor:
    """What ``saved_clip``'s preprocessing makes of the pixels."""
    return (pixels(size) / 255 - 0.5) / 0.25


def test_a_vit_gives_its_last_block_and_its_projected_class_token(tmp_path: Path) -> None:
    clip = saved_clip("vit", tmp_path / "vit")
    encoder = ImageEncoder(str(tmp_path / "vit"))
    seen: list[torch.Tensor] = []
    clip.visual.transformer.resblocks[-1].register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        projected_BF = clip.encode_image(images(32), normalize=True)
        class_token_BF = clip.visual.ln_post(seen[0])[:, 0] @ clip.visual.proj
    pooled_BF, patches_BPF = encoder(pixels(32))
    torch.testing.assert_close(pooled_BF, projected_BF)
    torch.testing.assert_close(pooled_BF, torch.nn.functional.normalize(class_token_BF, dim=-1))
    torch.testing.assert_close(patches_BPF, seen[0][:, 1:])  # row by row, without the class token
    assert encoder.patches_shape == (16, 24) and encoder.pooled_dim == 12 and encoder.image_size == (32, 32)


@pytest.mark.parametrize("tower, patches_shape", [("resnet", (16, 128)), ("timm", (16, 192))])
def test_convolutions_give_the_last_map_of_at_least_4x4_cells(
    tower: str, patches_shape: tuple[int, int], tmp_path: Path
) -> None:
    clip = saved_clip(tower, tmp_path / tower)
    encoder = ImageEncoder(str(tmp_path / tower))
    pooled_BF, patches_BPF = encoder(pixels(64))
    assert encoder.patches_shape == patches_shape == tuple(patches_BPF.shape[1:])
    with torch.no_grad():
        torch.testing.assert_close(pooled_BF, clip.encode_image(images(64), normalize=True))
    if tower == "resnet":
        visual = clip.visual
        with torch.no_grad():
            map_BFHW = visual.layer3(visual.layer2(visual.layer1(visual.stem(images(64)))))
        torch.testing.assert_close(patches_BPF[:, 6], map_BFHW[:, :, 1, 2])


def test_it_is_frozen_but_its_features_can_be_trained_on(tmp_path: Path) -> None:
    saved_clip("vit", tmp_path / "vit")
    encoder = ImageEncoder(str(tmp_path / "vit"))
    holder = torch.nn.ModuleList([encoder]).train()
    assert not any(module.training for module in holder[0].modules())
    assert not any(p.requires_grad for p in encoder.parameters())
    projection = torch.nn.Linear(12, 3)
    projection(encoder(pixels(32))[0]).sum().backward()
    assert projection.weight.grad is not None


def test_two_loads_have_one_identity_and_other_weights_another(tmp_path: Path) -> None:
    clip = saved_clip("vit", tmp_path / "vit")
    first, second = (ImageEncoder(str(tmp_path / "vit")) for _ in range(2))
    assert first.weights_sha256 == second.weights_sha256
    assert first.preprocessing == second.preprocessing and " at 0x" not in first.preprocessing
    assert "0.25" in first.preprocessing
    clip.visual.proj.data[0, 0] += 1e-3
    save_file(clip.state_dict(), tmp_path / "vit" / "open_clip_model.safetensors")
    assert ImageEncoder(str(tmp_path / "vit")).weights_sha256 != first.weights_sha256


def test_pictures_of_any_size_and_mode_become_one_batch(tmp_path: Path) -> None:
    saved_clip("vit", tmp_path / "vit")
    encoder = ImageEncoder(str(tmp_path / "vit"))
    grey = Image.fromarray(np.full((40, 90), 255, np.uint8))
    batch_BCHW = encoder.load_images([grey, Image.new("RGBA", (32, 32), (0, 0, 0, 255))])
    assert batch_BCHW.shape == (2, 3, 32, 32)
    assert batch_BCHW[0].unique().tolist() == [255] and batch_BCHW[1].unique().tolist() == [0]
    assert encoder.normalised(batch_BCHW).flatten(1)[:, 0].tolist() == [2.0, -2.0]


def test_floats_and_other_sizes_are_refused(tmp_path: Path) -> None:
    saved_clip("vit", tmp_path / "vit")
    encoder = ImageEncoder(str(tmp_path / "vit"))
    for wrong_BCHW in (images(32), pixels(64)):
        with pytest.raises(ValueError, match=r"expected uint8 pixels of shape \(B, 3, 32, 32\)"):
            encoder(wrong_BCHW)


@pytest.mark.parametrize(
    "name, pretrained, words",
    [
        ("ViT-B-23", "openai", ["'ViT-B-23'", "Did you mean", "ViT-B-32", "hf-hub:"]),
        ("vit-b-32", "openai", ["Did you mean ViT-B-32"]),
        ("no/such/folder", "", ["existing folder"]),
        ("ViT-B-32", "", ["untrained", "openai"]),
        ("hf-hub:org/model", "openai", ["would be ignored"]),
    ],
)
def test_a_name_that_cannot_be_is_told_in_one_line(name: str, pretrained: str, words: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        ImageEncoder(name, pretrained)
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and len(message) < 400
    assert [word for word in words if word not in message] == []


def test_an_offline_hub_id_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match="could not be loaded") as caught:
        ImageEncoder("hf-hub:someone/some-clip")
    message = str(caught.value)
    assert "someone/some-clip" in message.splitlines()[0]
    assert "On a machine with network run:" in message and "encoder.name" in message


def test_a_folder_without_weights_is_no_encoder(tmp_path: Path) -> None:
    saved_clip("vit", tmp_path / "vit")
    (tmp_path / "vit" / "open_clip_model.safetensors").unlink()
    with pytest.raises(ValueError, match="could not be loaded"):
        ImageEncoder(str(tmp_path / "vit"))


def test_slugs_are_safe_in_file_names() -> None:
    assert slug("ViT-B-32", "openai") == "ViT-B-32_openai"
    assert slug("runs/demo/clip") == "clip"
    assert slug("hf-hub:org/model.v2") == "model-v2"
    assert slug("ViT-B-32", "/somewhere/weights.pt") == "ViT-B-32_weights"
