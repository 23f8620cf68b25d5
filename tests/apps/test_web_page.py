"""The page without a browser: what its form means, what it serves, and what it lets nobody have."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from starlette.testclient import TestClient

from vidkv.apps import web_page
from vidkv.apps.api import ApiLimits, Service, create_app
from vidkv.apps.web_form import (
    CACHE_FIELDS,
    CUSTOM,
    ENDLESS,
    FIELDS,
    LENGTHS,
    OTHER,
    WORDS,
    form_of,
    model_help,
    new_id,
    preset_of,
    presets,
    size_text,
    sizes,
    values_of,
)
from vidkv.apps.web_page import EXAMPLE_NAMES, POLICY, WEB, Page, uploads_of
from vidkv.cache import CacheGeometry, CacheSpec, planned_bytes
from vidkv.jobs.store import JobStore
from vidkv.memory import empty_models
from vidkv.models.bounce.prompts import EXAMPLES
from vidkv.models.registry import MODELS
from vidkv.planning import cache_spec, plan
from vidkv.request import ID_PATTERN, EngineSettings, VideoRequest

BOUNCE = MODELS["bounce"]
PLAIN = form_of({"prompt": "a red circle bouncing"}, "cpu")
HOST = "127.0.0.1"


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page says in the environment where Gradio keeps uploads."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", "/nowhere")


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    with JobStore(tmp_path / "out") as store:
        app = create_app(store, settings=EngineSettings(device="cpu"), token=None, limits=ApiLimits(queue=3))
        yield app.state.service


@pytest.fixture
def client(tmp_path: Path) -> Iterator[TestClient]:
    with JobStore(tmp_path / "out") as store:
        app = create_app(store, settings=EngineSettings(device="cpu"), token=None, limits=ApiLimits())
        web_page.mount(app, app.state.service)
        with TestClient(app, base_url=f"http://{HOST}") as client:
            yield client


def filled(**changes: Any) -> list[Any]:
    """Arguments of the form's events: all fields, and no upload."""
    form = PLAIN | {"upload": None} | changes
    return [form[name] for name in (*FIELDS, "upload")]


class TestPresets:
    @pytest.mark.parametrize("name", MODELS)
    def test_every_model_can_be_made_with_every_preset(self, name: str) -> None:
        entry = MODELS[name]
        for device in ("cpu", "cuda"):
            specs = presets(entry, device)
            for spec in specs.values():
                spec.capacity(entry.chunk_frames)
            assert specs["Smallest"].window == specs["Exact"].window < specs["Long memory"].window
            geometry = CacheGeometry.of_model(empty_models(name)[0].config, 8, 8, entry.chunk_frames)
            sizes = {words: planned_bytes(spec, geometry) for words, spec in specs.items()}
            assert min(sizes, key=lambda words: sizes[words]) == "Smallest"
            assert 3.5 * sizes["Smallest"] < sizes["Exact"]

    def test_a_preset_is_recognized(self) -> None:
        for name, spec in presets(BOUNCE, "cpu").items():
            assert preset_of(spec, BOUNCE, "cpu") == name
        assert preset_of(CacheSpec(format="int8", window=12), BOUNCE, "cpu") == CUSTOM

    def test_all_are_explained(self) -> None:
        assert {*presets(BOUNCE, "cpu"), CUSTOM} == set(WORDS)


