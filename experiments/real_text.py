"""What a tau gives on real answers: GVMs with and without one, on a small Llama that knows the data.

    python experiments/real_text.py --train alpaca_eval_train.jsonl.gz --valid alpaca_eval_valid.jsonl.gz

The files: rows {prompt, response, reward, policy}, answers of published models to AlpacaEval prompts, each
scored against GPT-4 Turbo by a judge (tatsu-lab/alpaca_eval; CC BY-NC 4.0, not part of this project).

1. Prompts and answers are cut to their first tokens, so that all GVMs see the same and length says little.
2. The trunk is a Llama from random weights, trained on packed conversations of one policy (sft.py --pack).
3. GVMs with and without a tau train side by side for equal seconds; three policies are left out.
4. Table 4 on unseen prompts, by the mean token value and by V(s_0 | tau).

Writes out/real/..., results/real_text.json and .md; what has been run is not run again.
"""
import argparse
import json
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np

import common
import train_gvm
from experiments.seeds import read, rows_of
from experiments.shared import commit, interval, machine, stage, table, two_at_a_time, write_results

UNSEEN = "FuseChat-Llama-3.1-8B-Instruct", "jina-chat", "pythia-12b-mix-sft"    # good, middling, poor
MIN_GAP = 0.1                                           # of the rewards of a pair
PROMPT, RESPONSE = 40, 64                               # tokens that are left of each
SCRATCH = "--vocab", 8192, "--layers", 4, "--width", 192, "--heads", 4, "--context", 640
SFT = ("--pack", 2, "--tau-length", RESPONSE + 1, "--max-length", 576, "--batch-size", 8, "--lr", 2e-3,
       "--warmup-steps", 50, "--max-new-tokens", RESPONSE, "--grad-accum", 1)
GVM = ("--max-length", 576, "--tau-length", RESPONSE + 1, "--lr", 2e-3, "--td-lambda", 1, "--lora-rank", 32,
       "--lora-alpha", 32, "--lora-dropout", 0, "--min-gap", MIN_GAP, "--grad-accum", 1)
ARMS = {"tau": ("--tau-pairs", 2, "--batch-size", 12), "no tau": ("--tau-pairs", 0, "--batch-size", 36)}
SFT_STEPS, STEPS = 1500, {"tau": 300, "no tau": 330}    # of both arms: equal seconds
SEEDS = 1, 2, 3, 4
TAUS = 8                                                # drawn per row, for their average


def folder(arm, seed, share=1):
    return f"out/real/{arm.replace(' ', '_')}_{seed}" + (f"_{share}" if share != 1 else "")


def cut(tok, text, tokens):
    return tok.decode(tok(text, add_special_tokens=False)["input_ids"][:tokens])


def prepare(train, valid):
    """train.jsonl without the unseen policies, valid.jsonl, and a tenth of it for sft.py; all cut."""
    for name, source in ("whole", train), ("whole_valid", valid):
        rows = common.read_rows(source, ["prompt", "response", "reward", "policy"])
        write(f"out/real/{name}.jsonl", rows)
    stage("tools/scratch_model.py", "out/real/scratch", "--data", "out/real/whole.jsonl", *SCRATCH)
    tok = common.load_tokenizer("out/real/scratch")
    for name, to in ("whole", "train"), ("whole_valid", "valid"):
        rows = []
        for row in common.read_rows(f"out/real/{name}.jsonl", ["prompt", "response"]):
            lengths = dict(prompt=PROMPT, response=RESPONSE)
            rows.append(row | {key: cut(tok, row[key], most) for key, most in lengths.items()})
        write(f"out/real/{to}.jsonl", [r for r in rows if to == "valid" or r["policy"] not in UNSEEN])
    write("out/real/sft_heldout.jsonl", rows[::10])


def write(path, rows):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)


def gvm(job):
    arm, seed, share = job
    stage("train_gvm.py", folder(*job), "--model", "out/real/sft/model", "--init-from", "out/real/sft/model",
          "--data", "out/real/train.jsonl", "--heldout", "out/real/valid.jsonl", "--seed", seed,
          *GVM, *ARMS[arm], "--max-steps", round(share * STEPS[arm]))


def accuracies(rows, values):
    """Table 4 by one number per row: all pairs, and the pairs with an answer of a policy left out."""
    table4 = train_gvm.table4(rows, [(None, np.array([0.0, value])) for value in values], MIN_GAP)
    by_prompt, right = {}, []
    for row, value in zip(rows, values, strict=True):
        by_prompt.setdefault(row["prompt"], []).append((row, value))
    for group in by_prompt.values():
        for k, (a, x) in enumerate(group):
            for b, y in group[:k]:
                if abs(a["reward"] - b["reward"]) > MIN_GAP and {a["policy"], b["policy"]} & {*UNSEEN}:
                    right.append((np.sign(x - y) * np.sign(a["reward"] - b["reward"]) + 1) / 2)
    return table4[0]["mean"], float(np.mean(right))


def token_values(model, tok, rows, meta, seed):
    """Of every row behind a tau, drawn from `seed`."""
    taus = []
    for i, row in enumerate(rows):
        rng = np.random.default_rng([seed, i])
        taus.append(rows.tau(row["policy"], row["prompt"], meta["tau_pairs"], rng))
    args = argparse.Namespace(**meta)
    return [q for _, q in train_gvm.token_values(model, tok, rows, taus, args, "cpu")]


