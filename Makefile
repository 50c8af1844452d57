# Every target makes .venv itself when it is missing and reuses it when it is there.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin

.PHONY: install demo test fast lint bench cluster cluster-stop clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(RUN)/python || $(PYTHON) -m venv $(VENV)
	$(RUN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: install
	$(RUN)/diffcap demo

# Three at once: launches and SLURM mostly wait. tests/conftest.py keeps what shares a fixture together.
test: install
	$(RUN)/pytest -m 'slow or not slow' -n 3 --dist loadgroup --no-loadscope-reorder

fast: install
	$(RUN)/pytest -n 3 --dist loadgroup --no-loadscope-reorder

lint: install
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy

bench: install
	$(RUN)/python benchmarks/train_step.py
	$(RUN)/python benchmarks/make_shards.py
	$(RUN)/python benchmarks/shuffling.py
	$(RUN)/python -m benchmarks.paper_hours
	$(RUN)/python -m benchmarks.stream
	$(RUN)/python -m benchmarks.scaling

# A real SLURM of two nodes on this machine: Debian, as root.
cluster: install
	$(RUN)/python -m tests.cluster.slurm start

cluster-stop: install
	$(RUN)/python -m tests.cluster.slurm stop

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
