# make demo    start the server, play a minute of mixed traffic, show the result   (ARGS="--seconds 20" reaches it)
# make test    the tests, on the installed package                                 (ARGS="-k launcher" reaches pytest)
# make check   format, lint, types
# make trtllm-check  in NVIDIA's Triton + TensorRT-LLM image, on a GPU: MODEL=model_repository/slos_llm/1
# make gpu-check   correctness and speed of the engine on this machine's GPU       (ARGS="--tiny" needs none)
# make clean   remove everything that make made
# Each sets up .venv first where it must. PYTHON=python3.12 chooses the interpreter, any from 3.10 to 3.12.

SUPPORTED := import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))
PYTHON ?= $(shell for python in python3 python3.12 python3.11 python3.10; do \
	$$python -c '$(SUPPORTED)' 2>/dev/null && echo $$python && break; done)
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
WITH_VENV = $(PYTHON) -c 'import ensurepip' 2>/dev/null && $(PYTHON) -m venv --clear .venv
WITH_PIP = $(PYTHON) -m venv --clear --without-pip .venv && PYTHONPATH="$$($(PYTHON) -c \
	'import pathlib, pip; print(pathlib.Path(pip.__file__).parents[1])')" $(PIP) install --quiet --ignore-installed pip
PACKAGES := scheduler backend client loadtest
SOURCES := $(shell find $(PACKAGES) -not -path '*__pycache__*')

.PHONY: demo test check gpu-check trtllm-check clean

demo: .venv/installed
	$(BIN)/slos-serve demo $(ARGS)

test: .venv/installed $(BIN)/promtool
	$(BIN)/pytest $(ARGS)

gpu-check: .venv/installed
	$(BIN)/slos-serve gpu-check $(ARGS)

# mypy does not report on what lies in site-packages, so it is shown a copy of what was installed there.
check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf .types && mkdir .types && cp -r .venv/lib/python3*/site-packages/slos_serve .types/
	MYPYPATH=.types $(BIN)/mypy --explicit-package-bases -p slos_serve

# Not in .venv: TensorRT-LLM is in the image's own Python, where docker/Dockerfile has installed this package.
trtllm-check:
	slos-serve trtllm-check $(MODEL) $(ARGS)

clean:
	rm -rf .venv .types build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Everything but this package. A Debian without python3-venv has no pip for a new environment: it lends its own.
.venv/ready: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "no Python 3.10 to 3.12 found: install one, or make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c '$(SUPPORTED)' || { echo "$(PYTHON) is not a Python 3.10 to 3.12: make PYTHON=python3.11"; exit 1; }
	@$(PIP) --version >/dev/null 2>&1 || { $(WITH_VENV) || $(WITH_PIP); } \
		|| { echo "$(PYTHON) cannot make an environment: apt-get install python3-venv"; exit 1; }
	$(PIP) install --quiet -c constraints.txt setuptools
	$(PIP) install -c constraints.txt ".[dev]"
	touch $@

# Prometheus's own checker, out of the distribution's package and without root. Where this fails, the tests that need
# it are skipped and say so. Images often come without apt's lists: then they are fetched into the same folder.
APT := apt-get -qq -o Acquire::Retries=0 -o Acquire::http::Timeout=20 -o APT::Sandbox::User=root
$(BIN)/promtool: | .venv/ready
	@if found=$$(command -v promtool); then ln -s "$$found" $@; exit; fi; \
	folder=$$(mktemp -d) && mkdir -p $$folder/state/lists/partial $$folder/cache/archives/partial && cd $$folder && { \
		$(APT) download prometheus || { \
		own="-o Dir::State=$$folder/state -o Dir::State::status=/var/lib/dpkg/status -o Dir::Cache=$$folder/cache" && \
		$(APT) $$own update && $(APT) $$own download prometheus; }; } >/dev/null 2>&1 && \
	dpkg-deb --fsys-tarfile prometheus_*.deb | tar -x ./usr/bin/promtool && mv usr/bin/promtool $(CURDIR)/$@ || \
	echo "no promtool: apt-get install prometheus"; rm -rf "$$folder"

# Not editable: the tests see what a user gets. Stale files in build/ would be installed too.
.venv/installed: .venv/ready $(SOURCES)
	rm -rf build
	$(PIP) install --quiet --no-build-isolation --no-deps .
	@rm -rf build
	touch $@
