# Everything runs in .venv, which the first target that needs it makes: nothing but Python and make is expected.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help demo test lint timm-test bench clean

help:  ## Say what can be made
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

.venv/.installed: pyproject.toml
	@echo "== making .venv and installing timm-spot with its test extras (about 6 GB with PyTorch, some minutes)"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	@touch $@

demo: .venv/.installed  ## Predict the digits in examples/, draw placements, time a base model beside timm's ViT
	@echo "== running examples/demo.py"
	$(BIN)/python examples/demo.py

test: .venv/.installed  ## Run the tests
	@echo "== running the tests"
	$(BIN)/python -m pytest -q

lint: .venv/.installed  ## Check style
	@echo "== ruff"
	$(BIN)/ruff check .

timm-test: .venv/.installed  ## Run timm's own model tests, from its source distribution, on our names
	@echo "== timm's tests/test_models.py"
	$(BIN)/python tests/run_timm_tests.py

bench: .venv/.installed  ## Measure speed and memory, write benchmarks/RESULTS.md (TOME=FOLDER: a clone of ToMe too)
	@echo "== python -m benchmarks (about 20 minutes on two threads)"
	$(BIN)/python -m benchmarks $(if $(TOME),--tome $(TOME))

clean:  ## Remove .venv and build products
	rm -rf .venv build dist *.egg-info
