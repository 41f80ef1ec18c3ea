"""What would a user pick instead? DPO, ReMax and GRPO beside DVPO and PPO on the toy.

    python data/toy.py && python experiments/seeds.py && python experiments/side_by_side.py      an hour more

SFT models, labelled rows, reward models and the runs of DVPO and PPO are those of experiments/seeds.py: the
same rows for all, the same number of trained rollouts. Each new method is tuned on two seeds over six
settings; DVPO and PPO run at their defaults (their grids: toy.md). The five seeds decide nothing. Then every
method runs with five KL coefficients on two of them.
Writes out/seeds/SEED/comparators/..., results/comparators.json, .md and .png.
"""
import itertools
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np

from experiments.seeds import STEPS, prepare, read, rows_of
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

TUNING = 1, 2                                           # seeds
GRID = {                                                # learning rates, KL coefficients (of DPO: beta)
    "dpo": ((1e-4, 3e-4, 1e-3), (0.1, 0.3)),
    "remax": ((3e-4, 1e-3, 3e-3), (0.05, 0.1)),
    "grpo": ((1e-4, 3e-4), (0.1, 0.3, 1)),              # at its paper's 0.04 the policy runs away
}
CURVES = {                                              # KL coefficients, and who else is on the curve
    "dvpo": (0.05, 0.1, 0.15, 0.3, 0.6), "dvpo_no_tau": (0.05, 0.1, 0.2, 0.4, 0.8),
    "ppo": (0.02, 0.05, 0.1, 0.2, 0.4), "dpo": (0.1, 0.3, 0.6, 1, 3), "remax": (0.02, 0.03, 0.05, 0.1, 0.3),
    "grpo": (0.1, 0.2, 0.3, 0.6, 1), "dr_grpo": (0.03, 0.05, 0.1, 0.2, 0.4),
}
CURVE_SEEDS = 11, 12
EQUAL_KL = 0.9, 1.2, 1.5
DEFAULT_KL = 0.1                                        # kl_coef of DVPO and PPO
OWN = {"dvpo_no_tau": ("--tau-pairs", 0), "dr_grpo": ("--scale", "none", "--loss-mean", "token")}
LIKE = {"dr_grpo": "grpo"}                              # takes that one's tuned learning rate
DONE = {("dvpo", 0.1): "dvpo", ("dvpo", 0.15): "dvpo_kl0.15", ("dvpo_no_tau", 0.1): "dvpo_no_tau",
        ("dvpo_no_tau", 0.2): "dvpo_no_tau_kl0.2", ("ppo", 0.1): "ppo"}
METHODS = dict(dvpo="DVPO", dvpo_no_tau="DVPO, no tau", ppo="PPO", dpo="DPO", remax="ReMax", grpo="GRPO")
LABELS = METHODS | dict(dr_grpo="GRPO, no std, token mean")         # on the curves alone


def reward_model(seed):
    """SFT and reward model of a tuning seed, unless experiments/seeds.py has made them."""
    prepare(seed)
    root = f"out/seeds/{seed}"
    if not os.path.exists(f"{root}/rm/model"):
        pairs = "data/toy/pairs.jsonl", f"{root}/labelled_pairs.jsonl"
        stage("ppo_baseline.py", f"{root}/rm_only", "--seed", seed, "--init-from", f"{root}/sft/model",
              "--rm", f"{root}/rm/model", "--pairs", *pairs, "--rm-only")


def command(job):
    """-> script and flags of one run, before its number of steps, and flags after it."""
    seed, method, lr, kl = job
    root = f"out/seeds/{seed}"
    flags = ["--seed", seed, "--init-from", f"{root}/sft/model"]
    flags += ["--lr", lr] if lr else []
    flags += ["--beta" if method == "dpo" else "--kl-coef", kl]
    if method == "dpo":
        flags += ["--pairs", "data/toy/pairs.jsonl", f"{root}/labelled_pairs.jsonl"]
    else:
        value = "gvm" if method.startswith("dvpo") else "rm"
        flags += [f"--{value}", f"{root}/{value}/model"]
    script = dict(dvpo="dvpo.py", dvpo_no_tau="dvpo.py", ppo="ppo_baseline.py", dr_grpo="comparators/grpo.py")
    return script.get(method, f"comparators/{method}.py"), flags, OWN.get(method, ())


