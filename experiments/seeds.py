"""Several seeds of the whole chain on the toy: SFT -> GVM -> DVPO, and reward model -> PPO.

    python data/toy.py && python experiments/seeds.py       five seeds, and tuning on another: 80 minutes
    python experiments/seeds.py --report                    only the tables, from runs that are there

Two processes at a time, one thread each. RL runs go half as long again as the default, to see whether the
reward falls. The GVM serves twice: with its tau, and without one (--tau-pairs 0). Either also runs with a
larger KL coefficient.
Writes out/seeds/SEED/..., results/toy.json and results/toy.md.
"""
import itertools
import json
import os
import subprocess
import sys

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

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

STEPS = 150
LRS, KL_COEFS = (1e-4, 3e-4), (0.02, 0.05, 0.1)
DVPO = {                                                # as it is, and held nearer to the SFT model
    "dvpo": (),
    "dvpo_kl0.15": ("--kl-coef", 0.15),
    "dvpo_no_tau": ("--tau-pairs", 0),
    "dvpo_no_tau_kl0.2": ("--tau-pairs", 0, "--kl-coef", 0.2),
}
RUNS = (*DVPO, "ppo")
TUNING = 1                                              # the seed that settings were chosen on


def read(path):
    with open(path) as f:
        return json.load(f)


def rows_of(path):
    with open(path) as f:
        return [json.loads(line) for line in f]


def label(root, seed):
    """The SFT model's own samples, labelled: rows for the GVM and, as pairs, for the reward model."""
    command = [sys.executable, "tools/label.py", "--policy", f"{root}/sft/model", "--seed", str(seed)]
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    subprocess.run([*command, "--to", f"{root}/labelled.jsonl"], check=True, env=environment,
                   stderr=subprocess.DEVNULL)


def prepare(seed):
    """SFT, and its own samples, labelled."""
    root = f"out/seeds/{seed}"
    stage("sft.py", f"{root}/sft", "--seed", seed)
    if not os.path.exists(f"{root}/labelled_pairs.jsonl"):
        label(root, seed)


def chain(seed):
    prepare(seed)
    root = f"out/seeds/{seed}"
    init = "--seed", seed, "--init-from", f"{root}/sft/model"
    gvm = "--gvm", f"{root}/gvm/model"
    stage("train_gvm.py", f"{root}/gvm", *init, "--data", "data/toy/gvm.jsonl", f"{root}/labelled.jsonl")
    stage("train_gvm.py", f"{root}/gvm_no_tau", *init, *gvm, "--eval-only", "--tau-pairs", 0,
          "--data", "data/toy/gvm_heldout.jsonl")
    for name, flags in DVPO.items():
        stage("dvpo.py", f"{root}/{name}", *init, *gvm, "--max-steps", STEPS, *flags)
    stage("ppo_baseline.py", f"{root}/ppo", *init, "--rm", f"{root}/rm/model", "--max-steps", STEPS,
          "--pairs", "data/toy/pairs.jsonl", f"{root}/labelled_pairs.jsonl")


def tuning(job):
    (script, lr, kl_coef), root = job, f"out/seeds/{TUNING}"
    own = ("--gvm", f"{root}/gvm/model") if script == "dvpo.py" else ("--rm", f"{root}/rm/model")
    stage(script, tuning_folder(*job), "--seed", TUNING, "--init-from", f"{root}/sft/model", *own,
          "--lr", lr, "--kl-coef", kl_coef, "--max-steps", STEPS)


def tuning_folder(script, lr, kl_coef):
    return f"out/seeds/tune/{script[:-3]}_{lr:g}_{kl_coef:g}"


