# `make demo` and `make test` do all the set-up on a fresh machine with Python 3.11+.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/installed

.PHONY: help install demo test lint types unit adam8bit bench clean

help:
	@echo "make install   make .venv and install crosslayer with its pinned dependencies"
	@echo "make demo      train, replace and compare on the bundled model (about five minutes)"
	@echo "make test      lint, types and tests"
	@echo "make bench     training step, kernels, capture, training from a store, graphs, big runs; results in benchmarks/results"
	@echo "make clean     remove .venv and the demo's output"

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

demo: install
	$(BIN)/crosslayer demo --out demo --overwrite

test: lint types unit adam8bit

lint: install
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks

types: install
	$(BIN)/basedpyright --level error

unit: install
	$(BIN)/pytest -n 2 --dist loadfile

# Apart from .venv, as transformers imports torchao wherever it is installed, which takes seconds at every start.
adam8bit: install
	$(BIN)/pip install --quiet --no-deps -c constraints.txt --upgrade --target .venv/adam8bit torchao
	PYTHONPATH=.venv/adam8bit $(BIN)/pytest tests/test_optimizers.py -k Adam8bit

bench: install
	$(BIN)/python benchmarks/step.py --keep
	$(BIN)/python benchmarks/sparse_products.py --keep
	$(BIN)/python benchmarks/capture.py --keep
	$(BIN)/python benchmarks/store.py --keep
	$(BIN)/python benchmarks/graph.py --keep
	$(BIN)/python benchmarks/offload.py --keep
	$(BIN)/python benchmarks/scaling.py --keep

clean:
	rm -rf .venv demo
