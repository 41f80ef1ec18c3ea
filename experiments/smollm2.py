"""SmolLM2: DVPO beside PPO, GRPO and DPO at one KL target, on held-out topics -> results/smollm2.md, .json.

    make smollm2                                the model, its answers, GVM and reward model, DVPO and PPO
    python experiments/smollm2.py --runs all    the rest of the table; runs that are done are left alone
    python experiments/smollm2.py               the page, of what has run

Every run starts from the same model and trains on the same prompts. The reward that they are measured by,
VADER's sentiment, is never trained on: DVPO sees it through the GVM, PPO and GRPO through the reward model,
DPO through pairs.
"""
import argparse
import os
import re
import subprocess
import sys

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from experiments.shared import (
    commit,
    interval,
    machine,
    reach,
    read_json,
    read_lines,
    table,
    two_at_a_time,
    write_results,
)

OUT = "out/smollm2"
PAIRS = f"--pairs {OUT}/personas_pairs.jsonl {OUT}/own_pairs.jsonl"

# name: title, command, seeds
RUNS = {
    "dvpo": ("DVPO", "dvpo.py", [1, 2, 3]),
    "ppo": ("PPO", f"ppo_baseline.py {PAIRS}", [1, 2, 3]),
    "ppo_gvm_frozen": ("PPO, the frozen GVM its critic",
                       f"ppo_baseline.py {PAIRS} --critic-from gvm --freeze-critic", [1]),
    "dvpo_no_tau": ("DVPO, no tau", "dvpo.py --tau-pairs 0", [1]),
    "dvpo_lora": ("DVPO `--lora`", "dvpo.py --lora --lr 1e-4", [1]),
    "grpo": ("GRPO", f"comparators/critic_free.py --method dr_grpo --rm {OUT}/rm/model --group-size 4 "
             "--kl-target 6 --kl-coef 0.2", [1]),
    "dpo": ("DPO", f"comparators/dpo.py {PAIRS} --pairs-heldout {OUT}/heldout_pairs.jsonl "
            "--max-steps 60", [1]),
    "dvpo_from_0.05": ("DVPO, kl_coef from 0.05", "dvpo.py --kl-coef 0.05", [1]),
    "dvpo_from_0.5": ("DVPO, kl_coef from 0.5", "dvpo.py --kl-coef 0.5", [1]),
}
SUMMARY = "dvpo", "ppo", "dvpo_lora", "grpo", "dpo"

# GVMs, trained by train_gvm.py with these flags
GVMS = {
    "gvm": "GVM, lr 1e-3, rank 16", "gvm_1e-4": "GVM, lr 1e-4, rank 8",
    "gvm_paper": "GVM, lr 2e-6, rank 8: the paper's",
}


def folder(name, seed):
    """Where a run writes; seed 1 of DVPO and PPO are those of `make smollm2`."""
    return f"{OUT}/{name}" + (f"_{seed}" if seed > 1 else "")


def train(job):
    """Run one row of RUNS with one seed, or continue it where it was interrupted."""
    name, seed, dtype = job
    out = folder(name, seed)
    if os.path.exists(f"{out}/summary.json"):
        return
    _, command, _ = RUNS[name]
    script, *flags = command.split()
    about = ["--model", "smollm2", "--dtype", dtype, "--seed", str(seed), "--out", out, "--resume"]
    os.makedirs(out, exist_ok=True)
    print(f"{name}, seed {seed}: {out}/log", flush=True)
    with open(f"{out}/log", "a") as log:
        subprocess.run([sys.executable, script, *about, *flags], stdout=log, stderr=log, check=True)


def distinct(samples):
    """Distinct words of all answers by the number of words, in answers to the same number of prompts."""
    said = [word for row in samples for word in re.findall(r"[a-z']+", row["response"].lower())]
    return len(set(said)) / max(1, len(said))


