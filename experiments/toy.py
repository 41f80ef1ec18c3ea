"""The toy over several seeds: a table of runs, and the page of results that it makes.

    python data/toy.py && python experiments/toy.py methods         train what is missing, then report
    python experiments/toy.py methods --report                      report what is there
    python experiments/toy.py critic --seeds 11 12                  other seeds

An experiment of your own is one more entry in EXPERIMENTS: a title, and a command for each run. {gvm} and
the other names of MODELS in a command stand for a model, which is trained first. Seeds 1 and 2 are those
that settings were chosen on; the others decide nothing. Two runs at a time, one thread each.

Writes out/seeds/SEED/runs/RUN/..., results/EXPERIMENT.json and results/EXPERIMENT.md.
"""
import argparse
import functools
import itertools
import os
import re
import subprocess
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from experiments.shared import (
    commit,
    final,
    interval,
    machine,
    reach,
    read_json,
    read_lines,
    stage,
    table,
    two_at_a_time,
    write_results,
)

# The models that RL needs, all on the seed's SFT model and on its own labelled answers
GVM = "train_gvm.py --data data/toy/gvm.jsonl {root}/labelled.jsonl"
PAIRS = "--pairs data/toy/pairs.jsonl {root}/labelled_pairs.jsonl"
RM = f"ppo_baseline.py --rm-only {PAIRS}"
MODELS = {
    "gvm": GVM, "gvm_half": f"{GVM} --epochs 0.5", "gvm_1": f"{GVM} --epochs 1", "gvm_3": f"{GVM} --epochs 3",
    "rm": RM, "rm_1": f"{RM} --rm-epochs 1",
    "plain_head": f"{GVM} --plain-head", "lambda_0": f"{GVM} --td-lambda 0",
    "lambda_1": f"{GVM} --td-lambda 1", "batch_norm": f"{GVM} --batch-norm",
    "one_pair": f"{GVM} --tau-pairs 1", "three_pairs": f"{GVM} --tau-pairs 3",
}

DVPO = "dvpo.py --gvm {gvm}"
PPO = f"ppo_baseline.py --gvm {{gvm}} --rm {{rm}} {PAIRS}"
TARGET = "--kl-target 1.2 --kl-coef 0.2"                # one KL for all
CRITIC_FREE = f"comparators/critic_free.py --rm {{rm}} {TARGET}"

# name: (title, {run: command}); differences are to the first run. Runs of one name have one command
EXPERIMENTS = {
    "methods": ("What a user might pick", {
        "DVPO": f"{DVPO} {TARGET}",
        "DVPO, no tau": f"{DVPO} {TARGET} --tau-pairs 0",
        "PPO": f"{PPO} {TARGET}",
        "DPO": f"comparators/dpo.py {PAIRS}",
        "ReMax": f"{CRITIC_FREE} --method remax",
        "GRPO": f"{CRITIC_FREE} --method grpo",
        "Dr. GRPO": f"{CRITIC_FREE} --method dr_grpo",
        "RLOO": f"{CRITIC_FREE} --method rloo",
    }),
    "critic": ("Where the value comes from", {
        "DVPO": f"{DVPO} {TARGET}",
        "PPO": f"{PPO} {TARGET}",
        "PPO, critic from the GVM, trained on": f"{PPO} {TARGET} --critic-from gvm",
        "PPO, critic from the GVM, frozen": f"{PPO} {TARGET} --critic-from gvm --freeze-critic",
        "DVPO --advantage authors": f"{DVPO} {TARGET} --advantage authors",
    }),
    "kl": ("From a KL coefficient too small and too large", {
        f"{name}, from {kl_coef}": f"{script} --kl-target 1.2 --kl-coef {kl_coef}"
        for (name, script), kl_coef in itertools.product((("DVPO", DVPO), ("PPO", PPO)), (0.05, 0.5))
    }),
    "choices": ("One choice at a time", {
        "DVPO": f"{DVPO} {TARGET}",
        "--advantage q": f"{DVPO} {TARGET} --advantage q",
        "--no-lr-decay": f"{DVPO} {TARGET} --no-lr-decay",
        **{name: f"dvpo.py --gvm {{{name}}} {TARGET}" for name in
           ("plain_head", "lambda_0", "lambda_1", "batch_norm", "one_pair", "three_pairs")},
    }),
    "cost": ("What the value costs", {
        "DVPO": f"{DVPO} {TARGET}",
        "DVPO, GVM of 0.5 passes": f"dvpo.py --gvm {{gvm_half}} {TARGET}",
        "DVPO, GVM of 1 pass": f"dvpo.py --gvm {{gvm_1}} {TARGET}",
        "DVPO, GVM of 3 passes": f"dvpo.py --gvm {{gvm_3}} {TARGET}",
        "PPO": f"{PPO} {TARGET}",
        "PPO, reward model of 1 pass": f"ppo_baseline.py --rm {{rm_1}} {PAIRS} {TARGET} --rm-epochs 1",
    }),
}


def models_of(command):
    """The names of MODELS that a command needs."""
    return [name for name in re.findall(r"\{(\w+)\}", command) if name in MODELS]


def folder(seed, run):
    """A run of one name is the same in every experiment."""
    return f"out/seeds/{seed}/runs/" + re.sub(r"[^\w.]+", "_", run)


