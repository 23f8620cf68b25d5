"""What `vidkv render` is doing, on stderr: a table that changes on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

from vidkv.jobs.store import Job, State
from vidkv.memory import gigabytes
from vidkv.request import printable

if TYPE_CHECKING:
    from rich.console import Group, RenderableType
    from rich.table import Table
    from rich.text import Text

STATUS_S = 10.0
"""How often the whole is summed up where there is no terminal."""
DRIFT_NOTICE, DRIFT_ALARM = 5.0, 15.0
"""Percent of full scale from which on drift is coloured."""
SMOOTHING_S, SMOOTHING_CHUNKS = 60.0, 10.0
"""The rate is that of about the last minute, or of the last ten chunks where those take longer."""
_SLACK_S = 1.0


@dataclass(frozen=True)
class Totals:
    """All jobs together.

    Attributes:
        left: neither done nor failed nor cancelled; of them `running` are being made.
        chunks, chunks_done: of all jobs but those that failed or were cancelled.
        fps: frames per second of all workers, None until it is known.
        eta_s: seconds until everything is done, None until it is known.
    """

    jobs: int
    done: int
    failed: int
    cancelled: int
    running: int
    left: int
    chunks: int
    chunks_done: int
    fps: float | None
    eta_s: float | None


class Rates:
    """Chunks and frames per second of all workers together, from what changes between looks at the jobs.

    The first chunk of every worker is left out: it waits for weights to be read.
    """

    def __init__(self) -> None:
        self._before: dict[str, Job] = {}
        self._time = math.nan
        self._to_skip: int | None = None
        self._chunks = self._frames = self._elapsed = 0.0

    @property
    def chunks(self) -> float | None:
        """Per second; None until it is known."""
        return self._chunks / self._elapsed if self._chunks and self._elapsed else None

    @property
    def frames(self) -> float | None:
        """Per second; None until it is known."""
        return self._frames / self._elapsed if self._chunks and self._elapsed else None

    def update(self, jobs: Sequence[Job], now: float) -> None:
        """Take in the jobs as they are at a time in seconds."""
        passed = 0.0 if math.isnan(self._time) else max(0.0, now - self._time)
        made = frames = 0
        for job in jobs:
            before = self._before.get(job.id, job)
            if _made_here(before, job, passed):
                made += max(0, job.done - before.done)
                frames += max(0, job.frames - before.frames)
        workers = max(_running(self._before.values()), _running(jobs), 1)
        self._before, self._time = {job.id: job for job in jobs}, now
        if self._to_skip is None:
            if made:
                self._to_skip = max(0, workers - made)
            return
        span = max(SMOOTHING_S, SMOOTHING_CHUNKS / self.chunks) if self.chunks else math.inf
        keep = math.exp(-passed / span)
        skipped = min(made, self._to_skip)
        self._to_skip -= skipped
        counted = (made - skipped) / made if made else 0.0
        self._elapsed = self._elapsed * keep + passed
        self._chunks = self._chunks * keep + counted * made
        self._frames = self._frames * keep + counted * frames


def totals(jobs: Sequence[Job], rates: Rates) -> Totals:
    """Sum up jobs; the time left is all chunks left at the present rate of all workers.

    It is never less than the longest of the jobs that are running needs by itself.
    """
    count = {state: sum(job.state is state for job in jobs) for state in State}
    wanted = [job for job in jobs if job.state not in (State.FAILED, State.CANCELLED)]
    chunks = sum(job.chunks for job in wanted)
    done = sum(_done(job) for job in wanted)
    eta = None
    if chunks == done:
        eta = 0.0
    elif rates.chunks:
        alone = [_number(job.progress, "eta_s") for job in jobs if job.state is State.RUNNING]
        eta = max([(chunks - done) / rates.chunks, *alone])
    return Totals(
        len(jobs), count[State.DONE], count[State.FAILED], count[State.CANCELLED], count[State.RUNNING],
        count[State.RUNNING] + count[State.QUEUED], chunks, done, rates.frames, eta,
    )  # fmt: skip


class RenderProgress:
    """Shows the jobs of a store while they are worked off.

        with RenderProgress() as progress:
            while supervisor.step():
                progress.update(store.jobs())

    Nothing it meets, odd prompts and a terminal that has gone away included, raises: a batch that runs
    overnight is worth more than its display.

    Args:
        stream: stderr by default.
        clock: seconds, monotonic.
    """

    def __init__(self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.stream, self.clock = stream or sys.stderr, clock
        self.rates = Rates()
        self._known: dict[str, Job] | None = None
        self._totals: Totals | None = None
        self._view: _Terminal | _Lines | None = None
        self._gone = False

    def __enter__(self) -> RenderProgress:
        with self._whatever_becomes_of_the_stream():
            terminal = self.stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")
            self._view = (_Terminal if terminal else _Lines)(self.stream, self.clock)
            self._view.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        view, self._view = self._view, None
        if view is not None:
            # also where the stream is gone: it gives sys.stderr back
            with self._whatever_becomes_of_the_stream():
                view.close(self._totals)

    def update(self, jobs: Sequence[Job]) -> None:
        """Show how far they are; the first call's jobs that have ended are not announced.

        Args:
            jobs: all rows of the store.
        """
        self.rates.update(jobs, self.clock())
        self._totals = totals(jobs, self.rates)
        news = [] if self._known is None else [job for job in jobs if _is_news(self._known.get(job.id), job)]
        self._known = {job.id: job for job in jobs}
        if self._view is not None and not self._gone:
            running = [job for job in jobs if job.state is State.RUNNING]
            with self._whatever_becomes_of_the_stream():
                self._view.show(news, running, self._totals)

    @contextlib.contextmanager
    def _whatever_becomes_of_the_stream(self) -> Iterator[None]:
        """Closed, full, or at the other end of a line that was cut: from then on nothing is shown."""
        try:
            yield
        except (OSError, ValueError):
            self._gone = True


class _Lines:
    """Plain text for files and pipes: no escape codes, nothing but ASCII of our own."""

    def __init__(self, stream: TextIO, clock: Callable[[], float]) -> None:
        self.stream, self.clock = stream, clock
        self.began = self.last = clock()

    def open(self) -> None:
        """Nothing to prepare."""

    def show(self, news: Sequence[Job], running: Sequence[Job], whole: Totals) -> None:
        for job in news:
            self._write(f"{_headline(job)} {_title(job)}: {_ending(job)}")
        if self.clock() - self.last >= STATUS_S:
            self.last = self.clock()
            self._sum_up(whole)

    def close(self, whole: Totals | None) -> None:
        if whole is not None:
            self._sum_up(whole)

    def _sum_up(self, whole: Totals) -> None:
        self._write(f"after {clock_time(self.clock() - self.began)}: {', '.join(_summary(whole))}")

    def _write(self, text: str) -> None:
        encoding = getattr(self.stream, "encoding", None) or "utf-8"
        self.stream.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")
        self.stream.flush()


class _Terminal:
    """A row for every running job, below them the total; jobs that have ended scroll away above."""

    def __init__(self, stream: TextIO, clock: Callable[[], float]) -> None:
        from rich.console import Console
        from rich.live import Live

        class Steadfast(Console):
            """rich ends the process where nobody reads its output any more."""

            def on_broken_pipe(self) -> None:
                raise BrokenPipeError

        self.console = Steadfast(file=stream, highlight=False, markup=False, emoji=False)
        self.live = Live(
            console=self.console, auto_refresh=False, transient=True, redirect_stdout=False,
            redirect_stderr=stream is sys.stderr,
        )  # fmt: skip

    def open(self) -> None:
        self.live.start()

    def show(self, news: Sequence[Job], running: Sequence[Job], whole: Totals) -> None:
        for job in news:
            self.console.print(self._news(job), soft_wrap=True)
        self.live.update(self._picture(running, whole), refresh=True)

    def close(self, whole: Totals | None) -> None:
        self.live.stop()
        if whole is not None:
            self.console.print(self._total(whole))

    def _news(self, job: Job) -> Text:
        from rich.text import Text

        styles = {State.DONE: "green", State.FAILED: "bold red"}
        return Text.assemble(
            (_headline(job), styles.get(job.state, "yellow")), " ", (_title(job), "bold"), f": {_ending(job)}"
        )

    def _picture(self, running: Sequence[Job], whole: Totals) -> Group:
        from rich.console import Group
        from rich.text import Text

        room = max(1, self.console.height - 4)
        shown = running if len(running) <= room else running[: room - 1]
        parts: list[RenderableType] = [self._rows(shown)] if shown else []
        if len(shown) < len(running):
            parts.append(Text(f"and {len(running) - len(shown)} more are running", style="dim"))
        return Group(*parts, self._total(whole))

    def _rows(self, jobs: Sequence[Job]) -> Table:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        width = self.console.width
        with_prompt, with_memory, with_rate = width >= 110, width >= 90, width >= 60
        table = Table.grid(padding=(0, 1), expand=True)
        table.add_column(no_wrap=True, overflow="ellipsis", max_width=24, style="bold")
        if with_prompt:
            table.add_column(no_wrap=True, overflow="ellipsis", ratio=2, style="dim")
        table.add_column(ratio=1, min_width=4)
        table.add_column(no_wrap=True, justify="right")
        for wanted in (with_rate, True, with_memory, True):
            if wanted:
                table.add_column(no_wrap=True, justify="right")
        for job in jobs:
            fps, eta = _number(job.progress, "fps"), _number(job.progress, "eta_s")
            cells: list[RenderableType] = [Text(_title(job))]
            if with_prompt:
                cells.append(Text(_line(str(job.request.get("prompt", "")), 120)))
            cells.append(ProgressBar(max(1, job.chunks), _done(job), complete_style="cyan"))
            cells.append(Text(f"{_done(job)}/{job.chunks}"))
            if with_rate:
                cells.append(Text(f"{fps:.1f} fps" if fps else "starting"))
            cells.append(Text(clock_time(eta) if fps else "-:--:--"))
            if with_memory:
                cells.append(Text(f"KV {gigabytes(int(_number(job.progress, 'kv_bytes')))}"))
            cells.append(_drift_text(job.progress))
            table.add_row(*cells)
        return table

    def _total(self, whole: Totals) -> Table:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        table = Table.grid(padding=(0, 1))
        table.add_column(width=min(24, self.console.width // 4))
        table.add_column()
        bar = ProgressBar(max(1, whole.chunks), whole.chunks_done, complete_style="cyan")
        table.add_row(bar, Text(", ".join(_summary(whole)), style="bold"))
        return table


def worst_drift(progress: Mapping[str, Any]) -> tuple[str, float] | None:
    """(name, percent with its sign) of what has moved furthest from the first chunk."""
    moved = progress.get("drift")
    if not isinstance(moved, Mapping):
        return None
    values = [(str(name), float(value)) for name, value in moved.items() if isinstance(value, int | float)]
    return max(values, key=lambda entry: abs(entry[1]), default=None)


def clock_time(seconds: float) -> str:
    """`1:02:03`, with days where there are any."""
    if not math.isfinite(seconds):
        return "-:--:--"
    minutes, second = divmod(round(max(0.0, seconds)), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    return f"{f'{days} d ' if days else ''}{hour}:{minute:02}:{second:02}"


def _drift_text(progress: Mapping[str, Any]) -> Text:
    from rich.text import Text

    if progress.get("blank"):
        return Text("blank!", style="bold red")
    worst = worst_drift(progress)
    if worst is None:
        return Text("")
    name, value = worst
    # what is not a number is not small either
    calm, noticed = abs(value) < DRIFT_NOTICE, abs(value) < DRIFT_ALARM
    style = "dim" if calm else "yellow" if noticed else "bold red"
    return Text(f"{_line(name, 10)} {value:+.1f} %", style=style)


def _summary(whole: Totals) -> list[str]:
    parts = [f"{whole.done} of {whole.jobs} done"]
    parts += [f"{number} {name}" for name, number in _troubles(whole) if number]
    if whole.left:
        parts.append(f"{whole.left} left")
        parts.append(f"{whole.running} running")
        parts.append("rate not known yet" if whole.fps is None else f"{whole.fps:.1f} frames/s")
        if whole.eta_s is not None:
            parts.append(f"ETA {clock_time(whole.eta_s)}")
    return parts


def _troubles(whole: Totals) -> tuple[tuple[str, int], ...]:
    return ("failed", whole.failed), ("cancelled", whole.cancelled)


def _headline(job: Job) -> str:
    return "waiting" if job.state is State.QUEUED else job.state.value


def _ending(job: Job) -> str:
    """How a job ended, or why it has to try again."""
    if job.state is State.DONE:
        resumed = job.result.get("resumed_at")
        again = f", from chunk {_line(str(resumed), 20)} on" if resumed else ""
        return f"{job.frames} frames in {_number(job.result, 'wall_s'):.1f} s{again}"
    if job.state is State.CANCELLED:
        return f"{job.done} of {job.chunks} chunks are kept"
    text = _line(job.error or "no reason given", 400)
    return text if job.state is State.FAILED else f"attempt {job.attempts} failed, will try again: {text}"


def _is_news(before: Job | None, job: Job) -> bool:
    """Whether something is to be said about a job: it has ended, or failed in a way that may pass."""
    if job.ended:
        return before is None or (before.state, before.submitted) != (job.state, job.submitted)
    return before is not None and job.state is State.QUEUED and job.attempts > before.attempts


def _made_here(before: Job, job: Job, passed: float) -> bool:
    """Whether a job's new chunks were made since; another host's result comes all at once."""
    if before.state is State.RUNNING or job.state is State.RUNNING:
        return True
    return 0 < _number(job.result, "wall_s") <= passed + _SLACK_S


def _running(jobs: Iterable[Job]) -> int:
    return sum(job.state is State.RUNNING for job in jobs)


def _done(job: Job) -> int:
    return job.chunks if job.state is State.DONE else min(job.done, job.chunks)


def _title(job: Job) -> str:
    return _line(job.id, 80)


def _line(text: str, limit: int) -> str:
    """On one line; what could move a cursor or turn the text around is spelled out."""
    return printable(" ".join(text[: 4 * limit].split()), limit)


def _number(values: Mapping[str, Any], name: str) -> float:
    """A finite number out of a row, 0 where there is none."""
    value = values.get(name)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else 0.0
