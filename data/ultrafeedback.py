"""UltraFeedback, the paper's data (section 4.3): split by prompt into 30 % SFT, 50 % value (or reward)
learning, 20 % RL.

    python data/ultrafeedback.py                                downloads it at a pinned revision
    python data/ultrafeedback.py --raw FILE.jsonl [FILE ...]    from local copies of the raw files
    python data/ultrafeedback.py --raw FILE.jsonl --binarized   rows of HuggingFaceH4/ultrafeedback_binarized

Writes into data/ultrafeedback/, each with a _heldout twin:

    sft.jsonl       {prompt, response}                      the best completion of each prompt
    gvm.jsonl       {prompt, response, reward, policy}      every completion; policy: the model that wrote it
    pairs.jsonl     {prompt, chosen, rejected, ...}         the best completion against one that scored lower
    prompts.jsonl   {prompt}

The reward is the mean of the annotators' ratings (1 to 5; "N/A" does not count), moved to [-1, 1]. It is not
overall_score, which once held 10 for 1 in 2,628 completions. Which part a prompt falls into depends on its
text alone, so every run gives the same files.
"""
import argparse
import collections
import hashlib
import json
import math
import os
import sys

from tqdm import tqdm

REPO, REVISION = "openbmb/UltraFeedback", "40b436560ca83a8dba36114c22ab3c66e43f6d5e"
FILES = ("evol_instruct.jsonl", "false_qa.jsonl", "flan.jsonl", "sharegpt.jsonl", "truthful_qa.jsonl",
         "ultrachat.jsonl")
PARTS = ("sft", 0.3), ("value", 0.8), ("rl", 1.0)       # upper bounds of the paper's 30 / 50 / 20
HELDOUT = 0.02


def place(prompt):
    """(part, held out?) of a prompt: two uniform numbers out of its hash."""
    digest = hashlib.sha256(json.dumps(prompt).encode()).digest()
    u, v = (int.from_bytes(digest[i:i + 8], "big") / 2**64 for i in (0, 8))
    return next(name for name, bound in PARTS if u < bound), v < HELDOUT


def rating(completion):
    """Mean rating in [-1, 1], or None where nobody rated."""
    numbers = []
    for annotation in (completion.get("annotations") or {}).values():
        try:
            numbers.append(float(annotation["Rating"]))
        except (KeyError, TypeError, ValueError):       # "N/A", or an aspect without a rating
            pass
    numbers = [x for x in numbers if 1 <= x <= 5]
    if not numbers:
        try:
            numbers = [float(completion["fine-grained_score"])]
        except (KeyError, TypeError, ValueError):
            return None
    mean = sum(numbers) / len(numbers)
    return (mean - 3) / 2 if math.isfinite(mean) and 1 <= mean <= 5 else None


def raw_rows(row, dropped):
    """One raw row -> prompt, labelled completions."""
    prompt, rows = row["instruction"], []
    for c in row.get("completions") or []:
        reward, text = rating(c), (c.get("response") or "").strip()
        if reward is None or not text:
            dropped["completions without a rating" if reward is None else "empty completions"] += 1
        else:
            rows.append(dict(prompt=prompt, response=text, reward=reward, policy=c["model"]))
    return prompt, rows


def binarized_rows(row, dropped):
    """One row of ultrafeedback_binarized -> prompt, its two completions; nobody says who wrote them."""
    prompt = row["prompt"]
    texts = [row[side][-1]["content"].strip() for side in ("chosen", "rejected")]
    if not all(texts) or texts[0] == texts[1]:
        dropped["empty or equal pairs"] += 1
        return prompt, []
    rewards = zip(texts, (1.0, -1.0), strict=True)
    return prompt, [dict(prompt=prompt, response=t, reward=r) for t, r in rewards]


