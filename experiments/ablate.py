"""What each choice is worth on the review world: one setting changed at a time, several seeds.

    python data/toy.py && python experiments/seeds.py && python experiments/ablate.py    2.5 hours, 2 cores
    python experiments/ablate.py --report                only the tables, from runs that are there

Takes the SFT models and their labelled samples from experiments/seeds.py. All GVMs train for --gvm-steps
steps, fewer than the default. "moved" is the policy of kl_coef 0.02, which goes far from the SFT model;
"retrained" is a GVM that also trains on its labelled answers. Three GVMs are measured on other answers of it.
Writes out/ablate/SEED/..., results/ablations.json and results/ablations.md; only complete seeds count.
"""
import functools
import os
import sys

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from experiments import shared
from experiments.shared import interval, read_json, stage, table

BASE = "unchanged"
GVMS = {BASE: (), "td_lambda 0": ("--td-lambda", 0), "td_lambda 0.5": ("--td-lambda", 0.5),
        "td_lambda 0.9": ("--td-lambda", 0.9), "td_lambda 1": ("--td-lambda", 1),
        "batch norm": ("--batch-norm",), "tau 0": ("--tau-pairs", 0), "tau 1": ("--tau-pairs", 1),
        "tau 3": ("--tau-pairs", 3)}
FAR = "kl_coef 0.02"
RL = {"advantage q": ("--advantage", "q"), FAR: ("--kl-coef", 0.02), "kl_coef 0.05": ("--kl-coef", 0.05),
      "kl_coef 0.2": ("--kl-coef", 0.2)}
ON_FAR = {f"tau 0, {FAR}": "tau 0", f"retrained, {FAR}": "retrained"}     # that RL run on another GVM
MEASURED = BASE, "tau 0", "retrained"                   # on answers of the policy that moved


def folder(seed, kind, name):
    """kind: gvm, rl, or eval (a GVM measured on the policy that moved)."""
    return f"out/ablate/{seed}/{kind} {name}".replace(", ", "_").replace(" ", "_")


def gvm_of(name):
    """The GVM that an RL run of this name learns from."""
    return ON_FAR.get(name, name if name in GVMS else BASE)


def run_seed(args, seed):
    base, root = f"out/seeds/{seed}", f"out/ablate/{seed}"
    sft = "--seed", seed, "--init-from", f"{base}/sft/model"
    data = "--data", "data/toy/gvm.jsonl", f"{base}/labelled.jsonl"
    moved = "--policy", folder(seed, "rl", FAR) + "/model", "--name", "moved"

    def rl(name):
        flags = RL[FAR] if name in ON_FAR else RL.get(name, ())
        stage("dvpo.py", folder(seed, "rl", name), *sft, "--max-steps", args.steps, *flags,
              "--gvm", folder(seed, "gvm", gvm_of(name)) + "/model")

    for name, flags in GVMS.items():
        stage("train_gvm.py", folder(seed, "gvm", name), *sft, *data, "--max-steps", args.gvm_steps, *flags)
        rl(name)
    for name in RL:
        rl(name)
    shared.python("tools/label.py", *moved, "--n", 5000, "--seed", seed, "--to", f"{root}/moved.jsonl")
    shared.python("tools/label.py", *moved, "--n", 1000, "--seed", seed + 1000, "--temperatures", 1,
                  "--to", f"{root}/moved_heldout.jsonl")
    stage("train_gvm.py", folder(seed, "gvm", "retrained"), *sft, *data, f"{root}/moved.jsonl",
          "--max-steps", args.gvm_steps)
    for name in ON_FAR:
        rl(name)
    for name in MEASURED:
        stage("train_gvm.py", folder(seed, "eval", f"{name} moved"), *sft, "--eval-only",
              "--gvm", folder(seed, "gvm", name) + "/model", "--data", f"{root}/moved_heldout.jsonl")
    open(f"{root}/done", "w").close()


def measure(seed, name):
    """One RL run, and the GVM that it learned from."""
    gvm = read_json(folder(seed, "gvm", gvm_of(name)) + "/eval.json")
    return dict(seed=seed, **shared.final(folder(seed, "rl", name)), accuracy=gvm["accuracy"]["mean"],
                correlation=gvm["true_q"]["correlation"], v0=gvm["v0_correlation"])


def collect(args):
    """All numbers of results/ablations.json."""
    seeds = [seed for seed in args.seeds if os.path.exists(f"out/ablate/{seed}/done")]
    if not seeds:
        sys.exit("error: no seed in out/ablate is complete yet")
    runs = {name: [measure(seed, name) for seed in seeds] for name in [*GVMS, *RL, *ON_FAR]}
    moved = {}
    for name in MEASURED:
        found = [read_json(folder(seed, "eval", f"{name} moved") + "/eval.json") for seed in seeds]
        moved[name] = [eval["accuracy"]["mean"] for eval in found]
    per_gvm = [run for name in GVMS for run in runs[name]]
    x, y = ([run[key] for run in per_gvm] for key in ("correlation", "heldout"))
    return dict(command="python experiments/ablate.py", machine=shared.machine("one thread a run"),
                seeds=seeds, gvm_steps=args.gvm_steps, steps=args.steps, runs=runs, moved_accuracy=moved,
                q_correlation_against_reward=float(np.corrcoef(x, y)[0, 1]))


def tables(data):
    """The lines of results/ablations.md."""
    runs, cells = data["runs"], []
    for name in runs:
        def mean(key, name=name):
            return float(np.mean([run[key] for run in runs[name]]))

        change = [run["heldout"] - base["heldout"] for run, base in zip(runs[name], runs[BASE], strict=True)]
        v0 = mean("v0")
        cells.append([name, mean("accuracy"), mean("correlation"), "" if np.isnan(v0) else v0,
                      mean("heldout"), "" if name == BASE else interval(change, 3, "+"), mean("final"),
                      mean("fall"), f"{mean('heldout_kl'):.2f}"])
    moved = "; ".join(f"{name} {shared.spread(x)}" for name, x in data["moved_accuracy"].items())
    n_runs = len(GVMS) * len(data["seeds"])
    return [
        "# Ablations on the review world", "",
        f"Command: `{data['command']}`. Seeds {', '.join(map(str, data['seeds']))}. Machine: "
        f"{data['machine']}. Every GVM trains for {data['gvm_steps']} steps, every RL run for "
        f"{data['steps']}.", "",
        "Means over the seeds; difference: to the unchanged run of the same seed, with a 95 % interval of "
        "the mean (Student's t). gold: fresh answers after training; fall: from the best window of the gold "
        "reward to the lowest of the last third.", "",
        *table("changed | GVM pair accuracy | correlation with true Q | V(s_0) with the policies | gold | "
               "difference | last tenth | fall | KL", cells), "",
        f"Pair accuracy on fresh answers of the policy that moved ({FAR}): {moved}.", "",
        f"Correlation over all GVMs and seeds ({n_runs} runs) between a GVM's correlation with the true Q "
        f"and the gold reward that DVPO ends with: {data['q_correlation_against_reward']:.3f}."
    ]


def main(argv=None):
    p = shared.parser(__doc__, shared.SEEDS)
    p.add_argument("--gvm-steps", type=int, default=800, help="(default: %(default)s)")
    p.add_argument("--steps", type=int, default=100, help="rollout steps of an RL run (default: %(default)s)")
    p.add_argument("--report", action="store_true", help="run nothing")
    args = p.parse_args(argv)
    if not args.report:
        shared.two_at_a_time(functools.partial(run_seed, args), args.seeds)
    data = collect(args)
    shared.write_results("ablations", data, tables(data))


if __name__ == "__main__":
    main()
