# make demo | study | evidence | bench | test | test-slow | coverage | lint | faults | docs | clean. Every target makes .venv itself; a second call installs nothing.
PYTHON ?= python3
VENV   ?= .venv
RUN    := $(VENV)/bin/python
DEMO   ?= runs/demo
STUDY  ?= runs/study
TORCH_PYTHON ?=
STAMP  := $(VENV)/.installed

.PHONY: demo study evidence bench test test-slow coverage lint faults docs format clean install

install: $(STAMP)

# The stamp is younger than what it depends on exactly when the installation is up to date.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is older than Python 3.11; name a newer one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $(STAMP)

demo: $(STAMP)
	$(RUN) -m conclugen_jax demo --folder=$(DEMO)

study: $(STAMP)
	$(RUN) -m conclugen_jax build --dataset=digits --data_dir=$(STUDY)/data
	$(RUN) -m conclugen_jax study --config=study_demo --study=$(STUDY) \
		--config.pretraining_path=$(STUDY)/data/digits/1.0.0 --config.datasets.digits.path=$(STUDY)/data/digits/1.0.0
	$(RUN) -m conclugen_jax report --study=$(STUDY)

# How the recommended method was judged; with CHOICE=_choice how it was chosen. RAVDESS names ravdess_au_mfcc.npz (docs/reference/datasets/ravdess.md).
RAVDESS ?=
CHOICE  ?=
SHUFFLES := 1 2 3 4 5 6
evidence: $(STAMP)
	$(RUN) -m conclugen_jax build --dataset=digits --data_dir=data
	$(RUN) -m conclugen_jax study --config=study_recipe:digits$(CHOICE) --study=runs/digits$(CHOICE)
	for seed in $(SHUFFLES); do for fold in 0 1 2; do $(RUN) -m conclugen_jax build --dataset=ravdess --source=$(RAVDESS) --data_dir=data \
		--num_folds=3 --fold=$$fold --fold_seed=$$seed --nofold_validation || exit 1; done; done
	$(RUN) -m conclugen_jax study --config=study_recipe:ravdess$(CHOICE) --study=runs/ravdess$(CHOICE)

# TORCH_PYTHON names a Python with torch and fast-pytorch-kmeans; without it our side is timed alone. Writes docs/benchmarks.md.
bench: $(STAMP)
	$(RUN) -m benchmarks.cpu --torch-python=$(TORCH_PYTHON)

# test: the quick tests, at most eight minutes on two cores. test-slow: kills, faults, several processes, whole commands.
test: $(STAMP)
	$(RUN) -m pytest -m "not slow"

test-slow: $(STAMP)
	$(RUN) -m pytest -m slow

coverage: $(STAMP)
	$(RUN) -m pytest --cov=conclugen_jax --cov-report=term

lint: $(STAMP)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m bandit --quiet --recursive --configfile pyproject.toml conclugen_jax configs launch
	$(RUN) .ci/prose.py
	$(RUN) -m codespell_lib $$(git ls-files '*.md' '*.py' '*.ipynb' '*.yaml' '*.toml')
	@out=$$(timeout 60 $(RUN) -m pip_audit --progress-spinner=off --requirement=constraints.txt --no-deps --disable-pip --timeout=5 2>&1) || \
		if echo "$$out" | grep -q "known vulnerabilit"; then echo "$$out"; exit 1; \
		else echo "pip-audit: no answer from the advisory service, dependencies were not audited"; fi

# Faults of every kind against real commands; the table goes into docs/understand/reliability.md.
faults: $(STAMP)
	$(RUN) -m faults --report=docs/understand/reliability_table.md

# The site of documentation: open docs/_build/html/index.html.
docs: $(STAMP)
	$(RUN) -m sphinx -n -W --keep-going -q -b html docs docs/_build/html

format: $(STAMP)
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

clean:
	rm -rf $(VENV) $(DEMO) docs/_build .pytest_cache .ruff_cache .coverage
