"""Talk to any checkpoint, or let it answer a file of prompts in AlpacaEval's output format.

    python tools/sample.py --policy out/tiny/dvpo/model         prompt by prompt, until an empty line
    python tools/sample.py --policy FOLDER_OR_ID --prompts FILE.jsonl --to answers.json

Prompts are rows {prompt} or {instruction}; answers are [{instruction, output, generator, ended}, ...].
Template, rollout and sampling are those of training.
"""
import argparse
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch

import common
import dvpo


def answers(policy, tok, prompts, args, device):
    """One sampled answer per prompt (strings or messages) -> list of strings, whether each ended (B,)."""
    room = common.context_length(policy.lm.config) - args.max_new_tokens
    prompt_ids = [common.encode_prompt(tok, p, room) for p in prompts]
    ids, _, mask, ended = dvpo.rollout(policy, prompt_ids, tok, args, device)
    return [tok.decode(r, skip_special_tokens=True) for r in common.unpad(ids, mask)], ended.tolist()


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=common.Help)
    p.add_argument("--policy", default="out/tiny/dvpo/model", help="transformers folder or hub id")
    p.add_argument("--prompts", help="JSON lines with prompt or instruction; without it, talk")
    p.add_argument("--to", default="answers.json", help="file to write")
    p.add_argument("--generator", help="name in the file (default: --policy)")
    p.add_argument("--batch-size", type=int, default=16, help="prompts at a time")
    p.add_argument("--max-new-tokens", type=int, default=512, help="tokens of an answer at most")
    p.add_argument("--temperature", type=float, default=1.0, help="divides the logits; near 0 is greedy")
    p.add_argument("--static-cache", action=argparse.BooleanOptionalAction, default=common.CUDA,
                   help="as in dvpo.py")
    p.add_argument("--seed", type=int, default=1, help="seed of sampling")
    args = p.parse_args(argv)
    if min(args.temperature, args.batch_size, args.max_new_tokens) <= 0:
        common.die("--temperature, --batch-size, --max-new-tokens: above 0; greedy: --temperature 1e-4")
    tok = common.load_tokenizer(args.policy)
    rows = args.prompts and common.read_rows(args.prompts, ["prompt"], ["instruction"], tok=tok)
    if rows:
        common.check_writable(args.to)
    policy = common.load_model(args.policy, trainable=False).eval()
    device = next(policy.parameters()).device
    context = common.context_length(policy.lm.config)
    if args.max_new_tokens > context // 2:
        args.max_new_tokens = context // 2
        print(f"the model has {context} positions: answers end after {context // 2} tokens", file=sys.stderr)
    torch.manual_seed(args.seed)
    if rows is None:
        while prompt := input("> ").strip():
            texts, _ = answers(policy, tok, [prompt], args, device)
            print(texts[0])
        return
    prompts, out = [row.get("prompt", row.get("instruction")) for row in rows], []
    room = context - args.max_new_tokens
    common.check_lengths(prompts, lambda prompt: common.encode_prompt(tok, prompt), room,
                         "the model's context, less --max-new-tokens:")
    for i in common.Progress(range(0, len(prompts), args.batch_size), desc="sample"):
        batch = prompts[i:i + args.batch_size]
        for prompt, answer, ended in zip(batch, *answers(policy, tok, batch, args, device), strict=True):
            question = prompt if isinstance(prompt, str) else prompt[-1]["content"]
            name = args.generator or args.policy
            out.append(dict(instruction=question, output=answer, generator=name, ended=ended))
    common.write_json(args.to, out)
    print(f"wrote {len(out)} answers to {args.to}")


if __name__ == "__main__":
    try:
        main()
    except (EOFError, KeyboardInterrupt):
        print()
