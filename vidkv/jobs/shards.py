"""A part of the jobs for each of several processes that know nothing of one another.

Which jobs are a process's own follows from their keys alone, so that it stays when a manifest grows, and all
of them may be started from the same command line. What number a process has is read from what launchers set.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass

from vidkv.errors import InputError

MAX_COUNT = 1_000_000
_REMEDY = "give --shard INDEX/COUNT, such as 0/8"


@dataclass(frozen=True)
class Shard:
    """One of `count` parts of all jobs.

    Attributes:
        index: from 0 to `count` - 1.
    """

    index: int
    count: int

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count <= MAX_COUNT:
            raise InputError(
                f"shard={self.index}/{self.count}: numbers count from 0, so that of {self.count} shards the "
                f"first is 0/{self.count} and the last {self.count - 1}/{self.count}"
                if 0 < self.count <= MAX_COUNT
                else f"shard={self.index}/{self.count}: there may be 1 to {MAX_COUNT} shards"
            )

    @classmethod
    def parse(cls, text: str) -> Shard:
        """`2/8` is the third of eight.

        Raises:
            InputError: it is not INDEX/COUNT, or there is no such shard.
        """
        match = re.fullmatch(r"\s*([0-9]{1,9})/([0-9]{1,9})\s*", text)
        if match is None:
            raise InputError(f"shard={text!r:.60} is not INDEX/COUNT; the eight of eight are 0/8 to 7/8")
        return cls(int(match[1]), int(match[2]))

    @classmethod
    def choose(cls, text: str, env: Mapping[str, str]) -> Shard:
        """What `--shard` says: `2/8`, `auto`, or `auto/8` where the launcher does not say how many.

        Raises:
            InputError: it is none of these, or the environment does not say which.
        """
        name, slash, count = text.strip().partition("/")
        if name != "auto":
            return cls.parse(text)
        if slash and not re.fullmatch("[0-9]{1,9}", count):
            raise InputError(f"shard={text!r:.60}: after auto/ give how many there are, such as auto/8")
        found = cls.of_environment(env, int(count) if slash else None)
        if found is None:
            raise InputError(
                f"shard={text!r:.60}: nothing here says which one this is; RANK and WORLD_SIZE, "
                "SLURM_ARRAY_TASK_ID, SLURM_PROCID and JOB_COMPLETION_INDEX are not set; " + _REMEDY
            )
        return found

    @classmethod
    def of_environment(cls, env: Mapping[str, str], count: int | None = None) -> Shard | None:
        """Which shard a launcher has made this process; None if none did.

        The first that is set counts: RANK (torchrun, accelerate), SLURM's job array, its tasks, the index
        of a Kubernetes Job.

        Args:
            count: how many there are; Kubernetes does not say.

        Raises:
            InputError: a variable is not a number, or they contradict one another.
        """
        found = _torchrun(env) or _slurm(env) or _kubernetes(env, count)
        if found is not None and count not in (None, found.count):
            raise InputError(
                f"shard=auto/{count}, but the launcher has started {found.count}; leave the number out"
            )
        return found

    @property
    def name(self) -> str:
        """Of its index file, see `JobStore`."""
        return f"shard-{self.index}-of-{self.count}"

    def takes(self, key: str) -> bool:
        """Whether the job of this key is its own; it is exactly one shard's of any count."""
        digest = hashlib.sha256(key.encode()).digest()
        return int.from_bytes(digest[:8], "big") % self.count == self.index


def local_device(env: Mapping[str, str], gpus: int) -> int | None:
    """The GPU that this process is to take where a launcher started several on the host.

    Args:
        gpus: how many this process sees.

    Returns:
        Its number among those; None: all that it sees are its own.

    Raises:
        InputError: there are more processes than GPUs.
    """
    if "LOCAL_RANK" in env:
        name = "LOCAL_RANK"
        processes = _number(env, "LOCAL_WORLD_SIZE") if "LOCAL_WORLD_SIZE" in env else None
    elif "SLURM_LOCALID" in env and "SLURM_STEP_ID" in env:
        name, processes = "SLURM_LOCALID", _slurm_neighbours(env)
        if gpus == 1 or "SLURM_GPUS_PER_TASK" in env:
            # every task was given its own
            return None
    else:
        return None
    local = _number(env, name)
    if not gpus or processes == 1:
        return None
    needed = max(local + 1, processes or 0)
    if needed > gpus:
        raise InputError(
            f"{name}={local}: {needed} processes share this host and torch sees {gpus} GPUs; start at most "
            "one for each GPU"
        )
    return local


