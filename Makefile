# make demo: install what is pinned and run the main job. make test: all that CI runs.
# make test-oldest: the tests that use models of transformers, with the oldest version supported.
PYTHON ?= python3
BIN := .venv/bin
OLDEST := $(CURDIR)/.venv/oldest-transformers
USING_TRANSFORMERS := tests/pretrained tests/test_cli.py tests/conformance tests/verbs \
	tests/measure/test_generation.py \
	tests/measure/test_lm_eval.py tests/measure/test_transformers.py tests/measure/test_sweep.py

.PHONY: demo test test-oldest format clean

demo: .venv/run
	$(BIN)/longreach compare --output runs/demo

test: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -n 2
	$(MAKE) test-oldest

test-oldest: .venv/oldest
	PYTHONPATH="$(OLDEST)" $(BIN)/python -c "import transformers as t; print('transformers', t.__version__)"
	PYTHONPATH="$(OLDEST)" $(BIN)/pytest -n 2 $(USING_TRANSFORMERS)

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

.venv/oldest: .venv/dev requirements-oldest.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --upgrade --no-deps --target "$(OLDEST)" \
		-r requirements-oldest.txt
	PYTHONPATH="$(OLDEST)" $(BIN)/pip check
	touch $@

clean:
	rm -rf .venv runs
