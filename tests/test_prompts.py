"""Which prompt holds when."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vidkv.errors import InputError, PromptError
from vidkv.prompts import PromptSchedule


class TestReading:
    def test_a_plain_prompt_holds_throughout(self) -> None:
        schedule = PromptSchedule.of("rain")
        assert schedule.entries == ((0.0, "rain"),)
        assert schedule.at(0) == schedule.at(1e6) == "rain"

    def test_order_does_not_matter(self) -> None:
        schedule = PromptSchedule.of([(5, "b"), (0, "a"), (2.5, "c")])
        assert schedule.entries == ((0.0, "a"), (2.5, "c"), (5.0, "b"))

    def test_every_prompt_is_respelled(self) -> None:
        schedule = PromptSchedule.of([(0, "a"), (1, "b")], canonical=str.upper)
        assert schedule.entries == ((0.0, "A"), (1.0, "B"))

    def test_tuples_are_schedules_too(self) -> None:
        assert PromptSchedule.of(((0, "a"), (1, "b"))).at(1) == "b"


class TestTime:
    def test_a_switch_holds_from_its_second_on(self) -> None:
        schedule = PromptSchedule.of([(0, "a"), (2, "b"), (4, "c")])
        assert [schedule.at(s) for s in (0, 1.99, 2, 3.99, 4, 100)] == ["a", "a", "b", "b", "c", "c"]

    @given(st.integers(1, 10_000), st.sampled_from([8, 12, 16, 24, 25, 30]))
    def test_rounding_does_not_delay_a_switch(self, frame: int, fps: int) -> None:
        """A second computed as frame / fps is not missed by the last bit."""
        schedule = PromptSchedule.of([(0, "a"), (sum([1 / fps] * frame), "b")])
        assert schedule.at(frame / fps) == "b"
        assert schedule.at((frame - 0.01) / fps) == "a"


class TestSteering:
    def test_switches_go_with_their_prompts(self) -> None:
        schedule = PromptSchedule.of([(4, "c", "flush"), (0, "a"), (2, "b", None)])
        assert [schedule.switch_at(s) for s in (0, 2, 3.9, 4, 9)] == [None, None, None, "flush", "flush"]
        assert PromptSchedule.of(schedule.timed) == schedule
        assert PromptSchedule.of([(0, "a", None)]) == PromptSchedule.of("a")

    def test_a_steered_prompt_holds_until_the_next_of_the_schedule(self) -> None:
        schedule = PromptSchedule.of([(0, "a"), (2, "b"), (6, "c")])
        steered = schedule.steered(4.5, "x", "recache", str.upper)
        assert [steered.at(s) for s in (0, 2, 4.4, 4.5, 5.9, 6)] == ["a", "b", "b", "X", "X", "c"]
        assert steered.switch_at(4.5) == "recache" and schedule.at(4.5) == "b"

    def test_at_the_second_of_another_prompt_it_takes_its_place(self) -> None:
        schedule = PromptSchedule.of([(0, "a"), (2, "b")])
        assert schedule.steered(0, "x").entries == ((0.0, "x"), (2.0, "b"))
        assert schedule.steered(2, "y").steered(2, "z").entries == ((0.0, "a"), (2.0, "z"))


class TestErrors:
    @pytest.mark.parametrize(
        ("prompt", "words"),
        [
            ([], "empty"),
            ([(1, "a")], "starts at second 1; one must start at 0"),
            ([(0, "a"), (-1, "b")], "second -1"),
            ([(0, "a"), (math.nan, "b")], "second nan"),
            ([(0, "a"), (math.inf, "b")], "second inf"),
            ([(0, "a"), (3, "b"), (3.0, "c")], "two prompts at second 3"),
            ([(0, "a"), (3, "b", "cut")], "second 3: switch='cut'; choose keep, recache, flush, lerp"),
        ],
        ids=str,
    )
    def test_bad_schedules(self, prompt: list[tuple[float, str]], words: str) -> None:
        with pytest.raises(PromptError, match=words):
            PromptSchedule.of(prompt)

    @pytest.mark.parametrize(
        "prompt",
        [
            5,
            None,
            ["a"],
            [(0,)],
            [(0, "a", None, None)],
            [("0", "a")],
            [(0, 7)],
            [[(0, "a")], [(0, "b")]],
            ("a", "b"),
        ],
        ids=str,
    )
    def test_other_things(self, prompt: Any) -> None:
        """A user's mistake, so one clear line and no traceback."""
        with pytest.raises(PromptError, match="a text or a list of \\(second, text\\)") as caught:
            PromptSchedule.of(prompt)
        assert isinstance(caught.value, InputError)

    def test_errors_of_a_single_prompt_come_through(self) -> None:
        def refuse(text: str) -> str:
            raise PromptError(f"unknown word {text!r}")

        with pytest.raises(PromptError, match="unknown word 'b'"):
            PromptSchedule.of([(0, "b")], canonical=refuse)
