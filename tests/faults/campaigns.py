"""All campaigns of faults: how many injections a change must pass, and how many a release."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.faults.oracle import Counts


@dataclass(frozen=True)
class Campaign:
    """Faults of one kind.

    Attributes:
        title: what is done, for tables.
        place: module and function `campaign(count, seed, folder) -> Counts`.
        check: injections of `make faults`.
        target: injections of `make soak`.
        batch: injections of one process there.
        apps: needs what stands above the engine: typer, fastapi.
    """

    title: str
    place: str
    check: int
    target: int
    batch: int
    apps: bool = False

    def run(self, count: int, seed: int, folder: Path) -> Counts:
        """So many injections; what they are follows from the seed, timing aside.

        Args:
            folder: for files; what is shared between batches lies there too.
        """
        module, _, name = self.place.partition(":")
        function: Callable[[int, int, Path], Counts] = getattr(
            importlib.import_module(f"tests.faults.{module}"), name
        )
        folder.mkdir(parents=True, exist_ok=True)
        return function(count, seed, folder)


CAMPAIGNS: dict[str, Campaign] = {
    "kill_workers": Campaign("`kill -9` of a worker", "kills:kill_workers", 10, 1000, 25),
    "kill_supervisor": Campaign("`kill -9` of the supervisor", "kills:kill_supervisor", 5, 100, 10),
    "terminate": Campaign("SIGTERM and Ctrl-C to `vidkv render`", "kills:terminate", 6, 30, 6, apps=True),
    "cancel": Campaign("cancel", "cancels:cancel", 20, 200, 40),
    "disk_full": Campaign("disk full", "disks:disk_full", 8, 40, 10),
    "bad_folder": Campaign("output folder read-only, removed, slow", "disks:bad_folder", 3, 6, 3),
    "nan": Campaign("NaN or Inf in layers, scales, decoder", "numbers:nan", 6, 60, 15),
    "interleaved": Campaign("rollouts interleaved by chunks", "numbers:interleaved", 4, 8, 8),
    "corruption": Campaign("flipped bits, cut files", "damage:corruption", 8, 100, 25),
    "index": Campaign("index lost or damaged, clock jumps, second supervisor", "damage:index", 8, 40, 8),
    "checkpoints": Campaign("malicious checkpoints", "hostile:checkpoints", 30, 30, 30, apps=True),
    "media": Campaign("corrupt media", "hostile:media", 40, 300, 60),
    "manifests": Campaign("fuzzed manifests", "hostile:manifests", 100, 50_000, 5_000),
    "requests": Campaign("fuzzed requests", "hostile:requests", 100, 50_000, 5_000, apps=True),
    "payloads": Campaign("traversal and SSRF payloads", "hostile:payloads", 160, 160, 160, apps=True),
    "overload": Campaign(
        "concurrent POSTs against a cap of 32", "hostile:overload", 500, 500, 500, apps=True
    ),
}
