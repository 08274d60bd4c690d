# SPDX-License-Identifier: LGPL-2.1-or-later
#
# make help    says what there is

PYTHON := .venv/bin/python
STAMP := .venv/.ready

# `make rpm VERSION=0.1.1` builds the tree as if it were that version; SITELIB is for systems whose Python looks
# elsewhere than the one that builds (the lab is Debian: /usr/lib/python3/dist-packages).
VERSION :=
SITELIB :=

# How many labs the live tests have at a time. They wait more than they work.
JOBS := 2

# Where `make install` puts things; virtd.spec sets all of them.
DESTDIR :=
PREFIX := /usr
BINDIR := $(PREFIX)/bin
LIBEXECDIR := $(PREFIX)/libexec
DATADIR := $(PREFIX)/share
MANDIR := $(DATADIR)/man
SYSTEMDDIR := $(PREFIX)/lib/systemd
UNITDIR := $(SYSTEMDDIR)/system
PRESETDIR := $(SYSTEMDDIR)/system-preset
CATALOGDIR := $(SYSTEMDDIR)/catalog
SYSUSERSDIR := $(PREFIX)/lib/sysusers.d
TMPFILESDIR := $(PREFIX)/lib/tmpfiles.d

.PHONY: help setup lint test unit live hard-days lvm survival sweep kills neighbours tidy-hour model fuzz demo bench rpm install clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(STAMP) ## install what the other targets need (as root or with sudo); nothing to do the second time

$(STAMP): pyproject.toml packaging/setup
	packaging/setup
	@touch $@

lint: $(STAMP) ## ruff, mypy, the units, the spec
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy virtd tests
	packaging/check-units
	packaging/check-spec

test: unit live ## the unit tests, then the live ones

unit: $(STAMP) ## tests that need no root, JOBS of them at once [JOBS=2]
	$(PYTHON) -m pytest tests/unit -n $(JOBS)

live: $(STAMP) ## tests in booted systems (root), JOBS of them at once [JOBS=2]
	$(PYTHON) -m tests.again -n $(JOBS) --dist loadfile --no-loadscope-reorder

hard-days: $(STAMP) ## what people's hosts do to a daemon, all of it (root, a quarter of an hour) [SUITE=trixie] [JOBS=2]
	VIRTD_SUITE=$(or $(SUITE),trixie) $(PYTHON) -m pytest tests/live/test_hard_days*.py tests/live/test_bad_days.py \
		tests/live/test_late_boot.py tests/live/test_network_drift.py -m live -o faulthandler_timeout=900 \
		-n $(JOBS) --dist loadfile --no-loadscope-reorder

tidy-hour: $(STAMP) ## ordinary use, after which nobody may have been warned of anything [MINUTES=60] [SUITE=trixie] (root)
	$(PYTHON) -m tests.proof.tidy --minutes $(or $(MINUTES),60) --suite $(or $(SUITE),trixie)

lvm: $(STAMP) ## pools on LVM and NFS, in a machine that has the kernel for it (root, a quarter of an hour)
	$(PYTHON) -m tests.proof.lvm

survival: $(STAMP) ## the table of what survives what, on all three suites, into the README (root, half an hour)
	$(PYTHON) -m tests.proof.survival --write

sweep: $(STAMP) ## kill the daemon at every point of every operation (root, minutes) [SWEEP="--errors --sample 5"]
	$(PYTHON) -m tests.proof.sweep $(SWEEP)

kills: $(STAMP) ## kill the daemon under load, 1,000 times or [KILLS=n] (root)
	VIRTD_KILLS=$(or $(KILLS),1000) $(PYTHON) -m pytest tests/live/test_survival.py -m live -k kills_under_load -s -o faulthandler_timeout=0

neighbours: $(STAMP) ## a network beside real docker and libvirt (root, minutes)
	$(PYTHON) -m tests.proof.neighbours

model: $(STAMP) ## random sequences of operations, kills and deaths against a model, 20 of 40 steps or [EXAMPLES=n] (root)
	VIRTD_EXAMPLES=$(or $(EXAMPLES),20) VIRTD_STEPS=40 $(PYTHON) -m pytest tests/live/test_model.py -m live -s

fuzz: $(STAMP) ## inputs that nobody wrote on purpose, ten minutes for each target [FUZZ="--only NAME --seconds n"]
	$(PYTHON) -m tests.proof.fuzz $(FUZZ)

demo: $(STAMP) ## one guest that lives through everything, with a verdict (root)
	$(PYTHON) tests/demo.py

bench: $(STAMP) ## the figures, beside libvirt's (root)
	$(PYTHON) -m tests.bench

rpm: $(STAMP) ## build/rpm/virtd-VERSION-1.noarch.rpm from the last commit [VERSION=x] [SITELIB=dir]
	packaging/build-rpm '$(VERSION)' '$(SITELIB)'

install: ## copy everything into DESTDIR (virtd.spec uses it)
	packaging/install '$(DESTDIR)' PREFIX='$(PREFIX)' BINDIR='$(BINDIR)' LIBEXECDIR='$(LIBEXECDIR)' \
		DATADIR='$(DATADIR)' MANDIR='$(MANDIR)' UNITDIR='$(UNITDIR)' PRESETDIR='$(PRESETDIR)' \
		CATALOGDIR='$(CATALOGDIR)' SYSUSERSDIR='$(SYSUSERSDIR)' TMPFILESDIR='$(TMPFILESDIR)' SITELIB='$(SITELIB)'

clean: ## remove what was built; the lab's cache and .venv stay
	rm -rf build .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
