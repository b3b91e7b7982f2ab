"""The links of the documentation lead to existing files and headings, and every alert has a runbook."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def pages() -> list[Path]:
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", "*.md"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    return sorted(ROOT / name for name in listed if (ROOT / name).exists())


def anchors(page: Path) -> set[str]:
    """Anchors of the headings of a page, as GitHub generates them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def exists(link: str, page: Path) -> bool:
    """Whether a relative link leads to an existing file, and to an existing heading of it."""
    file, _, anchor = link.partition("#")
    target = (page.parent / file).resolve() if file else page
    if not target.exists():
        return False
    return not anchor or anchor in anchors(target)


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_existing_targets(page: Path) -> None:
    links = [link for link in LINK.findall(page.read_text(encoding="utf-8")) if not re.match(r"[a-z]+:", link)]
    assert [link for link in links if not exists(link, page)] == []


def test_every_alert_has_a_runbook() -> None:
    from esvit_core.monitoring.alerts import alert_rules

    rules = [rule for group in alert_rules()["groups"] for rule in group["rules"]]
    assert rules
    for rule in rules:
        file, _, anchor = rule["annotations"]["runbook"].partition("#")
        assert anchor in anchors(ROOT / file)
