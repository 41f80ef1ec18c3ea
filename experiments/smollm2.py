"""SmolLM2: DVPO beside PPO, GRPO and DPO at one KL target, on held-out topics -> results/smollm2.md, .json.

    make smollm2                                the model, its answers, GVM and reward model, DVPO and PPO
    python experiments/smollm2.py --runs all    the rest of the table; runs that are done are left alone
    python experiments/smollm2.py               the table of what has run

Every run starts from the same model and trains on the same prompts. The reward that they are measured by,
VADER's sentiment, is never trained on: DVPO sees it through the GVM, PPO and GRPO through the reward model,
DPO through pairs.
"""
import argparse
import json
import os
import re
import subprocess
import sys

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from experiments.shared import commit, interval, machine, table, two_at_a_time, write_results

OUT = "out/smollm2"
PAIRS = [f"{OUT}/personas_pairs.jsonl", f"{OUT}/own_pairs.jsonl"]
PPO_VALUE = ["--pairs", *PAIRS]

# name: script, its flags, its seeds
RUNS = {
    "dvpo": ("dvpo.py", [], [1, 2, 3]),
    "ppo": ("ppo_baseline.py", PPO_VALUE, [1, 2, 3]),
    "ppo_gvm_frozen": ("ppo_baseline.py", [*PPO_VALUE, "--critic-from", "gvm", "--freeze-critic"], [1]),
    "dvpo_no_tau": ("dvpo.py", ["--tau-pairs", "0"], [1]),
    "dvpo_lora": ("dvpo.py", ["--lora", "--lr", "1e-4"], [1]),
    "grpo": ("comparators/critic_free.py", ["--method", "dr_grpo", "--group-size", "4",
                                            "--kl-target", "6", "--kl-coef", "0.2"], [1]),
    "dpo": ("comparators/dpo.py", ["--max-steps", "60"], [1]),
    "dvpo_from_0.05": ("dvpo.py", ["--kl-coef", "0.05"], [1]),
    "dvpo_from_0.5": ("dvpo.py", ["--kl-coef", "0.5"], [1]),
}
TITLES = {
    "dvpo": "DVPO", "ppo": "PPO", "ppo_gvm_frozen": "PPO, the frozen GVM its critic",
    "dvpo_no_tau": "DVPO, no tau", "dvpo_lora": "DVPO `--lora`",
    "grpo": "GRPO", "dpo": "DPO", "dvpo_from_0.05": "DVPO, kl_coef from 0.05",
    "dvpo_from_0.5": "DVPO, kl_coef from 0.5",
}


GVMS = {                                                # trained by train_gvm.py with these flags
    "gvm": "GVM: lr 1e-3, rank 16", "gvm_paper": "--lr 2e-6 --lora-rank 8 (paper)",
    "gvm_1e-4": "--lr 1e-4 --lora-rank 8",
}
HEADLINE = "dvpo", "ppo", "dvpo_no_tau", "dvpo_lora", "grpo"           # rows of the README's table


def folder(name, seed):
    """Where a run writes; seed 1 of DVPO and PPO are those of `make smollm2`."""
    return f"{OUT}/{name}" + (f"_{seed}" if seed > 1 else "")


def read_lines(path):
    with open(path) as f:
        return [json.loads(line) for line in f]


def train(job):
    """Run one row of RUNS with one seed, or go on with it where it was interrupted."""
    name, seed, dtype = job
    script, flags, _ = RUNS[name]
    out = folder(name, seed)
    if os.path.exists(f"{out}/summary.json"):
        return
    command = [sys.executable, script, "--model", "smollm2", "--dtype", dtype, "--seed", str(seed),
               "--out", out, "--resume", *flags]
    if script == "comparators/critic_free.py":
        command += ["--rm", f"{OUT}/rm/model"]
    if script == "comparators/dpo.py":
        command += ["--pairs", *PAIRS, "--pairs-heldout", f"{OUT}/heldout_pairs.jsonl"]
    os.makedirs(out, exist_ok=True)
    print(f"{name}, seed {seed}: {out}/log", flush=True)
    with open(f"{out}/log", "a") as log:
        subprocess.run(command, stdout=log, stderr=log, check=True)


def words(text):
    return re.findall(r"[a-z']+", text.lower())


def distinct(samples):
    """Distinct words of all answers by the number of words, in answers to the same number of prompts."""
    said = [word for row in samples for word in words(row["response"])]
    return len(set(said)) / max(1, len(said))


