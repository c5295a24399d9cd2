# Everything on a fresh machine with Python 3.10 or newer: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
LAUNCH := $(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no

.PHONY: demo test test-fast browser quality style clean

# torch comes first, and pinned: an unpinned torch brings gigabytes of CUDA to a machine that has no use for them.
$(INSTALLED): setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,quality]'
	touch $@

demo: $(INSTALLED)
	$(LAUNCH) examples/train_dp_curriculum.py --config examples/configs/digits-demo.yaml --output_dir out/digits-demo --overwrite_output_dir
	$(BIN)/dp-curriculum verify out/digits-demo --local_run
	$(BIN)/dp-curriculum evaluate out/digits-demo --report_html
	@cat examples/next_steps.txt

# A file of tests on each core: a file shares what it has trained.
test: $(INSTALLED)
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

# What takes seconds, for the loop while you write.
test-fast: $(INSTALLED)
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile -m "not slow and not statistical" \
		--ignore tests/system --ignore tests/faults --ignore tests/audit

# For the test of examples/space in a real browser, which is skipped without it; `apt-get` wants root.
browser: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[space,browser]'
	command -v chromium || (apt-get update && apt-get install --yes --no-install-recommends chromium)

quality: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

style: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) out build dist *.egg-info
