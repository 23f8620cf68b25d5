"""The dry-run table, `report.json` and the contact sheet."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from collections.abc import Iterator
from dataclasses import fields, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from vidkv.apps import render_report
from vidkv.apps.render_report import (
    contact_sheet,
    dry_run_table,
    look_at,
    plan_total,
    tag,
    write_report,
)
from vidkv.errors import InputError, OutputError
from vidkv.jobs.claims import Claim
from vidkv.jobs.run import Progress
from vidkv.jobs.store import Job, JobStore, State
from vidkv.planning import plan
from vidkv.request import VideoRequest
from vidkv.segments import SegmentWriter, partial_video, write_video

CHUNK, STEP = 12, 5
PROMPT = "a red circle bouncing"


class Page(HTMLParser):
    """Text, elements and attributes of a page."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.feed(page)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("img", "meta", "input"):
            self.open.append(tag)
            self.texts.append((str(dict(attrs).get("class") or tag), ""))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.texts:
            kind, text = self.texts[-1]
            self.texts[-1] = kind, text + data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def text(self, kind: str) -> list[str]:
        return [text for name, text in self.texts if name == kind]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[JobStore]:
    with JobStore(tmp_path / "renders") as opened:
        yield opened


@pytest.fixture(scope="module")
def shared_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[JobStore]:
    """With one job; for tests of many examples."""
    with JobStore(tmp_path_factory.mktemp("shared")) as opened:
        submitted(opened, "x")
        yield opened


@pytest.fixture(scope="module")
def good_film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return film(tmp_path_factory.mktemp("film") / "good.mp4", 2)


def grey(frame: int) -> int:
    return 20 + (frame * STEP) % 220


