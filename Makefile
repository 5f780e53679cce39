# make demo: train a small model on real text and see it.   make test: run the whole suite.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test clean
.DEFAULT_GOAL := help

help:
	@echo "make demo   create the environment, train a small Grok-1 on Python's standard library (about 3 minutes)"
	@echo "make test   create the environment and run the whole test suite"

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dashboard]"
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[test]"
	touch $@

demo: $(VENV)/.installed
	$(BIN)/pellucid train

test: $(VENV)/.installed-test
	$(BIN)/pytest -m "not gpu" -n 2 --dist loadfile --ignore tests/browser
	$(BIN)/pytest tests/browser

clean:
	rm -rf $(VENV)
