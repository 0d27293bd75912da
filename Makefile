# Each target sets up what it needs in .venv, so each works on a fresh machine (Python 3.10+, pip; g++ for the compiled kernels).
PYTHON ?= python3
PIP_FLAGS ?= -q
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
SOURCES := setup.py pyproject.toml $(wildcard csrc/*.cpp csrc/*.h csrc/cpu/*.cpp csrc/cpu/*.h csrc/cuda/*)

.PHONY: install demo test bench lint clean

install: $(STAMP)

# Build isolation is off so that the extension is compiled against the PyTorch that it will run with.
$(STAMP): $(SOURCES)
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install $(PIP_FLAGS) --upgrade pip
	$(PY) -m pip install $(PIP_FLAGS) "setuptools>=77" wheel ninja pybind11 "torch>=2.8" torchvision
	$(PY) -m pip install $(PIP_FLAGS) --no-build-isolation -e ".[train,report,test,bench]"
	touch $@

demo: install
	$(PY) -m bnfast train --model resnet14 --data digits --config bn --compare run

test: install
	$(PY) -m ruff check .
	$(PY) -m pytest -q tests

bench: install
	mkdir -p bench/results
	$(PY) -m pytest -q bench --benchmark-json=bench/results/latest.json
	$(PY) -m bench.report bench/results/latest.json

lint: install
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

clean:
	rm -rf build bnfast/*.so *.egg-info
