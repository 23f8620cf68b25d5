"""The choice of a read path: what is forced, what cannot be had, what was measured."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.tiny import build_rollout, build_transformer, relative_l2
from vidkv import dispatch
from vidkv.attention import CachedAttention
from vidkv.cache import CacheGeometry, CacheSpec
from vidkv.cache.formats import FORMATS
from vidkv.dispatch import candidates, check, choose, fused_obstacle
from vidkv.errors import InputError, StateError
from vidkv.kernels import jit
from vidkv.kernels.jit import triton
from vidkv.kernels.paged_attention import HEAD_DIMS, SMALLEST_TAIL, Tile
from vidkv.kernels.tiles import GOOD, SMALL, good_tiles, tile_space
from vidkv.read_path import REFERENCE, TWO_PASS, ReadPath

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SPEC = CacheSpec.parse("int8,window=9,sink=2")
GEOMETRY = CacheGeometry(layers=3, kv_heads=2, head_dim=64, height=4, width=6)
ON_THE_CPU = ReadPath("two-pass", backend="cpu")

needs_triton = pytest.mark.skipif(not triton, reason="triton is not installed")

FUSED = [name for name, format in FORMATS.items() if format.fused]


@pytest.fixture(autouse=True)
def untouched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither the caller's settings nor the caller's measurements; no interpreter."""
    for name in (dispatch.FORCE, dispatch.TUNE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(jit, "interpreted", lambda: False)


def chosen(
    spec: CacheSpec = SPEC,
    geometry: CacheGeometry = GEOMETRY,
    device: torch.device = CPU,
    dtype: torch.dtype = torch.float32,
    heads: int = 2,
) -> ReadPath:
    return choose(spec, geometry, heads, device, dtype)


class TestForced:
    @pytest.mark.parametrize("value", [None, "", "two-pass"])
    def test_two_pass_on_a_cpu(self, value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
        if value is not None:
            monkeypatch.setenv(dispatch.FORCE, value)
        assert chosen() == ON_THE_CPU
        assert chosen(dtype=torch.float64) == ReadPath("two-pass", backend="math")

    def test_reference(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(dispatch.FORCE, "reference")
        assert chosen() == REFERENCE

    @pytest.mark.parametrize("value", ["fast", "FUSED", "two_pass", " fused", "1"])
    def test_unknown(self, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(dispatch.FORCE, value)
        with pytest.raises(InputError, match=f"VIDKV_ATTENTION={value!r}.*reference, two-pass, fused"):
            chosen()

    @needs_triton
    def test_fused_without_a_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(dispatch.FORCE, "fused")
        with pytest.raises(InputError, match=r"VIDKV_ATTENTION=fused: .*NVIDIA GPU.*leave VIDKV_ATTENTION"):
            chosen()

    def test_fused_without_triton(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(dispatch.FORCE, "fused")
        monkeypatch.setattr(jit, "triton", None)
        with pytest.raises(InputError, match="needs triton, which is not installed"):
            chosen()

    @needs_triton
    def test_fused_under_the_interpreter(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Only when asked for: it is slow."""
        monkeypatch.setattr(jit, "interpreted", lambda: True)
        assert chosen() == ON_THE_CPU
        monkeypatch.setenv(dispatch.FORCE, "fused")
        assert chosen() == ReadPath("fused", tile=SMALL)

    @pytest.mark.parametrize(("format", "bound"), [("int8", 1e-3), ("bf16", 1e-4), ("fp32", 1e-5)])
    def test_reference_end_to_end(self, format: str, bound: float, monkeypatch: pytest.MonkeyPatch) -> None:
        """The same video at float64, to float32's precision; bits of its own."""
        latents = []
        for value in ("two-pass", "reference"):
            monkeypatch.setenv(dispatch.FORCE, value)
            rollout = build_rollout(f"{format},window=9,sink=2", transformer=build_transformer())
            assert rollout.path.name == value
            latents.append(torch.cat([rollout.step_chunk().latents for _ in range(4)], 1))
        # a code that falls to the other side of a tie is a larger step, and bf16 has ties too
        assert 0 < relative_l2(*latents) <= bound

    def test_what_a_rollout_is_made_with_wins(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """And is not asked about again when it forks."""
        monkeypatch.setenv(dispatch.FORCE, "reference")
        rollout = build_rollout(transformer=build_transformer())
        monkeypatch.setenv(dispatch.FORCE, "nonsense")
        assert rollout.fork().path == REFERENCE
        with pytest.raises(InputError, match="nonsense"):
            build_rollout(transformer=build_transformer())


@needs_triton
class TestObstacles:
    @pytest.fixture(autouse=True)
    def interpreter(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Stands in for a GPU."""
        monkeypatch.setattr(jit, "interpreted", lambda: True)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize(
        "format",
        [
            *FUSED,
            "int8,keep_newest,keep_sinks,value_scale=channel",
            "int4,newer=int8:1,keep_newest,hadamard=false,value_scale=channel",
        ],
    )
    @pytest.mark.parametrize("head_dim", HEAD_DIMS)
    def test_none(self, head_dim: int, format: str, dtype: torch.dtype) -> None:
        spec = CacheSpec.parse(f"{format},window=9,sink=2")
        assert fused_obstacle(spec, replace(GEOMETRY, head_dim=head_dim), CPU, dtype) is None

    @pytest.mark.parametrize("head_dim", [16, 24, 96, 512])
    def test_head_sizes(self, head_dim: int) -> None:
        obstacle = fused_obstacle(SPEC, replace(GEOMETRY, head_dim=head_dim), CPU, torch.float32)
        assert obstacle and f"not {head_dim}" in obstacle

    def test_float64(self) -> None:
        obstacle = fused_obstacle(SPEC, GEOMETRY, CPU, torch.float64)
        assert obstacle and "float64" in obstacle

    @pytest.mark.parametrize("unread", ["INT8", "BF16"])
    def test_formats(self, unread: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of every pool: kept pages lie in another format."""
        spec = CacheSpec.parse("int8,window=9,sink=2,keep_newest")
        format = FORMATS[unread.lower()]
        monkeypatch.setattr(format, "fused", False)
        obstacle = fused_obstacle(spec, GEOMETRY, CPU, torch.bfloat16)
        assert obstacle and "does not know pages of int8" in obstacle

    @pytest.mark.parametrize(
        ("spec", "words"),
        [
            ("int2,hadamard=false", "does not know pages of int2"),
            ("int4,group=32", "int4 pages without group=32"),
            ("int4,key_scale=channel", "int4 pages without key_scale=channel"),
            ("int4,keyframe", "int4 pages without keyframe"),
            ("int4,jensen", "int4 pages without jensen"),
            ("int4,keep_tokens=0.5", "all their tokens"),
            ("int8,newer=k8v4:3,hadamard=false", "does not know pages of int8"),
            ("int8,keep_tokens=0.5", "all their tokens"),
            ("int4,newer=,keep_sinks=false,centroids=4", "does not know pages"),
            ("int8,newer=bf16:1+fp32:1", "one coded format and one plain one"),
        ],
    )
    def test_pages_that_it_was_not_made_for(self, spec: str, words: str) -> None:
        whole = CacheSpec.parse(f"{spec},window=9,sink=2")
        obstacle = fused_obstacle(whole, replace(GEOMETRY, head_dim=64), CPU, torch.float32)
        assert obstacle and words in obstacle

    def test_without_the_interpreter(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(jit, "interpreted", lambda: False)
        obstacle = fused_obstacle(SPEC, GEOMETRY, CPU, torch.float32)
        assert obstacle and "TRITON_INTERPRET=1" in obstacle
        assert fused_obstacle(SPEC, GEOMETRY, CUDA, torch.float32) is None


class TestCheck:
    """Of a saved rollout's path: another one would give other bits."""

    @pytest.mark.parametrize("path", [REFERENCE, ON_THE_CPU], ids=str)
    def test_can_be_taken(self, path: ReadPath) -> None:
        check(path, SPEC, GEOMETRY, CPU, torch.float32)

    @pytest.mark.parametrize("backend", ["cudnn", "flash", "math"])
    def test_another_backend(self, backend: str) -> None:
        with pytest.raises(StateError, match=f"the read path two-pass {backend}: .*{backend}.*cpu.*float32"):
            check(ReadPath("two-pass", backend=backend), SPEC, GEOMETRY, CPU, torch.float32)

    @needs_triton
    def test_fused(self) -> None:
        path = ReadPath("fused", tile=Tile(128, 64, 8, 3))
        with pytest.raises(StateError, match=r"fused 128x64, 8 warps, 3 stages: .*NVIDIA GPU"):
            check(path, SPEC, GEOMETRY, CPU, torch.float32)

    def test_a_saved_reference_stays_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(dispatch.FORCE, "reference")
        rollout = build_rollout(transformer=build_transformer())
        rollout.step_chunk()
        saved = rollout.state()
        monkeypatch.delenv(dispatch.FORCE)
        other = build_rollout(transformer=build_transformer())
        assert other.path == ON_THE_CPU
        other.restore(*saved)
        assert other.path == REFERENCE
        assert torch.equal(other.step_chunk().latents, rollout.step_chunk().latents)


class FakeMeasure:
    """Times from a table; keeps what it was asked."""

    def __init__(self, times: dict[ReadPath, float | Exception]) -> None:
        self.times = times
        self.asked: list[ReadPath] = []

    def __call__(self, path: ReadPath) -> float:
        self.asked.append(path)
        time = self.times[path]
        if isinstance(time, Exception):
            raise time
        return time


CUDNN, FLASH = (ReadPath("two-pass", backend=backend) for backend in ("cudnn", "flash"))
FUSED = ReadPath("fused", tile=Tile(128, 64, 8, 3))
PATHS = [CUDNN, FLASH, FUSED]


def times(cudnn: float | Exception, flash: float | Exception, fused: float | Exception) -> FakeMeasure:
    return FakeMeasure({CUDNN: cudnn, FLASH: flash, FUSED: fused})


class TestMeasurements:
    @pytest.mark.parametrize("fastest", range(3))
    def test_the_fastest_is_taken(self, fastest: int) -> None:
        measure = times(*(1.0 if i == fastest else 1.1 + i for i in range(3)))
        assert dispatch._remembered("key", PATHS, measure) == PATHS[fastest]
        assert measure.asked == PATHS

    def test_once(self) -> None:
        """The second time the file answers, whatever would be measured now."""
        assert dispatch._remembered("key", PATHS, times(3.0, 2.0, 1.0)) == FUSED
        again = times(1.0, 2.0, 3.0)
        assert dispatch._remembered("key", PATHS, again) == FUSED
        assert not again.asked

    def test_per_key(self) -> None:
        dispatch._remembered("a", PATHS, times(3.0, 2.0, 1.0))
        measure = times(1.0, 2.0, 3.0)
        assert dispatch._remembered("b", PATHS, measure) == CUDNN
        assert measure.asked == PATHS
        for key, wanted in (("a", FUSED), ("b", CUDNN)):
            assert dispatch._remembered(key, PATHS, times(9.0, 9.0, 9.0)) == wanted

    def test_a_path_that_is_new(self) -> None:
        """All are measured again: times of two days do not compare."""
        dispatch._remembered("key", PATHS[:2], times(1.0, 2.0, 0.5))
        measure = times(2.0, 1.5, 1.0)
        assert dispatch._remembered("key", PATHS, measure) == FUSED
        assert measure.asked == PATHS

    @pytest.mark.parametrize("error", [RuntimeError("no kernel"), torch.OutOfMemoryError("full")], ids=repr)
    def test_one_that_cannot_run(self, error: Exception) -> None:
        """Is never taken, and not tried again."""
        assert dispatch._remembered("key", PATHS, times(error, 1e9, error)) == FLASH
        again = times(0.1, 0.1, 0.1)
        assert dispatch._remembered("key", PATHS, again) == FLASH
        assert not again.asked

    @needs_triton
    def test_too_large_a_tile(self) -> None:
        from triton.runtime.errors import OutOfResources

        error = OutOfResources(300_000, 232_448, "shared memory")
        assert dispatch._remembered("key", PATHS, times(2.0, 3.0, error)) == CUDNN

    def test_none_runs(self) -> None:
        error = RuntimeError("no kernel image")
        with pytest.raises(InputError, match=r"none of the read paths .*fused 128x64.*vidkv doctor"):
            dispatch._remembered("key", PATHS, times(error, error, error))

    def test_mistakes_of_ours_are_not_slow_paths(self) -> None:
        with pytest.raises(TypeError, match="ours"):
            dispatch._remembered("key", PATHS, times(1.0, 2.0, TypeError("ours")))
        assert not dispatch.cache_file().exists()


class TestFile:
    def test_where(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        assert dispatch.cache_file() == tmp_path / "cache" / "vidkv" / "read_paths.json"
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
        assert dispatch.cache_file() == tmp_path / "home" / ".cache" / "vidkv" / "read_paths.json"

    def test_readable_by_people(self) -> None:
        dispatch._remembered("key", PATHS, times(3.0, RuntimeError(), 1.0))
        kept = json.loads(dispatch.cache_file().read_text())
        assert kept == {
            "key": {"two-pass cudnn": 3.0, "two-pass flash": math.inf, "fused 128x64, 8 warps, 3 stages": 1.0}
        }
        assert [path.name for path in dispatch.cache_file().parent.iterdir()] == ["read_paths.json"]

    @pytest.mark.parametrize(
        "damaged",
        [b"", b"{", b"\xff\xfe\x00", b"[]", b"3", b"null", b'{"key": 3}', b'{"key": null}', b'{"key": {}}'],
    )
    def test_damaged(self, damaged: bytes) -> None:
        """Measured anew, and written whole again."""
        file = dispatch.cache_file()
        file.parent.mkdir(parents=True)
        file.write_bytes(damaged)
        measure = times(3.0, 2.0, 1.0)
        assert dispatch._remembered("key", PATHS, measure) == FUSED
        assert measure.asked == PATHS
        again = times(1.0, 2.0, 3.0)
        assert dispatch._remembered("key", PATHS, again) == FUSED
        assert not again.asked

    def test_what_cannot_be_replaced(self) -> None:
        """Measured every time, and nothing is left lying about."""
        file = dispatch.cache_file()
        file.mkdir(parents=True)
        for wanted, measure in ((FUSED, times(3.0, 2.0, 1.0)), (CUDNN, times(1.0, 2.0, 3.0))):
            assert dispatch._remembered("key", PATHS, measure) == wanted
            assert measure.asked == PATHS
        assert list(file.parent.iterdir()) == [file]

    def test_a_full_disk(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(self: Path, text: str) -> None:
            self.touch()
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Path, "write_text", full)
        assert dispatch._remembered("key", PATHS, times(3.0, 2.0, 1.0)) == FUSED
        assert not list(dispatch.cache_file().parent.iterdir())

    def test_no_folder(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where a home cannot be written to: a container of another user."""

        def refused(self: Path, *args: object, **kwargs: object) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Path, "mkdir", refused)
        assert dispatch._remembered("key", PATHS, times(3.0, 2.0, 1.0)) == FUSED


@needs_triton
class TestOnAGPU:
    """With a GPU that is only said to be there: nothing is measured but by a table."""

    @pytest.fixture(autouse=True)
    def hopper(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Imagined H100")

    @pytest.fixture
    def measured(self, monkeypatch: pytest.MonkeyPatch) -> list[ReadPath]:
        """What was asked; the fused read is always the fastest, and flash faster than cuDNN."""
        asked: list[ReadPath] = []

        def measure(path: ReadPath, *rest: object) -> float:
            asked.append(path)
            return {"": 1.0, "flash": 2.0, "cudnn": 3.0}[path.backend]

        monkeypatch.setattr(dispatch, "measure", measure)
        return asked

    def test_candidates(self) -> None:
        paths = candidates(SPEC, GEOMETRY, CUDA, torch.bfloat16)
        assert paths[:2] == [CUDNN, FLASH]
        assert {path.name for path in paths[2:]} == {"fused"}
        assert len(set(paths)) == len(paths)
        wanted = good_tiles((9, 0), 64, 3 * 24, 24, torch.bfloat16)
        assert [path.tile for path in paths[2:]] == wanted

    def test_hopper_s_kernel(self) -> None:
        """Reads codes, packed or not, with a scale per token."""
        geometry = replace(GEOMETRY, head_dim=128)
        for spec, wanted in {
            "int8": [1, 2], "int4": [1, 2], "int4,newer=,keep_sinks=false": [1, 2], "bf16": [],
            "int8,keep_newest": [], "int4,value_scale=channel": [], "int4,keep_newest": [],
        }.items():  # fmt: skip
            whole = CacheSpec.parse(f"{spec},window=9,sink=2")
            tiles = [path.tile for path in candidates(whole, geometry, CUDA, torch.bfloat16)]
            assert [t.hopper_splits for t in tiles if t and t.hopper_splits] == wanted, spec

    def test_all_are_measured_once(self, measured: list[ReadPath]) -> None:
        path = chosen(device=CUDA, dtype=torch.bfloat16)
        assert path.name == "fused" and measured == candidates(SPEC, GEOMETRY, CUDA, torch.bfloat16)
        measured.clear()
        assert chosen(device=CUDA, dtype=torch.bfloat16) == path
        assert not measured

    def test_forced_fused(self, measured: list[ReadPath], monkeypatch: pytest.MonkeyPatch) -> None:
        """Of all tiles the fastest still is to be found."""
        monkeypatch.setenv(dispatch.FORCE, "fused")
        assert chosen(device=CUDA, dtype=torch.bfloat16).name == "fused"
        assert {path.name for path in measured} <= {"fused"}

    def test_forced_two_pass(self, measured: list[ReadPath], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(dispatch.FORCE, "two-pass")
        assert chosen(device=CUDA, dtype=torch.bfloat16) == FLASH
        assert measured == [CUDNN, FLASH]

    def test_a_single_candidate_is_not_measured(self, measured: list[ReadPath]) -> None:
        geometry = replace(GEOMETRY, head_dim=24)
        assert chosen(geometry=geometry, device=CUDA) == ReadPath("two-pass", backend="math")
        assert not measured

    def test_tuning(self, measured: list[ReadPath], monkeypatch: pytest.MonkeyPatch) -> None:
        geometry = replace(GEOMETRY, height=30, width=52)
        chosen(geometry=geometry, device=CUDA, dtype=torch.bfloat16)
        few = len(measured)
        measured.clear()
        monkeypatch.setenv(dispatch.TUNE, "1")
        chosen(geometry=geometry, device=CUDA, dtype=torch.bfloat16)
        assert len(measured) > few, "what was found without tuning does not count"

    @pytest.mark.parametrize(
        "change",
        [
            {"spec": CacheSpec.parse("int8,window=12,sink=2")},
            {"spec": CacheSpec.parse("bf16,window=9,sink=2")},
            {"geometry": replace(GEOMETRY, height=5)},
            {"geometry": replace(GEOMETRY, chunk_frames=2)},
            {"geometry": replace(GEOMETRY, batch=2)},
            {"heads": 4},
            {"dtype": torch.float16},
        ],
        ids=str,
    )
    def test_another_shape_is_measured(self, change: dict[str, object], measured: list[ReadPath]) -> None:
        usual: dict[str, object] = {"device": CUDA, "dtype": torch.bfloat16}
        chosen(**usual)
        measured.clear()
        chosen(**(usual | change))  # type: ignore[arg-type]
        assert measured

    @pytest.mark.parametrize("what", ["get_device_name", "__version__", "KERNELS"])
    def test_another_machine_is_measured(
        self, what: str, measured: list[ReadPath], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        chosen(device=CUDA, dtype=torch.bfloat16)
        measured.clear()
        values: dict[str, tuple[object, object]] = {
            "get_device_name": (torch.cuda, lambda device=None: "Another"),
            "__version__": (triton, "0.0"),
            "KERNELS": (dispatch, dispatch.KERNELS + 1),
        }
        monkeypatch.setattr(values[what][0], what, values[what][1])
        chosen(device=CUDA, dtype=torch.bfloat16)
        assert measured

    def test_the_number_of_layers_does_not_matter(self, measured: list[ReadPath]) -> None:
        """One layer is measured; a deeper model of the same shape profits."""
        chosen(device=CUDA, dtype=torch.bfloat16)
        measured.clear()
        chosen(geometry=replace(GEOMETRY, layers=30), device=CUDA, dtype=torch.bfloat16)
        assert not measured


class TestFullWindow:
    @pytest.mark.parametrize(
        "spec", ["int8,window=9,sink=2", "int8,window=11,sink=1,keep_newest", "fp32,window=3,sink=0"]
    )
    def test_holds_every_page(self, spec: str) -> None:
        """What is measured is the read of a rollout that has been going on for long."""
        parsed = CacheSpec.parse(spec)
        geometry = replace(GEOMETRY, batch=2)
        cache, (q, k, v) = dispatch.full_window(parsed, geometry, 4, CPU, torch.float32)
        cache.check_integrity()
        assert cache.geometry.layers == 1 and cache.opened is not None
        assert sum(len(run.slots) for run in cache.history) == parsed.window - 3
        assert q.shape == (2, 3, 24, 4, 64) and k.shape == v.shape == (2, 3, 24, 2, 64)
        out = CachedAttention(cache, TWO_PASS).layer(0)(q, k, v)
        assert out.shape == q.shape and bool(out.isfinite().all())
        assert cache.pages_read == parsed.window - 3


class TestTiles:
    Listing = Callable[[tuple[int, int], int, int, int, torch.dtype], list[Tile]]

    @pytest.mark.parametrize("listing", [good_tiles, tile_space])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize(
        "capability", [(0, 0), (7, 5), (8, 0), (8, 9), (9, 0), (10, 0), (12, 0)], ids=str
    )
    def test_can_be_launched(
        self, capability: tuple[int, int], dtype: torch.dtype, listing: TestTiles.Listing
    ) -> None:
        """Powers of two, no smaller than a matrix unit and no larger than the work, each once."""
        for head_dim in HEAD_DIMS:
            for queries in (1, 15, 16, 17, 72, 128, 4680):
                for tokens in (1, 31, 32, 33, 64, 1560):
                    tiles = listing(capability, head_dim, queries, tokens, dtype)
                    assert tiles and len(set(tiles)) == len(tiles)
                    for tile in tiles:
                        for size, smallest in (
                            (tile.queries, 16),
                            (tile.keys, SMALLEST_TAIL),
                            (tile.warps, 4),
                        ):
                            assert size >= smallest and size & (size - 1) == 0
                        if dtype != torch.float32:
                            assert tile.queries < 2 * max(16, queries)
                            assert tile.keys < 2 * max(SMALLEST_TAIL, tokens)

    @pytest.mark.parametrize("known", GOOD, ids=str)
    def test_large_work_gets_the_table_s(self, known: tuple[int, int]) -> None:
        found = good_tiles(divmod(known[0], 10), known[1], 4680, 1560, torch.bfloat16)
        assert tuple(found) == GOOD[known]

    def test_later_revisions_take_after_the_first(self) -> None:
        """Of their generation, as long as the table does not name them."""
        shape = 64, 4680, 1560, torch.bfloat16
        assert (87, 64) not in GOOD
        assert good_tiles((8, 7), *shape) == good_tiles((8, 0), *shape) != tile_space((8, 7), *shape)

    def test_unknown_machines_search(self) -> None:
        """Instead of taking what is good elsewhere."""
        arguments = (99, 0), 128, 4680, 1560, torch.bfloat16
        assert good_tiles(*arguments) == tile_space(*arguments)
        assert len(tile_space(*arguments)) > 4

    def test_float32_takes_small_ones(self) -> None:
        """Its operands fill shared memory four times as fast as codes do."""
        assert good_tiles((9, 0), 128, 4680, 1560, torch.float32) == [SMALL]
        assert SMALL in tile_space((9, 0), 128, 4680, 1560, torch.float32)
        assert SMALL in tile_space((9, 0), 128, 4680, 1560, torch.bfloat16)