def reach(seed, share, window=5):
    """{run: (steps, seconds)} until the gold reward, a mean over `window` steps, has made `share` of the way
    to where PPO ends (its last tenth); None: never."""
    runs = {name: rows_of(f"out/seeds/{seed}/{name}/metrics.jsonl") for name in RUNS}
    gold = {name: np.array([row["gold"] for row in rows]) for name, rows in runs.items()}
    begin, end = (gold["dvpo"][0] + gold["ppo"][0]) / 2, gold["ppo"][-(len(gold["ppo"]) // 10):].mean()
    found = {}
    for name, values in gold.items():
        smooth = np.convolve(values, np.ones(window) / window, "valid")
        there = np.nonzero(smooth >= begin + share * (end - begin))[0]
        last = int(there[0]) + window - 1 if len(there) else None
        found[name] = None if last is None else (last + 1, runs[name][last]["seconds"])
    return found


def measure(seed):
    """What the runs of one seed came to; seconds are those of training alone."""
    root = f"out/seeds/{seed}"
    found = dict(seed=seed, sft=read(f"{root}/sft/summary.json"), gvm=read(f"{root}/gvm/eval.json"))
    found |= {name: final(f"{root}/{name}") for name in RUNS}
    found["gvm_no_tau"] = read(f"{root}/gvm_no_tau/eval.json")
    found["rm_accuracy"] = read(f"{root}/rm/model/adapter.json")["accuracy"]
    stages = "sft", "gvm", "rm", "dvpo", "ppo"
    found["seconds"] = {name: rows_of(f"{root}/{name}/metrics.jsonl")[-1]["seconds"] for name in stages}
    return found


def report(seeds):
    command = "python data/toy.py && python experiments/seeds.py"
    seeds = [measure(seed) for seed in seeds if os.path.exists(f"out/seeds/{seed}/ppo/done")]
    keys = "final", "best", "fall", "heldout", "kl"
    mean = {f"{run}_{key}": float(np.mean([s[run][key] for s in seeds])) for run in RUNS for key in keys}
    mean["sft"] = float(np.mean([s["sft"]["gold"] for s in seeds]))
    about = machine("one thread a run", "two runs at a time")
    data = dict(commit=commit(), machine=about, command=command, seeds=seeds, mean=mean)
    lines = ["# The toy, several seeds", ""]
    lines += [f"Command: `{command}`. Commit {data['commit']}. Machine: {about}.", ""]
    lines += ["final: mean over the last tenth of the steps; best: highest mean over such a window; fall: "
              "from the best to the lowest in the last third; fresh: answers sampled afterwards; KL: nats "
              "per response to the SFT model."]
    for run in RUNS:
        cells = []
        for s in seeds:
            cells.append([s["seed"], f"{s['sft']['gold']:.3f}", *(f"{s[run][key]:.3f}" for key in keys)])
        cells.append(["mean", f"{mean['sft']:.3f}", *(f"{mean[f'{run}_{key}']:.3f}" for key in keys)])
        lines += ["", f"## {run}", "", *table(["seed", "SFT", "final", "best", "fall", "fresh", "KL"], cells)]

    cells = []
    for name, label_ in ("gvm", ""), ("gvm_no_tau", ", no tau"):
        for s in seeds:
            g = s[name]
            accuracy = [f"{g['accuracy'][key]:.3f}" for key in ("mean", "P1", "P99", "last")]
            truth = [f"{g['true_q'][key]:.3f}" for key in ("correlation", "rmse")]
            cells.append([f"{s['seed']}{label_}", g["pairs"], *accuracy, *truth, g["v0_ranks_all_policies"],
                          f"{g['v0_correlation']:.3f}", f"{s['rm_accuracy']:.3f}"])
    names = ["seed", "pairs", "mean", "P1", "P99", "last", "correlation with true Q", "rms error",
             "V(s_0) ranks all policies", "its correlation", "RM accuracy"]
    lines += ["", "## The global value model on held-out rows", "", *table(names, cells)]

    cells = [[s["seed"], *(f"{seconds:.0f}" for seconds in s["seconds"].values())] for s in seeds]
    lines += ["", "## Seconds of training", "", *table(["seed", *seeds[0]["seconds"]], cells)]

    cells, data["tuning"] = [], []
    for script, lr, kl_coef in itertools.product(("dvpo.py", "ppo_baseline.py"), LRS, KL_COEFS):
        if os.path.exists(f"{tuning_folder(script, lr, kl_coef)}/done"):
            found = final(tuning_folder(script, lr, kl_coef))
            cell = dict(stage=script[:-3], lr=lr, kl_coef=kl_coef, **found)
            data["tuning"].append(cell)
            values = [f"{cell[key]:.3f}" for key in ("final", "best", "heldout", "kl")]
            cells.append([cell["stage"], f"{lr:g}", kl_coef, *values])
    names = ["stage", "lr", "kl_coef", "final", "best", "fresh", "KL"]
    if cells:
        lines += ["", f"## Tuning, seed {TUNING}, the same grid for both", "", *table(names, cells)]

    cells = []
    data["reach"] = {str(share): [reach(s["seed"], share) for s in seeds] for share in (0.8, 0.9, 1.0)}
    for share, found in data["reach"].items():
        for run in DVPO:
            both = [x for x in found if x[run] and x["ppo"]]
            ratios = [interval([x[run][i] / x["ppo"][i] for x in both]) for i in (0, 1)]
            steps = [", ".join(str(x[r][0]) if x[r] else "never" for x in found) for r in (run, "ppo")]
            cells.append([f"{float(share):.0%}", run, *steps, *ratios])
    names = ["share", "run", "its steps, by seed", "PPO's steps", "ratio of steps", "ratio of seconds"]
    lines += ["", "## Steps and seconds to PPO's reward", "",
              "Until the gold reward (mean over five steps) has made so much of the way from where both "
              "begin to where PPO ends. Ratio: to PPO, mean and 95 % interval (Student's t) over the seeds "
              "that got there.", "", *table(names, cells)]
    write_results("toy", data, lines)


def main(argv=None):
    args = seeds_parser(__doc__).parse_args(argv)
    if not args.report:
        grid = itertools.product(("dvpo.py", "ppo_baseline.py"), LRS, KL_COEFS)
        two_at_a_time(chain, dict.fromkeys([*args.seeds, TUNING]))
        two_at_a_time(tuning, grid)
    report(args.seeds)


if __name__ == "__main__":
    main()
