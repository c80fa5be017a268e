# Every target makes its own environment; VENV=path puts it elsewhere.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin

.PHONY: demo test browser picture torture lint bench clean

# torch and torchvision are resolved together, as they come: a CPU-only torch does not import with the index's torchvision.
$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

demo: $(VENV)/installed
	$(BIN)/python tests/demo.py demo

# These start whole commands, or one for each fault; make test FAST=1 leaves them out.
SLOW := test_cli.py test_readme.py test_demo.py test_bench.py process writer/test_resume.py writer/test_disk.py

test: lint browser
	$(BIN)/python -m pytest -n 2 $(if $(FAST),$(SLOW:%=--ignore=tests/%))

# For the tests that look at the page of `featx show`; where there is no browser they are skipped.
browser:
	@command -v chromedriver >/dev/null || \
	{ apt-get update -qq && apt-get install -qq -y chromium chromium-driver; } >/dev/null 2>&1 || \
	echo "no browser: it could not be installed (Debian's chromium and chromium-driver), its tests are skipped"

# The picture in README: the page of a demo made anew, one image shown, in 256 colours.
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
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[bench]'
	touch $@

# About 12 minutes of a machine with nothing else to do. BENCH="--keep docs/bench.md" keeps the table, BENCH=--quick
# shows in a minute that it works.
bench: $(VENV)/installed-bench
	$(BIN)/python tests/bench.py bench $(BENCH)

clean:
	rm -rf $(VENV) demo bench dist .mypy_cache .ruff_cache .pytest_cache
	find featx tests -name __pycache__ -type d -exec rm -rf {} +
