# make demo            the whole pipeline on a CPU with a small real model, up to the comparison
# make feedback-demo   a scripted voter votes in a browser, and the reward model learns from it
#                      (after make demo)
#
# make test            the tests
# make test-all        the tests with more seeds, more prompts and longer runs
# make lint            ruff
# make gpu-check       a few steps of all four scripts with the 4-bit base on your CUDA card
# make torture         kill training at random moments, resume, compare with runs left alone
# make soak            300 PPO updates of a tiny model: do memory or files grow?
# make open-elsewhere  open checkpoints and exports with transformers 4.57
# make toys            PPO on problems with a known answer, five seeds each (make test runs one)
#
# make results         does it learn? on Dahoas/rm-static, or DATA=a local copy; writes
#                      docs/results.md (some 37 hours of a core)
# make bench           PPO beside TRL 1.12's, from the demo's checkpoints (81 minutes)
# make bench-train     SFT and reward training beside `trl sft` and `trl reward` (20 minutes)
# make bench-growth    how an update's time and memory grow with batch, response and vocabulary
# make bench-3b        memory by owner with Llama-3.2-3B's shape and random weights
# make bench-card      a CUDA card: all phases, decoding and checks, beside TRL (some 20 minutes)
# make bench-merge     64 greedy tokens of the demo's PPO adapter, beside and merged into the base
# make bench-export    memory and time of exporting a checkpoint of Llama-3.2-3B's shape
.PHONY: demo feedback-demo test test-all torture soak toys lint gpu-check results bench bench-growth bench-train bench-3b bench-merge
.PHONY: bench-card bench-export open-elsewhere
.DELETE_ON_ERROR:

PYTHON ?= python3
BIN := .venv/bin
MODEL := models/SmolLM2-135M-Instruct
export PYTHONUNBUFFERED := 1

demo: $(BIN)/.demo $(MODEL)/model.safetensors
	$(BIN)/python sft_train.py --preset demo --overwrite
	$(BIN)/python reward_train.py --preset demo --overwrite
	$(BIN)/python ppo_train.py --preset demo --overwrite
	$(BIN)/python compare_outputs.py --preset demo --overwrite

feedback-demo: $(BIN)/.installed
	$(BIN)/python demo/feedback.py

# A process more than two cores, as some tests wait; a file's tests share models and stay together.
TEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

test: $(BIN)/.installed
	$(TEST)

test-all: $(BIN)/.installed
	$(TEST) -m "slow or not slow"

lint: $(BIN)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

gpu-check: $(BIN)/.installed $(MODEL)/model.safetensors
	$(BIN)/python demo/gpu_check.py

torture: $(BIN)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python tests/torture.py

soak: $(BIN)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python tests/soak.py

open-elsewhere: $(BIN)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python tests/open_elsewhere.py

toys: $(BIN)/.installed
	$(BIN)/python -m pytest tests/test_toys.py -m "slow or not slow"

results: $(BIN)/.installed $(MODEL)/model.safetensors
	$(BIN)/python experiments/results.py $(if $(DATA),--dataset $(DATA)) $(RESULTS)

bench: $(BIN)/.installed
	$(BIN)/python benchmarks/ppo_vs_trl.py

bench-growth: $(BIN)/.installed
	$(BIN)/python benchmarks/growth.py

bench-train: $(BIN)/.installed $(MODEL)/model.safetensors
	$(BIN)/python benchmarks/train_vs_trl.py

bench-3b: $(BIN)/.installed $(MODEL)/model.safetensors
	$(BIN)/python benchmarks/llama_3b.py

bench-merge: $(BIN)/.installed
	$(BIN)/python benchmarks/merge.py

bench-card: $(BIN)/.installed $(MODEL)/model.safetensors
	$(BIN)/python benchmarks/card.py

bench-export: $(BIN)/.installed $(MODEL)/model.safetensors
	$(BIN)/python benchmarks/export_3b.py

$(MODEL)/model.safetensors: | $(BIN)/.demo
	$(BIN)/python demo/get_model.py $(MODEL)

$(BIN)/.demo: requirements.txt demo/requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed; name it with make PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r demo/requirements.txt
	@touch $@

$(BIN)/.installed: $(BIN)/.demo requirements-dev.txt requirements-feedback.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@
