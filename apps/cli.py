"""The command line: `vidkv generate | render | jobs | serve | estimate | models | convert | doctor | bench |
eval | train`.

Results go to stdout (one JSON object with `--json`), progress and messages to stderr. Exit codes: 0 done,
1 a check failed, 2 a value or file that cannot be used, 130 and 143 stopped by Ctrl-C and SIGTERM.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from vidkv.apps import jobs_cli
from vidkv.apps.options import (
    FAILED,
    OK,
    SIGNALLED,
    UNUSABLE,
    Cache,
    Compiled,
    Device,
    Height,
    Json,
    KvFormat,
    Lora,
    Model,
    Offload,
    Sink,
    TextWeights,
    Tile,
    Vae,
    Weights,
    Width,
    Window,
    emit,
    say,
    scaled,
    tile_size,
    timed_prompt,
)
from vidkv.errors import VidkvError

if TYPE_CHECKING:
    from vidkv.rollout import Chunk

STARTED = time.perf_counter()

# the base of what typer raises over arguments; some versions use click, others carry a copy of it
USAGE_ERROR: Any = next(
    kind for kind in reversed(typer.BadParameter.__mro__) if hasattr(kind, "format_message")
)

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
bench_app = typer.Typer(no_args_is_help=True, help="Measure cost.")
eval_app = typer.Typer(no_args_is_help=True, help="Measure quality.")
train_app = typer.Typer(no_args_is_help=True, help="Train models.")
jobs_cli.register(app)
app.add_typer(bench_app, name="bench")
app.add_typer(eval_app, name="eval")
app.add_typer(train_app, name="train")


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What to show.")],
    out: Annotated[Path, typer.Option(help="The mp4 to write.")] = Path("video.mp4"),
    seconds: Annotated[float, typer.Option(help="Length.")] = 10.0,
    seed: Annotated[int, typer.Option(help="Same seed, same video.")] = 0,
    model: Model = "bounce",
    kv_format: KvFormat = None,
    window: Window = None,
    sink: Sink = None,
    cache: Cache = None,
    prompt_at: Annotated[
        list[str] | None, typer.Option(help="SECOND:TEXT, another prompt from then on; repeatable.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps instead of the model's own.")] = None,
    height: Height = None,
    width: Width = None,
    device: Device = "auto",
    guidance: Annotated[float | None, typer.Option(help="Guidance scale, 1 for none.")] = None,
    negative: Annotated[str | None, typer.Option(help="What guidance leads away from.")] = None,
    image: Annotated[Path | None, typer.Option(help="A picture to start from.")] = None,
    video: Annotated[Path | None, typer.Option(help="A video to go on from.")] = None,
    switch: Annotated[
        str | None, typer.Option(help="At a new prompt: keep, recache, flush or lerp; else the model's own.")
    ] = None,
    noise: Annotated[str, typer.Option(help="counter, or stock for the stock code's draws.")] = "counter",
    weights: Weights = "full",
    text_weights: TextWeights = None,
    offload: Offload = "text",
    lora: Lora = None,
    vae: Vae = None,
    tile: Tile = None,
    compiled: Compiled = False,
    as_json: Json = False,
) -> None:
    """Turn a sentence into a video.

    The frame rates reported, end_to_end_fps among them, count from when the model has been loaded.
    """
    from vidkv.apps import generate as generating
    from vidkv.planning import plan
    from vidkv.request import EngineSettings, VideoRequest
    from vidkv.segments import check_output

    check_output(out)
    request = VideoRequest.of({
        "prompt": prompt, "schedule": [timed_prompt(text) for text in prompt_at or ()], "seed": seed,
        "seconds": seconds, "model": model, "cache": _cache_changes(cache, kv_format, window, sink),
        "height": height, "width": width, "steps": steps, "guidance": guidance, "negative": negative,
        "image": image, "video": video, "switch": switch, "noise": noise,
    })  # fmt: skip
    settings = EngineSettings(
        device=device, weights=weights, text_weights=text_weights, offload=offload,
        loras=tuple(scaled(text) for text in lora or ()), vae=vae, tile=tile_size(tile), compiled=compiled,
    )  # fmt: skip
    with ProgressLine() as line:
        try:
            result = generating.generate(plan(request, settings), out, line.chunk_done, STARTED)
        except generating.Stopped as stopped:
            line.close()
            say(str(stopped))
            raise typer.Exit(SIGNALLED + stopped.signal) from None
    emit(result, as_json, f"{out}: {result['frames']} frames, {result['end_to_end_fps']} fps end to end")


@app.command()
def estimate(
    model: Annotated[str, typer.Option(help="A model's name.")] = "bounce",
    height: Height = None,
    width: Width = None,
    kv_format: KvFormat = None,
    window: Window = None,
    sink: Sink = None,
    cache: Cache = None,
    batch: Annotated[int, typer.Option(min=1, help="Videos at once.")] = 1,
    weights: Weights = "full",
    text_weights: TextWeights = None,
    offload: Offload = "text",
    card: Annotated[
        list[float] | None, typer.Option(help="Does it fit a card of so many GB? Repeatable.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda, which need not be here.")] = "auto",
    as_json: Json = False,
) -> None:
    """Say what memory a rollout needs and what fits which card, without its weights."""
    from vidkv.apps.estimate import estimate_report, render
    from vidkv.models.registry import known_model
    from vidkv.planning import cache_spec, check_device, compute_dtype, pick_device

    entry = known_model(model)
    check_device(device)
    where = device
    if device == "auto":
        # nobody rolls out the others on a CPU
        where = pick_device(device) if entry.weights else "cuda"
    spec = cache_spec(entry, _cache_changes(cache, kv_format, window, sink), where)
    report = estimate_report(
        entry, spec, where, compute_dtype(where), height, width, batch, weights, text_weights, offload,
        card or (),
    )  # fmt: skip
    if as_json:
        emit(report, True, "")
    else:
        from rich.console import Console

        Console(width=None if sys.stdout.isatty() else 120).print(render(report), highlight=False)


@app.command()
def convert(
    model: Annotated[str, typer.Option(help="A model's name.")],
    files: Annotated[
        list[Path] | None,
        typer.Argument(help="Weights, an index.json or a folder; else looked up in the Hugging Face cache."),
    ] = None,
    base: Annotated[Path | None, typer.Option(help="Folder with text encoder, tokenizer and VAE.")] = None,
    lora: Annotated[Path | None, typer.Option(help="LoRA file to merge.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write; by default where vidkv looks.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the transformer: bf16, fp16 or fp32.")] = "bf16",
    ema: Annotated[
        bool | None, typer.Option("--ema/--no-ema", help="Averaged weights; else as the authors run it.")
    ] = None,
    layout: Annotated[str, typer.Option(help="diffusers, or wan: one file for other tools.")] = "diffusers",
    force: Annotated[bool, typer.Option("--force", help="Replace the folder.")] = False,
    as_json: Json = False,
) -> None:
    """Turn a published checkpoint into a folder that vidkv loads.

    Pickles (.pt, .pth, .bin) are read here alone: in a process apart, as tensors and nothing else.
    """
    from vidkv.apps import convert as converting

    request = converting.Request(tuple(files or ()), model, base, lora, out, dtype, ema, layout, force)
    result = converting.convert(request, say)
    emit(result, as_json, converting.summary(result))


@app.command()
def models(as_json: Json = False) -> None:
    """List the known models, which of them are here, and where the others come from."""
    from rich.console import Console

    from vidkv.apps.models_table import models_report, render

    report = models_report()
    if as_json:
        emit({"models": report}, True, "")
    else:
        Console(width=None if sys.stdout.isatty() else 150).print(render(report), highlight=False)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Check this machine: torch, triton, GPU, PyAV, disk, weights, and the read paths."""
    from rich.console import Console

    from vidkv.apps.doctor import healthy, render, run_checks

    checks = run_checks()
    good = healthy(checks)
    if as_json:
        emit({"healthy": good, "checks": [dataclasses.asdict(check) for check in checks]}, True, "")
    else:
        Console().print(render(checks))
    raise typer.Exit(OK if good else FAILED)