class TestValues:
    def test_a_plain_form_asks_for_the_model_as_it_is(self) -> None:
        assert values_of(PLAIN, "cpu") == {
            "prompt": "a red circle bouncing", "model": "bounce", "keep": True, "seed": 0, "seconds": 10.0,
        }  # fmt: skip

    @given(
        seconds=st.sampled_from([5.0, 10.0, 7.5, 60.0]),
        seed=st.integers(0, 2**31),
        window=st.integers(6, 40),
        format=st.sampled_from(["fp32", "bf16", "int8", "int4"]),
        keep=st.booleans(),
        bare=st.booleans(),
        more=st.sampled_from([{}, {"keep_tokens": 0.5}, {"segment": 2, "device_gb": 1.0, "host_gb": 2.5}]),
        schedule=st.lists(
            st.tuples(st.floats(0.5, 4.0), st.sampled_from(EXAMPLES), st.sampled_from([None, "flush"])),
            max_size=3,
            unique_by=lambda entry: entry[0],
        ),
        size=st.sampled_from([None, "96x64", "64x64"]),
        steps=st.sampled_from([None, 2]),
    )
    def test_there_and_back(
        self, seconds: float, seed: int, window: int, format: str, keep: bool, bare: bool,
        more: dict[str, Any], schedule: list[Any], size: str | None, steps: int | None,
    ) -> None:  # fmt: skip
        """A request fills the form, and the form asks for the same video again."""
        asked: dict[str, Any] = {
            "prompt": EXAMPLES[0], "seconds": seconds, "seed": seed,
            "cache": {"window": window, "format": format, "keep_newest": keep} | more,
            "schedule": [entry if entry[2] else entry[:2] for entry in sorted(schedule, key=lambda e: e[0])],
        }  # fmt: skip
        asked |= {"steps": steps} if steps else {}
        # a format's own defaults, or none of them
        asked["cache"] |= {"keep_sinks": False, "newer": ""} if bare else {}
        if size:
            asked |= dict(zip(("width", "height"), map(int, size.split("x")), strict=True))
        again = values_of(form_of(asked, "cpu"), "cpu")
        assert again.pop("keep") is True
        assert more.items() <= again.get("cache", {}).items()
        if "size" in again:
            again |= dict(zip(("width", "height"), map(int, again.pop("size").split("x")), strict=True))
        settings = EngineSettings(device="cpu")
        assert plan(VideoRequest.of(again), settings).key == plan(VideoRequest.of(asked), settings).key

    def test_until_stopped(self) -> None:
        values = values_of(PLAIN | {"length": ENDLESS}, "cpu")
        assert values["until_stopped"] is True and "seconds" not in values
        assert form_of(values, "cpu")["length"] == ENDLESS

    def test_another_length(self) -> None:
        assert values_of(PLAIN | {"length": OTHER, "seconds": 12.5}, "cpu")["seconds"] == 12.5
        assert form_of({"prompt": "x", "seconds": 12.5}, "cpu")["length"] == OTHER
        assert all(LENGTHS[name] for name in LENGTHS if name != ENDLESS)

    def test_sizes_may_be_typed_as_people_do(self) -> None:
        assert values_of(PLAIN | {"size": "96 × 64"}, "cpu")["size"] == "96x64"
        assert ("480 × 832, upright", "480x832") in sizes(MODELS["wan2.1-1.3b"])

    def test_ids_say_what_is_shown(self) -> None:
        first, second = new_id("A red circle, and an élan!"), new_id("A red circle, and an élan!")
        assert first.startswith("red-circle") and first != second
        for prompt in ("", "日本", "x" * 500, "../../etc/passwd"):
            assert re.fullmatch(ID_PATTERN, new_id(prompt))

    def test_what_a_missing_model_needs(self) -> None:
        needs = model_help("longlive-1.3b", "cpu")
        assert "hf download Efficient-Large-Model/LongLive-1.3B" in needs
        assert "vidkv convert longlive_base.pt --model longlive-1.3b" in needs and "unstated" in needs
        assert "Ready" in model_help("bounce", "cpu")
        assert "no weights" in model_help("gqa-4.5b", "cpu")

    def test_examples_are_named(self) -> None:
        assert len(EXAMPLE_NAMES) == len(EXAMPLES)


