"""The layout of the library: every idea has one file, files are short, and no file imports itself through others."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("esvit_core", "components", "pipelines", "benchmarks")
MAX_LINES = 400


def modules(*folders: str) -> list[Path]:
    found = [path for folder in folders for path in (ROOT / folder).rglob("*.py") if "tests" not in path.parts]
    assert found
    return found


def test_no_file_of_the_library_has_the_name_of_another() -> None:
    counted = Counter(path.name for path in modules("esvit_core") if not path.name.startswith("__"))
    assert not [name for name, count in counted.items() if count > 1]


def test_no_module_is_long() -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in modules(*PACKAGES)}
    assert not {str(path.relative_to(ROOT)): n for path, n in lengths.items() if n > MAX_LINES}


@pytest.mark.parametrize("package", ["esvit_core", "esvit_components", "esvit_pipelines"])
def test_no_file_imports_itself_through_others(package: str) -> None:
    graph = grimp.build_graph(package, cache_dir=None)
    left = {name: graph.find_modules_directly_imported_by(name) for name in graph.modules}
    while free := [name for name, imported in left.items() if not imported & left.keys()]:
        for name in free:
            del left[name]
    assert not left, f"these files import each other: {sorted(left)}"
