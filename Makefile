# Every target sets up what it needs; Python 3.11 or newer is all that must be there.
PYTHON ?= python3
VENV   ?= .venv
BIN     = $(VENV)/bin
STAMP   = $(VENV)/.installed
# Where there is no virtual environment, and no network to make one, `make gpu` takes the Python that is there.
ANY     = $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))

# Processes that share the tests; each takes one thread and about a gigabyte.
WORKERS ?= $(shell n=`getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2`; [ $$n -gt 8 ] && n=8; echo $$n)

STAMP_DOCS = $(VENV)/.installed-docs
STAMP_RAY  = $(VENV)/.installed-ray

.PHONY: help setup setup-docs demo test test-ray check docs bench gpu gpu-bundle clean

help:
	@echo "make setup   create $(VENV) and install the project into it"
	@echo "make demo    train a small model on rule-made tasks, compare the decoders, then ask the default model"
	@echo "             (minutes; DEMO=quick leaves the training out)"
	@echo "make test    run the tests (minutes, CPU, offline)"
	@echo "make test-ray   install Ray and run the tests of dlm serve --replicas"
	@echo "make check   ruff, mypy --strict, import-linter"
	@echo "make docs    build the documentation into site/"
	@echo "make bench   training and decoding benchmarks"
	@echo "make gpu     tests, benchmarks and training on a GPU, with a report in runs/gpu; needs no make setup"
	@echo "             (GPU=\"--tiny --device cpu\" tries it in miniature)"
	@echo "make gpu-bundle   what a machine without a network needs for that, in runs/gpu-bundle (docs/air-gapped.md)"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev,eval,serve,quantized]"
	@touch $(STAMP)

demo: $(STAMP)
ifeq ($(DEMO),quick)
	$(BIN)/python -m examples.default_model
else
	-@$(BIN)/python -m examples.default_model --fetch
	$(BIN)/python -m examples.demo
	$(BIN)/python -m examples.default_model --if-fetched
endif

test: $(STAMP)
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal

$(STAMP_RAY): $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[ray]"
	@touch $(STAMP_RAY)

test-ray: $(STAMP_RAY)
	$(BIN)/python -m pytest tests/serve/test_replicas.py -m ray

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

$(STAMP_DOCS): $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[docs]"
	@touch $(STAMP_DOCS)

setup-docs: $(STAMP_DOCS)

docs: $(STAMP_DOCS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "open site/index.html"

bench: $(STAMP)
	$(BIN)/python -m benchmarks.training
	$(BIN)/python -m benchmarks.r2ft
	$(BIN)/python -m benchmarks.decoding
	$(BIN)/python -m benchmarks.batching
	$(BIN)/python -m benchmarks.cost

gpu:
	$(ANY) -m benchmarks.gpu $(GPU)

gpu-bundle: $(STAMP)
	$(BIN)/python -m benchmarks.gpu.bundle --output runs/gpu-bundle $(BUNDLE)

clean:
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
