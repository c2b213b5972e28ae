# Every target works from a clean clone with only Python >= 3.11 and make. Exact versions are in constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --no-compile --constraint constraints.txt
# Compiling all that pip installs takes minutes on a slow machine. Python compiles what is imported, and keeps it.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo demo-bert test lint bench scorecard torture docs site examples pages dist audit check-dist matrix clean

demo: .venv/runtime.stamp  ## where selection pays and where it does not, in a few minutes
	$(BIN)/earlysift compare --suite demo --jobs 2 --out runs/both --force

demo-bert: .venv/runtime.stamp  ## a 12-layer BERT, uniformly and with SIFT, on text that every machine has; ten minutes
	$(BIN)/earlysift compare --arms uniform sift sift-entropy visible auto --out runs/demo-bert --force

test: .venv/dev.stamp  ## all tests, a file at a time on every core
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile

lint: .venv/dev.stamp  ## style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: .venv/runtime.stamp  ## all benchmarks on this machine (hours on two cores); what was measured stays measured
	$(BIN)/python benchmarks/run.py step score positions select pages memory scale start auto hazards train

scorecard: .venv/dev.stamp  ## every case of docs/reliability.md (hours on two cores; goes on where it was cut)
	$(BIN)/python benchmarks/reliability.py
	$(BIN)/python benchmarks/results_page.py

torture: .venv/dev.stamp  ## the same at the numbers of a release, and an hour of soak by every score (a day; goes on where it was cut)
	$(BIN)/python benchmarks/reliability.py --long
	$(BIN)/python benchmarks/run.py soak --minutes 60 --out runs/torture
	$(BIN)/python benchmarks/results_page.py

docs: .venv/runtime.stamp  ## docs/results.md again, from the committed results
	$(BIN)/python benchmarks/results_page.py

site: .venv/site.stamp examples pages  ## the documentation as a site, site/index.html; fails if an example, a link, a picture or a public name does

examples: .venv/dev.stamp  ## every example of the documents and docstrings runs
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --quiet tests/test_docs.py tests/test_site.py src

pages: .venv/site.stamp  ## the site alone; its examples are tests (not --quiet: warnings would not be counted)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

dist: .venv/release.stamp .venv/audit.stamp  ## sdist, the wheel from it, each built in an environment of its own, and a bill of materials
	rm -rf dist
	PIP_CONSTRAINT=$(CURDIR)/constraints.txt $(BIN)/python -m build --outdir dist
	$(BIN)/cyclonedx-py requirements constraints.txt --pyproject pyproject.toml --output-file dist/earlysift.cdx.json

audit: .venv/audit.stamp  ## known vulnerabilities of the pinned versions; needs pypi.org itself, as mirrors carry no advisories
	$(BIN)/pip-audit --requirement constraints.txt --no-deps --disable-pip --strict

check-dist: dist  ## the wheel in clean environments, recipes included (half an hour); docs/versioning.md
	$(BIN)/python release/check.py

matrix: .venv/release.stamp  ## a part of the tests with oldest and newest torch and transformers (gigabytes, an hour); docs/versioning.md
	OMP_NUM_THREADS=1 $(BIN)/python release/matrix.py

# torch comes first and under the constraint: what depends on it would otherwise bring the newest one.
.venv/runtime.stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) pip
	$(PIP) torch
	$(PIP) --editable '.[all]'
	touch $@

.venv/dev.stamp: .venv/runtime.stamp
	$(PIP) --group dev
	touch $@

# ruff, of the group dev, formats the signatures.
.venv/site.stamp: .venv/dev.stamp
	$(PIP) --group site
	touch $@

.venv/release.stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) pip
	$(PIP) --group release
	touch $@

.venv/audit.stamp: .venv/release.stamp
	$(PIP) --group audit
	touch $@

clean:
	rm -rf .venv .matrix site dist
