"""Kubeflow Pipelines' user interface in Chromium, through Playwright."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from cluster_settings import Settings
from evidence import Saw


class Browser:
    """A page of the user interface.

    Args:
        settings: its address, and the browser where Playwright's own is not wanted.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def __enter__(self) -> Browser:
        from playwright.sync_api import sync_playwright

        self._playwright = sync_playwright().start()
        chromium = self._playwright.chromium
        self._browser = chromium.launch(executable_path=self._settings.chromium or None, args=["--no-sandbox"])
        self.page = self._browser.new_page(viewport={"width": 1440, "height": 1000})
        self.page.set_default_timeout(60_000)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._browser.close()
        self._playwright.stop()

    def open(self, fragment: str) -> Any:
        """Open a page of the interface, such as ``/runs``."""
        self.page.goto(f"{self._settings.ui}/#{fragment}")
        self.page.reload()
        self.page.wait_for_load_state("networkidle")
        return self.page

    def create_run(self, pipeline: str, name: str, data: str, saw: Saw) -> None:
        """Fill in the form "Create run" of a registered pipeline and start it."""
        page = self.open("/pipelines")
        page.screenshot(path=saw.image_path("The Pipelines page"))
        page.get_by_text(pipeline, exact=True).first.click()
        page.get_by_role("button", name="Create run").click()
        page.wait_for_selector("text=Run parameters")
        page.get_by_label("Run name").fill(name)
        page.get_by_label("data", exact=False).first.fill(data)
        page.screenshot(path=saw.image_path("The form Create run"), full_page=True)
        page.get_by_role("button", name="Start").click()
        page.wait_for_timeout(3000)

    def graph(self, run: str, saw: Saw) -> None:
        """The graph of a run."""
        page = self.open(f"/runs/details/{run}")
        page.wait_for_selector(".react-flow__node")
        page.wait_for_timeout(2000)
        page.screenshot(path=saw.image_path("The graph of a finished run"))

    def step(self, run: str, name: str, saw: Saw) -> None:
        """What a step shows: its inputs and outputs, and its visualization."""
        page = self.open(f"/runs/details/{run}")
        page.locator(".react-flow__node", has_text=name).first.click()
        page.wait_for_timeout(2000)
        page.screenshot(path=saw.image_path(f"The step {name}: inputs and outputs"))
        page.get_by_text("Visualization", exact=True).click()
        page.wait_for_timeout(4000)
        page.screenshot(path=saw.image_path(f"The step {name}: visualization"))

    def compare(self, runs: list[str], saw: Saw) -> None:
        """The page "Compare runs"."""
        page = self.open(f"/compare?runlist={','.join(runs)}")
        page.wait_for_timeout(5000)
        page.screenshot(path=saw.image_path("Compare runs"), full_page=True)
