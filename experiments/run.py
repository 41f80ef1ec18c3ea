"""Tables of runs, on the toy and on SmolLM2: trains what is missing, writes a page of results.

    python data/toy.py && python experiments/run.py methods         on the toy
    python experiments/run.py critic --seeds 11 12                  other seeds
    make smollm2 && python experiments/run.py smollm2 --seeds 1     on SmolLM2
    python experiments/run.py smollm2 --report                      the page, of what is there

An experiment of your own is one more entry in EXPERIMENTS: a title, and a command for each run. {gvm} and
the other names of MODELS in a command stand for a model of the same seed, which is trained first. The toy's
seeds 1 and 2 are those that settings were chosen on; the others decide nothing. Two runs at a time, one
thread each; a run that was interrupted continues.

Writes out/seeds/SEED/runs/RUN/ (SmolLM2: out/smollm2/RUN_SEED/) and results/EXPERIMENT.json and .md.
"""
import argparse
import concurrent.futures
import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np

# The models that RL needs, all on the seed's SFT model and on its own labelled answers
GVM = "train_gvm.py --data data/toy/gvm.jsonl {root}/labelled.jsonl"
PAIRS = "--pairs data/toy/pairs.jsonl {root}/labelled_pairs.jsonl"
RM = f"ppo_baseline.py --rm-only {PAIRS}"
MODELS = {
    "gvm": GVM, "rm": RM,
    "plain_head": f"{GVM} --plain-head", "lambda_0": f"{GVM} --td-lambda 0",
    "lambda_1": f"{GVM} --td-lambda 1", "batch_norm": f"{GVM} --batch-norm",
    "one_pair": f"{GVM} --tau-pairs 1", "three_pairs": f"{GVM} --tau-pairs 3",
}

TARGET = "--kl-target 1.2 --kl-coef 0.2"                # one KL for all
DVPO = f"dvpo.py --gvm {{gvm}} {TARGET}"
PPO = f"ppo_baseline.py --gvm {{gvm}} --rm {{rm}} {PAIRS} {TARGET}"
CRITIC_FREE = f"comparators/critic_free.py --rm {{rm}} {TARGET}"

# What `make smollm2` and `make demo` leave
SMOLLM2 = "out/smollm2"
DEMO = "out/tiny"
MADE = {"smollm2": SMOLLM2, "demo": DEMO}
SMOLLM2_PAIRS = f"--pairs {SMOLLM2}/personas_pairs.jsonl {SMOLLM2}/own_pairs.jsonl"
SMOLLM2_PPO = f"ppo_baseline.py {SMOLLM2_PAIRS}"

# name: (title, {run: command}). Differences are to the first run. On the toy a run of one name, in whatever
# experiment, is trained once
EXPERIMENTS = {
    "methods": ("What a user might pick", {
        "DVPO": DVPO,
        "DVPO, no tau": f"{DVPO} --tau-pairs 0",
        "PPO": PPO,
        "ReMax": f"{CRITIC_FREE} --method remax",
        "GRPO": f"{CRITIC_FREE} --method grpo",
        "Dr. GRPO": f"{CRITIC_FREE} --method dr_grpo",
        "RLOO": f"{CRITIC_FREE} --method rloo",
    }),
    "critic": ("Where the value comes from", {
        "DVPO": DVPO,
        "PPO": PPO,
        "PPO, critic from the GVM, trained on": f"{PPO} --critic-from gvm",
        "PPO, critic from the GVM, frozen": f"{PPO} --critic-from gvm --freeze-critic",
    }),
    "choices": ("One choice at a time", {
        "DVPO": DVPO,
        "--advantage q": f"{DVPO} --advantage q",
        "--no-lr-decay": f"{DVPO} --no-lr-decay",
        **{name: f"dvpo.py --gvm {{{name}}} {TARGET}" for name in
           ("plain_head", "lambda_0", "lambda_1", "batch_norm", "one_pair", "three_pairs")},
    }),
    "smollm2": ("SmolLM2-135M-Instruct", {
        "DVPO": "dvpo.py",
        "PPO": SMOLLM2_PPO,
        "PPO, critic from the GVM, frozen": f"{SMOLLM2_PPO} --critic-from gvm --freeze-critic",
        "DVPO, no tau": "dvpo.py --tau-pairs 0",
        "DVPO --lora": "dvpo.py --lora --lr 1e-4",
        "Dr. GRPO": f"comparators/critic_free.py --method dr_grpo --rm {SMOLLM2}/rm/model --group-size 4 "
                    "--kl-target 6 --kl-coef 0.2",
    }),
    "demo": ("The demo", {"DVPO": "dvpo.py", "PPO": "ppo_baseline.py"}),
}


