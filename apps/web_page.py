"""The page at `/`: a form by Gradio over the service that answers HTTP, and elements that watch its jobs.

No video is made in an event of the page. Generate puts a job into the store as POST /v1/videos would, and
everything else on the page is a view of jobs over HTTP: closing, reloading or losing it changes nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import gradio as gr
from fastapi import FastAPI
from fastapi.responses import FileResponse
from gradio.themes import Base
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.routing import BaseRoute, Match, Mount
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vidkv.apps.api import ApiLimits, Refused, Service, installed
from vidkv.apps.compare import queue_pair
from vidkv.apps.steering import estimate
from vidkv.apps.web_form import (
    CACHE_FIELDS,
    CUSTOM,
    ENDLESS,
    FIELDS,
    LENGTHS,
    OTHER,
    OWN_SIZE,
    WORDS,
    escaped,
    form_of,
    further,
    model_choices,
    model_help,
    new_id,
    preset_of,
    presets,
    size_text,
    sizes,
    values_of,
)
from vidkv.cache import CacheSpec
from vidkv.cache.formats import FORMATS
from vidkv.cache.policies import POLICIES
from vidkv.errors import VidkvError
from vidkv.jobs.store import QueueFull
from vidkv.models.bounce.prompts import EXAMPLES
from vidkv.models.registry import MODELS
from vidkv.planning import pick_device

WEB = Path(__file__).resolve().parent / "web"
TYPES = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml", ".png": "image/png"}
OWN_PATHS = ("/v1/", "/page/")
"""Below these the page answers nothing: a wrong address is an error of the API, not one of Gradio."""
CLOSED = (
    "/monitoring", "/gradio_api/deep_link", "/gradio_api/proxy", "/gradio_api/stream",
    "/gradio_api/file=http", "/gradio_api/file/", "/gradio_api/process_recording",
    "/gradio_api/component_server", "/gradio_api/vibe", "/gradio_api/undo-vibe", "/gradio_api/run-history",
    "/gradio_api/dev", "/gradio_api/profiling",
)  # fmt: skip
"""Routes of Gradio that the page does not need; some of them fetch what a client names."""
UPLOAD_PATH = "/gradio_api/upload"
FORM_BYTES = 2**16
"""Of a form around a file."""
KINDS = [".png", ".jpg", ".jpeg", ".webp", ".mp4", ".mov", ".mkv", ".webm"]
EXAMPLE_NAMES = ("Two shapes bounce", "Behind a bar", "The camera pans", "It turns blue")
"""Short for `EXAMPLES`, in their order."""
UNUSED_S = 3600
"""Age at which a file that was chosen in the form and its events have done with is deleted."""
COPY_BYTES = 2**20
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' blob:; worker-src 'self' blob:; font-src 'self' data:; "
    "base-uri 'self'; form-action 'self'; frame-ancestors 'none'; object-src 'none'"
)
HEAD = """
<title>vidkv</title>
<meta name="color-scheme" content="light dark">
<meta name="description" content="Long video, steered while it is made">
<link rel="icon" type="image/svg+xml" href="/page/icon.svg">
<link rel="stylesheet" href="/page/page.css">
<script type="module" src="/page/page.js"></script>
"""
HEADER = """
<header class="vk-top">
  <img src="/page/icon.svg" alt="" width="30" height="30">
  <h1>vidkv</h1>
  <p>Long video, steered while it is made</p>
  <vidkv-health></vidkv-health>
  <button type="button" id="vk-help" class="vk-button ghost icon" aria-label="Keyboard shortcuts"
    title="Keyboard shortcuts (?)">?</button>