class TestPage:
    def test_generate_queues_what_the_form_says(self, service: Service) -> None:
        answer = Page(service).create(*filled(seed=5, preset="Custom", format="int8", window=9))
        (job,) = service.store.jobs()
        assert f'job="{job.id}"' in answer and job.id.startswith("red-circle-bouncing-")
        assert job.keep and job.request["seed"] == 5
        assert job.request["cache"] == {"format": "int8", "window": 9}

    def test_what_is_queued_for_a_preset_is_that_preset(self, service: Service) -> None:
        for name, spec in presets(BOUNCE, "cpu").items():
            fields = {field: getattr(spec, field) for field in CACHE_FIELDS}
            Page(service).create(*filled(preset=name, **fields))
            job = service.store.jobs()[-1]
            assert cache_spec(BOUNCE, job.request.get("cache") or {}, "cpu") == spec, name
            assert form_of(job.request, "cpu")["preset"] == name
            service.store.cancel(job.id)

    @pytest.mark.parametrize(
        ("changes", "says"),
        [
            ({"prompt": "an elephant"}, "elephant"),
            ({"prompt": ""}, "empty"),
            ({"model": "wan2.1-14b"}, "not here"),
            ({"size": "63x64"}, "63"),
            ({"window": 3}, "window=3"),
            ({"format": "int9"}, "int9"),
            ({"newer": "int8"}, "FORMAT:FRAMES"),
            ({"more": "select=99"}, "select=99"),
            ({"more": "segment=2,segment=3"}, "given twice"),
            ({"more": "device_gb=1e-9"}, "device_gb=1e-09 is too little"),
            ({"more": "budget=3"}, "budget"),
            ({"seed": -1}, "seed"),
            ({"length": OTHER, "seconds": None}, "seconds"),
            ({"length": OTHER, "seconds": 1e9}, "at most"),
            ({"schedule": '[[99, "a red circle resting"]]'}, "never be shown"),
        ],
    )  # fmt: skip
    def test_what_is_wrong_is_said_and_nothing_is_queued(
        self, service: Service, changes: dict[str, Any], says: str
    ) -> None:
        page = Page(service)
        answer = page.create(*filled(**changes))
        assert 'role="alert"' in answer and says in answer and "<vidkv-created" not in answer
        assert service.store.jobs() == []
        assert 'data-verdict="no"' in page.weigh(*filled(**changes))[0]

    def test_markup_in_a_prompt_stays_text(self, service: Service) -> None:
        page = Page(service)
        form = filled(prompt="<img src=x onerror=alert(1)> ${1 + 1} {{value}}")
        assert "&lt;img src" in page.weigh(*form)[0]
        for answer in (page.create(*form), page.weigh(*form)[0]):
            assert "<img" not in answer and "${" not in answer and "{{" not in answer

    def test_a_full_queue(self, service: Service) -> None:
        page = Page(service)
        for _ in range(3):
            assert "<vidkv-created" in page.create(*filled())
        assert "Gallery &amp; queue" in page.create(*filled())

    def test_without_workers_nothing_is_queued(self, service: Service) -> None:
        service.ailing = lambda: "they are gone"
        assert "they are gone" in Page(service).create(*filled())
        assert service.store.jobs() == []

    def test_further_settings_and_presets(self, service: Service) -> None:
        """A preset has none, and with some a cache is no preset."""
        page, spec = Page(service), presets(BOUNCE, "cpu")["Balanced"]
        fields = [getattr(spec, name) for name in CACHE_FIELDS]
        assert page.changed_cache("bounce", *fields, "")[0] == "Balanced"
        assert page.changed_cache("bounce", *fields, "keep_tokens=0.5")[0] == "Custom"
        assert page.changed_cache("bounce", *fields, "nonsense=1")[0] == "Custom"
        assert page.chosen_preset("Balanced", "bounce")[1:] == [*fields, ""]
        assert len(page.chosen_preset("Custom", "bounce")) == len(fields) + 2

    def test_the_estimate(self, service: Service) -> None:
        told = []
        for preset in ("Exact", "Smallest"):
            spec = presets(BOUNCE, "cpu")[preset]
            text = Page(service).weigh(*filled(**{name: getattr(spec, name) for name in CACHE_FIELDS}))[0]
            assert 'data-verdict="yes"' in text and "Fits" in text
            told.append(re.findall("<dt>KV cache</dt><dd>(.*?)</dd>", text))
        assert told == [["3.54 MB"], ["476 kB"]]

    def test_bytes_for_people(self) -> None:
        texts = [size_text(count) for count in (None, 0, 999, 1000, 999_499, 999_500, 10**7, 2 * 10**15)]
        assert texts == ["–", "0 B", "999 B", "1 kB", "999 kB", "1 MB", "10 MB", "2000 TB"]

    def test_an_upload_is_checked_and_stored_once(self, service: Service, tmp_path: Path) -> None:
        folder = uploads_of(service)
        folder.mkdir()
        Image.new("RGB", (64, 64), "red").save(folder / "start.png")
        (folder / "broken.png").write_bytes(b"nothing")
        page = Page(service)
        assert 'role="alert"' in page.create(*filled(upload=str(folder / "broken.png")))
        assert "<vidkv-created" in page.create(*filled(upload=str(folder / "start.png")))
        (job,) = service.store.jobs()
        assert os.listdir(service.uploads.folder) == [Path(job.request["image"]).name]

    def test_an_upload_that_is_too_large(self, tmp_path: Path) -> None:
        with JobStore(tmp_path / "out") as store:
            limits = ApiLimits(upload_bytes=100)
            app = create_app(store, settings=EngineSettings(device="cpu"), token=None, limits=limits)
            folder = uploads_of(app.state.service)
            folder.mkdir()
            (folder / "large.png").write_bytes(b"x" * 101)
            answer = Page(app.state.service).create(*filled(upload=str(folder / "large.png")))
            assert "more than 100 bytes" in answer
            assert os.listdir(app.state.service.uploads.folder) == []

    def test_compare_queues_both(self, service: Service) -> None:
        answer = Page(service).compare("a red circle bouncing", "5 s", 3, "bounce", "fp32", "int8,window=9")
        jobs = service.store.jobs()
        assert len(jobs) == 2 and all(f'="{job.id}"' in answer for job in jobs)
        assert {job.request["seed"] for job in jobs} == {3}

    def test_compare_says_what_is_wrong(self, service: Service) -> None:
        for a, b in (("int8", "int8"), ("int8", "int7"), ("int8", "window=1")):
            answer = Page(service).compare("a red circle bouncing", "5 s", 0, "bounce", a, b)
            assert 'role="alert"' in answer
        assert service.store.jobs() == []

    def test_nothing_but_a_request_fills_the_form(self, service: Service) -> None:
        page = Page(service)
        wanted = page.fill(json.dumps({"prompt": "a blue square resting", "seed": 9}))
        assert wanted[FIELDS.index("prompt")] == "a blue square resting" and wanted[FIELDS.index("seed")] == 9
        for text in (None, "", "nonsense", "[]", '"text"', '{"cache": "int7"}', '{"schedule": 5}'):
            assert all(isinstance(value, dict) for value in page.fill(text)), text


