"""q(x_t | x_0) against its closed form."""

from __future__ import annotations

import math

import pytest
import torch

from diffcap_dist.diffusion.schedule import NoiseSchedule


def test_cosine_is_the_published_formula() -> None:
    t, s = torch.linspace(0, 0.99, 50, dtype=torch.float64), 0.008
    f = [math.cos((x + s) / (1 + s) * math.pi / 2) ** 2 for x in [0.0, *t.tolist()]]
    expected = torch.tensor([value / f[0] for value in f[1:]], dtype=torch.float64)
    torch.testing.assert_close(NoiseSchedule("cosine").alpha_bar(t), expected)


def test_sqrt_is_the_published_formula() -> None:
    t = torch.linspace(0, 0.99, 50, dtype=torch.float64)
    torch.testing.assert_close(NoiseSchedule("sqrt").alpha_bar(t), 1 - torch.sqrt(t + 1e-4))


@pytest.mark.parametrize("name", ["cosine", "sqrt"])
@pytest.mark.parametrize("noise_scale", [1.0, 4.0])
def test_noise_scale_is_louder_noise_renormalised(name: str, noise_scale: float) -> None:
    t = torch.linspace(0.01, 0.99, 30, dtype=torch.float64)
    plain = NoiseSchedule(name).alpha_bar(t)  # type: ignore[arg-type]
    scaled = NoiseSchedule(name, noise_scale).alpha_bar(t)  # type: ignore[arg-type]
    torch.testing.assert_close(scaled / (1 - scaled), plain / (1 - plain) / noise_scale**2)
    assert (scaled.diff() < 0).all()


def test_add_noise_has_the_mean_and_variance_of_q() -> None:
    torch.manual_seed(0)
    schedule = NoiseSchedule("cosine", 2.0)
    x0_BLD = torch.full((20000, 2, 3), 1.5)
    t = 0.4
    x_BLD = schedule.add_noise(x0_BLD, torch.randn_like(x0_BLD), torch.full((20000,), t))
    alpha_bar = schedule.alpha_bar(torch.tensor(t)).item()
    assert x_BLD.mean().item() == pytest.approx(math.sqrt(alpha_bar) * 1.5, abs=0.01)
    assert x_BLD.var().item() == pytest.approx(1 - alpha_bar, abs=0.01)


def test_each_row_has_its_own_time() -> None:
    schedule = NoiseSchedule("cosine")
    x0_BLD, noise_BLD = torch.ones(2, 3, 4), torch.zeros(2, 3, 4)
    x_BLD = schedule.add_noise(x0_BLD, noise_BLD, torch.tensor([0.1, 0.9]))
    torch.testing.assert_close(x_BLD[:, 0, 0] ** 2, schedule.alpha_bar(torch.tensor([0.1, 0.9])))


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="noise_scale is 0"):
        NoiseSchedule("cosine", 0)
    with pytest.raises(ValueError, match="known schedules"):
        NoiseSchedule("linear")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"\(2, 3, 4\), \(2, 3, 5\)"):
        NoiseSchedule().add_noise(torch.zeros(2, 3, 4), torch.zeros(2, 3, 5), torch.zeros(2))