def measure(job):
    """One GVM: accuracies by each statistic, and how V(s_0 | tau) follows the policies' mean rewards."""
    arm, seed, share = job
    tok = common.load_tokenizer("out/real/sft/model")
    model = common.load_model("out/real/sft/model", trainable=False).eval()
    meta = common.load_adapter(model, tok, f"{folder(*job)}/model", "python experiments/real_text.py")
    rows = train_gvm.Labelled(["out/real/valid.jsonl"])
    values = token_values(model, tok, rows, meta, seed)
    seconds = rows_of(f"{folder(*job)}/metrics.jsonl")[-1]["seconds"]
    found = dict(arm=arm, seed=seed, share=share, seconds=seconds,
                 mean=accuracies(rows, [q[1:].mean() for q in values]))
    if meta["tau_pairs"]:
        v0 = [np.array([q[0] for q in values])]
        for draw in range(1, TAUS if share == 1 else 1):
            drawn = token_values(model, tok, rows, meta, 100 * draw + seed)
            v0.append(np.array([q[0] for q in drawn]))
        rewards = [np.mean([rows[i]["reward"] for i in index]) for index in rows.by_policy.values()]
        averages = [np.mean(v0[0][index]) for index in rows.by_policy.values()]
        found |= dict(v0=accuracies(rows, v0[0]), v0_correlation=train_gvm.correlation(rewards, averages))
        if len(v0) > 1:
            found["v0_averaged"] = accuracies(rows, np.mean(v0, 0))
    return found


def yardsticks():
    """Judges who read nothing: the longer answer wins, whole and cut; the better policy wins."""
    tok = common.load_tokenizer("out/real/scratch")
    whole = common.read_rows("out/real/whole_valid.jsonl", ["response"])
    rows = common.read_rows("out/real/valid.jsonl", ["response"])
    mean = {}
    for row in common.read_rows("out/real/whole.jsonl", ["policy"]):
        mean.setdefault(row["policy"], []).append(row["reward"])
    seen = [len(tok(row["response"])["input_ids"]) for row in rows]
    return {"the longer answer wins": accuracies(whole, [len(row["response"]) for row in whole]),
            f"... of their first {RESPONSE} tokens": accuracies(rows, seen),
            "the better policy wins": accuracies(rows, [np.mean(mean[row["policy"]]) for row in rows])}


def report(jobs):
    runs = two_at_a_time(measure, jobs)
    sft, spent = read("out/real/sft/summary.json"), rows_of("out/real/sft/metrics.jsonl")[-1]["seconds"]
    files = "--train alpaca_eval_train.jsonl.gz --valid alpaca_eval_valid.jsonl.gz"
    command = f"python experiments/real_text.py {files}"
    data = dict(commit=commit(), command=command, machine=machine("one thread a run", "two runs at a time"),
                yardsticks=yardsticks(), sft=dict(sft, seconds=spent), runs=runs)
    train = [" ".join(map(str, flags)) for flags in (SCRATCH, SFT, GVM)]
    lines = ["# Real text: what a tau gives", "",
             f"Command: `{command}`. Commit {data['commit']}. Machine: {data['machine']}.", "",
             f"Trunk: scratch_model {train[0]}; sft {train[1]} --max-steps {SFT_STEPS}: {spent:.0f} seconds, "
             f"held-out loss {sft['heldout_loss']:.3f} nats per token. GVMs: {train[2]}.", "",
             f"Pair accuracy over answers to unseen prompts, cut to {RESPONSE} tokens, rewards more than "
             f"{MIN_GAP} apart. left out: pairs with an answer of {', '.join(UNSEEN)}, which no GVM was "
             "trained on. share: of the usual length of training.", ""]
    cells = [[name, *(f"{x:.3f}" for x in found)] for name, found in data["yardsticks"].items()]
    lines += [*table(["yardstick", "all pairs", "left out"], cells), ""]
    cells = []
    for run in runs:
        by = [f"{x:.3f}" for key in ("mean", "v0", "v0_averaged") for x in run.get(key, [])]
        by += [""] * (6 - len(by))
        follows = f"{run['v0_correlation']:.3f}" if "v0_correlation" in run else ""
        cells.append([run["arm"], run["seed"], run["share"], f"{run['seconds']:.0f}", *by, follows])
    names = ["GVM", "seed", "share", "seconds", "mean token value", "left out", "V(s_0) behind tau",
             "left out", f"averaged over {TAUS} tau", "left out", "its correlation with mean rewards"]
    lines += [*table(names, cells), ""]
    whole = {(run["arm"], run["seed"]): run["mean"] for run in runs if run["share"] == 1}
    gains = np.array([np.subtract(whole["tau", seed], whole["no tau", seed]) for seed in SEEDS])
    every, left_out = (interval(gain, 3, "+") for gain in gains.T)
    lines.append("Gain of a tau in the accuracy of the mean token value, mean and 95 % interval over seeds: "
                 f"{every}; left out: {left_out}.")
    write_results("real_text", data, lines)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--train", required=True, help="labelled rows to train on")
    p.add_argument("--valid", required=True, help="labelled rows on other prompts, to measure on")
    p.add_argument("--shares", type=float, nargs="*", default=[], help="of training, too, seed 1")
    args = p.parse_args(argv)
    prepare(args.train, args.valid)
    stage("sft.py", "out/real/sft", "--model", "out/real/scratch", "--data", "out/real/train.jsonl",
          "--heldout", "out/real/sft_heldout.jsonl", *SFT, "--max-steps", SFT_STEPS)
    jobs = [(arm, seed, 1) for seed in SEEDS for arm in ARMS]
    jobs += [(arm, 1, share) for share in args.shares for arm in ARMS]
    two_at_a_time(gvm, jobs)
    report(jobs)


if __name__ == "__main__":
    main()
