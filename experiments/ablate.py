"""What each choice is worth on the review world: one thing changed at a time, several seeds, against the same
seeds unchanged.

    python data/toy.py && python experiments/seeds.py && python experiments/ablate.py
        some two hours and a half more on two cores, two seeds at a time
    python experiments/ablate.py --report   only the table, from runs that are there

Takes the SFT models and their labelled samples from experiments/seeds.py. GVMs here train for --gvm-steps
steps, fewer than the default, the unchanged one too.
"moved": the policy of kl_coef 0.02, which goes far from the SFT model; its own answers are labelled, as
tools/label.py does; "retrained" is
a GVM that also trains on them, and GVMs are measured on other answers of it, at temperature 1. A seed counts
once it is whole. Writes results/ablations.json and .md.
"""
import argparse
import concurrent.futures
import json
import os
import subprocess
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np

from experiments.shared import final, interval, machine, stage, write_results

BASE = "unchanged"
GVMS = {
    BASE: (), "td_lambda 0": ("--td-lambda", 0), "td_lambda 0.5": ("--td-lambda", 0.5),
    "td_lambda 0.9": ("--td-lambda", 0.9), "td_lambda 1": ("--td-lambda", 1),
    "batch norm": ("--batch-norm", ), "tau 0": ("--tau-pairs", 0), "tau 1": ("--tau-pairs", 1),
    "tau 3": ("--tau-pairs", 3)
}
RL = {
    "advantage q": ("--advantage", "q"), "kl_coef 0.02": ("--kl-coef", 0.02),
    "kl_coef 0.05": ("--kl-coef", 0.05), "kl_coef 0.2": ("--kl-coef", 0.2)
}
FAR = RL["kl_coef 0.02"]
ON_FAR = {"tau 0, kl_coef 0.02": "tau 0",
          "retrained, kl_coef 0.02": "retrained"}  # the same RL run behind another GVM


def folder(root, name):
    return f"{root}/" + name.replace(", ", "_").replace(" ", "_")


def run_seed(seed, args):
    base, root = f"out/seeds/{seed}", f"out/ablate/{seed}"
    sft, data = ("--seed", seed, "--init-from",
                 f"{base}/sft/model"), ["data/toy/gvm.jsonl", f"{base}/labelled.jsonl"]

    def gvm(name):
        return folder(root, "gvm " + name)

    def train(name):
        more = [f"{root}/moved.jsonl"] if name == "retrained" else []
        stage("train_gvm.py", gvm(name), *sft, "--data", *data, *more, "--max-steps", args.gvm_steps,
              *GVMS.get(name, ()))

    def rl(name):
        stage("dvpo.py", folder(root, "rl " + name), *sft, "--gvm",
              f"{gvm(ON_FAR.get(name, name if name in GVMS else BASE))}/model", "--max-steps", args.steps,
              *(FAR if name in ON_FAR else RL.get(name, ())))

    def label(to, n, seed, *argv):
        subprocess.run([
            sys.executable, "tools/label.py", "--policy",
            folder(root, "rl kl_coef 0.02") + "/model", "--name", "moved", "--n",
            str(n), "--seed",
            str(seed), "--to", to, *argv
        ], check=True, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                       env=dict(os.environ, OMP_NUM_THREADS="1"))

    def measure(name):
        stage("train_gvm.py", folder(root, f"eval {name} moved"), *sft, "--eval-only", "--gvm",
              f"{gvm(name)}/model", "--data", f"{root}/moved_heldout.jsonl")

    for name in GVMS:
        train(name), rl(name)
    for name in RL:
        rl(name)
    label(f"{root}/moved.jsonl", 5000, seed), label(f"{root}/moved_heldout.jsonl", 1000, seed + 1000,
                                                    "--temperatures", "1")
    train("retrained")
    for name in ON_FAR:
        rl(name)
    for name in (BASE, "tau 0", "retrained"):
        measure(name)
    open(f"{root}/done", "w").close()


