"""The page as people use it, in a real browser: `make browser`."""

from __future__ import annotations

import json
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image

from tests.browser.conftest import Server, Visit, eventually, shoot
from vidkv.segments import probe, read_metadata

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = pytest.mark.browser

Begin = Callable[..., Visit]
TABS, WHOLE = 100, 4
"""Tabs that are closed; how many of them load the form too, which takes most of the time."""
CONNECTIONS = 100
LOOKS = [
    pytest.param(width, height, scheme, id=f"{width}-{scheme}")
    for width, height in ((1440, 1000), (390, 844))
    for scheme in ("light", "dark")
]
PIXELS = """
() => {
  const stage = document.querySelector("vidkv-stage");
  const [video, image] = [stage.querySelector("video"), stage.querySelector(".vk-frame")];
  const shown = video.hasAttribute("data-ready") && stage.dataset.view !== "frame" ? video : image;
  if (shown === image && (image.hidden || !image.complete || !image.naturalWidth)) return null;
  const canvas = Object.assign(document.createElement("canvas"), { width: 16, height: 16 });
  const paint = canvas.getContext("2d");
  paint.drawImage(shown, 0, 0, 16, 16);
  return [...paint.getImageData(0, 0, 16, 16).data].join();
}
"""
"""What is seen on the stage, small."""
CHANGED = f"(seen) => {{ const now = ({PIXELS})(); return now && now !== seen && now; }}"


def stage_state(page: Page, *states: str) -> None:
    """Wait until the stage shows a video in one of these states."""
    page.wait_for_selector(",".join(f'vidkv-stage[data-state="{state}"]' for state in states))


def stage_id(page: Page) -> str:
    return str(page.evaluate("document.querySelector('vidkv-stage').video.id"))


def next_id(page: Page, before: str) -> str:
    """The id of the video that comes onto the stage after another one."""
    other = "(before) => (document.querySelector('vidkv-stage').video?.id ?? before) !== before"
    page.wait_for_function(other, arg=before)
    return stage_id(page)


def prompt_is(page: Page, text: str) -> None:
    """Wait until the form says so: Gradio fills it in its own time."""
    page.wait_for_function("text => document.querySelector('#vk-prompt textarea')?.value === text", arg=text)


def fill_prompt(page: Page, text: str) -> None:
    page.get_by_label("What should be seen?").fill(text)


def choose_length(page: Page, length: str) -> None:
    page.locator("#vk-length").get_by_role("radio", name=length, exact=True).check()


def generate(page: Page) -> str:
    """Press the button; the id of the video that comes onto the stage."""
    before = str(page.evaluate("document.querySelector('vidkv-stage').video?.id ?? ''"))
    page.get_by_role("button", name="Generate", exact=True).click()
    return next_id(page, before)


def pixels_change(page: Page, times: int = 3) -> None:
    """Wait until what the stage shows has been something else so often."""
    seen = page.wait_for_function(PIXELS).json_value()
    for _ in range(times):
        seen = page.wait_for_function(CHANGED, arg=seen).json_value()


def downloaded(server: Server, id: str, folder: Path) -> Path:
    path = folder / f"{id}.mp4"
    path.write_bytes(server.http.get(f"/v1/videos/{id}/content").content)
    return path


