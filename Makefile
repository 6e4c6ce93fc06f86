# Thin: each target is one command that also works by itself.

SHELL = /bin/bash
PYTHON = .venv/bin/python
RESULTS = bench/results/latest.json

.DEFAULT_GOAL = help
.PHONY: docs-drops docs-seccomp help setup install-system-packages run check test fuzz fuzz-long mutants security bench bench-quick bench-plot demo demo-vm completions clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "%-24s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## Virtual environment .venv with the package and the tests' packages; Debian packages when root
	scripts/setup test

install-system-packages: ## Only the Debian packages of the tests: installs them for root, names them to others
	SYSTEM_ONLY=1 scripts/setup test

run: ## A login shell in a new namespace with network
	scripts/run

check: ## ruff, mypy and the unit tests
	scripts/check

test: ## Everything that CI runs
	scripts/test

fuzz: ## Fuzzing: each target for a minute (docs/fuzzing.md)
	scripts/fuzz --seconds 60 --jobs 2

fuzz-long: ## Fuzzing up to ten million executions of each target, recorded in docs/fuzzing.md (hours)
	scripts/fuzz --runs 10000000 --jobs 2 --record

mutants: ## Change one thing at a time in MODULES="tcp udp_engine ...": does a test fail? (docs/testing.md; all: hours)
	scripts/mutants $(MODULES)

security: ## Floods from the guest at full length, written to docs/floods.md (about 20 minutes)
	scripts/security

bench: ## The benchmark, beside the C original, slirp4netns and loopback (about 30 minutes)
	scripts/setup bench
	$(PYTHON) -m bench --json $(RESULTS)

bench-quick: ## The benchmark with one short sample of each row
	scripts/setup bench
	$(PYTHON) -m bench --quick

bench-plot: ## Draw the pictures and write the table of docs/performance.md, from the last benchmark
	scripts/setup bench
	$(PYTHON) -m bench.plot $(RESULTS) docs/bench.png docs/bench-summary.png docs/performance.md

demo: ## A namespace at work, on one screen
	scripts/setup demo
	$(PYTHON) -m bench.demo

demo-vm: ## A virtual machine at work: the guest of the tests under QEMU, whose network is passt
	scripts/setup demo-vm
	$(PYTHON) -m bench.demo_vm

completions: ## Write the completion files for bash, zsh and fish, from the table of options
	scripts/completions

docs-drops: setup ## Write docs/drops.md, from the code
	$(PYTHON) -m tests.unit.test_drops >docs/drops.md

docs-seccomp: setup ## Write docs/seccomp.md, from the code
	$(PYTHON) -m passt.daemon.seccomp_table >docs/seccomp.md

clean: ## Remove what was installed or built here
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