def run(job):
    """One run of one method -> its folder."""
    seed, method, lr, kl = job
    if (method, kl) in DONE:
        return f"out/seeds/{seed}/{DONE[method, kl]}"
    out = f"out/seeds/{seed}/comparators/{method}_{lr or 'default'}_{kl}"
    script, flags, own = command(job)
    steps = [] if method == "dpo" else ["--max-steps", STEPS]
    stage(script, out, *flags, *steps, *own)
    return out


def timed(method):
    """40 steps at the method's settings -> their folder."""
    best = tuned(LIKE.get(method, method))[1]
    job = CURVE_SEEDS[0], method, best["lr"], best.get("kl_coef", DEFAULT_KL)
    out = f"out/seeds/{CURVE_SEEDS[0]}/comparators/seconds_{method}"
    script, flags, own = command(job)
    stage(script, out, *flags, "--max-steps", 40, *own)
    return out


def seconds_per_step(out):
    return float(np.median(np.diff([row["seconds"] for row in rows_of(f"{out}/metrics.jsonl")])))


def ended(out):
    """How a run ended; DPO has no rollouts while it trains: its last tenth is that of fresh answers."""
    if "gold" in rows_of(f"{out}/metrics.jsonl")[0]:
        found = final(out)
    else:
        summary = read(f"{out}/summary.json")
        found = dict(final=summary["gold"], kl=summary["kl"], heldout=summary["gold"])
    models = read(f"{out}/memory.json")["models"]
    rows = rows_of(f"{out}/metrics.jsonl")
    found |= dict(seconds=rows[-1]["seconds"], steps=len(rows), models=len(models))
    return found | {key: sum(model[key] for model in models.values()) for key in ("parameters", "trainable")}


def tuned(method):
    """All settings of a method, and the one with the highest mean over the tuning seeds."""
    if method not in GRID:
        return [], dict(lr=None)                        # the default
    settings = []
    for lr, kl in itertools.product(*GRID[method]):
        runs = [ended(run((seed, method, lr, kl))) for seed in TUNING]
        settings.append(dict(lr=lr, kl_coef=kl, final=float(np.mean([r["final"] for r in runs])),
                             kl=float(np.mean([r["kl"] for r in runs]))))
    return settings, max(settings, key=lambda setting: setting["final"])


def reach(out, begin, end, share=0.8, window=5):
    """Steps until the gold reward has made `share` of the way from begin to end; None: never."""
    rows = rows_of(f"{out}/metrics.jsonl")
    if "gold" not in rows[0]:
        return None
    smooth = np.convolve([row["gold"] for row in rows], np.ones(window) / window, "valid")
    there = np.nonzero(smooth >= begin + share * (end - begin))[0]
    return int(there[0]) + window if len(there) else None


def measure(seeds):
    """Tuning, the five seeds, their seconds per step, the curves."""
    found, best = dict(tuning={}, runs={}, curves={}, seconds={}), {}
    for method in LABELS:
        settings, best[method] = tuned(LIKE.get(method, method))
        if method in GRID:
            found["tuning"][method] = settings
    for method in METHODS:
        found["seconds"][method] = seconds_per_step(timed(method))
        runs = found["runs"][method] = []
        for seed in seeds:
            ppo = f"out/seeds/{seed}/ppo"
            begin, end = rows_of(f"{ppo}/metrics.jsonl")[0]["gold"], final(ppo)["final"]
            out = f"out/seeds/{seed}/{method}"
            if method in GRID:
                out = run((seed, method, best[method]["lr"], best[method]["kl_coef"]))
            runs.append(ended(out) | dict(reach=reach(out, begin, end)))
    for method, coefficients in CURVES.items():
        folders = {(seed, kl): run((seed, method, best[method]["lr"], kl))
                   for seed in CURVE_SEEDS for kl in coefficients}
        found["curves"][method] = [dict(seed=seed, kl_coef=kl, **ended(out))
                                   for (seed, kl), out in folders.items()]
    return found


def curve(points):
    """Means over the seeds of one method's curve, in the order of their KL -> [(kl_coef, KL, gold)]."""
    mean = []
    for kl_coef in dict.fromkeys(point["kl_coef"] for point in points):
        same = [point for point in points if point["kl_coef"] == kl_coef]
        mean.append((kl_coef, *(float(np.mean([point[key] for point in same])) for key in ("kl", "final"))))
    return sorted(mean, key=lambda point: point[1])


def at_kl(points, kl):
    """Gold reward at that KL, on the straight line between two points of the curve; "": outside of it."""
    _, x, y = zip(*curve(points), strict=True)
    return f"{np.interp(kl, x, y):.3f}" if x[0] <= kl <= x[-1] else ""


