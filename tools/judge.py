"""Win rate of a file of answers over another (figure 2 of the paper), both by tools/sample.py.

    python tools/judge.py A.json B.json                 a judge behind an OpenAI-compatible API
    python tools/judge.py A.json B.json --reward data/toy.py:gold_reward        a function
    python tools/judge.py A.json B.json --rm out/tiny/rm/model --init-from out/tiny/sft/model

The API's key is read from OPENAI_API_KEY, its address from OPENAI_BASE_URL. The paper's prompt
scores every answer by itself, 0 to 5. The higher score wins; equal scores are a tie, and a tie
is half a win. Every verdict of the API is appended to --to as it comes. The same command again
continues there and pays for no verdict twice.
"""
import argparse
import hashlib
import http.client
import json
import os
import re
import sys
import threading
import time
import urllib.error
import urllib.request

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np
import torch
from tqdm.contrib.concurrent import thread_map

import common
import ppo_baseline

# Appendix D of arXiv 2502.16944 v1; line breaks and doubled blanks are corrected.
SYSTEM = """Review the user's question and the corresponding response using the additive 5-point scoring
system described below. Points are accumulated based on the satisfaction of each criterion:

- Add 1 point if the response is relevant and provides some information related to the user's inquiry, even if
it is incomplete or contains some irrelevant content.

- Add another point if the response addresses a substantial portion of the user's question, but does not
completely resolve the query or provide a direct answer.

- Award a third point if the response answers the basic elements of the user's question in a useful way,
regardless of whether it seems to have been written by an AI Assistant or if it has elements typically found
in blogs or search results.

- Grant a fourth point if the response is clearly written from an AI Assistant's perspective, addressing the
user's question directly and comprehensively, and is well-organized and helpful, even if there is slight room
for improvement in clarity, conciseness or focus.

- Bestow a fifth point for a response that is impeccably tailored to the user's question by an AI Assistant,
without extraneous information, reflecting expert knowledge, and demonstrating a high-quality, engaging, and
insightful answer.

After examining the user's instruction and the response, please first give the total score. Then provide a
brief explanation of your total score, up to 100 words. Output with the following format: Score: {total score}
Evaluation evidence: {your brief explanation here}

Remember to assess from the AI Assistant perspective, utilizing web search knowledge as necessary. To evaluate
the response in alignment with this additive scoring model, we'll systematically attribute points based on the
outlined criteria."""
TRIES = 6
WAIT = 1.0                          # seconds before the second try; then 3, 7, 15, 31 times it


def read_score(text):
    """The judge's words -> its score, or None: missing, or not in 0 to 5. Never a guess."""
    match = re.search(r"(?i)\bscore\b[^\d:\n]*:[\s*_{]*([-\u2212]?\d+(?:\.\d+)?)", text)
    score = float(match[1].replace("\u2212", "-")) if match else -1.0
    return score if 0 <= score <= 5 else None


def ask(model, url, key, question, answer):
    """-> {score or None, tokens_in, tokens_out, text}. HTTPError: no call will be answered."""
    user = f"<Question>: {question}\n<response>: {answer}"
    messages = [dict(role="system", content=SYSTEM), dict(role="user", content=user)]
    body = json.dumps(dict(model=model, temperature=0, messages=messages)).encode()
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    request.add_unredirected_header("Authorization", f"Bearer {key}")  # for nobody else
    verdict = dict(score=None, tokens_in=0, tokens_out=0)
    for attempt in range(TRIES):
        time.sleep(WAIT * (2**attempt - 1))
        try:
            with urllib.request.urlopen(request, timeout=120) as reply:
                reply = json.load(reply)
            text = reply["choices"][0]["message"]["content"] or ""
            usage = reply.get("usage") or {}
            verdict["tokens_in"] += usage.get("prompt_tokens", 0)
            verdict["tokens_out"] += usage.get("completion_tokens", 0)
            verdict["score"] = read_score(text)
            if verdict["score"] is not None:
                return dict(verdict, text=text)
            problem = f"no score from 0 to 5 in {text[:80]!r}"
        except urllib.error.HTTPError as e:
            if e.code in (401, 403, 404):               # wrong key, address or model
                raise
            problem = f"{e.code} {e.reason}"
            if e.code not in (408, 409, 429) and e.code < 500:
                break                                   # this question: too long, or filtered
        except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError) as e:
            problem = f"{type(e).__name__}: {e}"
    return dict(verdict, text=f"{url}: gave up: {problem}")


