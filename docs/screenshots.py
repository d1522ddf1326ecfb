"""`python docs/screenshots.py`: makes the pictures of the report that the documentation shows, docs/assets/report-*.png.

The reports are those of results/paper. The command needs chromium, as the tests of the report do. Run it after a change of the
report or of these results.
"""

import io
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Literal

from PIL import Image, ImageOps
from playwright.sync_api import Browser, sync_playwright

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from evals.report import write  # noqa: E402  the checkout is not installed

ASSETS = ROOT / "docs" / "assets"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "microsoft-edge")
MAX_BYTES = 200_000
"""Size that a picture of a web page should not exceed."""

Look = Literal["light", "dark", "print"]
PICTURES: tuple[tuple[str, Look], ...] = (("seq_len", "light"), ("seq_len", "print"), ("retrieval", "dark"))
"""The sweep and the look of each picture."""
SCREEN = {"width": 1200, "height": 1300}
PAPER = {"width": 704, "height": 885}
MARGIN = (45, 53)
"""Sizes in CSS pixels. PAPER is A4 without the report's margins of 12 and 14 mm, and ends below the first charts."""


def find_browser() -> str:
    """Returns the path of a browser: that of the environment variable CHROMIUM, or the first one that is installed."""
    path = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        sys.exit("error: no chromium found: apt install chromium, or set CHROMIUM to its path")
    return path


def photograph(browser: Browser, report: Path, look: Look) -> Image.Image:
    """Opens a report and returns a picture of the upper part of its page."""
    page = browser.new_page(viewport=PAPER if look == "print" else SCREEN)
    page.set_default_timeout(300_000)  # ms
    if look == "print":
        page.emulate_media(media="print")
    page.goto(report.as_uri())
    page.wait_for_selector("html[data-ready]", state="attached")
    if look != "print":
        page.get_by_role("radio", name=look).check()
        page.mouse.move(0, 0)
    picture = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    page.close()
    return ImageOps.expand(picture, MARGIN, "white") if look == "print" else picture


def save(picture: Image.Image, path: Path) -> None:
    """Saves a picture with 256 colours."""
    picture.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
    size = path.stat().st_size
    if size > MAX_BYTES:
        sys.exit(f"error: {path} has {size} bytes, more than {MAX_BYTES}: make the page smaller")
    print(f"{path.relative_to(ROOT)}: {size / 1e3:.0f} kB")


def main() -> None:
    ASSETS.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as play:
        browser = play.chromium.launch(executable_path=find_browser(), args=["--no-sandbox"])
        for sweep, look in PICTURES:
            report = write([ROOT / "results" / "paper" / sweep], Path(folder) / f"{sweep}.html")
            save(photograph(browser, report, look), ASSETS / f"report-{sweep}-{look}.png")


if __name__ == "__main__":
    main()
