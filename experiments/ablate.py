"""What each choice is worth on the toy: one change at a time, against the same seeds unchanged.

    python data/toy.py && python experiments/seeds.py && python experiments/ablate.py       two hours more

SFT models and their labelled samples are those of experiments/seeds.py. All GVMs here train for GVM_STEPS
steps, fewer than the default, the unchanged one too. "moved" is the policy of kl_coef 0.02, which goes far
from the SFT model. Its own answers are labelled, as tools/label.py does; "retrained" is a GVM that also
trains on them, and GVMs are measured on other answers of it, at temperature 1. Only whole seeds count.
Writes out/ablate/SEED/..., results/ablations.json and .md.
"""
import json
import os
import subprocess
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np

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

GVM_STEPS, RL_STEPS = 800, 100
BASE = "unchanged"
GVMS = {
    BASE: (), "td_lambda 0": ("--td-lambda", 0), "td_lambda 0.5": ("--td-lambda", 0.5),
    "td_lambda 0.9": ("--td-lambda", 0.9), "td_lambda 1": ("--td-lambda", 1), "batch norm": ("--batch-norm",),
    "plain head": ("--plain-head",), "tau 0": ("--tau-pairs", 0), "tau 1": ("--tau-pairs", 1),
    "tau 3": ("--tau-pairs", 3),
}
RL = {
    "advantage q": ("--advantage", "q"), "kl_coef 0.02": ("--kl-coef", 0.02),
    "kl_coef 0.05": ("--kl-coef", 0.05), "kl_coef 0.2": ("--kl-coef", 0.2),
}
MOVED = "kl_coef 0.02"
ON_MOVED = {"tau 0, kl_coef 0.02": "tau 0", "retrained, kl_coef 0.02": "retrained"}     # behind that GVM
MEASURED = BASE, "tau 0", "retrained"                   # GVMs, on answers of the moved policy


def folder(seed, kind, name):
    return f"out/ablate/{seed}/{kind}_" + name.replace(", ", "_").replace(" ", "_")


def gvm_of(name):
    """The GVM behind which an RL run learns."""
    return ON_MOVED.get(name, name if name in GVMS else BASE)


def train_gvm(seed, name):
    data = ["data/toy/gvm.jsonl", f"out/seeds/{seed}/labelled.jsonl"]
    if name == "retrained":
        data.append(f"out/ablate/{seed}/moved.jsonl")
    stage("train_gvm.py", folder(seed, "gvm", name), "--seed", seed, "--init-from",
          f"out/seeds/{seed}/sft/model", "--data", *data, "--max-steps", GVM_STEPS, *GVMS.get(name, ()))


def train_policy(seed, name):
    flags = RL[MOVED] if name in ON_MOVED else RL.get(name, ())
    stage("dvpo.py", folder(seed, "rl", name), "--seed", seed, "--init-from", f"out/seeds/{seed}/sft/model",
          "--gvm", folder(seed, "gvm", gvm_of(name)) + "/model", "--max-steps", RL_STEPS, *flags)


def label(seed, to, n, *flags):
    """Answers of the moved policy, labelled."""
    words = ["--policy", folder(seed, "rl", MOVED) + "/model", "--name", "moved", "--n", n, "--to",
             f"out/ablate/{seed}/{to}.jsonl", *flags]
    subprocess.run([sys.executable, "tools/label.py", *map(str, words)], check=True, capture_output=True,
                   env=dict(os.environ, OMP_NUM_THREADS="1"))


def run_seed(seed):
    for name in GVMS:
        train_gvm(seed, name)
        train_policy(seed, name)
    for name in RL:
        train_policy(seed, name)
    label(seed, "moved", 5000, "--seed", seed)
    label(seed, "moved_heldout", 1000, "--seed", seed + 1000, "--temperatures", 1)
    train_gvm(seed, "retrained")
    for name in ON_MOVED:
        train_policy(seed, name)
    for name in MEASURED:
        stage("train_gvm.py", folder(seed, "eval", name), "--seed", seed, "--init-from",
              f"out/seeds/{seed}/sft/model", "--eval-only", "--gvm", folder(seed, "gvm", name) + "/model",
              "--data", f"out/ablate/{seed}/moved_heldout.jsonl")
    open(f"out/ablate/{seed}/done", "w").close()