def measure(name, seed):
    """One run -> its numbers: means over the last tenth of the steps, and over the held-out answers."""
    out = folder(name, seed)
    rows = read_lines(f"{out}/metrics.jsonl")
    with open(f"{out}/summary.json") as f:
        heldout = json.load(f)
    samples = read_lines(f"{out}/samples.jsonl")
    late = rows[-max(1, len(rows) // 10):]
    # The lower quartile: other programs ran beside some of the steps
    step_seconds = float(np.percentile(np.diff([row["seconds"] for row in rows]), 25))
    found = dict(run=name, seed=seed, steps=len(rows), step_seconds=step_seconds, seconds=rows[-1]["seconds"],
                 heldout={key: heldout[key] for key in ("gold", "kl", "ended", "length")},
                 distinct=distinct(samples), peak_mb=max(row["peak_bytes"] for row in rows) / 2**20,
                 samples=samples[:8])
    if "gold" in rows[0]:
        found["late"] = {key: float(np.mean([row[key] for row in late])) for key in ("gold", "kl", "ended")}
        kept = {"gold", "kl", "ended", "kl_coef", "seconds"} & set(rows[0])
        found["curve"] = {key: [round(row[key], 4) for row in rows] for key in sorted(kept)}
    return found


def reach(curve, level, window=5):
    """-> steps until the gold reward, a mean over `window` steps, is at this level; or None."""
    smooth = np.convolve(curve["gold"], np.ones(window) / window, "valid")
    at = np.nonzero(smooth >= level)[0]
    return int(at[0]) + window if len(at) else None


def penalised(gold, ended, data):
    """What both methods optimise: sentiment less the penalty of the answers that never end."""
    return gold - data["value"]["penalty"] * (1 - ended)


def headline(data):
    """The rows of the README's table, from results/smollm2.json: means over seeds, on held-out topics."""
    start = data["reference"]
    shown = [f"{start[key]:.2f}" for key in ("gold", "ended", "distinct")]
    whole = f"{penalised(start['gold'], start['ended'], data):.2f}"
    rows = [["SmolLM2 itself", shown[0], shown[1], whole, "0", shown[2], ""]]
    for name in HEADLINE:
        runs = [run for run in data["runs"] if run["run"] == name]
        if runs:
            means = [np.mean([run["heldout"][key] for run in runs]) for key in ("gold", "ended", "kl")]
            gold, ended, kl = means
            row = [TITLES[name], f"{gold:.2f}", f"{ended:.2f}"]
            row += [f"{penalised(gold, ended, data):.2f}", f"{kl:.1f}"]
            row.append(f"{np.mean([run['distinct'] for run in runs]):.2f}")
            row.append(f"{np.mean([run['step_seconds'] for run in runs]):.0f}")
            rows.append(row)
    return ["| " + " | ".join(row) + " |" for row in rows]


def gvm_about(name):
    """A GVM: updates, seconds, sigma of its values in the last one, and what it tells of held-out rows."""
    with open(f"{OUT}/{name}/eval.json") as f:
        found = json.load(f)
    rows = read_lines(f"{OUT}/{name}/metrics.jsonl")
    return dict(updates=len(rows), q_std=rows[-1]["q_std"], accuracy=found["accuracy"],
                policies=found["policies"], v0=found["v0_correlation"])


def value_seconds():
    """Seconds of training of the GVM and of the reward model, and how well they tell held-out pairs."""
    with open(f"{OUT}/rm/model/adapter.json") as f:
        rm = json.load(f)
    with open(f"{OUT}/gvm/model/adapter.json") as f:
        penalty = json.load(f)["missing_eos_penalty"]
    return dict(penalty=penalty, gvm_seconds=read_lines(f"{OUT}/gvm/metrics.jsonl")[-1]["seconds"],
                rm_seconds=read_lines(f"{OUT}/rm/metrics.jsonl")[-1]["seconds"],
                gvm=gvm_about("gvm"), rm_accuracy=rm["accuracy"],
                gvms={name: gvm_about(name) for name in GVMS if os.path.exists(f"{OUT}/{name}/eval.json")})


def report(dtype):
    found = [measure(name, seed) for name, (_, _, seeds) in RUNS.items() for seed in seeds
             if os.path.exists(f"{folder(name, seed)}/summary.json")]
    by_run = {name: [run for run in found if run["run"] == name] for name in RUNS}
    reference, value = read_lines(f"{OUT}/reference.jsonl"), value_seconds()
    start = dict(gold=float(np.mean([row["reward"] for row in reference])),
                 ended=float(np.mean([row["ended"] for row in reference])),
                 length=float(np.mean([len(row["ids"]) for row in reference])), distinct=distinct(reference))
    level = None
    if by_run["ppo"]:                                   # 80 % of what PPO gains
        first = np.mean([run["curve"]["gold"][0] for run in by_run["ppo"]])
        level = first + 0.8 * (np.mean([run["late"]["gold"] for run in by_run["ppo"]]) - first)
    cells = [["SmolLM2 itself", "", f"{start['gold']:.3f}", "0", f"{start['ended']:.2f}",
              f"{start['length']:.1f}", f"{start['distinct']:.2f}", "", "", ""]]
    for name, runs in by_run.items():
        if not runs:
            continue
        cell = [TITLES[name], len(runs)]
        for key, digits in ("gold", 3), ("kl", 2), ("ended", 2), ("length", 1):
            cell.append(interval([run["heldout"][key] for run in runs], digits))
        cell.append(interval([run["distinct"] for run in runs]))
        cell.append(interval([run["step_seconds"] for run in runs], 1))
        reached = [(reach(run["curve"], level), run) for run in runs if "curve" in run and level]
        steps = [(at, at * run["step_seconds"]) for at, run in reached if at]
        cell += [interval(x, 0) for x in zip(*steps, strict=True)] or ["", ""]
        cells.append(cell)
    names = ["", "seeds", "sentiment", "KL", "ended", "tokens", "distinct words", "seconds per step",
             "steps to 80 % of PPO's gain", "seconds to there"]
    lines = ["# SmolLM2-135M-Instruct", "",
             f"`python experiments/smollm2.py`, {machine('one thread per run, two runs at a time', dtype)}, "
             f"commit {commit()}. ± is the 95 % interval over seeds. Seconds per step: the lower quartile, "
             "since other programs ran beside some of the steps.", "", "## Held-out topics", "",
             *table(names, cells)]
    cells = []
    for name, title in GVMS.items():
        if name in value["gvms"]:
            gvm = value["gvms"][name]
            accuracy = [f"{gvm['accuracy'][key]:.3f}" for key in ("mean", "last")]
            seconds = f"{value['gvm_seconds']:.0f}" if name == "gvm" else ""
            spread = f"{gvm['q_std']:.3f}"
            cells.append([title, gvm["updates"], seconds, spread, *accuracy, f"{gvm['v0']:.3f}"])
    seconds = f"{value['rm_seconds']:.0f}"
    cells.append(["reward model", "", seconds, "", "", f"{value['rm_accuracy']:.3f}", ""])
    names = ["", "updates", "seconds", "sigma of Q", "pairs, mean token value", "pairs, last token",
             "correlation of V(s_0 | tau) with mean rewards"]
    lines += ["", "## What gives the value", "", *table(names, cells)]
    cells = []
    for run in found:
        if "late" in run:
            late = run["late"]
            coef = run["curve"].get("kl_coef")
            cells.append([TITLES[run["run"]], run["seed"], f"{late['gold']:.3f}", f"{late['kl']:.2f}",
                          f"{late['ended']:.2f}", f"{coef[-1]:.3f}" if coef else ""])
    lines += ["", "## Last tenth of the steps", "",
              *table(["", "seed", "sentiment", "KL", "ended", "KL coefficient at the end"], cells)]
    lines += ["", "## Three held-out prompts", ""]
    for i in range(3):
        lines += [f"> {reference[i]['prompt']}", "", f"* before: {reference[i]['response']!r}"]
        for name in "dvpo", "ppo":
            for run in by_run[name][:1]:
                said = [row for row in run["samples"] if row["prompt"] == reference[i]["prompt"]]
                lines += [f"* {TITLES[name]}: {said[0]['response']!r}"] if said else []
        lines.append("")
    write_results("smollm2", dict(reference=start, level=level, value=value, runs=found), lines)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--runs", nargs="*", default=[], help=f"train these first: all, or {', '.join(RUNS)}")
    p.add_argument("--dtype", default="bf16", help="of the stages (default: bf16)")
    args = p.parse_args(argv)
    names = list(RUNS) if args.runs == ["all"] else args.runs
    two_at_a_time(train, [(name, seed, args.dtype) for name in names for seed in RUNS[name][2]])
    report(args.dtype)


if __name__ == "__main__":
    main()
