"""Pages in three tiers: the device, the host's memory and a disk, each within a budget of bytes.

Every page lies in the host's memory or in a file; the device holds copies of those that are read most. What
has no place on the device passes through two buffers of one layer's pages: while one is read, the other is
filled with what comes next. Bytes are the same wherever they lie, and so is what is computed from them.
"""

from __future__ import annotations

import glob
import math
import os
import shutil
import socket
import tempfile
import threading
import warnings
import weakref
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor

from vidkv.cache.evidence import evidence_bytes
from vidkv.cache.formats.base import PageFormat, Storage
from vidkv.cache.pool import PagePool, Target
from vidkv.cache.spec import CacheGeometry, CacheSpec
from vidkv.cache.tiers import planned_means, planned_pools
from vidkv.errors import CacheSpecError, CacheStateError, ResourceError

SCRATCH = "VIDKV_SCRATCH"
"""Environment variable: the folder for pages on disk; by default the system's for temporary files."""
PREFIX = "vidkv-pages-"
HEADER_BYTES = 4096
"""Of a file beside its page, at most."""
Key = tuple[int, tuple[int, ...]]
"""Layer, and the places on the host of pages that are read together."""


@dataclass(frozen=True)
class Places:
    """Latent frames that each tier has room for.

    Attributes:
        device, host: pages of all layers.
        files: pages on disk.
        staged: pages of one layer in each of the two buffers through which those without a place on the
            device pass; 0 where all that a chunk reads has one.
        page_bytes: of one latent frame over all layers.
    """

    device: int
    host: int
    files: int
    staged: int
    page_bytes: int

    @property
    def host_bytes(self) -> int:
        return self.host * self.page_bytes

    @property
    def disk_bytes(self) -> int:
        """At most."""
        return self.files * (self.page_bytes + HEADER_BYTES)


