# make demo       the whole pipeline with a small real model on a CPU, ending with the printed comparison
# make test       the tests
# make lint       ruff
# make gpu-check  two minutes of all four scripts with the 4-bit base on your CUDA card
.PHONY: demo test lint gpu-check
.DELETE_ON_ERROR:

PYTHON ?= python3
BIN := .venv/bin
MODEL := models/SmolLM2-135M-Instruct
export PYTHONUNBUFFERED := 1

demo: $(BIN)/.installed $(MODEL)/model.safetensors
	$(BIN)/python sft_train.py --preset demo --overwrite
	$(BIN)/python reward_train.py --preset demo --overwrite
	$(BIN)/python ppo_train.py --preset demo --overwrite
	$(BIN)/python compare_outputs.py --preset demo --overwrite

test: $(BIN)/.installed
	$(BIN)/python -m pytest

lint: $(BIN)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

gpu-check: $(BIN)/.installed $(MODEL)/model.safetensors
	$(BIN)/python demo/gpu_check.py

$(MODEL)/model.safetensors: | $(BIN)/.installed
	$(BIN)/python demo/get_model.py $(MODEL)

$(BIN)/.installed: requirements.txt requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed; name it with make PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@