def train(command, seed, out):
    """One command on the models of that seed."""
    root = f"out/seeds/{seed}"
    paths = {name: f"{root}/{name}/model" for name in MODELS}
    script, *flags = command.format(root=root, **paths).split()
    start = ["--seed", seed, "--init-from", f"{root}/sft/model"]
    stage(script, out, *start, *flags)


def prepare(seed, models):
    """SFT, its own answers labelled, and these models."""
    root = f"out/seeds/{seed}"
    stage("sft.py", f"{root}/sft", "--seed", seed)
    if not os.path.exists(f"{root}/labelled_pairs.jsonl"):
        label = [sys.executable, "tools/label.py", "--policy", f"{root}/sft/model"]
        label += ["--seed", str(seed), "--to", f"{root}/labelled.jsonl"]
        one_thread = dict(os.environ, OMP_NUM_THREADS="1")
        subprocess.run(label, check=True, stderr=subprocess.DEVNULL, env=one_thread)
    for name in models:
        command = MODELS[name]
        if command.startswith(RM):                      # it lies beside --out, not in it
            command += f" --rm {root}/{name}/model"
        train(command, seed, f"{root}/{name}")


def run_seed(experiment, seed):
    _, runs = EXPERIMENTS[experiment]
    prepare(seed, dict.fromkeys(name for command in runs.values() for name in models_of(command)))
    for run, command in runs.items():
        train(command, seed, folder(seed, run))


def about_model(seed, name):
    """Seconds of training, pair accuracy, and of a GVM how true its values are."""
    out = f"out/seeds/{seed}/{name}"
    found = dict(seconds=read_lines(f"{out}/metrics.jsonl")[-1]["seconds"])
    measured = read_json(f"{out}/eval.json")
    if name.startswith("rm"):
        return found | dict(accuracy=measured["accuracy"])
    return found | dict(accuracy=measured["accuracy"]["mean"], correlation=measured["true_q"]["correlation"])


def steps_to_ppo(runs, name):
    """Per seed: steps to 80 % of what PPO gains; None where there is no PPO, or never."""
    found = []
    for run, ppo in zip(runs[name], runs.get("PPO", ()), strict=False):
        level = ppo["first"] + 0.8 * (ppo["final"] - ppo["first"])
        found.append(reach(run["gold"], level) if "gold" in run else None)
    return [steps for steps in found if steps]


def report(experiment, seeds):
    title, commands = EXPERIMENTS[experiment]
    last = list(commands)[-1]
    seeds = [seed for seed in seeds if os.path.exists(folder(seed, last) + "/done")]
    if not seeds:
        sys.exit(f"error: no seed has finished {experiment}; run it without --report")
    runs = {run: [final(folder(seed, run)) for seed in seeds] for run in commands}
    names = dict.fromkeys(name for command in commands.values() for name in models_of(command))
    models = {name: [about_model(seed, name) for seed in seeds] for name in names}
    command = f"python experiments/toy.py {experiment} --seeds {' '.join(map(str, seeds))}"
    data = dict(command=command, commit=commit(), machine=machine("one thread a run", "two at a time"),
                title=title, seeds=seeds, commands=commands, runs=runs, models=models)
    write_results(experiment, data, page(data))


def page(data):
    """results/EXPERIMENT.md, from what stands in its JSON."""
    runs = data["runs"]
    first, *_ = runs
    cells = []
    for run, found in runs.items():
        row = [run]
        row += [interval([x[key] for x in found], 3) for key in ("final", "heldout")]
        row.append(interval([x["kl"] for x in found]))
        behind = [x["final"] - base["final"] for x, base in zip(found, runs[first], strict=True)]
        row.append(interval(behind, 3, "+") if run != first else "")
        steps = steps_to_ppo(runs, run)
        row.append(interval(steps, 0) if steps else "")
        row.append(interval([x["step_seconds"] for x in found]))
        cells.append(row)
    names = ["run", "gold reward, last tenth of the steps", "fresh answers", "KL, nats per response",
             f"last tenth less that of {first}", "steps to 80 % of PPO's gain", "seconds per step"]
    lines = [f"# {data['title']}", "",
             f"Toy, {len(data['seeds'])} seeds; mean and 95 % interval (Student's t). Command: "
             f"`{data['command']}`. Commit {data['commit']}. Machine: {data['machine']}.", "",
             "## Runs", "", *table(names, cells), "", "## Value models and reward models", ""]
    cells = []
    for name, found in data["models"].items():
        row = [f"`{name}`", interval([x["seconds"] for x in found], 0)]
        row.append(interval([x["accuracy"] for x in found], 3))
        true = [x["correlation"] for x in found if "correlation" in x]
        row.append(interval(true, 3) if true else "")
        cells.append(row)
    names = ["model", "seconds of training", "pair accuracy", "correlation with exact Q"]
    lines += [*table(names, cells), "", "Commands of the runs:", ""]
    return [*lines, *(f"* {run}: `{command}`" for run, command in data["commands"].items())]


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("experiment", choices=EXPERIMENTS)
    p.add_argument("--seeds", type=int, nargs="+", default=[11, 12, 13, 14, 15], help="(default: 11 to 15)")
    p.add_argument("--report", action="store_true", help="train nothing")
    args = p.parse_args(argv)
    if not args.report:
        two_at_a_time(functools.partial(run_seed, args.experiment), args.seeds)
    report(args.experiment, args.seeds)


if __name__ == "__main__":
    main()
