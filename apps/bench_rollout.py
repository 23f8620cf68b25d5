"""Any registry entry at full size with random weights: `vidkv bench rollout --random-weights`.

Speed and memory do not depend on what the weights are, so both can be measured without a download. The same
networks are driven by two loops in one run, in turn since clocks drift: vidkv's, and one in the style of
stock code (`stock_loop`), which differs in nothing but its cache and its attention. Beside what was measured
stands the floor: the arithmetic of a pass at the matrix rate of this machine.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from torch import Tensor, nn

from vidkv.apps.bench import hardware, median_s, rounded, seconds, synchronize
from vidkv.apps.pass_profile import (
    CLEAN,
    CROSS,
    DENOISE,
    GAPS,
    LINEARS,
    PHASES,
    SELF,
    Loop,
    PassProfile,
    pass_timer,
    profile_passes,
)
from vidkv.apps.stock_loop import StockLoop
from vidkv.cache import CacheGeometry, CacheSpec, planned_bytes
from vidkv.errors import InputError, ResourceError
from vidkv.memory import latent_size, pixel_size
from vidkv.models.checkpoints.empty import empty_weights
from vidkv.models.families.base import ModelEntry
from vidkv.models.registry import known_model
from vidkv.models.vae import StreamingDecoder
from vidkv.models.wan import CausalWanTransformer3DModel, TextContext
from vidkv.rollout import Rollout
from vidkv.schedule import FlowSchedule

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

SEED = 0
STAGES = 4
"""What is told of as done before the timed chunks."""
MATMUL_SIZE = {"cuda": 8192, "cpu": 512}
SPARE_BYTES = 2 << 30
"""Left free beside the stock loop's window before it is tried: its scores, copies and clones."""

Tell = Callable[[int, int, str], None]
Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Setup:
    """What is rolled out.

    Attributes:
        latent_size: (channels, height, width) of a latent frame.
        height, width: pixels.
        dtype: compute dtype.
    """

    entry: ModelEntry
    spec: CacheSpec
    schedule: FlowSchedule
    geometry: CacheGeometry
    latent_size: tuple[int, int, int]
    height: int
    width: int
    device: torch.device
    dtype: torch.dtype

    @property
    def guided(self) -> bool:
        """Every step asks the model twice, over two caches."""
        return self.schedule.guidance != 1

    @property
    def pixel_frames(self) -> int:
        """Of a chunk that is not the first."""
        return self.entry.chunk_frames * int(self.entry.vae.get("scale_factor_temporal", 4))

    @property
    def kv_bytes(self) -> int:
        """What the caches should take."""
        return (1 + self.guided) * planned_bytes(self.spec, self.geometry, self.dtype)

    @property
    def stock_kv_bytes(self) -> int:
        """What dense windows take."""
        g = self.geometry
        tokens = g.batch * self.spec.window * g.tokens
        return (1 + self.guided) * 2 * g.layers * tokens * g.kv_heads * g.head_dim * self.dtype.itemsize


@dataclass
class Networks:
    """Networks with random weights, and what they are told."""

    transformer: CausalWanTransformer3DModel
    vae: AutoencoderKLWan
    text: TextContext
    negative: TextContext | None


@dataclass
class Measured:
    """Seconds of steady chunks, in the order in which they were taken."""

    denoise_s: list[float] = field(default_factory=list)
    clean_s: list[float] = field(default_factory=list)

    @property
    def transformer_s(self) -> list[float]:
        return [d + c for d, c in zip(self.denoise_s, self.clean_s, strict=True)]


