"""Files, requests and addresses that somebody made to do harm."""

from __future__ import annotations

import asyncio
import io
import json
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch

from tests.faults.hooks import working
from tests.faults.kills import ROOT, environment
from tests.faults.oracle import (
    OFTEN,
    PROMPT,
    Counts,
    References,
    check_jobs,
    fresh,
    tiny_model,
    wait_end,
    wait_for,
)
from vidkv.errors import VidkvError
from vidkv.jobs.store import JobStore
from vidkv.planning import load_pipeline, plan
from vidkv.request import VideoRequest

MOST_MESSAGE = 1_000


# ---------------------------------------------------------------------- checkpoints


def checkpoints(count: int, seed: int, folder: Path) -> Counts:
    """Pickles that call functions, broken safetensors, folders with code: one line, and nothing runs."""
    draw, counts = random.Random(seed), Counts()
    own = fresh(folder / f"checkpoints-{seed}")
    makers = [*_pickled(), *_folders()]
    if count < len(makers):
        makers = draw.sample(makers, count)
    for number in range(count):
        told, attack = makers[number % len(makers)]
        place = fresh(own / str(number))
        canary = place / "canary"
        careless = {"PYTHONPATH": str(place)}
        counts.injections += 1
        try:
            with mock.patch.dict(os.environ, careless):
                attack(place, canary, folder / "shared", draw)
            counts.measure("accepted", number)
        except VidkvError as error:
            _check_line(error, told, counts)
        except Exception as error:
            counts.fail(f"{told}: {type(error).__name__}: {error}")
        if canary.exists():
            counts.fail(f"{told}: its code has run")
    return counts


Attack = Callable[[Path, Path, Path, random.Random], None]


def _check_line(error: VidkvError, told: str, counts: Counts) -> None:
    text = str(error)
    if "\n" in text or not 0 < len(text) < MOST_MESSAGE or "Traceback" in text:
        counts.fail(f"{told}: the error is no readable line: {text[:200]!r}")


def _pickled() -> Iterator[tuple[str, Attack]]:
    """What `vidkv convert` reads pickles with, on payloads in several containers."""
    from tests.models.checkpoints.test_pickles import PAYLOADS, script

    def attack(name: str, container: str) -> Attack:
        def run(place: Path, canary: Path, shared: Path, draw: random.Random) -> None:
            from vidkv.models.checkpoints.pickles import unpickle

            script(canary)
            path = place / "evil.pt"
            value = {"generator": {"x": torch.zeros(2)}, "evil": PAYLOADS[name](canary)}
            _contain(container, path, value)
            (place / "out").mkdir()
            unpickle(path, place / "out")

        return run

    for name in PAYLOADS:
        yield f"{name} in a zip", attack(name, "zip")
    for container in ("old", "bare", "tar", "tampered"):
        yield f"os.mkdir in {container}", attack("os.mkdir", container)


def _contain(container: str, path: Path, value: object) -> None:
    if container == "zip":
        torch.save(value, path)
    elif container == "old":
        torch.save(value, path, _use_new_zipfile_serialization=False)
    elif container == "bare":
        path.write_bytes(pickle.dumps({"x": value["evil"]}, protocol=2))  # type: ignore[index]
    elif container == "tar":
        payload = pickle.dumps({"x": value["evil"]}, protocol=2)  # type: ignore[index]
        with tarfile.open(path, "w") as tar:
            for name in ("sys_info", "pickle", "storages", "tensors"):
                member = tarfile.TarInfo(name)
                member.size = len(payload)
                tar.addfile(member, io.BytesIO(payload))
    else:
        whole = io.BytesIO()
        torch.save({"x": torch.zeros(2)}, whole)
        payload = pickle.dumps({"x": value["evil"]}, protocol=2)  # type: ignore[index]
        with zipfile.ZipFile(whole) as old, zipfile.ZipFile(path, "w") as new:
            for name in old.namelist():
                new.writestr(name, payload if name.endswith("data.pkl") else old.read(name))
            new.writestr("../canary", "a zip that climbs out")


