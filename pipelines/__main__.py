"""`python -m esvit_pipelines` is `esvit`."""

from esvit_pipelines.cli.main import main

main()