def measure(name, seed):
    """One run -> its numbers: means over the last tenth of the steps, and over the held-out answers."""
    out = folder(name, seed)
    rows = read_lines(f"{out}/metrics.jsonl")
    summary = read_json(f"{out}/summary.json")
    samples = read_lines(f"{out}/samples.jsonl")
    # The lower quartile: other programs ran beside some of the steps
    step_seconds = float(np.percentile(np.diff([row["seconds"] for row in rows]), 25))
    found = dict(run=name, seed=seed, steps=len(rows), step_seconds=step_seconds, seconds=rows[-1]["seconds"],
                 heldout={key: summary[key] for key in ("gold", "kl", "ended", "length")},
                 distinct=distinct(samples), peak_mb=max(row["peak_bytes"] for row in rows) / 2**20,
                 samples=samples[:8])
    if "gold" in rows[0]:
        last = rows[-max(1, len(rows) // 10):]
        found["late"] = {key: float(np.mean([row[key] for row in last])) for key in ("gold", "kl", "ended")}
        kept = {"gold", "kl", "ended", "kl_coef", "seconds"} & set(rows[0])
        found["curve"] = {key: [round(row[key], 4) for row in rows] for key in sorted(kept)}
    return found


def about_gvm(name):
    """Updates, sigma of the values in the last one, and what the GVM tells of held-out rows."""
    measured = read_json(f"{OUT}/{name}/eval.json")
    rows = read_lines(f"{OUT}/{name}/metrics.jsonl")
    return dict(updates=len(rows), seconds=rows[-1]["seconds"], q_std=rows[-1]["q_std"],
                accuracy=measured["accuracy"], policies=measured["policies"], v0=measured["v0_correlation"])


def collect():
    """All that the page says, out of out/smollm2."""
    runs = [measure(name, seed) for name, (_, _, seeds) in RUNS.items() for seed in seeds
            if os.path.exists(f"{folder(name, seed)}/summary.json")]
    reference = read_lines(f"{OUT}/reference.jsonl")
    start = {key: float(np.mean([row[name] for row in reference]))
             for key, name in (("gold", "reward"), ("ended", "ended"))}
    start |= dict(length=float(np.mean([len(row["ids"]) for row in reference])), distinct=distinct(reference))
    answers = [dict(prompt=row["prompt"], response=row["response"]) for row in reference[:3]]
    value = dict(penalty=read_json(f"{OUT}/gvm/model/adapter.json")["missing_eos_penalty"],
                 gvms={name: about_gvm(name) for name in GVMS if os.path.exists(f"{OUT}/{name}/eval.json")},
                 rm=dict(seconds=read_lines(f"{OUT}/rm/metrics.jsonl")[-1]["seconds"],
                         accuracy=read_json(f"{OUT}/rm/model/adapter.json")["accuracy"]))
    return dict(reference=start, answers=answers, value=value, runs=runs)


def summary(data):
    """The README's table: means over the seeds, on held-out topics."""
    def less_penalty(gold, ended):
        """What both methods optimise: sentiment less the penalty of the answers that never end."""
        return f"{gold - data['value']['penalty'] * (1 - ended):.2f}"

    start = data["reference"]
    rows = [["SmolLM2 itself", f"{start['gold']:.2f}", f"{start['ended']:.2f}",
             less_penalty(start["gold"], start["ended"]), "0", f"{start['distinct']:.2f}", ""]]
    for name in SUMMARY:
        runs = [run for run in data["runs"] if run["run"] == name]
        if runs:
            gold, ended, kl = (np.mean([run["heldout"][key] for run in runs])
                               for key in ("gold", "ended", "kl"))
            seconds = np.mean([run["step_seconds"] for run in runs])
            rows.append([RUNS[name][0], f"{gold:.2f}", f"{ended:.2f}", less_penalty(gold, ended), f"{kl:.1f}",
                         f"{np.mean([run['distinct'] for run in runs]):.2f}", f"{seconds:.0f}"])
    return table(["held-out topics", "sentiment", "answers that end", "sentiment less penalty", "KL",
                  "distinct words", "seconds per step"], rows)


def heldout_table(data):
    """Every run with intervals over its seeds, and how soon it is at 80 % of PPO's gain."""
    by_run = {name: [run for run in data["runs"] if run["run"] == name] for name in RUNS}
    level = np.inf
    if by_run["ppo"]:
        first = np.mean([run["curve"]["gold"][0] for run in by_run["ppo"]])
        level = first + 0.8 * (np.mean([run["late"]["gold"] for run in by_run["ppo"]]) - first)
    rows = []
    for name, runs in by_run.items():
        if not runs:
            continue
        cells = [RUNS[name][0], len(runs)]
        for key, digits in ("gold", 3), ("kl", 2), ("ended", 2), ("length", 1):
            cells.append(interval([run["heldout"][key] for run in runs], digits))
        cells.append(interval([run["distinct"] for run in runs]))
        cells.append(interval([run["step_seconds"] for run in runs], 1))
        steps = [(reach(run["curve"]["gold"], level), run) for run in runs if "curve" in run]
        steps = [(n, n * run["step_seconds"]) for n, run in steps if n]
        rows.append(cells + ([interval(x, 0) for x in zip(*steps, strict=True)] or ["", ""]))
    return table(["run", "seeds", "sentiment", "KL", "ended", "tokens", "distinct words", "seconds per step",
                  "steps to 80 % of PPO's gain", "seconds to there"], rows)


def value_table(data):
    rows = []
    for name, gvm in data["value"]["gvms"].items():
        accuracy = [f"{gvm['accuracy'][key]:.3f}" for key in ("mean", "last")]
        # Other programs ran beside all but the first
        minutes = f"{gvm['seconds'] / 60:.0f}" if name == "gvm" else ""
        rows.append([GVMS[name], gvm["updates"], minutes, f"{gvm['q_std']:.3f}", *accuracy,
                     f"{gvm['v0']:.3f}"])
    rm = data["value"]["rm"]
    rows.append(["reward model", "", f"{rm['seconds'] / 60:.0f}", "", "", f"{rm['accuracy']:.3f}", ""])
    return table(["model", "updates", "minutes", "sigma of Q", "pairs, mean token value",
                  "pairs, last token", "correlation of V(s_0 given tau) with mean rewards"], rows)


def late_table(data):
    rows = []
    for run in data["runs"]:
        if "late" in run:
            late = run["late"]
            coef = run["curve"].get("kl_coef", [np.nan])[-1]
            rows.append([RUNS[run["run"]][0], run["seed"], f"{late['gold']:.3f}", f"{late['kl']:.2f}",
                         f"{late['ended']:.2f}", f"{coef:.3f}"])
    return table(["run", "seed", "sentiment", "KL", "ended", "KL coefficient at the end"], rows)


def page(data):
    """results/smollm2.md, from what stands in its JSON."""
    lines = ["# SmolLM2-135M-Instruct", "",
             f"`make smollm2`, then `{data['command']}`. Commit {data['commit']}. "
             f"Machine: {data['machine']}. ± is the 95 % interval over seeds. Seconds per step: the lower "
             "quartile, since other programs ran beside some of the steps. ended: the share of answers that "
             "end within their 32 tokens.", "",
             "## Summary", "", *summary(data), "", "## Held-out topics", "", *heldout_table(data), "",
             "## What gives the value", "", *value_table(data), "",
             "## Last tenth of the steps", "", *late_table(data), "", "## Three held-out prompts", ""]
    for answer in data["answers"]:
        lines += [f"> {answer['prompt']}", "", f"* before: {answer['response']!r}"]
        for run in data["runs"]:
            if run["run"] in ("dvpo", "ppo") and run["seed"] == 1:
                said = [row["response"] for row in run["samples"] if row["prompt"] == answer["prompt"]]
                lines += [f"* {RUNS[run['run']][0]}: {text!r}" for text in said[:1]]
        lines.append("")
    return lines


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--runs", nargs="*", default=[], help=f"train these first: all, or {', '.join(RUNS)}")
    p.add_argument("--dtype", default="bf16", help="of the stages (default: bf16)")
    args = p.parse_args(argv)
    names = list(RUNS) if args.runs == ["all"] else args.runs
    two_at_a_time(train, [(name, seed, args.dtype) for name in names for seed in RUNS[name][2]])
    found = collect()
    names = " ".join(dict.fromkeys(run["run"] for run in found["runs"]))
    about = dict(command=f"python experiments/smollm2.py --runs {names}", commit=commit(),
                 machine=machine("one thread per run, two runs at a time", args.dtype))
    data = about | found
    write_results("smollm2", data, page(data))


if __name__ == "__main__":
    main()