</header>
"""


def mount(app: FastAPI, service: Service) -> None:
    """Add the page and what it loads. Call it last: it answers everything that no other route does."""
    names = {path.name: TYPES[path.suffix] for path in sorted(WEB.iterdir()) if path.suffix in TYPES}

    @app.get("/page/{name}", include_in_schema=False)
    def get_part(name: str) -> FileResponse:
        if name not in names:
            raise Refused(404, "not_found", "there is no such part of the page", "name")
        return FileResponse(WEB / name, media_type=names[name], headers={"Cache-Control": "no-cache"})

    # Gradio asks for a running loop and otherwise leaves one of its own behind
    asyncio.run(_add_gradio(app, service))
    mounted = cast(Mount, app.router.routes.pop())
    app.router.routes.append(
        cast(BaseRoute, Rest("/", Shell(mounted.app, HEAD, service.limits, uploads_of(service))))
    )


def uploads_of(service: Service) -> Path:
    """Where files lie that were chosen in the form."""
    return service.store.home.resolve() / "page"


async def _add_gradio(app: FastAPI, service: Service) -> None:
    # read whenever a part of a page is made, which Gradio does anew for every session
    os.environ["GRADIO_TEMP_DIR"] = str(uploads_of(service))
    gr.mount_gradio_app(
        app, build(service), path="/", footer_links=[], run_history=False, ssr_mode=False, show_error=True,
        max_file_size=service.limits.upload_bytes, theme=theme(), pwa=False,
    )  # fmt: skip


class Rest(Mount):
    """Everything that is not below `OWN_PATHS`."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        if scope["type"] == "http" and scope["path"].startswith((*OWN_PATHS, *CLOSED)):
            return Match.NONE, {}
        return super().matches(scope)


