# Thin: each target is one command that also works by itself.

SHELL = /bin/bash
PYTHON = .venv/bin/python
RESULTS = bench/results/latest.json
ADVERSITY = bench/results/adversity.json

.DEFAULT_GOAL = help
.PHONY: adversity docs-drops docs-ends docs-seccomp help setup install-system-packages run check docs screens test test-clients compiled test-compiled wheels fuzz fuzz-long mutants security bench bench-all bench-quick bench-plot soak demo demo-vm completions dist deb rpm test-deb reproducible release lock clean

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

test-clients: ## Only programs that start pasta and passt; as root, podman and others in a root of Debian 13
	scripts/test tests/system/clients
	scripts/test-clients

compiled: ## The compiled build of the same source, in build/compiled (needs a C compiler)
	scripts/setup compiled
	scripts/compile

test-compiled: ## System and security tests, and hostile input, on the compiled build
	scripts/test-compiled

wheels: ## Compiled wheels for each CPython that is found, in dist/wheels
	scripts/setup compiled
	scripts/wheels

fuzz: ## Fuzzing: each target for a minute (docs/fuzzing.md)
	scripts/fuzz --seconds 60 --jobs 2

fuzz-long: ## Fuzzing up to ten million executions of each target, recorded in docs/fuzzing.md (hours)
	scripts/fuzz --runs 10000000 --jobs 2 --record

mutants: ## Change one thing at a time in MODULES="tcp udp_engine ...": does a test fail? (docs/testing.md; all: hours)
	scripts/mutants $(MODULES)

security: ## Floods from the guest at full length, written to docs/floods.md (about 20 minutes)
	scripts/security

bench: compiled ## The benchmark of both builds, beside the C original, slirp4netns and no daemon (12 minutes)
	scripts/setup bench
	$(PYTHON) -m bench --seconds 1 --rounds 5 --minutes 11.5 --json $(RESULTS)

bench-all: compiled ## The benchmark with everything beside each row, in long samples (about an hour)
	scripts/setup bench
	$(PYTHON) -m bench --contenders ours,compiled,ours-wmem,pasta,pasta-wmem,slirp4netns,loopback

bench-quick: ## The benchmark with one short sample of each row
	scripts/setup bench
	$(PYTHON) -m bench --quick

bench-plot: ## Draw the pictures and write the table of docs/performance.md, from the last benchmark
	scripts/setup bench
	$(PYTHON) -m bench.plot $(RESULTS) docs/bench.png docs/bench-summary.png docs/performance.md

soak: ## Real programs for a long time, in both modes: SECONDS=1200 (bench/soak.py)
	scripts/setup soak
	$(PYTHON) -m bench.soak --seconds $(or $(SECONDS),1200)

adversity: ## Transfers over links with faults, latency under load, beside C: docs/reliability.md (about an hour)
	scripts/setup bench
	rm -f $(ADVERSITY)
	$(PYTHON) -m bench.adversity --contenders loopback --parts curves matrix --only "1500 IPv4" --seed 1 --json $(ADVERSITY)
	$(PYTHON) -m bench.adversity --contenders ours --parts curves matrix --seed 1 --limit 20 --json $(ADVERSITY) || echo "some did not arrive whole"
	$(PYTHON) -m bench.adversity --contenders pasta --parts curves matrix --only "1500 IPv4" --seed 1 --limit 8 --json $(ADVERSITY)
	$(PYTHON) -m bench.adversity --contenders ours pasta --parts latency --congestion cubic --rounds 2 --seed 1 --json $(ADVERSITY)
	$(PYTHON) -m bench.adversity --contenders loopback ours pasta --parts stopped --seed 1 --json $(ADVERSITY) || echo "some ends differ"
	$(PYTHON) -m bench.reliability $(ADVERSITY) docs/reliability.md docs/reliability.png

demo: ## A namespace at work, on one screen
	scripts/setup demo
	$(PYTHON) -m bench.demo

demo-vm: ## A virtual machine at work: the guest of the tests under QEMU, whose network is passt
	scripts/setup demo-vm
	$(PYTHON) -m bench.demo_vm

docs: ## The documents, manual pages and docstrings as a site, in build/site
	scripts/setup docs
	$(PYTHON) scripts/site

screens: ## Take the screens of pasta and pesto in docs/observability.md anew
	scripts/setup test
	$(PYTHON) -m bench.screens

completions: ## Write the completion files for bash, zsh and fish, from the table of options
	scripts/completions

docs-drops: setup ## Write docs/drops.md, from the code
	$(PYTHON) -m tests.unit.test_drops >docs/drops.md

docs-ends: setup ## Write docs/ends.md, from the test that walks all ends of connections
	$(PYTHON) -m tests.unit.test_tcp_ends >docs/ends.md

docs-seccomp: setup ## Write docs/seccomp.md, from the code
	$(PYTHON) -m passt.daemon.seccomp_table >docs/seccomp.md

dist: setup ## Source distribution, wheel and bill of materials, in dist/
	scripts/dist

deb: setup ## Debian packages, examined by lintian, in dist/debian
	scripts/deb

rpm: setup ## RPM packages, in dist/rpm
	scripts/rpm

test-deb: setup ## Install, run, upgrade and purge the Debian packages in roots of Debian 12 and 13 (root only)
	scripts/test-deb

reproducible: setup ## Build all of these twice: are they equal byte by byte?
	scripts/reproducible

release: ## Check that all of it is ready, for the tag of this commit, and build what is to be published in dist/
	scripts/release

lock: ## Take new versions of Python packages: OPTIONS=--upgrade, or --upgrade-package NAME
	scripts/lock $(OPTIONS)

clean: ## Remove what was installed or built here
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
