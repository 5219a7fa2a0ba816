# make demo   sets up and packages a small fine-tuned model, end to end
# make test   sets up and passes every check
.PHONY: help demo test unit venv lint docs docs-check locks clean
help:
	@echo "make demo        set up, then package SmolLM2 with a persona LoRA and ask it two questions, offline"
	@echo "make test        set up, then lint, types, docs and all tests"
	@echo "make unit        the unit ring only: offline, under a minute"
	@echo "make venv        set up only: .venv/bin/packager"
	@echo "make lint        ruff and mypy"
	@echo "make docs        write docs/reference from the code; make docs-check fails when it differs"
	@echo "make locks       resolve locks/ again (needs uv; set-up has one)"
	@echo "make clean       remove .demo, build outputs and caches in the checkout (not .venv)"

# Found by the recipe, not at the top: `make help` works on any machine.
PREPARE = python=$$(PYTHON="$(PYTHON)" scripts/python.sh) && "$$python" scripts/prepare.py
RUN = .venv/bin/python
# Two processes share the tests, a file at a time, and one store; more take over 3 GB of memory each.
WORKERS ?= 2
PYTEST = $(RUN) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

venv:
	@$(PREPARE) build

demo:
	@$(PREPARE) demo
	@$(RUN) demo/run.py

test:
	@$(PREPARE) test
	@$(MAKE) --no-print-directory lint docs-check
	$(PYTEST) --cov --cov-report=term

unit:
	@$(PREPARE) test
	$(PYTEST) tests/unit -m "not real"

lint:
	@$(PREPARE) test
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

docs:
	@$(PREPARE) build
	$(RUN) scripts/docs.py

docs-check:
	@$(PREPARE) build
	$(RUN) scripts/docs.py --check

locks:
	@scripts/lock.sh

clean:
	rm -rf .demo build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .coverage htmlcov
