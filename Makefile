# Two commands on a fresh machine: `make quickstart` does the main job, `make test` runs the tests. A third, as root on
# Debian: `make test-cluster` launches over several machines by ssh and by Slurm, and breaks them; `make test-browser`
# looks at the pages in Chromium; `make test-faults` lets each call on a file fail once, in each way, which takes an hour.
# Needed before: Linux, Python 3.11 or 3.12 with venv, g++. A GPU is used if there is one.

PYTHON ?= python3
VENV := .venv
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
GPUS := $(shell nvidia-smi -L 2>/dev/null | wc -l)
# The quickstart's batch is four images, two at a time: enough for two processes. The digits' is sixteen, eight at a time.
RANKS := $(if $(filter 1,$(GPUS)),1,2)
ifeq ($(GPUS),0)
# Says what DeepSpeed would find out by itself, with a warning from every process.
export DS_ACCELERATOR := cpu
endif

# Threads that wait sleep instead of spinning: on a shared machine, spinning makes everything four times slower.
export OMP_WAIT_POLICY := PASSIVE

DATA := data/quickstart
RUN := runs/quickstart
DIGITS := data/digits
DIGITS_RUN := runs/digits

.PHONY: quickstart digits test test-cluster test-browser test-faults check install clean

quickstart: install
	@echo "== 1/5 Pack photographs into WebDataset shards: $(DATA)"
	python -m data_pipeline.pack --source photographs --dest $(DATA)/train --size 32 --split train --images 12000
	python -m data_pipeline.pack --source photographs --dest $(DATA)/validation --size 32 --split validation --images 512
	@echo "== 2/5 Train with DeepSpeed on $(RANKS) $(if $(filter 0,$(GPUS)),CPU processes,GPUs): configs/quickstart.yaml"
	deepspeed --quiet --num_accelerators $(RANKS) trainer/run.py --config configs/quickstart.yaml
	@echo "== 3/5 Score all validation photographs, beside lossless image formats"
	python -m trainer.evaluate --run $(RUN) --weights ema
	@echo "== 4/5 Draw new images"
	python -m trainer.sample --run $(RUN) --weights ema --n 36
	@echo "== 5/5 Complete the lower half of unseen photographs"
	python -m trainer.sample --run $(RUN) --weights ema --n 16 --complete-half
	@echo "Done. Shards: $(DATA)   Run, checkpoints, metrics: $(RUN)   Pictures: $(RUN)/samples"
	@echo "Look at the run in MLflow: $(VENV)/bin/mlflow ui --backend-store-uri sqlite:///mlflow.db   then open http://127.0.0.1:5000"

digits: install
	@echo "== 1/4 Pack handwritten digits into WebDataset shards: $(DIGITS)"
	python -m data_pipeline.pack --source digits --dest $(DIGITS)/train --size 16 --split train --images 12000
	python -m data_pipeline.pack --source digits --dest $(DIGITS)/validation --size 16 --split validation --images 594
	@echo "== 2/4 Train with DeepSpeed on $(RANKS) $(if $(filter 0,$(GPUS)),CPU processes,GPUs): configs/digits.yaml"
	deepspeed --quiet --num_accelerators $(RANKS) trainer/run.py --config configs/digits.yaml
	@echo "== 3/4 Score all validation digits"
	python -m trainer.evaluate --run $(DIGITS_RUN) --weights ema
	@echo "== 4/4 Draw ten of each digit, one digit a column"
	python -m trainer.sample --run $(DIGITS_RUN) --weights ema --n 100
	@echo "Done. Shards: $(DIGITS)   Run, checkpoints, metrics: $(DIGITS_RUN)   Pictures: $(DIGITS_RUN)/samples"
	@echo "Draw a 7: $(VENV)/bin/python -m trainer.sample --run $(DIGITS_RUN) --weights ema --classes 7 --n 9 --out seven.png"
	@echo "Choose in a browser: $(VENV)/bin/python -m trainer.demo --run $(DIGITS_RUN) --weights ema"

test: install check
	pytest --numprocesses 2 --dist loadfile

test-cluster: install
	tests/lab/run

test-browser: install
	command -v chromium >/dev/null || { apt-get update && apt-get install --yes --no-install-recommends chromium; } >/dev/null
	pytest tests/trainer/test_demo.py tests/trainer/comparison/test_compare_view.py tests/trainer/comparison/test_scaling_view.py

# `make test` has a part of these cases. The counts are printed at the end of each command's cases.
test-faults: install
	EVERY_FAULT=1 pytest -s tests/test_each_call_fails.py

check: install
	ruff check .
	ruff format --check .
	mypy

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	@echo "== Install into $(VENV)"
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[dev]"
	@touch $@

clean:
	rm -rf $(VENV) $(DATA) $(RUN) $(DIGITS) $(DIGITS_RUN)
