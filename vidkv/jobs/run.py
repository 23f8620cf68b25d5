"""One job from wherever it stands to its end."""

from __future__ import annotations

import contextlib
import errno
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

import psutil
import torch

from vidkv.drift import blank, drift, look
from vidkv.errors import (
    Cancelled,
    InputError,
    NumericsError,
    OutputError,
    PromptError,
    ResourceError,
    StateError,
    VidkvError,
)
from vidkv.files import file_sha256, publish, reason
from vidkv.jobs.checkpoints import Checkpoints, Interval
from vidkv.jobs.claims import Claim
from vidkv.jobs.folder import JobFolder, Steer
from vidkv.jobs.records import Head, Records, digest
from vidkv.loading import find_model
from vidkv.models.vae import pixel_frames
from vidkv.pipeline import CausalVideoPipeline
from vidkv.planning import Plan, load_pipeline, naming_shortage, open_stream, plan, require_room
from vidkv.prompts import PromptSchedule
from vidkv.request import EngineSettings, VideoRequest
from vidkv.rollout import Chunk, Rollout
from vidkv.segments import SegmentWriter, partial_video, read_metadata, write_video
from vidkv.sharing import Pools, PrefixCache
from vidkv.stream import ChunkRecord, VideoStream

Resume = Literal["exact", "light"]


@dataclass(frozen=True)
class Progress:
    """Where a job stands after a chunk.

    Attributes:
        chunk, chunks: done, and in all.
        frames: done.
        fps: frames per second of this run, from its first new chunk on.
        eta_s: seconds left at that rate.
        kv_bytes, held_bytes, rss_bytes: of the cache, of all that the rollout keeps, and of the process.
        drift: luma, saturation and contrast against the first chunk, in percent.
        blank: the picture has become one colour.
        steered: prompts that were steered in so far, see `folder.Steer`.
    """

    chunk: int
    chunks: int
    frames: int
    fps: float
    eta_s: float
    kv_bytes: int
    held_bytes: int
    rss_bytes: int
    drift: dict[str, float]
    blank: bool
    steered: tuple[Steer, ...] = ()


@dataclass(frozen=True)
class Options:
    """How jobs are run.

    Attributes:
        resume: `exact` writes checkpoints of cache and decoder, and a video that is taken up again goes on
            bit for bit; `light` keeps latents alone and goes on close to it.
        interval: of the checkpoints.
        partial: leave `NAME.partial.mp4` when a job stops early.
        concurrent: jobs that a worker makes by turns, of one model and precision.
        shared_bytes: for beginnings of videos that are remembered, see `sharing.PrefixCache`; 0 for none.
    """

    resume: Resume = "exact"
    interval: Interval = field(default_factory=Interval)
    partial: bool = True
    concurrent: int = 1
    shared_bytes: int = 0

    def __post_init__(self) -> None:
        for name, least in (("concurrent", 1), ("shared_bytes", 0)):
            if getattr(self, name) < least:
                raise InputError(f"{name}={getattr(self, name)}; give at least {least}")


class Interrupted(Cancelled):
    """This process is to stop; the job goes on later."""


class Paused(Cancelled):
    """The job is to wait until somebody says that it shall go on."""


class _EnoughMade(Cancelled):
    """The video is to end with the chunks that there are."""


