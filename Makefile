# `make` prints the targets. Everything is a Go program or a plain command, so
# each line can be run by hand as well.

.DEFAULT_GOAL := help
.NOTPARALLEL:
.SUFFIXES:

GO     ?= go
# Flags for every `go test`, for example GOTESTFLAGS='-v -run TestRestart'.
GOTESTFLAGS ?=

# What a folder's absence means is said by the targets below: none pretends.
have     = $(wildcard $(1)/*.go)
packages = $(foreach d,$(1),$(if $(shell find $(d) -name '*_test.go' 2>/dev/null | head -1),./$(d)/...))

# Packages whose tests need root, a real kernel or a real Envoy.
kernel_packages = $(call packages,agent bpf cmd/cni hack/cluster hack/envoy identity isolation netfilter test/kernel xds)
# Packages that aren't for `go test ./...`: they need a cluster, or hours.
slow_folders = test/e2e|test/conformance|test/soak|test/kernel

generated = api bpf config/crd

.PHONY: help
help: ## Print this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  %-15s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: test
test: ## Everything that CI runs: generated files, lint, unit, kernel and end-to-end tests; as root
	@mkdir -p out
	@flock --nonblock out/test.lock true || echo "test: waiting for another 'make test' to end"
	@flock out/test.lock $(MAKE) --no-print-directory test-all

.PHONY: test-all
test-all: root setup check-generate lint test-unit test-kernel
	@$(if $(call have,test/e2e),$(MAKE) --no-print-directory test-e2e,echo "test-e2e: there are no end-to-end tests yet")
	$(MAKE) --no-print-directory conformance REPORT=out/conformance.yaml

.PHONY: test-unit
test-unit: ## Unit tests, without root, in less than a minute
	@# test/arch reads the tree behind Go's test cache, so it always runs.
	$(GO) test -count=1 $(GOTESTFLAGS) ./test/arch
	$(GO) test -short $(GOTESTFLAGS) $$($(GO) list ./... | grep -Ev '/($(slow_folders)|test/arch)(/|$$)')

.PHONY: test-kernel
test-kernel: root setup ## Tests against this machine's kernel and a real Envoy, as root
	@$(if $(kernel_packages),true,echo "test-kernel: there are no kernel tests yet"; false)
	$(GO) run ./hack/envoy --all
	$(GO) test -count=1 -p 1 -timeout 60m $(GOTESTFLAGS) $(kernel_packages)

use_cluster = $(if $(KUBECONFIG),,eval "$$($(GO) run ./hack/cluster env)" &&)

# A user's own cluster (KUBECONFIG) has its images already; the local one gets what
# the tree holds now.
.PHONY: cluster
cluster: setup ## Start the local cluster with images of what the tree holds now; nothing with a KUBECONFIG; as root
ifndef KUBECONFIG
	@$(MAKE) --no-print-directory root up images
	$(GO) run ./hack/cluster load $(addprefix out/images/,operator.tar agent.tar echo.tar)
endif

.PHONY: test-e2e
test-e2e: cluster ## End-to-end tests on the local cluster, or on the one of KUBECONFIG
	$(use_cluster) $(GO) test -count=1 -p 1 -timeout 60m $(GOTESTFLAGS) ./test/e2e/...

# The suite writes its own report.
REPORT ?= docs/conformance/report.yaml

.PHONY: conformance
conformance: cluster ## The Gateway API's conformance suite for meshes, on the local cluster or the one of KUBECONFIG
ifndef KUBECONFIG
	$(GO) run ./hack/images echo-advanced
	$(GO) run ./hack/cluster load out/images/echo-advanced.tar
endif
	@mkdir -p $(dir $(REPORT))
	$(use_cluster) $(GO) -C test/conformance test -count=1 -timeout 30m $(GOTESTFLAGS) . -args -report-output=$(abspath $(REPORT))

# Each part is a folder with a benchmark and a section of docs/benchmarks.md. What it
# measures is never a test's business: machines differ.
BENCH  ?= $(sort $(notdir $(patsubst %/,%,$(dir $(shell grep -l '^func Benchmark' test/bench/*/*_test.go)))))
ROUNDS ?= 10

