"""Photograph the dashboard of a run for the docs: `python docs/screenshots.py runs/demo` (needs playwright, Chromium, Pillow).

Writes docs/img/VIEW-light.webp and VIEW-dark.webp for the X-ray, the network, the data river and the experts.
"""

import io
import shutil
import sys
import threading
import time
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

from pellucid.observe.web.feed import Feed
from pellucid.observe.web.server import bind, make_server

VIEWS = {"xray": 900, "network": 900, "river": 760, "experts": 940}  # view -> height of the picture
ARGUMENTS = ["--lang=en-US", "--no-sandbox", "--disable-accelerated-2d-canvas", "--disable-gpu"]
IMAGES = Path(__file__).parent / "img"


def main(run_dir: str) -> None:
    listener, _ = bind(38384)
    server = make_server([Feed(run_dir)])
    threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True).start()
    while not server.started:
        time.sleep(0.01)
    address = f"http://127.0.0.1:{listener.getsockname()[1]}/"
    with sync_playwright() as playwright:
        found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
        browser = playwright.chromium.launch(executable_path=found, args=ARGUMENTS)
        for theme in ("light", "dark"):
            page = browser.new_page(viewport={"width": 1440, "height": 900}, color_scheme=theme)
            page.set_default_timeout(120_000)
            page.goto(address)
            page.wait_for_selector("nav .view-link")
            there = {link.get_attribute("href") for link in page.locator("nav .view-link").all()}
            for view in [view for view in VIEWS if f"#view={view}" in there]:
                page.set_viewport_size({"width": 1440, "height": VIEWS[view]})
                page.goto(f"{address}#view={view}")
                page.wait_for_selector(f"main.view-{view} .panel")
                page.wait_for_selector("main .boot", state="detached")
                page.wait_for_timeout(2500)
                target = IMAGES / f"{view}-{theme}.webp"
                Image.open(io.BytesIO(page.screenshot())).save(target, quality=88, method=6)
                print(f"{target}  {target.stat().st_size / 1000:.0f} kB")
        browser.close()
    server.should_exit = True


if __name__ == "__main__":
    main(sys.argv[1])
