# Everything a user, a developer or CI runs. `make help` lists it.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
CLANG := clang-19
VENV := .venv
BIN := $(VENV)/bin
RUN_DIR ?= /run/tidegate
EXAMPLE ?= examples/shop
# Installed only where missing; `apt-get` is not called otherwise.
BUILD_PACKAGES := python3-venv $(CLANG) libbpf1 libbpf-dev linux-libc-dev libc6-dev gcc libjansson-dev
TEST_PACKAGES := iproute2 iperf3 openssl qemu-system-x86 busybox-static cpio lua5.4
# A machine that has Docker keeps its own.
E2E_PACKAGES := debootstrap iperf3 iptables iproute2 openssl gcc libc6-dev $(if $(shell command -v dockerd),,docker.io)
# What kube-proxy runs in its modes.
BENCH_PACKAGES := nftables iptables
SOURCES := $(wildcard datapath/*.bpf.c)
OBJECTS := $(SOURCES:datapath/%.bpf.c=datapath/build/%.o)
HEADERS := $(wildcard datapath/include/tidegate/*.h)
MULTIARCH = $(shell gcc -print-multiarch)
BPF_CFLAGS = -O2 -g -Wall -Wextra -Werror -target bpf -mcpu=v3 -Idatapath/include -isystem /usr/include/$(MULTIARCH)
say = @printf '\033[1m==>\033[0m %s\n'
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help
help: ## this list
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## /\1\t/' | expand -t 16

# ---- what the project needs on a machine -------------------------------------------

# install-packages LIST: those of the list that dpkg does not know as installed
define install-packages
missing=(); for p in $(1); do [[ "$$(dpkg-query -W -f '$${Status}' $$p 2>/dev/null)" == *' installed' ]] || missing+=($$p); done; \
if (( $${#missing[@]} )); then \
  printf '\033[1m==>\033[0m installing Debian packages: %s\n' "$${missing[*]}"; \
  export DEBIAN_FRONTEND=noninteractive; \
  apt-get update -qq; apt-get install -y -qq --no-install-recommends "$${missing[@]}" > .cache/apt.log 2>&1 || { tail -n 20 .cache/apt.log; exit 1; }; \
fi
endef

.cache:
	@mkdir -p $@

.cache/build-packages: Makefile | .cache
	@$(call install-packages,$(BUILD_PACKAGES))
	@touch $@

.cache/test-packages: Makefile | .cache
	@$(call install-packages,$(TEST_PACKAGES))
	@touch $@

.cache/e2e-packages: Makefile | .cache
	@$(call install-packages,$(E2E_PACKAGES))
	@touch $@

.cache/bench-packages: Makefile | .cache
	@$(call install-packages,$(BENCH_PACKAGES))
	@touch $@

$(BIN)/.installed: pyproject.toml .cache/build-packages
	$(say) "installing Python packages into $(VENV)"
	@[ -x $(BIN)/python ] || $(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install -q -e '.[dev]'
	@touch $@

datapath/build/%.o: datapath/%.bpf.c $(HEADERS) | .cache/build-packages
	$(say) "compiling $<"
	@mkdir -p datapath/build
	@$(CLANG) $(BPF_CFLAGS) -c $< -o $@

CNI := node-loader/cni/build/tidegate-cni

$(CNI): $(wildcard node-loader/cni/*.c) node-loader/cni/cni.h | .cache/build-packages
	$(say) "compiling the CNI step"
	@mkdir -p $(@D)
	@gcc -O2 -Wall -Wextra -Werror -static -s -o $@ $(filter %.c,$^) -ljansson

.PHONY: objects cni install
objects: $(OBJECTS) ## compile the eBPF objects

cni: $(CNI) ## compile the CNI step, static

install: $(BIN)/.installed $(OBJECTS) $(CNI) ## packages, .venv, objects and the CNI step

.PHONY: crds
crds: install ## write crds/*.yaml and docs/api.md anew, of crds/tidegate_api
	@$(BIN)/python crds/generate.py

.PHONY: protos
protos: install ## write the observer's *_pb2.py anew, of its .proto files
	@cd observer && ../$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. tidegate_observer/api/*.proto

.PHONY: manifests
manifests: crds kube-binaries ## write manifests/base anew, of the chart
	@PYTHONPATH=e2e $(BIN)/python manifests/render.py

# ---- the image: Debian packages and wheels, layers kept in $TIDEGATE_CACHE ---------------------

.PHONY: image image-pins
image: install $(CNI) ## build tidegate:dev, without a registry; to Docker where one answers
	@$(BIN)/python image/build.py

image-pins: install ## write image/constraints.txt anew: the newest of what the image needs
	@$(BIN)/python image/build.py --pin

# ---- Kubernetes: built from Go modules, kept in $TIDEGATE_CACHE (default ~/.cache/tidegate) -----

KIND := PYTHONPATH=e2e $(PYTHON) -m kind

.PHONY: kube-apiserver kube-binaries
kube-apiserver: ## etcd, kube-apiserver and kubectl, for tests against an API server (needs Go)
	@$(KIND) kube-apiserver

kube-binaries: ## every program of a cluster, kind and helm (needs Go)
	@$(KIND) kube-binaries

.PHONY: docker cluster cluster-down
docker: .cache/e2e-packages ## a Docker daemon: the running one, else one of our own
	@$(KIND) docker

cluster: .cache/e2e-packages ## a cluster of kind without kube-proxy, as the e2e tests use it
	@$(KIND) up

cluster-down: ## remove the cluster of the e2e tests, stop our Docker daemon, undo what they changed
	@$(KIND) down

# ---- run ------------------------------------------------------------------------------

.PHONY: demo demo-down
demo: install ## bring an example up on this machine and show it
	@$(BIN)/tidegate --run-dir $(RUN_DIR) demo $(EXAMPLE)

demo-down: install ## remove everything that `make demo` made
	@$(BIN)/tidegate --run-dir $(RUN_DIR) down

# ---- check -----------------------------------------------------------------------------

PYTEST := $(BIN)/python -m pytest

.PHONY: lint check test e2e soak bench
lint: install
	$(say) "ruff, mypy, import contracts"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check -q .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo | tail -n 3

check: lint ## the inner loop: lint, types, import contracts, fast tests
	$(say) "fast tests"
	@$(PYTEST) -q -n 2 -m 'not kernel and not cluster and not apiserver and not slow'

test: lint .cache/test-packages kube-binaries ## every test, on the real kernel with real packets
	$(say) "all tests (eBPF programs, network namespaces, real packets)"
	@$(PYTEST) -q -m 'not cluster' -n 3 --dist worksteal
	@$(PYTEST) -q -m cluster
	@$(MAKE) e2e

e2e: install .cache/e2e-packages kube-binaries ## Tidegate on a cluster of kind; KEEP=1 leaves it up and takes one that is
	$(say) "tests on a cluster of kind"
	@$(PYTEST) -q e2e

soak: install .cache/test-packages .cache/e2e-packages kube-binaries ## the long campaigns in full; writes soak/results.json
	$(say) "campaigns in full; this takes long"
	@TIDEGATE_SOAK=1 $(PYTEST) -q tests/campaign tests/cluster/test_net_clients.py tests/kernel/test_dp_fuzz.py tests/kernel/test_dp_fuzz_uplink.py tests/kernel/test_dp_tiers.py tests/kube/test_ku_faults.py tests/manifests/test_mf_models.py tests/operator/test_oa_faults.py tests/unit/operator/test_op_choice.py tests/unit/operator/test_op_split.py
	@TIDEGATE_SOAK=1 $(PYTEST) -q e2e/test_e2e_clients.py e2e/test_e2e_faults.py e2e/test_e2e_stream.py e2e/test_e2e_versions.py

.PHONY: stock-hubble
stock-hubble: install ## Hubble's own command, built from its module (needs Go), against our observer
	@$(BIN)/python tests/stock/hubble.py

bench/build/bench.o: bench/bench.bpf.c $(HEADERS) | .cache/build-packages
	@mkdir -p bench/build
	@$(CLANG) $(BPF_CFLAGS) -c $< -o $@

bench/build/rr: bench/rr.c
	@mkdir -p bench/build
	@gcc -O2 -Wall -Wextra -Werror -o $@ $<

bench: install bench/build/bench.o bench/build/rr kube-binaries .cache/e2e-packages .cache/bench-packages ## measure; writes bench/results.json
	@$(BIN)/python bench/run.py
