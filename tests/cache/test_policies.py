"""What every eviction policy owes the cache; a new one in the registry is tested by being there."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vidkv.cache.policies import POLICIES

frames = st.sets(st.integers(0, 60), max_size=30).map(sorted)


@pytest.mark.parametrize("name", POLICIES)
class TestEveryPolicy:
    @given(frames, st.integers(0, 30), st.integers(0, 6))
    def test_exactly_as_many_leave_as_must(
        self, name: str, frames: list[int], capacity: int, sink: int
    ) -> None:
        sink = 0 if name == "sliding_window" else min(sink, capacity)
        leaving = POLICIES[name]().evict(frames, capacity, frames[:sink])
        assert leaving <= set(frames)
        assert len(leaving) == max(0, len(frames) - capacity)

    @given(frames, st.integers(0, 30))
    def test_the_input_is_not_changed(self, name: str, frames: list[int], capacity: int) -> None:
        given_frames = list(frames)
        POLICIES[name]().evict(given_frames, capacity, ())
        assert given_frames == frames

    def test_nothing_leaves_while_there_is_room(self, name: str) -> None:
        assert POLICIES[name]().evict([], 0, ()) == set()
        assert POLICIES[name]().evict([0, 1, 2], 3, ()) == set()


class TestWhoLeaves:
    def test_sliding_window_drops_the_oldest(self) -> None:
        assert POLICIES["sliding_window"]().evict([0, 1, 2, 7, 8], 3, ()) == {0, 1}

    def test_sink_window_steps_over_the_sinks(self) -> None:
        assert POLICIES["sink_window"]().evict([0, 1, 2, 7, 8], 3, (0, 1)) == {2, 7}
        assert POLICIES["sink_window"]().evict([0, 1, 2, 7, 8], 2, (0, 1)) == {2, 7, 8}
