"""Memory that this machine, or a card of it, has left."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch

USABLE = 0.95
"""Part of a card that plans may fill; the rest is for the GPU's context, workspaces and fragments."""


def available_bytes(device: torch.device | str) -> int | None:
    """Memory that can be had without swapping; None where the system does not say.

    On a GPU what torch holds without using it counts as free; on the CPU the limits of the control group
    count, which a container may set far below the machine's memory.
    """
    kind = torch.device(device)
    if kind.type == "cuda":
        held = torch.cuda.memory_reserved(kind) - torch.cuda.memory_allocated(kind)
        return int(torch.cuda.mem_get_info(kind)[0]) + held
    groups = _group_room(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))
    found = [*_machine_room(Path("/proc/meminfo")), *groups]
    return max(0, min(found)) if found else None


def usable_bytes(device: torch.device | str) -> int | None:
    """What plans may fill of `available_bytes`: on a GPU `USABLE` of it, on the CPU all."""
    free = available_bytes(device)
    return int(free * USABLE) if free is not None and torch.device(device).type == "cuda" else free


def _machine_room(meminfo: Path) -> Iterator[int]:
    with contextlib.suppress(OSError):
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                yield int(line.split()[1]) * 1024


def _group_room(membership: Path, root: Path) -> Iterator[int]:
    """What each control group above this process has left, file caches that it would give up included.

    Version 2 has one tree, version 1 one of its own for memory.
    """
    files = {
        "": ("memory.max", "memory.current", "inactive_file"),
        "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    }
    try:
        lines = [line.split(":", 2) for line in membership.read_text().splitlines()]
    except OSError:
        return
    for _, controllers, path in (line for line in lines if len(line) == 3):
        kind = "memory" if "memory" in controllers.split(",") else controllers
        if kind not in files:
            continue
        limit_file, usage_file, cached = files[kind]
        top = root / kind
        # inside a container the path may be that of the host, which is not to be seen there
        group = (top / path.lstrip("/")).resolve()
        if not group.is_relative_to(top.resolve()) or not group.is_dir():
            group = top.resolve()
        for folder in (group, *group.parents):
            with contextlib.suppress(OSError, ValueError):
                # "max" is no number: no limit
                limit, used = (int((folder / name).read_text()) for name in (limit_file, usage_file))
                counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                yield limit - used + int(counts.get(cached, 0))
            if folder == top.resolve():
                break