def rollout_benchmark(
    model: str,
    window: int | None = None,
    sink: int | None = None,
    kv_format: str | None = None,
    height: int | None = None,
    width: int | None = None,
    chunks: int = 6,
    steps: int | None = None,
    device: str = "auto",
    compiled: bool = False,
    baseline: bool = True,
    profiled: bool = True,
    graphs: bool = False,
    tell: Tell = lambda done, total, what: None,
    cache: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Roll random weights out until the window is full, then measure chunks.

    The window is filled by clean passes over random latents. On a GPU the model computes in bfloat16, on a
    CPU in float32. Times end when the device has done all its work; inside a step nothing waits for it.

    Args:
        model: a registry name.
        window, sink, height, width, steps: instead of the model's own; steps are evenly spaced.
        kv_format: page format; by default the unquantized one of the device.
        chunks: steady chunks that are timed, of each loop.
        device: auto, cpu or cuda.
        compiled: torch.compile of the transformer's blocks around attention, for both loops.
        graphs: vidkv's denoising passes are replayed as CUDA graphs (`Rollout.record_passes`); phases are
            those of passes that are not.
        baseline: also time the stock loop.
        cache: further cache settings.
        profiled: also say where a pass's time goes.

    Returns:
        JSON-able; `render` makes tables of it.

    Raises:
        InputError: a value that cannot be used.
        ResourceError: the device has too little memory.
    """
    if chunks < 1:
        raise InputError(f"chunks={chunks}: measure at least 1")
    setup = make_setup(model, window, sink, kv_format, height, width, steps, device, cache)
    check_room(setup)
    try:
        with torch.no_grad():
            return _benchmark(
                setup, chunks, compiled, baseline, profiled, graphs and setup.device.type == "cuda", tell
            )
    except torch.OutOfMemoryError as error:
        raise ResourceError(
            f"{model} with the cache {setup.spec} at {setup.width}x{setup.height} does not fit: "
            f"{str(error).splitlines()[0]:.160} Choose a smaller window or picture, or kv-format int8"
        ) from None


def make_setup(
    model: str,
    window: int | None = None,
    sink: int | None = None,
    kv_format: str | None = None,
    height: int | None = None,
    width: int | None = None,
    steps: int | None = None,
    device: str = "auto",
    cache: Mapping[str, Any] | None = None,
) -> Setup:
    """Look a model up and apply changes.

    Raises:
        InputError: an unknown or impossible value.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise InputError(f"device={device!r:.60}; choose auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("device=cuda, but torch sees no GPU here; use --device cpu or see `vidkv doctor`")
    on_gpu = device != "cpu" and torch.cuda.is_available()
    where, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    entry = known_model(model)
    spec = CacheSpec.of({
        "format": kv_format or ("bf16" if on_gpu else "fp32"),
        "window": entry.window if window is None else window,
        "sink": entry.sink if sink is None else sink,
        "positions": entry.positions,
    } | dict(cache or {}))  # fmt: skip
    spec.capacity(entry.chunk_frames)
    rows, columns = pixel_size(entry, height, width)
    latent = latent_size(entry, rows, columns)
    schedule = FlowSchedule(**entry.schedule)
    config = empty_transformer(entry).config
    return Setup(
        entry,
        spec,
        schedule if steps is None else schedule.with_steps(steps),
        CacheGeometry.of_model(config, *latent, entry.chunk_frames),
        (config.in_channels, *latent),
        rows,
        columns,
        torch.device(where),
        dtype,
    )


def check_room(setup: Setup) -> None:
    """Weights and cache fit on the device, before anything is allocated.

    Raises:
        ResourceError: they do not.
    """
    if setup.device.type != "cuda":
        return
    parts = (empty_transformer(setup.entry), empty_vae(setup.entry))
    weights = sum(p.numel() for part in parts for p in part.parameters()) * setup.dtype.itemsize
    free, _ = torch.cuda.mem_get_info(setup.device)
    if weights + setup.kv_bytes > free:
        raise ResourceError(
            f"{setup.entry.name} needs {weights / 1e9:.1f} GB of weights and {setup.kv_bytes / 1e9:.1f} GB "
            f"of cache ({setup.spec}), and {free / 1e9:.1f} GB are free; choose a smaller window or picture, "
            "or kv-format int8"
        )


def _benchmark(
    setup: Setup, chunks: int, compiled: bool, baseline: bool, profiled: bool, graphs: bool, tell: Tell
) -> dict[str, Any]:
    rounds = chunks + STAGES
    tell(0, rounds, "building")
    networks = random_networks(setup)
    weights_allocated = _allocated(setup.device)
    if compiled:
        networks.transformer.compile_blocks()
    tell(1, rounds, "first chunk")
    with _rollout(setup, networks) as rollout:
        cold = first_frame_s(rollout, StreamingDecoder(networks.vae))
    with _rollout(setup, networks) as rollout:
        decoder = StreamingDecoder(networks.vae)
        warm = first_frame_s(rollout, decoder)
        tell(2, rounds, "filling the window")
        memory = _own_memory(rollout, decoder, setup, networks)
        stock: StockLoop | None = None
        stock_row: dict[str, Any] = {"left_out": "not asked for"}
        if baseline:
            tell(3, rounds, "filling the stock loop's window")
            stock, stock_row = _start_stock(setup, networks, weights_allocated)
        loops: dict[str, Loop] = {"vidkv": rollout} | ({"stock": stock} if stock else {})
        passes = _warm_up(loops, networks.transformer, decoder, setup.device)
        phases = {}
        if profiled:
            phases = {
                name: profile_passes(loop, networks.transformer, setup.device, compiled)
                for name, loop in loops.items()
            }
        if graphs:
            rollout.record_passes()
            _chunk(rollout, setup.device)
        times, decode_s = _rounds(loops, decoder, setup.device, chunks, tell)
        overlapped = _overlapped(rollout, decoder, setup, chunks)
        ratios = {}
        if stock:
            stock_row |= {**_loop_row(times["stock"], decode_s, setup), "sdpa": stock.backend_name}
            ratios = _ratios(times["stock"], times["vidkv"], decode_s)
            if not passes[CLEAN]:
                # a model that recomputes its context has none to compare
                del ratios["clean"]
        return {
            "hardware": hardware(setup.device.type),
            "torch": torch.__version__,
            "model": _describe(setup, networks, compiled) | {"passes": passes, "graphs": graphs},
            "read_path": str(rollout.path),
            "first_frame_s": {"cold": rounded(cold), "warm": rounded(warm)},
            "chunks": chunks,
            "decode_s": _spread(decode_s),
            "memory": memory,
            "vidkv": _loop_row(times["vidkv"], decode_s, setup) | overlapped,
            "stock": stock_row,
            "stock_to_vidkv": ratios,
            "phases": {
                name: {kind: one.as_dict() for kind, one in kinds.items()} for name, kinds in phases.items()
            },
            "floor": _floor(setup, passes, phases.get("vidkv"), times["vidkv"]),
        }


def _own_memory(
    rollout: Rollout, decoder: StreamingDecoder, setup: Setup, networks: Networks
) -> dict[str, int]:
    """What vidkv takes alone, over filling its window and a chunk with its decoding."""
    _reset_peak(setup.device)
    fill(rollout, setup)
    _decode(decoder, _chunk(rollout, setup.device)[0])
    return {
        "kv_predicted_bytes": setup.kv_bytes,
        "kv_resident_bytes": rollout.kv_bytes,
        "kv_host_bytes": rollout.cache.host_nbytes,
        "weights_bytes": _nbytes(networks.transformer) + _nbytes(networks.vae),
        **_peak(setup.device),
    }


def _start_stock(
    setup: Setup, networks: Networks, weights_allocated: int
) -> tuple[StockLoop | None, dict[str, Any]]:
    """The stock loop with a full window, and what it takes; or no loop, and why.

    Its peak is counted as if it were alone: what vidkv's rollout and decoder hold meanwhile is taken off. It
    does not decode.
    """
    _reset_peak(setup.device)
    if setup.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(setup.device)
        if setup.stock_kv_bytes + SPARE_BYTES > free:
            return None, {
                "left_out": f"its windows take {setup.stock_kv_bytes / 1e9:.1f} GB, and beside vidkv's "
                f"rollout {free / 1e9:.1f} GB are free"
            }
    entry, others = setup.entry, _allocated(setup.device) - weights_allocated
    try:
        stock = StockLoop(
            networks.transformer, networks.text, setup.spec, setup.schedule, setup.latent_size, [SEED],
            entry.chunk_frames, entry.first_chunk_frames, entry.recompute_context, networks.negative,
        )  # fmt: skip
        stock.choose_backend()
        fill(stock, setup)
        _chunk(stock, setup.device)
    except torch.OutOfMemoryError as error:
        return None, {"left_out": f"out of memory: {str(error).splitlines()[0]:.160}"}
    row = {"kv_resident_bytes": stock.kv_bytes}
    if peak := _peak(setup.device):
        row["peak_allocated_bytes"] = peak["peak_allocated_bytes"] - others
    return stock, row


def _warm_up(
    loops: Mapping[str, Loop],
    transformer: CausalWanTransformer3DModel,
    decoder: StreamingDecoder,
    device: torch.device,
) -> dict[str, int]:
    """One chunk of each loop that is not timed; the passes that one of vidkv's takes."""
    passes = {}
    for name, loop in loops.items():
        with pass_timer(transformer, device) as timer:
            latents = loop.denoise()
            denoising = len(timer.read())
            loop.append(latents)
            clean = len(timer.read())
        if name == "vidkv":
            decoder.feed(latents)
            passes = {DENOISE: denoising, CLEAN: clean}
    return passes


def _rounds(
    loops: Mapping[str, Loop], decoder: StreamingDecoder, device: torch.device, chunks: int, tell: Tell
) -> tuple[dict[str, Measured], list[float]]:
    """Steady chunks of all loops, in turn and in changing order; what vidkv's chunks take to decode."""
    times = {name: Measured() for name in loops}
    decode_s = []
    for index in range(chunks):
        order = list(loops) if index % 2 == 0 else list(loops)[::-1]
        for name in order:
            latents, denoise_s, clean_s = _chunk(loops[name], device)
            times[name].denoise_s.append(denoise_s)
            times[name].clean_s.append(clean_s)
            if name == "vidkv":
                decode_s.append(_decode(decoder, latents))
        tell(STAGES + index + 1, STAGES + chunks, "chunks")
    return times, decode_s


def _overlapped(rollout: Rollout, decoder: StreamingDecoder, setup: Setup, chunks: int) -> dict[str, float]:
    """Frames a second when a chunk is decoded on a second stream while the next one is denoised."""
    if setup.device.type != "cuda" or rollout.recompute_context:
        return {}
    rollout.decoder = decoder
    later = rollout.decode_later(rollout.step_chunk(decode=False).latents)
    later.wait()
    started = seconds(setup.device)
    for _ in range(chunks):
        latents = rollout.step_chunk(decode=False).latents
        later.wait()
        later = rollout.decode_later(latents)
    later.wait()
    elapsed = seconds(setup.device) - started
    rollout.decoder = None
    return {"overlapped_fps": rounded(chunks * setup.pixel_frames / elapsed)}


def _chunk(loop: Loop, device: torch.device) -> tuple[Tensor, float, float]:
    """One chunk's latents, and the seconds of its denoising steps and of its clean pass."""
    started = seconds(device)
    latents = loop.denoise()
    denoised = seconds(device)
    loop.append(latents)
    return latents, denoised - started, seconds(device) - denoised


def _decode(decoder: StreamingDecoder, latents: Tensor) -> float:
    """Seconds until a chunk's pixels lie on the host."""
    started = seconds(latents.device)
    decoder.feed(latents).cpu()
    return time.perf_counter() - started


def first_frame_s(rollout: Rollout, decoder: StreamingDecoder) -> float:
    """Seconds from the start of a rollout's first chunk to its pixels on the host; commits it afterwards."""
    started = seconds(rollout.device)
    latents = rollout.denoise()
    decoder.feed(latents).cpu()
    taken = time.perf_counter() - started
    rollout.append(latents)
    return taken


def fill(loop: Loop, setup: Setup) -> None:
    """Append random latents until frames leave the window."""
    chunk = setup.entry.chunk_frames
    generator = torch.Generator(setup.device).manual_seed(SEED)
    for _ in range(math.ceil(setup.spec.window / chunk) + 1):
        shape = (1, chunk, *setup.latent_size)
        loop.append(torch.randn(shape, generator=generator, device=setup.device, dtype=setup.dtype))


# networks


def empty_transformer(entry: ModelEntry) -> CausalWanTransformer3DModel:
    """Without memory for its weights."""
    with empty_weights(include_buffers=True):
        return CausalWanTransformer3DModel(**entry.transformer)


def empty_vae(entry: ModelEntry) -> AutoencoderKLWan:
    """Without memory for its weights."""
    with empty_weights(include_buffers=True):
        return AutoencoderKLWan(**entry.vae)


def random_networks(setup: Setup) -> Networks:
    """Networks of full size on the device; nothing of them passes through the host."""
    transformer = fill_randomly(empty_transformer(setup.entry), setup.device, setup.dtype)
    vae = fill_randomly(empty_vae(setup.entry), setup.device, setup.dtype)
    generator = torch.Generator(setup.device).manual_seed(SEED)
    shape = (1, setup.entry.text_tokens, transformer.config.text_dim)

    def text() -> TextContext:
        embeds = torch.randn(shape, generator=generator, device=setup.device, dtype=setup.dtype)
        return transformer.encode_text(embeds)

    return Networks(transformer, vae, text(), text() if setup.guided else None)


def fill_randomly(model: Model, device: torch.device, dtype: torch.dtype) -> Model:
    """Give an empty model memory on a device and weights that keep activations near one in size.

    Matrices and convolutions are normal with variance 1 / inputs, gains are one, biases zero. What diffusers
    keeps in float32 stays so.
    """
    kept = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if kept & set(name.split(".")) else dtype)
    model.to_empty(device=device)
    generator = torch.Generator(device).manual_seed(SEED)
    for name, parameter in model.named_parameters():
        last = name.rsplit(".", 1)[-1]
        if last == "bias":
            nn.init.zeros_(parameter)
        elif last == "gamma" or (last == "weight" and parameter.ndim == 1):
            nn.init.ones_(parameter)
        else:
            # of a modulation table the width, of a matrix or a convolution what one output sums over
            inputs = parameter.shape[-1] if last == "scale_shift_table" else parameter[0].numel()
            nn.init.normal_(parameter, std=inputs**-0.5, generator=generator)
    return model.eval().requires_grad_(False)


def _rollout(setup: Setup, networks: Networks) -> Rollout:
    entry = setup.entry
    rollout = Rollout(
        networks.transformer, networks.text, setup.spec, setup.schedule, setup.latent_size, [SEED],
        entry.chunk_frames, first_chunk_frames=entry.first_chunk_frames,
        recompute_context=entry.recompute_context,
    )  # fmt: skip
    rollout.set_text(networks.text, networks.negative)
    return rollout


# the floor


def pass_flops(
    transformer: Mapping[str, Any], geometry: CacheGeometry, window: int, text_tokens: int
) -> dict[str, int]:
    """Floating-point operations of one transformer pass over a chunk with a full window, by phase.

    Counted are the products of the blocks: q, k, v, out, cross-attention's q and out, and the feed-forward
    network; attention to the text; attention to the window, the chunk itself included.

    Args:
        transformer: a `CausalWanTransformer3DModel` configuration.
    """
    g, heads = geometry, transformer["num_attention_heads"]
    dim, kv_dim = heads * g.head_dim, g.kv_heads * g.head_dim
    queries = g.batch * g.chunk_frames * g.tokens
    weights = 4 * dim * dim + 2 * dim * kv_dim + 2 * dim * transformer["ffn_dim"]
    return {
        LINEARS: 2 * g.layers * queries * weights,
        CROSS: 4 * g.layers * queries * text_tokens * dim,
        SELF: 4 * g.layers * queries * window * g.tokens * dim,
    }


def matmul_flops_per_s(device: torch.device, dtype: torch.dtype) -> float:
    """Rate of a large square product."""
    n = MATMUL_SIZE[device.type]
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    # several at once, so that waiting for the device is not counted
    together = 4
    return together * 2 * n**3 / median_s(lambda: [a @ b.t() for _ in range(together)], device)


def _floor(
    setup: Setup, passes: Mapping[str, int], phases: Mapping[str, PassProfile] | None, times: Measured
) -> dict[str, Any]:
    """The arithmetic of a chunk at this machine's matrix rate, and where a chunk is farthest above it.

    Phases without products have no floor: what they take could be fused into those that have. Every pass
    counts as one over the full window, also one that builds the context anew.
    """
    config = empty_transformer(setup.entry).config
    flops = pass_flops(config, setup.geometry, setup.spec.window, setup.entry.text_tokens)
    rate = matmul_flops_per_s(setup.device, setup.dtype)
    chunk_s = sum(flops.values()) / rate * sum(passes.values())
    gaps: list[dict[str, Any]] = []
    if phases:
        for name in (*PHASES, GAPS):
            measured = sum(
                passes[kind] * (one.gaps_s if name == GAPS else one.phases_s[name])
                for kind, one in phases.items()
            )
            floor = flops.get(name, 0) / rate * sum(passes.values())
            gaps.append({
                "phase": name,
                "measured_s": rounded(measured),
                "floor_s": rounded(floor),
                "above_s": rounded(measured - floor),
            })  # fmt: skip
    gaps.sort(key=lambda gap: -gap["above_s"])
    return {
        "tflop_per_pass": {name: rounded(value / 1e12) for name, value in flops.items()},
        "matmul_tflops": rounded(rate / 1e12),
        "chunk_s": rounded(chunk_s),
        "transformer_fps": rounded(setup.pixel_frames / chunk_s),
        "measured_to_floor": rounded(statistics.median(times.transformer_s) / chunk_s),
        "largest_gaps_per_chunk": gaps[:3],
    }


# reporting


def _describe(setup: Setup, networks: Networks, compiled: bool) -> dict[str, Any]:
    g = setup.geometry
    return {
        "name": setup.entry.name,
        "parameters": sum(p.numel() for p in networks.transformer.parameters()),
        "cache": str(setup.spec),
        "dtype": str(setup.dtype).removeprefix("torch."),
        "height": setup.height,
        "width": setup.width,
        "chunk_frames": setup.entry.chunk_frames,
        "pixel_frames": setup.pixel_frames,
        "queries": g.chunk_frames * g.tokens,
        "keys": setup.spec.window * g.tokens,
        "guided": setup.guided,
        "recompute_context": setup.entry.recompute_context,
        "compiled": compiled,
    }


def _loop_row(times: Measured, decode_s: Sequence[float], setup: Setup) -> dict[str, Any]:
    transformer_s, decoding_s = statistics.median(times.transformer_s), statistics.median(decode_s)
    return {
        "denoise_s": _spread(times.denoise_s),
        "clean_s": _spread(times.clean_s),
        "transformer_fps": rounded(setup.pixel_frames / transformer_s),
        "end_to_end_fps": rounded(setup.pixel_frames / (transformer_s + decoding_s)),
    }


def _ratios(stock: Measured, vidkv: Measured, decode_s: Sequence[float]) -> dict[str, Any]:
    """Stock time over vidkv's, round by round."""
    pairs = {
        "denoise": (stock.denoise_s, vidkv.denoise_s),
        "clean": (stock.clean_s, vidkv.clean_s),
        "transformer": (stock.transformer_s, vidkv.transformer_s),
        "end_to_end": tuple(
            [a + d for a, d in zip(times.transformer_s, decode_s, strict=True)] for times in (stock, vidkv)
        ),
    }
    return {name: _spread([a / b for a, b in zip(*pair, strict=True)]) for name, pair in pairs.items()}


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {
        "median": rounded(statistics.median(values)),
        "min": rounded(min(values)),
        "max": rounded(max(values)),
    }


def _nbytes(module: nn.Module) -> int:
    return sum(p.nbytes for p in module.parameters())


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _reset_peak(device: torch.device) -> None:
    """Count peaks from here, with nothing reserved that is not in use."""
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def _peak(device: torch.device) -> dict[str, int]:
    """The allocator's peaks since `_reset_peak`; nothing on a CPU, where torch keeps no count."""
    if device.type != "cuda":
        return {}
    return {
        "peak_allocated_bytes": torch.cuda.max_memory_allocated(device),
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(device),
    }


def render(report: Mapping[str, Any]) -> Group:
    """The report as tables for people."""
    from rich.console import Group

    model, memory, first = report["model"], report["memory"], report["first_frame_s"]
    passes = " + ".join(f"{number} {kind}" for kind, number in model["passes"].items())
    compiled = ", compiled blocks" if model["compiled"] else ""
    compiled += ", vidkv's passes as CUDA graphs" if model["graphs"] else ""
    lines = [
        f"{report['hardware']}, torch {report['torch']}, random weights",
        f"{model['name']} ({model['parameters'] / 1e9:.2f} B, {model['dtype']}{compiled}) at "
        f"{model['width']}x{model['height']}, cache {model['cache']}: {model['queries']:,} queries, "
        f"{model['keys']:,} keys",
        f"a chunk: {model['chunk_frames']} latent frames, {model['pixel_frames']} frames, {passes} passes; "
        f"read path {report['read_path']}",
        f"first chunk's pixels on the host after {first['cold']:.3f} s, once warm {first['warm']:.3f} s",
        f"KV {memory['kv_resident_bytes'] / 1e9:.4f} GB (predicted {memory['kv_predicted_bytes'] / 1e9:.4f})",
    ]
    if "peak_allocated_bytes" in memory:
        allocated, reserved = memory["peak_allocated_bytes"], memory["peak_reserved_bytes"]
        lines.append(
            f"peak with weights and decoding: {allocated / 1e9:.2f} GB allocated, "
            f"{reserved / 1e9:.2f} GB reserved"
        )
    parts: list[Any] = [*lines, _loops_table(report), *_overlap_lines(report)]
    if "left_out" in report["stock"]:
        parts.append(f"no stock loop: {report['stock']['left_out']}")
    for name, kinds in report["phases"].items():
        parts.append(_phases_table(name, kinds, report["floor"]))
    return Group(*parts, *_floor_lines(report["floor"]))


def _overlap_lines(report: Mapping[str, Any]) -> Iterator[str]:
    fps = report["vidkv"].get("overlapped_fps")
    if fps:
        yield f"with decoding on a second stream, while the next chunk is denoised: {fps} fps"


def _loops_table(report: Mapping[str, Any]) -> Table:
    from rich.table import Table

    table = Table(f"median of {report['chunks']} chunks, [min-max]")
    for name in ("denoise s", "clean pass s", "decode s", "fps", "fps with decoding", "KV GB", "peak GB"):
        table.add_column(name, justify="right")
    decode = _span(report["decode_s"])
    for name in ("vidkv", "stock"):
        row = report[name]
        if "denoise_s" not in row:
            continue
        held = report["memory"] if name == "vidkv" else row
        peak = held.get("peak_allocated_bytes")
        table.add_row(
            name, _span(row["denoise_s"]), _span(row["clean_s"]), decode if name == "vidkv" else "the same",
            f"{row['transformer_fps']:.2f}", f"{row['end_to_end_fps']:.2f}",
            f"{held['kv_resident_bytes'] / 1e9:.3f}", "" if peak is None else f"{peak / 1e9:.2f}",
        )  # fmt: skip
    if ratios := report["stock_to_vidkv"]:
        clean = _span(ratios["clean"]) if "clean" in ratios else ""
        table.add_row(
            "stock / vidkv", _span(ratios["denoise"]), clean, "",
            _span(ratios["transformer"]), _span(ratios["end_to_end"]),
        )  # fmt: skip
    return table


def _phases_table(name: str, kinds: Mapping[str, Any], floor: Mapping[str, Any]) -> Table:
    from rich.table import Table

    table = Table(f"{name}: ms of a pass")
    for column in (*PHASES, GAPS, "whole"):
        table.add_column(column, justify="right")
    for kind, one in kinds.items():
        parts = one["phases_s"]
        cells = [parts[phase] for phase in (*PHASES, GAPS)] + [one["pass_s"]]
        table.add_row(kind, *(f"{value * 1e3:.3f}" for value in cells))
    flops = floor["tflop_per_pass"]
    least = [flops.get(phase, 0) / floor["matmul_tflops"] * 1e3 for phase in (*PHASES, GAPS)]
    table.add_row("floor", *(f"{value:.3f}" for value in (*least, sum(least))))
    return table


def _floor_lines(floor: Mapping[str, Any]) -> Iterator[str]:
    flops = " + ".join(f"{value:.4g} {name}" for name, value in floor["tflop_per_pass"].items())
    yield (
        f"floor: {flops} TFLOP a pass at {floor['matmul_tflops']:.4g} TFLOP/s (matmul, measured here): "
        f"{floor['chunk_s']:.4g} s a chunk, {floor['transformer_fps']:.4g} fps; vidkv takes "
        f"{floor['measured_to_floor']:.2f} times that"
    )
    for gap in floor["largest_gaps_per_chunk"]:
        yield (
            f"above the floor by {gap['above_s']:.4g} s a chunk: {gap['phase']}, {gap['measured_s']:.4g} s "
            f"against {gap['floor_s']:.4g}"
        )


def _span(spread: Mapping[str, float]) -> str:
    return f"{spread['median']:.3f} [{spread['min']:.3f}-{spread['max']:.3f}]"