def planned_places(spec: CacheSpec, geometry: CacheGeometry, dtype: torch.dtype) -> Places | None:
    """Where the pages of a cache go; None where the device holds them all.

    Only pages of `CacheSpec.format` leave the device: those of `newer` formats, sinks kept in one of them,
    means and what a selection goes by stay there.

    Raises:
        CacheSpecError: a budget is too small; it names what is needed.
    """
    if not spec.device_gb:
        return None
    pools = planned_pools(spec, geometry, dtype)
    format, slots = pools["pages"]
    layer = format.bytes_per_page()
    page = layer * geometry.layers
    others = sum(
        f.bytes_per_page() * geometry.layers * n for name, (f, n) in pools.items() if name != "pages"
    )
    means = planned_means(spec, geometry, pools).values()
    others += sum(math.prod(shape) * kind.itemsize for shape, kind in means) + evidence_bytes(spec, geometry)
    device = _bytes(spec.device_gb)
    if device >= others + slots * page:
        return None
    added = min(geometry.chunk_frames, slots)
    read = min(slots, spec.attended - geometry.chunk_frames)
    staged = 0
    if device < others + read * page:
        staged = min(spec.segment, slots)
        others += 2 * staged * layer
    if device < others:
        raise CacheSpecError(
            f"device_gb={spec.device_gb:g} is too little for {spec.unbudgeted} of this size: it takes at "
            f"least {_gb(others)}"
        )
    host = min(slots, _bytes(spec.host_gb) // page) if spec.host_gb else slots
    files = 0
    if host < slots:
        files = slots - (host - added)
        _check_budgets(spec, slots * page, (read + added) * page, files * (page + HEADER_BYTES))
    return Places((device - others) // page, host, files, staged, page)


def _check_budgets(spec: CacheSpec, pages: int, least: int, files: int) -> None:
    """Refuse budgets of the host and the disk that are too small for each other.

    Args:
        pages: bytes of all pages; least: of what one chunk reads and adds, which is in the host's memory;
            files: of what lies on disk.
    """
    if not spec.disk_gb:
        raise CacheSpecError(
            f"host_gb={spec.host_gb:g} is too little for a window of {spec.window}: its pages take "
            f"{_gb(pages)}; allow so much, or let some of them lie on disk (disk_gb)"
        )
    if _bytes(spec.host_gb) < least:
        raise CacheSpecError(
            f"host_gb={spec.host_gb:g} is too little: what one chunk reads and adds takes {_gb(least)}; "
            f"allow so much, or let a chunk read less than select={spec.select}"
        )
    if _bytes(spec.disk_gb) < files:
        raise CacheSpecError(
            f"disk_gb={spec.disk_gb:g} is too little for a window of {spec.window}: what has no room in the "
            f"host's memory takes {_gb(files)}"
        )


def _bytes(gigabytes: float) -> int:
    return round(gigabytes * 1e9)


def _gb(count: int) -> str:
    """As a setting: rounded up, so that it is enough."""
    return f"{math.ceil(count / 1e3) / 1e6:.9g} GB"


@dataclass(frozen=True)
class _Scattered(Target):
    """Pages of which some have a place on the device.

    Attributes:
        here: which of the pages have one.
        index: (here,) int64, these places in the pool's storage; places: likewise.
        hosts: on the host, of all.
    """

    here: list[int]
    index: Tensor
    places: list[int]
    hosts: list[int]


class OffloadedPool(PagePool):
    """Slots whose pages lie in the host's memory or in a file, with copies of some on the device.

    `storage` holds the copies on the device. A page that is written goes to the host at once, on a stream of
    its own, and takes a place on the device as far as one is free. Before a chunk begins, `settle` brings
    what it reads from disk to the host and as much of it as there is room for onto the device, and lets what
    was not read for longest go to disk; `settle_ahead` does the same in the background.

    A disk that fails or is full costs pages and nothing else: `lost` has the slots that their owners have to
    let go of.

    Args:
        slots: to start with.
        places: room in each tier for so many slots.

    Attributes:
        bytes_moved: of pages that have come from the host to the device so far.
        disk_nbytes: of all pages in files.
    """

    def __init__(self, format: PageFormat, slots: int, places: Places, device: torch.device | str) -> None:
        super().__init__(format, places.device, device)
        self.references, self.reserved = [0] * slots, slots
        self.plan, self._planned_slots = places, slots
        self.on_device: dict[int, int] = {}
        self.on_host: dict[int, int] = {}
        self.files: dict[int, Path] = {}
        self.lost: set[int] = set()
        self._free_places = list(range(places.device))
        self._free_hosts = list(range(places.host))
        self._host = self._allocate_host(places.host)
        self._clock = 0
        self._used: dict[int, int] = {}
        self._reading: dict[object, set[int]] = {}
        self._stage = _Stage(self, places.staged) if places.staged else None
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        for storage in (self.storage, *(self._stage.buffers if self._stage else ())):
            self._copied_to(storage)
        self._worker: ThreadPoolExecutor | None = None
        self._ahead: Future[None] | None = None
        self._thread: int | None = None
        self._kept: torch.cuda.Event | None = None
        self._folder: Path | None = None
        self._fault: Exception | None = None
        self._warned = False
        self.bytes_moved = self.disk_nbytes = 0

    @property
    def nbytes(self) -> int:
        staged = self._stage.nbytes if self._stage else 0
        return sum(buffer.nbytes for buffer in self.storage.values()) + staged

    @property
    def host_nbytes(self) -> int:
        """Bytes allocated in the host's memory."""
        return sum(buffer.nbytes for buffer in self._host.values())

    @property
    def placed(self) -> int:
        return len(self.storage[next(iter(self.storage))][0]) if self.storage else 0

    def reserve(self, slots: int) -> None:
        self._wait()
        self._finish_copies()
        self.reserved += slots
        more = self.reserved - self.slots
        if more <= 0:
            return
        self.references += [0] * more
        before, host = self.placed, len(self._free_hosts) + len(self.on_host)
        places, hosts = (n * self.slots // self._planned_slots for n in (self.plan.device, self.plan.host))
        storage, kept = self.format.allocate(places, self.device), self._allocate_host(hosts)
        self._copied_to(storage)
        for name in storage:
            storage[name][:, :before] = self.storage[name]
            kept[name][:host] = self._host[name]
        self.storage, self._host = storage, kept
        self._free_places += range(before, places)
        self._free_hosts += range(host, hosts)

    def release(self, slot: int) -> None:
        self._wait()
        super().release(slot)
        if self.references[slot]:
            return
        if slot in self.on_device:
            self._free_places.append(self.on_device.pop(slot))
        if slot in self.on_host:
            self._free_hosts.append(self.on_host.pop(slot))
        self._drop_file(slot)
        self.lost.discard(slot)
        self._used.pop(slot, None)

    def tier(self, slot: int) -> str:
        """Where a held page lies, the fastest place first: `device`, `host` or `disk`."""
        self._wait()
        return "device" if slot in self.on_device else "host" if slot in self.on_host else "disk"

    def settle(self, owner: object, slots: Sequence[int], spare: int) -> None:
        """Bring what a chunk is about to read as near as there is room; `lost` may have grown then.

        Args:
            owner: whose chunk, until it calls again or `done`.
            slots: in the order in which they are read.
            spare: pages that the chunk will add.
        """
        self._wait()
        self._reading[owner] = set(slots)
        self._settle(slots, spare, self._computing())
        if self._stage is not None:
            self._stage.empty()
        if self._stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._stream)

    def settle_ahead(self, owner: object, slots: Sequence[int], spare: int) -> None:
        """Begin with it in the background; anything else that is asked of the pool waits for it."""
        self._wait()
        self._reading[owner] = set(slots)
        if self._worker is None:
            self._worker = ThreadPoolExecutor(1, "vidkv-pages")
        self._ahead = self._worker.submit(self._settle_behind, slots, spare, self._computing())

    def done(self, owner: object) -> None:
        """The owner's chunk reads no more."""
        self._wait()
        self._reading.pop(owner, None)

    def lost_slots(self) -> set[int]:
        """Slots whose pages are gone, until their owners release them; warns the first time."""
        self._wait()
        if self.lost and not self._warned:
            self._warned = True
            warnings.warn(
                f"pages of {len(self.lost)} latent frames could not be kept on disk and are evicted: "
                f"{self._fault}; make room there, or name another folder with {SCRATCH}",
                RuntimeWarning,
                stacklevel=3,
            )
        return self.lost

    def hold(self, owner: object, slot: int) -> None:
        """Keep a page on the host as if it were being read, until the owner's next chunk."""
        self._reading.setdefault(owner, set()).add(slot)

    def where(self, slot: int) -> tuple[int | None, int]:
        """A page's place on the device, if it has one, and on the host."""
        self._wait()
        return self.on_device.get(slot), self.on_host[slot]

    def expect(self, order: Sequence[tuple[int, ...]], again: bool) -> None:
        """Say in which order every layer reads what has no place on the device.

        Args:
            order: places on the host, run by run.
            again: the last layer is followed by the first.
        """
        if self._stage is not None:
            self._stage.expect(order, again)

    def target(self, slots: Sequence[int]) -> Target:
        self._wait()
        hosts, here, places = [], [], []
        # none of them makes room for another
        reading = self._read_now() | set(slots)
        for number, slot in enumerate(slots):
            hosts.append(self._host_place(slot, reading))
            place = self._device_place(slot, reading)
            if place is not None:
                here.append(number)
                places.append(place)
        every, index = (torch.tensor(x, dtype=torch.int64, device=self.device) for x in (slots, places))
        return _Scattered(every, here, index, places, hosts)

    def write(
        self, layer: int, target: Target, k: Tensor, v: Tensor, spatial: Tensor | None, mean: Tensor | None
    ) -> None:
        assert isinstance(target, _Scattered)
        if target.here:
            if self._kept is not None:
                # what the places held before is on its way to the host
                torch.cuda.current_stream(self.device).wait_event(self._kept)
            if len(target.here) < len(target.hosts):
                here_k, here_v = k[:, :, target.here], v[:, :, target.here]
            else:
                here_k, here_v = k, v
            self.format.write(self.storage, layer, target.index, here_k, here_v, spatial, mean)
            with self._copying():
                for number, place in zip(target.here, target.places, strict=True):
                    self._keep(self.storage, layer, place, target.hosts[number], layer)
                self._kept = None if self._stream is None else self._stream.record_event()
        for number in sorted({*range(len(target.hosts))} - {*target.here}):
            passing = _one_layer(self.format, 1, self.device)
            zero = torch.zeros(1, dtype=torch.int64, device=self.device)
            only = slice(number, number + 1)
            self.format.write(passing, 0, zero, k[:, :, only], v[:, :, only], spatial, mean)
            with self._copying():
                self._keep(passing, 0, 0, target.hosts[number], layer)
                if self._stream is not None:
                    for buffer in passing.values():
                        buffer.record_stream(self._stream)

    def stored(self, layer: int, waiting: tuple[int, ...]) -> tuple[Storage, int]:
        if not waiting:
            return self.storage, layer
        assert self._stage is not None
        return self._stage.take((layer, waiting)), 0

    def gather(self, slots: Sequence[int]) -> dict[str, Tensor]:
        self._wait()
        self._finish_copies()
        pages = [self._page(slot) for slot in slots]
        layers = self.format.geometry.layers
        return {
            name: torch.stack([page[name] for page in pages], 1)
            if pages
            else torch.empty((layers, 0, *shape), dtype=dtype)
            for name, (shape, dtype) in self.format.buffers().items()
        }

    def _page(self, slot: int) -> dict[str, Tensor]:
        """(layers, …) by buffer."""
        if slot in self.on_host:
            return {name: buffer[self.on_host[slot]] for name, buffer in self._host.items()}
        try:
            return _read(self.files[slot])
        except (OSError, SafetensorError) as error:
            self._lose(slot, error)
            raise CacheStateError(
                f"a page cannot be read back from {self.files[slot]}: {error}; the rollout goes on without it"
            ) from None

    def load(self, slot: int, pages: dict[str, Tensor]) -> None:
        self._wait()
        self._finish_copies()
        place = self._host_place(slot, self._read_now())
        for name, page in pages.items():
            self._host[name][place] = page

    def _settle_behind(self, slots: Sequence[int], spare: int, computing: torch.cuda.Event | None) -> None:
        self._thread = threading.get_ident()
        self._settle(slots, spare, computing)

    def _settle(self, slots: Sequence[int], spare: int, computing: torch.cuda.Event | None) -> None:
        """In the background too; `computing` has to be over before anything on the device is overwritten."""
        self._clock += 1
        reading = self._read_now()
        for slot in slots:
            self._used[slot] = self._clock
            if slot not in self.on_host and slot not in self.lost:
                self._fetch(slot, reading)
        # without a disk every slot has a place on the host
        while self.plan.files and len(self._free_hosts) < spare and self._make_room(reading):
            pass
        with self._copying(computing):
            for slot in slots:
                if slot in self.on_device or slot in self.lost:
                    continue
                place = self._device_place(slot, reading)
                if place is None:
                    break
                self._promote(self.on_host[slot], place)

    def _fetch(self, slot: int, reading: Collection[int]) -> None:
        """From disk to the host."""
        try:
            pages = _read(self.files[slot])
        except (OSError, SafetensorError) as error:
            self._lose(slot, error)
            return
        place = self._host_place(slot, reading)
        # another page may still be on its way there, or from there
        self._finish_copies()
        for name, page in pages.items():
            self._host[name][place] = page

    def _host_place(self, slot: int, reading: Collection[int]) -> int:
        """A place on the host for a slot that has none."""
        if not self._free_hosts and not self._make_room(reading):
            raise CacheStateError(f"all {len(self.on_host)} places on the host are being read")
        self.on_host[slot] = self._free_hosts.pop()
        self._used.setdefault(slot, self._clock)
        return self.on_host[slot]

    def _make_room(self, reading: Collection[int]) -> bool:
        """Let the page that was not read for longest go to disk; False if all are being read."""
        others = [slot for slot in self.on_host if slot not in reading]
        if not others:
            return False
        oldest = min(others, key=lambda slot: (self._used[slot], slot))
        if oldest not in self.files:
            self._save(oldest)
        self._free_hosts.append(self.on_host.pop(oldest))
        return True

    def _save(self, slot: int) -> None:
        """Write a page to disk; one that cannot be is lost, because its place is needed."""
        self._finish_copies()
        while len(self.files) >= self.plan.files * self.slots // self._planned_slots:
            # a page on the host needs no file
            spare = next((other for other in self.files if other in self.on_host), None)
            if spare is None:
                break
            self._drop_file(spare)
        place = self.on_host[slot]
        try:
            self.files[slot] = _write(
                self._scratch() / f"{slot}-{self._clock}",
                {name: buffer[place] for name, buffer in self._host.items()},
            )
        except (OSError, SafetensorError) as error:
            self._lose(slot, error)
        else:
            self.disk_nbytes += self.plan.page_bytes

    def _drop_file(self, slot: int) -> None:
        if slot in self.files:
            self.disk_nbytes -= self.plan.page_bytes
            # what a failing disk keeps, it keeps
            with suppress(OSError):
                self.files.pop(slot).unlink()

    def _lose(self, slot: int, error: Exception) -> None:
        self.lost.add(slot)
        self._fault = error

    def _device_place(self, slot: int, reading: Collection[int]) -> int | None:
        """A place on the device for a slot that has none, if one is free or holds what nobody reads now."""
        if not self._free_places:
            others = [other for other in self.on_device if other not in reading]
            if not others:
                return None
            oldest = min(others, key=lambda other: (self._used[other], other))
            self._free_places.append(self.on_device.pop(oldest))
        self.on_device[slot] = self._free_places.pop()
        return self.on_device[slot]

    def _promote(self, host: int, place: int) -> None:
        for name, buffer in self.storage.items():
            # one layer at a time is contiguous on both sides
            for layer in range(len(buffer)):
                buffer[layer, place].copy_(self._host[name][host, layer], non_blocking=True)
        self.bytes_moved += self.plan.page_bytes

    def _keep(self, storage: Storage, layer: int, place: int, host: int, host_layer: int) -> None:
        """Copy one layer of a page to the host."""
        for name, buffer in storage.items():
            self._host[name][host, host_layer].copy_(buffer[layer, place], non_blocking=True)

    def fill(self, storage: Storage, key: Key) -> None:
        """Copy one layer of pages from the host into the front of a buffer."""
        layer, hosts = key
        for name, buffer in storage.items():
            for number, host in enumerate(hosts):
                buffer[0, number].copy_(self._host[name][host, layer], non_blocking=True)
                self.bytes_moved += buffer[0, number].nbytes

    @contextmanager
    def copying(self) -> Iterator[torch.cuda.Stream | None]:
        """On the stream of copies, behind all that the device has been given so far."""
        with self._copying():
            yield self._stream

    @contextmanager
    def _copying(self, after: torch.cuda.Event | None = None) -> Iterator[None]:
        if self._stream is None:
            yield
            return
        self._stream.wait_event(after or torch.cuda.current_stream(self.device).record_event())
        with torch.cuda.stream(self._stream):
            yield

    def _computing(self) -> torch.cuda.Event | None:
        return None if self._stream is None else torch.cuda.current_stream(self.device).record_event()

    def _finish_copies(self) -> None:
        """Until what was written lies on the host."""
        if self._stream is not None:
            self._stream.synchronize()

    def _read_now(self) -> set[int]:
        return set[int]().union(*self._reading.values())

    def _wait(self) -> None:
        """Until nothing goes on in the background."""
        # the background may be where a dropped cache is collected: it does not wait for itself
        if self._ahead is not None and threading.get_ident() != self._thread:
            ahead, self._ahead = self._ahead, None
            ahead.result()

    def _copied_to(self, storage: Storage) -> None:
        """What is dropped is not given to others before copies to it are done."""
        if self._stream is not None:
            for buffer in storage.values():
                buffer.record_stream(self._stream)

    def _allocate_host(self, places: int) -> Storage:
        pinned = self.device.type == "cuda"
        layers = self.format.geometry.layers
        try:
            return {
                name: torch.empty((places, layers, *shape), dtype=dtype, pin_memory=pinned)
                for name, (shape, dtype) in self.format.buffers().items()
            }
        except RuntimeError as error:
            size = places * layers * self.format.bytes_per_page()
            raise ResourceError(
                f"the host has no {_gb(size)} for pages ({error}); choose a smaller window or host_gb"
            ) from None

    def _scratch(self) -> Path:
        """The folder for files, made when the first one is; those of processes that were killed go then."""
        if self._folder is None:
            where = Path(os.environ.get(SCRATCH) or tempfile.gettempdir())
            # processes of other machines and containers cannot be seen from here
            here = f"{PREFIX}{socket.gethostname()}-"
            for folder in where.glob(f"{glob.escape(here)}*"):
                owner = folder.name.removeprefix(here).partition("-")[0]
                with suppress(OSError, OverflowError, ValueError):
                    if folder.stat().st_uid == os.getuid() and not psutil.pid_exists(int(owner)):
                        shutil.rmtree(folder, ignore_errors=True)
            self._folder = Path(tempfile.mkdtemp(prefix=f"{here}{os.getpid()}-", dir=where))
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        return self._folder


class _Stage:
    """Two buffers of one layer's pages: one is read while the other is filled.

    Args:
        pages: that each of them holds.
    """

    def __init__(self, pool: OffloadedPool, pages: int) -> None:
        # the pool holds its stage; the other way round neither would go before a collection
        self.pool = weakref.proxy(pool)
        self.buffers = [_one_layer(pool.format, pages, pool.device) for _ in range(2)]
        self.holds: list[Key | None] = [None, None]
        self.filled: list[torch.cuda.Event | None] = [None, None]
        self.turn = 0
        self.order: list[tuple[int, ...]] = []
        self.again = False

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for buffer in self.buffers for tensor in buffer.values())

    def expect(self, order: Sequence[tuple[int, ...]], again: bool) -> None:
        self.order, self.again = list(order), again

    def empty(self) -> None:
        """Pages may have changed since."""
        self.holds = [None, None]

    def take(self, key: Key) -> Storage:
        """The buffer with these pages, to be read before the next but one is taken."""
        if self.holds[self.turn] != key:
            self.turn = 1 - self.turn
            if self.holds[self.turn] != key:
                self._fill(self.turn, key)
            filled = self.filled[self.turn]
            if filled is not None:
                torch.cuda.current_stream(self.pool.device).wait_event(filled)
            following = self._after(key)
            if following is not None and following != key:
                self._fill(1 - self.turn, following)
        return self.buffers[self.turn]

    def _after(self, key: Key) -> Key | None:
        layer, hosts = key
        if hosts not in self.order:
            return None
        place = self.order.index(hosts) + 1
        if place < len(self.order):
            return layer, self.order[place]
        if layer + 1 < self.pool.format.geometry.layers:
            return layer + 1, self.order[0]
        return (0, self.order[0]) if self.again else None

    def _fill(self, turn: int, key: Key) -> None:
        with self.pool.copying() as stream:
            self.pool.fill(self.buffers[turn], key)
            self.filled[turn] = None if stream is None else stream.record_event()
        self.holds[turn] = key


def _one_layer(format: PageFormat, pages: int, device: torch.device) -> Storage:
    return {
        name: torch.empty((1, pages, *shape), dtype=dtype, device=device)
        for name, (shape, dtype) in format.buffers().items()
    }


def _write(file: Path, pages: dict[str, Tensor]) -> Path:
    """Put a page on disk, whole or not at all."""
    temporary = file.with_suffix(".tmp")
    try:
        save_file(pages, temporary)
        return temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def _read(file: Path) -> dict[str, Tensor]:
    # not mapped: where a disk fails, touching a mapped file ends the process
    return load(file.read_bytes())
