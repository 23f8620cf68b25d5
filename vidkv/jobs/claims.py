"""Who works on a folder: exclusive directory creation, with numbers that fence off those who lost it.

A claim is the directory `claims/000007` of a job's folder. Making a directory succeeds for one of any number
of processes, on one host or on storage shared by many. Its number is part of the name of every file that its
holder writes, and readers take the highest, so that a holder who was suspended, lost the claim and does not
know it yet can harm nothing. Whether a holder is alive is asked of the kernel where it runs on this host; of
another host's, its heartbeat must stand still for a lease on this host's own monotonic clock: clocks that
differ or jump do not matter.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import time
from functools import cache
from pathlib import Path
from typing import Any

import psutil

from vidkv.errors import OutputError, VidkvError
from vidkv.files import reason

LEASE_S = 30.0
BEAT_S = 5.0


class Fenced(VidkvError):
    """Another process has taken the job over."""


class Claim:
    """A job's folder, held.

    Attributes:
        fence: number of this claim.
    """

    def __init__(self, folder: Path, fence: int) -> None:
        self.folder, self.fence = folder, fence
        self.path = folder / "claims" / _name(fence)
        self._beats = 0

    def beat(self) -> None:
        """Say that the holder lives.

        Raises:
            Fenced: it has been replaced.
        """
        self.check()
        self._beats += 1
        with contextlib.suppress(OSError):
            (self.path / "beat").write_text(str(self._beats))

    def check(self) -> None:
        """Raise where another process holds the folder by now.

        Raises:
            Fenced: it does, or the folder is gone.
            OutputError: that cannot be seen now.
        """
        if _newest(self.folder) != self.fence:
            raise Fenced(f"{self.folder.name}: another process has taken this job over")

    def release(self) -> None:
        """Let go; the next claim need not wait."""
        try:
            # a full disk has room for a new name, not for a new file
            (self.path / "owner.json").replace(self.path / "released")
        except OSError:
            with contextlib.suppress(OSError):
                (self.path / "released").touch()


class Claims:
    """Takes claims; remembers what it saw of other hosts' heartbeats.

    Args:
        lease_s: how long another host's heartbeat may stand still.
    """

    def __init__(self, lease_s: float = LEASE_S) -> None:
        self.lease_s = lease_s
        self._seen: dict[tuple[Path, int], tuple[str, float]] = {}

    def take(self, folder: Path) -> Claim | None:
        """Claim a folder; None while somebody else has it.

        Raises:
            OutputError: the folder cannot be written.
        """
        newest = _newest(folder)
        if newest and not self._free(folder, newest):
            return None
        claim = Claim(folder, newest + 1)
        try:
            claim.path.parent.mkdir(exist_ok=True)
            claim.path.mkdir()
        except FileExistsError:
            return None
        except OSError as error:
            raise OutputError(
                f"cannot claim {folder}: {reason(error)}; make room or check its rights"
            ) from error
        if _newest(folder) != claim.fence:
            # older than one that was made and cleared away meanwhile
            shutil.rmtree(claim.path, ignore_errors=True)
            return None
        with contextlib.suppress(OSError):
            temporary = claim.path / "owner.tmp"
            temporary.write_text(json.dumps(_myself()))
            temporary.replace(claim.path / "owner.json")
        for number in _numbers(folder):
            if number < claim.fence:
                shutil.rmtree(folder / "claims" / _name(number), ignore_errors=True)
        # a copy: other threads look at other folders meanwhile
        for key in list(self._seen):
            if key[0] == folder:
                self._seen.pop(key, None)
        return claim

    def newest(self, folder: Path) -> int:
        """Number of the last claim on a folder; 0 if there was none."""
        return _newest(folder)

    def held(self, folder: Path) -> bool:
        """Whether a live process has a folder, as far as can be seen by now."""
        newest = _newest(folder)
        return bool(newest) and not self._free(folder, newest)

    def _free(self, folder: Path, fence: int) -> bool:
        path = folder / "claims" / _name(fence)
        if (path / "released").exists():
            return True
        try:
            owner = json.loads((path / "owner.json").read_text())
        except (OSError, ValueError):
            owner = None
        if isinstance(owner, dict) and owner.get("host") == _host():
            return not _lives(owner)
        beat = ""
        with contextlib.suppress(OSError):
            beat = (path / "beat").read_text()
        now, key = time.monotonic(), (folder, fence)
        last, since = self._seen.get(key, (None, now))
        if beat != last:
            since = now
        self._seen[key] = (beat, since)
        return now - since >= self.lease_s


def _name(fence: int) -> str:
    return f"{fence:06d}"


def _numbers(folder: Path) -> list[int]:
    try:
        return [int(name) for name in os.listdir(folder / "claims") if name.isdecimal()]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise OutputError(f"cannot read the claims of {folder}: {reason(error)}; check its rights") from error


def _newest(folder: Path) -> int:
    return max(_numbers(folder), default=0)


@cache
def _host() -> str:
    """This host since it was started, and which processes are visible to one another on it."""
    parts = [socket.gethostname()]
    for source in ("/proc/sys/kernel/random/boot_id", "/proc/self/ns/pid"):
        with contextlib.suppress(OSError):
            parts.append(os.readlink(source) if "ns" in source else Path(source).read_text().strip())
    return "/".join(parts)


def _myself() -> dict[str, Any]:
    return {"host": _host(), "pid": os.getpid(), "started": _started(psutil.Process())}


def _started(process: psutil.Process) -> float:
    """When a process began, on a clock that nobody sets.

    psutil adds the time of the boot, which the kernel derives from the wall clock.
    """
    try:
        # the second field is the program's name, which may hold blanks and brackets
        fields = Path(f"/proc/{process.pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return float(fields[19])
    except (OSError, IndexError, ValueError):
        return process.create_time()


def _lives(owner: dict[str, Any]) -> bool:
    try:
        process = psutil.Process(int(owner["pid"]))
        same = abs(_started(process) - float(owner["started"])) < 0.01
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.AccessDenied:
        return True
    except (psutil.Error, KeyError, TypeError, ValueError, OverflowError):
        return False
