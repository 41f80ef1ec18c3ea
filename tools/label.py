"""Sample a policy's answers and score them: labelled rows for train_gvm.py (section 5.2 of the paper).

    python tools/label.py                       the toy's SFT model, scored by the gold reward
    python tools/label.py --policy FOLDER --prompts FILE.jsonl --reward FILE.py:function --to rows.jsonl

Rows are {prompt, response, reward, policy, ended, ids, tokenizer}. policy is --name, followed by the
temperature where it is not 1, unless --name is given with a single temperature. ended is false if
--max-new-tokens cut the answer. ids are the sampled tokens; encoding the text again may give others.
The same rows are written as pairs, for a reward model, to *_pairs.jsonl.

A row of --prompts may have a system message, {prompt, system, policy}. The model sees it, the labelled row
omits it and has this policy's name. The same command continues an interrupted run.
"""
import argparse
import json
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np
import torch

import common
from data.toy import pair_up, write_jsonl
from runtime import flags, processes
from tools.sample import answer, prompt_room


def keep_whole_batches(path, n, batch_size, reward):
    """Remove the rows of an incomplete batch from an earlier run's file -> the number of rows left."""
    with open(path) as f:
        lines = [line for line in f if line.endswith("\n")]
    done = len(lines) if len(lines) >= n else len(lines) // batch_size * batch_size
    first = json.loads(lines[0]) if done else None
    if first and reward(first["prompt"], first["response"]) != first["reward"]:
        common.die(f"{path}: its rows have another reward; remove it, or give --to another file")
    with open(path, "w") as f:
        f.writelines(lines[:done])
    return done


@torch.no_grad()
def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=flags.Help)
    p.add_argument("--policy", default="out/tiny/sft/model", help="transformers folder or hub id to sample")
    p.add_argument("--prompts", default="data/toy/prompts.jsonl", help="rows {prompt}, used in order")
    p.add_argument("--reward", default="data/toy.py:gold_reward", help="FILE.py:function(prompt, response)")
    p.add_argument("--to", default="out/tiny/sft/labelled.jsonl", help="file to write, or to continue")
    p.add_argument("--name", help="name of the policy in the rows (default: the name of its folder)")
    p.add_argument("--n", type=int, default=5000, help="number of rows")
    p.add_argument("--batch-size", type=int, default=64, help="rows per batch")
    p.add_argument("--temperatures", type=float, nargs="+", default=[1.0, 1.4, 1.8],
                   help="one per batch, in turn; above 1 there are more mistakes")
    p.add_argument("--max-new-tokens", type=int, default=32, help="tokens of a response at most")
    p.set_defaults(static_cache=common.CUDA)                            # as in dvpo.py
    p.add_argument("--dtype", choices=("auto", "fp32", "bf16"), default="auto", help="auto: bf16 on CUDA")
    p.add_argument("--seed", type=int, default=1, help="seed of sampling")
    args = p.parse_args(argv)
    if min(args.n, args.batch_size, args.max_new_tokens, *args.temperatures) <= 0:
        common.die("--n, --batch-size, --max-new-tokens and --temperatures must be above 0")
    tok = common.load_tokenizer(args.policy)
    policy = common.load_model(args.policy, args, trainable=False).eval()
    prompts = common.read_prompts(tok, args.prompts, prompt_room(policy, args), "prompt length")
    reward = common.load_function(args.reward)
    *_, parent, folder = os.path.abspath(args.policy).split(os.sep)
    name = args.name or (parent if folder == "model" else folder)       # out/tiny/sft/model: sft
    processes.check_writable(args.to)
    open(args.to, "a").close()
    processes.lock(args.to)                             # before an earlier run's last rows are removed
    done = keep_whole_batches(args.to, args.n, args.batch_size, reward)
    bar = common.Progress(total=args.n, initial=done, desc="label")
    with processes.writing(args.to, "the same command continues there"), open(args.to, "a") as f, bar:
        for start in range(done, args.n, args.batch_size):
            args.temperature = args.temperatures[start // args.batch_size % len(args.temperatures)]
            named = args.name and len(args.temperatures) == 1
            suffix = "" if args.temperature == 1 or named else f"-T{args.temperature:g}"
            index = range(start, min(start + args.batch_size, args.n))
            batch = [prompts[i % len(prompts)] for i in index]
            torch.manual_seed(args.seed * 1_000_003 + start)    # so a continued run writes the same rows
            responses, texts, ended = answer(policy, tok, batch, args)
            for i, row in enumerate(batch):
                persona = row.get("policy") if row.get("system") else None
                labelled = dict(prompt=row["prompt"], response=texts[i],
                                reward=reward(row["prompt"], texts[i]),
                                policy=(persona or name) + suffix, ended=ended[i],
                                ids=responses[i], tokenizer=common.tokenizer_fingerprint(tok))
                f.write(json.dumps(labelled) + "\n")
            f.flush()
            bar.update(len(batch))
    with open(args.to) as f:
        rows = [json.loads(line) for line in f]
    print(f"{args.to}: {len(rows):,} rows, mean reward {np.mean([row['reward'] for row in rows]):.3f}")
    pairs = pair_up(rows, np.random.default_rng(args.seed))
    pairs_file = args.to.removesuffix(".jsonl") + "_pairs.jsonl"
    with processes.writing(pairs_file):
        write_jsonl(pairs_file, pairs)


if __name__ == "__main__":
    main()
