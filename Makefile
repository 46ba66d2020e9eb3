# make demo   train four small models on handwritten digits, on Isthmus and on plain PyTorch, and write report.html
# make test   Python and C++ tests
#
# Each works on a fresh machine: it makes .venv, installs what it needs and builds. TORCH picks the torch to install.

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(shell find csrc cmake -type f) CMakeLists.txt
NVCC ?= $(shell command -v nvcc 2>/dev/null)
CMAKE := PATH="$(CURDIR)/$(BIN):$$PATH" cmake

.PHONY: demo test pytest cpptest lint format bench cuda-check sanitize clean

demo: $(VENV)/.built
	$(BIN)/isthmus demo

test: cpptest pytest

pytest: $(VENV)/.built
	$(BIN)/python -m pytest

cpptest: $(VENV)/.installed
	$(CMAKE) -S . -B build/cpp -G Ninja -DISTHMUS_EXTENSION=OFF -DISTHMUS_TESTS=ON -DISTHMUS_WERROR=ON
	$(CMAKE) --build build/cpp
	PATH="$(CURDIR)/$(BIN):$$PATH" ctest --test-dir build/cpp --output-on-failure

lint: $(VENV)/.built
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $$(git ls-files 'csrc/*.h' 'csrc/*.inl' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh')

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $$(git ls-files 'csrc/*.h' 'csrc/*.inl' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh')

bench: $(VENV)/.built
	$(BIN)/python cmake/extras.py bench | xargs $(BIN)/pip install --quiet
	$(BIN)/python bench/run.py

# What a build with CUDA compiles, with any torch: every kernel for both architectures, and the host code that calls them.
# Joined into one object, to find what is defined twice or not at all. A GPU is not needed; nvcc is.
CUDA_OBJECTS := $(patsubst %,csrc/CMakeFiles/_C.dir/%.o,module.cpp library.cpp \
  $(patsubst csrc/%,%,$(wildcard csrc/*/op.cpp csrc/*/cuda.cu)))

ifeq ($(NVCC),)
cuda-check:
	@echo "cuda-check: no nvcc on this machine; the CUDA kernels were not compiled"
else
cuda-check: $(VENV)/.installed
	$(CMAKE) -S . -B build/cuda -G Ninja -DISTHMUS_CUDA_CHECK=ON -DISTHMUS_WERROR=ON -DCMAKE_BUILD_TYPE=Release \
	  -DCMAKE_CUDA_COMPILER=$(NVCC) -DPython_EXECUTABLE="$(CURDIR)/$(BIN)/python" \
	  -Dpybind11_DIR="$$($(BIN)/python -m pybind11 --cmakedir)"
	$(CMAKE) --build build/cuda --target $(CUDA_OBJECTS)
	cd build/cuda && ld -r $(CUDA_OBJECTS) -o joined.o
	! nm --undefined-only --demangle build/cuda/joined.o | grep 'isthmus::cuda::'
endif

# The C++ tests with AddressSanitizer and UndefinedBehaviorSanitizer.
sanitize: $(VENV)/.installed
	$(CMAKE) -S . -B build/sanitize -G Ninja -DISTHMUS_EXTENSION=OFF -DISTHMUS_TESTS=ON -DISTHMUS_SANITIZE=ON
	$(CMAKE) --build build/sanitize
	PATH="$(CURDIR)/$(BIN):$$PATH" ctest --test-dir build/sanitize --output-on-failure

clean:
	rm -rf build $(VENV) report.html

# torch is installed before isthmus: the build compiles against it.
$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet '$(TORCH)' numpy
	$(BIN)/python cmake/extras.py dev cli | xargs $(BIN)/pip install --quiet
	touch $@

$(VENV)/.built: $(VENV)/.installed $(SOURCES)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pip install --quiet --no-build-isolation --no-deps -e .
	ln -sf "$$(find build -name compile_commands.json | head -1)" compile_commands.json
	touch $@
