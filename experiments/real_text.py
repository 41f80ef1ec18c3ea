"""What a tau gives on real answers: GVMs with and without one, and a reward model, on SmolLM2-135M.

    python data/smollm2.py                          or the first lines of `make smollm2`: the model
    python experiments/real_text.py --train alpaca_eval_train.jsonl.gz --valid alpaca_eval_valid.jsonl.gz

The files: rows {prompt, response, reward, policy}, answers of published models to AlpacaEval prompts, each
scored against GPT-4 Turbo by a judge (tatsu-lab/alpaca_eval; CC BY-NC 4.0, not part of this project).

1. Prompts and answers are cut to their first tokens, so that all runs see the same and length says little.
2. The trunk is SmolLM2-135M-Instruct as it is. Three policies are left out of the training.
3. GVMs with and without a tau train on the rewards. All runs train on equally many answers of equal length.
4. Pairs of the same rows: a GVM on rewards +1 and -1 beside a Bradley-Terry loss on the last value, which is
   the reward model of ppo_baseline.py.
5. Table 4 on unseen prompts. Rows that are measured stand behind a tau of prompts that are not, one tau for
   each policy and a few prompts, as in RL: it is read once.

Writes out/real/..., results/real_text.json and .md; what has been run is not run again.
"""
import argparse
import itertools
import json
import os
import resource
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np
import torch

import common
import train_gvm
from experiments.seeds import read, rows_of
from experiments.shared import commit, interval, machine, stage, table, write_results

UNSEEN = "FuseChat-Llama-3.1-8B-Instruct", "jina-chat", "pythia-12b-mix-sft"    # good, middling, poor
MIN_GAP = 0.1                                           # of the rewards of a pair
PROMPT, RESPONSE = 40, 64                               # tokens that are left of each
MEASURED, SHARE_TAU = 40, 10                            # prompts of --valid; rows behind one tau
MODEL = "data/smollm2/model"
COMMON = "--model", "smollm2", "--init-from", MODEL, "--dtype", "bf16", "--resume"
GVM = ("--max-length", 720, "--tau-length", RESPONSE + 1, "--td-lambda", 1, "--min-gap", MIN_GAP,
       "--heldout", "out/real/few.jsonl")               # measured below
RM = ("--rm-only", "--data", "out/real/train.jsonl", "--heldout", "out/real/few.jsonl", "--max-length", 720,
      "--pairs", "out/real/pairs.jsonl", "--pairs-heldout", "out/real/few_pairs.jsonl")
ARMS = {                                                # 12 answers per update each
    "tau": ("--data", "out/real/train.jsonl", "--tau-pairs", 2, "--batch-size", 4),
    "no tau": ("--data", "out/real/train.jsonl", "--tau-pairs", 0, "--batch-size", 12),
    "pairs, Bradley-Terry": ("--rm-batch-size", 6),
    "pairs, +1 and -1": ("--data", "out/real/pairs.jsonl", "--tau-pairs", 0, "--batch-size", 12),
}
GAINS = {                                               # of what, over what: runs and their statistics
    "a tau": (("tau", "mean"), ("no tau", "mean")),
    "Bradley-Terry over rewards": (("pairs, Bradley-Terry", "last"), ("no tau", "mean")),
    "Bradley-Terry over +1 and -1": (("pairs, Bradley-Terry", "last"), ("pairs, +1 and -1", "mean")),
}
DRAWS = 10_000                                          # of the bootstrap over prompts


def folder(arm, seed):
    return "out/real/" + arm.replace(",", "").replace(" ", "_") + f"_{seed}"


def write(path, rows):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)


def by_prompt(rows):
    """-> [[number of a row, ...] of each prompt], in the order of the file."""
    groups = {}
    for i, row in enumerate(rows):
        groups.setdefault(row["prompt"], []).append(i)
    return list(groups.values())


def pairs_of(rows):
    """Pairs {prompt, chosen, rejected} of rows on one prompt whose rewards differ."""
    pairs = []
    for group in by_prompt(rows):
        for i, j in itertools.permutations(group, 2):
            if rows[i]["reward"] > rows[j]["reward"] + MIN_GAP:
                texts = dict(chosen=rows[i]["response"], rejected=rows[j]["response"])
                pairs.append(dict(prompt=rows[i]["prompt"], **texts))
    return pairs


