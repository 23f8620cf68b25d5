"""The animated picture of the page in the README: python -m tests.browser.preview apps/assets/page.webp"""

from __future__ import annotations

import io
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

from tests.browser.conftest import OPTIONS, Server, chromium

SIZE = (1280, 860)
SHOWN = (960, 645)
TURN = "a red circle and a blue square bouncing, the red circle turns green"
PICTURE_MS = 250
"""Of the animation; the page is looked at whenever a chunk is there."""


def main(out: Path) -> None:
    pictures: list[Image.Image] = []

    def look(page: Page) -> None:
        shot = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
        pictures.append(shot.resize(SHOWN, Image.Resampling.LANCZOS))

    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        server = Server(Path(folder) / "out")
        browser = playwright.chromium.launch(executable_path=chromium(), headless=True, args=OPTIONS)
        try:
            page = browser.new_page(viewport={"width": SIZE[0], "height": SIZE[1]})
            # so that the model is there when the camera runs
            server.until(server.make(seconds=1)["id"], "completed")
            page.goto(server.url)
            page.wait_for_selector(".vk-verdict")
            look(page)
            page.locator("#vk-length").get_by_role("radio", name="30 s").check()
            page.get_by_role("button", name="Generate", exact=True).click()
            page.wait_for_selector(".vk-frame:not([hidden])")
            steered = False
            seen = 0
            while (video := page.evaluate("document.querySelector('vidkv-stage').video"))["chunks_done"] < 26:
                if video["chunks_done"] > seen:
                    seen = video["chunks_done"]
                    look(page)
                if seen >= 7 and not steered:
                    steered = True
                    page.get_by_label("Change the prompt now").fill(TURN)
                    look(page)
                    page.get_by_role("button", name="Change", exact=True).click()
                page.wait_for_timeout(50)
            page.get_by_role("button", name="Stop and keep").click()
            page.wait_for_selector('vidkv-stage[data-state="completed"]')
            look(page)
        finally:
            browser.close()
            server.stop()
    times = [1500, *[PICTURE_MS] * (len(pictures) - 2), 2500]
    pictures[0].save(
        out, save_all=True, append_images=pictures[1:], duration=times, loop=0, quality=55, method=6
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
