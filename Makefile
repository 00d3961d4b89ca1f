# Few verbs. Each works from a fresh clone with nothing but Python 3.11 to 3.13; see `make help`.

PYTHON ?= python3
VENV ?= .venv
IMAGE ?=
COMFYUI ?=
COMFYUI_PYTHON ?=
OUT ?= out
RUN := $(VENV)/bin/python
ENVIRONMENT := pyproject.toml constraints/torch.txt constraints/dev.txt tools/make_env.py

.DEFAULT_GOAL := help
.PHONY: help setup demo test check attack comfyui lock docs clean

help:
	@echo "make demo               set everything up, then decode a real photograph to four times its size"
	@echo "make demo IMAGE=path  the same with an image of yours"
	@echo "make test               set everything up, then run every check and the tests"
	@echo "make setup              only set up, for development ($(VENV))"
	@echo "make check              linter, types, import contracts"
	@echo "make attack             set everything up, then over 1,500 hostile inputs and 40 kills, in ten minutes"
	@echo "make comfyui COMFYUI=path  every example workflow in ComfyUI itself, from a checkout of it; screenshots in $(OUT)"
	@echo "make lock               write what is installed here into constraints/dev.txt, which setup installs"
	@echo "make docs               rewrite generated parts of documents and build the site into site/"
	@echo "make clean              remove the environment and everything generated"

$(VENV)/.ready-demo: $(ENVIRONMENT)
	@$(PYTHON) tools/make_env.py $(VENV) demo
	@touch $@

$(VENV)/.ready-dev: $(ENVIRONMENT)
	@$(PYTHON) tools/make_env.py $(VENV) dev
	@touch $@ $(VENV)/.ready-demo

setup: $(VENV)/.ready-dev

demo: $(VENV)/.ready-demo
	@$(RUN) tools/make_image.py $(if $(IMAGE),"$(IMAGE)") --out "$(OUT)"

check: setup
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(VENV)/bin/lint-imports --no-cache

test: check
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2

attack: setup
	OMP_NUM_THREADS=1 $(RUN) tests/attack/run.py

comfyui: setup
	$(RUN) tests/comfyui_app/run.py "$(COMFYUI)" --out "$(OUT)/comfyui" $(if $(COMFYUI_PYTHON),--python "$(COMFYUI_PYTHON)")

lock: setup
	$(RUN) tools/dependencies.py lock

docs: setup
	$(RUN) tools/make_docs.py
	$(RUN) tools/make_space_pages.py
	$(VENV)/bin/zensical build --strict

clean:
	rm -rf $(VENV) .venv-* build dist out .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
