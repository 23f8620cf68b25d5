"""Pages that lie on the device, on the host or on disk: the same cache, wherever they are."""

from __future__ import annotations

import gc
import os
import socket
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.cache.oracle import Oracle, page_hash, step
from tests.cache.test_kv_cache import settings_of_a_cache
from tests.tiny import build_geometry
from vidkv.cache import CacheGeometry, CacheSpec, KVCache, offload, planned_bytes
from vidkv.cache.offload import HEADER_BYTES, OffloadedPool, planned_places
from vidkv.cache.tiers import planned_pools
from vidkv.errors import CacheSpecError, CacheStateError, StateError

TINY = build_geometry(kv_heads=1, head_dim=6, height=1, width=2)


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(offload.SCRATCH, str(tmp_path))
    return tmp_path


def budgeted(
    spec: CacheSpec, geometry: CacheGeometry, device: int, host: int | None = None, staged: bool = True
) -> CacheSpec:
    """Room for so many frames on the device, beside what has to be there, and on the host."""
    format, slots = planned_pools(spec, geometry, torch.float32)["pages"]
    layer = format.bytes_per_page()
    page = layer * geometry.layers
    others = planned_bytes(spec, geometry, torch.float32) - slots * page
    others += 2 * min(spec.segment, slots) * layer if staged else 0
    budgets = {"device_gb": (others + device * page) / 1e9}
    if host is not None and host < slots:
        files = slots - host + min(slots, geometry.chunk_frames)
        budgets |= {"host_gb": host * page / 1e9, "disk_gb": files * (page + HEADER_BYTES) / 1e9}
    return CacheSpec.of(spec.model_dump() | budgets)


def pool_of(cache: KVCache) -> OffloadedPool:
    assert cache.offloaded is not None
    return cache.offloaded


def made(spec: str, device: int, host: int | None = None, staged: bool = True, **kwargs: Any) -> KVCache:
    return KVCache(budgeted(CacheSpec.parse(spec), TINY, device, host, staged), TINY, **kwargs)


def rolled(cache: KVCache, chunks: int, oracle: Oracle | None = None, start: int = 0) -> Oracle:
    oracle = oracle or Oracle(cache.spec, cache.geometry)
    for i in range(start, start + chunks):
        step(cache, oracle, cache.geometry.chunk_frames, 10 * i)
    return oracle


