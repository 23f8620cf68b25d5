"""What is shown while jobs are worked off: rates, time left, plain lines and the terminal's table."""

from __future__ import annotations

import io
import unicodedata
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vidkv.apps.render_progress import Rates, RenderProgress, clock_time, totals, worst_drift
from vidkv.jobs.store import Job, State

ODD_PROMPTS = (
    "[red]not a style[/red] [/]",
    "two\nlines\r\x1b[2Jand an escape",
    "ילד רץ \u202eturned",
    "half a character \ud800",
    "漢字" * 200,
    "a" + "\u0301" * 500,
    "",
)
ADVANCED = {"fps": 12.0, "eta_s": 30.0, "kv_bytes": 3_500_000, "drift": {"luma": 1.0}, "blank": False}


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def job(id: str, state: State = State.RUNNING, done: int = 0, **changes: Any) -> Job:
    row = Job(
        id=id, key="k", number=1, state=state, request={"prompt": "a red circle"}, settings={},
        out=f"{id}.mp4", keep=False, parent=None, attempts=0, crashes=0, worker=None, error=None, chunks=40,
        done=done, frames=12 * done, progress={}, result={}, submitted=1.0, changed=1.0, version=1,
    )  # fmt: skip
    return replace(row, **changes)


def feed(rates: Rates, looks: Sequence[tuple[float, Sequence[Job]]]) -> Rates:
    for now, jobs in looks:
        rates.update(jobs, now)
    return rates


def played(looks: Sequence[Sequence[Job]], stream: io.StringIO, step_s: float = 1.0) -> str:
    """What is written while the jobs change."""
    clock = Clock()
    with RenderProgress(stream, clock) as progress:
        for jobs in looks:
            progress.update(jobs)
            clock.now += step_s
    return stream.getvalue()


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "140")
    monkeypatch.setenv("LINES", "12")
    return Terminal()


def test_time_left_is_chunks_left_at_the_rate_of_all_workers_without_the_first_chunk() -> None:
    queue = job("later", State.QUEUED)
    # 100 s of loading, then a chunk of each of two workers every 4 s
    looks = [(0.0, [job("a"), job("b"), queue])]
    looks += [(100.0 + 4 * i, [job("a", done=1 + i), job("b", done=1 + i), queue]) for i in range(5)]
    rates = feed(Rates(), looks)
    assert rates.chunks == pytest.approx(0.5)
    assert rates.frames == pytest.approx(6.0)
    whole = totals(looks[-1][1], rates)
    assert (whole.chunks, whole.chunks_done, whole.left, whole.running) == (120, 10, 3, 2)
    assert whole.eta_s == pytest.approx(110 / 0.5)


def test_the_first_chunk_of_every_worker_is_left_out() -> None:
    looks = [(0.0, [job("a"), job("b")])]
    for i in range(3):
        looks.append((100.0 + 4 * i, [job("a", done=1 + i), job("b", done=i)]))
        looks.append((100.2 + 4 * i, [job("a", done=1 + i), job("b", done=1 + i)]))
    assert feed(Rates(), looks).chunks == pytest.approx(4 / 8.2, rel=0.01)


def test_the_rate_is_unknown_until_a_second_chunk() -> None:
    rates = feed(Rates(), [(0.0, [job("a")]), (9.0, [job("a", done=1)])])
    assert rates.chunks is None
    assert totals([job("a", done=1)], rates).eta_s is None


def test_the_rate_follows_a_change_of_speed() -> None:
    jobs = [(float(i), [job("a", done=i, chunks=10_000)]) for i in range(200)]
    jobs += [(199.0 + 4 * i, [job("a", done=199 + i, chunks=10_000)]) for i in range(1, 200)]
    rates = feed(Rates(), jobs)
    assert rates.chunks == pytest.approx(0.25, rel=1e-3)


