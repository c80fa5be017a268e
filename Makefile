# Every target makes its own environment; VENV=path puts it elsewhere.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
# Python compiles a module when it first imports it: compiling all that comes with torch takes longer than the demo.
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --no-compile

.PHONY: demo test browser picture torture lint bench clean

# torch and torchvision are resolved together: a CPU-only torch does not import with PyPI's torchvision.
$(VENV)/installed: pyproject.toml
	@echo "Installing featx and its tools for development into $(VENV), about 7 GB:"
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable '.[dev]'
	touch $@

# What the demo needs. Where $(VENV)/installed is, nothing has to be installed.
$(VENV)/installed-demo: pyproject.toml
	@echo "Installing featx and what its demo needs into $(VENV), about 6 GB, most of it torch:"
	$(PYTHON) -m venv $(VENV)
	$(PIP) --editable '.[demo,show]'
	touch $@

demo: $(or $(wildcard $(VENV)/installed),$(VENV)/installed-demo)
	$(BIN)/python tests/demo.py demo

# These tests start whole commands, run one per fault, or check every network; make test FAST=1 skips them.
SLOW := test_cli.py test_readme.py test_demo.py test_bench.py process/test_signals.py process/test_start.py \
data/test_workers.py model/test_inplace.py writer/test_resume.py writer/test_disk.py

test: lint browser
	$(BIN)/python -m pytest -n 2 --dist loadgroup $(if $(FAST),$(SLOW:%=--ignore=tests/%))

# For the tests of the page of `featx show`; without a browser they are skipped.
browser:
	@command -v chromedriver >/dev/null || \
	{ apt-get update -qq && apt-get install -qq -y chromium chromium-driver; } >/dev/null 2>&1 || \
	echo "no browser (Debian's chromium and chromium-driver could not be installed): skipping the tests that need it"

# The picture in README: the page of a fresh demo with one image selected, in 256 colours.
picture: browser
	rm -rf demo
	$(MAKE) demo
	chromium --headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking \
	--hide-scrollbars --window-size=1280,1080 --virtual-time-budget=10000 --screenshot=demo/show.png \
	"file://$$(ls -t $(CURDIR)/demo/features/*.html | head -1)#things/motorcycle-left.png" 2>demo/chromium.log || \
	{ cat demo/chromium.log; exit 1; }
	$(BIN)/python -c "from PIL import Image; Image.open('demo/show.png').convert('RGB').quantize(256, 2) \
	.save('docs/show.png', optimize=True)"

torture: $(VENV)/installed
	$(BIN)/python -m pytest -m torture

lint: $(VENV)/installed
	$(BIN)/ruff check featx tests
	$(BIN)/ruff format --check featx tests
	$(BIN)/mypy

$(VENV)/installed-bench: $(VENV)/installed
	$(PIP) --editable '.[bench]'
	touch $@

# Takes about 12 minutes on an otherwise idle machine. BENCH="--keep docs/bench.md" saves the table, BENCH=--quick
# shows in a minute that it works.
bench: $(VENV)/installed-bench
	$(BIN)/python tests/bench.py bench $(BENCH)

clean:
	rm -rf $(VENV) demo bench dist .mypy_cache .ruff_cache .pytest_cache
	find featx tests -name __pycache__ -type d -exec rm -rf {} +
