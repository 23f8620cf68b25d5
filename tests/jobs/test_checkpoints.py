"""Checkpoints: bit for bit, append-only, whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from tests.tiny import LATENT_SIZE, build_rollout, build_text, build_transformer, build_vae
from vidkv.errors import OutputError, StateError
from vidkv.jobs.checkpoints import Checkpoints, Interval
from vidkv.models.wan import CausalWanTransformer3DModel
from vidkv.noise import StockNoise
from vidkv.rollout import Rollout
from vidkv.schedule import FlowSchedule


@pytest.fixture(scope="module")
def model() -> CausalWanTransformer3DModel:
    return build_transformer()


INT8 = "int8,window=12,sink=3"


def plain(model: CausalWanTransformer3DModel, spec: str = INT8, **options: Any) -> Rollout:
    return build_rollout(spec, transformer=model, **options)


def guided(model: CausalWanTransformer3DModel) -> Rollout:
    made = plain(model, schedule=FlowSchedule(steps=(1000, 500), guidance=3.0))
    made.set_text(build_text(model), build_text(model, seed=9))
    return made


def stock(model: CausalWanTransformer3DModel) -> Rollout:
    made = plain(model)
    made.noise = StockNoise(5, 60, 1, LATENT_SIZE)
    return made


def half(model: CausalWanTransformer3DModel) -> Rollout:
    return plain(build_transformer().to(torch.bfloat16), "bf16,window=12,sink=3")


KINDS: dict[str, Callable[[CausalWanTransformer3DModel], Rollout]] = {
    "fp32": lambda model: plain(model, "fp32,window=12,sink=3"),
    "bf16": half,
    "int8": plain,
    "no sinks": lambda model: plain(model, "int8,window=12,sink=0"),
    "kept sinks": lambda model: plain(model, "int8,window=12,sink=3,keep_sinks=true"),
    "kept newest": lambda model: plain(model, "int8,window=12,sink=2,keep_sinks=true,keep_newest=true"),
    "guided": guided,
    "stock": stock,
    "batch": lambda model: plain(model, seeds=[3, 4]),
    "decoder": lambda model: plain(model, vae=build_vae()),
}


def advance(rollout: Rollout, chunks: int) -> Rollout:
    for _ in range(chunks):
        rollout.step_chunk()
    return rollout


def equal(one: Rollout, other: Rollout, chunks: int = 2) -> bool:
    """Whether what follows is equal bit for bit."""
    assert (one.chunk, one.next_frame) == (other.chunk, other.next_frame)
    for _ in range(chunks):
        a, b = one.step_chunk(), other.step_chunk()
        same = torch.equal(a.latents, b.latents) and (a.frames is None) == (b.frames is None)
        if not same or (a.frames is not None and not torch.equal(a.frames, b.frames)):  # type: ignore[arg-type]
            return False
    return True


def load(folder: Path, rollout: Rollout, most: int = 10**6, fence: int = 1) -> tuple[int, Checkpoints]:
    checkpoints = Checkpoints(folder, fence)
    return checkpoints.load(rollout.restore, rollout, most), checkpoints


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def pages_in(folder: Path) -> dict[str, set[str]]:
    """Names of the pages that each file holds."""
    found = {}
    for path in folder.glob("pages-*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found[path.name] = {".".join(key.split(".")[:2]) for key in file.keys()}
    return found


class TestGoesOn:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("chunks", [1, 7])
    def test_bit_for_bit(
        self, tmp_path: Path, model: CausalWanTransformer3DModel, kind: str, chunks: int
    ) -> None:
        """Before the window is full, and long after frames have left it."""
        rollout, again = advance(KINDS[kind](model), chunks), KINDS[kind](model)
        Checkpoints(tmp_path, 1).save(rollout)
        assert load(tmp_path, again)[0] == chunks
        assert equal(rollout, again)

    @pytest.mark.parametrize("kind", ["int8", "kept newest", "guided"])
    def test_from_checkpoints_of_every_chunk_and_of_several_processes(
        self, tmp_path: Path, model: CausalWanTransformer3DModel, kind: str
    ) -> None:
        """Pages come from many files, written before and after restores."""
        whole, rollout = KINDS[kind](model), KINDS[kind](model)
        checkpoints = Checkpoints(tmp_path, 1)
        for fence in range(2, 6):
            for _ in range(2):
                advance(rollout, 1)
                checkpoints.save(rollout)
            rollout = KINDS[kind](model)
            chunk, checkpoints = load(tmp_path, rollout, fence=fence)
            assert chunk == 2 * (fence - 1)
        assert equal(advance(whole, 8), rollout)

    @pytest.mark.parametrize("strategy", ["recache", "flush", "keep"])
    def test_after_a_switch_that_changes_pages(
        self, tmp_path: Path, model: CausalWanTransformer3DModel, strategy: Any
    ) -> None:
        """Frames whose keys were computed anew have other bytes under other names."""
        rollout, other = advance(plain(model), 5), build_text(model, seed=4)
        checkpoints = Checkpoints(tmp_path, 1)
        checkpoints.save(rollout)
        before = set(rollout.pages())
        rollout.switch(other, strategy=strategy)
        after = set(rollout.pages())
        assert (after <= before) == (strategy != "recache")
        advance(rollout, 1)
        checkpoints.save(rollout)
        again = plain(model)
        assert load(tmp_path, again)[0] == 6
        again.set_text(other)
        assert equal(rollout, again)

    def test_twice_at_one_chunk(self, tmp_path: Path, model: CausalWanTransformer3DModel) -> None:
        """The later one holds, though between them pages were computed anew."""
        rollout, other = advance(plain(model), 5), build_text(model, seed=4)
        checkpoints = Checkpoints(tmp_path, 1)
        checkpoints.save(rollout)
        rollout.switch(other, strategy="recache")
        checkpoints.save(rollout)
        again = plain(model)
        assert load(tmp_path, again)[0] == 5
        again.set_text(other)
        assert equal(rollout, again)

    def test_of_a_fork(self, tmp_path: Path, model: CausalWanTransformer3DModel) -> None:
        rollout = advance(plain(model), 4)
        Checkpoints(tmp_path / "a", 1).save(rollout)
        with rollout.fork() as fork:
            fork.set_text(build_text(model, seed=4))
            advance(fork, 2)
            advance(rollout, 2)
            Checkpoints(tmp_path / "b", 1).save(fork)
            again = plain(model)
            assert load(tmp_path / "b", again)[0] == 6
            again.set_text(build_text(model, seed=4))
            assert equal(fork, again)

    def test_a_transition_is_not_saved(self, tmp_path: Path, model: CausalWanTransformer3DModel) -> None:
        """What a lerp still has to do is not part of the state, so it waits."""
        text = model.encode_text(torch.ones(1, 5, 64))
        rollout = advance(plain(model, text=model.encode_text(torch.zeros(1, 5, 64))), 1)
        checkpoints = Checkpoints(tmp_path, 1, Interval(0.0, 1e12, 1e9))
        rollout.switch(text, strategy="lerp", chunks=2)
        advance(rollout, 1)
        assert rollout.in_transition and not checkpoints.consider(rollout)
        advance(rollout, 1)
        assert not rollout.in_transition and checkpoints.consider(rollout)


class TestAppendOnly:
    def test_only_new_pages_are_written(self, tmp_path: Path, model: CausalWanTransformer3DModel) -> None:
        rollout, checkpoints = advance(plain(model), 4), Checkpoints(tmp_path, 1)
        first = checkpoints.save(rollout)
        stamps = {path: path.stat().st_mtime_ns for path in tmp_path.glob("pages-*")}
        old = set(rollout.pages())
        advance(rollout, 1)
        second = checkpoints.save(rollout)
        held = pages_in(tmp_path)
        assert held["pages-000004-1.safetensors"] == old
        assert held["pages-000005-1.safetensors"] == set(rollout.pages()) - old
        assert len(held["pages-000005-1.safetensors"]) == 3
        assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
        assert second < first
        sizes = {name: (tmp_path / name).stat().st_size for name in names(tmp_path)}
        assert second == sizes["pages-000005-1.safetensors"] + sizes["state-000005-1.safetensors"]

    def test_goes_on_appending_after_a_load(self, tmp_path: Path, model: CausalWanTransformer3DModel) -> None:
        rollout = advance(plain(model), 4)
        Checkpoints(tmp_path, 1).save(rollout)
        again = plain(model)
        _, checkpoints = load(tmp_path, again, fence=2)
        old = set(again.pages())
        checkpoints.save(advance(again, 1))
        assert pages_in(tmp_path)["pages-000005-2.safetensors"] == set(again.pages()) - old

    def test_without_new_pages_none_are_written(
        self, tmp_path: Path, model: CausalWanTransformer3DModel
    ) -> None:
        rollout = advance(plain(model), 4)
        Checkpoints(tmp_path, 1).save(rollout)
        again = plain(model)
        _, checkpoints = load(tmp_path, again, fence=2)
        checkpoints.save(again)
        assert list(pages_in(tmp_path)) == ["pages-000004-1.safetensors"]
        assert load(tmp_path, plain(model))[0] == 4

    def test_two_are_kept_and_what_they_need(
        self, tmp_path: Path, model: CausalWanTransformer3DModel
    ) -> None:
        rollout, checkpoints = plain(model), Checkpoints(tmp_path, 1)
        for chunk in range(1, 13):
            checkpoints.save(advance(rollout, 1))
            commits = sorted(tmp_path.glob("checkpoint-*.json"))
            wanted = [f"checkpoint-{c:06d}-1.json" for c in (chunk - 1, chunk) if c]
            assert [path.name for path in commits] == wanted
            needed = {name for path in commits for name in json.loads(path.read_text())["sha256"]}
            assert set(names(tmp_path)) == needed | set(wanted)
            assert checkpoints.oldest() == max(1, chunk - 1)
            for most in (chunk, chunk - 1):
                again = plain(model)
                assert load(tmp_path, again, most)[0] == most
        # the sinks' pages are from the first one to this day
        assert "pages-000001-1.safetensors" in names(tmp_path)
        assert len(names(tmp_path)) < 14

    def test_nothing_else_is_deleted(self, tmp_path: Path, model: CausalWanTransformer3DModel) -> None:
        foreign = ["notes.txt", "pages.safetensors", "pages-000000-1.txt", ".hidden", "checkpoint-1-1.json"]
        for name in foreign:
            (tmp_path / name).write_text("mine")
        (tmp_path / "pages-000001-7.safetensors").write_text("of a later holder")
        (tmp_path / "folder").mkdir()
        for name in (".state-000000-1.safetensors.77.tmp", "state-000000-0.safetensors"):
            (tmp_path / name).write_text("left by a kill")
        rollout, checkpoints = plain(model), Checkpoints(tmp_path, 1)
        for _ in range(4):
            checkpoints.save(advance(rollout, 1))
        left = set(names(tmp_path))
        assert {*foreign, "pages-000001-7.safetensors", "folder"} <= left
        assert not left & {".state-000000-1.safetensors.77.tmp", "state-000000-0.safetensors"}


@pytest.fixture(scope="module")
def three(
    tmp_path_factory: pytest.TempPathFactory, model: CausalWanTransformer3DModel
) -> tuple[Path, dict[int, torch.Tensor]]:
    """A folder with checkpoints of chunks 6 and 7, and the latents that follow each."""
    folder = tmp_path_factory.mktemp("three")
    rollout, checkpoints = advance(plain(model), 4), Checkpoints(folder, 1)
    wanted = {}
    for chunk in (4, 5, 6):
        wanted[chunk] = rollout.step_chunk().latents
        checkpoints.save(rollout)
    wanted[7] = rollout.step_chunk().latents
    assert len(list(folder.glob("checkpoint-*"))) == 2
    return folder, wanted


def damaged(folder: Path, into: Path, name: str, place: int, bit: int = 1) -> Path:
    shutil.copytree(folder, into)
    data = bytearray((into / name).read_bytes())
    data[place % len(data)] ^= bit
    (into / name).write_bytes(data)
    return into


class TestDamage:
    @pytest.mark.parametrize("name", ["state-000007-1", "pages-000007-1"])
    @pytest.mark.parametrize("place", [0, 9, 300, -1])
    def test_a_flipped_bit_of_the_newest_falls_back(
        self, tmp_path: Path, model: CausalWanTransformer3DModel, three: Any, name: str, place: int
    ) -> None:
        folder = damaged(three[0], tmp_path / "d", f"{name}.safetensors", place)
        again = plain(model)
        assert load(folder, again)[0] == 6
        assert torch.equal(again.step_chunk().latents, three[1][6])

    def test_no_bit_of_the_commit_leads_astray(
        self, tmp_path: Path, model: CausalWanTransformer3DModel, three: Any
    ) -> None:
        """Whichever is flipped, the rollout stands where it is said to stand, with what follows there."""
        name = "checkpoint-000007-1.json"
        data = (three[0] / name).read_bytes()
        shutil.copytree(three[0], tmp_path / "d")
        state = data.index(b"state-000007")
        places = sorted({*range(state, state + 30), *range(0, len(data), 17)})
        seen = set()
        for number, place in enumerate(places):
            changed = bytearray(data)
            changed[place] ^= 1 << (number % 7 if place < state or place > state + 30 else 0)
            (tmp_path / "d" / name).write_bytes(changed)
            again = plain(model)
            chunk, _ = load(tmp_path / "d", again)
            seen.add(chunk)
            assert again.chunk == chunk
            assert torch.equal(again.step_chunk().latents, three[1][chunk]), place
        assert seen <= {6, 7} and 6 in seen

    @pytest.mark.parametrize(
        "text",
        [
            "",
            "[]",
            "5",
            "{}",
            "null",
            '{"state": 1, "pages": [], "sha256": {}}',
            '{"state": "a", "pages": {}, "sha256": []}',
            '{"state": "a", "pages": {}, "sha256": {"a": 1}}',
            '{"state": [], "pages": {}, "sha256": {}}',
            "\x00",
        ],
    )
    def test_a_commit_of_nonsense_falls_back(
        self, tmp_path: Path, model: CausalWanTransformer3DModel, three: Any, text: str
    ) -> None:
        shutil.copytree(three[0], tmp_path / "d")
        (tmp_path / "d" / "checkpoint-000007-1.json").write_text(text)
        assert load(tmp_path / "d", plain(model))[0] == 6

    @pytest.mark.parametrize("act", [Path.unlink, lambda path: path.write_bytes(b"")])
    def test_missing_and_empty_files(
        self, tmp_path: Path, model: CausalWanTransformer3DModel, three: Any, act: Callable[[Path], Any]
    ) -> None:
        for number, name in enumerate(["state-000007-1.safetensors", "pages-000007-1.safetensors"]):
            folder = tmp_path / str(number)
            shutil.copytree(three[0], folder)
            act(folder / name)
            assert load(folder, plain(model))[0] == 6
        # a file of both: there is nothing to go on from
        folder = tmp_path / "both"
        shutil.copytree(three[0], folder)
        act(folder / "pages-000005-1.safetensors")
        again = plain(model)
        assert load(folder, again)[0] == 0
        assert torch.equal(again.step_chunk().latents, plain(model).step_chunk().latents)

    def test_both_damaged_is_a_start_from_nothing(
        self, tmp_path: Path, model: CausalWanTransformer3DModel, three: Any
    ) -> None:
        folder = damaged(three[0], tmp_path / "a", "state-000007-1.safetensors", -1)
        folder = damaged(folder, tmp_path / "b", "state-000006-1.safetensors", -1)
        assert load(folder, plain(model))[0] == 0

    def test_a_damaged_one_does_not_count_as_one_of_two(
        self, tmp_path: Path, model: CausalWanTransformer3DModel, three: Any
    ) -> None:
        """Resumed before it and gone on past it, the one that was resumed from is still there."""
        folder = damaged(three[0], tmp_path / "d", "state-000007-1.safetensors", -1)
        again = plain(model)
        chunk, checkpoints = load(folder, again, fence=2)
        assert chunk == 6
        checkpoints.save(advance(again, 2))
        assert [c for c, _ in checkpoints._commits()] == [8, 6] and checkpoints.oldest() == 6
        path = folder / "state-000008-2.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
        again = plain(model)
        assert load(folder, again, fence=3)[0] == 6
        assert torch.equal(again.step_chunk().latents, three[1][6])

    def test_a_damaged_older_one_does_not_stop_the_next(
        self, tmp_path: Path, model: CausalWanTransformer3DModel, three: Any
    ) -> None:
        shutil.copytree(three[0], tmp_path / "d")
        (tmp_path / "d" / "checkpoint-000006-1.json").write_text("{")
        again = plain(model)
        chunk, checkpoints = load(tmp_path / "d", again, fence=2)
        assert chunk == 7
        checkpoints.save(advance(again, 1))
        assert load(tmp_path / "d", plain(model))[0] == 8

    def test_one_under_another_name_is_not_believed(
        self, tmp_path: Path, model: CausalWanTransformer3DModel, three: Any
    ) -> None:
        shutil.copytree(three[0], tmp_path / "d")
        shutil.copyfile(three[0] / "checkpoint-000006-1.json", tmp_path / "d" / "checkpoint-000009-1.json")
        again = plain(model)
        assert load(tmp_path / "d", again)[0] == again.chunk == 7

    def test_later_ones_than_wanted_are_left_out(
        self, model: CausalWanTransformer3DModel, three: Any
    ) -> None:
        assert [load(three[0], plain(model), most)[0] for most in (8, 7, 6, 5)] == [7, 7, 6, 0]

    def test_a_higher_fence_wins_at_one_chunk(
        self, tmp_path: Path, model: CausalWanTransformer3DModel
    ) -> None:
        for fence, seed in ((9, 1), (10, 2)):
            Checkpoints(tmp_path, fence).save(advance(plain(model, seeds=[seed]), 2))
        again = plain(model)
        assert load(tmp_path, again, fence=11)[0] == 2 and again.seeds == (2,)


class TestOfAnotherKind:
    def test_is_refused(self, tmp_path: Path, model: CausalWanTransformer3DModel) -> None:
        Checkpoints(tmp_path, 1).save(advance(plain(model), 2))
        others = {
            "weights": plain(build_transformer(seed=3)),
            "cache": plain(model, "int8,window=9,sink=3"),
            "guidance": guided(model),
            "dtype": plain(build_transformer().to(torch.bfloat16)),
            "size": plain(model, latent_size=(4, 6, 6)),
            "batch": plain(model, seeds=[1, 2]),
            "decoder": plain(model, vae=build_vae()),
            "noise": stock(model),
        }
        for name, other in others.items():
            assert load(tmp_path, other)[0] == 0, name
            assert other.chunk == 0

    def test_an_older_one_of_the_right_kind_is_taken(
        self, tmp_path: Path, model: CausalWanTransformer3DModel
    ) -> None:
        rollout = advance(plain(model), 2)
        Checkpoints(tmp_path, 1).save(rollout)
        shutil.copytree(tmp_path, tmp_path / "kept")
        Checkpoints(tmp_path, 0).save(advance(plain(build_transformer(seed=3)), 3))
        again = plain(model)
        assert load(tmp_path, again)[0] == 2
        assert equal(rollout, again)

    def test_a_restore_that_refuses_leaves_nothing_remembered(
        self, tmp_path: Path, model: CausalWanTransformer3DModel
    ) -> None:
        """Pages of a checkpoint that was not taken must not be taken for this rollout's."""
        Checkpoints(tmp_path, 1).save(advance(plain(model), 3))
        checkpoints, rollout = Checkpoints(tmp_path, 2), plain(model, seeds=[99])
        assert checkpoints.load(rollout.restore, rollout, 9) == 3

        def refuse(*args: Any) -> None:
            raise StateError("no")

        rollout = plain(model, seeds=[5])
        assert checkpoints.load(refuse, rollout, 9) == 0
        checkpoints.save(advance(rollout, 4))
        again = plain(model)
        assert load(tmp_path, again)[0] == 4
        assert equal(rollout, again)


