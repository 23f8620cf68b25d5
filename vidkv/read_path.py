"""How pages are read: the choices there are, and their name in a saved rollout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from vidkv.errors import StateError
from vidkv.kernels.paged_attention import Tile

NAMES = ("reference", "two-pass", "fused")


@dataclass(frozen=True)
class ReadPath:
    """A read path with everything that its sums, bit for bit, depend on.

    Attributes:
        name: of `NAMES`.
        backend: of a two-pass read, see `kernels.attention.sdpa_backends`.
        tile: of a fused read.
    """

    name: str
    backend: str = ""
    tile: Tile | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def of(cls, saved: Mapping[str, Any]) -> ReadPath:
        """What `as_dict` gave.

        Raises:
            StateError: it gave something else.
        """
        try:
            tile = saved["tile"]
            path = cls(saved["name"], saved["backend"], None if tile is None else Tile(**tile))
        except (KeyError, TypeError):
            raise StateError(f"the saved read path is {saved!r:.100}; the state is damaged") from None
        sizes = [] if path.tile is None else asdict(path.tile).values()
        whole = isinstance(path.backend, str) and all(type(size) is int for size in sizes)
        if not whole or path.name not in NAMES or (path.name == "fused") is not (path.tile is not None):
            raise StateError(f"the saved read path is {saved!r:.100}; this vidkv knows {', '.join(NAMES)}")
        return path

    def __str__(self) -> str:
        if self.tile is not None:
            t = self.tile
            if t.hopper_splits:
                return f"{self.name} hopper, {t.hopper_splits} splits"
            return f"{self.name} {t.queries}x{t.keys}, {t.warps} warps, {t.stages} stages"
        return f"{self.name} {self.backend}".rstrip()


TWO_PASS = ReadPath("two-pass", "auto")
REFERENCE = ReadPath("reference")
