"""Win rate of a file of answers over another (figure 2 of the paper), both by tools/sample.py.

    python tools/judge.py A.json B.json --reward data/toy.py:gold_reward
    python tools/judge.py A.json B.json --rm out/tiny/rm/model --init-from out/tiny/sft/model

A function or a reward model scores every answer by itself. The higher score wins; equal scores
are a tie, and a tie is half a win. For a language model as the judge, AlpacaEval reads the same
files.
"""
import argparse
import json
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np
import torch

import common
import ppo_baseline


class Answer(str):
    """The text of an answer; `ended` is False where tools/sample.py cut it."""

    ended = True


def load(path):
    """AlpacaEval's [{instruction, output, generator}] -> {instruction: Answer}, generator."""
    answers = {}
    try:
        with open(path, encoding="utf-8") as f:
            rows = json.load(f)
        for row in rows:
            if not isinstance(row["instruction"], str) or not isinstance(row["output"], str):
                raise ValueError("not text")
            answer = answers[row["instruction"]] = Answer(row["output"])
            answer.ended = row.get("ended", True)
        if len(answers) < max(1, len(rows)):
            raise ValueError("empty, or two answers to one instruction")
    except (OSError, ValueError, KeyError, TypeError) as e:
        common.die(f"{path}: {e!r}; needs AlpacaEval's format, see tools/sample.py")
    return answers, str(rows[0].get("generator", path))


def judge(args):
    """--reward or --rm -> function(question, answer)."""
    if args.reward:
        return common.load_function(args.reward)
    tok = common.load_tokenizer(args.init_from)
    model = common.load_model(args.init_from, trainable=False).eval()
    common.load_adapter(model, tok, args.rm, made_by="python ppo_baseline.py")

    @torch.no_grad()
    def score(question, answer):
        prompt = common.encode_prompt(tok, question)
        response = common.encode_response(tok, answer, answer.ended)
        frame = common.frame([prompt], [response], model.lm.device)
        return ppo_baseline.scores(model, *frame).item()

    return score


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=common.Help)
    p.add_argument("a", help="answers, AlpacaEval's format")
    p.add_argument("b", help="answers of the other, to the same questions")
    by = p.add_mutually_exclusive_group(required=True)
    by.add_argument("--reward", help="FILE.py:function(prompt, response) that scores")
    by.add_argument("--rm", help="reward model folder that scores")
    p.add_argument("--init-from", default="out/tiny/sft/model", help="SFT model under --rm")
    p.add_argument("--to", default="verdict.json", help="file to write")
    args = p.parse_args(argv)
    (a, name_a), (b, name_b) = load(args.a), load(args.b)
    common.check_writable(args.to)
    questions = [question for question in a if question in b]
    if not questions:
        common.die(f"{args.a} and {args.b} have no instruction in common")
    score = judge(args)
    points = []
    for question in common.Progress(questions, desc="judge"):
        difference = score(question, a[question]) - score(question, b[question])
        points.append((np.sign(difference) + 1) / 2)
    rng = np.random.default_rng(1)
    means = [rng.choice(points, len(points)).mean() for _ in range(10_000)]     # bootstrap
    result = dict(
        a=name_a, b=name_b, judge=args.reward or args.rm, wins=points.count(1.0),
        ties=points.count(0.5), losses=points.count(0.0), only_in_one=len(set(a) ^ set(b)),
        win_rate=np.mean(points), interval=np.quantile(means, [0.025, 0.975]).tolist())
    common.write_json(args.to, result)
    print("{a} against {b}: {wins} wins, {ties} ties, {losses} losses; win rate, ties half: "
          "{win_rate:.3f} ({interval[0]:.3f} to {interval[1]:.3f}, 95 %)\n"
          "judge {judge}; {only_in_one} questions in one file alone left out".format(**result))
    return result


if __name__ == "__main__":
    main()
