"""How a video changes as it goes on, by what can be read off any picture: a cheap sign of drift."""

from __future__ import annotations

from torch import Tensor


def look(frames: Tensor) -> dict[str, float]:
    """Means over pixels (…, height, width, 3) uint8, each 0 to 1.

    Returns:
        luma: BT.601 brightness; saturation: HSV's, weighted by value (max - min); contrast: standard
        deviation of luma over the picture.
    """
    pixels = frames.reshape(-1, *frames.shape[-3:]).float() / 255
    luma = pixels @ pixels.new_tensor([0.299, 0.587, 0.114])
    chroma = pixels.amax(-1) - pixels.amin(-1)
    return {
        "luma": float(luma.mean()),
        "saturation": float(chroma.mean()),
        "contrast": float(luma.flatten(1).std(1).mean()),
    }


def drift(first: dict[str, float], now: dict[str, float]) -> dict[str, float]:
    """Differences from the first chunk's `look`, in percent of full scale."""
    return {name: round(100 * (now[name] - first[name]), 2) for name in first}


def blank(now: dict[str, float]) -> bool:
    """Whether there is nothing to see: one colour over the whole picture."""
    return now["contrast"] < 0.004
