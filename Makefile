# make demo       the whole story on a tiny model, in a fresh clone; KEEP=folder to keep what it makes
# make quick      the source side: rewriting, checking, comparing; no torch, under a minute
# make test       lint, types, import contracts and tests
# make test-full  the long tests too
# make browser    installs Chromium on Debian and Ubuntu; without it the tests of the HTML reports are skipped
# make structure  how the code is built: circles, ways through the files, names, sizes
# make bench      the figures of rewriting in docs/performance.md
# make bench-reshard  those of checkpoints: 4 GiB are copied several times over
# make gpu-test   on a machine with GPUs: loading, parity and validation with NCCL, and their figures
# make sweep      every MoE model of the installed transformers proven on two ranks, docs/sweep.md
# make test-torch  distributed checkpoints and thread ranks with other torch releases: PYTHONS="a/bin/python b/bin/python"
# make test-releases  checkpoints that other releases of transformers wrote: FOLDERS="a b"
# make newest     what differs in newer versions: TRANSFORMERS=, TORCH= and HUB=, by default the newest; ANY_SIZE=1
PYTHON ?= python3
BIN := .venv/bin
# A file's tests stay together, for they share fixtures; each worker has process groups of its own.
WORKERS ?= --numprocesses 2 --dist loadfile

.PHONY: demo quick test test-full gpu-test lint browser structure bench bench-reshard sweep families newest test-torch
.PHONY: test-releases

demo: .venv/installed
	$(BIN)/python benchmarks/demo.py $(KEEP)

quick: .venv/source-side
	$(BIN)/python -m pytest $(WORKERS) -m quick

test: lint
	$(BIN)/python -m pytest $(WORKERS) -m "not full"

test-full: lint
	$(BIN)/python -m pytest $(WORKERS)

# PYTHONS need torch, transformers, pytest and hypothesis, each with a torch of its own.
test-torch: .venv/installed
	MIGRATOR_TORCH_PYTHONS='$(PYTHONS)' $(BIN)/python -m pytest -m full \
		tests/runtime/checkpoint/dcp/test_torch_versions.py tests/runtime/checkpoint/fsdp/test_torch_versions.py \
		tests/runtime/processes/test_torch_versions.py

# FOLDERS hold another transformers each: pip install --no-deps --target FOLDER transformers==5.23.0
test-releases: .venv/installed
	MIGRATOR_TRANSFORMERS_FOLDERS='$(FOLDERS)' $(BIN)/python -m pytest -m full tests/runtime/checkpoint/test_renamed.py

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

browser:
	command -v chromium >/dev/null || apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core

# With the Python that has the machine's own torch: make gpu-test GPU_PYTHON=python3
GPU_PYTHON ?= $(BIN)/python
gpu-test: export PYTHONPATH := $(CURDIR)
gpu-test:
	$(GPU_PYTHON) -m pytest -rs tests/gpu
	$(GPU_PYTHON) -m torch.distributed.run --standalone --nproc-per-node 2 benchmarks/gpu_load.py
	$(GPU_PYTHON) -m torch.distributed.run --standalone --nproc-per-node 2 benchmarks/gpu_step.py

structure: .venv/source-side
	$(BIN)/python benchmarks/structure.py

bench: .venv/installed
	$(BIN)/python benchmarks/rewrite.py

bench-reshard: .venv/installed
	$(BIN)/python -W ignore -m benchmarks.reshard

sweep: .venv/installed
	$(BIN)/migrator prove --installed --experts-only --format markdown > docs/sweep.new || test $$? -eq 1
	mv docs/sweep.new docs/sweep.md

families: .venv/installed
	$(BIN)/python -W ignore -m benchmarks.families

newest:
	$(PYTHON) -m benchmarks.newest --transformers '$(TRANSFORMERS)' --torch '$(TORCH)' --huggingface-hub '$(HUB)' \
		$(if $(ANY_SIZE),--any-size)

# What `quick` needs; the full installation has it too.
.venv/source-side: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --config-settings editable_mode=compat --editable '.[dev]'
	touch $@

# torch first and pinned: installed through a bare range it brings several GB of CUDA packages along.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --config-settings editable_mode=compat --editable '.[runtime,remote,dev,test]'
	touch .venv/source-side $@
