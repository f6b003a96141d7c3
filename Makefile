# Every target sets up what it needs in .venv; python3 and make are all it takes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
FAST := .venv-fast
FRAMEWORKS := .venv-frameworks
DOCS := .venv-docs
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test test-fast test-frameworks zoo faults test-multinode check format bench equivalence clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/'

KERNELS := syncaccum/layer/kernels

# The install compiles the CPU passes, where there is a compiler.
$(INSTALLED): pyproject.toml constraints.txt $(wildcard $(KERNELS)/*.cpp $(KERNELS)/*.py)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade --constraint constraints.txt pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(MAKE) --no-print-directory $(VENV)/mpich
	touch $@

# A second MPI library, to test with both. It would overwrite the first one's mpirun, so it gets an environment of its
# own, which finds everything else in the main one.
.PHONY: $(VENV)/mpich
$(VENV)/mpich:
	$(PYTHON) -m venv --without-pip $@
	$(BIN)/python -m pip --python $@/bin/python install --quiet --constraint constraints.txt mpi4py mpich
	$(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(%r)" % sysconfig.get_path("purelib"))' \
		> "$$($@/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/main_environment.pth"

# A folder for each run: train.py refuses one with checkpoints, which the next demo shall not lose. ARGS may name another.
DEMO_OUTPUT = --output runs/demo-$(shell date +%Y%m%d-%H%M%S)

demo: $(INSTALLED) ## train a ResNet on digits over two gloo ranks with gradient accumulation
	PATH="$(CURDIR)/$(BIN):$$PATH" launch/torchrun_local.sh 2 launch/train.py $(DEMO_OUTPUT) $(ARGS)

test: $(INSTALLED) ## run all tests
	$(BIN)/python -m pytest -n 3 --dist loadgroup $(ARGS)

# TORCH=torch==2.9.1 tries another torch, installed anew each time, with the newest of what it needs.
ifdef TORCH
.PHONY: $(FAST)/.installed
endif
$(FAST)/.installed: constraints.txt
	$(PYTHON) -m venv --clear $(FAST)
	$(FAST)/bin/python -m pip install --quiet $(or $(TORCH),--constraint constraints.txt torch) pytest
	$(if $(TORCH),,touch $@)

test-fast: $(FAST)/.installed ## run the unit tests, which need torch and pytest alone
	$(FAST)/bin/python $(KERNELS)/build.py
	$(FAST)/bin/python -m pytest tests/unit $(ARGS)

# torchvision, which timm and fastai import, fits the registry's own torch alone, and that brings CUDA along.
$(FRAMEWORKS)/.installed: tests/frameworks/requirements.txt
	$(PYTHON) -m venv --clear $(FRAMEWORKS)
	$(FRAMEWORKS)/bin/python -m pip install --quiet --requirement $<
	touch $@

test-frameworks: $(FRAMEWORKS)/.installed ## run the tests with Lightning, transformers, timm, fastai; installs 6 GB, some of it CUDA
	$(FRAMEWORKS)/bin/python -m pytest tests/frameworks $(ARGS)

zoo: $(FRAMEWORKS)/.installed ## try every BatchNorm family of timm, torchvision, smp, transformers, monai; writes docs/zoo.md
	OMP_NUM_THREADS=1 $(FRAMEWORKS)/bin/python -m benchmarks.zoo $(ARGS)

test-multinode: $(INSTALLED) ## run the tests that span nodes, in clusters of containers; docker/engine.sh gets an engine
	docker/run.sh $(ARGS)
	$(if $(ARGS),,docker/replace_node.sh)

faults: $(INSTALLED) ## kill, stop and cut off ranks on nodes made of network namespaces; 1,000 commits under kills
	PYTHON=$(BIN)/python tests/faults/run.sh $(or $(ARGS),--faults-json benchmarks/results/faults.json)
	$(BIN)/python -m benchmarks.kill_schedule

$(DOCS)/.installed: docs/site/requirements.txt
	$(PYTHON) -m venv --clear $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --requirement $<
	touch $@

# docs is a folder, too. The variable takes away a notice of what follows after this version of mkdocs.
.PHONY: docs notebook
docs: $(DOCS)/.installed ## build the documentation's site in runs/site; a warning fails; ARGS=serve shows it while you write
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs $(or $(ARGS),build --strict)

notebook: $(INSTALLED) ## run docs/small-batches.ipynb anew, and keep in it what it shows
	$(BIN)/python docs/site/run_notebook.py

check: $(INSTALLED) ## formatting, lint, import order and strict types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports
	$(BIN)/mypy

format: $(INSTALLED) ## format and mend what lint can mend
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(INSTALLED) ## run every benchmark in 15 minutes; results go to benchmarks/results, and it says what got worse
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m benchmarks.run_all

equivalence: $(INSTALLED) ## compare normalization policies with the large batch; ARGS=--quick takes a minute
	$(BIN)/python -m benchmarks.equivalence $(ARGS)

clean: ## remove the virtual environment and what runs left behind
	rm -rf $(VENV) $(FAST) $(FRAMEWORKS) $(DOCS) runs
