# Every target makes the virtual environment it needs first, once. Another interpreter: make PYTHON=python3.12 ...
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
APP    := $(VENV)/.ready-app
DEV    := $(VENV)/.ready-dev
BROWSE := $(VENV)/.ready-browser
# Python may keep compiled libraries in .venv, also where a container forbids it: else every command compiles them again (6 s)
unexport PYTHONDONTWRITEBYTECODE
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check

.PHONY: help setup demo ravdess serve app docs docs-check test test-slow test-browser bench-features bench-score bench-train simulate-scale
.PHONY: reproduce reproduce-corpora reproduced-features reproduced-teacher-1 reproduced-teacher-2 three-seconds new-voices
.PHONY: kill-tests test-cluster bench-serve load-test bench-page page-pictures video fuzz fuzz-api lint clean

help:             ## this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile | expand -t 20

setup: $(READY)   ## virtual environment with exactly the packages of requirements.txt

$(READY): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	-$(PIP) pip==26.3  # installs in half the time of Python 3.11's own; without it, that one does
	$(PIP) --no-compile -r requirements.txt
	PYTHONWARNINGS=ignore $(PIP) --no-deps --no-build-isolation -e .
	@touch $@

$(APP): requirements-app.txt $(READY)
	$(PIP) --no-compile -r requirements-app.txt
	@touch $@

$(DEV): requirements-dev.txt requirements-app.txt $(READY)
	$(PIP) --no-compile -r requirements-dev.txt
	@touch $@ $(APP)

$(BROWSE): $(DEV)
	$(PIP) playwright==1.65.2 greenlet==3.5.6 axe-playwright-python==0.1.8
	@touch $@

demo: $(READY)    ## score samples/ with the shipped model; your own: make demo DATA=/path/to/folder
	@$(BIN)/python samples/demo.py --out demo_report $(if $(DATA),--data "$(DATA)")

ravdess: $(READY) ## download the RAVDESS speech recordings (CC BY-NC-SA 4.0), resumable, checked: make ravdess OUT=RAVDESS
	@$(BIN)/python -m jobs.ravdess --out "$(or $(OUT),RAVDESS)" $(ARGS)

serve: $(READY)   ## the HTTP service on http://127.0.0.1:8000; options: make serve ARGS="--bundles runs/first"
	@$(BIN)/python -m jobs.serve $(ARGS)

app: $(APP)       ## the web page and its service, on http://localhost:8501; options: make app ARGS="--port 8600"
	@$(BIN)/python -m jobs.app $(ARGS)

test: $(DEV)    ## the tests, in a few minutes
	$(BIN)/python -m pytest -n 2

docs-check: $(DEV)  ## README, docs and notebook: links, commands, docstrings, the worked examples of CONTRIBUTING.md
	$(BIN)/python -m pytest -m "docs and not slow"

test-slow: $(DEV)   ## the tests that take longer
	$(BIN)/python -m pytest -m slow --timeout 1800

test-browser: $(BROWSE)  ## the tests in a real browser; needs chromium (CHROMIUM=/usr/bin/chromium)
	$(BIN)/python -m pytest -m browser

bench-features: $(DEV)  ## speed of decoding, features and extraction: make bench-features DATA=/path/to/recordings
	$(BIN)/python -m benchmarks.bench_features --data_dir "$(DATA)"
	$(BIN)/python -m benchmarks.bench_extract --data_dir "$(DATA)"

bench-score: $(DEV)  ## speed of batch scoring, end to end: make bench-score DATA=/path/to/recordings
	$(BIN)/python -m benchmarks.bench_score --data_dir "$(DATA)"

bench-train: $(DEV)  ## speed of training: make bench-train FEATURES=/folder/of/jobs.extract
	$(BIN)/python -m benchmarks.bench_train --features "$(FEATURES)"

test-cluster: $(DEV)  ## three nodes on this machine: jobs across them, nodes killed, cables cut, the head restarted; half an hour or more
	$(BIN)/python -m benchmarks.cluster_nodes $(ARGS)

simulate-scale: $(DEV)  ## what the driver costs at 100,000 files: scoring with the model replaced by a sleep
	$(BIN)/python -m benchmarks.simulate_scale

kill-tests: $(DEV)  ## processes killed in the middle of training and scoring: make kill-tests DATA=/path/to/recordings
	$(BIN)/python -m benchmarks.kill_train --data_dir "$(DATA)"
	$(BIN)/python -m benchmarks.kill_score --data_dir "$(DATA)"
	$(BIN)/python -m benchmarks.kill_score --data_dir "$(DATA)" --engine local