class TestCrash:
    def test_at_any_point_leaves_a_whole_one(
        self, tmp_path: Path, model: CausalWanTransformer3DModel, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The folder is copied before and after every rename and deletion, and loaded from each copy."""
        rollout, checkpoints = advance(plain(model), 3), Checkpoints(tmp_path / "c", 1)
        copies: list[tuple[Path, int]] = []
        done = [0]

        def shoot() -> None:
            copy = tmp_path / f"copy{len(copies)}"
            shutil.copytree(tmp_path / "c", copy)
            copies.append((copy, done[0]))

        def watched(real: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                shoot()
                result = real(*args, **kwargs)
                shoot()
                return result

            return call

        real_unlink = Path.unlink

        def unlink(path: Path, missing_ok: bool = False) -> None:
            # copies are made by others' unlinks too
            if path.parent == tmp_path / "c":
                shoot()
            real_unlink(path, missing_ok)

        wanted: dict[int, torch.Tensor] = {}
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", watched(os.replace))
            patch.setattr(Path, "unlink", unlink)
            for chunk in (3, 4, 5, 6):
                checkpoints.save(rollout)
                done[0] = chunk
                wanted[chunk] = rollout.step_chunk().latents
        assert len(copies) > 25
        for copy, least in copies:
            again = plain(model)
            chunk, _ = load(copy, again)
            assert chunk in (least, least + 1) or (least == 0 and chunk in (0, 3))
            if chunk:
                assert torch.equal(again.step_chunk().latents, wanted[chunk])

    @pytest.mark.parametrize("failing", range(1, 5))
    @pytest.mark.parametrize("call", ["fsync", "replace"])
    def test_a_full_disk_keeps_the_one_before_and_the_next_is_whole(
        self,
        tmp_path: Path,
        model: CausalWanTransformer3DModel,
        monkeypatch: pytest.MonkeyPatch,
        failing: int,
        call: str,
    ) -> None:
        rollout, checkpoints = advance(plain(model), 3), Checkpoints(tmp_path, 1)
        checkpoints.save(rollout)
        advance(rollout, 1)
        calls, real = [0], getattr(os, call)

        def full(*args: Any) -> Any:
            calls[0] += 1
            if calls[0] == failing:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(*args)

        with monkeypatch.context() as patch:
            patch.setattr(os, call, full)
            if call == "replace" and failing == 4:
                checkpoints.save(rollout)
                assert calls[0] == 3
            else:
                with pytest.raises(OutputError, match="No space"):
                    checkpoints.save(rollout)
        assert not [name for name in names(tmp_path) if name.endswith(".tmp")]
        again = plain(model)
        assert load(tmp_path, again)[0] in (3, 4)
        checkpoints.save(advance(rollout, 1))
        again = plain(model)
        assert load(tmp_path, again)[0] == 5
        assert equal(rollout, again)


class TestInterval:
    @pytest.fixture
    def clock(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
        now = [100.0]
        monkeypatch.setattr(time, "monotonic", lambda: now[0])
        yield now

    @staticmethod
    def writes(
        monkeypatch: pytest.MonkeyPatch, clock: list[float], bytes_: int, seconds: float
    ) -> list[float]:
        """When checkpoints are written, of so many bytes and seconds each."""
        written: list[float] = []

        def save(self: Checkpoints, rollout: Rollout) -> int:
            written.append(clock[0])
            clock[0] += seconds
            return bytes_

        monkeypatch.setattr(Checkpoints, "save", save)
        return written

    @pytest.mark.parametrize(
        ("bytes_", "seconds", "wait"),
        [(10, 0.0, 30.0), (10**10, 0.0, 100.0), (10, 4.0, 80.0), (10**10, 8.0, 160.0), (10, 1.0, 30.0)],
    )
    def test_by_time_bytes_and_share(
        self,
        tmp_path: Path,
        model: CausalWanTransformer3DModel,
        monkeypatch: pytest.MonkeyPatch,
        clock: list[float],
        bytes_: int,
        seconds: float,
        wait: float,
    ) -> None:
        written = self.writes(monkeypatch, clock, bytes_, seconds)
        checkpoints, rollout = Checkpoints(tmp_path, 1, Interval(30.0, 100e6, 0.05)), plain(model)
        clock[0] += 29.5
        assert not checkpoints.consider(rollout)
        clock[0] += 0.5
        assert checkpoints.consider(rollout) and written == [130.0]
        clock[0] += wait - 0.25
        assert not checkpoints.consider(rollout)
        clock[0] += 0.25
        assert checkpoints.consider(rollout)
        assert written == [130.0, 130.0 + seconds + wait]

    def test_one_that_failed_is_tried_again_at_once(
        self,
        tmp_path: Path,
        model: CausalWanTransformer3DModel,
        monkeypatch: pytest.MonkeyPatch,
        clock: list[float],
    ) -> None:
        def fails(self: Checkpoints, rollout: Rollout) -> int:
            raise OutputError("full")

        checkpoints, rollout = Checkpoints(tmp_path, 1), plain(model)
        clock[0] += 31
        with monkeypatch.context() as patch:
            patch.setattr(Checkpoints, "save", fails)
            with pytest.raises(OutputError):
                checkpoints.consider(rollout)
        written = self.writes(monkeypatch, clock, 1, 0)
        assert checkpoints.consider(rollout) and len(written) == 1


def test_an_empty_folder_has_none(tmp_path: Path, model: CausalWanTransformer3DModel) -> None:
    assert load(tmp_path / "none", plain(model))[0] == 0
    assert Checkpoints(tmp_path / "none").oldest() == 0
    assert not (tmp_path / "none").exists()
