# make demo     the main job on real data: a table, and an HTML report in demo-report/
# make test     the test suite, against the installed package, and which lines of it never ran
# make lint     style and types of the sources, which file imports which, and the workflows of .github
# make sanitize the core's tests under AddressSanitizer and UndefinedBehaviorSanitizer
# make docs     the documentation as a site, in build/site; warnings are errors
# make bench    the benchmarks
# make clean    remove everything that these made
#
# All of it happens in a virtual environment, VENV, made with PYTHON (3.10 or newer).

PYTHON ?= python3
VENV ?= .venv

bin := $(VENV)/bin
sources := $(wildcard setup.py pyproject.toml CMakeLists.txt README.md) \
           $(shell find csrc rat_ext -type f -not -name '*.so' -not -name '*.pyc')
cxx_sources := $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

.PHONY: demo test lint format sanitize docs bench clean

demo: $(VENV)/installed-demo
	$(bin)/rat-ext demo --out demo-report

# The script `pytest`, unlike `python -m pytest`, keeps the source tree off the import path.
test: $(VENV)/installed-dev
	$(bin)/pytest --cov

lint: $(VENV)/installed-dev
	$(bin)/ruff check
	$(bin)/ruff format --check
	$(bin)/mypy
	$(bin)/lint-imports
	$(bin)/clang-format --dry-run -Werror $(cxx_sources)
	$(bin)/zizmor --offline --quiet .github

format: $(VENV)/installed-dev
	$(bin)/ruff check --fix
	$(bin)/ruff format
	$(bin)/clang-format -i $(cxx_sources)

sanitize: $(VENV)/installed-dev
	PYTHON=$(bin)/python scripts/sanitize.sh

# The variable keeps an announcement of the theme's authors out of the output. Not with --quiet, which
# would hide the warnings from --strict as well.
docs: $(VENV)/installed-dev
	NO_MKDOCS_2_WARNING=1 $(bin)/mkdocs build --strict

bench: $(VENV)/installed-bench
	set -e; for name in import_time large_run rat_step search_rule throughput; do \
	  echo "== $$name"; $(bin)/python benchmarks/$$name.py; done

$(VENV)/installed-%: $(sources) | $(VENV)/bin/pip
	$(bin)/pip install ".[$*]"
	touch $@

$(VENV)/bin/pip:
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) build dist demo-report *.egg-info .coverage .pytest_cache .ruff_cache .hypothesis
	rm -f rat_ext/*.so
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
