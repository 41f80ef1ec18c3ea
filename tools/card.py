"""All that a CUDA machine should say: `python tools/bench.py --card` -> results/bench_gpu.md.

About six minutes, no network. The tests try every part at a tiny shape on a CPU.
"""
import gc
import multiprocessing
import os
import shutil
import subprocess
import sys
import time

import torch

import common
from runtime import processes
from tools import bench

LIMIT = 330                                             # seconds; no part begins after them
FOLDER = "out/bench/toy"
STEPS = 12
RL = f"--batch-size 32 --mini-batch-size 16 --max-steps {STEPS} --save-every {STEPS // 2}"
DVPO = f"dvpo.py {RL} --gvm {FOLDER}/gvm/model"
WITH_RM = f"{RL} --rm {FOLDER}/rm/model"
PPO = f"ppo_baseline.py {WITH_RM}"
PAIRS = "--pairs data/toy/pairs.jsonl"
RM = f"ppo_baseline.py {PAIRS} --rm-max-steps 20 --rm-only"
# Every stage on the toy. The runs of FIRST are side by side on the card, then those of THEN
FIRST = {
    "sft_z1": "sft.py --zero 1 --max-steps 36",
    "gvm": "train_gvm.py --max-steps 36",
    "gvm_z1": "train_gvm.py --max-steps 36 --zero 1",
    "gvm_z3": "train_gvm.py --max-steps 36 --zero 3",
    "rm": f"{RM} --rm {FOLDER}/rm/model",
    "rm_z1": f"{RM} --rm {FOLDER}/rm_z1/model --zero 1",
}
THEN = {
    "dvpo": DVPO,
    "dvpo_z1": f"{DVPO} --zero 1",
    "dvpo_z3": f"{DVPO} --zero 3",
    "offload": f"{DVPO} --zero 1 --offload",
    "lora": f"{DVPO} --lora",
    "lora_z3": f"{DVPO} --lora --zero 3",
    "no_static": f"{DVPO} --no-static-cache",
    "checkpointing": f"{DVPO} --gradient-checkpointing",
    "ppo": PPO,
    "ppo_z1": f"{PPO} --zero 1",
    "ppo_z3": f"{PPO} --zero 3",
    "ppo_no_static": f"{PPO} --no-static-cache",
    "grpo": f"comparators/critic_free.py {WITH_RM}",
    "remax": f"comparators/critic_free.py --method remax {WITH_RM}",
}
RESUMED = "dvpo", "dvpo_z1", "lora", "ppo_z1"


def start(name, command):
    """One run of the toy in a process of its own."""
    script, *flags = command.split()
    words = ["--model", "tiny", "--init-from", "data/toy/model", "--out", f"{FOLDER}/{name}"]
    with open(f"{FOLDER}/{name}.log", "w") as log:
        argv = [sys.executable, script, *words, *flags]
        own = {key: x for key, x in os.environ.items() if key not in processes.LAUNCHER_VARIABLES}
        return subprocess.Popen(argv, stdout=log, stderr=log, env=own)


def metrics(name):
    """The rows that a run wrote, but for times and memory, which no two runs share."""
    rows = bench.read_lines(f"{FOLDER}/{name}/metrics.jsonl")
    return [{key: value for key, value in row.items() if not key.startswith(("sec", "peak"))}
            for row in rows]


def toy():
    """What each run did, and whether those that resume half-way come out bit for bit."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    os.makedirs(FOLDER)
    if not os.path.exists("data/toy/pairs.jsonl"):
        subprocess.run([sys.executable, "data/toy.py"], check=True)
    found = {}
    for commands in FIRST, THEN:
        running = {name: start(name, command) for name, command in commands.items()}
        for name, process in running.items():
            ended = process.wait() == 0
            rows = metrics(name) if ended else []
            off = [abs(row["ratio_first"] - 1) for row in rows if "ratio_first" in row]
            found[name] = dict(ended=ended, steps=len(rows), ratio_off=max(off, default=None))
    again = {}
    for name in [name for name in RESUMED if found[name]["ended"]]:
        copy = f"{FOLDER}/{name}_again"
        shutil.copytree(f"{FOLDER}/{name}", copy)
        shutil.rmtree(f"{copy}/checkpoint/step_{STEPS}")
        again[name] = start(f"{name}_again", f"{THEN[name]} --resume")
    for name, process in again.items():
        resumed = process.wait() == 0 and metrics(name) == metrics(f"{name}_again")
        found[name]["resumed"] = resumed
    rows = [[name, *run.values()] for name, run in found.items()]
    return found, bench.table(["", "ended", "steps", "first ratio off by", "resumed"], rows)


def rollouts(args, bandwidth):
    runs = [bench.decode(args, rows, min(args.new, 128)) for rows in (8, 64)]
    return runs, bench.report_decode(runs, bandwidth)


def longest(run):
    """A table of what takes longest in one call of `run`: kernels, or operations of a CPU."""
    run()
    with torch.profiler.profile() as seen:
        run()
        bench.synchronize()
    key = "self_device_time_total" if bench.CUDA else "self_cpu_time_total"
    return seen.key_averages().table(sort_by=key, row_limit=10, max_name_column_width=70)


def kernels(args):
    """Of a token behind half of the answer, and of a forward and backward pass of two rows."""
    model = common.load_model(f"{bench.make(args.shape)}/model").eval()
    ids = torch.randint(0, 2048, (args.batch_size, args.prompt), device=bench.DEVICE)
    with torch.no_grad():
        decoder = common.Decoder(model, ids, torch.ones_like(ids))
        decode = common.static_decoder(decoder, args.new)
        for _ in range(args.new // 2):
            decode(ids[:, 0])
        of_token = longest(lambda: decode(ids[:, 0]))
    ids = torch.randint(0, 2048, (2, args.prompt + args.new), device=bench.DEVICE)
    model.requires_grad_(True).train()
    of_pass = longest(lambda: model(ids, torch.ones_like(ids), args.new).sum().backward())
    found = {f"a token of {args.batch_size} rows": of_token, "a training pass of 2": of_pass}
    return found, [f"Longest in {what}:\n\n```\n{rows}\n```\n" for what, rows in found.items()]


def steps(args, begin):
    """Each method alone: together they would not fit. One may not even fit alone, or be too late."""
    measured = {}
    refused = []
    for method in args.methods:
        if time.perf_counter() - begin > LIMIT:
            refused.append(f"No time was left for: {method}.")
            continue
        gc.collect()
        torch.cuda.empty_cache()
        try:
            measured[method] = bench.steps_of(args, method)
        except SystemExit as error:
            refused.append(str(error))
    return measured, [*bench.report_steps(measured), "", *refused]


def measure(args, part):
    """Puts all that it finds into `part` -> the lines of the report."""
    begin = time.perf_counter()
    spawn = multiprocessing.get_context("spawn")
    making = spawn.Process(target=bench.make, args=[args.shape])        # beside the toy
    making.start()
    part["toy"], lines = toy()
    lines.insert(0, "### The toy\n")
    making.join()
    rest = dict(rollouts=lambda: rollouts(args, part["bandwidth"]),
                kernels=lambda: kernels(args), steps=lambda: steps(args, begin))
    for name, find in rest.items():
        seconds = time.perf_counter() - begin
        print(f"{seconds:.0f} s: {name}", flush=True)
        more = [f"No time was left for: {name}."]
        if seconds < LIMIT:
            part[name], more = find()
        lines += [f"\n### {name.capitalize()}\n", *more]
    return lines
