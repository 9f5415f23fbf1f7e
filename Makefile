# make demo   the main job on a real model       make test   the default tests
# Both make their own virtual environment and install all they need.
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python
CACHE ?= $(or $(FEWBITS_CACHE),$(HOME)/.cache/fewbits)
GPTQMODEL ?= $(CACHE)/gptqmodel
LLAMA = llama-cpp-python==0.3.36
# Some virtual machines announce AMX and trap its instructions.
NO_AMX = $(if $(filter x86_64,$(shell uname -m)),-mno-amx-tile -mno-amx-int8 -mno-amx-bf16)

# Waiting threads of torch must not hold the cores that other work needs.
export OMP_WAIT_POLICY = PASSIVE

.PHONY: demo test lint engine slow fuzz bench bench-methods doors gptqmodel mlx vllm clean

demo: $(VENV)/ready
	$(RUN) -m fewbits demo --out .demo

# One process a core, one thread each.
test: $(VENV)/ready
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto

lint: $(VENV)/ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

slow: $(VENV)/ready
	$(RUN) -m pytest -m slow

fuzz: $(VENV)/ready
	FEWBITS_FUZZ_SECONDS=15 $(RUN) -m pytest tests/attacks/test_fuzz.py

engine: $(VENV)/engine
	$(RUN) -m pytest -m engine

bench: $(VENV)/engine
	$(RUN) bench/encode
	$(RUN) bench/memory

# Every format through every file type into its engines. GPTQModel, mlx-lm and vLLM have environments apart.
doors: $(VENV)/engine gptqmodel mlx vllm
	$(RUN) bench/doors

# Calibrated quantization against its peers; hours. CALIBRATION="--calibration FILE" and TEXT="--text FILE"
# name texts; without, the model writes them. An interrupted run goes on with what .bench keeps.
bench-methods: $(VENV)/engine gptqmodel
	$(RUN) bench/text
	$(RUN) bench/calibrate --gptqmodel $(GPTQMODEL)/bin/python $(CALIBRATION)
	$(RUN) bench/quality --gptqmodel $(GPTQMODEL)/bin/python --keep .bench $(CALIBRATION) $(TEXT)

# llama.cpp is built from source once (about 5 minutes on 2 cores) and kept as a wheel.
$(VENV)/engine: $(VENV)/ready
	mkdir -p $(CACHE)/wheels
	ls $(CACHE)/wheels/llama_cpp_python-0.3.36-*.whl >/dev/null 2>&1 || \
		CMAKE_ARGS="-DLLAVA_BUILD=OFF" CFLAGS="$(NO_AMX)" CXXFLAGS="$(NO_AMX)" $(RUN) -m pip wheel -q --no-cache-dir --no-deps --no-binary llama-cpp-python \
		-w $(CACHE)/wheels $(LLAMA)
	$(RUN) -m pip install -q --find-links $(CACHE)/wheels $(LLAMA)
	$(RUN) -m pip install -q -e '.[engines]'
	touch $@

# A peer of the benchmarks, in an environment of its own: it needs other versions than ours.
gptqmodel: $(GPTQMODEL)/ready

$(GPTQMODEL)/ready:
	$(PYTHON) -m venv $(GPTQMODEL)
	$(GPTQMODEL)/bin/python -m pip install -q gptqmodel==7.7.0 sentencepiece optimum
	touch $@

# vLLM's reader of configs: its wheel, and of what it asks for only what that reader imports.
vllm: $(CACHE)/vllm/ready

$(CACHE)/vllm/ready:
	$(PYTHON) -m venv $(CACHE)/vllm
	$(CACHE)/vllm/bin/python -m pip install -q torch==2.13.0 'transformers>=5.16.1,<5.21' compressed-tensors==0.20.0 \
		aiohttp cachetools cbor2 cloudpickle diskcache einops fastapi gguf llguidance loguru msgspec openai \
		openai-harmony partial-json-parser pillow prometheus_client psutil py-cpuinfo pybase64 pyzmq uvloop xgrammar
	$(CACHE)/vllm/bin/python -m pip install -q --no-deps vllm==0.33.0
	touch $@

mlx: $(CACHE)/mlx/ready

$(CACHE)/mlx/ready:
	$(PYTHON) -m venv $(CACHE)/mlx
	$(CACHE)/mlx/bin/python -m pip install -q 'mlx[cpu]' mlx-lm
	touch $@

$(VENV)/ready: pyproject.toml CMakeLists.txt $(wildcard csrc/*)
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -q torch==2.13.0
	$(RUN) -m pip install -q -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV) build .demo .bench
