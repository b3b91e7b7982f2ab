"""Kubeflow Pipelines' user interface in Chromium, through Playwright."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

from cluster_settings import Settings
from evidence import Saw
from kube import wait_for

WINDOW = {"width": 1440, "height": 1000}


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
        self.page = self._browser.new_page(viewport=WINDOW)
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

    def create_run(self, version: str, name: str, experiment: str, parameters: dict[str, str], saw: Saw) -> None:
        """Fill in the form "Create run" of a registered pipeline and start it.

        Args:
            version: the page of a version of the pipeline, ``/pipelines/details/.../version/...``.
            name: of the run.
            experiment: that the run belongs to; it exists.
            parameters: the pipeline's parameters that differ from their defaults.
            saw: takes the screenshots.
        """
        page = self.open("/pipelines")
        page.screenshot(path=saw.image_path("The Pipelines page"))
        page = self.open(version)
        page.wait_for_selector(".react-flow__node")  # before, the form would know no version, and have no parameters
        page.get_by_role("button", name="Create run").click()
        page.wait_for_selector("#startNewRunBtn")
        page.locator("#chooseExperimentBtn").click()
        page.locator("#experimentSelectorDialog").get_by_text(experiment, exact=True).first.click()
        page.locator("#useExperimentBtn").click()
        page.get_by_label("Run name").fill(name)
        for parameter, value in parameters.items():
            page.locator(f"[id='{parameter}']").fill(value)
        self._whole(saw.image_path("The form Create run, filled in"))
        page.locator("#startNewRunBtn").click()
        page.wait_for_url(lambda address: "/runs/new" not in address)

    def graph(self, run: str, saw: Saw) -> None:
        """The graph of a run."""
        self._graph(run)
        self.page.screenshot(path=saw.image_path("The graph of a finished run"))

    def step(self, run: str, step: str, saw: Saw) -> None:
        """The inputs and outputs of a step.

        Args:
            run: its id.
            step: the task's name in the pipeline, such as ``linear-probe``.
            saw: takes the screenshot.
        """
        self._graph(run)
        self._node(f"task.{step}").click()
        self.page.wait_for_selector("text=Input/Output")
        self.page.wait_for_timeout(2000)
        self.page.screenshot(path=saw.image_path(f"The step {step}: inputs and outputs"))

    def artifact(self, run: str, step: str, output: str, text: str, saw: Saw) -> None:
        """What the interface draws from an artifact, which is on the artifact's own node of the graph.

        Args:
            run: its id.
            step: the task's name in the pipeline, such as ``linear-probe``.
            output: of the step, such as ``confusion``.
            text: that the visualization has to contain.
            saw: takes the screenshot.
        """
        self._graph(run)
        self._node(f"artifact.{step}.{output}").click()
        self.page.get_by_text("Visualization", exact=True).click()
        wait_for(f"{text!r} in the visualization of {step}'s {output}", lambda: self._shown(text), 60, every=0.5)
        self.page.wait_for_timeout(1000)
        self.page.screenshot(path=saw.image_path(f"{output} of the step {step}"))

    def compare(self, runs: list[str], saw: Saw) -> str:
        """The page "Compare runs"; the text of its table of scalar metrics."""
        page = self.open(f"/compare?runlist={','.join(runs)}")
        page.wait_for_selector("text=Scalar Metrics")
        page.wait_for_timeout(4000)
        self._whole(saw.image_path("Compare runs"))
        return str(page.locator("table").last.inner_text())

    def _graph(self, run: str) -> None:
        self.open(f"/runs/details/{run}")
        self.page.wait_for_selector(".react-flow__node")
        self.page.wait_for_timeout(2000)

    def _node(self, name: str) -> Any:
        return self.page.locator(f".react-flow__node[data-id='{name}']")

    def _shown(self, text: str) -> bool:
        """Whether the page or one of its frames contains the text."""
        return any(frame.get_by_text(text).count() for frame in self.page.frames)

    def _whole(self, path: Path) -> None:
        """A screenshot of the whole page, whose content scrolls inside of a window of fixed height."""
        self.page.set_viewport_size({"width": 1440, "height": 2000})
        self.page.wait_for_timeout(1000)
        self.page.screenshot(path=path)
        self.page.set_viewport_size(WINDOW)
