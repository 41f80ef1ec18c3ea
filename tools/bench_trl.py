"""TRL's PPO as one more method of tools/bench.py, in an environment of its own: nothing of this project is imported here.

    python3 -m venv ENV && ENV/bin/pip install torch==2.13.0 trl==1.0.0
    python tools/bench.py --trl ENV/bin/python --shape 14M --prompt 32 --new 64 --batch-size 16 --mini-batch-size 4 --grad-accum 1

trl.experimental.ppo.PPOTrainer of TRL 1.0.0, a release that still has one, with the same shape, rows, tokens, epochs and updates, random weights,
fp32: it takes turns with ours, step by step. Started by bench.py with: FOLDER WORLD ROUNDS PROMPT NEW ROWS MINI ACCUM EPOCHS.
"""
import json
import re
import sys
import time

import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from trl.experimental.ppo import PPOConfig, PPOTrainer

folder, world = sys.argv[1:3]
rounds, prompt, new, rows, mini, accum, epochs = map(int, sys.argv[3:])


class Turns(TrainerCallback):
    """After each step: a row, then wait."""
    begin, done = time.perf_counter(), 0

    def on_step_end(self, args, state, control, **_):
        with open("/proc/self/status") as f:
            peak = int(re.search(r"VmHWM:\s*(\d+) kB", f.read())[1]) * 1024
        with open(f"{folder}/trl.jsonl", "a") as f:
            f.write(json.dumps(dict(sec_step=time.perf_counter() - self.begin, peak_bytes=peak, peak_reserved=peak, tokens=rows * new)) + "\n")
        self.done += 1
        while int("0" + open(f"{folder}/trl.turn").read()) <= self.done:
            time.sleep(0.002)
        self.begin = time.perf_counter()


tok = AutoTokenizer.from_pretrained(f"{world}/model", padding_side="left")
tok.pad_token = "w0"
config = AutoConfig.from_pretrained(f"{world}/model", pad_token_id=0, num_labels=1)
policy = AutoModelForCausalLM.from_pretrained(f"{world}/model")
scalar = lambda: AutoModelForSequenceClassification.from_config(config)
with open(f"{world}/prompts_{prompt}.jsonl") as f:
    data = Dataset.from_list([dict(input_ids=tok(json.loads(line)["prompt"])["input_ids"][-prompt:]) for line in f])
args = PPOConfig(output_dir=f"{folder}/trl", per_device_train_batch_size=mini, gradient_accumulation_steps=rows // mini, num_mini_batches=rows // (mini * accum), num_ppo_epochs=epochs,
                 total_episodes=rows * (rounds + 1), response_length=new, local_rollout_forward_batch_size=rows, learning_rate=1e-6, num_sample_generations=0, report_to=[], save_strategy="no",
                 stop_token_id=None, use_cpu=True, bf16=False, gradient_checkpointing=False, temperature=1.0)
PPOTrainer(args, tok, policy, None, scalar(), data, scalar(), eval_dataset=data, callbacks=[Turns()]).train()
