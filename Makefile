# make demo       one minute: a frame, one second imagined beside reality, a table of errors
# make play       a page in the browser: walk through what the model imagines
# make study      the whole study: environment, training, evaluation, figures
# make bench      the benchmarks, side by side on this machine; their figures too
# make ablations  one thing changed at a time, three seeds each: six hours on two cores
# make agent      the agent's tasks in the game, resumed where they stopped: hours of real time
# make test       every check: modules in step with notebooks, notebooks, tests
# make soak       the tests again, with the full counts of what repeats: kills, mutations, game steps
# make lowest     the quick tests with the oldest versions of the dependencies that are allowed
# make export     after editing notebooks: format, write the modules, drop stray metadata
# make outputs    after a study: put its outputs into the notebooks

PRESET = tiny
STEPS  = 0
SEED   = 0
DEVICE = cpu
DATA   = data
OUT    = _runs/figures
PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13; do $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)

# Make would pass over a misspelt variable in silence
KNOWN = PRESET STEPS SEED DEVICE DATA OUT PYTHON
$(foreach v,$(.VARIABLES),$(if $(findstring command line,$(origin $v)),$(if $(filter $v,$(KNOWN) MAKEFLAGS -%),,$(error unknown variable $v; known: $(KNOWN)))))

BIN = .venv/bin
STUDY = OMP_WAIT_POLICY=PASSIVE $(BIN)/minecraft-jepa study
SETTINGS = --preset '$(PRESET)' --steps '$(STEPS)' --seed '$(SEED)' --device '$(DEVICE)' \
	--data '$(DATA)' --out '$(OUT)'
# `demo` and `play` have a folder of their own where none is chosen
CHOSEN_OUT = $(if $(findstring command line,$(origin OUT)),--out '$(OUT)')
# One test process a core, each with one thread that does not spin
PYTEST = OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/pytest -q -n auto --maxprocesses 8 \
	--dist loadgroup

.PHONY: help play demo study bench ablations agent test soak lowest export outputs
help:
	@grep '^# make' Makefile | cut -c3-

demo: .venv/installed
	OMP_WAIT_POLICY=PASSIVE $(BIN)/minecraft-jepa demo --data '$(DATA)' --seed '$(SEED)' $(CHOSEN_OUT)

play: .venv/installed
	$(BIN)/minecraft-jepa play --data '$(DATA)' $(CHOSEN_OUT)

study: .venv/installed
	$(STUDY) $(SETTINGS)

bench: .venv/installed
	$(STUDY) --notebooks nbs/bench $(SETTINGS)

ablations: .venv/installed
	$(STUDY) --notebooks nbs/study/8_ablations.ipynb $(SETTINGS)

agent: .venv/installed
	$(STUDY) --notebooks nbs/study/10_agent.ipynb $(SETTINGS)

test: .venv/installed
	$(PYTEST)

soak: .venv/installed
	SOAK=1 $(PYTEST)

lowest: .venv/installed
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python .lowest
	$(BIN)/uv pip install --quiet --python .lowest/bin/python --resolution lowest-direct -e .
	$(BIN)/uv pip install --quiet --python .lowest/bin/python pytest hypothesis
	OMP_NUM_THREADS=1 .lowest/bin/python -m pytest -q tests/test_actions.py \
		tests/test_recordings.py tests/test_drawing.py tests/test_model.py \
		tests/test_remote.py tests/test_contractor.py

export: .venv/installed
	$(BIN)/ruff format --quiet nbs tests
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean

outputs: .venv/installed
	$(BIN)/python -m minecraft_jepa.outputs

# uv takes one minute where pip takes five; where it can't be had, pip does it
.venv/installed: pyproject.toml | $(BIN)/pip
	@echo 'Installing into .venv, without further output: about a minute, five where uv is missing.'
	@$(BIN)/python -m pip install --quiet uv \
		&& $(BIN)/uv pip install --quiet --python $(BIN)/python -e '.[dev]' \
		|| { echo 'uv did not do it, so pip does: about five minutes. pip takes the large torch.'; \
			$(BIN)/python -m pip install --quiet -e '.[dev]'; }
	@touch $@

$(BIN)/pip:
	@'$(PYTHON)' -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo 'Python 3.11 or newer is needed. Debian 12, Ubuntu 24.04 and later:' \
			'sudo apt install python3 python3-venv. Ubuntu 22.04:' \
			'sudo apt install python3.11 python3.11-venv' >&2; exit 1; }
	@'$(PYTHON)' -c 'import ensurepip, venv' 2>/dev/null || { \
		'$(PYTHON)' -c 'import sys; print("$(PYTHON) cannot make environments: sudo apt install python%d.%d-venv (or python3-venv)" % sys.version_info[:2])' >&2; \
		exit 1; }
	@'$(PYTHON)' -m venv .venv
