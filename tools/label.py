"""Sample a policy's answers and score them: labelled rows for train_gvm.py (the paper's instruction setting,
section 5.2).

    python tools/label.py   the toy's SFT model, scored by the gold reward
    python tools/label.py --policy FOLDER --prompts FILE.jsonl --reward FILE.py:function --to rows.jsonl
    python tools/label.py --policy FOLDER --prompts FILE.jsonl --reward-model FOLDER_OR_ID --to rows.jsonl
    python train_gvm.py --data data/toy/gvm.jsonl out/tiny/sft/labelled.jsonl   then learns from both

Rows are {prompt, response, reward, policy}; policy is --name, with the temperature where that is not 1. A GVM
that never saw the mistakes
of the policy it guides is fooled by them: a few thousand rows of the SFT model itself, some at temperatures
above 1, are cheap cover.
Run it again to go on where it stopped. Beside --to stands the same as pairs, *_pairs.jsonl, for a reward
model.
"""
import argparse
import json
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np
import torch

import common
import dvpo
from data.toy import pair_up


def score_with(path, device):
    """A sequence-classification checkpoint -> function(prompts, responses) -> list of floats."""
    from transformers import AutoModelForSequenceClassification

    tok = common.load_tokenizer(path)
    try:
        rm, info = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1,
                                                                      use_safetensors=True,
                                                                      output_loading_info=True)
    except (OSError, ValueError) as e:
        common.die(common.missing_model(path, e))
    if info["missing_keys"]:
        common.die(
            f"--reward-model {path}: not a reward model, it has no weights for {sorted(info['missing_keys'])}"
        )
    rm.to(device).eval()
    rm.config.pad_token_id = tok.pad_token_id

    def score(prompts, responses):
        rows = [common.encode_prompt(tok, p) + common.encode_response(tok, r)
                for p, r in zip(prompts, responses, strict=True)]
        # Right-padded: the head is read at the last real token.
        ids, attn, _ = common.frame([[]] * len(rows), rows, tok.pad_token_id, device)
        return rm(ids, attention_mask=attn).logits[:, 0].tolist()

    return score


@torch.no_grad()
def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=common.Help)
    p.add_argument("--policy", default="out/tiny/sft/model",
                   help="transformers folder or hub id to sample from")
    p.add_argument("--prompts", default="data/toy/prompts.jsonl",
                   help="rows {prompt}; they are gone through in turn")
    p.add_argument("--reward", default="data/toy.py:gold_reward",
                   help="FILE.py:function(prompt, response) -> float")
    p.add_argument("--reward-model", default=None,
                   help="sequence-classification checkpoint with one label, in place of --reward")
    p.add_argument("--to", default="out/tiny/sft/labelled.jsonl", help="file to write, or to go on with")
    p.add_argument("--name", default=None, help="policy name in the rows (default: the folder's own name)")
    p.add_argument("--n", type=int, default=5000, help="rows in all")
    p.add_argument("--batch-size", type=int, default=64, help="rows per forward pass")
    p.add_argument("--temperatures", type=float, nargs="+", default=[1.0, 1.4, 1.8],
                   help="gone through batch by batch; above 1 makes more mistakes")
    p.add_argument("--max-new-tokens", type=int, default=32, help="tokens of a response at most")
    p.add_argument("--static-cache", action="store_true", help="as in dvpo.py")
    p.add_argument("--seed", type=int, default=1, help="seed of sampling")
    args = p.parse_args(argv)
    if min(args.n, args.batch_size, args.max_new_tokens, *args.temperatures) <= 0:
        common.die("--n, --batch-size, --max-new-tokens and --temperatures must be above 0")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    prompts, tok = common.read_rows(args.prompts, ["prompt"]), common.load_tokenizer(args.policy)
    policy = common.load_model(args.policy, trainable=False).eval()
    if args.reward_model:
        score = score_with(args.reward_model, device)
    else:
        reward = common.load_function(args.reward)

        def score(ps, rs):
            return [float(reward(p, r)) for p, r in zip(ps, rs, strict=False)]

    name = args.name or os.path.basename(
        os.path.dirname(os.path.abspath(args.policy)) if os.path.basename(args.policy) ==
        "model" else args.policy)

    os.makedirs(os.path.dirname(os.path.abspath(args.to)), exist_ok=True)
    done = 0
    if os.path.exists(args.to):  # keep whole batches only: a killed run may have cut one
        with open(args.to) as f:
            lines = [line for line in f if line.endswith("\n")]
        done = len(lines) if len(lines) >= args.n else len(lines) // args.batch_size * args.batch_size
        with open(args.to, "w") as f:
            f.writelines(lines[:done])
    with open(args.to, "a") as f, common.Progress(total=args.n, initial=done, desc="label") as bar:
        for start in range(done, args.n, args.batch_size):
            args.temperature = args.temperatures[start // args.batch_size % len(args.temperatures)]
            torch.manual_seed(args.seed * 1_000_003 +
                              start)  # of the batch, so that going on gives the same rows
            mine = [
                prompts[i % len(prompts)]["prompt"]
                for i in range(start, min(start + args.batch_size, args.n))
            ]
            ids, attn, mask, ended = dvpo.rollout(policy, [common.encode_prompt(tok, p) for p in mine], tok,
                                                  args, device)
            texts = [tok.decode(r, skip_special_tokens=True) for r in common.unpad(ids, mask)]
            f.writelines(
                json.dumps(
                    dict(prompt=p, response=t, reward=s, policy=name +
                         (f"-T{args.temperature:g}" if args.temperature != 1 else ""))) + "\n"
                for p, t, s in zip(mine, texts, score(mine, texts), strict=False))
            f.flush()
            bar.update(len(mine))
    with open(args.to) as f:
        pairs = pair_up([json.loads(line) for line in f], np.random.default_rng(args.seed))
    with open(args.to.removesuffix(".jsonl") + "_pairs.jsonl", "w") as f:
        f.writelines(json.dumps(pair) + "\n" for pair in pairs)


if __name__ == "__main__":
    main()