class TestServed:
    def test_the_shell(self, client: TestClient) -> None:
        answer = client.get("/", headers={"Accept-Encoding": "gzip, br"})
        assert answer.status_code == 200
        assert answer.headers["Content-Security-Policy"] == POLICY
        head = answer.text.partition("</head>")[0]
        assert '<script type="module" src="/page/page.js">' in head and "/page/page.css" in head
        assert 'analytics_enabled":false' in answer.text.replace(" ", "")

    def test_parts(self, client: TestClient) -> None:
        for path in WEB.iterdir():
            answer = client.get(f"/page/{path.name}")
            assert answer.content == path.read_bytes() and answer.headers["Cache-Control"] == "no-cache"
        assert client.get("/page/page.js").headers["Content-Type"].startswith("text/javascript")

    @pytest.mark.parametrize(
        "path", ["/page/none.js", "/page/..%2fweb_page.py", "/page/%2e%2e", "/v1/nothing", "/v1/videos/x/y"]
    )
    def test_what_is_not_there_is_an_error_of_the_api(self, client: TestClient, path: str) -> None:
        answer = client.get(path)
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "not_found"

    def test_a_wrong_method_stays_one(self, client: TestClient) -> None:
        answer = client.put("/v1/videos")
        assert answer.status_code == 405 and answer.json()["error"]["code"] == "wrong_method"

    def test_no_event_is_an_endpoint(self, client: TestClient) -> None:
        told = client.get("/gradio_api/info").json()
        assert told["named_endpoints"] == {} and told["unnamed_endpoints"] == {}

    def test_no_file_of_the_server_can_be_had(self, client: TestClient, tmp_path: Path) -> None:
        (tmp_path / "out" / "private.txt").write_text("secret words")
        for path in (tmp_path / "out" / "private.txt", Path("/etc/passwd"), Path(__file__)):
            answer = client.get(f"/gradio_api/file={path}")
            assert answer.status_code in (403, 404) and "secret words" not in answer.text

    def test_an_upload_that_is_too_large(self, tmp_path: Path) -> None:
        with JobStore(tmp_path / "out") as store:
            app = create_app(
                store, settings=EngineSettings(device="cpu"), token=None, limits=ApiLimits(upload_bytes=1000)
            )
            web_page.mount(app, app.state.service)
            with TestClient(app, base_url=f"http://{HOST}") as client:
                sent = [client.post("/gradio_api/upload", files={"files": ("x.png", b"x" * size)}) for size in
                        (900, 5000)]  # fmt: skip
            assert [answer.status_code for answer in sent] == [200, 413]

    def test_nothing_is_fetched_from_elsewhere(self) -> None:
        """In what the page loads there is no address of another machine."""
        for path in WEB.iterdir():
            text = re.sub(r"http://www\.w3\.org/\S+", "", path.read_text())
            assert not re.search(r"https?://|url\(|@import", text), path.name


