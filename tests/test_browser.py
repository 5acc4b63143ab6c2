"""Pages in headless Chromium, at desktop and phone width: the report of a run and `ditcli ui`.

`scripts/test_extras.sh` installs what they need. Screenshots are kept with DITCLI_SCREENSHOTS=FOLDER.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from exports import make_run
from tiny import start

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: scripts/test_extras.sh")

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
SIZES = ((1280, 900), (390, 844))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason="needs Chromium"),
    pytest.mark.timeout(900),  # a browser on a busy machine
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


class Visit:
    """A page at an address; whatever it asks of others than `host` is kept in `asked`."""

    def __init__(self, browser, address: str, size: tuple[int, int], host: str):
        self.page = browser.new_page(viewport={"width": size[0], "height": size[1]})
        self.page.set_default_timeout(120_000)
        self.width = size[0]
        self.asked: list[str] = []
        self.errors: list[str] = []
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.host = host
        self.page.goto(address)

    def check(self, screenshot: Path) -> None:
        """Nothing is wider than the window, every picture is there, and nobody else was asked for anything."""
        assert self.page.evaluate("document.documentElement.scrollWidth") <= self.width
        self.page.wait_for_function("document.images.length && [...document.images].every(i => i.naturalWidth)")
        assert [url for url in self.asked if not url.startswith((self.host, "data:", "blob:"))] == []
        assert self.errors == []
        folder = Path(os.environ.get("DITCLI_SCREENSHOTS", screenshot.parent))
        self.page.screenshot(path=folder / screenshot.name, full_page=True)


@pytest.mark.parametrize("size", SIZES)
def test_the_report_fits_the_window_and_asks_nobody(browser, report, tmp_path, size):
    visit = Visit(browser, report.as_uri(), size, host=report.as_uri())
    assert "Step 6 of 6" in visit.page.inner_text("body")
    # Charts are drawn, not empty boxes.
    boxes = visit.page.locator("svg").evaluate_all("all => all.map(svg => svg.getBoundingClientRect().width)")
    assert boxes
    assert all(100 < width <= size[0] for width in boxes)
    visit.check(tmp_path / f"report-{size[0]}.png")
    visit.page.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    """The page of a run that trained for six steps."""
    run = tmp_path_factory.mktemp("runs") / "small"
    shown = {"sample_every": 3, "sample_num": 2, "sample_steps": 2}
    process = start(run, steps=6, environment={"DITCLI_CACHE": str(run.parent / "cache")}, **shown)
    _, told = process.communicate()
    assert process.returncode == 0, told
    return run / "report.html"


def test_a_user_clicks_through_the_page(browser, tmp_path) -> None:
    pytest.importorskip("gradio", reason="needs the extra `ui`")
    make_run(tmp_path / "run")
    words = [sys.executable, "-m", "ditcli", "ui", "--model", "run", "--device", "cpu"]
    with subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            address = process.stdout.readline().strip()
            assert address.startswith("http://127.0.0.1:")
            for size in SIZES:
                visit = Visit(browser, address, size, host=address)
                page = visit.page
                page.get_by_label("dög").uncheck()
                page.get_by_label("Seed").fill("7")
                page.get_by_role("button", name="Draw").click()
                playwright.expect(page.get_by_label("State")).to_have_value("Done.", timeout=120_000)
                line = page.locator("#command textarea, #command input").input_value()
                assert "--labels cat --num 1 --cfg 3" in line
                assert line.endswith("--seed 7")
                visit.check(tmp_path / f"ui-{size[0]}.png")
                page.get_by_label("cat").uncheck()
                page.get_by_role("button", name="Draw").click()
                told = page.get_by_text("no label is chosen: choose one.")
                playwright.expect(told).to_be_visible(timeout=120_000)
                page.close()
        finally:
            process.terminate()
