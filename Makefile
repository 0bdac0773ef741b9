# make demo: install what is pinned and run the main job. make test: all that CI runs.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test format clean

demo: .venv/run
	$(BIN)/longreach compare --output runs/demo

test: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -n 2

format: .venv/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.venv/run: pyproject.toml requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt -e .
	touch $@

.venv/dev: .venv/run requirements-dev.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt -e '.[hf,eval,dev]'
	touch $@

clean:
	rm -rf .venv runs
