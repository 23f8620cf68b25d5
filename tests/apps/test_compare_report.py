"""The report of a comparison: one file that needs nothing else, whatever its texts hold."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.apps.test_api import Api, opened
from tests.apps.test_compare import Film, brighter, decoded, films, painted
from vidkv.apps import compare_report
from vidkv.apps.compare import Comparison, Side
from vidkv.apps.compare_report import (
    GAIN,
    HEIGHT,
    LEFT,
    PEAK_DB,
    RIGHT,
    WIDTH,
    chart,
    comparison_report,
    jpeg,
)
from vidkv.segments import write_video

EVIL = "<script>alert(1)</script>\"'><img src=http://evil.example/x onerror=alert(2)>&amp;\x00\x1b\ud800"


class Elements(HTMLParser):
    """Elements with their attributes, and texts, as a browser reads them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    with opened(tmp_path / "renders") as api:
        yield api


def comparison(api: Api, a: str = "one", b: str = "three") -> Comparison:
    """All of it measured."""
    sides = [Side.of(api.service, api.store.get(id)) for id in (a, b)]
    found = Comparison(api.service, *sides)
    found.advance(*sides, 60)
    return found


def test_nothing_is_fetched_and_nothing_runs(api: Api) -> None:
    films(api)
    page = Elements(comparison_report(comparison(api)))
    assert page.open == []
    for name, attributes in page.found:
        assert name not in ("script", "link", "iframe", "object", "a", "form", "video", "base")
        assert not [key for key in attributes if key.startswith("on") or key in ("href", "srcset", "style")]
        assert str(attributes.get("src") or "data:image/jpeg;").startswith("data:image/jpeg;")
    policy = next(a["content"] for n, a in page.found if a.get("http-equiv") == "Content-Security-Policy")
    assert policy and policy.startswith("default-src 'none'; style-src 'sha256-")


def test_texts_of_users_are_texts(api: Api) -> None:
    films(api)
    found = comparison(api)
    path = api.store.file(found.a.job)
    part = path.with_name("part.mp4")
    path.rename(part)
    write_video([part], path, 16, {"job": found.a.job.key, "steps": EVIL, "resumed": EVIL})
    request = found.a.request.model_copy(update={"negative": EVIL, "model": EVIL})
    found.a = replace(found.a, request=request, timeline=((0.0, EVIL), (1.0, EVIL)), grammar=None)
    found.world = None
    page = Elements(comparison_report(found))
    assert page.open == []
    assert not [name for name, _ in page.found if name == "script"]
    assert not [a for _, a in page.found if "onerror" in a or "evil" in str(a.get("src"))]
    # and they are all there
    assert page.text.count("<script>alert(1)</script>") >= 4


def test_the_figures_are_those_of_the_answer(api: Api) -> None:
    films(api)
    found = comparison(api)
    told = found.show(0, 0)
    text = Elements(comparison_report(found)).text
    assert told.fidelity.psnr is not None and f"{told.fidelity.psnr:.1f} dB" in text
    assert f"{told.ratio.bytes_per_frame:.3f}" in text and "196,608" in text
    assert f"chunk {told.fidelity.diverged_at} (" in text
    assert "int8,window=21,sink=3" in text and "chaotic" in text and "Two caches, one seed" in text


def test_equal_videos_are_called_so(api: Api) -> None:
    films(api, painted, painted)
    text = Elements(comparison_report(comparison(api))).text
    assert "never: every pixel is equal" in text
    assert not re.search(r"\b(inf|nan|None)\b", text, re.IGNORECASE)


def test_strips_show_the_same_moments_and_what_differs(api: Api) -> None:
    films(api)
    page = Elements(comparison_report(comparison(api)))
    pictures = [attributes for name, attributes in page.found if name == "img"]
    assert len(pictures) == 12
    a, b = decoded(api, "one"), decoded(api, "three")
    for chunk, last in enumerate((8, 20, 32, 40)):
        shown = [pixels(str(picture["src"])) for picture in pictures[3 * chunk : 3 * chunk + 3]]
        difference = (GAIN * np.abs(a[last].astype(int) - b[last])).clip(0, 255)
        for picture, true in zip(shown, (a[last], b[last], difference), strict=True):
            assert np.abs(picture - true).mean() < 3
        assert pictures[3 * chunk]["alt"] == f"A, chunk {chunk}"


def pixels(uri: str) -> np.ndarray:
    data = base64.b64decode(uri.removeprefix("data:image/jpeg;base64,"))
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(float)


def test_large_pictures_are_made_small() -> None:
    assert pixels(jpeg(np.zeros((480, 832, 3), np.uint8))).shape == (111, 192, 3)


def test_of_many_chunks_all_are_drawn(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vidkv.apps.compare.PAGE", 1)
    films(api)
    page = Elements(comparison_report(comparison(api)))
    lines = [a for name, a in page.found if name == "polyline"]
    assert len(str(lines[0]["points"]).split()) == 4


class TestChart:
    def points(self, drawn: str, kind: str) -> list[list[tuple[float, float]]]:
        found = re.findall(rf'<polyline points="([^"]*)" class="line {kind}">', drawn)
        return [[(float(x), float(y)) for x, y in (p.split(",") for p in line.split())] for line in found]

    def test_values_are_where_they_belong(self) -> None:
        drawn = chart("x", "", [("A", "a", [0.0, 5.0, 10.0]), ("B", "b", [10.0, 10.0, 0.0])])
        a, b = self.points(drawn, "a")[0], self.points(drawn, "b")[0]
        assert [x for x, _ in a] == [LEFT, (LEFT + WIDTH - RIGHT) / 2, WIDTH - RIGHT]
        assert a[0][1] == b[2][1] > a[1][1] > a[2][1] == b[0][1] > 0
        assert a[1][1] == pytest.approx((a[0][1] + a[2][1]) / 2, abs=0.1) and a[0][1] < HEIGHT

    def test_what_is_not_known_is_a_gap_and_a_lone_value_a_dot(self) -> None:
        drawn = chart("x", "", [("A", "a", [1.0, 2.0, None, 3.0, None])])
        assert [len(line) for line in self.points(drawn, "a")] == [2] and drawn.count("<circle") == 1

    def test_nothing_known_is_an_empty_chart(self) -> None:
        drawn = chart("x", "", [("A", "a", [None, None])])
        assert "no evidence" in drawn and "<polyline" not in drawn

    @pytest.mark.parametrize("value", [0.0, 60.0, -3.0])
    def test_a_flat_line_is_drawn(self, value: float) -> None:
        for low in (None, 0.0):
            (line,) = self.points(chart("x", "", [("A", "a", [value] * 3)], low=low), "a")
            assert all(0 < y < HEIGHT for _, y in line)

    def test_a_drop_of_one_chunk_is_not_lost_among_thousands(self) -> None:
        values = [PEAK_DB] * 10_000
        values[4321] = 3.0
        (line,) = self.points(chart("x", "", [("A", "d", values)], low=0.0), "d")
        assert len(line) <= compare_report.POINTS
        lowest = max(line, key=lambda point: point[1])
        assert lowest[0] == pytest.approx(LEFT + (WIDTH - LEFT - RIGHT) * 4321 / 9_999, abs=2)


def test_a_running_comparison_says_how_far_it_is(api: Api) -> None:
    Film(api, "one").make(3)
    Film(api, "three", brighter, cache={"format": "int8"}).make(2)
    text = Elements(comparison_report(comparison(api))).text
    assert "Compared up to chunk 1 (2 of 4, 1.31 s); the rest is being made." in text
    assert "3 of 4" in text and "running" in text
