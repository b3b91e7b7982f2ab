"""Print the objects that launching a run would create, without sending them, for review.

python -m esvit_core.launch.kubernetes s3://esvit/runs/<id> --recipe demo --set launch.scheduler=volcano
"""

from __future__ import annotations

import argparse

import yaml

from esvit_core.config import Config
from esvit_core.errors import step
from esvit_core.launch.kubernetes.follow import backend


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m esvit_core.launch.kubernetes", description=__doc__)
    parser.add_argument("run_uri")
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args()
    with step("launch"):
        config = Config.load(options.recipe, options.set)
        objects = [body for _, body in backend(config).objects(options.run_uri, config, None)]
        print(yaml.safe_dump_all(objects, sort_keys=False), end="")


if __name__ == "__main__":
    main()
