# Everything runs in .venv, which the first target that needs it makes: nothing but Python and make is expected.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help demo test lint timm-test floor-test bench photographs docs package clean

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
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto

lint: .venv/.installed  ## Check style and types
	@echo "== ruff"
	$(BIN)/ruff check .
	@echo "== mypy: strict in ops/, complete signatures everywhere (a minute of processor time at first, then seconds)"
	$(BIN)/mypy
	@echo "== mypy: a user's file, which sees the public names alone"
	$(BIN)/mypy --strict --follow-imports=silent tests/typed_user.py

timm-test: .venv/.installed  ## Run timm's own model tests, from its source distribution, on our names
	@echo "== timm's tests/test_models.py"
	$(BIN)/python tests/run_timm_tests.py

# The oldest that pyproject.toml claims, and a Python that has them. Without ONNX, which is an extra, and without inductor:
# that of torch 2.9 fails where a compiled model changes its image size.
FLOOR := torch==2.9.1 torchvision==0.24.1 timm==1.0.31 scipy==1.15.0 click==8.1.0
FLOOR_TESTS := tests/ops tests/models/test_placement.py tests/models/test_subpixel_embed.py tests/models/test_spot_vit.py \
	tests/models/test_spot_checkpoint.py tests/models/test_dht_embed.py tests/models/test_pruning_predictor.py

.venv-floor/.installed: pyproject.toml
	@echo "== making .venv-floor with $(FLOOR)"
	$(PYTHON) -m venv .venv-floor
	.venv-floor/bin/python -m pip install --quiet --disable-pip-version-check --editable . $(FLOOR) \
		pytest pytest-timeout hypothesis pillow
	@touch $@

floor-test: .venv-floor/.installed  ## Run the fast part of the tests with the oldest timm and torch that are claimed
	@echo "== running the fast tests on the oldest versions"
	OMP_NUM_THREADS=1 .venv-floor/bin/python -m pytest -q -k 'not onnx and not inductor' $(FLOOR_TESTS)

bench: .venv/.installed  ## Measure speed and memory, write benchmarks/RESULTS.md (TOME=FOLDER: a clone of ToMe too)
	@echo "== python -m benchmarks (about 20 minutes on two threads)"
	$(BIN)/python -m benchmarks $(if $(TOME),--tome $(TOME))

# One set of weights for all budgets beside the ViTs on small pictures; then its priors, and where tokens are dropped.
PHOTOGRAPHS := build/photographs
VITS := $(foreach n,16 25 49 100,--model $(PHOTOGRAPHS)/models/low-res_$(n)-0)
PLACED := .venv/bin/timm-spot evaluate "$(DATA)" --model $(PHOTOGRAPHS)/models/distilled-0 --amp bfloat16 --batch-size 50

photographs: .venv/.installed  ## Train on photographs, write tables and a report (DATA=FOLDER WEIGHTS=FILE|hub TIMM=a clone of timm)
	$(BIN)/python recipes/photographs.py "$(DATA)" "$(WEIGHTS)" --train-script "$(TIMM)/train.py" --out $(PHOTOGRAPHS)
	$(PLACED) --samplers grid,uniform,gaussian,sobol,isotropic,center,salient,salient_lattice --saliency energy \
		--budgets 25,49,100,196 --coverages 0,1 --knn "$(DATA)" --out $(PHOTOGRAPHS)/evaluation
	$(PLACED) $(VITS) --samplers isotropic --budgets 16,25,49,100 --coverages 1 --out $(PHOTOGRAPHS)/rivals

docs: .venv/.docs  ## Build the site, into build/site
	@echo "== mkdocs"
	$(BIN)/mkdocs build --strict --quiet

.venv/.docs: .venv/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[docs]'
	@touch $@

package:  ## Build wheel and sdist, check them, use them in an empty environment without a network
	$(PYTHON) -m venv build/packing
	build/packing/bin/python -m pip install --quiet --disable-pip-version-check build twine
	build/packing/bin/python tests/run_package_smoke.py

clean:  ## Remove .venv and build products
	rm -rf .venv .venv-floor build dist *.egg-info
