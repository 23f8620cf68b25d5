"""What can be read off any picture."""

from __future__ import annotations

import colorsys

import pytest
import torch

from tests.tiny import generator
from vidkv.drift import blank, drift, look


def pictures(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (*shape, 3), dtype=torch.uint8, generator=generator(seed))


def test_means_agree_with_the_standard_library() -> None:
    """Pixel by pixel: brightness as colorsys' YIQ has it, saturation times value of its HSV."""
    frames = pictures(3, 5, 7)
    rows = frames.reshape(3, -1, 3).tolist()
    lumas = [[colorsys.rgb_to_yiq(*(c / 255 for c in pixel))[0] for pixel in picture] for picture in rows]
    chroma = [
        s * v for picture in rows for _, s, v in (colorsys.rgb_to_hsv(*(c / 255 for c in p)) for p in picture)
    ]
    found = look(frames)
    # colorsys rounds BT.601's weights to two digits
    assert found["luma"] == pytest.approx(sum(map(sum, lumas)) / 105, abs=4e-3)
    assert found["saturation"] == pytest.approx(sum(chroma) / 105, abs=1e-6)
    spread = torch.tensor(lumas).std(1).mean().item()
    assert found["contrast"] == pytest.approx(spread, abs=4e-3)


def test_contrast_is_of_each_picture_not_between_them() -> None:
    frames = torch.stack([torch.zeros(4, 4, 3), torch.full((4, 4, 3), 255.0)]).byte()
    assert look(frames)["contrast"] == 0 and look(frames)["luma"] == pytest.approx(0.5)
    assert blank(look(frames))


def test_leading_dimensions_do_not_matter() -> None:
    frames = pictures(6, 4, 4)
    nested, flat = look(frames.reshape(2, 3, 4, 4, 3)), look(frames)
    assert nested == pytest.approx(flat, abs=1e-7)


def test_grey_has_no_saturation_and_a_pure_colour_has_all() -> None:
    grey, red = torch.full((1, 4, 4, 3), 90).byte(), torch.zeros(1, 4, 4, 3).byte()
    red[..., 0] = 255
    assert look(grey)["saturation"] == 0 and look(red)["saturation"] == 1
    assert look(red)["luma"] == pytest.approx(0.299)


def test_drift_is_in_percent_of_full_scale() -> None:
    first = {"luma": 0.5, "saturation": 0.25, "contrast": 0.1}
    assert drift(first, {"luma": 0.75, "saturation": 0.2, "contrast": 0.1}) == {
        "luma": 25.0, "saturation": -5.0, "contrast": 0.0,
    }  # fmt: skip


def test_blank_is_one_colour_and_not_a_faint_picture() -> None:
    frame = torch.full((1, 32, 32, 3), 127).byte()
    assert blank(look(frame))
    frame[:, :4] = 130
    assert not blank(look(frame + torch.zeros_like(frame).bernoulli_(0.5, generator=generator()) * 3))
    assert not blank(look(pictures(2, 8, 8)))