class Shell:
    """Puts the page's own head into Gradio's first answer, where it works before anything is drawn, and lets
    through only what the form sends: uploads within limits, and events that name no other files.

    Args:
        head: HTML.
        uploads: where files lie that were uploaded.
    """

    def __init__(self, app: ASGIApp, head: str, limits: ApiLimits, uploads: Path) -> None:
        self.app, self.head, self.limits, self.uploads = app, head.encode(), limits, uploads
        self.receiving = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST":
            await self._post(scope, receive, send)
            return
        if scope["type"] != "http" or scope["path"] != "/":
            await self.app(scope, receive, send)
            return
        # a body that is to be changed must not be compressed
        kept = [(name, value) for name, value in scope["headers"] if name != b"accept-encoding"]
        start: Message = {}
        body = bytearray()

        async def collect(message: Message) -> None:
            nonlocal start
            if message["type"] == "http.response.start":
                start = message
            if message["type"] != "http.response.body":
                return
            body.extend(message.get("body", b""))
            if message.get("more_body"):
                return
            await self._answer(start, bytes(body), send)

        await self.app({**scope, "headers": kept}, receive, collect)

    async def _post(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Small bodies, and few uploads at a time, none larger in all than one file may be.

        Raises:
            Refused: it is not taken.
        """
        upload = scope["path"].startswith(UPLOAD_PATH)
        most = self.limits.upload_bytes if upload else self.limits.body_bytes
        length = Headers(scope=scope).get("content-length", "")
        if not length.isdecimal():
            raise Refused(411, "no_length", "send Content-Length")
        if int(length) > most + FORM_BYTES:
            raise Refused(413, "too_large", f"the body has more than {most:,} bytes; send less")
        if not upload:
            await self.app(scope, await self._checked(scope, receive), send)
            return
        if self.receiving >= self.limits.uploads:
            raise Refused(429, "too_many_uploads", f"{self.receiving} uploads are under way", retry_s=5)
        self.receiving += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self.receiving -= 1

    async def _checked(self, scope: Scope, receive: Receive) -> Receive:
        """The same body, of which Gradio would copy or fetch any file or address that it names.

        Raises:
            Refused: it is no JSON, or names what was not uploaded here.
        """
        body = await Request(scope, receive).body()
        try:
            names = _paths_in(json.loads(body or b"null"))
        except (ValueError, RecursionError):
            raise Refused(400, "not_json", "the body is no JSON that can be read") from None
        for name in names:
            if not _lies_in(self.uploads, name):
                raise Refused(
                    422, "invalid_media", "a file that was not uploaded here was named; choose it in the form"
                )
        told = False

        async def again() -> Message:
            nonlocal told
            if told:
                return await receive()
            told = True
            return {"type": "http.request", "body": body, "more_body": False}

        return again

    async def _answer(self, start: Message, body: bytes, send: Send) -> None:
        if Headers(raw=start["headers"]).get("content-type", "").startswith("text/html"):
            body = body.replace(b"</head>", self.head + b"</head>", 1)
            headers = MutableHeaders(raw=start["headers"])
            headers["Content-Length"] = str(len(body))
            headers["Content-Security-Policy"] = POLICY
            headers["Referrer-Policy"] = "no-referrer"
            headers["Cache-Control"] = "no-store"
        await send(start)
        await send({"type": "http.response.body", "body": body})


def _paths_in(value: Any) -> Iterator[Any]:
    """What stands under `path` anywhere in it: Gradio's files are objects that have one."""
    left = [value]
    while left:
        found = left.pop()
        if isinstance(found, dict):
            if "path" in found:
                yield found["path"]
            left.extend(found.values())
        elif isinstance(found, list):
            left.extend(found)


def _lies_in(folder: Path, name: Any) -> bool:
    """Whether it is a path that leads there, by whatever links."""
    try:
        return isinstance(name, str) and folder in Path(name).resolve().parents
    except (ValueError, OSError, RuntimeError):
        return False


class Page:
    """What the form's events do.

    Attributes:
        device: where videos are made; it decides the exact format of the cache.
    """

    def __init__(self, service: Service) -> None:
        self.service = service
        self.uploads = uploads_of(service)
        # each decodes in a process of its own, up to gigabytes large
        self.decoding = threading.BoundedSemaphore(service.limits.decoders)
        self.device = pick_device(service.settings.device)

    def create(self, *given: Any) -> str:
        """Queue what the form says; returns a message, which opens the video on the stage."""
        *fields, upload = given
        form = dict(zip(FIELDS, fields, strict=True))
        try:
            values = values_of(form, self.device)
            values["id"] = new_id(values["prompt"])
            self.require_workers()
            job = self._submit(values, upload)
        except (Refused, VidkvError) as error:
            return _refusal(self.service, error)
        name = escaped(job.id)
        return _message("Queued. It goes on if you close this page.", "yes") + (
            f'<vidkv-created job="{name}"></vidkv-created>'
        )

    def _submit(self, values: dict[str, Any], upload: str | None) -> Any:
        if not upload:
            return self.service.create(values)
        if not _lies_in(self.uploads, upload):
            raise Refused(422, "invalid_media", "a file that was not uploaded here was named", "upload")
        incoming = self.service.uploads.receive(self.service.limits.upload_bytes)
        try:
            with open(upload, "rb") as file:
                while piece := file.read(COPY_BYTES):
                    incoming.write(piece)
            with self.decoding:
                return self.service.create(values, incoming)
        finally:
            incoming.discard()

    def weigh(self, *given: Any) -> list[str]:
        """What the form would take here; and no message any more, because it was about another form."""
        *fields, _ = given
        form = dict(zip(FIELDS, fields, strict=True))
        try:
            values = values_of(form, self.device)
        except VidkvError as error:
            return [_verdict("no", self.service.hide(str(error))), ""]
        told = None
        if not values["prompt"].strip():
            fault = "Write a prompt first."
        elif form["model"] not in installed():
            fault = f"{form['model']} has no weights on this machine yet; see above what it needs."
        else:
            try:
                told = estimate(self.service, self.service.read(values).request)
            except (Refused, VidkvError) as error:
                fault = self.service.hide(str(error))
        draft = f'<vidkv-draft values="{escaped(json.dumps(values))}"></vidkv-draft>'
        if told is None:
            return [draft + _verdict("no", fault), ""]
        numbers = {
            "KV cache": size_text(told.kv_bytes),
            "Peak": size_text(told.peak_bytes),
            "Free here": size_text(told.free_bytes),
            "Chunks": "no end" if values.get("until_stopped") else str(told.chunks),
        }
        share = told.peak_bytes / told.free_bytes if told.free_bytes else None
        return [draft + _verdict("yes" if told.ok else "no", told.verdict, numbers, share), ""]

    def chosen_preset(self, preset: str, model: str) -> list[Any]:
        """The words about a preset, and the advanced fields as it sets them."""
        spec = presets(MODELS[model], self.device).get(preset)
        fields = [gr.skip() if spec is None else getattr(spec, name) for name in CACHE_FIELDS]
        return [_words(preset), *fields, gr.skip() if spec is None else ""]

    def chosen_model(self, model: str, preset: str) -> list[Any]:
        """What depends on the model."""
        entry = MODELS[model]
        preset = preset if preset in presets(entry, self.device) else "Balanced"
        return [
            model_help(model, self.device),
            gr.Dropdown(choices=sizes(entry), value=OWN_SIZE),
            preset,
            *self.chosen_preset(preset, model),
        ]

    def changed_cache(self, model: str, *given: Any) -> list[Any]:
        """The preset that the advanced fields amount to, and its words."""
        *cache, more = given
        spec = dict(zip(CACHE_FIELDS, cache, strict=True))
        name = CUSTOM
        with contextlib.suppress(VidkvError, TypeError, ValueError):
            whole = {key: int(value) if key in ("window", "sink") else value for key, value in spec.items()}
            name = preset_of(CacheSpec.of(whole | further(more)), MODELS[model], self.device)
        return [name, _words(name)]

    def caches(self, model: str) -> list[tuple[str, str]]:
        """(text, settings on one line) of the presets of a model."""
        return [(f"{name} – {spec}", str(spec)) for name, spec in presets(MODELS[model], self.device).items()]

    def chosen_pair(self, model: str) -> list[Any]:
        """The caches to choose from."""
        caches = self.caches(model)
        return [
            gr.Dropdown(choices=caches, value=caches[-1][1]),
            gr.Dropdown(choices=caches, value=caches[2][1]),
        ]

    def compare(self, prompt: str, length: str, seed: float | None, model: str, a: str, b: str) -> str:
        """Queue two videos that differ in their cache; returns a message, which shows them."""
        values = {
            "prompt": prompt or "",
            "model": model,
            "seconds": LENGTHS[length],
            "a": a or "",
            "b": b or "",
        }
        values |= {"seed": int(seed)} if seed is not None else {}
        values["id"] = new_id(f"compare {prompt}")
        try:
            self.require_workers()
            both = queue_pair(self.service, values, None)
        except (Refused, VidkvError) as error:
            return _refusal(self.service, error)
        names = [escaped(video.id) for video in (both.a, both.b)]
        return (
            _message("Both are queued.", "yes")
            + f'<vidkv-paired a="{names[0]}" b="{names[1]}"></vidkv-paired>'
        )

    def require_workers(self) -> None:
        """Say no where a job would wait for nobody.

        Raises:
            Refused: no videos are being made.
        """
        if (why := self.service.ailing()) is not None:
            raise Refused(503, "no_workers", f"no videos are being made: {why}")

    def fill(self, text: str | None) -> list[Any]:
        """All fields as an earlier request had them, and what depends on the model; without one, nothing."""
        nothing = [gr.skip()] * (len(FIELDS) + 3)
        try:
            form = form_of(json.loads(text or ""), self.device)
        except (ValueError, TypeError, KeyError, AttributeError, VidkvError):
            return nothing
        entry = MODELS[form["model"]]
        form["size"] = gr.Dropdown(choices=sizes(entry), value=form["size"])
        form["seconds"] = gr.Number(value=form["seconds"], visible=form["length"] == OTHER)
        return [
            *(form[name] for name in FIELDS),
            _words(form["preset"]),
            model_help(entry.name, self.device),
            None,
        ]


def build(service: Service) -> gr.Blocks:
    """The form, and the places of everything else."""
    page = Page(service)
    private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    first = presets(MODELS["bounce"], page.device)["Balanced"]
    with gr.Blocks(
        title="vidkv", analytics_enabled=False, fill_width=True, delete_cache=(UNUSED_S, UNUSED_S)
    ) as blocks:
        _html(HEADER, "vk-header")
        bridge = gr.HTML("", html_template="", js_on_load=BRIDGE, visible="hidden")
        with gr.Tabs(elem_id="vk-tabs"):
            with gr.Tab("Create", id="create"):
                with gr.Row(elem_id="vk-create", equal_height=False):
                    with gr.Column(elem_id="vk-form", scale=0, min_width=300):
                        fields = _form(page, first) | {"bridge": bridge}
                    with gr.Column(elem_id="vk-side", scale=1, min_width=300):
                        _html("<vidkv-stage></vidkv-stage>", "vk-stage-place")
            with gr.Tab("Gallery & queue", id="gallery"):
                _html("<vidkv-gallery></vidkv-gallery>", "vk-gallery-place")
            with gr.Tab("Compare", id="compare"):
                with gr.Row(elem_id="vk-comparison", equal_height=False):
                    with gr.Column(elem_id="vk-pair", scale=0, min_width=300):
                        pair = _pair(page)
                    with gr.Column(scale=1, min_width=300):
                        _html("<vidkv-comparing></vidkv-comparing>", "vk-compare-place")
        _wire(page, fields, blocks, private)
        names = ("prompt", "length", "seed", "model", "a", "b")
        pair["compare"].click(page.compare, [pair[name] for name in names], pair["message"], **private)
        pair["model"].input(
            page.chosen_pair, pair["model"], [pair["a"], pair["b"]], **private, queue=False
        )  # fmt: skip
    return blocks


def _form(page: Page, first: CacheSpec) -> dict[str, Any]:
    """The fields by name; names that are not in `FIELDS` are shown or pressed only."""
    made: dict[str, Any] = {}
    made["prompt"] = gr.Textbox(
        label="What should be seen?", lines=3, max_lines=8, elem_id="vk-prompt", max_length=10_000,
        value=EXAMPLES[0], placeholder="a red circle and a blue square bouncing",
    )  # fmt: skip
    chips = "".join(
        f'<button type="button" class="vk-example" data-prompt="{escaped(text)}" '
        f'title="{escaped(text)}">{name}</button>'
        for name, text in zip(EXAMPLE_NAMES, EXAMPLES, strict=True)
    )
    _html(f'<div class="vk-examples" role="group" aria-label="Examples">{chips}</div>', "vk-examples-place")
    with gr.Accordion("Later prompts", open=False, elem_id="vk-later"):
        made["schedule"] = gr.HTML(
            "[]", html_template="<vidkv-schedule></vidkv-schedule>", js_on_load=SCHEDULE,
            apply_default_css=False,
        )  # fmt: skip
    made["length"] = gr.Radio(
        [*LENGTHS, OTHER], value="10 s", label="Length", elem_id="vk-length", elem_classes="vk-pills"
    )
    made["seconds"] = gr.Number(10, label="Seconds", visible=False, elem_id="vk-seconds")
    made["preset"] = gr.Radio(
        [*WORDS], value="Balanced", label="Memory of the model (KV cache)", elem_id="vk-preset",
        elem_classes="vk-pills",
    )  # fmt: skip
    made["words"] = _html(_words("Balanced"), "vk-preset-words")
    made["model"] = gr.Dropdown(model_choices(), value="bounce", label="Model", elem_id="vk-model")
    made["help"] = _html(model_help("bounce", page.device), "vk-model-help")
    with gr.Row(elem_id="vk-seed-row", equal_height=True):
        made["seed"] = gr.Number(0, label="Seed", precision=0, elem_id="vk-seed", scale=1, min_width=110)
        made["dice"] = gr.Button("New", elem_id="vk-dice", size="sm", scale=0, min_width=64)
        made["again"] = gr.Button("Reuse", elem_id="vk-again", size="sm", scale=0, min_width=64)
    with gr.Accordion("Start from a picture or a video", open=False):
        made["upload"] = gr.File(
            label="A picture, or a video whose end to go on from", file_types=KINDS, type="filepath",
            height=110, elem_id="vk-upload",
        )  # fmt: skip
    with gr.Accordion("Advanced", open=False, elem_id="vk-advanced"):
        made |= _advanced(first)
    # stays in view however long the form is
    with gr.Column(elem_id="vk-go"):
        made["estimate"] = _html("", "vk-estimate")
        made["generate"] = gr.Button("Generate", variant="primary", elem_id="vk-generate", size="lg")
        made["message"] = _html("", "vk-message")
    return made


def _pair(page: Page) -> dict[str, Any]:
    """The form of a comparison."""
    made: dict[str, Any] = {}
    made["prompt"] = gr.Textbox(
        label="What should be seen in both?", lines=2, max_lines=6, max_length=10_000, value=EXAMPLES[1],
        elem_id="vk-pair-prompt",
    )  # fmt: skip
    lengths = [name for name in LENGTHS if name != ENDLESS]
    made["length"] = gr.Radio(lengths, value="10 s", label="Length", elem_classes="vk-pills")
    caches = page.caches("bounce")
    more = {"allow_custom_value": True, "min_width": 200}
    made["a"] = gr.Dropdown(caches, value=caches[-1][1], label="Cache A", elem_id="vk-pair-a", **more)
    made["b"] = gr.Dropdown(
        caches, value=caches[2][1], label="Cache B", elem_id="vk-pair-b", **more,
        info="Or type one, such as int8,window=15,sink=3.",
    )  # fmt: skip
    made["model"] = gr.Dropdown(model_choices(), value="bounce", label="Model")
    made["seed"] = gr.Number(0, label="Seed of both", precision=0)
    made["compare"] = gr.Button("Compare", variant="primary", elem_id="vk-pair-go", size="lg")
    made["message"] = _html("", "vk-pair-message")
    return made


def _advanced(first: CacheSpec) -> dict[str, Any]:
    made: dict[str, Any] = {}
    made["size"] = gr.Dropdown(
        sizes(MODELS["bounce"]), value=OWN_SIZE, label="Size", allow_custom_value=True,
        info="Or type WIDTHxHEIGHT, such as 96x64.",
    )  # fmt: skip
    with gr.Row():
        made["format"] = gr.Dropdown(list(FORMATS), value=first.format, label="Pages as", min_width=120)
        made["policy"] = gr.Dropdown(list(POLICIES), value=first.policy, label="What leaves", min_width=120)
    with gr.Row():
        made["window"] = gr.Number(
            first.window, label="Window", precision=0, min_width=120,
            info="Latent frames seen, sinks and chunk included.",
        )  # fmt: skip
        made["sink"] = gr.Number(
            first.sink, label="Sinks", precision=0, min_width=120,
            info="First frames, kept for good.",
        )  # fmt: skip
    with gr.Row():
        made["keep_newest"] = gr.Checkbox(first.keep_newest, label="Newest chunk unquantized", min_width=120)
        made["keep_sinks"] = gr.Checkbox(first.keep_sinks, label="Sinks unquantized", min_width=120)
    made["newer"] = gr.Textbox(
        first.newer, label="Newest frames as", lines=1, placeholder="int8:3+int4:6",
        info="Formats by age, each with its latent frames.",
    )  # fmt: skip
    made["more"] = gr.Textbox(
        "", label="Further settings", lines=1, placeholder="select=12,device_gb=2",
        info="Any other setting of the cache, as on the command line.",
    )  # fmt: skip
    with gr.Row():
        made["positions"] = gr.Dropdown(
            ["relative", "absolute"], value=first.positions, label="Positions", min_width=120
        )
        made["value_scale"] = gr.Dropdown(
            ["token", "channel"], value=first.value_scale, label="Scales of V", min_width=120
        )
    with gr.Row():
        # an empty number becomes 0 on the page
        model = {"info": "0: the model's own.", "min_width": 120}
        made["steps"] = gr.Number(0, label="Steps", precision=0, **model)
        made["guidance"] = gr.Number(0, label="Guidance", **model)
    made["negative"] = gr.Textbox(label="Lead away from", lines=1, placeholder="with guidance only")
    with gr.Row():
        made["switch"] = gr.Dropdown(
            [("as the model does", ""), "keep", "recache", "flush", "lerp"], value="", min_width=120,
            label="On a new prompt",
        )  # fmt: skip
        made["noise"] = gr.Dropdown(["counter", "stock"], value="counter", label="Noise", min_width=120)
    return made


def _wire(page: Page, made: dict[str, Any], blocks: gr.Blocks, private: dict[str, Any]) -> None:
    fields = [made[name] for name in FIELDS]
    asked = [*fields, made["upload"]]
    cache = [made[name] for name in (*CACHE_FIELDS, "more")]
    quick = private | {"queue": False, "trigger_mode": "always_last"}
    made["generate"].click(page.create, asked, made["message"], concurrency_limit=8, **private)
    gr.on(
        [blocks.load, *(field.change for field in asked)],
        page.weigh,
        asked,
        [made["estimate"], made["message"]],
        **quick,
    )
    made["length"].change(
        lambda length: gr.Number(visible=length == OTHER), made["length"], made["seconds"], **quick
    )
    made["preset"].input(
        page.chosen_preset, [made["preset"], made["model"]], [made["words"], *cache], **quick
    )
    made["model"].input(
        page.chosen_model, [made["model"], made["preset"]],
        [made["help"], made["size"], made["preset"], made["words"], *cache], **quick,
    )  # fmt: skip
    gr.on(
        [field.input for field in cache], page.changed_cache, [made["model"], *cache],
        [made["preset"], made["words"]], **quick,
    )  # fmt: skip
    made["dice"].click(None, None, made["seed"], js="() => globalThis.vidkv.dice()", **private)
    made["again"].click(
        None, made["seed"], made["seed"], js="(seed) => globalThis.vidkv.seed() ?? seed", **private
    )
    filled = [*fields, made["words"], made["help"], made["upload"]]
    made["bridge"].submit(page.fill, made["bridge"], filled, **quick)
    blocks.load(page.fill, made["bridge"], filled, js="() => [globalThis.vidkv?.draft() ?? '']", **quick)


SCHEDULE = """
const rows = element.querySelector("vidkv-schedule");
const read = () => { try { return JSON.parse(props.value || "[]"); } catch { return []; } };
customElements.whenDefined("vidkv-schedule").then(() => { rows.value = read(); });
rows.addEventListener("vidkv-schedule", () => {
  props.value = JSON.stringify(rows.value);
  trigger("change");
});
watch("value", () => { element.querySelector("vidkv-schedule").value = read(); });
"""
BRIDGE = """
globalThis.vidkvApply = (text) => { props.value = text; trigger("submit"); };
"""


def _html(text: str, name: str) -> Any:
    return gr.HTML(text, elem_id=name, js_on_load=None, apply_default_css=False)


def _verdict(
    verdict: str, text: str, numbers: dict[str, str] | None = None, share: float | None = None
) -> str:
    """What a video would take, as a box.

    Args:
        share: of the free memory.
    """
    rows = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in (numbers or {}).items())
    shown = f'<dl class="vk-numbers">{rows}</dl>' if rows else ""
    if share is not None:
        percent = max(1, min(100, round(100 * share)))
        shown += (
            f'<div class="vk-meter" role="img" aria-label="{percent} percent of free memory">'
            f'<i style="inline-size:{percent}%"></i></div>'
        )
    return (
        f'<div class="vk-verdict" data-verdict="{verdict}">{shown}'
        f'<p class="vk-small">{escaped(text)}</p></div>'
    )