def test_what_was_finished_before_or_by_another_host_is_no_speed_of_ours() -> None:
    resumed, others = job("a", done=30), job("b", State.QUEUED)
    ended = replace(others, state=State.DONE, done=40, frames=480, result={"wall_s": 500.0})
    looks = [(0.0, [resumed, others]), (1.0, [replace(resumed, done=31), others])]
    looks += [(2.0, [replace(resumed, done=32), others]), (3.0, [replace(resumed, done=33), ended])]
    assert feed(Rates(), looks).chunks == pytest.approx(1.0)


def test_a_short_job_between_two_looks_counts() -> None:
    made = {"wall_s": 0.4}
    looks = [
        (float(i), [job(str(n), State.DONE if n < i else State.QUEUED, chunks=1, done=n < i, result=made)
                    for n in range(9)])
        for i in range(8)
    ]  # fmt: skip
    assert feed(Rates(), looks).chunks == pytest.approx(1.0)


def test_chunks_that_are_made_anew_do_not_make_the_rate_negative() -> None:
    looks = [(0.0, [job("a", done=5)]), (1.0, [job("a", done=6)]), (2.0, [job("a", done=2)])]
    assert feed(Rates(), [*looks, (3.0, [job("a", done=3)])]).chunks == pytest.approx(0.5)


def test_the_last_long_job_is_not_hidden_by_many_short_ones() -> None:
    alone = job("long", progress=ADVANCED | {"eta_s": 900.0})
    rates = feed(Rates(), [(float(i), [job("a", done=i), alone]) for i in range(5)])
    assert totals([job("a", done=4), alone], rates).eta_s == 900.0


def test_failed_and_cancelled_jobs_are_not_waited_for() -> None:
    jobs = [job("a", State.FAILED, 3), job("b", State.CANCELLED, 3), job("c", State.DONE, 40)]
    whole = totals(jobs, Rates())
    assert (whole.failed, whole.cancelled, whole.done, whole.left, whole.eta_s) == (1, 1, 1, 0, 0.0)


def test_plain_lines_say_once_how_each_job_ended() -> None:
    start = [job("a", done=3), job("b"), job("c"), job("old", State.DONE, 40)]
    end = [
        job("a", State.DONE, 40, result={"wall_s": 61.25, "resumed_at": 7}),
        job("b", State.FAILED, error="NaN in\nchunk 3"),
        job("c", State.CANCELLED, 5),
        start[3],
    ]
    lines = played([start, end, end], io.StringIO()).splitlines()
    assert lines == [
        "done a: 480 frames in 61.2 s, from chunk 7 on",
        "failed b: NaN in chunk 3",
        "cancelled c: 5 of 40 chunks are kept",
        "after 0:00:03: 2 of 4 done, 1 failed, 1 cancelled",
    ]


def test_an_attempt_that_failed_is_told() -> None:
    again = job("a", State.QUEUED, attempts=1, error="disk is full")
    lines = played([[job("a")], [again], [again]], io.StringIO()).splitlines()
    assert lines[0] == "waiting a: attempt 1 failed, will try again: disk is full"
    assert len(lines) == 2


def test_a_plain_status_line_comes_every_ten_seconds() -> None:
    looks = [[job("a", done=i), job("b", State.QUEUED)] for i in range(36)]
    lines = played(looks, io.StringIO()).splitlines()
    times = [line.partition(": ")[0].removeprefix("after ") for line in lines]
    assert times == ["0:00:10", "0:00:20", "0:00:30", "0:00:36"]
    assert lines[1] == "after 0:00:20: 0 of 2 done, 2 left, 1 running, 12.0 frames/s, ETA 0:01:00"


@given(st.text(st.characters(), max_size=60), st.text(st.characters(), max_size=60))
def test_plain_lines_hold_no_control_characters(id: str, error: str) -> None:
    looks = [[job(id), job("b")], [job(id, State.FAILED, error=error), job("b")]]
    text = played(looks, io.StringIO(), step_s=11.0)
    assert text.endswith("\n")
    assert not [c for c in text.replace("\n", "") if unicodedata.category(c) in ("Cc", "Cf", "Cs")]
    assert len(text.splitlines()) == 3


