"""A server, a browser, and pages whose console, requests and answers are watched."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import httpx
import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Page

ROOT = Path(__file__).resolve().parents[2]
SHOTS = ROOT / "build" / "browser"
WAIT_S = 120.0
"""Until a machine with much else to do has certainly done it."""
OPTIONS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--autoplay-policy=no-user-gesture-required",
]  # fmt: skip


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.option.markexpr == "browser":
        return
    skip = pytest.mark.skip(reason="needs a browser; `make browser` runs it")
    for item in items:
        if item.get_closest_marker("browser"):
            item.add_marker(skip)


def chromium() -> str:
    """Where the browser is; without one the tests fail, because whoever asked for them wants to know."""
    asked = os.environ.get("VIDKV_CHROMIUM")
    for name in [asked] if asked else ["chromium", "chromium-browser", "google-chrome"]:
        if found := shutil.which(name):
            return found
    pytest.fail(
        f"no Chromium ({asked or 'chromium'}): apt-get install chromium, or set VIDKV_CHROMIUM to one",
        pytrace=False,
    )


class Server:
    """`vidkv serve` in a process of its own, and the API that its clients have."""

    def __init__(self, root: Path) -> None:
        self.root = root
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "PYTHONWARNINGS": "ignore",
        }
        self.log = open(root.parent / "server.log", "w+")
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / "served.py"), str(root)], text=True, cwd=root.parent,
            env=environment, stdout=subprocess.PIPE, stderr=self.log,
        )  # fmt: skip
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().strip()
        assert self.url.startswith("http://127.0.0.1:"), f"it said {self.url!r}: {self.complaints()}"
        self.http = httpx.Client(base_url=self.url, timeout=WAIT_S)

    def complaints(self) -> str:
        self.log.seek(0)
        return self.log.read()

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        response = self.http.request(method, path, json=body)
        assert response.status_code < 400, f"{method} {path}: {response.status_code} {response.text}"
        return response.json()

    def video(self, id: str) -> dict[str, Any]:
        found: dict[str, Any] = self.ask("GET", f"/v1/videos/{id}")
        return found

    def make(self, **values: Any) -> dict[str, Any]:
        """Queue a video that can be branched."""
        values = {"prompt": "a red circle bouncing", "seconds": 3, "keep": True} | values
        made: dict[str, Any] = self.ask("POST", "/v1/videos", values)
        return made

    def until(self, id: str, *states: str) -> dict[str, Any]:
        """The video once it is in one of these states."""
        return eventually(lambda: (video := self.video(id))["status"] in states and video, f"{id} {states}")

    def until_chunks(self, id: str, chunks: int) -> dict[str, Any]:
        return eventually(
            lambda: (video := self.video(id))["chunks_done"] >= chunks and video, f"{id} {chunks}"
        )

    def streams(self) -> int:
        return int(self.ask("GET", "/streams")["streams"])

    def clear(self) -> None:
        """End and forget everything, so that the next test has the workers for itself."""
        for video in self.ask("GET", "/v1/videos?limit=100")["data"]:
            if video["status"] not in ("completed", "failed", "cancelled"):
                self.ask("POST", f"/v1/videos/{video['id']}/cancel")
                self.until(video["id"], "completed", "failed", "cancelled")
            # a worker says how a job ended a moment before it lets go of it
            path = f"/v1/videos/{video['id']}"
            eventually(lambda path=path: self.http.delete(path).status_code in (200, 404), f"{path} deleted")

    def stop(self) -> None:
        self.http.close()
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(WAIT_S)
        finally:
            self.process.kill()
            self.log.close()
            assert self.process.stdout is not None
            self.process.stdout.close()


def eventually(look: Callable[[], Any], what: str) -> Any:
    """What `look` returns once it is true.

    Raises:
        AssertionError: it is not within `WAIT_S`.
    """
    deadline = time.monotonic() + WAIT_S
    while not (found := look()):
        assert time.monotonic() < deadline, f"after {WAIT_S:g} s still not: {what}"
        time.sleep(0.05)
    return found


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    chromium()
    server = Server(tmp_path_factory.mktemp("served") / "out")
    yield server
    server.stop()


@pytest.fixture
def quiet(server: Server) -> Iterator[Server]:
    """The server, with nothing in it before and after."""
    server.clear()
    yield server
    server.clear()


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    path = chromium()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, headless=True, args=OPTIONS)
        yield browser
        browser.close()


class Visit:
    """A fresh profile, and everything that its pages did that they should not.

    Attributes:
        faults: errors in the console, uncaught exceptions, requests that went elsewhere, answers from 400 on.
    """

    def __init__(self, browser: Browser, server: Server, **options: Any) -> None:
        self.server = server
        self.faults: list[str] = []
        self.context: BrowserContext = browser.new_context(
            **{"viewport": {"width": 1440, "height": 1000}, "color_scheme": "light"} | options
        )
        self.context.set_default_timeout(WAIT_S * 1000)

    def page(self) -> Page:
        """A new tab with the page in it, ready to be used."""
        page = self.context.new_page()
        page.on("console", lambda said: said.type == "error" and self.faults.append(said.text))
        page.on("pageerror", lambda error: self.faults.append(f"uncaught: {error}"))
        page.on("request", lambda request: self._own(request.url))
        page.on("response", lambda answer: answer.status >= 400 and self.faults.append(
            f"{answer.status} {answer.url}"))  # fmt: skip
        page.goto(self.server.url)
        page.wait_for_selector("vidkv-stage[data-state]")
        page.wait_for_selector(".vk-verdict")
        return page

    def _own(self, url: str) -> None:
        if urlsplit(url).scheme not in ("data", "blob") and not url.startswith(self.server.url):
            self.faults.append(f"a request left for {url}")


@pytest.fixture
def visit(browser: Browser, quiet: Server) -> Iterator[Callable[..., Visit]]:
    """Makes visits, and fails the test if any of them had faults."""
    made: list[Visit] = []

    def begin(**options: Any) -> Visit:
        made.append(Visit(browser, quiet, **options))
        return made[-1]

    yield begin
    for visit in made:
        visit.context.close()
    assert [fault for visit in made for fault in visit.faults] == []


def shoot(page: Page, name: str) -> None:
    """Keep a picture of the whole page to look at."""
    SHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SHOTS / f"{re.sub(r'[^a-z0-9-]+', '-', name)}.png", full_page=True)