.PHONY: bench
bench: root setup ## Measure: BENCH=datapath is one part, ROUNDS=3 is quick, WRITE=1 writes docs/benchmarks.md; as root
	$(GO) run ./hack/envoy --all
	@for part in $(BENCH); do \
		$(GO) test -run '^$$' -bench . -benchtime 1x -timeout 60m $(GOTESTFLAGS) ./test/bench/$$part -args -rounds $(ROUNDS) $(if $(WRITE),-write) || exit 1; \
	done

.PHONY: soak
soak: root setup ## Tests that take minutes: limits again and again, isolation in a virtual machine with another kernel, rollouts on the cluster, about 30 minutes; as root
	$(GO) run ./hack/envoy --all
	$(GO) test -count=1 -timeout 30m -run '^TestLimitsRecover$$' $(GOTESTFLAGS) ./test/kernel -args -recoveries 50
	$(GO) test -count=1 -p 1 -timeout 30m $(GOTESTFLAGS) ./test/soak/...
	@$(MAKE) --no-print-directory soak-rollouts

# SEED=N repeats what happened at random.
.PHONY: soak-rollouts
soak-rollouts: cluster ## The half of it that is on a cluster, the local one or that of KUBECONFIG, about 8 minutes
	$(use_cluster) $(GO) test -count=1 -v -timeout 40m -run '^TestSoak' $(GOTESTFLAGS) ./test/e2e -args -soak -seed $(or $(SEED),0)

.PHONY: up
up: setup ## Start the local cluster: real Kubernetes, two nodes, no Docker; as root
	$(GO) run ./hack/cluster up

.PHONY: down
down: ## End the local cluster and remove all of it
	$(GO) run ./hack/cluster down

.PHONY: images
images: ## Build the container images as archives in out/images
	$(GO) run ./hack/images

.PHONY: demo
demo: cluster ## Show the product at work on the local cluster; leaves it up
	$(use_cluster) $(GO) run ./hack/demo

.PHONY: generate
generate: setup ## Make protobuf, deepcopy, CRD and BPF files anew
	$(GO) -C hack/tools run ./protogen ../.. api/node/v1alpha1/node.proto
	"$$($(GO) -C hack/tools tool -n controller-gen)" object crd paths=./api/v1alpha1/... output:crd:dir=config/crd
	@$(if $(call have,bpf),$(GO) generate ./bpf/...,true)

# Compared with what was there, not with a commit: work in progress passes, a
# hand-edited or stale generated file doesn't.
fingerprint = git ls-files --cached --others --exclude-standard -- $(generated) | sort | xargs -d '\n' sha256sum 2>&1

.PHONY: check-generate
check-generate: setup
	@mkdir -p out
	@$(fingerprint) > out/generated.before || true
	@$(MAKE) --no-print-directory generate
	@$(fingerprint) > out/generated.after || true
	@diff out/generated.before out/generated.after || { echo "check-generate: these files were not what 'make generate' makes; commit them as they are now"; false; }

.PHONY: lint
lint: ## gofmt, go vet and staticcheck
	@unformatted=$$(git ls-files --cached --others --exclude-standard '*.go' | xargs -d '\n' ls -d 2>/dev/null | xargs -d '\n' gofmt -l) && \
		{ [ -z "$$unformatted" ] || { echo "lint: run gofmt -w on:" $$unformatted; false; }; }
	$(GO) vet ./...
	$(GO) -C hack/tools vet ./...
	$(GO) -C test/conformance vet ./...
	"$$($(GO) -C hack/tools tool -n staticcheck)" ./...

.PHONY: setup
setup: ## Install what builds and tests need, as root on Debian or Ubuntu; elsewhere say what is missing
	@hack/setup

.PHONY: root
root:
	@[ "$$(id -u)" = 0 ] || { echo "this needs root: namespaces, cgroups and BPF programs are made; 'make test-unit' does not"; false; }