def test_a_stream_of_few_characters_gets_escapes() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii", errors="strict", write_through=True)
    clock = Clock()
    with RenderProgress(stream, clock) as progress:
        progress.update([job("a")])
        progress.update([job("a", State.FAILED, error="ünï 漢")])
    assert rb"failed a: \xfcn\xef \u6f22" in raw.getvalue()


@pytest.mark.parametrize("prompt", ODD_PROMPTS)
@pytest.mark.parametrize("columns", ["20", "80", "140"])
def test_the_terminal_takes_any_prompt(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch, prompt: str, columns: str
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    odd = job("a", request={"prompt": prompt}, progress=ADVANCED)
    text = played([[odd], [replace(odd, state=State.FAILED, error=prompt)]], terminal)
    assert "failed" in text and "\x1b[2J" not in text and "\u202e" not in text
    if columns == "140" and "[red]" in prompt:
        assert prompt in text


def test_the_terminal_shows_running_jobs_and_the_total_alone(terminal: Terminal) -> None:
    running = [job(f"job-{i}", done=i, progress=ADVANCED) for i in range(3)]
    waiting = [job(f"job-{i}", State.QUEUED) for i in range(3, 500)]
    text = played([[*running, *waiting]], terminal)
    assert "2/40" in text and "12.0 fps" in text and "0:00:30" in text and "KV 4 MB" in text
    assert "job-2" in text and "job-3" not in text
    assert "0 of 500 done, 500 left, 3 running" in text


def test_more_running_jobs_than_lines_leave_room_for_the_total(terminal: Terminal) -> None:
    text = played([[job(f"job-{i}", progress=ADVANCED) for i in range(64)]], terminal)
    assert "job-6" in text and "job-7 " not in text
    assert "and 57 more are running" in text and "0 of 64 done" in text


@pytest.mark.parametrize(
    "value, style", [(-4.9, "\x1b[2m"), (5.0, "\x1b[33m"), (-14.9, "\x1b[33m"), (15.0, "\x1b[1;31m")]
)
def test_drift_is_named_signed_and_coloured(terminal: Terminal, value: float, style: str) -> None:
    drifting = ADVANCED | {"drift": {"luma": 1.0, "saturation": value, "contrast": -2.0}}
    text = played([[job("a", progress=drifting)]], terminal)
    before, _, _ = text.partition(f"saturation {value:+.1f} %")
    assert before != text and before.rstrip(" ").endswith(style)


def test_a_blank_picture_is_flagged(terminal: Terminal) -> None:
    assert "blank!" in played([[job("a", progress=ADVANCED | {"blank": True})]], terminal)


def test_worst_drift_is_by_size_and_keeps_its_sign() -> None:
    assert worst_drift({"drift": {"luma": 2.0, "contrast": -3.5}}) == ("contrast", -3.5)
    assert worst_drift({}) is None and worst_drift({"drift": {}}) is None


def test_a_dumb_terminal_gets_plain_lines(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    assert "\x1b" not in played([[job("a")], [job("a", State.DONE, 40)]], terminal)


@pytest.mark.parametrize("kind", [io.StringIO, Terminal])
@pytest.mark.parametrize("error", [BrokenPipeError("gone"), OSError(5, "gone"), ValueError("closed")])
def test_a_stream_that_goes_away_ends_the_display_and_nothing_else(
    terminal: Terminal, kind: type[io.StringIO], error: Exception
) -> None:
    stream, writes = kind(), []

    def fail(text: str) -> int:
        writes.append(text)
        raise error

    with RenderProgress(stream, Clock()) as progress:
        progress.update([job("a")])
        stream.write = fail  # type: ignore[method-assign]
        for done in range(1, 20):
            progress.update([job("a", State.FAILED, done), job(str(done), State.DONE, 40)])
    # one that shows it, one that gives the cursor back
    assert 1 <= len(writes) <= 3


@pytest.mark.parametrize(
    "seconds, text",
    [(0, "0:00:00"), (59.6, "0:01:00"), (3723, "1:02:03"), (90061, "1 d 1:01:01"), (float("inf"), "-:--:--")],
)
def test_clock_time(seconds: float, text: str) -> None:
    assert clock_time(seconds) == text