def _words(preset: str) -> str:
    return f'<p class="vk-small">{escaped(WORDS[preset])}</p>'


def _refusal(service: Service, error: Exception) -> str:
    text = service.hide(str(error))
    if isinstance(error, QueueFull):
        text += ". Wait for one to end, or take one out in the tab Gallery & queue."
    return _message(text, "no")


def _message(text: str, verdict: str) -> str:
    role = "alert" if verdict == "no" else "status"
    return f'<p class="vk-message" role="{role}" data-verdict="{verdict}">{escaped(text)}</p>'


def theme() -> Base:
    """System fonts and the colours of page.css, so that Gradio's parts look like the others."""
    sans = ["ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
    mono = ["ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "Liberation Mono", "monospace"]
    base = Base(
        primary_hue="teal", secondary_hue="amber", neutral_hue="stone", radius_size="md", spacing_size="md",
        text_size="md", font=sans, font_mono=mono,
    )  # fmt: skip
    both = {
        "body_background_fill": "var(--vk-page)", "body_text_color": "var(--vk-text)",
        "body_text_color_subdued": "var(--vk-quiet)", "background_fill_primary": "var(--vk-card)",
        "background_fill_secondary": "var(--vk-sunken)", "border_color_primary": "var(--vk-line)",
        "border_color_accent": "var(--vk-accent)", "color_accent_soft": "var(--vk-accent-soft)",
        "block_background_fill": "transparent", "block_border_color": "transparent",
        "block_label_background_fill": "transparent", "block_label_text_color": "var(--vk-quiet)",
        "block_title_text_color": "var(--vk-text)", "block_info_text_color": "var(--vk-quiet)",
        "panel_background_fill": "transparent", "panel_border_color": "transparent",
        "input_background_fill": "var(--vk-sunken)", "input_background_fill_focus": "var(--vk-card)",
        "input_border_color": "var(--vk-line)", "input_border_color_focus": "var(--vk-accent)",
        "input_placeholder_color": "var(--vk-quiet)", "button_primary_background_fill": "var(--vk-accent)",
        "button_primary_background_fill_hover": "var(--vk-accent-strong)",
        "button_primary_text_color": "var(--vk-on-accent)", "button_primary_border_color": "transparent",
        "button_secondary_background_fill": "var(--vk-card)", "button_secondary_text_color": "var(--vk-text)",
        "button_secondary_background_fill_hover": "var(--vk-sunken)",
        "button_secondary_border_color": "var(--vk-line)", "checkbox_background_color": "var(--vk-sunken)",
        "checkbox_background_color_selected": "var(--vk-accent)",
        "checkbox_border_color": "var(--vk-strong-line)",
        "checkbox_label_background_fill": "var(--vk-sunken)",
        "checkbox_label_background_fill_hover": "var(--vk-card)",
        "checkbox_label_background_fill_selected": "var(--vk-accent-soft)",
        "checkbox_label_border_color": "var(--vk-line)",
        "checkbox_label_border_color_selected": "var(--vk-accent)",
        "checkbox_label_text_color_selected": "var(--vk-text)", "loader_color": "var(--vk-accent)",
    }  # fmt: skip
    plain = {
        "block_border_width": "0px", "block_shadow": "none", "block_padding": "0px", "layout_gap": "14px",
        "form_gap_width": "0px", "block_label_border_width": "0px", "block_title_text_weight": "600",
        "block_title_text_size": "*text_sm", "button_transition": "background 120ms",
        "panel_border_width": "0px",
        "button_primary_shadow": "none", "button_secondary_shadow": "none", "input_shadow": "none",
        "input_shadow_focus": "0 0 0 3px var(--vk-accent-soft)", "checkbox_label_shadow": "none",
    }  # fmt: skip
    base.set(**both, **{f"{name}_dark": value for name, value in both.items()}, **plain)
    return base
