"""`python -m esvit_pipelines` is `esvit`."""

from esvit_pipelines.cli import main

main()
