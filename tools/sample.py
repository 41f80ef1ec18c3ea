"""Chat with a checkpoint, or answer a file of prompts in AlpacaEval's output format.

    python tools/sample.py --policy out/tiny/dvpo/model         chat; an empty line ends it
    python tools/sample.py --policy FOLDER_OR_ID --prompts FILE.jsonl --to answers.json
    python tools/sample.py --prompts FILE.jsonl --reward FILE.py:function       and their mean reward

The answers are [{instruction, output, generator, ended}, ...]; generator is --policy. Chat template and
sampling are those of training. Each prompt is answered on its own. For a win rate as in the paper, with a
language model as the judge, give the files of two policies to AlpacaEval.
"""
import argparse
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch

import common
from runtime import flags, processes
from runtime.rows import behind_system


def prompt_room(policy, args):
    """Tokens that the context leaves for a prompt."""
    room = flags.context_length(policy.lm.config) - args.max_new_tokens
    if room < 1:
        common.die(f"--max-new-tokens {args.max_new_tokens}: leaves no position for a prompt; lower it")
    return room


def answer(policy, tok, rows, args):
    """Sample an answer to each {prompt[, system]} -> lists of token ids, texts, whether each ended."""
    room = prompt_room(policy, args)
    prompts = [common.encode_prompt(tok, behind_system(row), room) for row in rows]
    ids, _, mask, ended = common.rollout(policy, prompts, tok, args, policy.lm.device)
    responses = common.unpad(ids, mask)
    return responses, tok.batch_decode(responses, skip_special_tokens=True), ended.tolist()


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=flags.Help)
    p.add_argument("--policy", default="out/tiny/dvpo/model", help="transformers folder or hub id")
    p.add_argument("--prompts", help="rows {prompt}; without it, chat")
    p.add_argument("--to", default="answers.json", help="file to write")
    p.add_argument("--reward", help="FILE.py:function(prompt, response) -> float that scores the answers")
    p.add_argument("--batch-size", type=int, default=16, help="prompts per batch")
    p.add_argument("--max-new-tokens", type=int, help="default: half the context, at most 512")
    p.add_argument("--temperature", type=float, default=1.0, help="near 0 is greedy")
    p.set_defaults(static_cache=common.CUDA)                            # as in dvpo.py
    p.add_argument("--seed", type=int, default=1, help="seed of sampling")
    args = p.parse_args(argv)
    if args.prompts:
        processes.check_writable(args.to)
    reward = common.load_function(args.reward)
    tok = common.load_tokenizer(args.policy)
    policy = common.load_model(args.policy, trainable=False).eval()
    if args.max_new_tokens is None:
        args.max_new_tokens = min(512, flags.context_length(policy.lm.config) // 2)
    if min(args.temperature, args.batch_size, args.max_new_tokens) <= 0:
        common.die("--temperature, --batch-size and --max-new-tokens must be above 0 (greedy: 1e-4)")
    torch.manual_seed(args.seed)
    if not args.prompts:
        while prompt := input("> ").strip():
            _, texts, _ = answer(policy, tok, [dict(prompt=prompt)], args)
            print(texts[0])
        return
    rows = common.read_prompts(tok, args.prompts, prompt_room(policy, args), "prompt length")
    answers = []
    for i in common.Progress(range(0, len(rows), args.batch_size), desc="sample"):
        batch = rows[i:i + args.batch_size]
        _, texts, ended = answer(policy, tok, batch, args)
        for row, text, end in zip(batch, texts, ended, strict=True):
            prompt = row["prompt"]
            question = prompt if isinstance(prompt, str) else prompt[-1]["content"]
            answers.append(dict(instruction=question, output=text, generator=args.policy, ended=end))
    processes.write_json(args.to, answers)
    mean = ""
    if reward:
        asked = [row["prompt"] for row in rows]
        rewards = [reward(prompt, row["output"]) for prompt, row in zip(asked, answers, strict=True)]
        mean = f", mean reward {sum(rewards) / len(rewards):.3f}"
    print(f"{args.to}: {len(answers)} answers{mean}")


if __name__ == "__main__":
    try:
        main()
    except (EOFError, KeyboardInterrupt):
        print()