def ask_all(answers, args):
    """-> a score or None for each (question, answer), and every verdict that was paid for."""
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    url = os.environ.get("OPENAI_BASE_URL", "").strip().rstrip("/") + "/chat/completions"
    if not re.fullmatch("[!-~]+", key) or not url.startswith(("http://", "https://")):
        common.die("set OPENAI_API_KEY and OPENAI_BASE_URL (the address up to and with /v1), "
                   "or judge with --reward or --rm")
    asked = [json.dumps([args.judge, url, SYSTEM, *answer]) for answer in answers]
    names = [hashlib.sha256(text.encode()).hexdigest()[:24] for text in asked]
    todo = dict(zip(names, answers, strict=True))
    with open(args.to, "ab+") as f:
        f.seek(0)
        f.truncate(f.read().rfind(b"\n") + 1)           # a killed run may leave half a line
        f.seek(0)
        verdicts = [verdict for verdict in map(json.loads, f) if verdict["key"] in todo]
    known = {verdict["key"] for verdict in verdicts if verdict["score"] is not None}
    lock = threading.Lock()

    def ask_and_write(name):
        verdict = dict(ask(args.judge, url, key, *todo[name]), key=name)
        with lock, open(args.to, "a") as f:             # what is paid for is written at once
            f.write(json.dumps(verdict) + "\n")
            verdicts.append(verdict)

    try:
        thread_map(ask_and_write, [name for name in todo if name not in known], desc="judge",
                   max_workers=args.at_once, tqdm_class=common.Progress)
    except urllib.error.HTTPError as e:
        common.die(f"{url}: {e.code} {e.reason}")
    scores = {verdict["key"]: verdict["score"] for verdict in verdicts}
    return [scores[name] for name in names], verdicts


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


def local(args):
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
    p.add_argument("--judge", default="gpt-4o-2024-08-06", help="model of the API (paper)")
    p.add_argument("--reward", help="FILE.py:function(prompt, response), in place of the API")
    p.add_argument("--rm", help="reward model folder, in place of the API")
    p.add_argument("--init-from", default="out/tiny/sft/model", help="SFT model under --rm")
    p.add_argument("--to", default="verdicts.jsonl", help="verdicts of the API")
    p.add_argument("--limit", type=int, help="only the first so many questions")
    p.add_argument("--at-once", type=int, default=8, help="calls at a time")
    args = p.parse_args(argv)
    if args.reward and args.rm:
        common.die("--reward and --rm: give one judge")
    (a, name_a), (b, name_b) = load(args.a), load(args.b)
    common.check_writable(args.to)
    questions = [question for question in a if question in b][:args.limit]
    if not questions:
        common.die(f"{args.a} and {args.b} have no instruction in common")
    answers = [(question, side[question]) for question in questions for side in (a, b)]
    verdicts = []
    if args.reward or args.rm:
        judge = local(args)
        scores = [judge(*answer) for answer in common.Progress(answers, desc="judge")]
    else:
        scores, verdicts = ask_all(answers, args)
    scores = np.array(scores, dtype=float).reshape(-1, 2)               # nan: no verdict
    scores = scores[~np.isnan(scores).any(1)]
    if not len(scores):
        common.die(f"no verdict at all; the last: {verdicts[-1]['text']}")
    points = (np.sign(scores[:, 0] - scores[:, 1]) + 1) / 2
    rng = np.random.default_rng(1)
    means = [rng.choice(points, len(points)).mean() for _ in range(10_000)]     # bootstrap
    result = dict(
        a=name_a, b=name_b, judge=args.reward or args.rm or args.judge, questions=len(points),
        unanswered=len(questions) - len(points), only_in_one=len(set(a) ^ set(b)),
        win_rate=points.mean(), interval=np.quantile(means, [0.025, 0.975]).tolist())
    for outcome, value in dict(wins=1, ties=0.5, losses=0).items():
        result[outcome] = int((points == value).sum())
    for key in "tokens_in", "tokens_out":
        result[key] = sum(verdict[key] for verdict in verdicts)
    common.write_json(os.path.splitext(args.to)[0] + ".summary.json", result)
    print("{a} against {b}: {wins} wins, {ties} ties, {losses} losses; win rate, ties half: "
          "{win_rate:.3f} ({interval[0]:.3f} to {interval[1]:.3f}, 95 %)\n"
          "judge {judge}; {tokens_in:,} tokens read, {tokens_out:,} written; left out: "
          "{unanswered} without a verdict, {only_in_one} in one file".format(**result))
    return result


if __name__ == "__main__":
    main()