def plot(curves, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(7, 4.5))
    for method, points in curves.items():
        _, kl, gold = zip(*curve(points), strict=True)
        ax.plot(kl, gold, "o-", label=LABELS[method])
    ax.set(xscale="log", xlabel="KL to SFT, nats per response", ylabel="gold reward, last tenth of the steps")
    ax.grid(alpha=0.3)
    ax.legend()
    fig.tight_layout()
    fig.savefig(path, dpi=120)


def report(seeds):
    about = dict(command="python experiments/side_by_side.py", commit=commit(),
                 machine=machine("one thread a run", "two runs at a time"), seeds=seeds)
    data = about | measure(seeds)
    plot(data["curves"], "results/comparators.png")
    write_results("comparators", data, lines_of(data))


def lines_of(data):
    lines = ["# DPO, ReMax, GRPO beside DVPO and PPO", "",
             f"Command: `{data['command']}`. Commit {data['commit']}. Machine: {data['machine']}. Seeds "
             f"{', '.join(map(str, data['seeds']))}, {STEPS} steps of 64 trained rollouts (DPO: one pass "
             "over the pairs); mean and 95 % interval. Last tenth: of the steps; of DPO, fresh answers. "
             "Seconds per step: the median of 40 steps, no other run beside.", ""]
    cells = []
    for method in METHODS:
        runs, seconds = data["runs"][method], data["seconds"][method]
        values = [interval([r[key] for r in runs], 3) for key in ("final", "heldout", "kl")]
        steps = [r["reach"] for r in runs if r["reach"]]
        there = [interval(steps, 0), f"{seconds * np.mean(steps):.1f}"] if steps else ["", ""]
        cells.append([METHODS[method], *values, *there, f"{seconds:.3f}", f"{seconds * runs[0]['steps']:.0f}",
                      runs[0]["models"], f"{runs[0]['parameters']:,}", f"{runs[0]['trainable']:,}"])
    names = ["method", "last tenth", "fresh", "KL", "steps to 80 % of PPO's gain", "in seconds",
             "seconds per step", "of all steps", "models in memory", "parameters held", "trained"]
    lines += [*table(names, cells), "", "## Gold reward against KL", "",
              f"Five KL coefficients (of DPO: beta), seeds {' and '.join(map(str, CURVE_SEEDS))}: gold "
              "reward at KL, means; in the last columns read off the line between two points. No std, token "
              "mean: `--scale none --loss-mean token`, at GRPO's learning rate.", "",
              "![gold reward against KL](comparators.png)", ""]
    cells = []
    for method, points in data["curves"].items():
        values = [f"{kl_coef}: {gold:.3f} at {kl:.2f}" for kl_coef, kl, gold in curve(points)]
        cells.append([LABELS[method], *values, *(at_kl(points, kl) for kl in EQUAL_KL)])
    names = ["method", *[""] * 5, *(f"at KL {kl:g}" for kl in EQUAL_KL)]
    lines += [*table(names, cells), "", "## Tuning", "",
              f"Seeds {', '.join(map(str, TUNING))}, mean of the last tenth; PPO and DVPO: toy.md.", ""]
    cells = []
    for method, settings in data["tuning"].items():
        for s in settings:
            setting = f"{s['lr']:g}", s["kl_coef"]
            cells.append([LABELS[method], *setting, f"{s['final']:.3f}", f"{s['kl']:.2f}"])
    return lines + table(["method", "lr", "kl_coef or beta", "last tenth", "KL"], cells)


def main():
    args = seeds_parser(__doc__).parse_args()
    if not args.report:
        two_at_a_time(reward_model, TUNING)
        jobs = []
        for method, grid in GRID.items():
            jobs += [(seed, method, *setting) for setting in itertools.product(*grid) for seed in TUNING]
        two_at_a_time(run, jobs)
        jobs = []
        for method in LABELS:
            best = tuned(LIKE.get(method, method))[1]
            if method in GRID:
                jobs += [(seed, method, best["lr"], best["kl_coef"]) for seed in args.seeds]
            jobs += [(seed, method, best["lr"], kl) for kl in CURVES[method] for seed in CURVE_SEEDS]
        two_at_a_time(run, dict.fromkeys(jobs))         # a run may be in two lists
        for method in METHODS:                          # with no other run beside
            timed(method)
    report(args.seeds)


if __name__ == "__main__":
    main()