def film(path: Path, chunks: int, height: int = 48, width: int = 64, steps: int = 1) -> Path:
    """A video whose frames are of one grey each, lighter from frame to frame."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = SegmentWriter(path.with_suffix(".seg"), 16, height, width)
    writer.drop_from(0)
    for chunk in range(chunks):
        numbers = range(chunk * CHUNK, (chunk + 1) * CHUNK)
        levels = np.array([grey(number // steps) for number in numbers], np.uint8)
        writer.write(chunk, np.broadcast_to(levels[:, None, None, None], (CHUNK, height, width, 3)).copy())
    write_video(writer.paths(), path, 16, {})
    return path


def submitted(store: JobStore, id: str, **wanted: Any) -> Job:
    return store.submit(VideoRequest(id=id, **({"prompt": PROMPT, "seconds": 2.0} | wanted)))


def claimed(store: JobStore, id: str, **wanted: Any) -> tuple[Job, Claim]:
    submitted(store, id, **wanted)
    taken = store.claim_next("w", lambda job: job.id == id)
    assert taken is not None and taken[0].id == id
    return taken


def finished(store: JobStore, id: str, video: bool = True, fields: Any = None, **result: Any) -> Job:
    job, claim = claimed(store, id, **(fields or {}))
    if video:
        film(store.file(job), 3)
    known = {"state": "done", "frames": 36, "chunks": 3, "wall_s": 6.0, "resumed_at": None, "note": None}
    size = store.file(job).stat().st_size if video else 1_000
    store.finish(job, known | {"size_bytes": size, "latents_sha256": "ab" * 32} | result)
    claim.release()
    return store.get(id)


def reached(**values: Any) -> Progress:
    nothing = dict.fromkeys((field.name for field in fields(Progress)), 0) | {"drift": {}, "blank": False}
    return Progress(**(nothing | values))


def failed(store: JobStore, id: str, error: str) -> Job:
    job, claim = claimed(store, id)
    store.finish(job, {"state": "failed", "error": error})
    claim.release()
    return store.get(id)


def report_of(store: JobStore, **options: Any) -> tuple[dict[str, Any], Page, str]:
    value = write_report(store, store.jobs(), store.root, 1000.0, 1010.0, **options)
    page = (store.root / "index.html").read_text()
    return value, Page(page), page


def level(data: str | bytes) -> float:
    raw = base64.b64decode(data.partition(",")[2]) if isinstance(data, str) else data
    return float(np.asarray(Image.open(io.BytesIO(raw)).convert("RGB"), np.float64).mean())


# ---------------------------------------------------------------------- report.json


def test_the_report_tells_what_this_run_made_from_what_was_there(store: JobStore) -> None:
    finished(store, "old")
    half, claim = claimed(store, "half")
    store.report("half", reached(chunk=1, chunks=3, frames=9))
    store.put_back(half)
    claim.release()
    before = store.jobs()
    finished(store, "half", resumed_at=1)
    finished(store, "new", resumed_at=None)
    failed(store, "bad", "NaN in chunk 3")
    submitted(store, "later")
    value, _, _ = report_of(store, before=before, stopped_by="SIGTERM")
    assert json.loads((store.root / "report.json").read_text()) == value
    assert value["schema"] == 1 and value["stopped_by"] == "SIGTERM" and value["wall_s"] == 10.0
    assert value["counts"] == {"queued": 1, "running": 0, "paused": 0, "done": 3, "failed": 1, "cancelled": 0}
    assert (value["rendered"], value["already_done"]) == (2, 1)
    # 36 of the new one, and 36 - 9 of the one that was taken up
    assert (value["frames"], value["fps"]) == (63, 6.3)
    entries = {entry["id"]: entry for entry in value["jobs"]}
    assert [e["already_done"] for e in entries.values()] == [True, False, False, False, False]
    assert entries["half"]["resumed_at"] == 1 and entries["bad"]["error"] == "NaN in chunk 3"
    assert entries["new"]["latents_sha256"] == "ab" * 32 and entries["new"]["out"] == "new.mp4"
    assert entries["new"]["seconds"] == 36 / 16 and entries["new"]["wall_s"] == 6.0
    assert entries["new"]["prompt"] == PROMPT and entries["new"]["key"] == store.get("new").key
    assert value["started"] == "1970-01-01T00:16:40+00:00"


def test_a_job_that_was_made_anew_counts_whole(store: JobStore) -> None:
    finished(store, "a")
    store.file(store.get("a")).unlink()
    before = [submitted(store, "a")]
    assert before[0].state is State.QUEUED
    finished(store, "a")
    value, _, _ = report_of(store, before=before)
    assert (value["frames"], value["already_done"], value["rendered"]) == (36, 0, 1)


def test_files_of_others_are_left_alone(store: JobStore) -> None:
    (store.root / "index.html").write_text("<h1>my own page</h1>")
    (store.root / "report.json").write_text("{}")
    value = write_report(store, [], store.root, 0.0, 1.0)
    again = write_report(store, [], store.root, 0.0, 2.0)
    assert (store.root / "index.html").read_text() == "<h1>my own page</h1>"
    assert (store.root / "report.json").read_text() == "{}"
    assert value["contact_sheet"] == again["contact_sheet"] == "vidkv-index.html"
    assert json.loads((store.root / "vidkv-report.json").read_text())["wall_s"] == 2.0
    assert Page((store.root / "vidkv-index.html").read_text()).text("title") == ["renders: 0 videos"]


def test_ones_own_files_are_replaced(store: JobStore) -> None:
    report_of(store)
    report_of(store)
    assert sorted(p.name for p in store.root.iterdir() if p.is_file()) == ["index.html", "report.json"]


def test_a_folder_that_cannot_be_written_is_named(store: JobStore, tmp_path: Path) -> None:
    with pytest.raises(
        OutputError, match=re.escape(f"cannot write the report to {tmp_path / 'gone'}: No such")
    ):
        write_report(store, [], tmp_path / "gone", 0.0, 1.0)


# ---------------------------------------------------------------------- pictures


def test_pictures_of_a_short_video_are_the_very_frames(tmp_path: Path) -> None:
    look = look_at(film(tmp_path / "a.mp4", 3))
    assert [picture.frame for picture in look.pictures] == [3, 9, 15, 21, 27, 33]
    assert (look.width, look.height, look.damaged) == (64, 48, False)
    for picture in look.pictures:
        assert picture.second == picture.frame / 16
        assert level(picture.data) == pytest.approx(grey(picture.frame), abs=1.9)


def test_pictures_of_a_long_video_are_key_frames_all_over_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = film(tmp_path / "a.mp4", 40, steps=CHUNK)
    decoded = []
    whole = render_report._webp
    monkeypatch.setattr(render_report, "_webp", lambda frame, side: decoded.append(1) or whole(frame, side))
    look = look_at(path)
    assert [picture.frame for picture in look.pictures] == [36, 120, 192, 276, 360, 432]
    for picture in look.pictures:
        assert level(picture.data) == pytest.approx(grey(picture.frame // CHUNK), abs=1.9)
    assert len(decoded) == 7


def test_pictures_are_small(tmp_path: Path) -> None:
    look = look_at(film(tmp_path / "a.mp4", 1, height=300, width=600))
    assert Image.open(io.BytesIO(look.pictures[0].data)).size == (200, 100)
    assert look.poster is not None and Image.open(io.BytesIO(look.poster.data)).size == (400, 200)


def test_a_video_shorter_than_its_pictures(tmp_path: Path) -> None:
    writer = SegmentWriter(tmp_path / "seg", 16, 2, 2)
    writer.write(0, np.zeros((1, 2, 2, 3), np.uint8))
    write_video(writer.paths(), tmp_path / "a.mp4", 16, {})
    assert [picture.frame for picture in look_at(tmp_path / "a.mp4").pictures] == [0]


@given(st.data())
def test_damaged_files_never_raise_anything_else(good_film: Path, data: st.DataObject) -> None:
    raw = bytearray(good_film.read_bytes())
    for _ in range(data.draw(st.integers(1, 8))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path = good_film.with_name("damaged.mp4")
    path.write_bytes(raw[: data.draw(st.integers(0, len(raw)))])
    try:
        assert len(look_at(path).pictures) <= 6
    except InputError as error:
        assert "\n" not in str(error)


# ---------------------------------------------------------------------- the page


def test_the_page_shows_the_frames_and_links_to_the_files(store: JobStore) -> None:
    job = finished(store, "a", fields={"out": "my videos/50% #1 ü.mp4"})
    _, page, _ = report_of(store)
    assert [round(level(str(image["src"]))) for image in page.all("img")] == pytest.approx(
        [grey(frame) for frame in (3, 9, 15, 21, 27, 33)], abs=2
    )
    assert page.all("img")[0]["alt"] == "Frame 3 at 0.2 s"
    video = page.all("video")[0]
    assert video["preload"] == "none" and "controls" in video
    links = [str(video["src"]), *(str(a["href"]) for a in page.all("a"))]
    assert all((store.root / unquote(link)).is_file() for link in links)
    assert (store.root / unquote(links[0])) == store.file(job)
    assert links[0] == "./my%20videos/50%25%20%231%20%C3%BC.mp4"
    assert level(str(video["poster"])) == pytest.approx(grey(3), abs=2)


def test_the_page_loads_nothing_and_runs_nothing(store: JobStore) -> None:
    finished(store, "a")
    _, page, text = report_of(store)
    tags = {name for name, _ in page.elements}
    assert not tags & {"script", "link", "iframe", "object", "embed", "form", "base"}
    for name, attributes in page.elements:
        assert not [key for key in attributes if key.startswith("on") or key == "style"], name
        for key in ("src", "href", "poster"):
            if value := attributes.get(key):
                assert value.startswith(("./", "data:image/webp;base64,")) or value == "report.json"
    policy = next(str(m["content"]) for m in page.all("meta") if m.get("http-equiv"))
    style = text.partition("<style>")[2].partition("</style>")[0]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policy.startswith(f"default-src 'none'; style-src 'sha256-{digest}'; img-src data:;")


def test_a_failed_job_shows_its_error_and_its_partial_video(store: JobStore) -> None:
    bad, gone = failed(store, "bad", "NaN <b>in</b> chunk 3"), failed(store, "gone", "no room")
    film(partial_video(store.file(bad)), 2)
    _, page, _ = report_of(store)
    assert page.text("error") == ["NaN <b>in</b> chunk 3", "no room"]
    assert [video["src"] for video in page.all("video")] == ["./bad.partial.mp4"]
    assert page.text("badge") == ["failed", "failed"] and len(page.all("img")) == 6
    assert [a["id"] for a in page.all("article")] == ["job-bad", f"job-{gone.id}"]


def test_missing_and_damaged_files_are_cards_that_say_so(store: JobStore) -> None:
    finished(store, "missing", video=False)
    for name in ("garbage", "short", "changed"):
        finished(store, name)
    (store.root / "garbage.mp4").write_bytes(b"\0" * 500)
    whole = (store.root / "short.mp4").read_bytes()
    (store.root / "short.mp4").write_bytes(whole[: whole.index(b"mdat") + 300])
    film(store.root / "changed.mp4", 4)
    _, page, _ = report_of(store)
    missing, garbage, short, changed = page.text("error")
    assert missing == "the file is missing; run again to make it anew"
    assert garbage.startswith("the file cannot be read: ")
    assert short == "parts of the file cannot be decoded; delete it and run again to make it anew"
    assert changed.endswith("somebody changed it")
    assert page.text("badge bad") == ["damaged"] * 4
    # what can still be seen of it is shown
    assert len([v for v in page.all("video") if v["src"] == "./changed.mp4"]) == 1


def test_many_jobs_make_a_page_of_bounded_size(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(render_report, "MAX_CARDS", 3)
    monkeypatch.setattr(render_report, "MAX_PICTURE_BYTES", 1)
    one = finished(store, "a")
    jobs = [replace(one, id=f"job-{i}", out=f"job-{i}.mp4") for i in range(5_000)]
    jobs[:2] = [one, one]
    write_report(store, jobs, store.root, 0.0, 1.0)
    text = (store.root / "index.html").read_text()
    page = Page(text)
    # the first one uses the room up; the second one is there without pictures
    assert len(page.all("img")) == 6 and len(page.all("video")) == 2
    assert len(page.all("article")) == 3 and len(page.all("li")) == 4_997
    assert page.all("a")[-2]["href"] == "./job-4999.mp4"
    assert len(text) < 2e6


def test_pictures_end_with_their_time(store: JobStore) -> None:
    finished(store, "a")
    value = write_report(store, store.jobs(), store.root, 0.0, 1.0)
    page = Page(contact_sheet(store, store.jobs(), value, store.root, pictures_s=-1.0))
    assert not page.all("img") and page.all("video")[0]["src"] == "./a.mp4"


def test_states_can_be_shown_alone(store: JobStore) -> None:
    finished(store, "a")
    assert not report_of(store)[1].all("input")
    failed(store, "b", "no")
    _, page, text = report_of(store)
    assert [i["id"] for i in page.all("input")] == ["show-all", "show-done", "show-failed"]
    for name in ("done", "failed", "cancelled", "queued", "running"):
        assert f"body:has(#show-{name}:checked) .card:not(.is-{name})" in text


def test_settings_and_later_prompts_are_there(store: JobStore) -> None:
    fields = {"schedule": "1: a blue circle bouncing", "seed": 7, "cache": "int8,window=12", "seconds": 3.0}
    finished(store, "a", fields=fields, resumed_at=2, note="light, at chunk 2")
    _, page, _ = report_of(store)
    values = page.text("bdi")
    assert values[0] == "a blue circle bouncing" and page.text("summary") == ["1 later prompt"]
    for value in ("2.25 s, 36 frames", "64x48", "7", "bounce", "0:00:06", "at chunk 2", "light, at chunk 2"):
        assert value in values
    assert any("window=12" in value and "format=int8" in value for value in values)


texts = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=80) | st.sampled_from(
    [
        "<script>alert(1)</script>",
        "</p><script src=//x>",
        "'\"><img onerror=x>",
        "&lt;script&gt;",
        "<!--",
        "]]>",
    ]
)


@settings(max_examples=50)
@given(prompt=texts, error=texts, later=texts)
def test_whatever_users_write_comes_back_as_text(
    shared_store: JobStore, prompt: str, error: str, later: str
) -> None:
    noncharacters = str.maketrans("\ufffe\uffff", "\ufffd\ufffd")
    store = shared_store
    request = {"prompt": prompt, "schedule": [[1.0, later]], "negative": later, "seed": prompt}
    job = replace(store.get("x"), state=State.FAILED, error=error, request=request | {"cache": later})
    value = write_report(store, [job], store.root, 0.0, 1.0)
    text = (store.root / "index.html").read_text()
    page = Page(text)
    assert "<script" not in text.lower() and "<img" not in text.lower() and "<!--" not in text
    assert page.text("prompt") == [prompt.translate(noncharacters)]
    assert page.text("error") == ([error.translate(noncharacters)] if error else [])
    assert page.text("bdi")[0] == later.translate(noncharacters)
    assert (
        json.loads((store.root / "report.json").read_text())["jobs"][0]["prompt"]
        == value["jobs"][0]["prompt"]
    )


def test_what_html_cannot_hold_becomes_a_mark() -> None:
    page = tag("p", "a\0b\x1bc\ud800d\r\ne", title='"\x00<')
    assert page == '<p title="&quot;\ufffd&lt;">a\ufffdb\ufffdc\ufffdd\ne</p>'
    assert page.encode()


# ---------------------------------------------------------------------- dry run


def rendered(store: JobStore, *requests: VideoRequest, **options: Any) -> tuple[str, list[dict[str, Any]]]:
    table, rows = dry_run_table([plan(request) for request in requests], store, ["cpu"], **options)
    console = Console(file=io.StringIO(), width=200)
    console.print(table)
    return console.file.getvalue(), rows  # type: ignore[attr-defined]


def test_without_earlier_jobs_no_time_is_invented(store: JobStore) -> None:
    text, rows = rendered(store, VideoRequest(id="a", prompt=PROMPT, seconds=2.0))
    assert rows[0]["estimate_s"] is None and rows[0]["output_bytes"] is None
    assert "time: unknown until the first chunk" in text and "disk: unknown" in text
    assert (rows[0]["state"], rows[0]["chunks"], rows[0]["frames"], rows[0]["seconds"]) == ("new", 3, 32, 2.0)
    assert rows[0]["kv_bytes"] > 0 and rows[0]["need_bytes"] > rows[0]["kv_bytes"]


def test_time_and_size_are_those_of_earlier_jobs_alike(store: JobStore) -> None:
    finished(store, "slow", wall_s=9.0, size_bytes=3600)
    finished(store, "resumed", wall_s=1.0, resumed_at=2, size_bytes=3600)
    finished(store, "fast", wall_s=1.5, size_bytes=7200)
    finished(store, "large", fields={"width": 128}, wall_s=900.0)
    text, rows = rendered(
        store,
        VideoRequest(id="a", prompt=PROMPT, seconds=8.0),
        VideoRequest(id="b", prompt=PROMPT, seconds=8.0, steps=1),
    )
    # chunks took 3, 1 and 0.5 s
    assert (rows[0]["chunks"], rows[0]["estimate_s"], rows[0]["estimate_from"]) == (11, 11.0, 3)
    assert rows[0]["output_bytes"] == 128 * 100
    assert rows[1]["estimate_s"] is None
    assert "time: about 0:00:11 on cpu, by earlier jobs, and 1 video unknown until the first chunk" in text


def test_an_interrupted_job_tells_its_speed_too(store: JobStore) -> None:
    job, claim = claimed(store, "a", seconds=8.0)
    store.report("a", reached(chunk=4, chunks=11, frames=45, fps=24.0))
    store.put_back(job)
    claim.release()
    _, rows = rendered(store, VideoRequest(id="a", prompt=PROMPT, seconds=8.0))
    assert (rows[0]["estimate_s"], rows[0]["estimate_from"]) == (5.5, 1)


def test_several_devices_share_the_work(store: JobStore) -> None:
    rows = [
        {"state": "new", "to_make": True, "estimate_s": s, "frames": 1, "output_bytes": 1, "need_bytes": 5}
        for s in (8.0, 2.0, 3.0, 4.0)
    ]
    total = plan_total(rows, store, ["cuda:0", "cuda:1"])
    # 8 on one; 2, 3 and 4 on the other
    assert (total["estimate_s"], total["frames"], total["output_bytes"], total["need_bytes"]) == (
        9.0,
        4,
        4,
        5,
    )
    assert total["free_bytes"] > 0


def test_states_of_what_is_planned(store: JobStore) -> None:
    finished(store, "done")
    finished(store, "lost", video=False)
    finished(store, "other", fields={"seed": 5})
    failed(store, "bad", "NaN [red]in\nchunk 3")
    half, claim = claimed(store, "half")
    film(store.root / "x.mp4", 2)
    store.folder(half).segments.mkdir()
    store.folder(half).records.mkdir()
    for chunk, path in enumerate(sorted((store.root / "x.seg").iterdir())):
        path.rename(store.folder(half).segments / path.name)
        # the second chunk has a segment and no record: it is made anew
        if not chunk:
            (store.folder(half).records / "000000-1.safetensors").write_bytes(b"")
    store.put_back(half)
    claim.release()
    _, held = claimed(store, "busy")
    ids = ("done", "lost", "other", "bad", "half", "busy", "new")
    text, rows = rendered(store, *(VideoRequest(id=id, prompt=PROMPT, seconds=2.0) for id in ids))
    assert [row["state"] for row in rows] == ["done", "new", "refused", "failed", "resumes", "running", "new"]
    assert rows[4]["resumes_at"] == 1
    assert [row["id"] for row in rows if row["to_make"]] == ["lost", "half", "new"]
    assert "done already" in text and "resumes at chunk 1" in text and "NaN [red]in chunk 3" in text
    _, again = rendered(store, *(VideoRequest(id=id, prompt=PROMPT, seconds=2.0) for id in ids), again=True)
    assert [row["id"] for row in again if row["to_make"]] == ["lost", "bad", "half", "new"]
    # two chunks of three are left of it, at 2 s each
    assert rows[4]["estimate_s"] == 4.0
    held.release()


def test_nothing_left_to_make_is_said(store: JobStore) -> None:
    finished(store, "a")
    text, _ = rendered(store, VideoRequest(id="a", prompt=PROMPT, seconds=2.0))
    assert (
        "1 video: 1 done" in text
        and "nothing is left to make" in text
        and "time" not in text.split("───")[-1]
    )


def test_a_disk_that_is_too_small_is_told(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    finished(store, "a")
    usage = type("Usage", (), {"free": 10})
    monkeypatch.setattr(render_report.shutil, "disk_usage", lambda path: usage)
    text, _ = rendered(store, VideoRequest(id="b", prompt=PROMPT, seconds=2.0, seed=1))
    assert "MAKE ROOM FIRST" in text