class Runner:
    """Does one job after the other, and keeps the networks of the last one loaded.

        runner = Runner()
        result = runner.run(folder, claim, out, report)

    Args:
        stopping: asked at every denoising step; a true answer ends the job with `Interrupted`.
    """

    def __init__(self, options: Options | None = None, stopping: Callable[[], bool] = lambda: False) -> None:
        self.options, self.stopping = options or Options(), stopping
        self._loaded: tuple[tuple[Path, EngineSettings], CausalVideoPipeline] | None = None

    def run(
        self, folder: JobFolder, claim: Claim, root: Path, report: Callable[[Progress], None]
    ) -> dict[str, Any]:
        """Make the video of a job; nothing that is finished already is made again.

        Args:
            claim: held on the folder.
            root: the output folder, to which the job's `out` is relative.
            report: told of every new chunk.

        Returns:
            What `result.json` is to say; it is written by whoever ends the job.

        Raises:
            Interrupted: `stopping`; what is finished stays and is a partial video.
            Paused: by the job's `pause` mark, between two chunks; likewise, without a partial video.
            Cancelled: by its `cancel` mark, or by `stop` before a chunk was finished; as `Interrupted`.
            Fenced: another process has the job by now.
            VidkvError: what is wrong, likewise.
        """
        rolling = self.begin(folder, claim, root, report)
        for _ in rolling:
            pass
        assert rolling.result is not None
        return rolling.result

    def begin(
        self, folder: JobFolder, claim: Claim, root: Path, report: Callable[[Progress], None],
        lost: Callable[[], bool] = lambda: False,
    ) -> Rolling:  # fmt: skip
        """Likewise, a chunk each time that it is asked for the next.

        Args:
            lost: asked beside `stopping`.

        Raises:
            VidkvError: the job cannot be made as it was submitted.
        """
        request, settings = folder.request()
        out = root / folder.job()["out"]
        # what is loaded still may have to go first, see `pipeline`
        planned = plan(request, settings, fits=False)
        if planned.key != folder.job()["key"]:
            raise StateError(
                f"job {planned.id} was submitted as {folder.job()['key'][:9]} and is {planned.key[:9]} now: "
                "model, precision or a file it starts from has changed; submit it under another id"
            )
        key, steered = planned.key, folder.steered()
        if steered:
            planned = plan(request.steered(steered), settings, fits=False)
        work = _Work(folder, claim, planned, out, self, key, steered)
        work.stopping = lambda: self.stopping() or lost()
        return Rolling(self, work, report)

    def warm_up(self, request: VideoRequest, settings: EngineSettings) -> None:
        """Load the networks of a request and make its first chunk, so that the first job need not wait."""
        # what is wrong with it is for a job to say
        with contextlib.suppress(VidkvError, RuntimeError):
            planned = plan(request, settings)
            stream = open_stream(planned, self.pipeline(planned))
            try:
                next(stream, None)
            finally:
                stream.close()

    def has_loaded(self, model: str, settings: Mapping[str, Any]) -> bool:
        """Whether a job of this model and these settings needs nothing new."""
        if self._loaded is None:
            return False
        folder, loaded = self._loaded[0]
        with contextlib.suppress(VidkvError, ValueError):
            return find_model(model) == folder and EngineSettings.model_validate(settings) == loaded
        return False

    def pipeline(self, planned: Plan) -> CausalVideoPipeline:
        """The networks of a plan; those of the last one are kept if they are the same."""
        wanted = (planned.folder, planned.settings)
        if self._loaded is None or self._loaded[0] != wanted:
            # the old ones go first: there may not be room for both
            self._loaded = None
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            require_room(planned)
            pipe = load_pipeline(planned)
            if self.options.concurrent > 1 or self.options.shared_bytes:
                pipe.pools = Pools()
            if self.options.shared_bytes:
                # of several jobs a scheduler says how much room there is
                grow = self.options.concurrent == 1
                pipe.prefixes = PrefixCache(self.options.shared_bytes, grow=grow)
            self._loaded = wanted, pipe
        return self._loaded[1]


class Rolling(Iterator[int]):
    """A job in the making: each `next` makes a chunk and gives its index.

    Between two chunks all that is made is safe on the disk.

    Attributes:
        result: what `result.json` is to say, at the end.
    """

    def __init__(self, runner: Runner, work: _Work, report: Callable[[Progress], None]) -> None:
        self._runner, self._work, self._report = runner, work, report
        self.result: dict[str, Any] | None = None
        self._begun = time.perf_counter()
        self.finished = work.finished()
        self._chunks = self._roll()

    def __next__(self) -> int:
        return next(self._chunks)

    @property
    def plan(self) -> Plan:
        return self._work.plan

    @property
    def rollout(self) -> Rollout | None:
        """What it keeps between chunks; None while there is nothing."""
        return None if self._work.stream is None else self._work.stream.rollout

    @property
    def cancelled(self) -> bool:
        """Whether somebody has cancelled it, which else shows when it is its turn."""
        return self._work.folder.marked("cancel")

    def stop(self, error: Cancelled) -> None:
        """End it here with this error, as if it had come up in the middle of the next chunk.

        Raises:
            Cancelled: that error.
        """
        if self.rollout is None:
            # it has not begun, and earlier attempts may have left something to look at
            self._work.keep_partial("stopped")
        self._chunks.throw(error)

    def close(self) -> None:
        """Let go of everything, as if the process had died."""
        self._chunks.close()

    def _roll(self) -> Generator[int, None, None]:
        work = self._work
        if self.finished:
            work.resumed_at = work.committed
        else:
            pipe = self._runner.pipeline(work.plan)
            work.claim.check()
            yield from work.roll(pipe, self._report)
        self.result = work.publish() | {"wall_s": round(time.perf_counter() - self._begun, 3)}


