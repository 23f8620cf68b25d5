"""`VideoStream`: going on where a video stopped, by saved state, by records, and by latents alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from tests.tiny import HEIGHT, WIDTH, build_pipeline, relative_l2
from vidkv.errors import StateError
from vidkv.pipeline import CausalVideoPipeline
from vidkv.rollout import Chunk
from vidkv.stream import ChunkRecord, VideoStream

PROMPT, OTHER = "a red circle bouncing", "a blue square resting"
CHUNKS, FRAMES = 6, 12 * 6 - 3
SCHEDULE = [(0.0, PROMPT), (1.3, OTHER)]
"""The second prompt begins with chunk 2, at frame 21."""

CASES: dict[str, dict[str, Any]] = {
    "plain": {"prompt": PROMPT},
    "int8": {"prompt": PROMPT, "cache": "int8,window=9,sink=2,keep_newest,keep_sinks"},
    "stock": {"prompt": PROMPT, "noise": "stock"},
    "guided": {"prompt": PROMPT, "guidance_scale": 2.0},
    "keep": {"prompt": SCHEDULE, "prompt_switch": "keep"},
    "recache": {"prompt": SCHEDULE, "prompt_switch": "recache"},
    "flush": {"prompt": SCHEDULE, "prompt_switch": "flush"},
    "lerp": {"prompt": SCHEDULE, "prompt_switch": "lerp"},
    "image": {"prompt": PROMPT, "image": torch.full((1, HEIGHT, WIDTH, 3), 90, dtype=torch.uint8)},
    "video": {"prompt": PROMPT, "video": torch.full((21, HEIGHT, WIDTH, 3), 90, dtype=torch.uint8)},
}


@pytest.fixture(scope="module")
def pipe() -> CausalVideoPipeline:
    return build_pipeline()


def begin(pipe: CausalVideoPipeline, case: str) -> VideoStream:
    settings = {"cache": "fp32,window=9,sink=2"} | CASES[case]
    return pipe.stream(height=HEIGHT, width=WIDTH, num_frames=FRAMES, seed=5, **settings)


class Whole:
    """A video made without interruption, with what it could have been taken up from."""

    def __init__(self, pipe: CausalVideoPipeline, case: str) -> None:
        self.chunks: list[Chunk] = []
        self.records: list[ChunkRecord] = []
        self.states: list[tuple[dict[str, torch.Tensor], dict[str, Any]] | None] = []
        stream = begin(pipe, case)
        rollout = stream.rollout
        for chunk in stream:
            self.chunks.append(chunk)
            noise, source = rollout.noise.state()
            noise = {name: tensor.clone() for name, tensor in noise.items()}
            prefix = rollout.prefix_chunks, rollout.prefix_frames
            self.records.append(ChunkRecord(chunk.latents.clone(), (noise, source), prefix))
            self.states.append(None if rollout.in_transition else rollout.state())


@pytest.fixture(scope="module")
def wholes(pipe: CausalVideoPipeline) -> dict[str, Whole]:
    return {case: Whole(pipe, case) for case in CASES}


def same(found: list[Chunk], wanted: list[Chunk]) -> None:
    assert [chunk.index for chunk in found] == [chunk.index for chunk in wanted]
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.frames is not None and theirs.frames is not None
        assert torch.equal(ours.latents, theirs.latents), ours.index
        assert torch.equal(ours.frames, theirs.frames), ours.index


class TestRestore:
    @pytest.mark.parametrize("case", CASES)
    def test_goes_on_bit_for_bit(
        self, pipe: CausalVideoPipeline, wholes: dict[str, Whole], case: str
    ) -> None:
        whole = wholes[case]
        for index, state in enumerate(whole.states):
            if state is None or index + 1 < whole.records[0].prefix[0]:
                # chunks that were given are there at once
                continue
            stream = begin(pipe, case)
            stream.restore(*state)
            same(list(stream), whole.chunks[index + 1 :])

    def test_a_transition_is_known_to_be_under_way(self, wholes: dict[str, Whole]) -> None:
        assert [state is None for state in wholes["lerp"].states] == [False, False, True, True, True, False]


class TestRecords:
    @pytest.mark.parametrize("case", CASES)
    def test_chunks_are_taken_over_bit_for_bit(
        self, pipe: CausalVideoPipeline, wholes: dict[str, Whole], case: str
    ) -> None:
        whole, known = wholes[case], 4
        stream = begin(pipe, case)
        stream.records = lambda chunk: whole.records[chunk] if chunk < known else None
        chunks = list(stream)
        same(chunks, whole.chunks)
        prefix = whole.records[0].prefix[0] or (1 if case in ("image", "video") else 0)
        assert all(chunk.stats.denoise_s == 0 for chunk in chunks[:known])
        assert all(chunk.stats.denoise_s > 0 for chunk in chunks[max(known, prefix) :])

    @pytest.mark.parametrize("case", ["plain", "int8", "recache", "lerp", "stock"])
    def test_from_a_state_on(self, pipe: CausalVideoPipeline, wholes: dict[str, Whole], case: str) -> None:
        whole = wholes[case]
        state = whole.states[1]
        assert state is not None
        stream = begin(pipe, case)
        stream.restore(*state)
        stream.records = lambda chunk: whole.records[chunk] if chunk < 5 else None
        same(list(stream), whole.chunks[2:])

    def test_other_latents_are_another_video(
        self, pipe: CausalVideoPipeline, wholes: dict[str, Whole]
    ) -> None:
        whole = wholes["plain"]
        wrong = ChunkRecord(whole.records[1].latents + 0.5, whole.records[1].noise)
        stream = begin(pipe, "plain")
        stream.records = lambda chunk: {0: whole.records[0], 1: wrong}.get(chunk)
        chunks = list(stream)
        assert relative_l2(chunks[2].latents, whole.chunks[2].latents) > 1e-3


class TestRebuild:
    @pytest.mark.parametrize("case", ["plain", "int8", "stock", "keep", "guided"])
    def test_is_exact_while_nothing_has_left(
        self, pipe: CausalVideoPipeline, wholes: dict[str, Whole], case: str
    ) -> None:
        whole = wholes[case]
        stream = begin(pipe, case)
        stream.rebuild(2, {0: whole.records[0], 1: whole.records[1]})
        same([next(stream)], whole.chunks[2:3])

    @pytest.mark.parametrize("case", ["plain", "int8", "stock", "video", "keep"])
    def test_is_close_later(self, pipe: CausalVideoPipeline, wholes: dict[str, Whole], case: str) -> None:
        whole = wholes[case]
        stream = begin(pipe, case)
        kept = stream.rollout.chunks_kept(5)
        assert 0 in kept and 4 in kept and len(kept) < 5
        stream.rebuild(5, {chunk: whole.records[chunk] for chunk in kept})
        (chunk,) = stream
        wanted = whole.chunks[5]
        assert chunk.index == 5 and chunk.frames is not None and wanted.frames is not None
        assert chunk.frames.shape == wanted.frames.shape
        error = relative_l2(chunk.latents, wanted.latents)
        assert 0 < error < 0.2
        # what has no history at all is further away
        fresh = next(iter(begin(pipe, case)))
        assert relative_l2(fresh.latents, wanted.latents) > 2 * error

    def test_what_was_given_is_given_again(self, pipe: CausalVideoPipeline, wholes: dict[str, Whole]) -> None:
        whole = wholes["video"]
        assert whole.records[0].prefix[0] == 2
        stream = begin(pipe, "video")
        stream.rebuild(1, {0: whole.records[0]})
        same(list(stream), whole.chunks)

    def test_missing_chunks_are_named(self, pipe: CausalVideoPipeline, wholes: dict[str, Whole]) -> None:
        records: Mapping[int, ChunkRecord] = {4: wholes["plain"].records[4]}
        stream = begin(pipe, "plain")
        with pytest.raises(StateError, match="chunk 0 are missing"):
            stream.rebuild(5, records)
        same(list(stream), wholes["plain"].chunks)


def test_closing_ends_the_rollout(pipe: CausalVideoPipeline) -> None:
    stream = begin(pipe, "plain")
    next(stream)
    stream.close()
    assert list(stream) == []
    assert stream.rollout.kv_bytes == 0


def test_chunks_are_counted_beforehand(pipe: CausalVideoPipeline) -> None:
    assert begin(pipe, "plain").chunks == CHUNKS
    assert pipe.stream(PROMPT, HEIGHT, WIDTH).chunks is None
