# Everything on a fresh machine with Python 3.10 or newer: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
LAUNCH := $(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no

SITE := $(VENV)/site

# Tests write, sync and remove some ten thousand files: in memory, where there are 4 GiB of it.
MEMORY := $(shell df -Pk /dev/shm 2>/dev/null | awk 'NR == 2 && $$4 > 4194304 { print $$6 }')
IN_SCRATCH := scratch=$$(mktemp -d $(if $(MEMORY),-p $(MEMORY))) && trap 'rm -rf "$$scratch"' EXIT && TMPDIR=$$scratch

.PHONY: demo test test-fast browser quality style site site-tools clean

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
	$(IN_SCRATCH) $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

# What takes seconds, for the loop while you write.
test-fast: $(INSTALLED)
	$(IN_SCRATCH) $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile -m "not slow and not statistical" \
		--ignore tests/system --ignore tests/faults --ignore tests/audit

# For the test of examples/space in a real browser, which is skipped without it; `apt-get` wants root.
browser: $(INSTALLED)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[space,browser]'
	command -v chromium || (apt-get update && apt-get install --yes --no-install-recommends chromium)

quality: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Its tools read the source and import nothing, so they have a light environment of their own, without torch.
$(SITE)/.installed: docs/requirements.txt
	$(PYTHON) -m venv $(SITE)
	$(SITE)/bin/python -m pip install --quiet --requirement docs/requirements.txt
	touch $@

site-tools: $(SITE)/.installed

# The documentation site, into build/site. A warning ends the build.
site:
	@test -e $(SITE)/.installed || { echo "make site: mkdocs is not installed; make site-tools installs it" >&2; exit 1; }
	NO_MKDOCS_2_WARNING=1 $(SITE)/bin/mkdocs build --quiet --strict

style: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) out build dist *.egg-info