def _folders() -> Iterator[tuple[str, Attack]]:
    """Model folders that a request may name."""

    def attack(spoil: Callable[[Path, Path], None], harmless: bool = False) -> Attack:
        def run(place: Path, canary: Path, shared: Path, draw: random.Random) -> None:
            model = place / "model"
            shutil.copytree(tiny_model(shared), model)
            spoil(model, canary)
            request = VideoRequest.of(
                {"prompt": PROMPT, "seconds": 1.0, "model": str(model), "height": 32, "width": 48}
            )
            load_pipeline(plan(request))
            if not harmless:
                raise AssertionError("it was loaded")

        return run

    for name in ("header of 2^60 bytes", "header longer than the file", "header is a list",
                 "header is not JSON",
                 "overlapping offsets", "offsets beyond the file", "negative offsets", "unknown type",
                 "sizes that do not fit", "empty file"):  # fmt: skip
        yield f"safetensors: {name}", attack(_broken_safetensors(name))
    yield "a pickle named .bin", attack(_pickle_instead(".bin"))
    yield "a pickle named .safetensors", attack(_pickle_instead(".safetensors"))
    yield "auto_map", attack(_auto_map, harmless=True)
    yield "a class of its own", attack(_own_class)
    yield "custom pipeline", attack(_custom_pipeline, harmless=True)


def _weights(model: Path) -> Path:
    return next((model / "transformer").glob("*.safetensors"))


def _broken_safetensors(how: str) -> Callable[[Path, Path], None]:
    def spoil(model: Path, canary: Path) -> None:
        path = _weights(model)
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
        first, second = [name for name in header if name != "__metadata__"][:2]
        if how == "header of 2^60 bytes":
            path.write_bytes((2**60).to_bytes(8, "little") + data[8:])
            return
        if how == "header longer than the file":
            path.write_bytes((len(data) * 2).to_bytes(8, "little") + data[8:])
            return
        if how == "empty file":
            path.write_bytes(b"")
            return
        if how == "header is a list":
            header = [header]
        elif how == "overlapping offsets":
            header[second]["data_offsets"] = header[first]["data_offsets"]
        elif how == "offsets beyond the file":
            header[first]["data_offsets"] = [n + 2**40 for n in header[first]["data_offsets"]]
        elif how == "negative offsets":
            header[first]["data_offsets"] = [-8, 8]
        elif how == "unknown type":
            header[first]["dtype"] = "F33"
        elif how == "sizes that do not fit":
            header[first]["shape"] = [2**31, 2**31]
        text = b"{" * 50 if how == "header is not JSON" else json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + body)

    return spoil


def _pickle_instead(suffix: str) -> Callable[[Path, Path], None]:
    from tests.models.checkpoints.test_pickles import Call

    def spoil(model: Path, canary: Path) -> None:
        path = _weights(model)
        path.unlink()
        torch.save({"x": Call(os.mkdir, str(canary))}, path.with_suffix(suffix))

    return spoil


def _evil_module(folder: Path, canary: Path) -> None:
    code = f"open({str(canary)!r}, 'w').close()\nclass Evil:\n    pass\n"
    for name in ("evil.py", "__init__.py", "modeling_evil.py", "pipeline.py"):
        (folder / name).write_text(code)


def _auto_map(model: Path, canary: Path) -> None:
    for part in ("transformer", "text_encoder", "vae", "tokenizer"):
        _evil_module(model / part, canary)
        for name in ("config.json", "tokenizer_config.json"):
            path = model / part / name
            if path.exists():
                config = json.loads(path.read_text())
                evil = {
                    f"Auto{kind}": "evil.Evil"
                    for kind in ("Config", "Model", "Tokenizer", "ModelForCausalLM")
                }
                path.write_text(json.dumps(config | {"auto_map": evil}))


def _own_class(model: Path, canary: Path) -> None:
    _evil_module(model, canary)
    _evil_module(model / "transformer", canary)
    path = model / "model_index.json"
    index = json.loads(path.read_text())
    index["transformer"] = ["evil", "Evil"]
    path.write_text(json.dumps(index))
    config = model / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"_class_name": "Evil"}))


def _custom_pipeline(model: Path, canary: Path) -> None:
    _evil_module(model, canary)
    path = model / "model_index.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"custom_pipeline": "pipeline", "trust_remote_code": True})
    )


# ---------------------------------------------------------------------- media, manifests, requests


def media(count: int, seed: int, folder: Path) -> Counts:
    """Damaged and hostile pictures and videos, see `media`."""
    from tests.faults.media import corrupt_media, try_media

    counts, own = Counts(), fresh(folder / f"media-{seed}")
    for path in corrupt_media(own, count, seed):
        counts.injections += 1
        begun = time.monotonic()
        try:
            try_media(path)
        except Exception as error:
            counts.fail(f"{path.name}: {type(error).__name__}: {error}")
        took = time.monotonic() - begun
        if took > 60:
            counts.fail(f"{path.name}: it took {took:.0f} s")
    return counts


