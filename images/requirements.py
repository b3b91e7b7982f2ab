"""Print the requirements of pyproject.toml without the project itself: its dependencies and those of the named extras.

    python images/requirements.py cluster duplicates export formats

An image installs these in a separate layer, which a change of our code does not rebuild.
"""

import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
wanted = [*project["dependencies"], *(r for extra in sys.argv[1:] for r in project["optional-dependencies"][extra])]
print("\n".join(wanted))
