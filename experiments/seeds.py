"""Several seeds of the whole chain on the review world: SFT -> GVM -> DVPO, and reward model -> PPO.

    python data/toy.py && python experiments/seeds.py       five seeds and the tuning, an hour on two cores
    python experiments/seeds.py --report                    only the tables, from runs that are there

Each seed also trains a GVM without tau, and DVPO on it. A sixth seed, on which the settings were chosen, runs
a grid of lr x kl_coef for DVPO and PPO alike. The RL runs are half as long again as the default, to see
whether the reward falls. Writes out/seeds/SEED/..., results/toy.json and results/toy.md.
"""
import itertools
import os
import sys

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from experiments import shared
from experiments.shared import final, interval, read_json, stage, table

STEPS = 150
GRID = list(itertools.product(("dvpo.py", "ppo_baseline.py"), (1e-4, 3e-4), (0.02, 0.05, 0.1)))  # lr, kl_coef
# DVPO on a GVM without tau: as it is, and kept as close to the SFT model as with one.
BARE = {"dvpo_no_tau": (), "dvpo_no_tau_kl0.2": ("--kl-coef", 0.2)}
TUNING = 1                                      # the seed that settings were chosen on; not among the others
KEYS = "final", "best", "fall", "heldout", "kl"


def chain(seed):
    root = f"out/seeds/{seed}"
    rl = "--seed", seed, "--init-from", f"{root}/sft/model", "--max-steps", STEPS
    gvm = "--seed", seed, "--init-from", f"{root}/sft/model", "--data", "data/toy/gvm.jsonl"
    gvm = *gvm, f"{root}/labelled.jsonl"
    stage("sft.py", f"{root}/sft", "--seed", seed)
    # The SFT model's own samples: the same for the GVM and, as pairs, for the reward model.
    shared.python("tools/label.py", "--policy", f"{root}/sft/model", "--seed", seed,
                  "--to", f"{root}/labelled.jsonl")
    pairs = "--pairs", "data/toy/pairs.jsonl", f"{root}/labelled_pairs.jsonl"
    stage("train_gvm.py", f"{root}/gvm", *gvm)
    stage("dvpo.py", f"{root}/dvpo", *rl, "--gvm", f"{root}/gvm/model")
    stage("ppo_baseline.py", f"{root}/ppo", *rl, "--rm", f"{root}/rm/model", *pairs)
    stage("train_gvm.py", f"{root}/gvm_no_tau", *gvm, "--tau-pairs", 0)
    for name, flags in BARE.items():
        stage("dvpo.py", f"{root}/{name}", *rl, "--gvm", f"{root}/gvm_no_tau/model", *flags)


def tuned(script, lr, kl_coef):
    """The folder of one cell of the grid."""
    return f"out/seeds/tune/{script[:-3]}_{lr:g}_{kl_coef:g}"


def tuning(cell):
    (script, lr, kl_coef), root = cell, f"out/seeds/{TUNING}"
    own = ("--gvm", f"{root}/gvm/model") if script == "dvpo.py" else ("--rm", f"{root}/rm/model")
    stage(script, tuned(*cell), "--seed", TUNING, "--init-from", f"{root}/sft/model", *own, "--lr", lr,
          "--kl-coef", kl_coef, "--max-steps", STEPS)


