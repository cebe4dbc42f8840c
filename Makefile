# make demo    a sample volume through a private Airflow on this machine, verified, with a picture
# make airflow the same Airflow, kept running to click around in (Ctrl-C ends it)
# make test    lint, types and all tests but the long ones
# make test-long  the long ones: what takes minutes by its nature, and EXAMPLES times as many random examples
# make clean   remove what demo and test have made (not the virtual environment)

PYTHON ?= python3.11
BIN := .venv/bin
INSTALLED := .venv/installed
# Processes that tests run in; each may start an Airflow.
WORKERS ?= 3
# How many times as many random examples the long tests take.
EXAMPLES ?= 10
DEMO := $(CURDIR)/.demo
# Hundreds of processes import the same modules: compile each once, also where an image says not to.
export PYTHONDONTWRITEBYTECODE :=

# What types have to say, until the tests are through.
TYPES := .mypy_cache/said

.PHONY: demo airflow test test-long lint style types clean

demo: $(INSTALLED)
	@$(BIN)/python examples/demo.py --home $(DEMO) $(if $(INPUT),--input '$(INPUT)') $(if $(MIP),--mip $(MIP)) $(if $(ROI),--roi '$(ROI)')

airflow: $(INSTALLED)
	@mkdir -p $(DEMO)/volumes
	@CHUNKFLOW_VOLUMES=$(CURDIR)/dags/volumes:$(DEMO)/volumes $(BIN)/chunkflow-airflow up --home $(DEMO)/airflow

lint: style types

style: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/mypy

# Types are checked in the time that tests spend waiting.
test: style
	@mkdir -p $(dir $(TYPES)); trap 'kill $$types' INT TERM; nice $(BIN)/mypy >$(TYPES) 2>&1 & types=$$!; \
	$(BIN)/pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder; tests=$$?; \
	wait $$types || tests=1; cat $(TYPES); exit $$tests

test-long: $(INSTALLED)
	CHUNKFLOW_TEST_EXAMPLES=$(EXAMPLES) $(BIN)/pytest --numprocesses $(WORKERS) -m 'long or hypothesis'

clean:
	rm -rf $(DEMO) .pytest_cache .mypy_cache .ruff_cache .hypothesis

# Installed with the tested pins. A changed setup.cfg or constraints.txt installs again.
$(INSTALLED): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or later with venv is needed: apt install python3.11 python3.11-venv, or make PYTHON=…"; exit 1; }
	@echo "installing into .venv (some minutes when the packages are not cached) …"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[airflow,ingest,test]'
	@touch $@
