"""Fixed slots of preallocated memory with reference counts; rollouts may share one pool."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vidkv.cache.formats.base import PageFormat, Storage
from vidkv.errors import CacheStateError


@dataclass(frozen=True)
class Target:
    """Acquired slots that pages are about to be written to.

    Attributes:
        slots: (pages,) int64 on the device.
    """

    slots: Tensor


class PagePool:
    """Slots that each hold one latent frame of every layer in one format.

    A slot is free, or held by one or more page tables. Its bytes change only between being acquired and
    being filled, never while shared.

    Args:
        format: how pages are laid down.
        slots: slots to start with; `reserve` adds more.
    """

    def __init__(self, format: PageFormat, slots: int, device: torch.device | str) -> None:
        self.format, self.device = format, torch.device(device)
        self.storage = format.allocate(slots, device)
        self.references = [0] * slots
        self.reserved = slots

    @property
    def slots(self) -> int:
        return len(self.references)

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers, each storage counted once."""
        storages = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in self.storage.values()
        }
        return sum(storages.values()) if self.slots else 0

    def acquire(self) -> int:
        """A free slot, now held once."""
        try:
            slot = self.references.index(0)
        except ValueError:
            raise CacheStateError(f"all {self.slots} slots of the page pool are held") from None
        self.references[slot] = 1
        return slot

    def retain(self, slot: int) -> None:
        """One more holder of a slot."""
        if self.references[slot] < 1:
            raise CacheStateError(f"slot {slot} is free; only a held slot can be shared")
        self.references[slot] += 1

    def release(self, slot: int) -> None:
        """One holder fewer; a slot without holders is free."""
        if self.references[slot] < 1:
            raise CacheStateError(f"slot {slot} is released more often than it was held")
        self.references[slot] -= 1

    def reserve(self, slots: int) -> None:
        """Promise room for `slots` more; grows the buffers (one copy) when the promises exceed them."""
        self.reserved += slots
        # a dropped cache may cancel its promise at any allocation
        wanted = self.reserved
        if wanted <= self.slots:
            return
        grown = self.format.allocate(wanted, self.device)
        for name, buffer in self.storage.items():
            grown[name][:, : self.slots] = buffer
        self.references += [0] * (wanted - self.slots)
        self.storage = grown

    def cancel(self, slots: int) -> None:
        """Take back a promise; the memory stays for the next one."""
        self.reserved -= slots

    @property
    def placed(self) -> int:
        """Slots whose pages lie in `storage`."""
        return self.slots

    def target(self, slots: Sequence[int]) -> Target:
        """Where pages of these acquired slots are to be written."""
        return Target(torch.tensor(slots, device=self.device))

    def write(
        self, layer: int, target: Target, k: Tensor, v: Tensor, spatial: Tensor | None, mean: Tensor | None
    ) -> None:
        """Encode one layer of pages, see `PageFormat.write`."""
        self.format.write(self.storage, layer, target.slots, k, v, spatial, mean)

    def stored(self, layer: int, waiting: tuple[int, ...]) -> tuple[Storage, int]:
        """The buffers that hold one layer of a run's pages, and the layer's place in them.

        Args:
            waiting: of the run, see `kv_cache.Run`.
        """
        return self.storage, layer

    def gather(self, slots: Sequence[int]) -> dict[str, Tensor]:
        """Buffers (layers, pages, …) of held slots on the CPU."""
        return {name: buffer[:, list(slots)].cpu().contiguous() for name, buffer in self.storage.items()}

    def load(self, slot: int, pages: dict[str, Tensor]) -> None:
        """Fill an acquired slot with saved buffers (layers, …), byte for byte."""
        for name, page in pages.items():
            self.storage[name][:, slot] = page.to(self.device)
