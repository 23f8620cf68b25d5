"""The log of finished chunks: what it says, what it keeps, what it refuses."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from tests.tiny import LATENT_SIZE, build_rollout, build_transformer, noise
from vidkv.errors import OutputError, StateError
from vidkv.jobs.records import Head, Records, digest
from vidkv.noise import StockNoise
from vidkv.rollout import Rollout

HEAD = Head(12, "ab" * 32, "cd" * 32, {"luma": 0.1 + 0.2, "saturation": 0.25, "contrast": 1e-9})


@pytest.fixture(scope="module")
def rollout() -> Rollout:
    made = build_rollout("fp32,window=9,sink=2", transformer=build_transformer())
    made.step_chunk()
    return made


def latents(seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return noise(1, 3, *LATENT_SIZE, seed=seed, dtype=dtype)


def filled(folder: Path, rollout: Rollout, chunks: int, fence: int = 1) -> Records:
    records = Records(folder, fence)
    for chunk in range(chunks):
        records.add(chunk, latents(chunk), rollout, HEAD)
    return records


def names(folder: Path) -> list[str]:
    return sorted(name.removesuffix(".safetensors") for name in os.listdir(folder))


class TestRoundTrip:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_every_part_comes_back(self, tmp_path: Path, rollout: Rollout, dtype: torch.dtype) -> None:
        Records(tmp_path / "r", 3).add(0, latents(dtype=dtype), rollout, HEAD)
        found = Records(tmp_path / "r").read(0)
        assert found is not None
        assert found.latents.dtype == dtype and torch.equal(found.latents, latents(dtype=dtype))
        assert found.prefix == (0, 0)
        assert found.noise[0] == {} and found.noise[1] == rollout.noise.state()[1]
        assert Records(tmp_path / "r").head(0) == HEAD

    def test_latents_that_are_a_view_are_stored_as_they_look(self, tmp_path: Path, rollout: Rollout) -> None:
        wide = noise(1, 6, *LATENT_SIZE)
        Records(tmp_path).add(0, wide[:, ::2], rollout, HEAD)
        found = Records(tmp_path).read(0)
        assert found is not None and torch.equal(found.latents, wide[:, ::2])

    def test_nothing_is_there_before_the_first(self, tmp_path: Path) -> None:
        records = Records(tmp_path / "none")
        assert records.chunks == 0 and 0 not in records and records.read(0) is None
        assert not (tmp_path / "none").exists()
        with pytest.raises(StateError, match="no record of chunk 0"):
            records.head(0)

    def test_chunks_counts_to_the_last_one_whatever_was_pruned(
        self, tmp_path: Path, rollout: Rollout
    ) -> None:
        records = filled(tmp_path, rollout, 5)
        records.keep([1], since=4)
        assert records.chunks == 5 and Records(tmp_path).chunks == 5
        assert [chunk in Records(tmp_path) for chunk in range(6)] == [False, True, False, False, True, False]

    def test_stock_noise_goes_on_where_it_stood(self, tmp_path: Path) -> None:
        """Its generator is state that grows with every draw."""
        model = build_transformer()

        def fresh() -> Rollout:
            made = build_rollout(transformer=model)
            made.noise = StockNoise(5, 9, 1, LATENT_SIZE)
            return made

        whole = fresh()
        chunks = [whole.step_chunk().latents]
        Records(tmp_path).add(0, chunks[0], whole, HEAD)
        chunks.append(whole.step_chunk().latents)
        record, again = Records(tmp_path).read(0), fresh()
        assert record is not None and record.noise[0]
        again.retrace(record.latents)
        again.noise.restore(*record.noise)
        assert torch.equal(again.step_chunk().latents, chunks[1])
        # what was not restored draws something else
        other = fresh()
        other.retrace(record.latents)
        assert not torch.equal(other.step_chunk().latents, chunks[1])

    def test_a_rollout_goes_on_from_its_records_bit_for_bit(self, tmp_path: Path) -> None:
        model = build_transformer()
        whole, records = build_rollout("int8,window=9,sink=3", transformer=model), Records(tmp_path)
        for chunk in range(4):
            records.add(chunk, whole.step_chunk().latents, whole, HEAD)
        again = build_rollout("int8,window=9,sink=3", transformer=model)
        for chunk in range(4):
            record = Records(tmp_path).read(chunk)
            assert record is not None
            again.retrace(record.latents)
            again.noise.restore(*record.noise)
        assert torch.equal(again.step_chunk().latents, whole.step_chunk().latents)

    def test_prefix_is_remembered(self, tmp_path: Path) -> None:
        made = build_rollout()
        made.prefill(latents())
        Records(tmp_path).add(0, latents(), made, HEAD)
        found = Records(tmp_path).read(0)
        assert found is not None and found.prefix == (1, 3)


class TestFences:
    def test_highest_wins_whatever_the_order(self, tmp_path: Path, rollout: Rollout) -> None:
        for fence in (2, 10, 9):
            Records(tmp_path, fence).add(0, latents(fence), rollout, HEAD)
        found = Records(tmp_path).read(0)
        assert found is not None and torch.equal(found.latents, latents(10))

    @pytest.mark.parametrize("drop", [True, False])
    def test_what_is_dropped_does_not_come_back_from_a_lower_fence(
        self, tmp_path: Path, rollout: Rollout, drop: bool
    ) -> None:
        filled(tmp_path, rollout, 3, fence=1)
        records = filled(tmp_path, rollout, 3, fence=2)
        records = Records(tmp_path, 3)
        if drop:
            records.drop_from(1)
            assert names(tmp_path) == ["000000-1", "000000-2"] and Records(tmp_path).chunks == 1
        else:
            records.keep([0], since=2)
            assert names(tmp_path) == ["000000-1", "000000-2", "000002-1", "000002-2"]

    def test_a_replaced_writer_deletes_nothing_of_its_successor(
        self, tmp_path: Path, rollout: Rollout
    ) -> None:
        old = filled(tmp_path, rollout, 3, fence=1)
        filled(tmp_path, rollout, 3, fence=2)
        old.keep([], since=3)
        old.drop_from(0)
        assert names(tmp_path) == ["000000-2", "000001-2", "000002-2"]


class TestPruning:
    def test_keep_deletes_what_is_before_and_not_named(self, tmp_path: Path, rollout: Rollout) -> None:
        records = filled(tmp_path, rollout, 6)
        records.keep([0, 3], since=4)
        assert names(tmp_path) == ["000000-1", "000003-1", "000004-1", "000005-1"]
        assert records.read(1) is None and records.read(4) is not None
        records.keep([], since=0)
        assert len(names(tmp_path)) == 4

    def test_drop_from_deletes_that_one_and_later_ones(self, tmp_path: Path, rollout: Rollout) -> None:
        records = filled(tmp_path, rollout, 4)
        records.drop_from(2)
        assert names(tmp_path) == ["000000-1", "000001-1"] and records.chunks == 2
        records.add(2, latents(9), rollout, HEAD)
        found = records.read(2)
        assert found is not None and torch.equal(found.latents, latents(9))

    def test_of_a_folder_that_is_gone(self, tmp_path: Path, rollout: Rollout) -> None:
        Records(tmp_path / "none").drop_from(0)
        Records(tmp_path / "none").keep([], since=9)

    def test_foreign_files_stay(self, tmp_path: Path, rollout: Rollout) -> None:
        for name in ("notes.txt", "000000-1.safetensors.bak", "00000-1.safetensors", "000001.safetensors"):
            (tmp_path / name).touch()
        records = filled(tmp_path, rollout, 2)
        records.drop_from(0)
        assert len(os.listdir(tmp_path)) == 4


def flip(place: int) -> Callable[[bytes], bytes]:
    def flipped(data: bytes) -> bytes:
        changed = bytearray(data)
        changed[place] ^= 1
        return bytes(changed)

    return flipped


def without(name: str) -> Callable[[bytes], bytes]:
    """A whole safetensors file that lacks something."""

    def reduced(data: bytes) -> bytes:
        header = {"chunk": 0, "noise": {}, "prefix": [0, 0], "frames": 9, "digest": "", "first_look": {}}
        header.pop(name, None)
        tensors = {} if name == "latents" else {"latents": latents()}
        return save(tensors, {"vidkv": json.dumps(header)} if name != "vidkv" else None)

    return reduced


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "short": lambda data: data[:-1],
    "half": lambda data: data[: len(data) // 2],
    "header alone": lambda data: data[:8],
    "garbage": lambda data: os.urandom(64),
    "zeros": lambda data: bytes(len(data)),
    "huge header": lambda data: b"\xff" * 8 + data[8:],
    "latents": flip(-1),
    "longer": lambda data: data + b"x",
    "frames": lambda data: data.replace(b'\\"frames\\": 12', b'\\"frames\\": 13'),
    "digest": lambda data: data.replace(b"abab", b"abaa", 1),
    "chunk": lambda data: data.replace(b'\\"chunk\\": 0', b'\\"chunk\\": 1'),
} | {
    f"no {name}": without(name)
    for name in ("latents", "vidkv", "chunk", "noise", "prefix", "frames", "digest", "first_look", "")
}  # fmt: skip


class TestDamage:
    @pytest.mark.parametrize("damage", DAMAGES)
    def test_is_named_and_never_believed(self, tmp_path: Path, rollout: Rollout, damage: str) -> None:
        Records(tmp_path, 1).add(0, latents(), rollout, HEAD)
        path = tmp_path / "000000-1.safetensors"
        before = path.read_bytes()
        after = DAMAGES[damage](before)
        assert after != before
        path.write_bytes(after)
        records = Records(tmp_path)
        for read in (records.read, records.head):
            with pytest.raises(StateError, match=r"000000-1\.safetensors is damaged"):
                read(0)
        assert records.chunks == 1

    def test_every_bit_counts(self, tmp_path: Path, rollout: Rollout) -> None:
        """Whatever single bit is flipped, what is read is what was written, or an error."""
        Records(tmp_path, 1).add(0, latents(), rollout, HEAD)
        path = tmp_path / "000000-1.safetensors"
        data = path.read_bytes()
        refused = 0
        for place in [*range(0, len(data), 11)]:
            for bit in (1, 32, 128):
                changed = bytearray(data)
                changed[place] ^= bit
                path.write_bytes(changed)
                records = Records(tmp_path)
                try:
                    found, head = records.read(0), records.head(0)
                except StateError:
                    refused += 1
                    continue
                assert found is not None and torch.equal(found.latents, latents()) and head == HEAD
                assert found.prefix == (0, 0) and found.noise[1] == rollout.noise.state()[1]
        assert refused > 300

    def test_a_vanished_file(self, tmp_path: Path, rollout: Rollout) -> None:
        records = filled(tmp_path, rollout, 1)
        (tmp_path / "000000-1.safetensors").unlink()
        with pytest.raises(StateError, match="damaged"):
            records.read(0)


class TestDisk:
    def test_a_full_one_is_an_error_and_the_record_is_not_there(
        self, tmp_path: Path, rollout: Rollout, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        records = filled(tmp_path, rollout, 1)

        def full(*args: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        for place, call in ((Path, "write_bytes"), (os, "fsync"), (os, "replace")):
            with monkeypatch.context() as patch:
                patch.setattr(place, call, full)
                with pytest.raises(OutputError, match=r"000001-1.*No space.*make room"):
                    records.add(1, latents(), rollout, HEAD)
            assert 1 not in records and records.chunks == 1 and names(tmp_path) == ["000000-1"]

    def test_what_cannot_be_deleted_is_an_error(
        self, tmp_path: Path, rollout: Rollout, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        records = filled(tmp_path, rollout, 2)

        def refused(*args: Any, **kwargs: Any) -> None:
            raise OSError(errno.EROFS, "Read-only file system")

        monkeypatch.setattr(Path, "unlink", refused)
        with pytest.raises(OutputError, match="Read-only"):
            records.drop_from(1)


class TestDigest:
    def test_is_sha256_over_the_one_before_and_float32_bytes(self) -> None:
        first = digest("", latents(1))
        assert first == hashlib.sha256(latents(1).numpy().tobytes()).hexdigest()
        wanted = hashlib.sha256(first.encode() + latents(2).numpy().tobytes()).hexdigest()
        assert digest(first, latents(2)) == wanted

    def test_tells_order_and_values_apart(self) -> None:
        chain = {digest(digest("", latents(a)), latents(b)) for a, b in ((1, 2), (2, 1), (1, 1), (2, 2))}
        assert len(chain) == 4
        smallest = latents().clone()
        smallest.view(torch.int32).view(-1)[7] ^= 1
        assert digest("", smallest) != digest("", latents())

    def test_of_a_view_is_of_what_it_shows(self) -> None:
        wide = noise(1, 6, *LATENT_SIZE)
        assert digest("", wide[:, ::2]) == digest("", wide[:, ::2].clone())
        half = latents(dtype=torch.bfloat16)
        assert digest("", half) == digest("", half.float())
