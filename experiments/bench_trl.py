"""TRL's trainers as more methods of tools/bench.py, in an environment of their own.

    python3 -m venv ENV && ENV/bin/pip install torch==2.13.0 trl==1.0.0         PPO: the last release with it
    python tools/bench.py --trl ENV/bin/python --methods trl_ppo ppo dvpo --shape 14M --prompt 32 --new 64 \\
        --batch-size 16 --mini-batch-size 4 --grad-accum 1
    python3 -m venv ENV && ENV/bin/pip install torch==2.13.0 trl==1.16.0        GRPO and DPO
    python tools/bench.py --trl ENV/bin/python --methods trl_grpo grpo trl_dpo dpo ...

Same shape, rows, tokens, epochs and updates, random weights, fp32. It takes turns with ours, step by step.
Started by bench.py with: METHOD FOLDER WORLD LENGTHS ROUNDS PROMPT NEW ROWS MINI ACCUM EPOCHS. Nothing of
this project is imported here.
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

method, folder, world, lengths = sys.argv[1:5]
rounds, prompt, new, rows, mini, accum, epochs = map(int, sys.argv[5:])
COMMON = dict(output_dir=f"{folder}/{method}", learning_rate=1e-6, report_to=[], save_strategy="no",
              use_cpu=True, bf16=False, gradient_checkpointing=False)
STOP, turns, said = 1, itertools.count(), [0]


class Turns(TrainerCallback):
    """After each step, of so many optimizer steps: a row, then wait."""

    def __init__(self, updates):
        self.updates, self.done, self.begin = updates, 0, time.perf_counter()

    def on_step_end(self, args, state, control, **_):
        if state.global_step % self.updates:
            return
        with open("/proc/self/status") as f:
            peak = int(re.search(r"VmHWM:\s*(\d+) kB", f.read())[1]) * 1024
        row = dict(sec_step=time.perf_counter() - self.begin, peak_bytes=peak, peak_reserved=peak,
                   tokens=said[0] or rows * new)
        with open(f"{folder}/{method}.jsonl", "a") as f:
            f.write(json.dumps(row) + "\n")
        self.done += 1
        while True:
            with open(f"{folder}/{method}.turn") as f:
                if int("0" + f.read()) > self.done:
                    break
            time.sleep(0.1)
        self.begin = time.perf_counter()


def read(path):
    with open(path) as f:
        return [json.loads(line) for line in f]


def ppo(tok, policy):
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    generate = ppo_trainer.batch_generation

    def shorter(*args):
        """What was generated, with the stop token where bench.py's mixed() ends an answer."""
        answers, logits = generate(*args)
        drawn = np.random.default_rng(next(turns)).lognormal(math.log(new / 5), 1.09, rows)
        ends = torch.from_numpy(drawn.round().clip(1, new)).long()
        answers[torch.arange(rows), prompt + ends - 1] = STOP
        said[0] = int(ends.sum())
        return answers, logits

    if lengths == "mixed":
        ppo_trainer.batch_generation = shorter
    config = AutoConfig.from_pretrained(f"{world}/model", pad_token_id=0, num_labels=1)
    reward, value = (AutoModelForSequenceClassification.from_config(config) for _ in range(2))
    texts = read(f"{world}/prompts_{prompt}.jsonl")
    data = Dataset.from_list([dict(input_ids=tok(row["prompt"])["input_ids"][-prompt:]) for row in texts])
    args = PPOConfig(**COMMON, per_device_train_batch_size=mini, gradient_accumulation_steps=rows // mini,
                     num_mini_batches=rows // (mini * accum), num_ppo_epochs=epochs,
                     total_episodes=rows * (rounds + 1), response_length=new,
                     local_rollout_forward_batch_size=rows, num_sample_generations=0,
                     stop_token_id=STOP if lengths == "mixed" else None, temperature=1.0)
    return PPOTrainer(args, tok, policy, None, reward, data, value, eval_dataset=data, callbacks=[Turns(1)])


def grpo(tok, policy):
    from trl import GRPOConfig, GRPOTrainer

    config = AutoConfig.from_pretrained(f"{world}/model", pad_token_id=0, num_labels=1)
    reward = AutoModelForSequenceClassification.from_config(config)
    data = Dataset.from_list([dict(prompt=row["prompt"]) for row in read(f"{world}/prompts_{prompt}.jsonl")])
    updates = epochs * rows // (mini * accum)
    args = GRPOConfig(**COMMON, per_device_train_batch_size=mini, gradient_accumulation_steps=accum,
                      steps_per_generation=rows // mini, num_iterations=epochs, num_generations=4, beta=0.04,
                      max_completion_length=new, max_steps=updates * (rounds + 1), loss_type="grpo",
                      disable_dropout=True)
    return GRPOTrainer(policy, reward, args, data, processing_class=tok, reward_processing_classes=tok,
                       callbacks=[Turns(updates)])


def dpo(tok, policy):
    from trl import DPOConfig, DPOTrainer

    pairs = read(f"{world}/pairs_{prompt}_{new}.jsonl")     # TRL joins the texts without a space
    pairs = [dict(row, prompt=row["prompt"] + " ") for row in pairs]
    data = Dataset.from_list(pairs)
    args = DPOConfig(**COMMON, per_device_train_batch_size=mini // 2, max_steps=rounds + 1, beta=0.1,
                     gradient_accumulation_steps=rows // mini, max_length=prompt + new,
                     precompute_ref_log_probs=True)
    return DPOTrainer(policy, None, args, train_dataset=data, processing_class=tok, callbacks=[Turns(1)])


tokenizer = AutoTokenizer.from_pretrained(f"{world}/model", padding_side="left")
tokenizer.pad_token = "w0"
model = AutoModelForCausalLM.from_pretrained(f"{world}/model")
dict(trl_ppo=ppo, trl_grpo=grpo, trl_dpo=dpo)[method](tokenizer, model).train()
