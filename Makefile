# make demo, make test, make test-gpu, make lint, make docs: each sets up .venv first where it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := build/demo

.PHONY: demo test test-gpu lint format docs clean

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -e '.[dev]' -c constraints.txt
	touch $@

demo: $(VENV)/.installed
	$(BIN)/python -m reid_dist.data.synthetic --out $(DEMO)/data --ids 64 --cams 4 --seed 0
	rm -rf $(DEMO)/runs
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc_per_node=2 -m reid_dist.train \
	    --cfg configs/demo.yaml --root $(DEMO)/data --output $(DEMO)/runs
	@echo "open $(CURDIR)/$(DEMO)/runs/market1501/demo/report/index.html"
	@echo "first     . $(VENV)/bin/activate    (then the commands above are found)"

test: $(VENV)/.installed
	$(BIN)/pytest -n auto --maxprocesses 4 --dist loadfile

# On this machine's GPU, one after the other; without one they are counted as not run.
test-gpu: $(VENV)/.installed
	$(BIN)/pytest tests/gpu

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck launch/*.sh launch/*.sbatch .ci/run
	$(BIN)/hadolint docker/Dockerfile

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The pages in build/docs; --strict: a link that leads nowhere is an error.
docs: $(VENV)/.installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "pages: $(CURDIR)/build/docs/index.html ($(BIN)/mkdocs serve shows them with search)"

clean:
	rm -rf $(DEMO)