def test_pages_of_other_sites_may_not_ask(client: TestClient) -> None:
    for path in ("/", "/gradio_api/queue/join", "/page/page.js"):
        assert client.get(path, headers={"Origin": "http://evil.example"}).status_code == 403


class TestWhatIsNotUploaded:
    """Clients name files where a form expects a text or an upload: nothing is read, copied or fetched."""

    @pytest.fixture(autouse=True)
    def no_fetch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        async def fetched(*args: Any, **kwargs: Any) -> str:
            raise AssertionError(f"fetched {args}")

        monkeypatch.setattr("gradio.processing_utils.async_ssrf_protected_download", fetched)

    @pytest.mark.parametrize("stream", [False, True], ids=["file", "stream"])
    @pytest.mark.parametrize("kind", ["text", "picture", "address"])
    def test_of_every_event_and_every_field(
        self, client: TestClient, tmp_path: Path, kind: str, stream: bool
    ) -> None:
        secret = tmp_path / "elsewhere" / ("secret.png" if kind == "picture" else "secret.txt")
        secret.parent.mkdir()
        if kind == "picture":
            Image.new("RGB", (64, 64), "red").save(secret)
        else:
            secret.write_text("top secret")
        named = "http://files.example/secret.png" if kind == "address" else str(secret)
        value = {"path": named, "is_stream": stream, "meta": {"_type": "gradio.FileData"}}
        config = client.get("/config").json()
        parts = {part["id"]: part for part in config["components"]}
        asked = 0
        events = [event for event in config["dependencies"] if event["backend_fn"]]
        for event in events:
            # what an event changes, Gradio makes anew for the session
            data = [parts[i]["props"].get("value") for i in event["inputs"]]
            client.post(
                "/gradio_api/run/predict",
                json={"fn_index": event["id"], "data": data, "session_hash": "s"},
            )
        for event in events:
            base = [parts[i]["props"].get("value") for i in event["inputs"]]
            for at, number in enumerate(event["inputs"]):
                if parts[number]["type"] == "state":
                    continue
                data = [value if i == at else given for i, given in enumerate(base)]
                body = {"fn_index": event["id"], "data": data, "session_hash": "s"}
                answer = client.post("/gradio_api/run/predict", json=body)
                asked += 1
                assert "top secret" not in answer.text
                if not stream:
                    assert answer.status_code != 200, (event["id"], at)
        assert asked > 20
        kept = [path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()]
        assert not any(secret.read_bytes() == data for data in kept)

    def test_a_picture_that_was_not_uploaded_starts_nothing(self, service: Service, tmp_path: Path) -> None:
        Image.new("RGB", (64, 64), "red").save(tmp_path / "mine.png")
        answer = Page(service).create(*filled(upload=str(tmp_path / "mine.png")))
        assert "was not uploaded here" in answer and service.store.jobs() == []

    def test_uploads_have_limits(self, tmp_path: Path) -> None:
        limits = ApiLimits(upload_bytes=1000)
        with JobStore(tmp_path / "out") as store:
            app = create_app(store, settings=EngineSettings(device="cpu"), token=None, limits=limits)
            web_page.mount(app, app.state.service)
            with TestClient(app, base_url=f"http://{HOST}") as client:
                assert client.post("/gradio_api/component_server", json={}).status_code in (404, 405)
                large = client.post("/gradio_api/upload", files={"files": ("a.png", b"x" * 100_000)})
                assert large.status_code == 413 and "1,000 bytes" in large.json()["error"]["message"]
                small = client.post("/gradio_api/upload", files={"files": ("a.png", b"x" * 900)})
                assert small.status_code == 200
                long = client.post("/gradio_api/queue/join", content=b"x" * (2**20 + 2**17))
                assert long.status_code == 413
                endless = client.post("/gradio_api/upload", content=iter([b"x"]))
                assert endless.status_code == 411

    @pytest.mark.parametrize(
        "path",
        ["/monitoring", "/monitoring/summary", "/gradio_api/deep_link", "/gradio_api/stream/a/b/c/d",
         "/gradio_api/proxy=http://files.example/", "/gradio_api/file=http://files.example/",
         "/gradio_api/file/http://files.example/"],
    )  # fmt: skip
    def test_routes_that_the_page_does_not_need_are_closed(self, client: TestClient, path: str) -> None:
        assert client.get(path).status_code == 404
