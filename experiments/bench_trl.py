"""TRL's PPO as one more method of tools/bench.py, in an environment of its own: nothing of this project is
imported here.

    python3 -m venv ENV && ENV/bin/pip install torch==2.13.0 trl==1.0.0
    python tools/bench.py --trl ENV/bin/python --shape 14M --prompt 32 --new 64 --batch-size 16 \\
        --mini-batch-size 4 --grad-accum 1

trl.experimental.ppo.PPOTrainer of TRL 1.0.0, a release that still has one, with the same shape, rows, tokens,
epochs and updates, random weights,
fp32: it takes turns with ours, step by step. Started by bench.py with: FOLDER WORLD LENGTHS ROUNDS PROMPT NEW
ROWS MINI ACCUM EPOCHS.
"""
import itertools
import json
import math
import re
import sys
import time

import numpy as np
import torch
from datasets import Dataset
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

folder, world, lengths = sys.argv[1:4]
rounds, prompt, new, rows, mini, accum, epochs = map(int, sys.argv[4:])
STOP, generated, turns, said = 1, ppo_trainer.batch_generation, itertools.count(), [0]


def shorter(*args):
    """What was generated, with the stop token where bench.py's mixed() ends an answer."""
    answers, logits = generated(*args)
    drawn = np.random.default_rng(next(turns)).lognormal(math.log(new / 5), 1.09, rows)
    ends = torch.from_numpy(drawn.round().clip(1, new)).long()
    answers[torch.arange(rows), prompt + ends - 1] = STOP
    said[0] = int(ends.sum())
    return answers, logits


if lengths == "mixed":
    ppo_trainer.batch_generation = shorter


class Turns(TrainerCallback):
    """After each step: a row, then wait."""
    begin, done = time.perf_counter(), 0

    def on_step_end(self, args, state, control, **_):
        with open("/proc/self/status") as f:
            peak = int(re.search(r"VmHWM:\s*(\d+) kB", f.read())[1]) * 1024
        with open(f"{folder}/trl.jsonl", "a") as f:
            f.write(
                json.dumps(
                    dict(sec_step=time.perf_counter() -
                         self.begin, peak_bytes=peak, peak_reserved=peak, tokens=said[0] or rows * new)) +
                "\n")
        self.done += 1
        while int("0" + open(f"{folder}/trl.turn").read()) <= self.done:
            time.sleep(0.002)
        self.begin = time.perf_counter()


tok = AutoTokenizer.from_pretrained(f"{world}/model", padding_side="left")
tok.pad_token = "w0"
config = AutoConfig.from_pretrained(f"{world}/model", pad_token_id=0, num_labels=1)
policy = AutoModelForCausalLM.from_pretrained(f"{world}/model")


def scalar():
    return AutoModelForSequenceClassification.from_config(config)


with open(f"{world}/prompts_{prompt}.jsonl") as f:
    data = Dataset.from_list(
        [dict(input_ids=tok(json.loads(line)["prompt"])["input_ids"][-prompt:]) for line in f])
args = PPOConfig(output_dir=f"{folder}/trl", per_device_train_batch_size=mini,
                 gradient_accumulation_steps=rows // mini, num_mini_batches=rows // (mini * accum),
                 num_ppo_epochs=epochs, total_episodes=rows * (rounds + 1), response_length=new,
                 local_rollout_forward_batch_size=rows, learning_rate=1e-6, num_sample_generations=0,
                 report_to=[], save_strategy="no", stop_token_id=STOP if lengths == "mixed" else None,
                 use_cpu=True, bf16=False, gradient_checkpointing=False, temperature=1.0)
PPOTrainer(args, tok, policy, None, scalar(), data, scalar(), eval_dataset=data, callbacks=[Turns()]).train()
