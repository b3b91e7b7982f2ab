"""The report in headless Chromium: on a wide screen and on a phone, light and dark."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

WIDTHS, SCHEMES = {"wide": 1280, "phone": 400}, ("light", "dark")
NOT_FOUND = "no Chromium on PATH: .venv/bin/playwright install chromium, or ESVIT_TEST_CHROMIUM=<its path>"
# Every cell of a table that has a figure in it, outside folded sections, must be inside the window.
OUTSIDE = """() => [...document.querySelectorAll('td.num')]
    .filter(cell => cell.checkVisibility() && cell.innerText.trim())
    .filter(cell => cell.getBoundingClientRect().right > innerWidth + 1)
    .map(cell => cell.closest('tr').innerText)"""
# The lines on which a part of the title's text is set.
LINES = """part => {
    const text = document.evaluate('//h1//text()[contains(., "' + part + '")]', document, null, 9).singleNodeValue;
    const range = document.createRange(), start = text.data.indexOf(part);
    range.setStart(text, start); range.setEnd(text, start + part.length);
    return new Set([...range.getClientRects()].map(box => box.top)).size; }"""
COLORS = """() => ['backgroundColor', 'color'].map(which =>
    getComputedStyle(document.body)[which].match(/\\d+/g).slice(0, 3).reduce((sum, part) => sum + Number(part), 0) / 3)"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium: that of ESVIT_TEST_CHROMIUM, of Playwright, or of the system."""
    with sync_playwright() as playwright:
        own = playwright.chromium.executable_path
        names = ("chromium", "chromium-browser", "google-chrome")
        found = os.environ.get("ESVIT_TEST_CHROMIUM") or (own if Path(own).exists() else None)
        found = found or next(filter(None, map(shutil.which, names)), None)
        if found is None:
            pytest.skip(NOT_FOUND)
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(params=itertools.product(WIDTHS, SCHEMES), ids="-".join)
def opened(browser, finished_html, tmp_path, request) -> Iterator[tuple[Page, list[Any]]]:
    """The report of the finished run in a window, and what the browser complained about or asked the network for."""
    width, scheme = request.param
    file: Path = tmp_path / "report.html"
    file.write_text(finished_html, encoding="utf-8")
    context = browser.new_context(viewport={"width": WIDTHS[width], "height": 900}, color_scheme=scheme)
    page, seen = context.new_page(), []
    page.on("console", lambda message: seen.append(message.text))
    page.on("pageerror", lambda error: seen.append(str(error)))
    page.on("request", lambda sent: seen.append(sent.url) if sent.url != file.as_uri() else None)
    page.goto(file.as_uri())
    page.wait_for_load_state("networkidle")
    yield page, seen
    context.close()


def test_nothing_is_off_screen_requested_or_complained_about(opened):
    page, seen = opened
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.evaluate(OUTSIDE) == []
    assert page.locator("td.num").count() > 20
    assert page.evaluate(LINES, "20-NN") == 1
    images = page.evaluate("[...document.images].map(image => [image.complete, image.naturalWidth > 0])")
    assert images and all(image == [True, True] for image in images)
    assert [entry for entry in seen if not str(entry).startswith("data:")] == []


def test_the_colors_follow_the_scheme(opened, request):
    page, _ = opened
    ground, ink = page.evaluate(COLORS)
    assert (ground > 200 and ink < 80) if "light" in request.node.name else (ground < 60 and ink > 180)
