# The two main commands: `make demo` runs everything on the sample images, `make test` runs the tests.
# Each installs what it needs into .venv; nothing outside this folder is changed.

PYTHON ?= python3
VENV   ?= .venv
OUT    ?= demo-run
BIN     = $(VENV)/bin
GOLDEN  = tests/pipelines/golden
READY   = $(VENV)/.ready
VERSION = $(shell sed -n 's/^version = "\(.*\)"$$/\1/p' pyproject.toml)
IMAGE  ?= esvit/trainer:$(VERSION)

.PHONY: demo test test-fast slow-tests test-cluster golden component-docs chaos images test-containers lint types check format clean help
.DEFAULT_GOAL := help
# Without bytecode, every process of the tests compiles the library, and pytest rewrites the assertions of every file.
unexport PYTHONDONTWRITEBYTECODE

help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-15s %s\n", $$1, $$2}'

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "error: $(PYTHON) is older than Python 3.11; install 3.11 or newer, or name another: make PYTHON=python3.12 ..." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (a few minutes the first time: PyTorch is large)"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@

demo: $(READY) ## Pre-train, measure, report, and publish on the sample images (under 10 minutes on two cores)
	@$(BIN)/esvit run --recipe demo --data samples/clipart.zip \
	    --transfer digits=samples/digits.zip --transfer clipart-other=samples/clipart-other.zip --out $(OUT)

# One process more than there are cores, up to four, with one thread each: many tests wait for other processes.
# conftest.py says which tests share a process, and in which order they begin.
PROCESSES = $(shell $(BIN)/python -c "import os; print(min(4, (os.cpu_count() or 1) + 1))")
PYTEST  = OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(PROCESSES) --dist loadscope --no-loadscope-reorder

test: $(READY) ## Run all tests, in several processes (no Docker, no root)
	@$(PYTEST) $(ARGS)

test-fast: $(READY) ## Run the fast tests, for the inner loop: all that tests/slow-tests.txt does not list
	@$(PYTEST) -m 'not slow' $(ARGS)

slow-tests: $(READY) ## Measure all tests and rewrite tests/slow-tests.txt
	@$(PYTEST) --record-slow $(ARGS)
	@$(PYTEST) --record-slow -m 'not slow' $(ARGS)

golden: $(READY) ## Recompile the pipelines into tests/pipelines/golden, after an intended change
	@for folder in pipelines/*/; do name=$$(basename $$folder); test ! -f $$folder/pipeline.py || \
	    $(BIN)/esvit compile $$name --recipe $(GOLDEN)/recipe.yaml -o $(GOLDEN)/$$name.yaml || exit; done

component-docs: $(READY) ## Generate the components' READMEs from their docstrings and metadata
	@$(BIN)/python -m esvit_components.readme

chaos: $(READY) ## Kill trainings at random moments and count what is lost (an hour on two cores)
	@$(BIN)/python benchmarks/chaos.py

images: ## Build the container images (needs Docker; settings: docs/images.md)
	@images/build

test-containers: $(READY) ## Test the container images, and run the whole pipeline in them (needs Docker and make images)
	@ESVIT_TEST_IMAGE=$(IMAGE) $(BIN)/python -m pytest tests/containers

test-cluster: $(READY) ## Test the cluster of the current kubeconfig (requirements: docs/install.md)
	@ESVIT_TEST_CLUSTER=1 $(BIN)/python -m pytest tests/cluster --timeout 2400 $(ARGS)

lint: $(READY) ## Check style and format
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

types: $(READY) ## Check the types
	@$(BIN)/mypy

check: lint types test ## Run all checks that must pass before a commit

format: $(READY) ## Format the code
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

clean: ## Remove the environment and the demo's output
	rm -rf $(VENV) $(OUT) build dist *.egg-info