def root_of(experiment, seed):
    return MADE.get(experiment, f"out/seeds/{seed}")


def folder_of(experiment, run, seed):
    """Where a run writes. Those of seed 1 in MADE, DVPO's and PPO's, were made by `make`."""
    name = re.sub(r"\W+", "_", run.lower()).strip("_")
    if experiment in MADE:
        return f"{MADE[experiment]}/{name}" + (f"_{seed}" if seed > 1 else "")
    return f"out/seeds/{seed}/runs/{name}"


def models_of(command):
    """The names of MODELS that a command needs."""
    return [name for name in re.findall(r"\{(\w+)\}", command) if name in MODELS]


def is_done(out):
    """Whether a run has measured itself: a stage that was told to stop ends well, too, but without that."""
    is_model = "/runs/" not in out and os.path.basename(out) in MODELS
    return os.path.exists(f"{out}/{'eval' if is_model else 'summary'}.json")


def command_of(experiment, seed, out, command):
    """The whole command of a run, with all that the tables leave out."""
    root = root_of(experiment, seed)
    paths = {name: f"{root}/{name}/model" for name in MODELS}
    script, *words = command.format(root=root, **paths).split()
    words += ["--seed", str(seed), "--out", out, "--resume"]
    if root == SMOLLM2:
        words += ["--model", "smollm2", "--dtype", "bf16"]
    elif script != "sft.py":
        words += ["--init-from", f"{root}/sft/model"]
    return " ".join([script, *words])


def train(experiment, seed, out, command):
    """One command, unless it has finished before, on the models of that seed; its output goes to OUT.log."""
    words = command_of(experiment, seed, out, command)
    made_by = Path(out, "command")
    if made_by.exists() and made_by.read_text() != words:
        sys.exit(f"error: {out} holds another run ({made_by.read_text()}): remove it, or name another")
    if is_done(out):
        return
    os.makedirs(out, exist_ok=True)
    made_by.write_text(words)
    Path(out, "commit").write_text(commit())
    start(words, out + ".log")
    if not is_done(out):
        sys.exit(f"error: {out} was stopped; see {out}.log")


def start(command, log):
    """Run a program of this project; what it prints goes to the file `log`."""
    with open(log, "a") as f:
        done = subprocess.run([sys.executable, *command.split()], stdout=f, stderr=f,
                              env=dict(os.environ, OMP_NUM_THREADS="1"))
    if done.returncode:
        sys.exit(f"error: {command.split()[0]} failed; see {log}")


def prepare(experiment, models, seed):
    """The toy's SFT, its own answers labelled, and these models, unless `make` made them."""
    if experiment in MADE:
        return
    root = root_of(experiment, seed)
    train(experiment, seed, f"{root}/sft", "sft.py")
    if not os.path.exists(f"{root}/labelled_pairs.jsonl"):
        label = f"tools/label.py --policy {root}/sft/model --seed {seed} --to {root}/labelled.jsonl"
        start(label, f"{root}/label.log")
    for name in models:
        command = MODELS[name]
        if command.startswith(RM):                      # it lies beside --out, not in it
            command += f" --rm {root}/{name}/model"
        train(experiment, seed, f"{root}/{name}", command)


def two_at_a_time(function, jobs):
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return list(pool.map(function, jobs))