def pair(rows, prompt):
    """Best completion against one that scored lower, by the prompt's hash; None where all are equal."""
    best = max(rows, key=lambda row: row["reward"])
    worse = [row for row in rows if row["reward"] < best["reward"]]
    if not worse:
        return None
    other = worse[int(hashlib.sha256(json.dumps(prompt).encode()).hexdigest(), 16) % len(worse)]
    out = dict(prompt=prompt, chosen=best["response"], rejected=other["response"])
    if "policy" in best:
        out |= dict(chosen_policy=best["policy"], rejected_policy=other["policy"])
    return out


def why_left_out(prompt, rows, seen):
    """None: it stays."""
    if not prompt.strip():
        return "empty prompts"
    if prompt in seen:
        return "repeated prompts"
    return "prompts with fewer than two completions" if len(rows) < 2 else None


def lines(paths):
    for path in paths:
        size = dict(total=os.path.getsize(path), unit="B", unit_scale=True)
        with open(path, "rb") as f, tqdm(desc=os.path.basename(path), **size) as bar:
            for number, line in enumerate(f, 1):
                bar.update(len(line))
                if line.strip():
                    try:
                        yield path, number, json.loads(line)
                    except ValueError as e:
                        sys.exit(f"error: {path}:{number}: not JSON ({e})")


def make(paths, out, binarized=False):
    """Read the raw files, write the eight files; returns how many rows each got and what was dropped."""
    os.makedirs(out, exist_ok=True)
    names = [name + twin for name in ("sft", "gvm", "pairs", "prompts") for twin in ("", "_heldout")]
    files = {name: open(os.path.join(out, name + ".jsonl.tmp"), "w") for name in names}
    count, dropped, seen = collections.Counter({name: 0 for name in names}), collections.Counter(), set()
    rows_of, kind = raw_rows, "UltraFeedback"
    if binarized:
        rows_of, kind = binarized_rows, "ultrafeedback_binarized"

    def write(name, row):
        files[name].write(json.dumps(row, ensure_ascii=False) + "\n")
        count[name] += 1

    for path, number, row in lines(paths):
        try:
            prompt, rows = rows_of(row, dropped)
        except (KeyError, TypeError, IndexError, AttributeError) as e:
            sys.exit(f"error: {path}:{number}: not a row of {kind} ({e!r})")
        if why := why_left_out(prompt, rows, seen):
            dropped[why] += 1
            continue
        seen.add(prompt)
        part, heldout = place(prompt)
        twin = "_heldout" if heldout else ""
        if part == "sft":
            best = max(rows, key=lambda row: row["reward"])
            write("sft" + twin, dict(prompt=prompt, response=best["response"]))
        elif part == "rl":
            write("prompts" + twin, dict(prompt=prompt))
        else:
            for row in rows:
                write("gvm" + twin, row)
            chosen = pair(rows, prompt)
            if chosen is None:
                dropped["pairs whose ratings are all equal"] += 1
            else:
                write("pairs" + twin, chosen)
    for name, f in files.items():
        f.close()
        os.replace(f.name, os.path.join(out, name + ".jsonl"))
    return count, dropped


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--raw", nargs="+", help="local raw files instead of a download")
    p.add_argument("--binarized", action="store_true",
                   help="the raw files hold rows of ultrafeedback_binarized (JSON lines)")
    p.add_argument("--out", default="data/ultrafeedback", help="folder to write (default: %(default)s)")
    args = p.parse_args(argv)
    if args.binarized and not args.raw:
        sys.exit("error: --binarized needs --raw: export the dataset as JSON lines first")
    for path in args.raw or []:
        if not os.path.isfile(path):
            sys.exit(f"error: {path}: no such file")
    if not args.raw:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        try:
            args.raw = [hf_hub_download(REPO, name, repo_type="dataset", revision=REVISION) for name in FILES]
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as e:
            sys.exit(f"error: {REPO} cannot be downloaded ({type(e).__name__}); give local copies of "
                     f"{', '.join(FILES)} with --raw")
    count, dropped = make(args.raw, args.out, args.binarized)
    print("\n".join(f"{args.out}/{name}.jsonl: {n:,} rows" for name, n in count.items()))
    print("dropped: " + (", ".join(f"{n:,} {what}" for what, n in dropped.items()) or "nothing"))


if __name__ == "__main__":
    main()
