# Two commands matter: `make video` and `make test`. Each sets up what it needs, once.

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PROMPT ?= a red circle and a blue square bouncing
WORKERS ?= 2

.DEFAULT_GOAL := help
.PHONY: help video test browser faults soak shapes hour kernels venv lint types format wheel check clean

help:  ## show this list
	@sed -n 's/^\([a-z]*\):.*## /  make \1@/p' $(MAKEFILE_LIST) | tr '@' '\t'

video: $(READY)  ## generate a minute of video, first.mp4
	$(BIN)/vidkv generate "$(PROMPT)" --seconds 60 --out first.mp4

# one thread per worker: two workers with all cores each slow one another down. A worker has files as a
# whole, and what they set up once, until it takes work from one that has more left
test: $(READY)  ## run the whole CPU test suite (ARGS="-k name" narrows it)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal --timeout 900 --durations 10 \
	  $(ARGS)

# one process: the browser, the server and its worker have enough to do
browser: $(READY)  ## use the page in Chromium as people do; pictures in build/browser/ (minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m browser --timeout 600 --durations 10 tests/browser $(ARGS)

faults: $(READY)  ## kill, cancel, fill the disk, feed nonsense: nothing may be lost (minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) -m faults --timeout 900 --durations 5 \
	  tests/faults/test_faults.py
	PYTHONPATH=$(CURDIR) $(BIN)/python -m tests.faults.soak --table --file build/faults.json

soak: $(READY)  ## the same by the thousand; goes on where it stopped (MINUTES=60)
	PYTHONPATH=$(CURDIR) $(BIN)/python -m tests.faults.soak --minutes $(or $(MINUTES),60) --jobs $(WORKERS)

hour: $(READY)  ## an hour of video and more in one rollout, watched; goes on where it stopped
	OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR) $(BIN)/python -m tests.faults.hour
	PYTHONPATH=$(CURDIR) $(BIN)/python -m tests.faults.hour --judge

# in triton's interpreter: about half a second a shape
shapes: $(READY)  ## try the fused read on thousands of random shapes (SHAPES=3000)
	TRITON_INTERPRET=1 VIDKV_SHAPES=$(or $(SHAPES),3000) OMP_NUM_THREADS=1 $(BIN)/python -m pytest \
	  tests/kernels/interpreted/test_paged_attention.py -n $(WORKERS) -q

kernels: $(READY)  ## compile every kernel for GPUs that need not be here, and show what it takes
	$(BIN)/vidkv bench kernels $(ARGS)

lint: $(READY)  ## check style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)  ## repair style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(READY)  ## check types
	$(BIN)/mypy

check: lint types test  ## everything that must hold before a commit

wheel: $(READY)  ## build source archive and wheel in dist/
	rm -rf build/lib build/bdist.* dist
	$(BIN)/python -m build

clean:  ## remove build results and caches, but not the virtual environment
	rm -rf build dist ./*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

venv: $(READY)  ## create .venv and install vidkv with its tools

# an environment that works is kept, so a changed requirement costs one pip run; a broken one, or
# one of an older Python, is made anew
$(READY): pyproject.toml constraints.txt
	@usable='import sys, pip; sys.exit(sys.version_info < (3, 11))'; \
	if ! $(BIN)/python -c "$$usable" 2>/dev/null; then \
	  python=; tried="$(or $(PYTHON),python3 python3.13 python3.12 python3.11)"; \
	  for candidate in $$tried; do \
	    if $$candidate -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; \
	    then python=$$candidate; break; fi; \
	  done; \
	  if [ -z "$$python" ]; then \
	    echo "vidkv needs Python 3.11 or newer; tried: $$tried." >&2; \
	    echo "Install one, or name it: make PYTHON=/path/to/python3 $(or $(MAKECMDGOALS),venv)" >&2; \
	    exit 1; \
	  fi; \
	  if ! $$python -c 'import ensurepip, venv' 2>/dev/null; then \
	    echo "$$python cannot make virtual environments (no venv or ensurepip module)." >&2; \
	    echo "Debian and Ubuntu: apt-get install python3-venv; or name another: make PYTHON=..." >&2; \
	    exit 1; \
	  fi; \
	  echo "$$python -m venv $(VENV)"; \
	  $$python -m venv --clear $(VENV); \
	fi
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	@touch $@
