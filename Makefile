PY = .venv/bin/python

help:           ## show this
	@grep -E '^[a-z-]+:.*##' Makefile | sed 's/:.*##/ -/'

.venv/ready: requirements.txt requirements-dev.txt
	python3 -m venv .venv
	.venv/bin/pip install -q -r requirements.txt -r requirements-dev.txt
	touch $@

install: .venv/ready    ## make the environment .venv

demo: .venv/ready       ## everything from nothing to the table and the figures, on a CPU
	$(PY) data/toy.py
	$(PY) sft.py
	$(PY) tools/label.py
	@echo "PPO with its reward model runs beside GVM and DVPO, one thread each; it writes to out/tiny/ppo.log"
	OMP_NUM_THREADS=1 $(MAKE) -j 2 demo-dvpo demo-ppo
	$(PY) train_gvm.py --show "review the soup and the staff ." "the soup was not bland . the staff was rude ." --policy good
	$(PY) train_gvm.py --show "review the soup and the staff ." "the soup was bland . the staff was not rude ." --policy good --out out/tiny/flipped
	$(PY) tools/sample.py --prompts data/toy/prompts_heldout.jsonl --to out/tiny/dvpo.json
	$(PY) tools/sample.py --prompts data/toy/prompts_heldout.jsonl --to out/tiny/sft.json --policy out/tiny/sft/model
	$(PY) tools/judge.py out/tiny/dvpo.json out/tiny/sft.json --reward data/toy.py:gold_reward --to out/tiny/verdicts.jsonl
	$(PY) experiments/report.py
	$(PY) tools/plot.py
	$(PY) tools/plot.py --heatmap out/tiny/gvm/show.json out/tiny/flipped/show.json --to out/tiny/heatmap.png

demo-dvpo:
	$(PY) train_gvm.py --data data/toy/gvm.jsonl out/tiny/sft/labelled.jsonl
	$(PY) dvpo.py

demo-ppo:
	$(PY) ppo_baseline.py --pairs data/toy/pairs.jsonl out/tiny/sft/labelled_pairs.jsonl > out/tiny/ppo.log 2>&1

test: .venv/ready       ## the smoke test, then all tests
	$(PY) test_smoke.py
	$(PY) -m pytest -n 2 tests

lint: .venv/ready       ## ruff, and the line counts that keep the code readable
	.venv/bin/ruff check .
	$(PY) tests/line_counts.py

results-check: .venv/ready      ## the numbers of the docs against results/
	$(PY) experiments/results_check.py

.PHONY: help install demo demo-dvpo demo-ppo test lint results-check
