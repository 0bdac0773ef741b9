# make demo: install what is pinned and run the main job. make test: what is run before every commit.
# make test-all: make test, and what it leaves out (tests/which_tests.py).
# make test-oldest: what depends on the version of transformers, with the oldest version supported.
# make docs: the documentation site, in build/site.
# make experiments/NAME DATA=BOOKS VALID=OTHERS: run an experiment of docs/claims.md again. make claims: write that page
# from the results that are committed.
PYTHON ?= python3
BIN := .venv/bin
OLDEST := $(CURDIR)/.venv/oldest-transformers
EXPERIMENTS := $(patsubst %/claim.py,%,$(wildcard experiments/*/claim.py))

.PHONY: demo test types pytest test-all test-oldest docs claims format clean $(EXPERIMENTS)

demo: .venv/run
	$(BIN)/longreach compare --output runs/demo --seeds 0,1,2

test: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(MAKE) --jobs 2 types pytest
	$(MAKE) test-oldest

types: .venv/dev
	$(BIN)/mypy

# Each of the two processes begins with half of the files, whose fixtures the other then need not make too.
pytest: .venv/dev
	$(BIN)/pytest -n 2 --dist worksteal

# Nothing is left out where what it depends on changed: pytest then says 5, for no tests.
test-all: test
	$(BIN)/pytest -n 2 --dist worksteal --left-out || [ $$? -eq 5 ]

test-oldest: .venv/oldest
	PYTHONPATH="$(OLDEST)" $(BIN)/python -c "import transformers as t; print('transformers', t.__version__)"
	PYTHONPATH="$(OLDEST)" $(BIN)/pytest -n 2 --dist worksteal -m transformers

docs: .venv/dev
	$(BIN)/python docs/site.py build

$(EXPERIMENTS): .venv/run
	$(BIN)/python -m experiments.run $(@F) "$(DATA)" "$(VALID)"

claims: .venv/run
	$(BIN)/python -m experiments.page

format: .venv/dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.venv/run: pyproject.toml requirements.txt hatch_build.py $(wildcard src/longreach/ops/cpu/*.[ch])
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt -e .
	touch $@

.venv/dev: .venv/run requirements-dev.txt requirements-docs.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt -e '.[hf,eval,tensorboard,dev,docs]'
	touch $@

.venv/oldest: .venv/dev requirements-oldest.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --upgrade --no-deps --target "$(OLDEST)" \
		-r requirements-oldest.txt
	PYTHONPATH="$(OLDEST)" $(BIN)/pip check
	touch $@

clean:
	rm -rf .venv build runs
