"""SFT and GVM on real answers of real models, from random weights, on a CPU: what tau and batch norm are
worth on text.

    python experiments/real_text.py --train alpaca_eval_train.jsonl.gz --valid alpaca_eval_valid.jsonl.gz

The files: rows {prompt, response, reward, policy}, answers of published models to AlpacaEval prompts, each
scored against GPT-4 Turbo by
a judge (tatsu-lab/alpaca_eval; the data are CC BY-NC 4.0 and not part of this project). A small GPT-2 is made
from the training texts, fine-tuned
on them, and becomes the trunk of one GVM per line of RUNS, two at a time, one thread each. Three policies are
left out of the GVM's training.
Writes out/real/..., then results/real_text.json and results/real_text.md; what has been run is not run again.
"""
import argparse
import concurrent.futures
import itertools
import json
import os
import subprocess
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np

import common
import train_gvm

UNSEEN = ("FuseChat-Llama-3.1-8B-Instruct", "jina-chat", "pythia-12b-mix-sft"
          )  # one of the best, one of the middle, one of the last
MIN_GAP = 0.1
SCRATCH = ("--vocab", 16384, "--layers", 2, "--width", 256, "--heads", 4, "--context", 384)
SFT = ("--max-length", 192, "--batch-size", 16, "--lr", 2e-3, "--max-steps", 150, "--warmup-steps", 20,
       "--grad-accum", 2)
GVM = ("--max-length", 320, "--tau-length", 40, "--batch-size", 32, "--grad-accum", 2, "--lr", 2e-3,
       "--epochs", 2, "--lora-rank", 32, "--lora-alpha", 32, "--lora-dropout", 0, "--min-gap", MIN_GAP)
RUNS = [(0, False, 1, 1), (2, False, 1, 1), (2, False, 0.95, 1), (1, False, 1, 1), (3, False, 1, 1),
        (0, True, 1, 1), (2, True, 1, 1), (1, True, 1, 1), (3, True, 1, 1), (2, False, 1, 2),
        (2, False, 1, 3)]  # tau pairs, batch norm, td_lambda, seed


def stage(script, out, *argv, threads=2):
    """Run one stage unless it has finished before; its output goes to OUT.log. -> seconds it took."""
    done = os.path.join(out, "seconds")
    if not os.path.exists(done):
        os.makedirs(out, exist_ok=True)
        begin = time.time()
        with open(out + ".log", "w") as log:
            subprocess.run([sys.executable, script, "--out", out, *map(str, argv)], stdout=log, stderr=log,
                           check=True, env=dict(os.environ, OMP_NUM_THREADS=str(threads)))
        common.write_json(done, round(time.time() - begin))
    with open(done) as f:
        return json.load(f)


def split(train, valid, folder):
    """train.jsonl, without the unseen policies; valid.jsonl, whole; sft_heldout.jsonl, a tenth of that."""
    os.makedirs(folder, exist_ok=True)
    keys = ["prompt", "response", "reward", "policy"]
    train, valid = (common.read_rows(path, keys) for path in (train, valid))
    for name, rows in ("train",
                       (r for r in train
                        if r["policy"] not in UNSEEN)), ("valid",
                                                         valid), ("sft_heldout",
                                                                  itertools.islice(valid, 0, None, 10)):
        with open(f"{folder}/{name}.jsonl", "w") as f:
            f.writelines(json.dumps(r) + "\n" for r in rows)


def yardsticks(train, valid):
    """Accuracy over the pairs of table 4 of judges who read nothing: the longer answer wins, as it is and as
    far as a GVM sees it behind 0 and 2 pairs of tau;
    the policy with the better average wins."""
    rows, known = list(common.read_rows(valid, [])), common.read_rows(train, [])
    mean = {}
    for r in known:
        mean.setdefault(r["policy"], []).append(r["reward"])

    def judge(f):
        return train_gvm.table4(rows, [(None, np.array([0.0, f(r)])) for r in rows], MIN_GAP)[0]["mean"]

    tok, data, room = common.load_tokenizer("out/real/scratch"), train_gvm.Labelled(
        [valid]), argparse.Namespace(max_length=GVM[1], tau_length=GVM[3])
    out = dict(longer_wins=judge(lambda r: len(r["response"])),
               better_average_wins=judge(lambda r: np.mean(mean[r["policy"]])))
    for pairs in (0, 2):
        taus = [
            data.tau(r["policy"], r["prompt"], pairs, np.random.default_rng([1, i]))
            for i, r in enumerate(rows)
        ]
        seen = {}
        for row, tau in zip(rows, taus, strict=True):
            begin, end, _ = train_gvm.encode(tok, row, tau, room)[1][-1]
            seen[id(row)] = end - begin
        out[f"longer_wins_seen_behind_{pairs}"] = judge(lambda r, seen=seen: seen[id(r)])
    return out