def _torchrun(env: Mapping[str, str]) -> Shard | None:
    if "RANK" not in env and "WORLD_SIZE" not in env:
        return None
    return _pair(env, "RANK", "WORLD_SIZE")


def _slurm(env: Mapping[str, str]) -> Shard | None:
    """A job array, its tasks, or both: then tasks number within the element."""
    array, tasks = _slurm_array(env), _slurm_tasks(env)
    if array is None or tasks is None:
        return array or tasks
    return Shard(array.index * tasks.count + tasks.index, array.count * tasks.count)


def _slurm_array(env: Mapping[str, str]) -> Shard | None:
    if "SLURM_ARRAY_TASK_ID" not in env:
        return None
    index, first, count = (
        _number(env, f"SLURM_ARRAY_TASK_{name}") for name in ("ID", "MIN", "COUNT")
    )  # fmt: skip
    step = _number(env, "SLURM_ARRAY_TASK_STEP") if "SLURM_ARRAY_TASK_STEP" in env else 1
    last = _number(env, "SLURM_ARRAY_TASK_MAX") if "SLURM_ARRAY_TASK_MAX" in env else None
    even = step > 0 and (index - first) % step == 0 and 0 <= (index - first) // step < count
    if not even or last not in (None, first + (count - 1) * step):
        to = "" if last is None else f" to {last}"
        raise InputError(
            f"SLURM_ARRAY_TASK_ID={index} is not one of {count} even steps from {first}{to}; submit with "
            f"--array=0-{max(count, 1) - 1}, or {_REMEDY}"
        )
    return Shard((index - first) // step, count)


def _slurm_tasks(env: Mapping[str, str]) -> Shard | None:
    if "SLURM_PROCID" not in env:
        return None
    shard = _pair(env, "SLURM_PROCID", "SLURM_NTASKS")
    if shard.count > 1 and "SLURM_STEP_ID" not in env:
        # a batch script is one process however many tasks were asked for
        raise InputError(
            f"SLURM_NTASKS={shard.count}, but this is the batch script itself and not one of its tasks; "
            f"start it with srun, or {_REMEDY}"
        )
    return shard


def _slurm_neighbours(env: Mapping[str, str]) -> int | None:
    """Tasks of this step on this host, of `2(x3),1`: two on each of three hosts, one on the fourth."""
    counts: list[int] = []
    for part in env.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):
        match = re.fullmatch(r"([0-9]{1,6})(?:\(x([0-9]{1,6})\))?", part)
        if match is None:
            return None
        counts += [int(match[1])] * int(match[2] or 1)
    host = _number(env, "SLURM_NODEID") if "SLURM_NODEID" in env else 0
    return counts[host] if host < len(counts) else None


def _kubernetes(env: Mapping[str, str], count: int | None) -> Shard | None:
    if "JOB_COMPLETION_INDEX" not in env:
        return None
    index = _number(env, "JOB_COMPLETION_INDEX")
    if count is None:
        raise InputError(
            f"JOB_COMPLETION_INDEX={index}, and Kubernetes does not say of how many; give --shard auto/COUNT "
            "with the Job's .spec.completions"
        )
    if index >= count:
        raise InputError(
            f"JOB_COMPLETION_INDEX={index}, but --shard auto/{count} ends at {count - 1}; give the Job's "
            ".spec.completions"
        )
    return Shard(index, count)


def _pair(env: Mapping[str, str], index: str, count: str) -> Shard:
    for name, other in ((index, count), (count, index)):
        if name not in env:
            raise InputError(f"{other}={env[other]!r:.40} is set and {name} is not; set both, or {_REMEDY}")
    if not _number(env, index) < _number(env, count) <= MAX_COUNT:
        raise InputError(
            f"{index}={env[index]} does not number one of {count}={env[count]}, which are 0 to "
            f"{count} - 1; set them right, or {_REMEDY}"
        )
    return Shard(_number(env, index), _number(env, count))


def _number(env: Mapping[str, str], name: str) -> int:
    value = env.get(name, "")
    if not re.fullmatch("[0-9]{1,9}", value):
        said = f"{name}={value!r:.40} is not a number" if name in env else f"{name} is not set"
        raise InputError(f"{said}; set it right, or {_REMEDY}")
    return int(value)