def reach(seed, share, window=5):
    """{run: (steps, seconds)} until the gold reward reaches `share` of PPO's gain; None: never.

    PPO's gain is from where both runs begin to PPO's last tenth; the reward is a mean over `window` steps.
    """
    runs = {}
    for name in ("dvpo", "ppo", *BARE):
        if os.path.exists(f"out/seeds/{seed}/{name}/done"):
            runs[name] = shared.read_lines(f"out/seeds/{seed}/{name}/metrics.jsonl")
    gold = {name: np.array([r["gold"] for r in rows]) for name, rows in runs.items()}
    begin = (gold["dvpo"][0] + gold["ppo"][0]) / 2
    end = gold["ppo"][-max(1, len(gold["ppo"]) // 10):].mean()
    found = {}
    for name, rows in runs.items():
        there = np.nonzero(shared.smooth(gold[name], window) >= begin + share * (end - begin))[0]
        steps = int(there[0]) + window if len(there) else None
        found[name] = steps and (steps, rows[steps - 1]["seconds"])
    return found


def collect(seeds):
    """All numbers of results/toy.json."""
    data = dict(commit=shared.commit(), machine=shared.machine("one thread a run", "two runs at a time"),
                command="python data/toy.py && python experiments/seeds.py", seeds=[])
    for seed in seeds:
        root = f"out/seeds/{seed}"
        if not os.path.exists(f"{root}/ppo/done"):
            continue
        row = dict(seed=seed, sft=read_json(f"{root}/sft/summary.json"), dvpo=final(f"{root}/dvpo"),
                   ppo=final(f"{root}/ppo"), gvm=read_json(f"{root}/gvm/eval.json"),
                   rm_accuracy=read_json(f"{root}/rm/model/adapter.json")["accuracy"])
        for name in BARE:
            if os.path.exists(f"{root}/{name}/done"):
                row[name] = final(f"{root}/{name}")
                row["gvm_no_tau"] = read_json(f"{root}/gvm_no_tau/eval.json")
        data["seeds"].append(row)
    rows = data["seeds"]
    if not rows:
        sys.exit("error: no seed in out/seeds is complete yet")
    data["mean"] = dict(sft=float(np.mean([r["sft"]["gold"] for r in rows])))
    for name, key in itertools.product(("dvpo", "ppo"), KEYS):
        data["mean"][f"{name}_{key}"] = float(np.mean([r[name][key] for r in rows]))
    cells = [cell for cell in GRID if os.path.exists(f"{tuned(*cell)}/done")]
    if cells:
        data["tuning"] = [dict(stage=script[:-3], lr=lr, kl_coef=kl_coef, **final(tuned(script, lr, kl_coef)))
                          for script, lr, kl_coef in cells]
    data["reach"] = {str(share): [reach(r["seed"], share) for r in rows] for share in (0.8, 0.9, 1.0)}
    return data


def ends(run):
    """The cells of one RL run."""
    return [*(run[key] for key in KEYS[:-1]), f"{run['kl']:.2f}"]


def gvm_row(name, gvm, rm_accuracy):
    accuracy, true_q = gvm["accuracy"], gvm["true_q"]
    return [name, gvm["pairs"], *(accuracy[key] for key in ("mean", "P1", "P99", "last")),
            true_q["correlation"], true_q["rmse"], gvm["v0_ranks_all_policies"], gvm["v0_correlation"],
            rm_accuracy]


def tables(data):
    """The lines of results/toy.md."""
    rows = data["seeds"]
    columns = "final | best | fall | held-out | KL"
    runs = [[r["seed"], r["sft"]["gold"], *ends(r["dvpo"]), *ends(r["ppo"])] for r in rows]
    gvms = [gvm_row(r["seed"], r["gvm"], r["rm_accuracy"]) for r in rows]
    gvms += [gvm_row(f"{r['seed']}, no tau", r["gvm_no_tau"], np.nan) for r in rows if "gvm_no_tau" in r]
    lines = [
        "# The review world, several seeds", "",
        f"Command: `{data['command']}`. Commit {data['commit']}. Machine: {data['machine']}. Equal data, "
        "seeds of training and sampling.", "",
        *table(f"seed | SFT | DVPO {columns} | PPO {columns}", [*runs, ["mean", *data["mean"].values()]]), "",
        "final: mean over the last tenth of the steps; best: highest mean over such a window; fall: from the "
        "best to the lowest in the last third; KL: nats per response to the SFT model.", "",
        "## The global value model on held-out rows", "",
        *table("seed | pairs | mean | P1 | P99 | last | correlation with true Q | rms error | V(s_0) ranks "
               "all policies | its correlation | RM accuracy", gvms)
    ]
    if "tuning" in data:
        lines += ["", f"## Tuning, seed {TUNING}, the same grid for both", ""]
        lines += table("stage | lr | kl_coef | final | best | held-out | KL",
                       [[t["stage"], f"{t['lr']:g}", f"{t['kl_coef']:g}", t["final"], t["best"], t["heldout"],
                         f"{t['kl']:.2f}"] for t in data["tuning"]])
    for name in BARE:
        if all(name in r for r in rows):
            change = [r[name]["heldout"] - r["dvpo"]["heldout"] for r in rows]
            cells = [[r["seed"], *ends(r[name]), f"{x:+.3f}"] for r, x in zip(rows, change, strict=True)]
            mean = [np.mean([r[name][key] for r in rows]) for key in KEYS]
            lines += ["", f"## DVPO on the GVM without tau: {name}", ""]
            lines += table(f"seed | {columns} | held-out, minus the run with tau",
                           [*cells, ["mean", *mean, interval(change, 3, "+")]])
    lines += [
        "", "## Steps and seconds to PPO's reward", "",
        "Until the gold reward (mean over five steps) has reached this share of PPO's gain, from where both "
        "begin to where PPO ends. Ratio: DVPO to PPO, mean over the seeds that got there and its 95 % "
        "interval (Student's t).", "",
        *table("share | run | its steps, by seed | PPO's steps | ratio of steps | ratio of seconds",
               [reach_row(share, name, found) for share, found in data["reach"].items()
                for name in ("dvpo", *BARE) if all(name in x for x in found)])
    ]
    return lines


def reach_row(share, name, found):
    steps = [", ".join(str(x[run][0]) if x[run] else "never" for x in found) for run in (name, "ppo")]
    both = [x for x in found if x[name] and x["ppo"]]
    ratios = [interval([x[name][i] / x["ppo"][i] for x in both]) for i in (0, 1)]
    return [f"{float(share):.0%}", name, *steps, *ratios]


def main(argv=None):
    p = shared.parser(__doc__, shared.SEEDS)
    p.add_argument("--report", action="store_true", help="run nothing")
    args = p.parse_args(argv)
    if not args.report:
        shared.two_at_a_time(chain, [TUNING, *args.seeds])
        shared.two_at_a_time(tuning, GRID)
    data = collect(args.seeds)
    shared.write_results("toy", data, tables(data))


if __name__ == "__main__":
    main()
