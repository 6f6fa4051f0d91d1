VENV ?= .venv
PYTHON ?= python3
# Extra arguments for installing torch alone, e.g. an index with CPU builds. A torch that is
# already in $(VENV) stays if constraints.txt allows it (2.13.0+cpu does).
TORCH_PIP_ARGS ?=

override BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO := runs/demo

.DEFAULT_GOAL := help
.PHONY: help setup demo check test lint sweep status figures tables report bench gpu device oldest clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(READY) ## create .venv with everything, again only when the requirements change

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt $(TORCH_PIP_ARGS) torch
	$(BIN)/python -m pip install -c constraints.txt -e ".[experiments,dev]"
	touch $@

demo: setup ## train on the embedded digits with BP and Highway-BP, and draw the comparison
	$(BIN)/python train.py -m experiment=digits grad=bp run_root=$(DEMO)
	$(BIN)/python train.py -m experiment=digits grad=highway k=0,1,3 run_root=$(DEMO)
	$(BIN)/python scripts/plot_runs.py $(DEMO) --out $(DEMO)/demo.png

check: setup lint ## lint and the quick tests, a minute and a half on two cores
	$(BIN)/python -m pytest -q -n auto --dist worksteal -m "not slow"

test: setup lint ## lint, then run all tests
	$(BIN)/python -m pytest -q -n auto --dist worksteal

lint: setup ## check style
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

sweep: setup ## make the runs of results/plan.yaml that are missing: ROW=resnet32 JOBS=2 ARGS=--gpu
	@$(BIN)/python scripts/run_plan.py $(ROW) $(if $(JOBS),--jobs "$(JOBS)") $(ARGS)

status: setup ## which planned runs are done, running, missing: ARGS="-v --device cuda"
	@$(BIN)/python scripts/status.py $(ARGS)

figures: setup ## results/*.jsonl -> results/figures, PNG, PDF and SVG
	$(BIN)/python scripts/make_results.py figures results

tables: setup ## results/*.jsonl, bench_rnn*.json -> results/tables, Markdown and LaTeX
	$(BIN)/python scripts/make_results.py tables results

report: figures tables ## everything on one static page, results/report.html
	$(BIN)/python scripts/make_report.py results

bench: setup ## measure the engine, recurrent layers and conversion beside plain autograd and torch.nn
	$(BIN)/python scripts/bench_engine.py --out results/bench_engine.json
	$(BIN)/python scripts/bench_rnn.py --out results/bench_rnn.json
	$(BIN)/python scripts/bench_trunk.py --out results/bench_trunk.json
	$(BIN)/python scripts/bench_sharded.py --out results/bench_sharded.json
	@echo "make figures draws results/figures/scaling.png from these costs"

# `make gpu` needs one GPU and no network. It can be stopped and started again at any moment.
# DEVICE=cpu tries all of it in tiny sizes.
ifeq ($(DEVICE),cpu)
export CUDA_VISIBLE_DEVICES :=
GPU := runs/gpu_tried
RNN := --parts tiny --repeats 1
ENGINE := --only resnet32_b128 --repeats 1
RUNS := resnet32 --jobs 2 --set steps=1 optim.batch_size=2 data.validation=100 device=cpu
else
GPU := runs/gpu
RNN := --parts paper
RUNS := resnet32 gru_pixels gru_chars lstm_chars gpt2 --full --jobs $(or $(JOBS),3) --set trainer.cuda_graph=true
endif

gpu: setup device $(GPU)/checked $(GPU)/bench_rnn.json $(GPU)/bench_rnn_tf32.json $(GPU)/bench_engine.json ## on one GPU: checks, benchmarks, the paper's runs in full; resumes
	$(BIN)/python scripts/run_plan.py $(RUNS) --runs $(GPU)

device:
	@$(BIN)/python -c "import sys, torch; '$(DEVICE)' == 'cpu' or torch.cuda.is_available() or \
	sys.exit('make gpu: torch finds no CUDA device; DEVICE=cpu tries it in tiny sizes')"

$(GPU)/checked:
	@mkdir -p $(@D)
	$(BIN)/python -m pytest -q tests/test_devices.py
	@touch $@

$(GPU)/bench_rnn.json $(GPU)/bench_rnn_tf32.json:
	$(BIN)/python scripts/bench_rnn.py $(RNN) $(if $(findstring tf32,$@),--tf32) --out $@.part
	@mv $@.part $@

$(GPU)/bench_engine.json:
	$(BIN)/python scripts/bench_engine.py $(ENGINE) --out $@.part
	@mv $@.part $@

# With UV_TORCH_BACKEND=cpu, uv installs torch's CPU builds.
oldest: ## quick tests with the lower bounds of pyproject.toml, in .venv-oldest
	test -x .venv-oldest/bin/uv || ($(PYTHON) -m venv .venv-oldest && .venv-oldest/bin/pip install uv)
	.venv-oldest/bin/uv pip install -p .venv-oldest/bin/python --resolution lowest-direct -e ".[experiments,dev]"
	.venv-oldest/bin/python -m pytest -q -m "not slow" tests/highway_bp tests/experiments

clean: ## remove caches and build output; keeps .venv, runs and results
	rm -rf build *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