class _Work:
    """A job while it is run.

    Args:
        planned: with what was steered in.
        key: of the job as it was submitted.
        steered: see `JobFolder.steered`.
    """

    def __init__(
        self, folder: JobFolder, claim: Claim, planned: Plan, out: Path, runner: Runner, key: str,
        steered: list[Steer],
    ) -> None:  # fmt: skip
        self.folder, self.claim, self.plan, self.out, self.key = folder, claim, planned, out, key
        self.steered = steered
        self.options, self.stopping = runner.options, runner.stopping
        job = folder.job()
        self.keep = bool(job.get("keep"))
        # files that were taken over bear the numbers of claims on the other job
        fence = claim.fence + int((job.get("parent") or {}).get("fence", 0))
        self.records = Records(folder.records, fence)
        try:
            self.writer = SegmentWriter(folder.segments, planned.entry.fps, *planned.size, fence=fence)
        except OSError as error:
            raise OutputError(f"cannot use {folder.path}: {reason(error)}; check its rights") from error
        self.checkpoints = Checkpoints(folder.checkpoints, fence, self.options.interval)
        self.resumed_at: int | None = None
        self.note: str | None = None
        self.stream: VideoStream | None = None
        self.digest, self.first_look = "", dict[str, float]()
        self._resident: set[int] = set()

    @property
    def committed(self) -> int:
        """Chunks that have both a segment and a record."""
        return min(len(self.writer.paths()), self.records.chunks)

    def finished(self) -> bool:
        """Whether all chunks are there, or as many as are wanted."""
        whole = self._whole_segments()
        if whole and self.folder.marked("stop"):
            self.records.drop_from(whole)
            self.writer.drop_from(whole)
            return True
        return whole >= self.plan.chunks

    def roll(
        self, pipe: CausalVideoPipeline, report: Callable[[Progress], None]
    ) -> Generator[int, None, None]:
        """Make the chunks that are missing; yields the index of each once it is safe."""
        stream = self._resume(pipe)
        process = psutil.Process()
        started, made = time.perf_counter(), 0
        try:
            with naming_shortage(self.plan):
                while (chunk := self._next(stream)) is not None:
                    evicted = self._evicted(chunk, stream)
                    if chunk.index >= self.committed:
                        seen = self._commit(chunk, stream)
                        if not made:
                            # the first one pays for what is loaded lazily
                            started = time.perf_counter()
                        made += 1
                        progress = self._progress(chunk, stream, seen, made, started, process)
                        self._log(chunk, stream, progress, evicted)
                        report(progress)
                    if self.options.resume == "exact":
                        self.checkpoints.consider(stream.rollout)
                    self._prune(stream)
                    self._check(chunk.index, -1)
                    self._pause(stream)
                    yield chunk.index
            self._keep_state(stream)
        except _EnoughMade:
            if not self.committed:
                raise Cancelled("the job was stopped before its first chunk was finished") from None
            self._keep_state(stream)
        except Paused:
            raise
        except Cancelled:
            self.keep_partial("stopped")
            raise
        except (VidkvError, RuntimeError) as error:
            self.keep_partial(str(error))
            raise
        finally:
            stream.close()

    def publish(self) -> dict[str, Any]:
        """Join the segments under the final name; what stands there from an earlier attempt is taken."""
        self.claim.check()
        chunks = self.committed
        head = self.records.head(chunks - 1)
        early = chunks < self.plan.chunks
        if early:
            request = self.plan.ended(chunks, head.frames)
            schedule = PromptSchedule.of(request.prompts)
            self.plan = replace(self.plan, request=request, schedule=schedule, frames=head.frames)
        metadata = self.plan.metadata() | {"job": self.key}
        if self.note:
            metadata["resumed"] = self.note
        if not _is_ours(self.out, self.key):
            if self.out.exists():
                raise OutputError(
                    f"{self.out} is another video; move it away or give the job another id, then run again"
                )
            try:
                self.out.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise OutputError(f"cannot create {self.out.parent}: {reason(error)}") from error
            self._join(self.out, metadata)
        if _is_ours(partial_video(self.out), self.key):
            partial_video(self.out).unlink(missing_ok=True)
        return {
            "state": "done",
            "out": str(self.out),
            "frames": head.frames,
            "chunks": chunks,
            "ended_early": early,
            "latents_sha256": head.digest,
            "size_bytes": self.out.stat().st_size,
            "resumed_at": self.resumed_at,
            "note": self.note,
        }

    def keep_partial(self, why: str) -> None:
        """Leave what there is as a playable file beside the final name."""
        paths = self.writer.paths()
        if not paths or not self.options.partial:
            return
        metadata = self.plan.metadata() | {"job": self.key, "partial": "true", "stopped": why[:500]}
        # the segments stay, so a file that cannot be written costs nothing
        with contextlib.suppress(VidkvError, OSError):
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self._join(partial_video(self.out), metadata)

    def _join(self, out: Path, metadata: Mapping[str, Any]) -> None:
        """The segments as one file; a worker that is killed meanwhile leaves nothing beside it."""
        paths, fps = self.writer.paths(), self.plan.entry.fps
        making = self.folder.making(self.claim.fence)
        try:
            write_video(paths, making, fps, metadata)
            publish(making, out)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise OutputError(
                    f"cannot write {out}: {reason(error)}; make room, then run again"
                ) from error
            # it goes to a folder of another file system
            write_video(paths, out, fps, metadata)
        finally:
            with contextlib.suppress(OSError):
                making.unlink(missing_ok=True)

    def _resume(self, pipe: CausalVideoPipeline) -> VideoStream:
        """A stream that stands where the video can be taken up, or that runs over what is there."""
        while True:
            self.claim.check()
            whole = self._whole_segments()
            self.records.drop_from(whole)
            self.writer.drop_from(whole)
            if self.committed:
                head = self.records.head(self.committed - 1)
                self.digest, self.first_look = head.digest, head.first_look
            else:
                self.digest, self.first_look = "", {}
            stream = self.stream = open_stream(self.plan, pipe, on_step=self._check)
            if not self.committed:
                return stream
            self.resumed_at = self.committed
            damaged = self._stand(stream)
            if damaged is None:
                return stream
            stream.close()
            self.records.drop_from(damaged)
            self.writer.drop_from(damaged)

    def _whole_segments(self) -> int:
        """Committed chunks before the first whose segment is not what was written."""
        paths, frames = self.writer.paths(), self.writer.starts
        for chunk in range(self.committed):
            if frames[chunk + 1] != self.plan.frames_before(chunk + 1):
                return chunk
            if chunk in self.records:
                head = self._read_head(chunk)
                if head is None or head.segment != file_sha256(paths[chunk]):
                    return chunk
        return self.committed

    def _read_head(self, chunk: int) -> Head | None:
        try:
            return self.records.head(chunk)
        except (StateError, KeyError):
            return None

    def _stand(self, stream: VideoStream) -> int | None:
        """Bring a fresh stream to the last committed chunk; returns the first damaged record, if one is."""
        if self.options.resume == "exact":
            begin = self.checkpoints.load(stream.restore, stream.rollout, self.committed)
            if begin or all(chunk in self.records for chunk in range(self.committed)):
                # those in between are taken over as they come
                stream.records = self._record
                return self._first_damaged(range(begin, self.committed))
        kept = stream.rollout.chunks_kept(self.committed)
        damaged = self._first_damaged(kept)
        if damaged is None:
            records = {chunk: self.records.read(chunk) for chunk in kept}
            stream.rebuild(self.committed, cast(dict[int, ChunkRecord], records))
            self.note = f"light, at chunk {self.committed}"
        return damaged

    def _first_damaged(self, chunks: Iterable[int]) -> int | None:
        for chunk in chunks:
            try:
                if self.records.read(chunk) is None:
                    return chunk
            except StateError:
                return chunk
        return None

    def _record(self, chunk: int) -> ChunkRecord | None:
        return self.records.read(chunk) if chunk < self.committed else None

    def _commit(self, chunk: Chunk, stream: VideoStream) -> dict[str, float]:
        """Segment, then record: from then on the chunk is done."""
        assert chunk.frames is not None
        frames = chunk.frames[0]
        seen = look(frames)
        self.first_look = self.first_look or seen
        self.digest = digest(self.digest, chunk.latents)
        path = self.writer.write(chunk.index, frames)
        head = Head(self.writer.frames, self.digest, file_sha256(path), self.first_look)
        self.records.add(chunk.index, chunk.latents, stream.rollout, head)
        return seen

    def _next(self, stream: VideoStream) -> Chunk | None:
        """The next chunk, under the prompt that somebody may have asked for meanwhile."""
        made, chunks = stream.rollout.chunk, stream.chunks
        if made >= self.committed and (chunks is None or made < chunks):
            wanted = self.folder.wanted_prompts()
            fresh = list[Steer]()
            for _, prompt, switch in wanted:
                # the model may have been replaced by one that does not understand it; the video goes on
                with contextlib.suppress(PromptError):
                    fresh.append((stream.steer(prompt, switch), prompt, switch))
            if wanted:
                self.steered += fresh
                self.folder.steer(self.steered, [name for name, _, _ in wanted])
                request = self.plan.request.steered(fresh)
                self.plan = replace(self.plan, request=request, schedule=stream.prompts[0])
        return next(stream, None)

    def _pause(self, stream: VideoStream) -> None:
        """Between two chunks: is this to wait?"""
        if self.folder.marked("pause") and stream.rollout.chunk >= self.committed:
            self._keep_state(stream, always=True)
            raise Paused("the job was paused")

    def _keep_state(self, stream: VideoStream, always: bool = False) -> None:
        """A checkpoint of where this stands, if the job is to go on from there one day."""
        wanted = (always or self.keep) and self.options.resume == "exact" and not stream.has_begun
        if wanted and stream.rollout.chunk == self.committed and not stream.rollout.in_transition:
            # without it going on takes longer, that is all
            with contextlib.suppress(OutputError):
                self.checkpoints.save(stream.rollout)

    def _evicted(self, chunk: Chunk, stream: VideoStream) -> list[int]:
        """Latent frames that left the cache with this chunk."""
        rollout = stream.rollout
        before = self._resident | set(range(chunk.start_frame, rollout.next_frame))
        self._resident = set(rollout.cache.layout.resident)
        return sorted(before - self._resident)

    def _log(self, chunk: Chunk, stream: VideoStream, progress: Progress, evicted: list[int]) -> None:
        """A line for those who watch."""
        stats, cache = chunk.stats, stream.rollout.cache
        layout = cache.layout
        second = pixel_frames(chunk.start_frame) / self.plan.entry.fps
        self.folder.note(
            {
                "chunk": chunk.index,
                "frames": progress.frames,
                "second": second,
                "at": round(time.time(), 3),
                "fps": progress.fps,
                "denoise_s": round(stats.denoise_s, 4),
                "commit_s": round(stats.commit_s, 4),
                "decode_s": round(stats.decode_s, 4),
                "kv_bytes": progress.kv_bytes,
                "held_bytes": progress.held_bytes,
                "rss_bytes": progress.rss_bytes,
                "bytes_per_frame": stats.bytes_per_frame,
                "resident": list(layout.resident),
                "sinks": list(layout.sinks),
                "evicted": evicted,
                "format": cache.spec.format,
                "formats": [cache.format_of(frame) for frame in layout.resident],
                "tiers": [cache.tier_of(f) for f in layout.resident] if cache.offloaded else None,
                "kv_host_bytes": stats.kv_host_bytes,
                "kv_disk_bytes": stats.kv_disk_bytes,
                "policy": cache.spec.policy,
                "mass": [round(layout.mass.get(f, 0.0), 5) for f in layout.resident] if layout.mass else None,
                "drift": progress.drift,
                "blank": progress.blank,
                "prompt": stream.prompts[0].at(second),
            }
        )

    def _prune(self, stream: VideoStream) -> None:
        """Drop records that no way of going on needs."""
        if self.keep:
            return
        chunk = stream.rollout.chunk
        since = chunk if self.options.resume == "light" else min(chunk, self.checkpoints.oldest())
        self.records.keep(stream.rollout.chunks_kept(chunk), since)

    def _progress(
        self,
        chunk: Chunk,
        stream: VideoStream,
        seen: dict[str, float],
        made: int,
        started: float,
        process: psutil.Process,
    ) -> Progress:
        elapsed = time.perf_counter() - started
        assert chunk.frames is not None
        per_chunk = elapsed / (made - 1) if made > 1 else 0.0
        fps = chunk.frames.shape[1] / per_chunk if per_chunk else 0.0
        left = self.plan.chunks - chunk.index - 1
        return Progress(
            chunk.index + 1, self.plan.chunks, self.writer.frames, round(fps, 2), round(left * per_chunk, 1),
            chunk.stats.kv_bytes, stream.rollout.held_bytes, process.memory_info().rss,
            drift(self.first_look, seen), blank(seen) and not blank(self.first_look), tuple(self.steered),
        )  # fmt: skip

    def _check(self, chunk: int, step: int) -> None:
        """Between denoising steps: is this to stop?"""
        if self.stopping():
            raise Interrupted("this process was told to stop")
        if self.folder.marked("cancel"):
            raise Cancelled("the job was cancelled")
        if self.folder.marked("stop"):
            raise _EnoughMade("there is to be no more of it")


def permanent(error: BaseException) -> bool:
    """Whether trying again would end the same way."""
    if isinstance(error, OutputError | ResourceError):
        return False
    return isinstance(error, VidkvError) and not isinstance(error, NumericsError)


def _is_ours(out: Path, key: str) -> bool:
    with contextlib.suppress(VidkvError):
        return out.is_file() and read_metadata(out).get("job") == key
    return False