def manifests(count: int, seed: int, folder: Path) -> Counts:
    """Random manifests, see `manifests`."""
    from tests.faults.manifests import fuzz_manifests

    counts, own = Counts(), fresh(folder / f"manifests-{seed}")
    try:
        fuzz_manifests(count, seed, own)
        counts.injections = count
    except Exception as error:
        counts.fail(f"seed {seed}: {type(error).__name__}: {error} {getattr(error, '__notes__', '')}")
    return counts


def requests(count: int, seed: int, folder: Path) -> Counts:
    """Random HTTP requests, see `requests`."""
    from tests.faults.requests import AsgiClient, fuzz_requests
    from vidkv.apps.api import ApiLimits, create_app
    from vidkv.request import EngineSettings

    counts = Counts()
    with JobStore(fresh(folder / f"requests-{seed}")) as store:
        app = create_app(store, settings=EngineSettings(device="cpu"), token=None, limits=ApiLimits())
        with AsgiClient(app) as client:
            try:
                statuses = fuzz_requests(count, seed, client)
                counts.injections = sum(statuses.values())
            except Exception as error:
                counts.fail(f"seed {seed}: {type(error).__name__}: {error}")
    return counts


def payloads(count: int, seed: int, folder: Path) -> Counts:
    """Every route and field with paths that climb out and addresses to fetch: the API's own tests."""
    from tests.apps.test_api import TRAVERSALS, ssrf

    counts = Counts()
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/apps/test_api.py",
         "-k", "TestTraversal or TestSsrf", "-n", "0"],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    passed = re.search(r"(\d+) passed", done.stdout)
    if done.returncode or passed is None:
        counts.fail(done.stdout[-300:])
    else:
        counts.injections = len(set(TRAVERSALS)) + len(set(ssrf(1)))
    return counts


# ---------------------------------------------------------------------- overload


CAP = 32


def overload(count: int, seed: int, folder: Path) -> Counts:
    """POSTs at once while a worker renders: the queue takes 32, the others are told when to come again.

    The queue counts unfinished jobs: 31 fit beside the one that runs, or 32 if that has ended.
    """
    from dataclasses import replace

    from tests.faults.requests import Answer, AsgiClient
    from vidkv.apps.api import ApiLimits, create_app
    from vidkv.request import EngineSettings

    counts = Counts()
    shared = folder / "shared"
    root = fresh(folder / f"overload-{seed}")
    busy = VideoRequest(prompt=PROMPT, seconds=5.0, seed=1, cache={"format": "fp32"}, id="busy")
    reference = References(shared).of(busy)
    slow: list[float] = []
    with JobStore(root) as store:
        limits = replace(ApiLimits(), queue=CAP)
        app = create_app(store, settings=EngineSettings(device="cpu"), token=None, limits=limits)
        with AsgiClient(app) as client, working(store, OFTEN) as worker:
            store.submit(busy)
            wait_for(lambda: store.get("busy").done, "the first chunk of the job that keeps a worker busy")
            bodies = [json.dumps({"prompt": PROMPT, "seconds": 60, "seed": n}).encode() for n in range(count)]

            async def one(body: bytes) -> Answer:
                begun = time.monotonic()
                answer = await client.send("POST", "/v1/videos", body, [("content-type", "application/json")])
                slow.append(time.monotonic() - begun)
                return answer

            async def flood() -> list[Answer]:
                return await asyncio.gather(*(one(body) for body in bodies))

            answers = client.run(flood())
            ended = store.get("busy").ended
            accepted = [answer for answer in answers if answer.status == 200]
            refused = [answer for answer in answers if answer.status == 429]
            counts.injections = len(answers)
            if (
                len(accepted) not in ((CAP,) if ended else (CAP - 1,))
                or len(accepted) + len(refused) != count
            ):
                counts.fail(
                    f"{len(accepted)} accepted, {len(refused)} refused of {count}; busy ended: {ended}"
                )
            if not all(int(answer.headers.get("retry-after", 0)) >= 1 for answer in refused):
                counts.fail("an answer 429 does not say when to come again")
            for answer in accepted:
                store.cancel(answer.json()["id"])
            wait_end(store, "busy", "the end of the job that runs")
            del worker
        slow.sort()
        counts.measure("reply_p99_s", slow[int(0.99 * len(slow))])
        for job in store.jobs():
            if job.id != "busy":
                wait_end(store, job.id, "the end of a cancelled job")
                store.delete(job.id)
        check_jobs(store, {"busy": reference}, counts)
    return counts
