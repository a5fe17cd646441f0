# `make demo` and `make test` do all their own set-up; they need Python >= 3.11 and a network to PyPI.
#   make test PYTHON=python3.12 VENV=.venv-3.12     the same with another interpreter
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo test test-deep test-all lint docs clean

demo: $(VENV)/benchmarks.installed
	$(BIN)/python benchmarks/compare.py --output-dir results

# What a change of the package may break.
test: lint
	$(BIN)/pytest -n 2 --dist worksteal -m "not deep"

# The rest: several devices and processes, grids of dtypes and shapes, studies from end to end.
test-deep: $(VENV)/test.installed
	$(BIN)/pytest -n 2 --dist worksteal -m deep

# The site is part of it: its pages run, its tutorials are executed, a browser opens it.
test-all: test docs test-deep

# Into docs/_build/html, to be read from files; a warning is an error.
docs: $(VENV)/docs.installed
	rm -rf docs/_build/html
	$(BIN)/python -m sphinx -E -W --keep-going -q -b html -d docs/_build/doctrees docs docs/_build/html
	@echo "Written: docs/_build/html/index.html"

lint: $(VENV)/test.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports

$(VENV)/%.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "dropmuon_jax needs Python >= 3.11; choose one: make PYTHON=python3.12")'
	@echo "Installing the package and what '$*' needs into $(VENV), about a minute:"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --progress-bar off --disable-pip-version-check --editable '.[$*]'
	touch $@

clean:
	rm -rf $(VENV) results docs/_build docs/_drawn