def prepare(train, valid):
    """Of rows that are cut: what is trained on, what is measured, what gives a tau, and a few to warm up."""
    tok = common.load_tokenizer(MODEL)
    found = {}
    for name, path in ("train", train), ("valid", valid):
        rows = common.read_rows(path, ["prompt", "response", "reward", "policy"])
        for row in rows:
            row["length"] = len(row["response"])        # of the whole answer, for a yardstick
            for key, most in ("prompt", PROMPT), ("response", RESPONSE):
                row[key] = tok.decode(tok(row[key], add_special_tokens=False)["input_ids"][:most])
        found[name] = rows
    seen = [row for row in found["train"] if row["policy"] not in UNSEEN]
    groups = by_prompt(found["valid"])
    measured, tau = ([found["valid"][i] for group in part for i in group]
                     for part in (groups[:MEASURED], groups[MEASURED:]))
    few = tau[:24]
    files = dict(train=seen, measured=measured, tau=tau, few=few, pairs=pairs_of(seen))
    for name, rows in (files | dict(valid=found["valid"], few_pairs=pairs_of(few))).items():
        write(f"out/real/{name}.jsonl", rows)
    means = {}
    for row in found["train"]:
        means.setdefault(row["policy"], []).append(row["reward"])
    return {policy: float(np.mean(rewards)) for policy, rewards in means.items()}


def train(arm, seed, steps):
    """One run; its CPU seconds, which other programs on this machine leave alone, go to seconds.json."""
    out = folder(arm, seed)
    flags = *COMMON, *ARMS[arm], "--seed", seed
    if arm == "pairs, Bradley-Terry":
        script, flags = "ppo_baseline.py", (*flags, *RM, "--rm", f"{out}/model", "--rm-max-steps", steps)
    else:
        script, flags = "train_gvm.py", (*flags, *GVM, "--max-steps", steps)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    stage(script, out, *flags)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if not os.path.exists(f"{out}/seconds.json"):
        spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        common.write_json(f"{out}/seconds.json", spent)


@torch.no_grad()
def row_values(model, tok, rows, taus, meta, seed):
    """Values of all rows, [(T+1,)]: where meta names --tau-pairs, behind a tau, drawn for SHARE_TAU rows."""
    name, pairs, values = meta["name"], meta.get("tau_pairs", 0), [None] * len(rows)
    for number, (policy, index) in enumerate(rows.by_policy.items()):
        for start in range(0, len(index), SHARE_TAU):
            some = index[start:start + SHARE_TAU]
            drawn = taus.tau(policy, None, pairs, np.random.default_rng([seed, number, start]))
            drawn = [(common.encode_prompt(tok, r["prompt"]), common.encode_row(tok, r)) for r in drawn]
            room, tau_length = meta["max_length"] // 2, meta.get("tau_length", 0)
            tau, _ = common.prepend_tau(tok, drawn, [], room, tau_length)
            prompts = [common.encode_prompt(tok, rows[i]["prompt"]) for i in some]
            prompts = [common.append_to_prefix(tok, tau, p)[len(tau):] for p in prompts]
            responses = [common.encode_row(tok, rows[i]) for i in some]
            ids, attn, mask = common.frame(prompts, responses)
            cache = common.read_prefix(model, tau, name, name, "cpu")
            q = model(ids, attn, mask.shape[1], name, head=name, cache=cache and cache(len(some)))
            for i, response, own in zip(some, responses, q.numpy(), strict=True):
                values[i] = own[:len(response) + 1]
    return values


def measure(arm, seed):
    """One run -> {statistic: its number for each row that is measured}; kept beside the run."""
    path = f"{folder(arm, seed)}/values.json"
    if not os.path.exists(path):
        tok = common.load_tokenizer(MODEL)
        model = common.load_model(MODEL, argparse.Namespace(dtype="bf16"), trainable=False).eval()
        saved, made_by = f"{folder(arm, seed)}/model", "python experiments/real_text.py"
        meta = common.load_adapter(model, tok, saved, made_by)
        rows, taus = (train_gvm.Labelled([f"out/real/{name}.jsonl"]) for name in ("measured", "tau"))
        values = row_values(model, tok, rows, taus, meta, seed)
        stats = dict(mean=[q[1:].mean() for q in values], last=[q[-1] for q in values])
        if meta.get("tau_pairs"):
            stats["v0"] = [q[0] for q in values]
        if meta["name"] == "rm":                        # trained at the last token alone
            del stats["mean"]
        common.write_json(path, {key: [float(x) for x in numbers] for key, numbers in stats.items()})
    return read(path)


