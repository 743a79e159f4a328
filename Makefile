# Two commands: `make demo` and `make test`. Both set up a virtual environment in .venv first.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: demo test lint train bench bench-cpu bench-quick clean

demo: $(VENV)/.ready
	$(RUN) examples/tiny_video/demo.py

test: $(VENV)/.ready
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(RUN) -m pytest -n 2

lint: $(VENV)/.ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

train: $(VENV)/.ready
	$(RUN) examples/tiny_video/train.py

# Every figure of README and docs; docs/performance.md says how they are measured.
bench: $(VENV)/.ready
	$(RUN) -W ignore benchmarks/run.py cpu
	$(RUN) -W ignore benchmarks/run.py examples
	$(RUN) benchmarks/tables.py

bench-cpu: $(VENV)/.ready
	$(RUN) -W ignore benchmarks/run.py cpu
	$(RUN) benchmarks/tables.py

bench-quick: $(VENV)/.ready
	$(RUN) -W ignore benchmarks/run.py cpu --quick

# torch is pinned and installed first: a range would bring the newest build with its CUDA packages.
$(VENV)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(RUN) -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	mkdir -p $(VENV)/types && ln -sfn "$(CURDIR)" $(VENV)/types/sparseattn
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info calibrate_out demo_out finetune_out
