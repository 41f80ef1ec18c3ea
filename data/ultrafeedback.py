"""UltraFeedback, the paper's data (section 4.3), split by prompt into 30 % SFT, 50 % value learning, 20 % RL.

    python data/ultrafeedback.py                                downloads it at a pinned revision
    python data/ultrafeedback.py --raw FILE.jsonl [FILE ...]    reads local copies of the raw files

Writes into data/ultrafeedback/; 2 % of the prompts are held out and go to *_heldout.jsonl instead:

    sft.jsonl       {prompt, response}                      the best completion of each prompt
    gvm.jsonl       {prompt, response, reward, policy}      every completion; policy: the model that wrote it
    pairs.jsonl     {prompt, chosen, rejected, ...}         the best completion and one that scored lower
    prompts.jsonl   {prompt}

The reward is the mean of the annotators' ratings, 1 to 5, scaled to [-1, 1]; not overall_score, which once
said 10 instead of 1 for 2,628 completions. Each prompt seeds its own draw: every run writes the same files.
"""
import argparse
import collections
import os
import random
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from huggingface_hub import hf_hub_download

import common
from data.toy import write_jsonl
from runtime import flags

REPO = "openbmb/UltraFeedback"
REVISION = "40b436560ca83a8dba36114c22ab3c66e43f6d5e"
FILES = "evol_instruct false_qa flan sharegpt truthful_qa ultrachat".split()
SHARES = dict(sft=0.3, value=0.5, rl=0.2)
HELDOUT = 0.02


def rating(completion):
    """The mean rating, scaled to [-1, 1]; None if there is none."""
    annotations = (completion.get("annotations") or {}).values()
    ratings = [(annotation or {}).get("Rating") for annotation in annotations]
    numbers = [float(x) for x in ratings if x in ("1", "2", "3", "4", "5")]     # others are "N/A"
    return (sum(numbers) / len(numbers) - 3) / 2 if numbers else None


def labelled_rows(raw):
    """The completions of a raw row that have a rating and a text."""
    rows = []
    for completion in raw["completions"] or []:
        text = (completion.get("response") or "").strip()
        row = dict(prompt=raw["instruction"], response=text, reward=rating(completion),
                   policy=completion["model"])
        if text and row["reward"] is not None:
            rows.append(row)
    return rows


def make(paths, out):
    """Read the raw files, write the others -> {file: its rows}, {reason: how many were dropped}."""
    names = "sft", "gvm", "pairs", "prompts"
    files = {name + suffix: [] for name in names for suffix in ("", "_heldout")}
    dropped = collections.Counter()
    seen = set()
    for path in paths:
        for raw in common.read_rows(path, ["instruction", "completions"]):
            try:
                rows = labelled_rows(raw)
            except (AttributeError, KeyError, TypeError) as e:
                common.die(f"{path}: not a row of UltraFeedback ({e!r}): {str(raw)[:80]}")
            dropped["completions without a rating or a text"] += len(raw["completions"] or []) - len(rows)
            prompt = raw["instruction"]
            is_new = prompt not in seen
            seen.add(prompt)
            if not is_new or len(rows) < 2:
                dropped["prompts that came before, or with fewer than two completions"] += 1
                continue
            rng = random.Random(prompt)
            part, = rng.choices(list(SHARES), SHARES.values())
            suffix = "_heldout" if rng.random() < HELDOUT else ""
            best = max(rows, key=lambda row: row["reward"])
            if part == "sft":
                files["sft" + suffix].append(dict(prompt=prompt, response=best["response"]))
            elif part == "rl":
                files["prompts" + suffix].append(dict(prompt=prompt))
            else:
                files["gvm" + suffix] += rows
                # The best completion, and any one that scored lower
                if worse := [row for row in rows if row["reward"] < best["reward"]]:
                    other = rng.choice(worse)
                    files["pairs" + suffix].append(dict(
                        prompt=prompt, chosen=best["response"], rejected=other["response"],
                        chosen_policy=best["policy"], rejected_policy=other["policy"]))
    os.makedirs(out, exist_ok=True)
    for name, rows in files.items():
        write_jsonl(os.path.join(out, name + ".jsonl"), rows)
    return files, dropped


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=flags.Help)
    p.add_argument("--raw", nargs="+", help="local raw files, instead of a download")
    p.add_argument("--out", default="data/ultrafeedback", help="folder to write")
    args = p.parse_args(argv)
    if not args.raw:
        try:
            args.raw = [hf_hub_download(REPO, f"{name}.jsonl", repo_type="dataset", revision=REVISION)
                        for name in FILES]
        except OSError as e:
            common.die(f"{REPO} cannot be downloaded ({type(e).__name__}); pass local copies with --raw")
    _, dropped = make(args.raw, args.out)
    print("dropped: " + (", ".join(f"{n:,} {what}" for what, n in dropped.items() if n) or "nothing"))


if __name__ == "__main__":
    main()