AGAIN := runs/reproduced
LONG  := runs/three-seconds
VOICES := --augment crop,stretch:0.2,warp:0.2,masks,mixup,gain:9,noise,band --mixup_alpha 0.4
extracted = $(BIN)/python -m jobs.manifest "$(DATA)" --out $(1)/metadata.csv && \
	  $(BIN)/python -m jobs.extract --data_csv $(1)/metadata.csv --out $(1)/features $(2)
trained = $(BIN)/python -m jobs.train --features $(1)/features --split_csv models/splits/ravdess_split.csv \
	  --recipe models/inception_ravdess --inner_val 0 --num_workers 2 --out $(1)/$(2) $(3) $(ARGS) \
	  $$(test -f $(1)/$(2)/plan.json && echo --resume)

reproduced-features: $(READY)
	$(call extracted,$(AGAIN))

reproduced-teacher-1: reproduced-features
	$(call trained,$(AGAIN),teacher-1,--seed 42 --report_split none)

reproduced-teacher-2: reproduced-features
	$(call trained,$(AGAIN),teacher-2,--seed 42 --epochs 320 --report_split none)

reproduce: reproduced-teacher-1 reproduced-teacher-2  ## train models/inception_ravdess and its two teachers again; goes on where it was stopped: make reproduce DATA=/path/to/RAVDESS
	$(call trained,$(AGAIN),student,--teachers $(AGAIN)/teacher-1 $(AGAIN)/teacher-2)

reproduce-corpora: $(READY)  ## train the shipped model again: make reproduce-corpora FEATURES="RAVDESS CREMA_D SONG", folders of jobs.extract in this order
	$(BIN)/python -m jobs.train --features $(FEATURES) --init models/inception_ravdess --recipe models/inception_ser_final \
	  --corpus_share ravdess_speech:0.5,crema_d:0.33,ravdess_song:0.17 --inner_val 0 --test_size 0 --report_split none \
	  --num_workers 0 --threads 2 --out runs/corpora $(ARGS) $$(test -f runs/corpora/plan.json && echo --resume)

three-seconds: $(READY)  ## train a model whose input is 3 s instead of 2, better on new voices; goes on where it was stopped: make three-seconds DATA=/path/to/RAVDESS
	$(call extracted,$(LONG),--window_s 3 --hop_length 768)
	$(call trained,$(LONG),model,$(VOICES) --epochs 125 --seed 42)

new-voices: three-seconds  ## train two more of these and join the three, better still on new voices: make new-voices DATA=/path/to/RAVDESS
	$(call trained,$(LONG),model-43,$(VOICES) --epochs 125 --seed 43 --report_split none)
	$(call trained,$(LONG),model-44,$(VOICES) --epochs 125 --seed 44 --report_split none)
	test -f $(LONG)/joined/config.json || \
	  $(BIN)/python -m jobs.join $(LONG)/model $(LONG)/model-43 $(LONG)/model-44 --out $(LONG)/joined

bench-serve: $(DEV)  ## the service beside the model in process, killed workers, hostile uploads; about 15 minutes
	$(BIN)/python -m benchmarks.bench_serve
	$(BIN)/python -m benchmarks.kill_replica
	$(BIN)/python -m benchmarks.upload_attacks

load-test: $(DEV)  ## locust against a running service: make load-test ARGS="--users 16 --run-time 60s"
	$(PIP) locust==2.47.0
	$(BIN)/python -m locust --headless --only-summary -f benchmarks/locustfile.py $(ARGS)

bench-page: $(DEV)  ## the page: time from upload to picture, memory over 200 uploads; after make test-browser
	$(BIN)/python -m benchmarks.bench_page

page-pictures: $(DEV)  ## docs/page-*.png anew, with the shipped model; after make test-browser
	$(BIN)/python -m docs.take_page_pictures

video: $(DEV)     ## docs/demo.mp4 anew, filmed: make video DATA=/path/to/RAVDESS OWN=/path/to/EmoDB; after make test-browser; needs chromium, ffmpeg
	$(BIN)/python -m docs.film.demo --data_dir "$(DATA)" --own_dir "$(OWN)"

fuzz: $(DEV)      ## 10,000 mutated recordings through the decoder
	$(BIN)/python -m benchmarks.fuzz_audio --count 10000

fuzz-api: $(DEV)  ## every check of schemathesis against the running service
	$(PIP) schemathesis==4.32.5
	$(BIN)/python -m benchmarks.fuzz_api

docs: $(DEV)     ## the pages of docs/ as a site, in build/site
	$(PIP) mkdocs-material==9.8.2
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict

lint: $(DEV)    ## ruff, mypy --strict, and which room may import which
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:            ## remove what the demo and the checks wrote
	rm -rf demo_report .mypy_cache .pytest_cache .ruff_cache .hypothesis
