"""What does the GVM's head have to see? The head on h_t alone (--plain-head) against the default.

    python data/toy.py && python experiments/seeds.py && python experiments/head.py        40 minutes more

SFT models, labelled rows, seeds and flags are those of experiments/seeds.py, whose runs are the default.
The second table says where the values err: what single words do to Q in fresh answers of the expert.
Writes out/seeds/SEED/plain_head/..., results/head.json and .md.
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np

from experiments.exact import BLUNDERS, changes
from experiments.seeds import DVPO, STEPS, read
from experiments.shared import (
    commit,
    final,
    interval,
    machine,
    seeds_parser,
    stage,
    table,
    two_at_a_time,
    write_results,
)

HEADS = {"h_t": "plain_head/", "[h_t, h_{t-1} * e(a_t)]": ""}       # what a head reads, and its folder
RUNS = {name: DVPO[name] for name in ("dvpo", "dvpo_no_tau")}


def runs(seed):
    root = f"out/seeds/{seed}"
    out, init = f"{root}/plain_head", ("--seed", seed, "--init-from", f"{root}/sft/model")
    data = "--data", "data/toy/gvm.jsonl", f"{root}/labelled.jsonl"
    stage("train_gvm.py", f"{out}/gvm", *init, *data, "--plain-head")
    for name, flags in RUNS.items():
        stage("dvpo.py", f"{out}/{name}", *init, "--gvm", f"{out}/gvm/model", "--max-steps", STEPS, *flags)


def measure(seeds, folder):
    found = {name: [final(f"out/seeds/{seed}/{folder}{name}") for seed in seeds] for name in RUNS}
    found["gvm"] = [read(f"out/seeds/{seed}/{folder}gvm/eval.json") for seed in seeds]
    for name, pairs in ("with tau", 2), ("without", 0):
        found[f"blunders {name}"] = [changes(seed, pairs, f"{folder}gvm") for seed in seeds]
    return found


def report(seeds):
    about = dict(command="python experiments/head.py", commit=commit(), machine=machine("one thread a run"))
    data = dict(about, seeds=seeds, heads={head: measure(seeds, folder) for head, folder in HEADS.items()})
    lines = ["# What the GVM's head sees", "",
             f"Command: `{about['command']}`. Commit {about['commit']}. Machine: {about['machine']}. Seeds "
             f"{', '.join(map(str, seeds))}; mean and 95 % interval (Student's t).", ""]
    cells = []
    for head, found in data["heads"].items():
        correlation = interval([gvm["true_q"]["correlation"] for gvm in found["gvm"]], 3)
        for name in RUNS:
            values = [interval([run[key] for run in found[name]], 3) for key in ("final", "heldout", "kl")]
            cells.append([head, name, correlation, *values])
    names = ["head reads", "run", "GVM's correlation with true Q", "last tenth", "fresh", "KL"]
    lines += [*table(names, cells), "", "## What a blunder does to Q", "",
              "Mean over seeds of the change of Q at that word, in 4,000 fresh answers of the expert.", ""]
    cells = []
    for kind in BLUNDERS:
        means = []
        for found in data["heads"].values():
            for name in "with tau", "without":
                means.append(np.mean([seed[kind] for seed in found[f"blunders {name}"]], 0))
        times, _, exact = means[0]
        cells.append([kind, f"{times:.0f}", f"{exact:+.2f}", *(f"{mean[1]:+.2f}" for mean in means)])
    names = ["word", "times per seed", "exact"]
    names += [f"{head}, {name}" for head in HEADS for name in ("expert's tau", "no tau")]
    write_results("head", data, lines + table(names, cells))


def main():
    args = seeds_parser(__doc__).parse_args()
    if not args.report:
        two_at_a_time(runs, args.seeds)
    report(args.seeds)


if __name__ == "__main__":
    main()
