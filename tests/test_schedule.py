"""q(x_t | x_0) against its closed form."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffcap_dist.config import ConfigError, load_config
from diffcap_dist.diffusion.sampler import ddim
from diffcap_dist.diffusion.schedule import EVEN_SHARE, NoiseSchedule, knots_of_losses


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
    for knots in ((0.0,), (0.1, 1.0), (0.0, 0.9), (0.0, 0.6, 0.5, 1.0)):
        with pytest.raises(ValueError, match="must rise from 0 to 1"):
            NoiseSchedule(knots=knots)
    with pytest.raises(ValueError, match="finite"):
        knots_of_losses([0.0, math.nan, 1.0])
    with pytest.raises(ValueError, match="known schedules"):
        NoiseSchedule("linear")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"\(2, 3, 4\), \(2, 3, 5\)"):
        NoiseSchedule().add_noise(torch.zeros(2, 3, 4), torch.zeros(2, 3, 5), torch.zeros(2))


def test_spread_goes_straight_between_its_knots() -> None:
    t = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0], dtype=torch.float64)
    assert NoiseSchedule(knots=(0.0, 0.2, 1.0)).spread(t).tolist() == pytest.approx([0.0, 0.1, 0.2, 0.6, 1.0])
    assert NoiseSchedule().spread(t) is t
    torch.testing.assert_close(NoiseSchedule(knots=(0.0, 0.25, 0.5, 0.75, 1.0)).spread(t), t)


@given(st.lists(st.floats(0, 100), min_size=2, max_size=30))
def test_the_loss_rises_evenly_over_learned_times(losses: list[float]) -> None:
    """At each knot as much of the rise is behind as of the time, but for the share that stays even."""
    knots = knots_of_losses(losses)
    schedule = NoiseSchedule(knots=tuple(knots))  # which checks that they rise from 0 to 1
    even = np.linspace(0, 1, len(losses))
    risen = np.maximum.accumulate(losses) - losses[0]
    behind = np.interp(schedule.spread(torch.from_numpy(even)), even, risen / risen[-1] if risen[-1] > 0 else even)
    np.testing.assert_allclose((1 - EVEN_SHARE) * behind + EVEN_SHARE * np.array(knots), even, atol=1e-6)


def test_times_go_where_the_loss_changes() -> None:
    """A loss that jumps at 0.8: nine tenths of the steps are taken about there."""
    knots = knots_of_losses([0.0] * 8 + [1.0] * 3)
    assert sum(0.7 <= time <= 0.8 for time in knots) >= 9


def test_ddim_goes_through_the_spread_times() -> None:
    seen: list[float] = []

    def denoise(x_BLD: torch.Tensor, t: float, previous: torch.Tensor | None) -> torch.Tensor:
        seen.append(t)
        return x_BLD * 0

    ddim(denoise, torch.ones(1, 1, 1), NoiseSchedule(knots=(0.0, 0.2, 1.0)), 4)
    assert seen == pytest.approx([1.0, 0.6, 0.2, 0.1])


def test_only_continuous_diffusion_learns_a_schedule(tiny_config: Path) -> None:
    words = ["diffusion.kind=continuous", "diffusion.learn_schedule=true"]
    assert load_config(tiny_config, words).diffusion.learn_schedule
    for other in (["diffusion.kind=masked"], ["model.kind=autoregressive"]):
        with pytest.raises(ConfigError, match=r"learn_schedule .* diffusion.kind=continuous"):
            load_config(tiny_config, [*words, *other])
