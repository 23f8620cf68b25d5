"""Files that appear complete or not at all, whatever call fails."""

from __future__ import annotations

import errno
import json
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from vidkv.files import publish, reason, sync_folder, write_durably, write_json


def full(*args: Any, **kwargs: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def half_written(path: Path, data: bytes) -> int:
    """What a disk does that is full in the middle."""
    with path.open("wb") as file:
        file.write(data[: len(data) // 2])
    return int(full())


class TestWriteDurably:
    def test_replaces_as_a_whole_and_leaves_nothing_behind(self, tmp_path: Path) -> None:
        path = tmp_path / "a"
        write_durably(path, b"old and long")
        write_durably(path, b"new")
        assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["a"]

    @pytest.mark.parametrize("call", ["write_bytes", "replace", "fsync", "open"])
    @pytest.mark.parametrize("old", [b"old", None])
    def test_full_disk_changes_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, old: bytes | None
    ) -> None:
        path = tmp_path / "a"
        if old is not None:
            path.write_bytes(old)
        place = Path if call == "write_bytes" else os
        with monkeypatch.context() as patch:
            patch.setattr(place, call, half_written if call == "write_bytes" else full)
            with pytest.raises(OSError, match="No space"):
                write_durably(path, b"x" * 1000)
        assert os.listdir(tmp_path) == ([] if old is None else ["a"])
        assert old is None or path.read_bytes() == old

    def test_a_folder_that_cannot_be_synced_leaves_the_new_content_whole(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path, real = tmp_path / "a", os.fsync
        path.write_bytes(b"old")
        calls: list[int] = []

        def second_fails(descriptor: int) -> None:
            calls.append(descriptor)
            full() if len(calls) == 2 else real(descriptor)

        monkeypatch.setattr(os, "fsync", second_fails)
        with pytest.raises(OSError, match="No space"):
            write_durably(path, b"new")
        assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["a"]

    def test_order_is_content_then_name_then_folder(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        calls: list[tuple[str, str]] = []
        real_fsync, real_replace = os.fsync, os.replace

        def fsync(descriptor: int) -> None:
            calls.append(("fsync", os.readlink(f"/proc/self/fd/{descriptor}")))
            real_fsync(descriptor)

        def replace(source: Path, target: Path) -> None:
            assert Path(source).read_bytes() == b"data"
            calls.append(("replace", str(target)))
            real_replace(source, target)

        monkeypatch.setattr(os, "fsync", fsync)
        monkeypatch.setattr(os, "replace", replace)
        write_durably(tmp_path / "a", b"data")
        assert [kind for kind, _ in calls] == ["fsync", "replace", "fsync"]
        assert calls[0][1].startswith(str(tmp_path / ".a.")) and calls[0][1].endswith(".tmp")
        assert calls[1][1] == str(tmp_path / "a") and calls[2][1] == str(tmp_path)

    def test_an_interrupt_leaves_no_temporary(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupted(*args: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write_durably(tmp_path / "a", b"data")
        assert os.listdir(tmp_path) == []

    def test_writers_of_one_name_do_not_meet(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Two threads write the same name and stop before the rename until both are there."""
        barrier, real, failed = threading.Barrier(2), os.replace, list[BaseException]()

        def together(source: Path, target: Path) -> None:
            barrier.wait(10)
            real(source, target)

        def write(data: bytes) -> None:
            try:
                write_durably(tmp_path / "a", data)
            except BaseException as error:
                failed.append(error)

        monkeypatch.setattr(os, "replace", together)
        threads = [threading.Thread(target=write, args=(data,)) for data in (b"one" * 500, b"two" * 900)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failed
        assert (tmp_path / "a").read_bytes() in (b"one" * 500, b"two" * 900)
        assert os.listdir(tmp_path) == ["a"]

    def test_json(self, tmp_path: Path) -> None:
        write_json(tmp_path / "a.json", {"text": "ä\ud800", "number": 1.5})
        assert json.loads((tmp_path / "a.json").read_text()) == {"text": "ä\ud800", "number": 1.5}


class TestPublish:
    def test_what_cannot_be_synced_is_not_named(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "t").write_bytes(b"new")
        (tmp_path / "a").write_bytes(b"old")
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            publish(tmp_path / "t", tmp_path / "a")
        assert (tmp_path / "a").read_bytes() == b"old" and (tmp_path / "t").exists()

    @pytest.mark.parametrize(("number", "raised"), [(errno.EINVAL, False), (errno.EIO, True)])
    def test_folders_that_know_no_sync_are_left_alone(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, raised: bool
    ) -> None:
        def refused(descriptor: int) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, "fsync", refused)
        if raised:
            with pytest.raises(OSError, match="Input/output"):
                sync_folder(tmp_path)
        else:
            sync_folder(tmp_path)

    def test_descriptors_are_closed_when_sync_fails(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = len(os.listdir("/proc/self/fd"))
        monkeypatch.setattr(os, "fsync", full)
        for _ in range(5):
            with pytest.raises(OSError):
                write_durably(tmp_path / "a", b"")
        assert len(os.listdir("/proc/self/fd")) == before


def test_reason_leaves_the_path_out() -> None:
    assert reason(OSError(errno.ENOSPC, "No space left on device", "/a/b")) == "No space left on device"
    assert reason(ValueError("why")) == "why" and reason(ValueError()) == "ValueError"