def report(args, seeds):
    seeds = [s for s in seeds if os.path.exists(f"out/ablate/{s}/done")]
    if not seeds:
        sys.exit("error: no seed in out/ablate is whole yet")
    got = {}
    for name in [*GVMS, *RL, *ON_FAR]:
        rows = []
        for s in seeds:
            root = f"out/ablate/{s}"
            with open(folder(root, "gvm " + ON_FAR.get(name, name if name in GVMS else BASE)) +
                      "/eval.json") as f:
                g = json.load(f)
            rows.append(
                dict(seed=s, **final(folder(root, "rl " + name)), accuracy=g["accuracy"]["mean"],
                     correlation=g["true_q"]["correlation"], v0=g["v0_correlation"]))
        got[name] = rows

    def column(name, key):
        return np.array([r[key] for r in got[name]], dtype=float)

    moved = {
        name: [
            json.load(open(folder(f"out/ablate/{s}", f"eval {name} moved") +
                           "/eval.json"))["accuracy"]["mean"] for s in seeds
        ]
        for name in (BASE, "tau 0", "retrained")
    }
    per_gvm = [(r["correlation"], r["heldout"]) for name in GVMS for r in got[name]]
    data = dict(command="python experiments/ablate.py",
                machine=machine("one thread a run"), seeds=seeds,
                gvm_steps=args.gvm_steps, steps=args.steps, runs=got, moved_accuracy=moved,
                q_correlation_against_reward=float(np.corrcoef(*zip(*per_gvm, strict=False))[0, 1]))
    lines = [
        "# Ablations on the review world", "",
        f"Command: `{data['command']}`. Seeds {', '.join(map(str, seeds))}. Machine: {data['machine']}. "
        f"Every GVM trains for {args.gvm_steps} steps, "
        f"every RL run goes {args.steps}.", "",
        "Means over the seeds; difference: to the unchanged run of the same seed, with a 95 % interval of "
        "the mean (Student's t). gold: fresh answers "
        "after training; fall: from the best window of the gold reward to the lowest of the last third.", "",
        "| changed | GVM pair accuracy | correlation with true Q | V(s_0) with the policies | gold | "
        "difference | last tenth | fall | KL |",
        "|" + "---|" * 9
    ]
    for name in got:
        m = {
            k: column(name, k).mean()
            for k in ("accuracy", "correlation", "v0", "heldout", "final", "fall", "heldout_kl")
        }
        lines.append(
            f"| {name} | {m['accuracy']:.3f} | {m['correlation']:.3f} | "
            f"{'' if np.isnan(m['v0']) else format(m['v0'], '.3f')} | {m['heldout']:.3f} | "
            f"{interval(column(name, 'heldout') - column(BASE, 'heldout'), 3, '+') if name != BASE else ''} "
            "| "
            f"{m['final']:.3f} | {m['fall']:.3f} | {m['heldout_kl']:.2f} |")
    lines += [
        "", "Pair accuracy on fresh answers of the policy that moved (kl_coef 0.02): " +
        "; ".join(f"{k} {np.mean(v):.3f} ({min(v):.3f} to {max(v):.3f})" for k, v in moved.items()) + ".", "",
        f"Correlation over all GVMs and seeds ({len(per_gvm)} runs) between a GVM's correlation with the "
        f"true Q and the gold reward that DVPO ends with: {data['q_correlation_against_reward']:.3f}."
    ]
    write_results("ablations", data, lines)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seeds", type=int, nargs="+", default=[11, 12, 13, 14, 15], help="(default: 11 to 15)")
    p.add_argument("--gvm-steps", type=int, default=800, help="(default: %(default)s)")
    p.add_argument("--steps", type=int, default=100, help="rollout steps of an RL run (default: %(default)s)")
    p.add_argument("--report", action="store_true", help="run nothing")
    args = p.parse_args(argv)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda seed: run_seed(seed, args), args.seeds if not args.report else ()))
    report(args, args.seeds)


if __name__ == "__main__":
    main()
