# Everything a newcomer needs: `make run` and `make test`.

PYTHON ?= python3
VENV := .venv
SUDO := $(if $(filter 0,$(shell id -u)),,sudo)
PIP := $(VENV)/bin/pip install --quiet --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help setup run run-local test soak picture hashes bench lint up down redis-server wrk

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1	/p' Makefile | expand -t 14

setup: $(VENV)/run $(VENV)/dev  ## make the virtual environment

run: $(VENV)/run  ## start the server on http://localhost:5000
	@exec $(VENV)/bin/python server.py

run-local: run  ## the same, under its older name

test: $(VENV)/dev redis-server  ## run the tests, with a real redis-server
	$(VENV)/bin/python -m pytest -n 4

soak: $(VENV)/dev redis-server  ## ten minutes of random faults under load
	$(VENV)/bin/python -m pytest -m soak -s

picture: $(VENV)/dev  ## take the picture of the live page again (needs chromium)
	PICTURES=docs $(VENV)/bin/python -m pytest -m picture -k page

hashes: $(VENV)/run  ## write the hashes of the page's style and script into its policy
	$(VENV)/bin/python tools/page_hashes.py

bench:  ## measure every number in the docs (QUICK=1: in a minute, for a glance)
	@$(MAKE) --no-print-directory $(VENV)/dev redis-server wrk >&2
	@$(VENV)/bin/python bench.py

lint: $(VENV)/dev  ## check style and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy *.py tests/*.py
	MYPYPATH=. $(VENV)/bin/mypy tools/*.py

up:  ## start the server and Redis in containers
	docker compose up --build

down:  ## stop them; the counts stay in their volume
	docker compose down

$(VENV)/bin/pip:
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed" if sys.version_info < (3, 11) else 0)'
	@$(PYTHON) -m venv $(VENV) || { echo "Installing Python's venv module (python3-venv)"; \
	  $(SUDO) apt-get update -qq && $(SUDO) apt-get install -y -qq python3-venv && \
	  $(PYTHON) -m venv --clear $(VENV); }

$(VENV)/run: requirements.txt | $(VENV)/bin/pip
	$(PIP) -r requirements.txt && touch $@

$(VENV)/dev: requirements.txt requirements-dev.txt | $(VENV)/bin/pip
	$(PIP) -r requirements-dev.txt && touch $@

redis-server:
	@command -v redis-server >/dev/null || { echo "No redis-server here: installing one"; \
	  if command -v apt-get >/dev/null; then $(SUDO) apt-get update -qq && $(SUDO) apt-get install -y -qq redis-server; \
	  elif command -v brew >/dev/null; then brew install redis; \
	  else echo "No apt-get or brew either: tests that need Redis will be skipped"; fi; }

wrk:
	@command -v wrk >/dev/null || { echo "No wrk here: installing one" >&2; \
	  if command -v apt-get >/dev/null; then { $(SUDO) apt-get update -qq && $(SUDO) apt-get install -y -qq wrk; } >&2; \
	  else echo "No apt-get either: install wrk yourself" >&2; fi; }
