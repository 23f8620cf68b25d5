"""Commands over jobs: `vidkv render`, `vidkv jobs`."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast

import typer

from vidkv.apps.options import (
    FAILED,
    OK,
    SIGNALLED,
    Compiled,
    Json,
    Lora,
    Offload,
    TextWeights,
    Tile,
    Vae,
    Weights,
    emit,
    say,
    scaled,
    tile_size,
)
from vidkv.errors import InputError

if TYPE_CHECKING:
    from vidkv.apps.render import Batch
    from vidkv.jobs.shards import Shard
    from vidkv.jobs.store import Job
    from vidkv.planning import Plan

Devices = Annotated[
    str, typer.Option(help="A worker each: auto, GPU numbers such as 0,1, cpu, or cpu:2 for two on the CPU.")
]
Resume = Annotated[
    str,
    typer.Option(help="exact: goes on bit for bit, from checkpoints. light: close to it, from latents."),
]
Concurrent = Annotated[
    int, typer.Option(min=1, help="Videos that each worker makes by turns, of one model and precision.")
]
Share = Annotated[
    float,
    typer.Option(
        help="GB of each worker's memory for beginnings of videos, so that equal ones are made once."
    ),
]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command()(render)
    app.command()(jobs)
    app.command()(serve)


def render(
    manifest: Annotated[
        Path | None, typer.Argument(help="JSONL, CSV or YAML, one video each; - for JSONL on stdin.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The folder for finished videos.")] = Path("renders"),
    devices: Devices = "auto",
    resume: Resume = "exact",
    checkpoint_every: Annotated[
        float, typer.Option(help="Seconds between checkpoints, at least; more where they are large.")
    ] = 30.0,
    retries: Annotated[int, typer.Option(min=0, help="Attempts after the first.")] = 2,
    concurrent: Concurrent = 1,
    share: Share = 0.0,
    shard: Annotated[
        str | None,
        typer.Option(help="This process's part: INDEX/COUNT from 0, auto (the launcher's), or auto/COUNT."),
    ] = None,
    engine: Annotated[str, typer.Option(help="local, or ray for a cluster.")] = "local",
    actors: Annotated[int | None, typer.Option(min=1, help="Ray actors; by default one per GPU.")] = None,
    address: Annotated[str | None, typer.Option(help="Of a running Ray cluster.")] = None,
    weights: Weights = "full",
    text_weights: TextWeights = None,
    offload: Offload = "text",
    lora: Lora = None,
    vae: Vae = None,
    tile: Tile = None,
    compiled: Compiled = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be made, and what it takes.")
    ] = False,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON Schema of manifest lines.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Make every video of a manifest. Run it again to go on after whatever stopped it.

    Finished videos are OUT/ID.mp4; OUT/index.html shows them all and OUT/report.json tells how it went.
    """
    if schema:
        from vidkv.manifest import manifest_schema

        print(json.dumps(manifest_schema(), indent=2))
        return
    if manifest is None:
        raise InputError("name a manifest: JSONL, CSV or YAML; --schema shows what a line may hold")
    from vidkv.apps import render as rendering
    from vidkv.jobs.checkpoints import Interval
    from vidkv.jobs.run import Options
    from vidkv.jobs.supervisor import pick_devices
    from vidkv.request import EngineSettings

    if engine not in ("local", "ray"):
        raise InputError(f"--engine {engine!r:.40}; choose local or ray")
    if not checkpoint_every > 0:
        raise InputError(f"--checkpoint-every {checkpoint_every}: give a positive number of seconds")
    if engine == "ray" and devices != "auto":
        raise InputError(f"--devices {devices!r:.40}: Ray chooses them; leave it out, or say --actors")
    if engine == "ray" and concurrent > 1:
        raise InputError(f"--concurrent {concurrent}: a Ray actor makes one video at a time; say --actors")
    own = _own_device(shard, devices)
    names = pick_devices(own)
    settings = EngineSettings(
        device=names[0].partition(":")[0] if engine == "local" else "auto", weights=weights,
        text_weights=text_weights, offload=offload, loras=tuple(scaled(text) for text in lora or ()), vae=vae,
        tile=tile_size(tile), compiled=compiled,
    )  # fmt: skip
    options = Options(
        _resume(resume), Interval(every_s=checkpoint_every), concurrent=concurrent,
        shared_bytes=_shared_bytes(share),
    )  # fmt: skip
    batch = rendering.Batch(
        manifest, out, settings, names, options, retries, _shard(shard),
        rendering.RayCluster(address, actors) if engine == "ray" else None,
    )  # fmt: skip
    plans = rendering.plans(batch)
    if dry_run:
        _show_plan(batch, plans, names, as_json)
        return
    report = rendering.render(batch, plans)
    counts = report["counts"]
    text = ", ".join(f"{number} {state}" for state, number in counts.items() if number) or "nothing to do"
    emit(report, as_json, f"{out}: {text}; see {out / 'index.html'}")
    if "signal" in report:
        say("stopped; run the same command again to go on")
        raise typer.Exit(SIGNALLED + report["signal"])
    raise typer.Exit(FAILED if counts["failed"] else OK)


