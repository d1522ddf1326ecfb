"""`python docs/screenshots.py`: pictures of the report for the documentation, docs/assets/report-*.png.

Made of results/paper, in light, in dark, and as it is printed. It takes a chromium, as the tests of the report do, and pdftoppm (of
poppler-utils) for the printed page. Run it after a change of the report or of those results.
"""

import io
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, sync_playwright

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from evals.report import write  # noqa: E402  the checkout is not installed

ASSETS = ROOT / "docs" / "assets"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "microsoft-edge")
SWEEPS = ("seq_len", "retrieval")
SIZE = {"width": 1200, "height": 1300}
MOST_BYTES = 200_000


def tool(*names: str) -> str:
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        sys.exit(f"error: {names[0]} is not installed: apt install chromium poppler-utils")
    return path


def saved(picture: bytes, name: str) -> None:
    """As docs/assets/<name>.png, in 256 colours."""
    path = ASSETS / f"{name}.png"
    Image.open(io.BytesIO(picture)).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)
    if path.stat().st_size > MOST_BYTES:
        sys.exit(f"error: {path} has {path.stat().st_size} bytes, more than the {MOST_BYTES} that a page should load: lower SIZE")
    print(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1e3:.0f} kB")


def pictures(browser: Browser, sweep: str, folder: Path) -> None:
    report = write([ROOT / "results" / "paper" / sweep], folder / f"{sweep}.html")
    page = browser.new_page(viewport=SIZE)
    page.set_default_timeout(300_000)  # ms
    page.goto(report.as_uri())
    page.wait_for_selector("html[data-ready]", state="attached")
    for theme in ("light", "dark"):
        page.get_by_role("radio", name=theme).check()
        page.mouse.move(0, 0)
        saved(page.screenshot(), f"report-{sweep}-{theme}")
    printed = folder / f"{sweep}.pdf"
    page.pdf(path=printed, format="A4")
    first = [tool("pdftoppm"), "-png", "-r", "90", "-f", "1", "-l", "1", str(printed)]
    saved(subprocess.run(first, check=True, capture_output=True).stdout, f"report-{sweep}-print")
    page.close()


def main() -> None:
    ASSETS.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as play:
        browser = play.chromium.launch(executable_path=os.environ.get("CHROMIUM") or tool(*BROWSERS), args=["--no-sandbox"])
        for sweep in SWEEPS:
            pictures(browser, sweep, Path(folder))


if __name__ == "__main__":
    main()
