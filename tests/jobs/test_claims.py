"""Who works on a folder: races, deaths, other hosts, clocks, disks."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from vidkv.errors import OutputError
from vidkv.jobs import claims
from vidkv.jobs.claims import Claim, Claims, Fenced

# a child here calls nothing that another thread's lock could hold up
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


class Clock:
    """A monotonic clock that stands still until it is moved."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Any]]:
    """A context in which this process is another host."""

    def there() -> Any:
        context = monkeypatch.context()
        context.__enter__().setattr(claims, "_host", lambda: "other/boot")
        return context

    yield there


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder / "claims"))


def taken(folder: Path) -> Claim:
    claim = Claims().take(folder)
    assert claim is not None
    return claim


def in_a_child(act: Callable[[], object]) -> int:
    """Run something in a forked process that ends without cleaning up; returns its number."""
    child = os.fork()
    if not child:
        try:
            act()
        finally:
            os._exit(0)
    return child


class TestExclusive:
    def test_one_of_many_threads_has_it_and_numbers_grow(self, tmp_path: Path) -> None:
        fences: list[int] = []
        holders: list[int] = []
        most, guard = [0], threading.Lock()

        def contend() -> None:
            mine = Claims()
            # however the threads are scheduled
            while len(fences) < 60:
                claim = mine.take(tmp_path)
                if claim is None:
                    continue
                with guard:
                    holders.append(claim.fence)
                    most[0] = max(most[0], len(holders))
                    fences.append(claim.fence)
                time.sleep(0)
                claim.check()
                with guard:
                    holders.remove(claim.fence)
                claim.release()

        threads = [threading.Thread(target=contend) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert most[0] == 1
        assert fences == sorted(set(fences))
        assert names(tmp_path) == [f"{fences[-1]:06d}"]

    def test_one_of_four_processes_has_it(self, tmp_path: Path) -> None:
        """Each holder makes a folder and removes it: two at once would find it there."""
        (tmp_path / "log").mkdir()

        def contend() -> None:
            mine, end = Claims(), time.monotonic() + 20
            done = 0
            while done < 25 and time.monotonic() < end:
                claim = mine.take(tmp_path)
                if claim is None:
                    continue
                try:
                    (tmp_path / "held").mkdir()
                    (tmp_path / "log" / str(claim.fence)).mkdir()
                except FileExistsError:
                    (tmp_path / "broken").touch()
                (tmp_path / "held").rmdir()
                done += 1
                claim.release()

        children = [in_a_child(contend) for _ in range(4)]
        for child in children:
            os.waitpid(child, 0)
        assert not (tmp_path / "broken").exists()
        assert len(os.listdir(tmp_path / "log")) == 100

    def test_a_number_is_never_given_twice(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A contender that stops between looking and making comes after the claim was taken and cleared."""
        real, hurried = Path.mkdir, list[int]()

        def slow(path: Path, *args: Any, **kwargs: Any) -> None:
            if path.name == "000001" and not hurried:
                hurried.append(0)
                for _ in range(3):
                    claim = taken(tmp_path)
                    hurried.append(claim.fence)
                    claim.release()
            real(path, *args, **kwargs)

        monkeypatch.setattr(Path, "mkdir", slow)
        assert Claims().take(tmp_path) is None
        assert hurried == [0, 1, 2, 3] and names(tmp_path) == ["000003"]
        assert taken(tmp_path).fence == 4

    def test_a_late_contender_takes_nothing_from_a_holder(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        taken(tmp_path).release()
        real, holder = Path.mkdir, list[Claim]()

        def slow(path: Path, *args: Any, **kwargs: Any) -> None:
            if path.name == "000002" and not holder:
                holder.append(Claim(tmp_path, 0))
                taken(tmp_path).release()
                holder[0] = taken(tmp_path)
            real(path, *args, **kwargs)

        monkeypatch.setattr(Path, "mkdir", slow)
        assert Claims().take(tmp_path) is None
        assert holder[0].fence == 3
        holder[0].beat()
        assert Claims().take(tmp_path) is None and names(tmp_path) == ["000003"]

    def test_threads_that_look_at_other_folders_do_not_disturb(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What is remembered of other hosts changes while it is tidied up."""
        shared, failed = Claims(), list[BaseException]()
        before = sys.getswitchinterval()
        monkeypatch.setattr(shared, "_seen", {(tmp_path / "far", i): ("", 0.0) for i in range(5000)})
        for i in range(40):
            path = tmp_path / f"job{i}" / "claims" / "000001"
            path.mkdir(parents=True)
        (tmp_path / "mine").mkdir()

        def look(start: int) -> None:
            try:
                for turn in range(300):
                    shared._free(tmp_path / f"job{(start + turn) % 40}", turn)
            except BaseException as error:
                failed.append(error)

        threads = [threading.Thread(target=look, args=(i,)) for i in range(3)]
        sys.setswitchinterval(1e-5)
        try:
            for thread in threads:
                thread.start()
            while any(thread.is_alive() for thread in threads):
                claim = shared.take(tmp_path / "mine")
                assert claim is not None
                claim.release()
        finally:
            sys.setswitchinterval(before)
            for thread in threads:
                thread.join()
        assert not failed


class TestOnThisHost:
    def test_released_is_free_at_once(self, tmp_path: Path) -> None:
        claim = taken(tmp_path)
        assert Claims().held(tmp_path) and Claims().take(tmp_path) is None
        claim.release()
        assert not Claims().held(tmp_path)
        assert taken(tmp_path).fence == 2

    def test_is_released_on_a_full_disk(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*args: Any, **kwargs: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        claim = taken(tmp_path)
        with monkeypatch.context() as patch:
            for call in ("touch", "write_text", "mkdir"):
                patch.setattr(Path, call, full)
            claim.release()
        assert taken(tmp_path).fence == 2

    def test_is_released_without_an_owner(self, tmp_path: Path) -> None:
        claim = taken(tmp_path)
        (claim.path / "owner.json").unlink()
        claim.release()
        assert taken(tmp_path).fence == 2

    @pytest.mark.parametrize("killed", [False, True])
    @pytest.mark.parametrize("reaped", [False, True])
    def test_of_a_dead_process_is_free_at_once(self, tmp_path: Path, killed: bool, reaped: bool) -> None:
        """Also while its parent has not asked what became of it."""
        child = in_a_child(lambda: (Claims().take(tmp_path), killed and os.kill(os.getpid(), signal.SIGKILL)))
        os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
        if reaped:
            os.waitpid(child, 0)
        assert names(tmp_path) == ["000001"] and (tmp_path / "claims/000001/owner.json").exists()
        claim = Claims().take(tmp_path)
        if not reaped:
            os.waitpid(child, 0)
        assert claim is not None and claim.fence == 2

    def test_of_a_live_process_is_not_free_however_long_it_says_nothing(
        self, tmp_path: Path, clock: Clock
    ) -> None:
        read, write = os.pipe()
        child = in_a_child(lambda: (Claims().take(tmp_path), os.close(write), os.read(read, 1)))
        os.close(read)
        try:
            while not (tmp_path / "claims/000001/owner.json").exists():
                time.sleep(0.01)
            mine = Claims()
            for _ in range(3):
                assert mine.take(tmp_path) is None
                clock.now += 1e6
        finally:
            os.close(write)
            os.waitpid(child, 0)
        assert mine.take(tmp_path) is not None

    def test_another_process_of_that_number_is_not_the_holder(self, tmp_path: Path) -> None:
        claim = taken(tmp_path)
        owner = json.loads((claim.path / "owner.json").read_text())
        assert owner["pid"] == os.getpid()
        owner["started"] -= 500
        (claim.path / "owner.json").write_text(json.dumps(owner))
        assert taken(tmp_path).fence == 2

    def test_a_clock_that_was_set_does_not_kill_the_holder(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The kernel's time of the boot moves with the wall clock, and psutil's time of creation with it."""
        taken(tmp_path)
        import psutil

        real = psutil.Process.create_time
        monkeypatch.setattr(psutil.Process, "create_time", lambda self: real(self) + 86400)
        monkeypatch.setattr(time, "time", lambda: 86400.0)
        assert Claims().held(tmp_path) and Claims().take(tmp_path) is None

    @pytest.mark.parametrize(
        "damage",
        [{"pid": 2**70}, {"pid": -1}, {"pid": None}, {"pid": "x"}, {"started": None}, {"started": []}],
    )
    def test_an_owner_that_cannot_be_is_dead(self, tmp_path: Path, damage: dict[str, Any]) -> None:
        claim = taken(tmp_path)
        owner = json.loads((claim.path / "owner.json").read_text()) | damage
        (claim.path / "owner.json").write_text(json.dumps(owner))
        assert taken(tmp_path).fence == 2


class TestElsewhere:
    def test_is_free_once_its_beat_stood_still_for_a_lease(
        self, tmp_path: Path, clock: Clock, elsewhere: Callable[[], Any]
    ) -> None:
        context = elsewhere()
        theirs = taken(tmp_path)
        context.__exit__(None, None, None)
        mine = Claims(lease_s=30)
        for _ in range(4):
            assert mine.take(tmp_path) is None
            clock.now += 29
            theirs.beat()
        assert mine.held(tmp_path)
        clock.now += 29.9
        assert mine.take(tmp_path) is None
        clock.now += 0.2
        assert not mine.held(tmp_path)
        claim = mine.take(tmp_path)
        assert claim is not None and claim.fence == 2
        with pytest.raises(Fenced, match=tmp_path.name):
            theirs.beat()

    def test_wall_clocks_do_not_matter(
        self, tmp_path: Path, clock: Clock, elsewhere: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        context = elsewhere()
        theirs = taken(tmp_path)
        context.__exit__(None, None, None)
        mine = Claims()
        assert mine.take(tmp_path) is None
        for jump in (86400.0, -2 * 86400.0):
            monkeypatch.setattr(time, "time", lambda jump=jump: 1e9 + jump)
            os.utime(theirs.path, (1e9 + jump, 1e9 + jump))
            clock.now += 10
            assert mine.take(tmp_path) is None
        clock.now += 10
        assert mine.take(tmp_path) is not None

    def test_what_was_seen_of_one_claim_says_nothing_of_the_next(
        self, tmp_path: Path, clock: Clock, elsewhere: Callable[[], Any]
    ) -> None:
        mine = Claims()
        context = elsewhere()
        theirs = taken(tmp_path)
        context.__exit__(None, None, None)
        assert mine.take(tmp_path) is None
        clock.now += 29
        theirs.release()
        context = elsewhere()
        taken(tmp_path)
        context.__exit__(None, None, None)
        clock.now += 5
        assert mine.take(tmp_path) is None

    @pytest.mark.parametrize(
        "owner", [None, "", "{", "[]", "5", "null", '"text"', "{}", "\xff\xfe", '{"host": 1}']
    )
    def test_an_owner_that_cannot_be_read_is_another_host(
        self, tmp_path: Path, clock: Clock, owner: str | None
    ) -> None:
        claim, mine = taken(tmp_path), Claims()
        (claim.path / "owner.json").unlink()
        if owner is not None:
            (claim.path / "owner.json").write_bytes(owner.encode("latin-1"))
        assert mine.take(tmp_path) is None
        clock.now += 29
        claim.beat()
        assert mine.take(tmp_path) is None
        clock.now += 31
        assert mine.take(tmp_path) is not None


class TestHolder:
    def test_goes_on_while_it_is_the_newest(self, tmp_path: Path) -> None:
        claim = taken(tmp_path)
        claim.beat()
        first = (claim.path / "beat").read_text()
        claim.beat()
        assert (claim.path / "beat").read_text() != first

    def test_that_was_replaced_is_fenced_and_touches_nothing(self, tmp_path: Path, clock: Clock) -> None:
        claim, mine = taken(tmp_path), Claims()
        (claim.path / "owner.json").unlink()
        mine.take(tmp_path)
        clock.now += 31
        second = mine.take(tmp_path)
        assert second is not None
        for act in (claim.check, claim.beat):
            with pytest.raises(Fenced):
                act()
        claim.release()
        second.check()
        assert names(tmp_path) == ["000002"] and os.listdir(second.path) == ["owner.json"]

    def test_of_a_vanished_folder_is_fenced(self, tmp_path: Path) -> None:
        folder = tmp_path / "job"
        folder.mkdir()
        claim = taken(folder)
        shutil.rmtree(folder)
        with pytest.raises(Fenced):
            claim.check()
        with pytest.raises(Fenced):
            claim.beat()
        claim.release()
        assert not folder.exists()

    def test_a_beat_that_cannot_be_written_is_missed_and_no_more(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        claim = taken(tmp_path)

        def full(*args: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(Path, "write_text", full)
            claim.beat()
        claim.beat()
        assert (claim.path / "beat").read_text() == "2"


class TestDisk:
    @pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT])
    @pytest.mark.parametrize("failing", [1, 2])
    def test_a_folder_that_takes_no_claim(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, failing: int
    ) -> None:
        real, calls = Path.mkdir, list[Path]()

        def refused(path: Path, *args: Any, **kwargs: Any) -> None:
            calls.append(path)
            if len(calls) == failing:
                raise OSError(number, os.strerror(number))
            real(path, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "mkdir", refused)
            with pytest.raises(OutputError, match=os.strerror(number)):
                Claims().take(tmp_path)
        assert taken(tmp_path).fence == 1

    def test_a_folder_that_cannot_be_read(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        claim = taken(tmp_path)

        def refused(*args: Any) -> list[str]:
            raise PermissionError(errno.EACCES, "Permission denied")

        monkeypatch.setattr(os, "listdir", refused)
        for act in (
            lambda: Claims().take(tmp_path),
            lambda: Claims().held(tmp_path),
            claim.check,
            claim.beat,
        ):
            with pytest.raises(OutputError, match="Permission denied"):
                act()

    def test_a_file_where_claims_should_be(self, tmp_path: Path) -> None:
        (tmp_path / "claims").touch()
        with pytest.raises(OutputError, match="Not a directory"):
            Claims().take(tmp_path)

    def test_a_missing_folder_is_not_made(self, tmp_path: Path) -> None:
        with pytest.raises(OutputError, match="No such file"):
            Claims().take(tmp_path / "gone")
        assert not (tmp_path / "gone").exists()

    def test_a_claim_without_room_for_its_owner_still_excludes(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: Clock
    ) -> None:
        def full(*args: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(Path, "write_text", full)
            claim = taken(tmp_path)
        mine = Claims()
        assert mine.take(tmp_path) is None
        clock.now += 29
        claim.beat()
        assert mine.take(tmp_path) is None

    def test_foreign_names_are_no_claims(self, tmp_path: Path) -> None:
        (tmp_path / "claims").mkdir()
        for name in ("x", "-3", "1e9", ".000009"):
            (tmp_path / "claims" / name).mkdir()
        assert taken(tmp_path).fence == 1
        assert len(names(tmp_path)) == 5
