# make run: install and train. make test: install and test. Both need Python 3.11 or newer with venv, and nothing else.
# PYTHON=python3.12 chooses another Python; ARGS='--steps 50' goes to `shoal train`, TESTS=tests/recipe to pytest.
PYTHON ?= python3
ARGS ?=
TESTS ?=
PIP = .venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: run test test-fast soak lint clean

run: .venv/.run
	@.venv/bin/shoal train $(ARGS)

test: .venv/.dev
	.venv/bin/pytest -m 'not soak' $(TESTS)

test-fast: .venv/.dev
	.venv/bin/pytest -m 'not slow and not soak' $(TESTS)

soak: .venv/.dev
	.venv/bin/pytest -m soak $(TESTS)

lint: .venv/.dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find shoal tests bench -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps are made last, so that an installation that was cut short is taken up again.
.venv/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "Shoal needs Python 3.11 or newer as $(PYTHON): name another one with PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "$(PYTHON) has no venv module: apt-get install python3-venv" >&2; exit 1; }
	@$(PYTHON) -m venv .venv
	@touch $@

.venv/.run: .venv/.made pyproject.toml constraints.txt
	@echo "installing Shoal into .venv: some minutes the first time" >&2
	@$(PIP) --editable '.[serve]'
	@.venv/bin/python -m shoal.comm.native || true
	@touch $@

.venv/.dev: .venv/.made pyproject.toml constraints.txt
	@echo "installing Shoal and its tools into .venv: some minutes the first time" >&2
	@$(PIP) --editable '.[dev]'
	@touch .venv/.run $@
