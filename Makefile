# make ui: the playground in a browser.  make demo: train a style, prove it, look at demo_out/report.html.  make test: prove the project works.
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo ui test check lint types constraints licences audit clean

demo: .venv/train
	$(BIN)/imgadapt demo --output demo_out

ui: .venv/ui
	$(BIN)/imgadapt ui --open

test: .venv/dev
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

check: lint types

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/typos

types: .venv/dev
	$(BIN)/pyright

constraints: .venv/dev  # after: $(BIN)/python -m pip install --upgrade ...
	$(BIN)/python supply/constraints.py

licences: .venv/dev
	$(BIN)/python supply/licences.py

audit: .venv/audit/made
	.venv/audit/bin/python supply/audit.py $(AUDIT)

.venv/audit/made: .venv/made  # apart, for what it brings is none of ours
	$(PYTHON) -m venv .venv/audit
	.venv/audit/bin/python -m pip install --quiet --disable-pip-version-check 'pip-audit>=2.9'
	touch $@

.venv/made:
	$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'imgadapt needs Python 3.11 or newer: make PYTHON=...')"
	$(PYTHON) -m venv .venv
	touch $@

.venv/train: .venv/made pyproject.toml constraints.txt
	@echo "installing imgadapt and what it needs into .venv: some minutes, once"
	$(INSTALL) --editable '.[train]'
	touch $@

.venv/ui: .venv/made pyproject.toml constraints.txt
	@echo "installing imgadapt and what it needs into .venv: some minutes, once"
	$(INSTALL) --editable '.[ui]'
	touch $@ .venv/train

# byte code is made on all cores, where pip takes one of them for most of a minute; what is no Python is passed by, as by pip
.venv/dev: .venv/made pyproject.toml constraints.txt
	$(INSTALL) --no-compile --editable '.[dev]'
	$(BIN)/python -W ignore -m compileall -qq -j 0 .venv/lib || true
	touch $@ .venv/train .venv/ui

clean:
	rm -rf .venv demo_out dist build .pytest_cache .ruff_cache .import_linter_cache
