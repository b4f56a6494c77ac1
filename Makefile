# `make quickstart` and `make test` take a bare clone with Python 3.11 to the end.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
# Compiling is most of the time of short tests, so nothing is optimised.
QUICK := XLA_FLAGS=--xla_backend_optimization_level=0

.PHONY: quickstart test test-full lint mutants gpu

.venv/run: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/dev: .venv/run requirements-dev.txt requirements-export.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	# Asks for numpy < 2 but runs with 2: without its dependencies.
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps pyirstdmetrics==1.0.2
	touch $@

# Minutes on two cores; leaves runs/quickstart/examples.png.
quickstart: .venv/run
	$(BIN)/python main.py --config configs/quickstart.py --workdir runs/quickstart

test: .venv/dev
	$(QUICK) $(BIN)/python -m pytest -q -n 2 -m "not slow"

# Compiles as a run does.
test-full: .venv/dev
	$(BIN)/python -m pytest -q -n 2

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Deliberate bugs, each of which a test must notice (tests/mutants); twenty minutes on two cores.
mutants: .venv/dev
	$(QUICK) $(BIN)/python tests/mutants/run.py

# Parity, train steps, the jitted counts and the benchmarks on a GPU; without one it says so.
gpu: .venv/dev
	$(BIN)/python tests/gpu.py