def gvm(run):
    tau, norm, td_lambda, seed = run
    out = f"out/real/gvm_tau{tau}_{'bn' if norm else 'plain'}_{td_lambda}_{seed}"
    seconds = stage("train_gvm.py", out, "--model", "out/real/sft/model", "--init-from", "out/real/sft/model",
                    "--data", "out/real/train.jsonl", "--heldout", "out/real/valid.jsonl", "--tau-pairs", tau,
                    "--td-lambda", td_lambda, "--seed", seed, "--batch-norm" if norm else "--no-batch-norm",
                    *GVM, threads=1)
    with open(f"{out}/eval.json") as f:
        return dict(tau_pairs=tau, batch_norm=norm, td_lambda=td_lambda, seed=seed, seconds=seconds,
                    **json.load(f))


def report(runs, marks, sft, seconds):
    def unseen(r):
        return train_gvm.correlation(*zip(*((p["mean_reward"], p["v0"]) for k, p in r["policies"].items()
                                            if k in UNSEEN), strict=False))

    lines = [
        "# Real text: SFT and GVM from random weights", "",
        "Command: `python experiments/real_text.py --train alpaca_eval_train.jsonl.gz --valid "
        "alpaca_eval_valid.jsonl.gz`. "
        f"Machine: {os.cpu_count()} cores; SFT on two threads ({seconds} s, held-out loss "
        f"{sft['heldout_loss']:.3f} nats a token), the GVMs two at a time, one thread each.",
        "",
        f"Settings: scratch_model {' '.join(map(str, SCRATCH))}; sft {' '.join(map(str, SFT))}; train_gvm "
        f"{' '.join(map(str, GVM))}.",
        "",
        f"Accuracy over {runs[0]['pairs']} pairs of answers to unseen prompts whose rewards differ by more "
        f"than {MIN_GAP}; the last two columns: correlation of "
        f"V(s_0 | tau) with the policies' mean rewards, over all, and over the {len(UNSEEN)} left out of "
        f"training ({', '.join(UNSEEN)}).",
        "",
        f"Yardsticks: the longer answer wins {marks['longer_wins']:.3f}, but "
        f"{marks['longer_wins_seen_behind_0']:.3f} and {marks['longer_wins_seen_behind_2']:.3f} where "
        "length is what a GVM "
        "sees of it, behind no tau and behind two pairs (--max-length cuts what is longer); the policy "
        f"with the better average wins {marks['better_average_wins']:.3f}.",
        "",
        "| tau pairs | batch norm | td_lambda | seed | mean | P1 | P5 | P10 | P90 | P95 | P99 | last | "
        "V(s_0) all | V(s_0) left out | seconds |",
        "|" + "---|" * 15
    ]
    lines += [
        f"| {r['tau_pairs']} | {'on' if r['batch_norm'] else 'off'} | {r['td_lambda']} | {r['seed']} | " +
        " | ".join(f"{v:.3f}" for v in r["accuracy"].values()) +
        f" | {r['v0_correlation']:.3f} | {unseen(r):.3f} | {r['seconds']} |" for r in runs
    ]
    with open("results/real_text.md", "w") as f:
        f.write("\n".join(lines) + "\n")
    common.write_json("results/real_text.json", dict(yardsticks=marks, sft=sft, runs=runs))
    print("\n".join(lines))


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--train", required=True, help="labelled rows to train on")
    p.add_argument("--valid", required=True, help="labelled rows on other prompts, to measure on")
    p.add_argument("--runs", type=int, default=len(RUNS),
                   help="only the first so many lines of RUNS (default: all)")
    args = p.parse_args(argv)
    split(args.train, args.valid, "out/real")
    stage("tools/scratch_model.py", "out/real/scratch", "--data", "out/real/train.jsonl", *SCRATCH)
    seconds = stage("sft.py", "out/real/sft", "--model", "out/real/scratch", "--data", "out/real/train.jsonl",
                    "--heldout", "out/real/sft_heldout.jsonl", *SFT)
    with open("out/real/sft/summary.json") as f:
        sft = json.load(f)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        runs = list(pool.map(gvm, RUNS[:args.runs]))
    report(runs, yardsticks(args.train, args.valid), sft, seconds)


if __name__ == "__main__":
    main()
