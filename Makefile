# Everything runs from a fresh clone that has only python3 (3.11 or newer) and pip.
# To use another interpreter that already holds the packages:  make test-gpu PY=python3
PYTHON ?= python3
VENV := .venv
PY ?= $(VENV)/bin/python
STAMP := $(VENV)/.installed

# One thread per process: torch's own threads slow small operations down on busy cores.
export OMP_NUM_THREADS ?= 1

ifeq ($(PY),$(VENV)/bin/python)
READY := $(STAMP)
else
READY :=
endif

.PHONY: install demo test lint types tiny ship bench speed claims arms engine test-gpu bench-gpu figures docs clean

install: $(STAMP)

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "python: expected 3.11 or newer, got $$($(PYTHON) -V); run make PYTHON=python3.12"; exit 1; }
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	touch $(STAMP)

demo: install
	$(VENV)/bin/enerverse demo

test: lint types
	$(PY) -m pytest -m "not slow and not gpu"

lint: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: $(READY)
	$(PY) -m pyright --level error

tiny: $(READY)
	$(PY) -m enerverse.recipes.tiny

ship: tiny
	$(PY) -m enerverse.recipes.ship

bench: $(READY)
	$(PY) -m benchmarks.imagination
	$(PY) -m benchmarks.memory recall
	$(PY) -m benchmarks.memory cost
	$(PY) -m benchmarks.policies evaluate
	$(PY) -m benchmarks.sparse_world

speed: $(READY)
	$(PY) -m benchmarks.speed.attention
	$(PY) -m benchmarks.speed.decode
	$(PY) -m benchmarks.speed.costs

engine: $(READY)
	$(PY) -m benchmarks.speed.rasterize
	$(PY) -m benchmarks.speed.recording
	$(PY) -m benchmarks.speed.parallel
	$(PY) -m benchmarks.scenes
	$(PY) -m enerverse.recipes.restorer
	$(PY) -m benchmarks.flywheel
	for arm in rendered flywheel; do $(PY) -m benchmarks.data_help make --arm $$arm || exit 1; done
	for arm in few rendered flywheel true; do $(PY) -m benchmarks.data_help train --arm $$arm || exit 1; done
	$(PY) -m benchmarks.data_help evaluate
	$(PY) -m benchmarks.repair

claims: $(READY)
	$(PY) -m benchmarks.claims all

arms: $(READY)
	for arm in latents untrained mean pixels state; do $(PY) -m benchmarks.policies train --arm $$arm || exit 1; done

test-gpu: $(READY)
	$(PY) -m pytest -m gpu -rs

bench-gpu: $(READY)
	$(PY) -m benchmarks.gpu

figures: $(READY)
	$(PY) -m benchmarks.figures

docs: $(READY)
	$(PY) -m pip install --quiet --disable-pip-version-check -e '.[docs]'
	$(PY) -m mkdocs build --strict

clean:
	rm -rf build dist site *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