class TestAgainstTheOracle:
    @given(settings_of_a_cache(), st.data())
    @settings(max_examples=100)
    def test_rollouts(self, config: tuple[CacheSpec, CacheGeometry], data: st.DataObject) -> None:
        """Every read gives what was written, within the budgets, whatever they are."""
        spec, geometry = config
        slots = planned_pools(spec, geometry, torch.float32)["pages"][1]
        read = min(slots, spec.attended - geometry.chunk_frames)
        device = data.draw(st.integers(0, max(0, slots - 1)))
        host = None
        if spec.select and read + geometry.chunk_frames < slots and data.draw(st.booleans()):
            host = data.draw(st.integers(read + geometry.chunk_frames, slots - 1))
        spec = budgeted(spec, geometry, device, host, staged=device < read)
        places = planned_places(spec, geometry, torch.float32)
        cache = KVCache(spec, geometry)
        oracle, hashes = Oracle(spec, geometry), dict[tuple[int, str], str]()
        for i in range(data.draw(st.sampled_from([1, 5, 12, 25]))):
            step(cache, oracle, data.draw(st.integers(1, geometry.chunk_frames)), 10 * i)
            for frame, page in cache.table.items():
                known = hashes.setdefault((frame, page.pool), page_hash(cache, frame))
                assert known == page_hash(cache, frame)
            assert cache.nbytes == planned_bytes(spec, geometry, torch.float32) <= round(spec.device_gb * 1e9)
            if places is not None:
                assert cache.host_nbytes == places.host_bytes
                assert cache.disk_nbytes <= places.disk_bytes <= round(spec.disk_gb * 1e9)
                pool = pool_of(cache)
                assert len(pool.on_device) <= places.device and len(pool.on_host) <= places.host
        whole = planned_bytes(spec.unbudgeted, geometry, torch.float32)
        assert (cache.offloaded is not None) is (0 < round(spec.device_gb * 1e9) < whole)

    def test_pages_in_every_tier(self, scratch: Path) -> None:
        cache = made("int8,window=30,sink=2,select=9", device=6, host=10, staged=False)
        rolled(cache, 14)
        tiers = [cache.tier_of(frame) for frame in cache.layout.resident]
        assert {"device", "host", "disk"} == set(tiers)
        assert tiers.count("device") == 6
        files = list(scratch.glob("vidkv-pages-*/*"))
        assert len(files) == len(pool_of(cache).files) >= tiers.count("disk") > 0
        cache.close()
        assert not list(scratch.glob("vidkv-pages-*/*"))

    @pytest.mark.parametrize(("device", "segment"), [(0, 4), (1, 1), (5, 4)])
    def test_all_that_is_read_passes_through(self, device: int, segment: int) -> None:
        """A history of many times the budget, read as a whole in every pass."""
        cache = made(f"int8,window=30,sink=3,segment={segment}", device)
        oracle = rolled(cache, 14)
        whole = KVCache(cache.spec.unbudgeted, TINY)
        assert whole.nbytes > 2 * cache.nbytes
        before = cache.bytes_moved
        step(cache, oracle, 3, 999)
        # once while denoising, once in the clean pass
        page = pool_of(cache).plan.page_bytes
        assert cache.bytes_moved - before >= 2 * (27 - device - 3) * page

    def test_a_buffer_does_not_outlive_the_pages_in_it(self) -> None:
        """Other pages have their places by the next chunk, which may begin with the same ones."""
        geometry = build_geometry(kv_heads=1, head_dim=6, height=1, width=2, layers=1)
        spec = CacheSpec.parse("int8,window=12,sink=2,segment=1")
        rolled(KVCache(budgeted(spec, geometry, 6), geometry), 10)

    def test_what_has_a_place_is_not_copied_again(self) -> None:
        cache = made("int8,window=30,sink=2,select=9", device=8, staged=False)
        oracle = rolled(cache, 14)
        for i in range(3):
            pool_of(cache)._wait()
            before, near = cache.bytes_moved, set(pool_of(cache).on_device)
            wanted = set(cache._wanted(cache._relevance()))
            cache.begin(3)
            assert cache.bytes_moved - before <= len(wanted - near) * pool_of(cache).plan.page_bytes
            cache.abandon()
            step(cache, oracle, 3, 500 + i)

    def test_a_page_on_its_way_is_not_taken_for_another(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A wrong page in the buffer shows: the reads are not blind to what they are given."""
        cache = made("int8,window=20,sink=3,segment=2", device=0)
        oracle = rolled(cache, 8)
        pool = pool_of(cache)
        fill = pool.fill

        def wrong(storage: dict[str, Tensor], key: tuple[int, tuple[int, ...]]) -> None:
            fill(storage, (key[0], tuple(reversed(key[1]))))

        monkeypatch.setattr(pool, "fill", wrong)
        with pytest.raises(AssertionError):
            step(cache, oracle, 3, 999)


class TestSharing:
    def test_forks(self) -> None:
        first = made("int8,window=30,sink=2,select=9", device=6, host=12, staged=False)
        oracle = rolled(first, 12)
        second, other = first.fork(), oracle.fork()
        for i in range(8):
            step(first, oracle, 3, 1000 + i)
            step(second, other, 3, 2000 + i)
        second.close()
        rolled(first, 5, oracle, 300)

    @pytest.mark.parametrize("other", ["same", "on the device", "fewer places"])
    def test_saved_and_restored(self, other: str) -> None:
        """Budgets are not part of what is saved: it goes on wherever there is room."""
        cache = made("int8,window=30,sink=2,select=9", device=6, host=12, staged=False)
        oracle = rolled(cache, 12)
        tensors, header = cache.state_tensors()
        whole = KVCache(cache.spec.unbudgeted, TINY)
        assert "device_gb" not in header["spec"] or not header["spec"]["device_gb"]
        if other == "same":
            again = KVCache(cache.spec, TINY)
        elif other == "on the device":
            again = whole
        else:
            again = made("int8,window=30,sink=2,select=9", device=2)
        again.restore(tensors, header)
        again.check_integrity()
        assert all(page_hash(again, f) == page_hash(cache, f) for f in cache.layout.resident)
        copy = oracle.fork()
        rolled(again, 6, copy, 400)
        rolled(cache, 6, oracle, 400)

    def test_other_settings_are_refused_still(self) -> None:
        cache = made("int8,window=30,sink=2", device=6)
        with pytest.raises(StateError, match="saved with the cache"):
            KVCache(CacheSpec.parse("int8,window=31,sink=2"), TINY).restore(*cache.state_tensors())


class TestMoreThanAChunk:
    def test_at_once(self) -> None:
        """A cache that is built anew from clean latents takes more than it has places for."""
        cache = made("int8,window=20,sink=2", device=4)
        oracle = Oracle(cache.spec, TINY)
        keys, values = (torch.randn(TINY.layers, 1, 1, 14, 2, 6) for _ in range(2))
        cache.begin(14, at_once=True)
        with cache.committing():
            for layer in range(TINY.layers):
                cache.write(layer, keys[layer], values[layer])
        oracle.commit(keys, values)
        rolled(cache, 4, oracle)

    def test_more_than_the_host_holds(self) -> None:
        cache = made("int8,window=30,sink=2,select=9", device=6, host=10, staged=False)
        with pytest.raises(CacheStateError, match=r"9 latent frames at once; .* 8 at most"):
            cache.begin(9, at_once=True)
        rolled(cache, 2)

    def test_interrupted(self) -> None:
        cache = made("int8,window=20,sink=2", device=4)
        oracle = rolled(cache, 6)
        state = cache.state_tensors()
        cache.begin(3)
        with pytest.raises(KeyboardInterrupt), cache.committing():
            raise KeyboardInterrupt
        cache.restore(*state)
        rolled(cache, 6, oracle, 50)


@pytest.fixture
def crowded() -> Iterator[tuple[KVCache, Oracle]]:
    """A cache with pages on disk, and its oracle."""
    cache = made("int8,window=30,sink=2,select=9", device=6, host=10, staged=False)
    yield cache, rolled(cache, 12)


def _refuse() -> Path:
    raise OSError(30, "Read-only file system")


class TestBadDisks:
    """What cannot be kept is evicted with a warning; what is read is always right."""

    def _go_on(self, cache: KVCache, oracle: Oracle, chunks: int) -> None:
        for i in range(chunks):
            cache.forget_lost()
            oracle.frames = [frame for frame in oracle.frames if frame.index in cache.table]
            keys, values = (torch.randn(TINY.layers, 1, 1, 3, 2, 6) for _ in range(2))
            before = set(cache.table)
            cache.begin(3)
            oracle.frames = [frame for frame in oracle.frames if frame.index in cache.table]
            assert set(oracle.read[i].index for i in range(2)) <= before
            with cache.committing():
                for layer in range(TINY.layers):
                    wanted = oracle.decoded(layer)
                    parts = [cache.read(layer, segment) for segment in cache.segments]
                    for got, side in zip(zip(*parts, strict=True), wanted, strict=True):
                        assert torch.equal(torch.cat(got, 2).unflatten(2, (-1, 2)), side)
                    cache.write(layer, keys[layer], values[layer])
            oracle.commit(keys, values)
            oracle.frames = [frame for frame in oracle.frames if frame.index in cache.table]
        cache.check_integrity()

    @pytest.mark.filterwarnings("default:pages of .* latent frames:RuntimeWarning")
    @pytest.mark.parametrize("error", [OSError(28, "No space left on device"), OSError(5, "I/O error")])
    def test_writing(
        self, crowded: tuple[KVCache, Oracle], monkeypatch: pytest.MonkeyPatch, error: OSError
    ) -> None:
        def fail(*args: object) -> None:
            raise error

        cache, oracle = crowded
        full = len(cache.table)
        monkeypatch.setattr(offload, "save_file", fail)
        with pytest.warns(RuntimeWarning, match=rf"evicted: .*{error.strerror}.*{offload.SCRATCH}"):
            self._go_on(cache, oracle, 3)
        self._go_on(cache, oracle, 8)
        # of what came since, what a chunk reads and adds is all that is left
        late, end = {frame for frame in cache.table if frame >= 36}, cache.layout.next_frame
        assert set(range(end - 6, end)) <= late and len(late) <= pool_of(cache).plan.host
        # a state can be saved in between, and a disk that is well again is used again
        cache.state_tensors()
        monkeypatch.undo()
        os.environ[offload.SCRATCH] = str(pool_of(cache)._scratch().parent)
        self._go_on(cache, oracle, 14)
        assert len(cache.table) == full
        assert cache.layout.resident[2:] == (
            *range(cache.layout.next_frame - full + 2, cache.layout.next_frame),
        )

    @pytest.mark.filterwarnings("default:pages of .* latent frames:RuntimeWarning")
    @pytest.mark.parametrize("wanted", ["by a chunk", "to be saved"])
    @pytest.mark.parametrize("damage", ["gone", "cut", "empty"])
    def test_reading(
        self, crowded: tuple[KVCache, Oracle], damage: str, wanted: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cache, _ = crowded
        pool = pool_of(cache)
        pool._wait()
        away = [slot for slot in pool.files if slot not in pool.on_host]
        for slot in away:
            file = pool.files[slot]
            if damage == "gone":
                file.unlink()
            else:
                file.write_bytes(file.read_bytes()[:-1] if damage == "cut" else b"")
        lost = {frame for frame, page in cache.table.items() if page.slot in away}
        assert len(lost) > 1
        with pytest.raises(CacheStateError, match=r"cannot be read back from .*vidkv-pages-"):
            cache.page(min(lost))
        with pytest.warns(RuntimeWarning, match="evicted"):
            if wanted == "to be saved":
                tensors, header = cache.state_tensors()
                assert {frame for frame, _ in header["resident"]} == set(cache.table)
                assert not lost & set(cache.table)
                KVCache(cache.spec, TINY).restore(tensors, header)
            else:
                shares = dict.fromkeys(lost, 1.0)
                monkeypatch.setattr(
                    cache, "_relevance", lambda: {f: s for f, s in shares.items() if f in cache.table}
                )
                cache.begin(3)
                assert not lost & set(cache.layout.opened.history if cache.layout.opened else ())
                assert len(set(cache.table) & lost) < len(lost)
        cache.check_integrity()

    def test_a_file_that_cannot_be_removed(
        self, crowded: tuple[KVCache, Oracle], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A disk that has become read-only: the slot is used again, and not taken for what it was."""

        def refuse(self: Path, missing_ok: bool = False) -> None:
            raise OSError(30, "Read-only file system")

        cache, oracle = crowded
        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", refuse)
            patch.setattr(offload, "_write", lambda file, pages: _refuse())
            with pytest.warns(RuntimeWarning, match="evicted"):
                self._go_on(cache, oracle, 4)
        self._go_on(cache, oracle, 14)

    def test_sinks_are_not_the_first_to_go_when_a_state_is_restored(
        self, crowded: tuple[KVCache, Oracle], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cache, _ = crowded
        state = cache.state_tensors()
        monkeypatch.setattr(offload, "_write", lambda file, pages: _refuse())
        again = KVCache(cache.spec, TINY)
        again.restore(*state)
        with pytest.warns(RuntimeWarning, match="evicted"):
            again.begin(3)
        assert again.layout.sinks == (0, 1) and {0, 1} <= set(again.table)
        again.abandon()
        cache.restore(*again.state_tensors())

    def test_folders_of_the_killed_go(self, scratch: Path) -> None:
        here = f"vidkv-pages-{socket.gethostname()}"
        names = ("4194304-x", f"{os.getpid()}-x", "notes", f"{10**20}-x")
        dead, *others = (scratch / f"{here}-{name}" for name in names)
        others.append(scratch / "vidkv-pages-elsewhere-4194304-x")
        for folder in (dead, *others):
            folder.mkdir()
            (folder / "0-1").touch()
        rolled(made("int8,window=30,sink=2,select=9", device=6, host=10, staged=False), 12)
        assert not dead.exists() and all(folder.exists() for folder in others)

    @pytest.mark.parametrize("staged", [True, False])
    def test_all_goes_with_the_cache(self, scratch: Path, staged: bool) -> None:
        """At once, without a collection of garbage."""
        cache = made("int8,window=30,sink=2,select=9", device=3 if staged else 6, host=10, staged=staged)
        pool = weakref.ref(pool_of(cache))
        rolled(cache, 12)
        assert len(list(scratch.iterdir())) == 1
        gc.disable()
        try:
            cache.close()
            assert pool() is None and not list(scratch.iterdir())
        finally:
            gc.enable()


class TestBudgets:
    def test_enough_is_no_budget(self) -> None:
        spec = budgeted(CacheSpec.parse("int8,window=20,sink=2"), TINY, 17, staged=False)
        assert planned_places(spec, TINY, torch.float32) is None
        assert KVCache(spec, TINY).offloaded is None

    @pytest.mark.parametrize(
        ("spec", "message"),
        [
            ("int8,window=20,device_gb=1e-7", r"device_gb=1e-07 is too little .* at least 1e-06 GB"),
            ("int8,window=200,host_gb=1", r"host_gb=1 is for pages .* device_gb"),
            ("int8,window=200,device_gb=1,disk_gb=1", r"disk_gb=1 is for pages .* host_gb"),
            ("int8,window=200,device_gb=1,host_gb=1,disk_gb=1", r"disk_gb=1: .* select"),
            (
                "int8,window=200,device_gb=1e-5,host_gb=1e-6",
                r"host_gb=1e-06 is too little for a window of 200",
            ),
            (
                "int8,window=200,select=30,device_gb=1e-5,host_gb=1e-6,disk_gb=1",
                r"host_gb=1e-06 is too little: what one chunk reads and adds takes .* select=30",
            ),
            (
                "int8,window=200,select=30,device_gb=1e-5,host_gb=1e-5,disk_gb=1e-6",
                r"disk_gb=1e-06 is too little for a window of 200",
            ),
            ("int8,device_gb=-1", r"device_gb='-1'"),
            ("int8,device_gb=inf", r"device_gb='inf'"),
            ("int8,device_gb=1e300", r"device_gb='1e300'"),
            ("int8,device_gb=nan", r"device_gb='nan'"),
        ],
    )
    def test_too_little(self, spec: str, message: str) -> None:
        with pytest.raises(CacheSpecError, match=message):
            planned_places(CacheSpec.parse(spec), TINY, torch.float32)

    def test_what_is_named_is_enough(self) -> None:
        """The least that a message names works."""
        spec = CacheSpec.parse("int8,window=20,device_gb=1e-7")
        with pytest.raises(CacheSpecError) as caught:
            planned_places(spec, TINY, torch.float32)
        least = str(caught.value).split("at least ")[1].removesuffix(" GB")
        enough = spec.model_copy(update={"device_gb": float(least)})
        assert planned_places(enough, TINY, torch.float32) is not None

    def test_no_part_of_a_job_s_name(self) -> None:
        spec = CacheSpec.parse("int8,window=30,select=12,device_gb=2,host_gb=4,disk_gb=8")
        assert spec.identity == CacheSpec.parse("int8,window=30,select=12").identity
        assert CacheSpec.parse(str(spec)) == spec