def right_pairs(rows, numbers):
    """Table 4 by prompt, (prompts, 2, 2): [pairs in the right order, pairs] of all, and of those with an
    answer of a policy left out. A tie counts one half."""
    found = []
    for group in by_prompt(rows):
        counts = np.zeros((2, 2))
        for i, j in itertools.combinations(group, 2):
            gap = rows[i]["reward"] - rows[j]["reward"]
            if abs(gap) > MIN_GAP:
                right = (np.sign(numbers[i] - numbers[j]) * np.sign(gap) + 1) / 2
                unseen = {rows[i]["policy"], rows[j]["policy"]} & {*UNSEEN}
                counts += [[right, 1], [right * bool(unseen), bool(unseen)]]
        found.append(counts)
    return np.array(found)


def accuracies(counts):
    """right_pairs -> accuracy over all pairs, and over those with a policy left out."""
    right, pairs = counts.sum(-3)[..., 0], counts.sum(-3)[..., 1]
    return right / pairs


def gain(ours, theirs):
    """Difference of two lists of right_pairs, one per seed -> by interval over seeds, and by bootstrap: a
    mean and the 2.5 and 97.5 percentiles when the prompts, the same for both, are drawn anew."""
    seeds = np.array([accuracies(a) - accuracies(b) for a, b in zip(ours, theirs, strict=True)])
    draws, rng = [], np.random.default_rng(0)
    for _ in range(DRAWS):
        index = rng.integers(len(ours[0]), size=len(ours[0]))
        draws.append(np.mean([accuracies(a[index]) - accuracies(b[index])
                              for a, b in zip(ours, theirs, strict=True)], 0))
    low, high = np.percentile(draws, (2.5, 97.5), axis=0)
    return dict(seeds=seeds.tolist(), mean=seeds.mean(0).tolist(), low=low.tolist(), high=high.tolist())


def yardsticks(rows, means):
    """Judges who read nothing: the longer answer wins, whole and cut; the better policy wins."""
    tok = common.load_tokenizer(MODEL)
    by = {"the longer answer wins": [row["length"] for row in rows],
          f"... of their first {RESPONSE} tokens": [len(tok(row["response"])["input_ids"]) for row in rows],
          "the better policy wins": [means[row["policy"]] for row in rows]}
    return {name: accuracies(right_pairs(rows, numbers)).tolist() for name, numbers in by.items()}


def report(jobs, means, flags):
    rows, runs, counts = train_gvm.Labelled(["out/real/measured.jsonl"]), [], {}
    rewards = [np.mean([rows[i]["reward"] for i in index]) for index in rows.by_policy.values()]
    for arm, seed in jobs:
        stats = measure(arm, seed)
        out = folder(arm, seed)
        run = dict(arm=arm, seed=seed, updates=len(rows_of(f"{out}/metrics.jsonl")),
                   seconds=read(f"{out}/seconds.json"))
        for key, numbers in stats.items():
            counts[arm, seed, key] = right_pairs(rows, numbers)
            run[key] = accuracies(counts[arm, seed, key]).tolist()
        if "v0" in stats:
            averages = [np.mean([stats["v0"][i] for i in index]) for index in rows.by_policy.values()]
            run["v0_correlation"] = train_gvm.correlation(rewards, averages)
        runs.append(run)
    gains = {}
    for title, (ours, theirs) in GAINS.items():
        seeds = [seed for arm, seed in jobs if arm == ours[0] and (theirs[0], seed) in jobs]
        if seeds:
            mine, other = ([counts[arm, seed, key] for seed in seeds] for arm, key in (ours, theirs))
            gains[title] = gain(mine, other)
    about = dict(commit=commit(), command=f"python experiments/real_text.py {flags}",
                 machine=machine("one thread, one run at a time"))
    data = dict(about, prompts=len(by_prompt(rows)), rows=len(rows),
                pairs=int(right_pairs(rows, np.zeros(len(rows)))[:, 0, 1].sum()),
                yardsticks=yardsticks(rows, means), runs=runs, gains=gains)
    data["yardsticks_of_all"] = yardsticks(common.read_rows("out/real/valid.jsonl", ["prompt"]), means)
    write_results("real_text", data, page(data))


