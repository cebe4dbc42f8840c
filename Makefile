# make demo    a sample volume through a private Airflow on this machine, verified, with a picture
# make airflow the same Airflow, kept running to click around in (Ctrl-C ends it)
# make lint    style, types, and that rooms import only what stands below them
# make test    all tests but the long ones
# make test-long  the long ones: what takes minutes by its nature, EXAMPLES times as many random examples, and HISTORIES
#              random histories of volumes: hours, with as many as are played before a release
# make clean   remove what demo and test have made (not the virtual environment)

PYTHON ?= python3.11
BIN := .venv/bin
INSTALLED := .venv/installed
# Processes that tests run in; each may start an Airflow.
WORKERS ?= 4
# How many times as many random examples the long tests take.
EXAMPLES ?= 10
# How many random histories they play: some eight a second on a core.
HISTORIES ?= 100000
DEMO := $(CURDIR)/.demo
# Hundreds of processes import the same modules: compile each once, also where an image says not to.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo airflow lint test test-long clean

demo: $(INSTALLED)
	@$(BIN)/python examples/demo.py --home $(DEMO) $(if $(INPUT),--input '$(INPUT)') $(if $(MIP),--mip $(MIP)) $(if $(ROI),--roi '$(ROI)')

airflow: $(INSTALLED)
	@mkdir -p $(DEMO)/volumes
	@CHUNKFLOW_VOLUMES=$(CURDIR)/dags/volumes:$(DEMO)/volumes $(BIN)/chunkflow-airflow up --home $(DEMO)/airflow

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

test: $(INSTALLED)
	$(BIN)/pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

test-long: $(INSTALLED)
	CHUNKFLOW_TEST_EXAMPLES=$(EXAMPLES) CHUNKFLOW_TEST_HISTORIES=$(HISTORIES) $(BIN)/pytest --numprocesses $(WORKERS) -m 'long or hypothesis'

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