def serve(
    out: Annotated[Path, typer.Option(help="The folder for finished videos.")] = Path("renders"),
    host: Annotated[str, typer.Option(help="Any but the loopback needs a token.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 for any that is free.")] = 8000,
    token_file: Annotated[Path | None, typer.Option(help="File with the secret that requests bear.")] = None,
    devices: Devices = "auto",
    queue: Annotated[int, typer.Option(min=1, help="Unfinished jobs; more are refused with 429.")] = 32,
    resume: Resume = "exact",
    retries: Annotated[int, typer.Option(min=0, help="Attempts after the first.")] = 2,
    concurrent: Concurrent = 1,
    share: Share = 0.0,
    weights: Weights = "full",
    text_weights: TextWeights = None,
    offload: Offload = "text",
) -> None:
    """Take jobs over HTTP (/v1/videos, described at /openapi.json) and do them, until Ctrl-C."""
    from vidkv.apps import serve as serving
    from vidkv.apps.api import ApiLimits
    from vidkv.jobs.run import Options
    from vidkv.jobs.supervisor import pick_devices
    from vidkv.request import EngineSettings

    names = pick_devices(devices)
    number = serving.serve(
        out, host, port, serving.read_token(token_file) if token_file else None, names,
        settings=EngineSettings(
            device=names[0].partition(":")[0], weights=weights, text_weights=text_weights, offload=offload
        ),
        options=Options(_resume(resume), concurrent=concurrent, shared_bytes=_shared_bytes(share)),
        retries=retries, limits=ApiLimits(queue=queue),
        say=lambda url: say(f"serving at {url}"),
    )  # fmt: skip
    raise typer.Exit(SIGNALLED + number if number else OK)


def jobs(
    out: Annotated[Path, typer.Argument(help="The folder that was given to render or serve.")],
    cancel: Annotated[list[str] | None, typer.Option(help="Stop this job; repeatable.")] = None,
    retry: Annotated[
        list[str] | None, typer.Option(help="Queue this failed or cancelled job again; repeatable.")
    ] = None,
    delete: Annotated[
        list[str] | None, typer.Option(help="Forget this job and its video; repeatable.")
    ] = None,
    as_json: Json = False,
) -> None:
    """List the jobs of an output folder; stop, retry or delete some."""
    from vidkv.jobs.store import HOME, JobStore

    if not (out / HOME).is_dir():
        raise InputError(f"{out} holds no jobs; give the folder that was given to render or serve")
    with JobStore(out) as store:
        for id in cancel or ():
            store.cancel(id)
        for id in retry or ():
            store.retry(id)
        for id in delete or ():
            store.delete(id)
        rows = [_row(job) for job in store.jobs()]
    if as_json:
        emit({"jobs": rows}, True, "")
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("id", "state", "chunks", "frames", "prompt", "error")
    for row in rows:
        cells = (row["id"], row["state"], f"{row['done']}/{row['chunks']}", str(row["frames"]), row["prompt"])
        table.add_row(*(Text(cell) for cell in (*cells, row["error"] or "")))
    Console(width=None if sys.stdout.isatty() else 160).print(table, highlight=False)


def _row(job: Job) -> dict[str, Any]:
    return {
        "id": job.id, "state": job.state.value, "done": job.done, "chunks": job.chunks, "frames": job.frames,
        "prompt": job.request["prompt"], "out": job.out, "error": job.error, "attempts": job.attempts,
    }  # fmt: skip


def _resume(name: str) -> Literal["exact", "light"]:
    if name not in ("exact", "light"):
        raise InputError(f"--resume {name!r:.40}; choose exact or light")
    return cast(Literal["exact", "light"], name)


def _shard(text: str | None) -> Shard | None:
    from vidkv.jobs.shards import Shard

    return None if text is None else Shard.choose(text, os.environ)


def _shared_bytes(gigabytes: float) -> int:
    """Of --share.

    Raises:
        InputError: not a size.
    """
    if not 0 <= gigabytes < 1e6:
        raise InputError(f"--share {gigabytes}: give gigabytes, such as 4, or 0 for none")
    return int(gigabytes * 1e9)


def _own_device(shard: str | None, devices: str) -> str:
    """Of processes that a launcher started side by side, each takes the GPU that is its own."""
    import torch

    from vidkv.jobs.shards import local_device

    if devices != "auto" or shard is None or not shard.startswith("auto"):
        return devices
    own = local_device(os.environ, torch.cuda.device_count())
    return devices if own is None else str(own)


def _show_plan(batch: Batch, plans: Sequence[Plan], devices: Sequence[str], as_json: bool) -> None:
    from rich.console import Console

    from vidkv.apps.render import open_store
    from vidkv.apps.render_report import dry_run_table, plan_total

    with open_store(batch) as store:
        table, rows = dry_run_table(plans, store, devices, again=True)
        total = plan_total(rows, store, devices)
    if as_json:
        emit({"jobs": rows, "total": total}, True, "")
    else:
        Console(width=None if sys.stdout.isatty() else 160).print(table, highlight=False)