def page(data):
    """results/real_text.md."""
    gvm, rm = (" ".join(map(str, flags)) for flags in ((*COMMON, *GVM), (*COMMON, *RM)))
    arms = [f"{arm}: {' '.join(map(str, flags))}" for arm, flags in ARMS.items()]
    lines = ["# Real text: what a tau gives", "",
             f"Command: `{data['command']}`. Commit {data['commit']}. Machine: {data['machine']}.", "",
             f"Trunk: SmolLM2-135M-Instruct. GVMs: {gvm}. Reward model: {rm}. "
             f"{'; '.join(arms)}. CPU seconds: of the whole program, whatever ran beside it.", "",
             f"Pair accuracy over {data['pairs']:,} pairs of {data['rows']} answers to {data['prompts']} "
             f"unseen prompts, cut to {RESPONSE} tokens, rewards more than {MIN_GAP} apart. left out: pairs "
             f"with an answer of {', '.join(UNSEEN)}, on which nothing was trained.", ""]
    cells = []
    for name, found in data["yardsticks"].items():
        cells.append([name, *(f"{x:.3f}" for x in found + data["yardsticks_of_all"][name])])
    names = ["yardstick", "all pairs", "left out", "all prompts of the file: all pairs", "left out"]
    lines += [*table(names, cells), ""]
    cells = []
    for run in data["runs"]:
        by = []
        for key in "mean", "last", "v0":
            by += [f"{x:.3f}" for x in run[key]] if key in run else ["", ""]
        follows = f"{run['v0_correlation']:.3f}" if "v0_correlation" in run else ""
        cells.append([run["arm"], run["seed"], run["updates"], f"{run['seconds']:.0f}", *by, follows])
    names = ["run", "seed", "updates", "CPU seconds", "mean token value", "left out", "last value",
             "left out", "V(s_0) behind tau", "left out", "its correlation with mean rewards"]
    lines += [*table(names, cells), ""]
    for title, found in data["gains"].items():
        parts = []
        for k, part in enumerate(("all pairs", "left out")):
            by_seed = [seed[k] for seed in found["seeds"]]
            spread = f"{interval(by_seed, 3, '+')} (seeds: {len(by_seed)})"
            drawn = f"{found['low'][k]:+.3f} to {found['high'][k]:+.3f} over prompts"
            parts.append(f"{part} {spread}, {drawn}")
        read_by = " less ".join(f"{arm}, {dict(mean='mean token', last='last')[key]} value"
                                for arm, key in GAINS[title])
        lines += [f"Gain of {title} ({read_by}): {'; '.join(parts)}.", ""]
    return [*lines, "Over seeds: mean and 95 % interval (Student's t), on these prompts. Over prompts: 95 % "
            "interval of a bootstrap over the prompts of these runs."]


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--train", required=True, help="labelled rows to train on")
    p.add_argument("--valid", required=True, help="labelled rows on other prompts, to measure on")
    p.add_argument("--steps", type=int, default=45, help="updates of each run")
    p.add_argument("--seeds", type=int, nargs="+", default=[1, 2], help="of the GVMs with and without a tau")
    p.add_argument("--pair-seeds", type=int, nargs="*", default=[1], help="of the runs on pairs")
    p.add_argument("--report", action="store_true", help="of the runs that are there; train nothing")
    args = p.parse_args(argv)
    torch.set_num_threads(1)
    means = prepare(args.train, args.valid)
    names = list(ARMS)
    jobs = [(arm, seed) for seed in args.seeds for arm in names[:2]]
    jobs += [(arm, seed) for seed in args.pair_seeds for arm in names[2:]]
    if args.report:
        jobs = [job for job in jobs if os.path.exists(f"{folder(*job)}/values.json")]
    for job in jobs if not args.report else ():
        train(*job, args.steps)
        measure(*job)
    flags = ["--train", os.path.basename(args.train), "--valid", os.path.basename(args.valid),
             "--steps", args.steps, "--seeds", *args.seeds, "--pair-seeds", *args.pair_seeds]
    report(jobs, means, " ".join(map(str, flags)))


if __name__ == "__main__":
    main()
