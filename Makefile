# make train [ARGS="model=vae data=mnist"]   make test   make lint     VENV=path uses another environment
VENV ?= .venv
PYTHON ?= python3
STAMP := $(VENV)/.installed

.PHONY: train test lint
train: $(STAMP)
	$(VENV)/bin/python train.py $(ARGS)

test: $(STAMP) lint
	$(VENV)/bin/python -m pytest -n 2 --dist worksteal $(ARGS)

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

# installed again only when pyproject.toml changed
$(STAMP): pyproject.toml
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	touch $@
