"""What does the GVM cost, and what does it give for that? Accuracy and reward against seconds of training.

    git worktree add out/before 5367141                         the program before rows were packed
    python data/toy.py && python experiments/gvm_cost.py        40 minutes, two runs at a time

GVMs and reward models of different length, on the same SFT models and labelled rows.
Settings were chosen by this table, so that its seeds decide nothing else.
Writes out/seeds/SEED/cost/..., results/gvm_cost.json and .md.
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np

import common
import train_gvm
from experiments.exact import BLUNDERS, changes
from experiments.seeds import STEPS, prepare, read, rows_of
from experiments.shared import (
    commit,
    final,
    machine,
    seeds_parser,
    stage,
    table,
    two_at_a_time,
    write_results,
)

GVM_EPOCHS, RM_EPOCHS = (0.5, 1, 1.5, 3), (1, 3)        # the defaults are 1.5 and 3
TIMED = 200                                             # updates of the timing runs
BEFORE = "out/before/train_gvm.py"                      # one tau per row, 64 rows per update


def flags(seed):
    root = f"out/seeds/{seed}"
    return root, ("--seed", seed, "--init-from", f"{root}/sft/model")


def data(root):
    return "--data", "data/toy/gvm.jsonl", f"{root}/labelled.jsonl"


def gvm(job):
    seed, epochs = job
    root, init = flags(seed)
    out = f"{root}/cost/gvm_{epochs}"
    stage("train_gvm.py", out, *init, *data(root), "--epochs", epochs)
    stage("dvpo.py", f"{out}/dvpo", *init, "--gvm", f"{out}/model", "--max-steps", STEPS)


def rm(job):
    seed, epochs = job
    root, init = flags(seed)
    out, pairs = f"{root}/cost/rm_{epochs}", ("data/toy/pairs.jsonl", f"{root}/labelled_pairs.jsonl")
    stage("ppo_baseline.py", f"{out}/ppo", *init, "--rm", f"{out}/model", "--rm-epochs", epochs,
          "--pairs", *pairs, "--max-steps", STEPS)


def timed(script):
    """Two runs at a time, as those above, of one program."""
    seed, name = script
    root, init = flags(seed)
    stage(BEFORE if name == "before" else "train_gvm.py", f"{root}/cost/timed_{name}", *init, *data(root),
          "--max-steps", TIMED)


def tokens_per_row(root, tau_pairs, n=2000):
    """(tokens read, tokens trained) per trained row of packed sequences."""
    tok = common.load_tokenizer(f"{root}/sft/model")
    rows = train_gvm.Labelled(data(root)[1:])
    read_, trained, count, rng = 0, 0, 0, np.random.default_rng(0)
    for i in rng.choice(len(rows), n, replace=False):
        tau = rows.tau(rows[i]["policy"], rows[i]["prompt"], tau_pairs, rng)
        ids, spans = common.pack(tok, rows[i], tau, max_length=256, tau_length=128)
        read_ += len(ids)
        trained += sum(end - begin for _, begin, end in spans)
        count += len(spans)
    return read_ / count, trained / count


def measure(seeds):
    found = dict(gvm={}, rm={}, timed={})
    for epochs in GVM_EPOCHS:
        runs = []
        for seed in seeds:
            out = f"out/seeds/{seed}/cost/gvm_{epochs}"
            run = dict(seconds=rows_of(f"{out}/metrics.jsonl")[-1]["seconds"], eval=read(f"{out}/eval.json"))
            run |= dict(dvpo=final(f"{out}/dvpo"), blunders=changes(seed, 2, f"cost/gvm_{epochs}"))
            runs.append(run)
        found["gvm"][epochs] = runs
    for epochs in RM_EPOCHS:
        found["rm"][epochs] = []
        for seed in seeds:
            out = f"out/seeds/{seed}/cost/rm_{epochs}"
            about = dict(seconds=rows_of(f"{out}/metrics.jsonl")[-1]["seconds"], ppo=final(f"{out}/ppo"))
            about["accuracy"] = read(f"{out}/model/adapter.json")["accuracy"]
            found["rm"][epochs].append(about)
    for name in "before", "packed":
        spent = [rows_of(f"out/seeds/{seed}/cost/timed_{name}/metrics.jsonl") for seed in seeds]
        found["timed"][name] = [(s[-1]["seconds"] - s[19]["seconds"]) / (len(s) - 20) for s in spent]
    root = f"out/seeds/{seeds[0]}"
    found["tokens"] = {"packed": tokens_per_row(root, 2), "alone": tokens_per_row(root, 0)}
    return found | dict(crossover=crossover(found["gvm"][1.5], found["rm"][3]))


def crossover(gvms, rms):
    """Seconds of value and of reward model, and of an RL step behind each; RL steps until DVPO is cheaper."""
    value, reward = (np.mean([run["seconds"] for run in runs]) for runs in (gvms, rms))
    dvpo = np.mean([run["dvpo"]["seconds"] / run["dvpo"]["steps"] for run in gvms])
    ppo = np.mean([run["ppo"]["seconds"] / run["ppo"]["steps"] for run in rms])
    return dict(value=value, reward=reward, dvpo=dvpo, ppo=ppo, steps=(value - reward) / (ppo - dvpo))


def report(seeds):
    about = dict(command="python experiments/gvm_cost.py", commit=commit(),
                 machine=machine("one thread a run", "two runs at a time"))
    found = dict(about, seeds=seeds, **measure(seeds))
    write_results("gvm_cost", found, lines_of(found))


def lines_of(found):
    mean, tokens = {name: np.mean(x) for name, x in found["timed"].items()}, found["tokens"]
    lines = ["# What the value costs", "",
             f"Command: `{found['command']}`. Commit {found['commit']}. Machine: {found['machine']}. Means "
             f"over seeds {', '.join(map(str, found['seeds']))}, on which the settings were chosen.", "",
             "## Per row", "",
             f"{TIMED} updates, the first 20 left out. before: one tau per row, 64 rows per update (commit "
             "5367141); packed: 21 sequences of up to three rows. A row that is in three sequences counts "
             "three times.", ""]
    cells = []
    for name, rows in ("before", 64), ("packed", 63):
        cells.append([name, f"{mean[name]:.3f}", rows, f"{1000 * mean[name] / rows:.2f}"])
    (read_, trained), (alone, _) = tokens["packed"], tokens["alone"]
    lines += [*table(["program", "seconds per update", "rows trained per update", "ms per row"], cells), "",
              f"Packed, {read_:.1f} tokens are read for each row and {trained:.1f} of them trained (a row "
              f"alone is {alone:.1f} tokens long).", "", "## Accuracy and reward against seconds", ""]
    cells = []
    for epochs, runs in found["gvm"].items():
        numbers = [[r["eval"]["accuracy"]["mean"] for r in runs],
                   [r["eval"]["true_q"]["correlation"] for r in runs],
                   *([r["blunders"][kind][1] for r in runs] for kind in BLUNDERS),
                   *([r["dvpo"][key] for r in runs] for key in ("final", "kl"))]
        seconds = np.mean([r["seconds"] for r in runs])
        ranked = sum(r["eval"]["v0_ranks_all_policies"] for r in runs)
        cells.append([epochs, f"{seconds:.0f}", *(f"{np.mean(x):.3f}" for x in numbers),
                      f"{ranked} of {len(runs)}"])
    names = ["GVM epochs", "seconds", "pair accuracy", "correlation with true Q", *BLUNDERS,
             "DVPO, last tenth", "KL", "policies ranked"]
    lines += [*table(names, cells), ""]
    cells = []
    for epochs, runs in found["rm"].items():
        numbers = [r["accuracy"] for r in runs], *([r["ppo"][key] for r in runs] for key in ("final", "kl"))
        seconds = np.mean([r["seconds"] for r in runs])
        cells.append([epochs, f"{seconds:.0f}", *(f"{np.mean(x):.3f}" for x in numbers)])
    names = ["reward model epochs", "seconds", "pair accuracy", "PPO, last tenth", "KL"]
    c = found["crossover"]
    return [*lines, *table(names, cells), "", "## The whole chain", "",
            f"At the defaults the GVM takes {c['value']:.0f} seconds and the reward model "
            f"{c['reward']:.0f}; a step of DVPO takes {c['dvpo']:.3f} seconds and one of PPO {c['ppo']:.3f}. "
            f"So DVPO is cheaper in all after {c['steps']:.0f} RL steps."]


def main():
    parser = seeds_parser(__doc__)
    parser.set_defaults(seeds=[1, 2])
    args = parser.parse_args()
    if not args.report:
        two_at_a_time(prepare, args.seeds)
        for name in "before", "packed":
            two_at_a_time(timed, [(seed, name) for seed in args.seeds])
        two_at_a_time(gvm, [(seed, epochs) for epochs in GVM_EPOCHS for seed in args.seeds])
        two_at_a_time(rm, [(seed, epochs) for epochs in RM_EPOCHS for seed in args.seeds])
    report(args.seeds)


if __name__ == "__main__":
    main()
