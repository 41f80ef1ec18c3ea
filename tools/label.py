"""Sample a policy's answers and score them: labelled rows for train_gvm.py (section 5.2 of the paper).

    python tools/label.py                       the toy's SFT model, scored by the gold reward
    python tools/label.py --policy FOLDER --prompts FILE.jsonl --reward FILE.py:function --to rows.jsonl
    python tools/label.py --policy FOLDER --prompts FILE.jsonl --reward-model FOLDER_OR_ID --to rows.jsonl
    python train_gvm.py --data data/toy/gvm.jsonl out/tiny/sft/labelled.jsonl           learns from both

Rows are {prompt, response, reward, policy, ended, ids, tokenizer}. policy is --name, with the temperature
where that is not 1, unless the name is given and the temperature one. ended is false for an answer that
--max-new-tokens cut. ids are the sampled tokens, which encoding the text anew need not give.

A row of --prompts may hold a system message, {prompt, system, policy}. The answer is then sampled behind it,
and the labelled row shows the prompt alone, under that policy's name: one model plays several policies.

A GVM that never saw the mistakes of the policy it guides is fooled by them. A few thousand rows of the SFT
model itself, some at temperatures above 1, are a cheap remedy. Beside --to stands *_pairs.jsonl, the same
rows as pairs for a reward model. The same command again continues an interrupted run.
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
    """A sequence-classification checkpoint -> function(prompts, responses, ended) -> list of floats."""
    from transformers import AutoModelForSequenceClassification

    tok, only_safe = common.load_tokenizer(path), dict(use_safetensors=True, output_loading_info=True)
    try:
        rm, info = AutoModelForSequenceClassification.from_pretrained(path, num_labels=1, **only_safe)
    except (OSError, ValueError) as e:
        common.die(common.missing_model(path, e))
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        common.die(f"--reward-model {path}: not a reward model, it has no weights for {missing}")
    rm.to(device).eval()
    rm.config.pad_token_id = int(tok.eos_token_id == 0)     # not eos: the head is read at the last non-pad

    context = common.context_length(rm.config)

    def score(prompts, responses, ended):
        rows = [encode_conversation(tok, p, r, e)[-context:]
                for p, r, e in zip(prompts, responses, ended, strict=True)]
        ids, attn, _ = common.frame([[]] * len(rows), rows, device)
        ids = ids.masked_fill(attn == 0, rm.config.pad_token_id)
        return rm(ids, attention_mask=attn).logits[:, 0].tolist()

    return score


def encode_conversation(tok, prompt, response, ended=True):
    """Prompt and answer as the chat template itself renders them: what most reward models were trained on.

    A cut answer ends with its last word, and without a template an answer ends with eos.
    """
    if not (tok.chat_template and ended):
        return common.encode_prompt(tok, prompt) + common.encode_response(tok, response, ended)
    turns = [*common.as_messages(prompt), dict(role="assistant", content=response)]
    messages = common.with_only_text(tok, turns)
    return list(common.encode_messages(tok, messages, add_generation_prompt=False))


def keep_whole_batches(path, n, batch_size):
    """Number of rows in a file that an earlier run left, after taking off those of an incomplete batch."""
    if not os.path.exists(path):
        return 0
    with open(path) as f:
        lines = [line for line in f if line.endswith("\n")]
    done = len(lines) if len(lines) >= n else len(lines) // batch_size * batch_size
    with open(path, "w") as f:
        f.writelines(lines[:done])
    return done


@torch.no_grad()
def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=common.Help)
    p.add_argument("--policy", default="out/tiny/sft/model", help="transformers folder or hub id to sample")
    p.add_argument("--prompts", default="data/toy/prompts.jsonl", help="rows {prompt}, taken in order")
    p.add_argument("--reward", default="data/toy.py:gold_reward", help="FILE.py:function(prompt, response)")
    p.add_argument("--reward-model", help="sequence-classification checkpoint, in place of --reward")
    p.add_argument("--to", default="out/tiny/sft/labelled.jsonl", help="file to write, or to continue")
    p.add_argument("--name", help="policy name in the rows (default: the folder's own name)")
    p.add_argument("--n", type=int, default=5000, help="rows in all")
    p.add_argument("--batch-size", type=int, default=64, help="rows per forward pass")
    p.add_argument("--temperatures", type=float, nargs="+", default=[1.0, 1.4, 1.8],
                   help="one per batch, in turn; above 1 makes more mistakes")
    p.add_argument("--max-new-tokens", type=int, default=32, help="tokens of a response at most")
    p.add_argument("--static-cache", action=argparse.BooleanOptionalAction, default=common.CUDA,
                   help="as in dvpo.py")
    p.add_argument("--dtype", choices=("auto", "fp32", "bf16"), default="auto", help="auto: bf16 on CUDA")
    p.add_argument("--seed", type=int, default=1, help="seed of sampling")
    args = p.parse_args(argv)
    if min(args.n, args.batch_size, args.max_new_tokens, *args.temperatures) <= 0:
        common.die("--n, --batch-size, --max-new-tokens and --temperatures must be above 0")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tok = common.load_tokenizer(args.policy)
    policy = common.load_model(args.policy, args, trainable=False).eval()
    room = common.context_length(policy.lm.config) - args.max_new_tokens
    if room < 1:
        common.die(f"--max-new-tokens {args.max_new_tokens}: leaves no position for a prompt; lower it")
    prompts = common.read_prompts(tok, args.prompts, room, "the model's context, less --max-new-tokens:")
    fingerprint = common.tokenizer_fingerprint(tok)
    if args.reward_model:
        score = score_with(args.reward_model, device)
    else:
        reward = common.load_function(args.reward)

        def score(prompts, responses, ended):
            return [reward(p, r) for p, r in zip(prompts, responses, strict=True)]

    *_, parent, folder = os.path.abspath(args.policy).split(os.sep)
    name = args.name or (parent if folder == "model" else folder)               # out/tiny/sft/model: sft
    common.check_writable(args.to)
    open(args.to, "a").close()
    common.lock(args.to)                                # before an earlier run's last rows are taken off
    done = keep_whole_batches(args.to, args.n, args.batch_size)
    bar = common.Progress(total=args.n, initial=done, desc="label")
    with common.writing(args.to, "the same command continues there"), open(args.to, "a") as f, bar:
        for start in range(done, args.n, args.batch_size):
            args.temperature = args.temperatures[start // args.batch_size % len(args.temperatures)]
            named = args.name and len(args.temperatures) == 1
            heat = "" if args.temperature == 1 or named else f"-T{args.temperature:g}"
            index = range(start, min(start + args.batch_size, args.n))
            batch = [prompts[i % len(prompts)] for i in index]
            torch.manual_seed(args.seed * 1_000_003 + start)    # of the batch: a continued run is the same
            encoded = [common.encode_prompt(tok, common.behind_system(row), room) for row in batch]
            ids, _, mask, ended = dvpo.rollout(policy, encoded, tok, args, device)
            responses = common.unpad(ids, mask)
            texts = [tok.decode(r, skip_special_tokens=True) for r in responses]
            rewards = score([row["prompt"] for row in batch], texts, ended.tolist())
            for i, row in enumerate(batch):
                who = (row["policy"] if row.get("system") and row.get("policy") else name) + heat
                labelled = dict(prompt=row["prompt"], response=texts[i], reward=rewards[i], policy=who,
                                ended=bool(ended[i]), ids=responses[i], tokenizer=fingerprint)
                f.write(json.dumps(labelled) + "\n")
            f.flush()
            bar.update(len(batch))
    with open(args.to) as f:
        pairs = pair_up([json.loads(line) for line in f], np.random.default_rng(args.seed))
    pairs_file = args.to.removesuffix(".jsonl") + "_pairs.jsonl"
    with common.writing(pairs_file), open(pairs_file, "w") as f:
        f.writelines(json.dumps(pair) + "\n" for pair in pairs)


if __name__ == "__main__":
    main()