class TestFirstVisit:
    @pytest.mark.parametrize(("width", "height", "scheme"), LOOKS)
    def test_every_tab_says_what_to_do(self, visit: Begin, width: int, height: int, scheme: str) -> None:
        page = visit(viewport={"width": width, "height": height}, color_scheme=scheme).page()
        assert page.title() == "vidkv"
        assert page.get_by_role("heading", name="Your video appears here").is_visible()
        assert "Fits" in page.locator("#vk-estimate").inner_text()
        shoot(page, f"first-create-{width}-{scheme}")
        self._check_width(page)
        page.get_by_role("tab", name="Gallery & queue").click()
        page.get_by_role("heading", name="No videos yet").wait_for()
        shoot(page, f"first-gallery-{width}-{scheme}")
        self._check_width(page)
        page.get_by_role("tab", name="Compare").click()
        page.get_by_role("heading", name="One seed, two caches").wait_for()
        shoot(page, f"first-compare-{width}-{scheme}")
        self._check_width(page)

    @staticmethod
    def _check_width(page: Page) -> None:
        wide, window = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        assert wide <= window

    def test_nothing_jumps_while_it_loads(self, visit: Begin) -> None:
        page = visit().page()
        moved = page.evaluate(SHIFTS)
        assert moved < 0.1

    def test_colours_follow_the_browser(self, visit: Begin) -> None:
        shades = []
        for scheme in ("light", "dark"):
            page = visit(color_scheme=scheme).page()
            shades.append(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        light, dark = (
            sum(map(int, shade.removeprefix("rgb(").removesuffix(")").split(","))) for shade in shades
        )
        assert light > 600 and dark < 120

    def test_nothing_moves_for_who_does_not_want_it(self, visit: Begin) -> None:
        assert visit(reduced_motion="no-preference").page().evaluate("document.getAnimations().length") > 0
        assert visit(reduced_motion="reduce").page().evaluate("document.getAnimations().length") == 0

    def test_everything_has_a_name(self, visit: Begin) -> None:
        """Of what can be used with a keyboard, as a screen reader says it."""
        page = visit().page()
        assert page.evaluate(NAMELESS) == []

    def test_the_keyboard_is_explained(self, visit: Begin) -> None:
        page = visit().page()
        page.locator("h1").click()
        page.keyboard.press("?")
        listed = page.get_by_role("dialog", name="Keyboard shortcuts")
        listed.wait_for()
        page.keyboard.press("Escape")
        listed.wait_for(state="detached")
        page.keyboard.press("g")
        page.get_by_role("heading", name="No videos yet").wait_for()

    def test_no_text_is_hard_to_read(self, visit: Begin) -> None:
        """Contrast of at least 4.5 between texts and what is behind them, light and dark."""
        for scheme in ("light", "dark"):
            looked, poor = visit(color_scheme=scheme).page().evaluate(CONTRAST)
            assert looked > 20 and poor == []


CONTRAST = """
() => {
  const canvas = Object.assign(document.createElement("canvas"), { width: 1, height: 1 });
  const paint = canvas.getContext("2d", { willReadFrequently: true });
  const over = (colour, ground) => {
    paint.fillStyle = `rgb(${ground.join()})`;
    paint.fillRect(0, 0, 1, 1);
    paint.fillStyle = colour;
    paint.fillRect(0, 0, 1, 1);
    return [...paint.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const linear = (c) => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
  const light = (colour) =>
    [0.2126, 0.7152, 0.0722].reduce((sum, part, i) => sum + part * linear(colour[i] / 255), 0);
  const own = (element) => getComputedStyle(element).backgroundColor;
  const ground = (element) => (element ? over(own(element), ground(element.parentElement)) : [255, 255, 255]);
  const poor = [];
  let looked = 0;
  for (const element of document.querySelectorAll("body *")) {
    const text = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    const seen = element.checkVisibility({ visibilityProperty: true, opacityProperty: true });
    if (!text || !seen || element.closest(".vk-offscreen, [aria-hidden=true]")) continue;
    looked += 1;
    const behind = ground(element);
    const [a, b] = [light(over(getComputedStyle(element).color, behind)), light(behind)];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) poor.push(`${ratio.toFixed(2)} ${element.outerHTML.slice(0, 120)}`);
  }
  return [looked, poor];
}
"""
NAMELESS = """
() => [...document.querySelectorAll("button, input, select, textarea, [role=slider], video, img")]
  .filter((element) => element.checkVisibility({ visibilityProperty: true }))
  .filter((element) => !element.closest("[aria-hidden=true]"))
  .filter((element) => !(element.textContent.trim() || element.labels?.length || element.ariaLabel
    || element.title || element.hasAttribute("alt") || element.getAttribute("aria-labelledby")))
  .map((element) => element.outerHTML.slice(0, 160))
"""
SHIFTS = """
() => new Promise((done) => {
  let moved = 0;
  new PerformanceObserver((list) => {
    for (const entry of list.getEntries()) if (!entry.hadRecentInput) moved += entry.value;
  }).observe({ type: "layout-shift", buffered: true });
  requestAnimationFrame(() => requestAnimationFrame(() => done(moved)));
})
"""


class TestOneVideo:
    def test_from_a_sentence_to_a_file(self, visit: Begin, quiet: Server, tmp_path: Path) -> None:
        """Generate, watch, change the prompt, stop and keep, reload, extend, branch."""
        page = visit().page()
        fill_prompt(page, "a red circle bouncing")
        choose_length(page, "Until I stop it")
        id = generate(page)
        pixels_change(page)
        shoot(page, "running-1440-light")

        page.get_by_label("Change the prompt now").fill("a red circle bouncing, the red circle turns blue")
        page.get_by_label("What becomes of the history").select_option("recache")
        page.get_by_role("button", name="Change", exact=True).click()
        page.locator(".vk-now", has_text="turns blue").wait_for()
        assert page.locator(".vk-later li", has_text="turns blue").locator("em").inner_text() == "recache"
        switched = eventually(
            lambda: [entry for entry in entries(quiet, id) if "turns blue" in entry["prompt"]],
            "a chunk with the new prompt",
        )
        quiet.until_chunks(id, switched[0]["chunk"] + 8)
        pixels_change(page)

        page.get_by_role("button", name="Stop and keep").click()
        stage_state(page, "completed")
        video = quiet.video(id)
        file = downloaded(quiet, id, tmp_path)
        assert probe(file).frames == video["frames"] == entries(quiet, id)[-1]["frames"]
        assert "turns blue" in read_metadata(file)["prompts"]
        colours = last_frame_colours(quiet, id)
        assert colours["blue"] > 20 > colours["red"]
        page.wait_for_function(
            "((seen) => seen.currentTime > 0.2 && seen.videoWidth === 64)(document.querySelector('video'))"
        )
        shoot(page, "finished-1440-light")

        page.reload()
        stage_state(page, "completed")
        assert stage_id(page) == id
        prompt_is(page, "a red circle bouncing")

        page.get_by_role("button", name="Extend").click()
        page.get_by_label("Seconds more").fill("2")
        page.get_by_role("dialog").get_by_role("button", name="Extend").click()
        longer = next_id(page, id)
        stage_state(page, "completed")
        file = downloaded(quiet, longer, tmp_path)
        assert probe(file).frames == quiet.video(longer)["frames"] == video["frames"] + 2 * 16
        assert quiet.video(longer)["parent"]["id"] == id and quiet.video(id) == video

        page.locator(".vk-timeline i").nth(1).click()
        page.get_by_role("button", name="Branch from here").click()
        assert page.get_by_label("Chunks to take over").input_value() == "2"
        page.get_by_label("Prompt from there on").fill("a red circle resting")
        page.get_by_label("Seconds from there").fill("2")
        page.get_by_role("dialog").get_by_role("button", name="Branch").click()
        branch = next_id(page, longer)
        stage_state(page, "completed")
        assert quiet.video(branch)["parent"] == {"id": longer, "chunk": 2}
        assert [entry["prompt"] for entry in entries(quiet, branch)][-1] == "a red circle resting"
        assert probe(downloaded(quiet, branch, tmp_path)).frames == quiet.video(branch)["frames"]

    def test_pause_and_resume(self, visit: Begin, quiet: Server) -> None:
        page = visit().page()
        choose_length(page, "Until I stop it")
        id = generate(page)
        pixels_change(page, 1)
        page.locator("h1").click()
        page.keyboard.press("p")
        stage_state(page, "paused")
        done = quiet.video(id)["chunks_done"]
        page.get_by_role("button", name="Resume").click()
        stage_state(page, "in_progress")
        quiet.until_chunks(id, done + 2)
        page.keyboard.press("s")
        stage_state(page, "completed")

    def test_settings_can_be_copied_and_reused(self, visit: Begin, quiet: Server) -> None:
        quiet.until(
            quiet.make(id="old", seed=41, cache="int4,keep_sinks=false,newer=", seconds=2)["id"], "completed"
        )
        first = visit(permissions=["clipboard-read", "clipboard-write"])
        page = first.page()
        page.get_by_role("tab", name="Gallery").click()
        page.get_by_role("button", name="Open a red circle bouncing").click()
        stage_state(page, "completed")
        for item, part in (("Copy as command", "vidkv generate"), ("Copy as Python", "from vidkv import"),
                           ("Copy settings", '"seed": "41"')):  # fmt: skip
            page.locator(".vk-menu summary").click()
            page.get_by_role("button", name=item).click()
            page.wait_for_function(
                "async (part) => (await navigator.clipboard.readText()).includes(part)", arg=part
            )
        fill_prompt(page, "a blue square bouncing")
        page.get_by_role("button", name="Reuse settings").click()
        page.wait_for_function("document.querySelector('#vk-seed input').value === '41'")
        prompt_is(page, "a red circle bouncing")
        assert page.locator("#vk-preset label.selected").inner_text().strip() == "Smallest"

    def test_cache_panel_tells_what_the_log_tells(self, visit: Begin, quiet: Server) -> None:
        quiet.make(id="panel", seconds=12, cache="int8,window=9,sink=3")
        quiet.until("panel", "completed")
        page = visit().page()
        page.evaluate("document.dispatchEvent(new CustomEvent('vidkv-open', { detail: 'panel' }))")
        stage_state(page, "completed")
        last = entries(quiet, "panel")[-1]
        page.locator(".vk-pages i").first.wait_for()
        kinds = page.locator(".vk-pages i").evaluate_all("(pages) => pages.map((page) => page.dataset.kind)")
        assert kinds.count("sink") == len(last["sinks"]) == 3
        assert len(kinds) - kinds.count("gone") == len(last["resident"])
        assert kinds.count("gone") == len(last["evicted"]) > 0
        numbers = page.get_by_role("region", name="KV cache").locator("dl").inner_text()
        assert f"{last['kv_bytes'] / 1000:.0f} kB" in numbers
        assert page.locator(".vk-plot polyline").count() == 3

    def test_memory_stays_flat_over_a_long_log(self, visit: Begin) -> None:
        page = visit().page()
        kept = page.evaluate(
            """async () => {
              const { Series } = await import("/page/stage.js");
              const series = new Series();
              let most = 0;
              for (let chunk = 0; chunk < 20000; chunk += 1) {
                series.add([{ chunk, second: chunk, drift: { luma: chunk } }], chunk);
                most = Math.max(most, series.points.length);
              }
              return [most, series.points[0].chunk, series.points.at(-1).chunk];
            }"""
        )
        assert kept[0] <= 200 and kept[1:] == [0, 19999]


def entries(server: Server, id: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = server.ask("GET", f"/v1/videos/{id}/log")["entries"]
    return found


def last_frame_colours(server: Server, id: str) -> dict[str, int]:
    """Pixels of the last frame that are clearly red, and clearly blue."""
    import io

    picture = np.asarray(
        Image.open(io.BytesIO(server.http.get(f"/v1/videos/{id}/frame").content)).convert("RGB"), int
    )
    red, green, blue = np.moveaxis(picture, -1, 0)
    return {
        "red": int(((red > 150) & (green < 100) & (blue < 100)).sum()),
        "blue": int(((blue > 150) & (red < 100)).sum()),
    }


class TestForm:
    def test_words_that_the_model_does_not_know(self, visit: Begin, quiet: Server) -> None:
        page = visit().page()
        fill_prompt(page, "an elephant bouncing")
        page.locator("#vk-estimate", has_text="elephant").wait_for()
        page.get_by_role("button", name="Generate", exact=True).click()
        message = page.locator("#vk-message").get_by_role("alert")
        message.wait_for()
        assert "elephant" in message.inner_text() and "circle" in message.inner_text()
        shoot(page, "refused-1440-light")
        fill_prompt(page, "<b>bold</b> ${1 + 1} {{value}}")
        page.locator("#vk-estimate", has_text="'<'").wait_for()
        assert page.locator("#vk-estimate b").count() == 0
        assert "${1 + 1} {{value}}" in page.evaluate("sessionStorage.getItem('vidkv.draft')")
        fill_prompt(page, " ")
        page.locator("#vk-estimate", has_text="Write a prompt first").wait_for()
        assert quiet.ask("GET", "/v1/videos")["data"] == []

    def test_a_model_that_is_not_here_says_what_it_needs(self, visit: Begin) -> None:
        page = visit().page()
        page.get_by_label("Model", exact=True).first.click()
        page.get_by_role("option", name="self-forcing-1.3b – needs weights").click()
        needs = page.locator("#vk-model-help", has_text="Not on this machine yet")
        needs.wait_for()
        assert "vidkv convert" in needs.inner_text() and "GB" in needs.inner_text()
        page.locator("#vk-estimate", has_text="no weights").wait_for()

    def test_the_estimate_follows_the_choice(self, visit: Begin) -> None:
        page = visit().page()
        cache = page.locator("#vk-estimate dd").first
        balanced = cache.inner_text()
        page.locator("#vk-preset").get_by_role("radio", name="Exact").check()
        page.wait_for_function(
            "(old) => document.querySelector('#vk-estimate dd').textContent !== old", arg=balanced
        )
        page.get_by_role("button", name="Advanced").click()
        assert page.get_by_label("Window").input_value() == "21"
        page.get_by_label("Window").fill("12")
        page.locator("#vk-preset label.selected", has_text="Custom").wait_for()

    def test_prompts_of_the_timeline_reach_the_video(self, visit: Begin, quiet: Server) -> None:
        page = visit().page()
        fill_prompt(page, "a red circle bouncing")
        page.get_by_role("button", name="Later prompts").click()
        page.get_by_role("button", name="Add a prompt").click()
        page.get_by_label("Text of prompt 1").fill("a red circle resting")
        page.get_by_label("Second of prompt 1").fill("3")
        page.get_by_label("Switch of prompt 1").select_option("flush")
        shoot(page, "timeline-1440-light")
        id = generate(page)
        assert quiet.video(id)["schedule"] == [[3.0, "a red circle resting", "flush"]]

    def test_a_picture_to_start_from(self, visit: Begin, quiet: Server, tmp_path: Path) -> None:
        Image.fromarray(np.full((64, 64, 3), (30, 30, 30), np.uint8)).save(tmp_path / "start.png")
        (tmp_path / "broken.png").write_bytes(b"no picture at all")
        page = visit().page()
        page.get_by_role("button", name="Start from a picture").click()
        upload = page.locator("#vk-upload input[type=file]")
        upload.set_input_files(tmp_path / "broken.png")
        page.locator("#vk-upload", has_text="broken").wait_for()
        page.get_by_role("button", name="Generate", exact=True).click()
        page.locator("#vk-message").get_by_role("alert").wait_for()
        assert quiet.ask("GET", "/v1/videos")["data"] == []
        page.locator("#vk-upload").get_by_label("Clear").click()
        upload.set_input_files(tmp_path / "start.png")
        page.locator("#vk-upload", has_text="start").wait_for()
        id = generate(page)
        assert quiet.until(id, "completed", "failed")["status"] == "completed"
        assert not list((quiet.root / ".vidkv" / "uploads").glob("*.part"))

    def test_seeds(self, visit: Begin) -> None:
        page = visit().page()
        page.get_by_role("button", name="New", exact=True).click()
        page.wait_for_function("document.querySelector('#vk-seed input').value !== '0'")


class TestGallery:
    def test_search_queue_and_delete(self, visit: Begin, quiet: Server) -> None:
        quiet.until(quiet.make(id="shown", prompt="a green triangle bouncing", seconds=2)["id"], "completed")
        quiet.make(id="running", seconds=600)
        quiet.until_chunks("running", 1)
        quiet.make(id="waiting", prompt="a blue square bouncing")
        page = visit().page()
        page.get_by_role("tab", name="Gallery & queue").click()
        page.locator(".vk-item").nth(2).wait_for()
        assert (
            page.locator(".vk-item", has_text="blue square").locator(".vk-place").inner_text()
            == "place 1 in line"
        )
        page.wait_for_function(
            "document.querySelector('.vk-item[data-status=completed] img').naturalWidth > 0"
        )
        shoot(page, "gallery-1440-light")
        page.get_by_label("Search").fill("triangle")
        assert page.locator(".vk-item").count() == 1
        page.locator(".vk-settings summary").click()
        page.locator(".vk-settings dd", has_text="window=21").wait_for()
        page.get_by_role("button", name="Delete a green triangle").click()
        page.get_by_role("dialog").get_by_role("button", name="Keep as it is").click()
        assert quiet.video("shown")["status"] == "completed"
        page.get_by_role("button", name="Delete a green triangle").click()
        page.get_by_role("dialog").get_by_role("button", name="Delete").click()
        page.get_by_role("heading", name="Nothing fits").wait_for()
        assert quiet.http.get("/v1/videos/shown").status_code == 404
        page.get_by_label("Search").fill("")
        page.get_by_role("button", name="Take out").click()
        quiet.until("waiting", "cancelled")


class TestCompare:
    def test_two_caches_on_one_seed(self, visit: Begin, quiet: Server) -> None:
        page = visit().page()
        page.get_by_role("tab", name="Compare").click()
        page.locator("#vk-comparison").get_by_role("radio", name="5 s", exact=True).check()
        page.locator("#vk-pair-go").click()
        page.locator("vidkv-compare").wait_for()
        a, b = page.locator("vidkv-compare").evaluate(
            "(element) => [element.getAttribute('a'), element.getAttribute('b')]"
        )
        both = [quiet.until(id, "completed") for id in (a, b)]
        assert both[0]["seed"] == both[1]["seed"] and both[0]["cache"] != both[1]["cache"]
        page.locator("vidkv-compare", has_text="PSNR").wait_for()
        page.get_by_role("button", name="Download report").or_(
            page.get_by_role("link", name="Download report")
        ).wait_for()
        shoot(page, "compare-1440-light")
        page.reload()
        page.get_by_role("tab", name="Compare").click()
        page.locator("vidkv-compare", has_text="PSNR").wait_for()

    def test_the_same_cache_twice(self, visit: Begin, quiet: Server) -> None:
        page = visit().page()
        page.get_by_role("tab", name="Compare").click()
        page.get_by_label("Cache B").fill("fp32,window=21,sink=3")
        page.get_by_label("Cache B").press("Enter")
        page.locator("#vk-pair-go").click()
        page.locator("#vk-pair-message").get_by_role("alert").wait_for()
        assert quiet.ask("GET", "/v1/videos")["data"] == []


class TestWhoLeaves:
    def test_closed_tabs_and_lost_connections(self, visit: Begin, quiet: Server) -> None:
        """Of a hundred each: no stream stays, and the job does not notice."""
        quiet.make(id="lasting", seconds=3000)
        quiet.until_chunks("lasting", 1)
        one = visit()
        one.context.add_init_script("""sessionStorage.setItem("vidkv.job", '"lasting"')""")
        stage = '<script type="module" src="/page/stage.js"></script><vidkv-stage></vidkv-stage>'
        one.context.route("**/stage", lambda route: route.fulfill(body=stage, content_type="text/html"))
        for number in range(TABS):
            tab = one.context.new_page()
            tab.goto(quiet.url if number < WHOLE else f"{quiet.url}/stage", wait_until="commit")
            tab.wait_for_function("document.querySelector('vidkv-stage')?.source?.readyState === 1")
            tab.close()
        host, port = urlsplit(quiet.url).hostname, urlsplit(quiet.url).port
        assert host and port
        for _ in range(CONNECTIONS):
            with socket.create_connection((host, port)) as connection:
                # a close that resets, as a machine that goes away
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                connection.sendall(
                    f"GET /v1/videos/lasting/events HTTP/1.1\r\nHost: {host}:{port}\r\n\r\n".encode()
                )
                assert connection.recv(1024).startswith(b"HTTP/1.1 200")
        eventually(lambda: quiet.streams() == 0, "no streams are open")
        now = quiet.video("lasting")
        assert now["status"] == "in_progress"
        quiet.until_chunks("lasting", now["chunks_done"] + 2)

    def test_each_tab_has_its_own_video(self, visit: Begin, quiet: Server) -> None:
        one = visit()
        ids = []
        for prompt in ("a red circle bouncing", "a blue square bouncing"):
            page = one.page()
            fill_prompt(page, prompt)
            ids.append(generate(page))
        for id, page in zip(ids, one.context.pages, strict=True):
            page.bring_to_front()
            page.reload()
            page.wait_for_function("document.querySelector('vidkv-stage')?.video")
            assert stage_id(page) == id

    def test_a_hidden_tab_holds_no_stream(self, visit: Begin, quiet: Server) -> None:
        quiet.make(id="lasting", seconds=3000)
        quiet.until_chunks("lasting", 1)
        page = visit().page()
        page.evaluate("document.dispatchEvent(new CustomEvent('vidkv-open', { detail: 'lasting' }))")
        eventually(lambda: quiet.streams() == 1, "a stream")
        page.evaluate(
            "Object.defineProperty(document, 'hidden', { value: true, configurable: true });"
            "document.dispatchEvent(new Event('visibilitychange'))"
        )
        eventually(lambda: quiet.streams() == 0, "no stream")
        page.evaluate("delete document.hidden; document.dispatchEvent(new Event('visibilitychange'))")
        eventually(lambda: quiet.streams() == 1, "a stream again")

    def test_without_a_stream_the_page_asks(self, visit: Begin, quiet: Server) -> None:
        """Behind a proxy that breaks event streams."""
        one = visit()
        one.context.route("**/events", lambda route: route.abort())
        page = one.page()
        choose_length(page, "5 s")
        generate(page)
        stage_state(page, "completed")
        one.faults[:] = [fault for fault in one.faults if "ERR_FAILED" not in fault]


class TestPhone:
    @pytest.mark.parametrize("scheme", ["light", "dark"])
    def test_generate_and_stop(self, visit: Begin, scheme: str) -> None:
        page = visit(viewport={"width": 390, "height": 844}, color_scheme=scheme, has_touch=True).page()
        generate(page)
        pixels_change(page, 1)
        wide, window = page.evaluate("[document.documentElement.scrollWidth, innerWidth]")
        assert wide <= window
        page.wait_for_function(
            "document.querySelector('.vk-picture').getBoundingClientRect().top < innerHeight"
        )
        shoot(page, f"running-390-{scheme}")
        stage_state(page, "completed")
        shoot(page, f"finished-390-{scheme}")
        page.get_by_role("tab", name="Gallery & queue").click()
        page.locator(".vk-item").wait_for()
        shoot(page, f"gallery-390-{scheme}")


def test_settings_are_what_a_script_could_send(visit: Begin, quiet: Server) -> None:
    """What the page queued, POSTed again under another name, is the same video."""
    page = visit().page()
    choose_length(page, "5 s")
    id = generate(page)
    quiet.until(id, "completed")
    request = quiet.ask("GET", f"/v1/videos/{id}/settings")["request"]
    again = quiet.ask("POST", "/v1/videos", json.loads(json.dumps(request)) | {"id": "again"})
    quiet.until(again["id"], "completed")
    files = [quiet.http.get(f"/v1/videos/{name}/content").content for name in (id, "again")]
    pictures = [quiet.http.get(f"/v1/videos/{name}/frame").content for name in (id, "again")]
    assert len(files[0]) > 1000 and pictures[0] == pictures[1]
