"""What of DVPO's lead is the pretraining of the value, what its freezing? Toy, all runs at one KL target.

    python data/toy.py && python experiments/critic.py      five seeds: about 40 minutes
    python experiments/critic.py --report                   only the tables, from runs that are there

PPO's critic starts from the reward model, or from the GVM behind its tau; that one is trained on, or frozen.
DVPO drops the reward model, too. `authors` is the advantage of the paper's released code.
Writes out/seeds/SEED/..., results/critic.json and results/critic.md.
"""
import os
import sys

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from experiments.seeds import prepare
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

TARGET = "--kl-target", 1.2, "--kl-coef", 0.2
RUNS = {                                                # name: script, flags, title
    "dvpo_at_1.2": ("dvpo.py", (), "DVPO"),
    "ppo_at_1.2": ("ppo_baseline.py", (), "PPO, critic from the reward model"),
    "ppo_gvm": ("ppo_baseline.py", ("--critic-from", "gvm"), "PPO, critic from the GVM, trained on"),
    "ppo_gvm_frozen": ("ppo_baseline.py", ("--critic-from", "gvm", "--freeze-critic"),
                       "PPO, critic from the GVM, frozen"),
    "authors": ("dvpo.py", ("--advantage", "authors"), "DVPO `--advantage authors`"),
}


def chain(seed):
    prepare(seed)
    root = f"out/seeds/{seed}"
    init = "--seed", seed, "--init-from", f"{root}/sft/model"
    pairs = "--pairs", "data/toy/pairs.jsonl", f"{root}/labelled_pairs.jsonl"
    stage("train_gvm.py", f"{root}/gvm", *init, "--data", "data/toy/gvm.jsonl", f"{root}/labelled.jsonl")
    for name, (script, flags, _) in RUNS.items():
        value = "--gvm", f"{root}/gvm/model"
        if script == "ppo_baseline.py":
            value = *value, "--rm", f"{root}/rm/model", *pairs
        stage(script, f"{root}/{name}", *init, *value, *TARGET, *flags)


def report(seeds):
    last = list(RUNS)[-1]
    seeds = [seed for seed in seeds if os.path.exists(f"out/seeds/{seed}/{last}/done")]
    found = {name: [final(f"out/seeds/{seed}/{name}") for seed in seeds] for name in RUNS}
    cells, best = [], found["dvpo_at_1.2"]
    for name, runs in found.items():
        behind = [run["final"] - dvpo["final"] for run, dvpo in zip(runs, best, strict=True)]
        cells.append([RUNS[name][2], interval([run["final"] for run in runs], 3),
                      interval([run["heldout"] for run in runs], 3),
                      interval([run["kl"] for run in runs]),
                      interval(behind, 3, "+") if name != "dvpo_at_1.2" else "",
                      interval([run["seconds"] / run["steps"] for run in runs])])
    names = ["", "last tenth", "fresh answers", "KL", "last tenth minus DVPO's", "seconds per step"]
    lines = ["# Where the value comes from", "",
             "Command: `python data/toy.py && python experiments/critic.py"
             f" --seeds {' '.join(map(str, seeds))}`. Commit {commit()}. Machine: "
             f"{machine('one thread a run', 'two programs at a time')}.", "",
             f"Gold reward on the toy, {len(seeds)} seeds, every run with `--kl-target 1.2 --kl-coef 0.2`; "
             "mean and 95 % interval.", "", *table(names, cells)]
    starts = {name: float(np.mean([run["first"] for run in runs])) for name, runs in found.items()}
    write_results("critic", dict(commit=commit(), seeds=seeds, runs=found, first=starts), lines)


def main(argv=None):
    args = seeds_parser(__doc__).parse_args(argv)
    if not args.report:
        two_at_a_time(chain, args.seeds)
    report(args.seeds)


if __name__ == "__main__":
    main()