@bench_app.command("rollout")
def bench_rollout(
    chunks: Annotated[
        int | None,
        typer.Option(min=1, help="Chunks: at least 60, by default 1000; with --random-weights by default 6."),
    ] = None,
    formats: Annotated[
        str | None, typer.Option(help="Page formats, with commas; by default fp32,bf16,int8.")
    ] = None,
    model: Model = "bounce",
    random_weights: Annotated[
        bool,
        typer.Option(
            "--random-weights", help="Any known model at full size, beside a loop in the stock style."
        ),
    ] = False,
    window: Window = None,
    sink: Sink = None,
    kv_format: KvFormat = None,
    cache: Cache = None,
    height: Height = None,
    width: Width = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps instead of the model's own.")] = None,
    compiled: Annotated[
        bool | None, typer.Option("--compile/--no-compile", help="torch.compile blocks around attention.")
    ] = None,
    graphs: Annotated[
        bool | None, typer.Option("--graphs/--no-graphs", help="Replay vidkv's passes as CUDA graphs.")
    ] = None,
    baseline: Annotated[bool | None, typer.Option(help="Time the stock loop too; so by default.")] = None,
    profiled: Annotated[
        bool | None, typer.Option("--profile/--no-profile", help="Break a pass down; so by default.")
    ] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Cost and memory per chunk over a long rollout, formats in turn; or speed with --random-weights."""
    choices = {
        "--window": window, "--sink": sink, "--kv-format": kv_format, "--height": height, "--width": width,
        "--steps": steps, "--cache": cache, "--compile": compiled, "--graphs": graphs, "--baseline": baseline,
        "--profile": profiled,
    }  # fmt: skip
    if random_weights:
        from rich.console import Console

        from vidkv.apps.bench_rollout import render, rollout_benchmark

        if formats is not None:
            raise typer.BadParameter("with --random-weights give one --kv-format", param_hint="'--formats'")
        with ProgressLine() as line:
            report = rollout_benchmark(
                model, window, sink, kv_format, height, width, chunks or 6, steps, device, bool(compiled),
                baseline is not False, profiled is not False, bool(graphs), line.step_done,
                _cache_changes(cache, kv_format, window, sink),
            )  # fmt: skip
        if as_json:
            emit(report, True, "")
        else:
            Console(width=None if sys.stdout.isatty() else 160).print(render(report), highlight=False)
        return
    from vidkv.apps.bench import rollout_report, table
    from vidkv.planning import pick_device

    for name, value in choices.items():
        if value is not None:
            raise typer.BadParameter("goes with --random-weights only", param_hint=f"'{name}'")
    if chunks is not None and chunks < 60:
        raise typer.BadParameter(f"{chunks} chunks show no trend; take at least 60", param_hint="'--chunks'")
    names = (formats or "fp32,bf16,int8").split(",")
    with ProgressLine() as line:
        report = rollout_report(model, names, chunks or 1000, pick_device(device), line.step_done)
    emit(report, as_json, table(report))


@bench_app.command("render")
def bench_render(
    prompt: Annotated[str, typer.Option(help="What to show.")] = "a red circle and a blue square bouncing",
    videos: Annotated[int, typer.Option(min=2, help="Videos on either side.")] = 6,
    seconds: Annotated[float, typer.Option(help="Length of each.")] = 20.0,
    model: Model = "bounce",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """What jobs cost beside a bare loop over the pipeline, and what a light resume changes."""
    from vidkv.apps.bench_render import render_report, table

    with ProgressLine() as line:
        report = render_report(model, prompt, videos, seconds, device, line.step_done)
    emit(report, as_json, table(report))


@bench_app.command("attention")
def bench_attention(
    shape: Annotated[
        str | None, typer.Option(help="A model's name; by default wan2.1-1.3b on a GPU, else bounce.")
    ] = None,
    window: Window = None,
    kv_format: Annotated[str, typer.Option(help="Page format: fp32, bf16 or int8.")] = "int8",
    tune: Annotated[bool, typer.Option(help="Every tile of the fused read, not only the good ones.")] = False,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """One layer's attention over a full window: time, error and scratch of every way to read."""
    from vidkv.apps.bench_attention import attention_report, render

    with ProgressLine() as line:
        report = attention_report(shape, window, kv_format, tune, device, line.step_done)
    if as_json:
        emit(report, True, "")
        return
    from rich.console import Console

    console = Console()
    console.width = max(console.width, 140)
    console.print(render(report), highlight=False, markup=False)


@bench_app.command("kernels")
def bench_kernels(
    arch: Annotated[
        list[str] | None,
        typer.Option(help="One such as sm_90; repeatable, by default all known."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Compile every kernel for GPUs that need not be here and show registers, spills and shared memory."""
    from rich.console import Console

    from vidkv.apps.compile_kernels import kernels_report, render

    with ProgressLine() as line:
        report = kernels_report(arch or [], line.step_done)
    if as_json:
        emit(report, True, "")
    else:
        Console(width=None if sys.stdout.isatty() else 120).print(render(report))
    raise typer.Exit(OK if report["ok"] else FAILED)


@eval_app.command("world")
def eval_world(
    model: Model = "bounce",
    rollouts: Annotated[int | None, typer.Option(min=2, help="Paired rollouts; by default 200.")] = None,
    chunks: Annotated[int | None, typer.Option(min=4, help="Chunks per rollout; by default 21.")] = None,
    kv_format: Annotated[str, typer.Option(help="Format compared with the unquantized one.")] = "int8",
    quick: Annotated[bool, typer.Option(help="A few short rollouts, as CI runs them.")] = False,
    controls: Annotated[bool, typer.Option(help="Also run the negative controls and A/A.")] = False,
    guidance: Annotated[
        float | None, typer.Option(help="Guidance scale of the first chunk; 1 for none.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Hold rollouts of the embedded world against what the prompt and physics say."""
    from vidkv.apps.evaluate import evaluate_world, table

    with ProgressLine() as line:
        report = evaluate_world(model, rollouts, chunks, kv_format, quick, controls, line.step_done, guidance)
    emit(report, as_json, table(report))
    if report.get("controls_pass") is False:
        say("a negative control moved nothing, or A/A moved something: these metrics prove nothing")
        raise typer.Exit(FAILED)


@eval_app.command("cache")
def eval_cache(
    spec: Annotated[
        list[str] | None,
        typer.Option(help="Cache settings, e.g. 'int8,keep_newest', over the model's own; repeatable."),
    ] = None,
    model: Model = "bounce",
    seeds: Annotated[int | None, typer.Option(min=2, help="Paired seeds; by default 32.")] = None,
    chunks: Annotated[int | None, typer.Option(min=2, help="Chunks per rollout; by default 30.")] = None,
    quick: Annotated[bool, typer.Option(help="A few short rollouts.")] = False,
    batch: Annotated[int, typer.Option(min=1, help="Videos at once.")] = 8,
    workers: Annotated[int, typer.Option(min=1, help="Processes that read pictures back.")] = 1,
    controls: Annotated[
        bool | None,
        typer.Option("--controls/--no-controls", help="Negative controls and A/A; by default unless quick."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for report.json, report.md and pareto.png.")
    ] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Hold caches against the model's own: fidelity, world, what comes back, bytes and time."""
    from vidkv.apps.cache_report import table
    from vidkv.apps.evaluate_cache import Options, evaluate_cache

    with ProgressLine() as line:
        report = evaluate_cache(
            Options(tuple(spec or ()), model, seeds, chunks, quick, device, batch, workers, controls, out),
            line.step_done,
        )
    emit(report, as_json, table(report))
    if report.get("controls_pass") is False:
        say("a negative control moved nothing, or A/A moved something: these numbers prove nothing")
        raise typer.Exit(FAILED)


@eval_app.command("heads")
def eval_heads(
    model: Model = "bounce",
    seeds: Annotated[int | None, typer.Option(min=2, help="Videos; by default 16.")] = None,
    chunks: Annotated[int | None, typer.Option(min=2, help="Chunks of each; by default 12.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Videos at once.")] = 8,
    device: Device = "auto",
    write: Annotated[
        bool, typer.Option("--write", help="Keep it beside the weights, for --cache local_heads=N.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Measure which heads read the history, and what it costs to take it from those that read least."""
    from vidkv.apps.head_shares import Options, evaluate_heads, table

    with ProgressLine() as line:
        report = evaluate_heads(Options(model, seeds, chunks, batch, device, write), line.step_done)
    emit(report, as_json, table(report))
    if not report["control_passes"]:
        say("losing the heads that read most was no worse than losing those that read least: no ranking")
        raise typer.Exit(FAILED)


@train_app.command("bounce")
def train_bounce(
    out: Annotated[Path, typer.Option(help="Folder for checkpoints, curve and the finished pipeline.")],
    world: Annotated[str, typer.Option(help="narrow or wide.")] = "wide",
    recipe: Annotated[str, typer.Option(help="gpu or cpu: batch sizes and stage lengths.")] = "gpu",
    minutes: Annotated[float, typer.Option(help="Budget of all stages together.")] = 25.0,
    init: Annotated[Path | None, typer.Option(help="A pipeline folder to start from.")] = None,
    as_json: Json = False,
) -> None:
    """Train the embedded world model; run again to go on from the last checkpoint."""
    from vidkv.apps.train.bounce import train

    emit(train(out, world, recipe, minutes, init), as_json, f"{out / 'pipeline'}: done")


class ProgressLine:
    """What is going on, on stderr: one changing line on a terminal, a plain line now and then elsewhere."""

    every_s = 5.0

    def __init__(self) -> None:
        self.terminal = sys.stderr.isatty()
        self.last = 0.0
        self.open = False

    def __enter__(self) -> ProgressLine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def chunk_done(self, chunk: Chunk, chunks: int, frames: int, elapsed_s: float) -> None:
        left = elapsed_s / (chunk.index + 1) * (chunks - chunk.index - 1)
        self._show(
            f"chunk {chunk.index + 1}/{chunks}  {frames / elapsed_s:.1f} fps  ETA {left:.0f} s  "
            f"KV {chunk.stats.kv_bytes / 1e6:.2f} MB",
            last=chunk.index + 1 == chunks,
        )

    def step_done(self, done: int, total: int, what: str) -> None:
        self._show(f"{what}  {done}/{total}", last=done == total)

    def close(self) -> None:
        if self.open:
            sys.stderr.write("\n")
            self.open = False

    def _show(self, text: str, last: bool) -> None:
        now = time.monotonic()
        if not last and now - self.last < (0.1 if self.terminal else self.every_s):
            return
        self.last = now
        sys.stderr.write(f"\r\x1b[K{text}" if self.terminal else f"{text}\n")
        sys.stderr.flush()
        self.open = self.terminal


def _cache_changes(
    cache: str | None, kv_format: str | None, window: int | None, sink: int | None
) -> dict[str, Any]:
    """Settings that the command line names, the special options over `--cache`."""
    from vidkv.cache import CacheSpec

    changes: dict[str, Any] = {}
    if cache:
        spec = CacheSpec.parse(cache)
        changes |= {name: getattr(spec, name) for name in spec.model_fields_set}
    given = {"format": kv_format, "window": window, "sink": sink}
    return changes | {name: value for name, value in given.items() if value is not None}


def _say_usage(error: Any) -> None:
    """What is wrong with the arguments in one line, or the help where there are none."""
    from pydantic import ValidationError

    # a class that typer does not export, and that older versions lack
    if type(error).__name__ == "NoArgsIsHelpError":
        # where rich shows help it has done so already, and the message is empty
        if error.format_message():
            error.show()
        return
    message = " ".join(error.format_message().split()).removesuffix(".")
    if isinstance(error.__cause__, ValidationError):
        message += f", got {error.__cause__.errors()[0]['input']!r:.60}"
    context = getattr(error, "ctx", None)
    say(f"{message}; see {context.command_path if context else 'vidkv'} --help")


def _prepare() -> None:
    """Libraries' bars and notices would drown the progress line; errors still come through."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    # beside other work, threads that spin at OpenMP's barriers cost most of the speed
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # some, such as torchao, set levels of their own when they are imported
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")


def main() -> None:
    """Console script."""
    _prepare()
    try:
        code = app(prog_name="vidkv", standalone_mode=False)
    except USAGE_ERROR as error:
        _say_usage(error)
        code = UNUSABLE
    except VidkvError as error:
        say(str(error))
        code = UNUSABLE
    except (KeyboardInterrupt, typer.Abort):
        say("stopped")
        code = SIGNALLED + 2
    sys.exit(code)


if __name__ == "__main__":
    main()