def evaluation(seed, kind, name):
    with open(folder(seed, kind, name) + "/eval.json") as f:
        return json.load(f)


def measure(seeds):
    """{run: [how it ended, and its GVM's accuracy, one per seed]}."""
    runs = {}
    for name in [*GVMS, *RL, *ON_MOVED]:
        runs[name] = []
        for seed in seeds:
            gvm = evaluation(seed, "gvm", gvm_of(name))
            runs[name].append(dict(seed=seed, **final(folder(seed, "rl", name)), v0=gvm["v0_correlation"],
                                   accuracy=gvm["accuracy"]["mean"],
                                   correlation=gvm["true_q"]["correlation"]))
    return runs


def report(seeds):
    seeds = [seed for seed in seeds if os.path.exists(f"out/ablate/{seed}/done")]
    if not seeds:
        sys.exit("error: no seed in out/ablate is whole yet")
    runs = measure(seeds)
    moved = {name: [evaluation(seed, "eval", name)["accuracy"]["mean"] for seed in seeds]
             for name in MEASURED}
    per_gvm = [(run["correlation"], run["heldout"]) for name in GVMS for run in runs[name]]
    data = dict(command="python experiments/ablate.py", commit=commit(), seeds=seeds,
                machine=machine("one thread a run", "two at a time"), gvm_steps=GVM_STEPS, steps=RL_STEPS,
                runs=runs, moved_accuracy=moved,
                q_correlation_against_reward=float(np.corrcoef(*zip(*per_gvm, strict=True))[0, 1]))
    write_results("ablations", data, lines_of(data))


def lines_of(data):
    runs, cells = data["runs"], []

    def column(name, key):
        return np.array([run[key] for run in runs[name]], dtype=float)

    for name in runs:
        v0 = column(name, "v0").mean()
        gain = column(name, "heldout") - column(BASE, "heldout")
        cells.append([name, *(f"{column(name, key).mean():.3f}" for key in ("accuracy", "correlation")),
                      "" if np.isnan(v0) else f"{v0:.3f}", f"{column(name, 'heldout').mean():.3f}",
                      interval(gain, 3, "+") if name != BASE else "",
                      *(f"{column(name, key).mean():.3f}" for key in ("final", "fall")),
                      f"{column(name, 'heldout_kl').mean():.2f}"])
    names = ["changed", "GVM pair accuracy", "correlation with true Q", "V(s_0) with the policies", "gold",
             "difference", "last tenth", "fall", "KL"]
    moved = [f"{name} {np.mean(v):.3f} ({min(v):.3f} to {max(v):.3f})"
             for name, v in data["moved_accuracy"].items()]
    return ["# Ablations on the toy", "",
            f"Command: `{data['command']}`. Commit {data['commit']}. Machine: {data['machine']}. Seeds "
            f"{', '.join(map(str, data['seeds']))}. Every GVM trains for {data['gvm_steps']} steps, every RL "
            f"run has {data['steps']}.", "",
            "Means over the seeds; difference: to the unchanged run of the same seed, with a 95 % interval "
            "of the mean (Student's t). gold: fresh answers after training; fall: from the best window of "
            "the gold reward to the lowest of the last third.", "", *table(names, cells), "",
            f"Pair accuracy on fresh answers of the policy that moved ({MOVED}): {'; '.join(moved)}.", "",
            f"Correlation over all GVMs and seeds ({len(GVMS) * len(data['seeds'])} runs) between a GVM's "
            "correlation with the true Q and the gold reward that DVPO ends with: "
            f"{data['q_correlation_against_reward']:.3f}."]


def main():
    args = seeds_parser(__doc__).parse_args()
    if not args.report:
        two_at_a_time(run_seed, args.seeds)
    report(args.seeds)


if __name__ == "__main__":
    main()
