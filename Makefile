# nonroot's chores. Each sets up what it needs the first time, in .venv and rust/target, and nothing outside this folder
# and the user's cache.
#
#   make demo      boot Debian's kernel in a domain, run uname -a in it, power off
#   make test      the tests, at most 5 minutes
#   make check     formats, lints, types, import rules, unused dependencies
#   make test-all  every test but the soak ones, at most 40 minutes
#   make test-kvm  the tests on KVM: on /dev/kvm, and in a machine of QEMU's that has guest mode
#   make matrix    the boot matrix: systems from disk, CD and floppy
#   make soak      the long loops; can be interrupted and resumed
#   make bench     the boot, VM exits, work in guests, disks and networks, side by side with QEMU's software CPU
#   make bench-stubdom   device models here and in processes of their own
#   make wheel     one abi3 wheel in dist/
#   make clean     removes what was built here

VENV   := .venv
PY     := $(VENV)/bin/python
STAMPS := .stamps
export CARGO_TERM_COLOR ?= auto
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# Tests of one module stay on one core: they share guests.
PYTEST       := $(PY) scripts/run_tests.py -q -n $(shell nproc) --dist loadscope
CARGO        := cargo
MANIFEST     := --manifest-path rust/Cargo.toml
ENGINE_FILES := $(shell find rust guest -name target -prune -o -type f \( -name '*.rs' -o -name '*.toml' -o -name '*.lock' -o -name '*.c' -o -name '*.h' -o -name '*.S' -o -name '*.ld' \) -print 2>/dev/null)

.PHONY: demo test check test-all test-kvm matrix soak bench bench-stubdom wheel clean engine dev guests cargo-test
.DEFAULT_GOAL := demo

$(STAMPS)/venv: scripts/preflight
	@scripts/preflight
	@mkdir -p $(STAMPS)
	@echo "setup: making $(VENV)"
	@test -x $(PY) || "$$(scripts/preflight --python)" -m venv $(VENV)
	@touch $@

$(STAMPS)/runtime: $(STAMPS)/venv pyproject.toml scripts/requirements
	@echo "setup: installing the run-time dependencies"
	@$(PY) -m pip install --quiet $$($(PY) scripts/requirements build runtime vnc)
	@touch $@

$(STAMPS)/engine: $(STAMPS)/runtime $(ENGINE_FILES)
	@echo "setup: building the engine"
	@VIRTUAL_ENV=$(CURDIR)/$(VENV) $(VENV)/bin/maturin develop --quiet --release --locked
	@$(PY) -m compileall -q src
	@touch $@

$(STAMPS)/dev: $(STAMPS)/engine pyproject.toml scripts/requirements
	@echo "setup: installing the development tools"
	@$(PY) -m pip install --quiet $$($(PY) scripts/requirements dev)
	@touch $@

engine: $(STAMPS)/engine
dev: $(STAMPS)/dev

# A machine without apt or network still tests what needs no Linux; the command says what is missing.
guests: $(STAMPS)/engine
	@$(PY) -m nonroot.guests fetch cloud-amd64 686-pae || true

demo: $(STAMPS)/engine
	@$(VENV)/bin/nonroot demo

# The release profile shares everything that the extension's build compiled.
cargo-test:
	$(CARGO) test $(MANIFEST) --workspace --exclude nonroot-engine --release --locked --quiet

test: $(STAMPS)/dev guests cargo-test
	$(PYTEST) -m "not slow and not soak"

# The debug profile adds Rust's overflow checks and debug assertions.
test-all: $(STAMPS)/dev
	@$(PY) -m nonroot.guests fetch cloud-amd64 amd64 686-pae 686 || true
	$(CARGO) test $(MANIFEST) --workspace --exclude nonroot-engine --locked --quiet
	$(PYTEST) -m "not soak"

# Tests on KVM: on this machine's /dev/kvm, if it has one, and on the guest mode of QEMU's software CPU.
test-kvm: $(STAMPS)/dev guests
	$(PYTEST) -m "not soak" tests/engines/kvm tests/kvm_bed

# Systems boot from disk, CD and floppy, on every engine; FAST=1 leaves out whole systems. REFERENCES=write writes what
# their screens show into tests/matrix/references, rather than comparing.
matrix: $(STAMPS)/dev
	@$(PY) -m nonroot.guests fetch amd64 686-pae 686 || true
	$(if $(REFERENCES),NONROOT_REFERENCES=$(REFERENCES)) $(PYTEST) --dist load tests/matrix $(if $(FAST),-m "not slow")

soak: $(STAMPS)/dev guests
	$(PY) scripts/soak.py $(if $(ROUNDS),--rounds $(ROUNDS)) $(if $(ONLY),--only '$(ONLY)')

bench: $(STAMPS)/dev guests
	$(PY) -m bench.boot $(BENCH)
	$(PY) -m bench.exits $(BENCH)
	$(PY) -m bench.work $(BENCH)
	$(PY) -m bench.disk $(BENCH)
	$(PY) -m bench.pv $(BENCH)
	$(PY) -m bench.saved $(BENCH)

bench-stubdom: $(STAMPS)/dev
	$(PY) -m bench.stubdom
	$(PY) -m bench.stubdom --hogs 2

check: $(STAMPS)/dev
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/ruff check
	$(VENV)/bin/mypy
	$(PY) -m mypy.stubtest nonroot._engine --concise
	$(PY) scripts/check_imports.py
	$(VENV)/bin/deptry src
	$(PY) scripts/check_crates.py
	$(CARGO) fmt $(MANIFEST) --all --check
	$(CARGO) clippy $(MANIFEST) --workspace --all-targets --locked --quiet -- -D warnings
	@if [ -d "$$(rustc --print sysroot)/lib/rustlib/aarch64-unknown-linux-gnu" ]; then \
		PYO3_NO_PYTHON=1 $(CARGO) check $(MANIFEST) --workspace --exclude nonroot-hostcpu --locked --quiet \
			--target aarch64-unknown-linux-gnu; \
	else echo "no standard library for aarch64 (rustup target add aarch64-unknown-linux-gnu): that check is skipped"; fi
	@if command -v shellcheck >/dev/null; then echo shellcheck; shellcheck scripts/preflight scripts/test_wheel .ci/run tests/stress/load/workload.sh; \
	else echo "shellcheck is not installed: skipped"; fi
	@echo "check: all clean"

wheel: $(STAMPS)/runtime
	$(VENV)/bin/maturin build --release --locked --strip --out dist

clean:
	rm -rf $(VENV) $(STAMPS) build dist rust/target src/nonroot/_engine*.so
