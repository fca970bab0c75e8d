# Every target makes its own .venv when it is missing or a requirements file is newer, and reuses it otherwise.
PYTHON ?= python3.11
OUT ?= outputs/demo$(if $(filter-out easy_vqa,$(DATA)),-$(DATA))
CONNECTORS ?= vlora
DATA ?= easy_vqa
VENV := .venv
BIN := $(VENV)/bin
LOW := $(VENV)-low
export TOKENIZERS_PARALLELISM := false
# Many containers forbid bytecode. Every process would compile torch and DeepSpeed anew, for 7 s.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help venv benchmarks-env demo compare kernels gpu gpu-wheels wheelhouse zoo sweep test test-low lock chaos test-slurm check clean

help:                             ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 22

venv: $(VENV)/.installed          ## the environment alone

demo: $(VENV)/.installed          ## prepare, pretrain, finetune, evaluate, report (OUT=dir DATA=scenes ARGS=seed=1)
	$(BIN)/python -m train.demo --out $(OUT) --data $(DATA) --connectors $(CONNECTORS) $(ARGS)

compare: $(VENV)/.installed       ## the demo with VLoRA and the LLaVA-style projector side by side
	$(BIN)/python -m train.demo --out outputs/compare --connectors vlora mlp

# Two files at a time, those that take longest first (tests/conftest.py).
test: $(VENV)/.test-installed     ## all tests
	$(BIN)/python -m data_prep.parts
	$(BIN)/python -m data_prep source=easy_vqa
	$(BIN)/python -m data_prep.parts.tiny_llm
	$(BIN)/python -m pytest -m "not slurm" -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

# In an environment of its own, .venv-low; once before `make lock`, and when a lower bound changes.
test-low: $(LOW)/.installed       ## the tests with the lowest version of every package (docs/versions.md)
	$(LOW)/bin/python -m data_prep.parts
	$(LOW)/bin/python -m data_prep source=easy_vqa
	$(LOW)/bin/python -m data_prep.parts.tiny_llm
	$(LOW)/bin/python -m pytest -m "not slurm" -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

lock:                             ## requirements.lock anew: the newest versions within the ranges
	rm -rf $(VENV)-lock
	$(PYTHON) -m venv $(VENV)-lock
	$(VENV)-lock/bin/pip install --quiet --no-compile torch setuptools
	$(VENV)-lock/bin/pip install --quiet --no-compile -r requirements-dev.txt -r requirements-serve.txt
	{ head -1 requirements.lock; $(VENV)-lock/bin/pip list --format=freeze \
		| sed 's/+.*//' | grep -vE '^(pip|setuptools|triton|nvidia-.*|cuda-.*)=='; } > requirements.lock.new
	mv requirements.lock.new requirements.lock
	rm -rf $(VENV)-lock

chaos: $(VENV)/.test-installed    ## kills, damage and a long run (ARGS="kills --count 200 --seed 0", "damage", "soak")
	$(BIN)/python -m tests.chaos $(or $(ARGS),kills)

# Needs Debian's packages slurmctld slurmd slurm-client munge; starts a cluster of two nodes on this machine.
# ARGS="-m 'slurm and not slow'": the quick part, which CI runs too.
test-slurm: $(VENV)/.test-installed   ## the batch scripts on a real SLURM
	$(BIN)/python -m pytest -m slurm tests/slurm $(ARGS)

kernels: $(VENV)/.test-installed  ## every figure of docs/kernels.md and of the README's kernel table
	$(BIN)/python -m data_prep.parts
	$(BIN)/python -m benchmarks.lowrank --llm .cache/llm/smollm2-135m-instruct
	$(BIN)/python -m benchmarks.lowrank
	$(BIN)/python -m benchmarks.lowrank --predict
	$(BIN)/python -m benchmarks.traffic
	$(BIN)/python -m benchmarks.ahead_of_time

