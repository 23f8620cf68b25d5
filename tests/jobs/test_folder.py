"""The folder of one job, whatever has become of its files."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vidkv.errors import InputError, OutputError, StateError
from vidkv.jobs.folder import JobFolder
from vidkv.request import EngineSettings, VideoRequest

JOB: dict[str, Any] = {
    "id": "a", "key": "k" * 64, "number": 1, "out": "a.mp4", "request": {"prompt": "rain", "seed": 7},
    "settings": {"device": "cpu"}, "chunks": 3, "submitted": 1.5,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> JobFolder:
    made = JobFolder(tmp_path / "jobs" / "a-kkkkkkkk")
    made.create(JOB)
    return made


class TestJob:
    def test_comes_back(self, folder: JobFolder) -> None:
        assert folder.job() == JOB
        assert folder.request() == (VideoRequest(prompt="rain", seed=7), EngineSettings(device="cpu"))

    def test_what_is_there_stays(self, folder: JobFolder) -> None:
        folder.create(JOB | {"number": 9})
        assert folder.job()["number"] == 1 and os.listdir(folder.path) == ["job.json"]

    @pytest.mark.parametrize("text", ["", "{", "[]", "5", "{}", '{"id": "a"}', "\xff\xfe\x00"])
    def test_damage_is_named_and_can_be_mended(self, folder: JobFolder, text: str) -> None:
        (folder.path / "job.json").write_bytes(text.encode("latin-1"))
        for read in (folder.job, folder.request):
            with pytest.raises(StateError, match=r"job.json is missing or damaged"):
                read()
        folder.create(JOB)
        assert folder.job() == JOB

    @pytest.mark.parametrize("name", JOB)
    def test_every_entry_is_required_and_of_its_kind(self, folder: JobFolder, name: str) -> None:
        from vidkv.files import write_json

        for value in (None, True, [], "text" if not isinstance(JOB[name], str) else 5):
            write_json(folder.path / "job.json", JOB | {name: value})
            with pytest.raises(StateError):
                folder.job()
        write_json(folder.path / "job.json", {key: value for key, value in JOB.items() if key != name})
        with pytest.raises(StateError):
            folder.job()

    @pytest.mark.parametrize(
        "change", [{"request": {}}, {"request": {"prompt": "a", "later": 1}}, {"settings": {"later": 1}},
                   {"settings": {"tile": "x"}}],
    )  # fmt: skip
    def test_of_another_version_is_an_error_of_one_line(
        self, folder: JobFolder, change: dict[str, Any]
    ) -> None:
        (folder.path / "job.json").unlink()
        folder.create(JOB | change)
        with pytest.raises(InputError) as caught:
            folder.request()
        assert "\n" not in str(caught.value)


class TestResult:
    def test_comes_back(self, folder: JobFolder) -> None:
        assert folder.result() is None
        folder.end({"state": "done", "frames": 9})
        assert folder.result() == {"state": "done", "frames": 9}

    @pytest.mark.parametrize(
        "text", ["", "{", "[]", "{}", '{"state": null}', '{"state": "queued"}', '{"state": "running"}',
                 '{"state": ["done"]}', "\xff"],
    )  # fmt: skip
    def test_damage_is_as_if_it_had_not_ended(self, folder: JobFolder, text: str) -> None:
        (folder.path / "result.json").write_bytes(text.encode("latin-1"))
        assert folder.result() is None

    def test_reopening_forgets_it_and_the_wish_to_cancel(self, folder: JobFolder) -> None:
        folder.end({"state": "cancelled"})
        folder.mark("cancel")
        assert folder.marked("cancel")
        folder.reopen()
        assert folder.result() is None and not folder.marked("cancel")
        folder.reopen()


class TestClearing:
    @staticmethod
    def fill(folder: JobFolder) -> None:
        for part in (folder.segments, folder.records, folder.checkpoints):
            part.mkdir()
            (part / "file").touch()

    def test_clear_keeps_the_job_and_its_end(self, folder: JobFolder) -> None:
        self.fill(folder)
        folder.end({"state": "done"})
        folder.clear()
        assert sorted(os.listdir(folder.path)) == ["job.json", "result.json"]
        folder.clear()

    def test_remove_takes_all_of_it_and_no_neighbour(self, folder: JobFolder) -> None:
        neighbour = JobFolder(folder.path.with_name("a-kkkkkkkk2"))
        neighbour.create(JOB)
        self.fill(folder)
        folder.remove()
        assert os.listdir(folder.path.parent) == ["a-kkkkkkkk2"] and neighbour.job() == JOB
        folder.remove()

    def test_links_are_removed_and_what_they_lead_to_stays(self, folder: JobFolder, tmp_path: Path) -> None:
        (tmp_path / "precious").mkdir()
        (tmp_path / "precious" / "file").write_text("mine")
        link = JobFolder(folder.path.with_name("linked"))
        link.path.symlink_to(tmp_path / "precious")
        folder.segments.symlink_to(tmp_path / "precious")
        folder.clear()
        folder.remove()
        link.remove()
        assert (tmp_path / "precious" / "file").read_text() == "mine"
        assert os.listdir(folder.path.parent) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_disk_errors_are_one_line(folder: JobFolder, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refused(*args: Any, **kwargs: Any) -> Any:
        raise OSError(number, os.strerror(number))

    folder.end({"state": "done"})
    for call in ("touch", "unlink", "mkdir"):
        monkeypatch.setattr(Path, call, refused)
    acts: list[Callable[[], None]] = [
        lambda: folder.mark("cancel"),
        folder.reopen,
        lambda: folder.create(JOB),
    ]
    for act in acts:
        with pytest.raises(OutputError, match=os.strerror(number)):
            act()