# Measurements, and the page


def read_json(path):
    return json.loads(Path(path).read_text())


def read_lines(path):
    # Behind the last line break there may be half a line, of a run that goes on
    return [json.loads(line) for line in Path(path).read_text().split("\n")[:-1]]


def commit():
    """The short hash of the commit that is checked out."""
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip()


def distinct(samples):
    """Distinct words of all answers by the number of words, in answers to the same number of prompts."""
    said = [word for row in samples for word in re.findall(r"[a-z']+", row["response"].lower())]
    return len(set(said)) / max(1, len(said))


def measure(out):
    """One run -> its fresh answers to held-out prompts, and means over the last tenth of its steps."""
    rows = read_lines(f"{out}/metrics.jsonl")
    summary = read_json(f"{out}/summary.json")
    samples = read_lines(f"{out}/samples.jsonl")
    seconds = np.diff([row["seconds"] for row in rows])
    fresh = {key: summary[key] for key in ("gold", "kl", "ended", "length")}
    found = dict(steps=len(rows), fresh=fresh, distinct=distinct(samples), samples=samples[:8],
                 peak_mb=max(row["peak_bytes"] for row in rows) / 2**20,
                 # Other programs ran beside some of the steps
                 step_seconds=float(np.percentile(seconds, 25)))
    last = rows[-max(1, len(rows) // 10):]
    late = {key: float(np.mean([row[key] for row in last])) for key in ("gold", "kl", "ended")}
    return found | dict(late=late, gold=[round(row["gold"], 4) for row in rows])


def about_model(out):
    """How a GVM or a reward model was trained, and what it tells of held-out rows."""
    rows = read_lines(f"{out}/metrics.jsonl")
    about = read_json(f"{out}/model/adapter.json")
    found = dict(updates=len(rows), seconds=rows[-1]["seconds"])
    if "accuracy" in about:                             # a reward model
        return found | dict(last=about["accuracy"])
    measured = read_json(f"{out}/eval.json")
    accuracy = measured["accuracy"]
    truth = (measured.get("true_q") or {}).get("correlation")
    return found | dict(q_std=rows[-1]["q_std"], mean=accuracy["mean"], last=accuracy["last"], truth=truth,
                        v0=measured["v0_correlation"], penalty=about["missing_eos_penalty"])


def before_rl(experiment, seeds):
    """The model that every run starts from."""
    if MADE.get(experiment) != SMOLLM2:
        gold = [read_json(f"{root_of(experiment, seed)}/sft/summary.json")["gold"] for seed in seeds]
        return dict(gold=float(np.mean(gold)))
    rows = read_lines(f"{SMOLLM2}/reference.jsonl")
    return dict(gold=float(np.mean([row["reward"] for row in rows])),
                ended=float(np.mean([row["ended"] for row in rows])),
                length=float(np.mean([len(row["ids"]) for row in rows])), distinct=distinct(rows),
                samples=[dict(prompt=row["prompt"], response=row["response"]) for row in rows[:3]])


def report(experiment, seeds, folder):
    title, commands = EXPERIMENTS[experiment]
    runs = {}
    commits = set()
    for run in commands:
        folders = {seed: folder_of(experiment, run, seed) for seed in seeds}
        done = {seed: out for seed, out in folders.items() if is_done(out)}
        if done:
            runs[run] = {seed: measure(out) for seed, out in done.items()}
        # `make` writes no such file: its runs are of the present commit
        for file in (Path(out, "commit") for out in done.values()):
            commits.add(file.read_text() if file.exists() else commit())
    if not runs:
        sys.exit(f"error: no run of {experiment} is there; start it without --report")
    seeds = sorted({seed for found in runs.values() for seed in found})
    names = dict.fromkeys(name for run in runs for name in models_of(commands[run]))
    if experiment in MADE:
        names = ("gvm", "gvm_1e-4", "gvm_paper", "rm")
    models = {}
    for name in names:
        folders = dict.fromkeys(f"{root_of(experiment, seed)}/{name}" for seed in seeds)
        found = [about_model(out) for out in folders if os.path.exists(f"{out}/model")]
        if found:
            models[name] = found
    full = {run: command_of(experiment, seeds[0], folder_of(experiment, run, seeds[0]), commands[run])
            for run in runs}
    command = f"python experiments/run.py {experiment} --seeds {' '.join(map(str, seeds))}"
    data = dict(title=title, command=command, commit=", ".join(sorted(commits)),
                machine=f"{os.cpu_count()} cores, one thread a run, two at a time", commands=full,
                before=before_rl(experiment, seeds), runs=runs, models=models)
    os.makedirs(folder, exist_ok=True)
    Path(folder, f"{experiment}.json").write_text(json.dumps(data, indent=1))
    text = "\n".join(page(data)) + "\n"
    Path(folder, f"{experiment}.md").write_text(text)
    print(text, end="")


# Student's t at 95 %, for 2 to 10 seeds
T95 = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def reach(gold, level, window=5):
    """Steps until the gold reward, a mean over `window` steps, is at this level; None: never."""
    smooth = np.convolve(gold, np.ones(window) / window, "valid")
    there = np.nonzero(smooth >= level)[0]
    return int(there[0]) + window if len(there) else None


def interval(x, digits=2, sign=""):
    """Mean of several seeds with its 95 % interval; of one seed, the mean alone."""
    x = np.array(x, dtype=float)
    if not len(x):
        return "never"
    mean = f"{x.mean():{sign}.{digits}f}"
    if not 1 < len(x) < len(T95) + 2:
        return mean
    return f"{mean} ± {T95[len(x) - 2] * x.std(ddof=1) / len(x) ** 0.5:.{digits}f}"


def table(names, rows):
    """A Markdown table -> its lines."""
    return ["| " + " | ".join(map(str, row)) + " |" for row in (names, ["---"] * len(names), *rows)]


def summary(data):
    """A short table of means over the seeds, of fresh answers."""
    penalty = np.mean([gvm["penalty"] for gvm in data["models"].get("gvm", [])] or [np.nan])
    start = data["before"]
    rows = [["before RL", "", start, start.get("distinct"), None, None]]
    for run, found in data["runs"].items():
        fresh = {key: np.mean([x["fresh"][key] for x in found.values()])
                 for key in ("gold", "kl", "ended", "length")}
        others = [np.mean([x[key] for x in found.values()])
                  for key in ("distinct", "step_seconds", "peak_mb")]
        rows.append([run, len(found), fresh, *others])
    cells = []
    for run, seeds, fresh, words, seconds, peak in rows:
        paid = None
        if "ended" in fresh and np.isfinite(penalty):
            paid = fresh["gold"] - penalty * (1 - fresh["ended"])
        numbers = [(fresh["gold"], 3), (paid, 3), (fresh.get("kl", 0.0), 2), (fresh.get("ended"), 2),
                   (fresh.get("length"), 1), (words, 2), (seconds, 2), (peak, 0)]
        cells.append([run, seeds, *("" if x is None else f"{x:.{digits}f}" for x, digits in numbers)])
    return table(["fresh answers", "seeds", "reward", "less penalty", "KL", "ended", "tokens",
                  "distinct words", "seconds per step", "peak MB"], cells)


def runs_table(data):
    """Every run with intervals over its seeds, and how soon it has 80 % of what PPO gains."""
    first, *_ = data["runs"]
    base = data["runs"][first]
    level = np.inf
    if ppo := data["runs"].get("PPO", {}).values():
        start = np.mean([run["gold"][0] for run in ppo])
        level = start + 0.8 * (np.mean([run["late"]["gold"] for run in ppo]) - start)
    cells = []
    for run, found in data["runs"].items():
        row = [run]
        for part in "late", "fresh":
            row += [interval([x[part][key] for x in found.values()], digits)
                    for key, digits in (("gold", 3), ("kl", 2))]
        behind = [x["late"]["gold"] - base[seed]["late"]["gold"] for seed, x in found.items()
                  if seed in base]
        row.append(interval(behind, 3, "+") if behind and run != first else "")
        steps = [(reach(x["gold"], level), x["step_seconds"]) for x in found.values()]
        there = [(n, n * seconds) for n, seconds in steps if n]
        missed = f" ({len(there)} of {len(steps)} seeds)" if 0 < len(there) < len(steps) else ""
        row += [interval(x, 0) + missed for x in zip(*there, strict=True)] or ["", ""]
        cells.append(row)
    return table(["run", "reward, last tenth", "KL, last tenth", "reward, fresh", "KL, fresh",
                  f"last tenth less that of {first}", "steps to 80 % of PPO's gain", "seconds to there"],
                 cells)


def models_table(data):
    columns = {"updates": 0, "seconds": 0, "q_std": 3, "mean": 3, "last": 3, "v0": 3, "truth": 3}
    cells = []
    for name, found in data["models"].items():
        numbers = [[x[key] for x in found if x.get(key) is not None] for key in columns]
        cells.append([f"`{name}`", *(interval(x, digits) if x else "" for x, digits in
                                     zip(numbers, columns.values(), strict=True))])
    return table(["model", "updates", "seconds", "sigma of Q", "pairs, mean token value", "pairs, last token",
                  "V(s_0) and mean rewards, correlation", "exact Q, correlation"], cells)


def page(data):
    """results/EXPERIMENT.md, from what stands in its JSON."""
    lines = [f"# {data['title']}", "",
             f"Command: `{data['command']}`. Runs of commit {data['commit']}. Machine: {data['machine']}. "
             "± is the 95 % interval over seeds (Student's t). Last tenth: of the steps, a mean. "
             "Less penalty: an answer that was cut counts less by the penalty of the GVM's training. KL in "
             "nats per response. Seconds per step: the lower quartile, as other programs ran beside some.",
             "",
             "## Summary", "", *summary(data), "", "## Runs", "", *runs_table(data), "",
             "## Value models and reward models", "", *models_table(data), ""]
    for answer in data["before"].get("samples", []):
        lines += [f"> {answer['prompt']}", "", f"* before: {answer['response']!r}"]
        for run in "DVPO", "PPO":
            samples = next(iter(data["runs"].get(run, {}).values()), {}).get("samples", [])
            said = [row["response"] for row in samples if row["prompt"] == answer["prompt"]]
            lines += [f"* {run}: {text!r}" for text in said[:1]]
        lines.append("")
    return [*lines, "Commands of the first seed:", "",
            *(f"* {run}: `{command}`" for run, command in data["commands"].items())]


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("experiment", choices=EXPERIMENTS)
    p.add_argument("--seeds", type=int, nargs="+", help="(default: 11 to 15; of what `make` made: 1 to 3)")
    p.add_argument("--runs", nargs="+", help="only these, by name")
    p.add_argument("--report", action="store_true", help="train nothing")
    p.add_argument("--to", default="results", help="folder to write (default: results)")
    args = p.parse_args(argv)
    experiment = args.experiment
    _, commands = EXPERIMENTS[experiment]
    if unknown := set(args.runs or ()) - set(commands):
        p.error(f"--runs {', '.join(unknown)}: not in {experiment}, which has {', '.join(commands)}")
    seeds = args.seeds or ([1, 2, 3] if experiment in MADE else [11, 12, 13, 14, 15])
    if not args.report:
        chosen = {run: commands[run] for run in args.runs or commands}
        models = dict.fromkeys(name for command in chosen.values() for name in models_of(command))
        two_at_a_time(functools.partial(prepare, experiment, models), seeds)
        jobs = [(seed, folder_of(experiment, run, seed), chosen[run]) for seed in seeds for run in chosen]
        two_at_a_time(lambda job: train(experiment, *job), jobs)
    report(experiment, seeds, args.to)


if __name__ == "__main__":
    main()