gpu:                              ## everything that needs a GPU, proved and measured (docs/gpu.md); ARGS="--device cpu --tiny"
	GPU_WHEELS=none PYTHON=$(if $(wildcard $(BIN)/python),$(BIN)/python,python3) bash benchmarks/gpu/run.sh $(ARGS)

gpu-wheels: $(VENV)/.installed    ## what a GPU machine without internet lacks, into .gpu-wheels
	PYTHON=$(BIN)/python bash benchmarks/gpu/wheels.sh

zoo: $(VENV)/.test-installed      ## every model family tried, docs/models.md written anew (ARGS="granite clip_vision_model")
	$(BIN)/python -m benchmarks.zoo --write $(ARGS)

# Its pins are not ours: torch, transformers and wandb are others'.
benchmarks-env:                   ## lmms-eval in .venv-benchmarks, an environment of its own (7 GB)
	test -x $(VENV)-benchmarks/bin/python || $(PYTHON) -m venv $(VENV)-benchmarks
	$(VENV)-benchmarks/bin/pip install --quiet --no-compile -r requirements-benchmarks.txt

# There: PIP_NO_INDEX=1 PIP_FIND_LINKS=wheelhouse make venv. In a container: WHEELHOUSE=wheelhouse containers/install.sh.
wheelhouse: $(VENV)/.installed    ## every package as a file, for machines without internet
	DS_BUILD_OPS=0 $(BIN)/python -m pip wheel --quiet --no-build-isolation -w wheelhouse \
		-c requirements.lock -r requirements-dev.txt -r requirements-serve.txt

sweep: $(VENV)/.installed         ## a 2 x 2 sweep over rank and blocks with the tiny LLM, and its report
	$(BIN)/python -m data_prep.parts
	$(BIN)/python -m data_prep source=easy_vqa
	$(BIN)/python -m data_prep.parts.tiny_llm
	$(BIN)/python -m train -m llm=tiny generator.rank=4,16 generator.num_blocks=1,2 stage.steps=20 \
		hydra.sweep.dir=outputs/sweep
	$(BIN)/python -m train.sweep_report outputs/sweep

check: $(VENV)/.installed         ## lint, format and types: what must pass before a commit
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m mypy

clean:                            ## remove the environment, caches and outputs
	rm -rf $(VENV) $(LOW) .gpu-wheels wheelhouse .cache .pytest_cache .ruff_cache .mypy_cache outputs multirun

# torch first: DeepSpeed's build looks for it. checkout.pth: `python -m train` works from every folder.
$(VENV)/.installed: requirements.txt requirements-dev.txt requirements.lock
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-compile -c requirements.lock torch
	$(BIN)/pip install --quiet --no-compile -c requirements.lock -r requirements-dev.txt
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" | xargs -I{} sh -c 'echo "$(CURDIR)" > "{}/checkout.pth"'
	touch $@

# The kernels' proofs need Triton, which a CUDA build of torch brings along and a CPU build does not.
$(VENV)/.test-installed: $(VENV)/.installed requirements-serve.txt
	$(BIN)/pip install --quiet --no-compile -c requirements.lock -r requirements-serve.txt
	$(BIN)/python -c "import triton" 2>/dev/null || $(BIN)/pip install --quiet --no-compile triton==3.9.0
	touch $@

# Every lower bound as a pin, so that pip takes the lowest versions that are promised.
$(LOW)/.installed: requirements.txt requirements-dev.txt requirements-serve.txt
	test -x $(LOW)/bin/python || $(PYTHON) -m venv $(LOW)
	sed -nE 's/^([A-Za-z0-9_-]+)>=([^,# ]+).*/\1==\2/p' requirements*.txt > $(LOW)/lowest.txt
	$(LOW)/bin/pip install --quiet --no-compile -c $(LOW)/lowest.txt torch "setuptools>=77"
	$(LOW)/bin/pip install --quiet --no-compile -c $(LOW)/lowest.txt -r requirements-dev.txt -r requirements-serve.txt
	touch $@
