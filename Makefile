# make study    the whole study: environment, training, evaluation, figures
# make bench    the benchmarks, side by side on this machine; their figures too
# make ablations  one thing changed at a time, two seeds each: two hours on two cores
# make test     every check: modules in step with notebooks, notebooks, tests
# make export   after editing notebooks: write the modules, drop outputs and stray metadata

PRESET = tiny
STEPS  = 0
SEED   = 0
DEVICE = cpu
DATA   = data
OUT    = figures
PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13; do $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

# Make would pass over a misspelt variable in silence
KNOWN = PRESET STEPS SEED DEVICE DATA OUT PYTHON
$(foreach v,$(.VARIABLES),$(if $(findstring command line,$(origin $v)),$(if $(filter $v,$(KNOWN) MAKEFLAGS -%),,$(error unknown variable $v; known: $(KNOWN)))))

BIN = .venv/bin

.PHONY: help study bench ablations test export
help:
	@grep '^# make' Makefile | cut -c3-

study: .venv/installed
	$(BIN)/python -m minecraft_jepa.study --preset '$(PRESET)' --steps '$(STEPS)' --seed '$(SEED)' --device '$(DEVICE)' --data '$(DATA)' --out '$(OUT)'

bench: .venv/installed
	$(BIN)/python -m minecraft_jepa.study --notebooks nbs/bench --preset '$(PRESET)' --steps '$(STEPS)' --seed '$(SEED)' --device '$(DEVICE)' --data '$(DATA)' --out '$(OUT)'

ablations: .venv/installed
	$(BIN)/python -m minecraft_jepa.study --notebooks nbs/study/8_ablations.ipynb --preset '$(PRESET)' --steps '$(STEPS)' --seed '$(SEED)' --device '$(DEVICE)' --data '$(DATA)' --out '$(OUT)'

test: .venv/installed
	$(BIN)/pytest -q tests/test_repo.py
	OMP_NUM_THREADS=1 $(BIN)/nbdev_test --n_workers 2 --do_print
	OMP_NUM_THREADS=1 $(BIN)/pytest

export: .venv/installed
	$(BIN)/nbdev_export
	$(BIN)/jupyter nbconvert --log-level WARN --clear-output --inplace nbs/*.ipynb nbs/study/*.ipynb nbs/bench/*.ipynb
	$(BIN)/nbdev_clean

.venv/installed: pyproject.toml | $(BIN)/pip
	$(BIN)/python -m pip install -e '.[dev]'
	touch $@

$(BIN)/pip:
	@'$(PYTHON)' -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { echo 'Python 3.11 or newer is needed. Debian 12, Ubuntu 24.04 and later: sudo apt install python3 python3-venv. Ubuntu 22.04: sudo apt install python3.11 python3.11-venv' >&2; exit 1; }
	@'$(PYTHON)' -c 'import ensurepip, venv' 2>/dev/null || { '$(PYTHON)' -c 'import sys; print("$(PYTHON) cannot make environments: sudo apt install python%d.%d-venv (or python3-venv)" % sys.version_info[:2])' >&2; exit 1; }
	'$(PYTHON)' -m venv .venv
