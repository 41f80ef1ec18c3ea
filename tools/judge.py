"""Win rate of one file of answers over another (figure 2 of the paper), in the format of tools/sample.py.

    python tools/judge.py A.json B.json                 a judge behind an OpenAI-compatible API
    python tools/judge.py A.json B.json --pairwise --both-orders            both answers in one message
    python tools/judge.py A.json B.json --reward data/toy.py:gold_reward    FILE.py:function(prompt, response)
    python tools/judge.py A.json B.json --rm out/tiny/rm/model --init-from out/tiny/sft/model   a reward model

The API's key is read from OPENAI_API_KEY, its address from OPENAI_BASE_URL. The paper's prompt (appendix D)
scores every answer by itself, 0 to 5. The higher score wins; equal scores are a tie, and a tie is half a win.
Which of the two is asked first is random, as in the paper; it can matter only with --pairwise, which is not
in the paper. Every verdict of the API is appended to --to as it comes. The same command again continues
there and pays for no verdict twice.
"""
import argparse
import concurrent.futures
import hashlib
import http.client
import json
import os
import random
import re
import sys
import threading
import urllib.error
import urllib.request

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np

import common

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
PAIRWISE = ("\n\nThere are two responses to the one question. Score each by itself, and write two lines in "
            "their order: Score 1: {total score} and Score 2: {total score}.")
TRIES, WAIT = 6, 1.0                # seconds before the second try; then twice as long each time


class Refused(Exception):
    """No question will get an answer: wrong key, model or address."""


def read_scores(text, n):
    """The judge's words -> n scores, or None where one is missing or not in 0 to 5; never a guess.

    Understood are "Score: 4", and for n > 1 "**Score 2:** 3.5".
    """
    scores = []
    for i in range(1, n + 1):
        number = "" if n == 1 else rf"[ #(]*{i}"
        match = re.search(rf"(?i)\bscore{number}\b[^\d:\n]*:[\s*_{{]*([-\u2212]?\d+(?:\.\d+)?)", text)
        if match:
            scores.append(float(match[1].replace("\u2212", "-")))
    return scores if len(scores) == n and all(0 <= score <= 5 for score in scores) else None


class Endpoint:
    """An OpenAI-compatible chat API. Counts the tokens that it was charged for."""

    def __init__(self, model, timeout):
        key = os.environ.get("OPENAI_API_KEY", "").strip()
        url = os.environ.get("OPENAI_BASE_URL", "").strip().rstrip("/")
        key_is_fine = key and key.isascii() and key.isprintable() and " " not in key
        if not key_is_fine or not url.startswith(("http://", "https://")):
            common.die("set OPENAI_API_KEY and OPENAI_BASE_URL (the address up to and with /v1), "
                       "or judge with --reward or --rm")
        self.key, self.url, self.model = key, url + "/chat/completions", model
        self.timeout, self.stop = timeout, threading.Event()

    def ask(self, question, responses):
        """-> {scores, tokens_in, tokens_out, text}. Tries again where that can help.

        Scores are in the order of the responses, None where there was no verdict.
        """
        system = SYSTEM + (PAIRWISE if len(responses) > 1 else "")
        lines = [f"<Question>: {question}"]
        for i, response in enumerate(responses, 1):
            lines.append(f"<response{f' {i}' if len(responses) > 1 else ''}>: {response}")
        messages = [dict(role="system", content=system), dict(role="user", content="\n".join(lines))]
        body = json.dumps(dict(model=self.model, temperature=0, messages=messages)).encode()
        request = urllib.request.Request(self.url, body, {"Content-Type": "application/json"})
        request.add_unredirected_header("Authorization", "Bearer " + self.key)  # for nobody but this address
        used = [0, 0]
        for attempt in range(TRIES):
            try:
                with urllib.request.urlopen(request, timeout=self.timeout) as reply:
                    reply = json.load(reply)
                text, usage = reply["choices"][0]["message"]["content"] or "", reply.get("usage") or {}
                used = [used[0] + usage.get("prompt_tokens", 0), used[1] + usage.get("completion_tokens", 0)]
                scores = read_scores(text, len(responses))
                if scores:
                    return dict(scores=scores, tokens_in=used[0], tokens_out=used[1], text=text)
                problem = f"no score from 0 to 5 in {text[:80]!r}"
            except urllib.error.HTTPError as e:
                problem = f"{e.code} {e.reason}"
                if e.code in (401, 403, 404):
                    raise Refused(f"{self.url}: {problem}") from e
                if e.code not in (408, 409, 429) and e.code < 500:      # this question: too long, or filtered
                    break
            except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError) as e:
                problem = f"{type(e).__name__}: {e}"
            if attempt + 1 < TRIES and self.stop.wait(min(60, WAIT * 2**attempt)):
                break
        text = f"{self.url}: gave up: {problem}"
        return dict(scores=None, tokens_in=used[0], tokens_out=used[1], text=text)


class Answer(str):
    """The text of an answer; `ended` is False where tools/sample.py cut it."""

    ended = True


def load(path):
    """AlpacaEval's list of {instruction, output, generator} -> {instruction: Answer}, the generator."""
    try:
        with open(path, encoding="utf-8") as f:
            rows = json.load(f)
        answers = {r["instruction"]: r["output"] for r in rows}
        texts = [*answers.keys(), *answers.values()]
        if not rows or len(answers) < len(rows) or not all(isinstance(text, str) for text in texts):
            raise ValueError("empty, not text, or two answers to one instruction")
        answers = {question: Answer(text) for question, text in answers.items()}
        for row in rows:
            answers[row["instruction"]].ended = row.get("ended", True)
    except (OSError, ValueError, KeyError, TypeError) as e:
        common.die(f"{path}: {e!r}; needs [{{instruction, output, generator}}, ...], see tools/sample.py")
    return answers, str(rows[0].get("generator", path))


def jobs(a, b, args):
    """What to ask: [(key, question, answers in the order that the judge reads them, A is first)].

    Two per question; with --pairwise one of both answers, and two with --both-orders.
    """
    out, address = [], os.environ.get("OPENAI_BASE_URL")
    for question in [q for q in a if q in b][:args.limit]:
        a_first = random.Random(f"{args.seed} {question}").random() < 0.5
        both = args.both_orders or not args.pairwise
        for order in (a_first, not a_first) if both else (a_first,):
            shown = (a[question], b[question]) if order else (b[question], a[question])
            shown = shown if args.pairwise else shown[:1]
            asked = [args.judge, address, SYSTEM, args.pairwise and PAIRWISE, question, *shown]
            key = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:24]
            out.append((key, question, shown, order))
    return out


def ask_all(judge, todo, args):
    """Ask the API what --to does not hold yet, several at a time -> {key: verdict}."""
    verdicts = {}
    if os.path.exists(args.to):
        with open(args.to, "rb+") as f:                 # a run that was killed may have left half a line
            f.truncate(f.read().rfind(b"\n") + 1)
        with open(args.to) as f:
            verdicts = {v["key"]: v for v in map(json.loads, f)}
    known = {key for key, verdict in verdicts.items() if verdict["scores"] is not None}
    new = {key: (question, shown) for key, question, shown, _ in todo if key not in known}
    lock, pool = threading.Lock(), concurrent.futures.ThreadPoolExecutor(args.at_once)
    bar = common.Progress(total=len(new), desc="judge")
    with open(args.to, "a") as f, bar, pool:

        def ask(key):
            verdict = dict(judge.ask(*new[key]), key=key)
            with lock:                                  # what is paid for is written, whatever happens next
                verdicts[key] = verdict
                f.write(json.dumps(verdict) + "\n")
                f.flush()
                bar.update()

        running = [pool.submit(ask, key) for key in new]
        try:
            for job in concurrent.futures.as_completed(running):
                job.result()
        except BaseException as e:
            judge.stop.set()
            pool.shutdown(cancel_futures=True)
            if isinstance(e, Refused):
                common.die(str(e))
            raise
    return verdicts


def compare(todo, verdicts, pairwise):
    """{question: 1 where A wins, 0.5 a tie, 0 where B wins}, a mean over the orders asked.

    Questions without all their verdicts are left out.
    """
    by_question = {}
    for key, question, _, a_first in todo:
        by_question.setdefault(question, []).append((a_first, verdicts[key]["scores"]))
    points = {}
    for question, asked in by_question.items():
        if any(scores is None for _, scores in asked):
            continue
        if pairwise:
            pairs = [scores if a_first else scores[::-1] for a_first, scores in asked]
        else:
            single = {a_first: scores[0] for a_first, scores in asked}
            pairs = [(single[True], single[False])]
        points[question] = float(np.mean([(np.sign(x - y) + 1) / 2 for x, y in pairs]))
    return points


def bootstrap(points, seed, draws=10_000):
    """95 % interval of the mean by resampling the questions."""
    points, rng = np.array(points), np.random.default_rng(seed)
    means = [points[rng.integers(len(points), size=len(points))].mean() for _ in range(draws)]
    return [float(x) for x in np.quantile(means, [0.025, 0.975])]


def local(args):
    """--reward or --rm -> ask(question, responses)."""
    if args.reward:
        reward = common.load_function(args.reward)
        return lambda question, responses: dict(scores=[reward(question, r) for r in responses])
    import torch

    import ppo_baseline

    tok = common.load_tokenizer(args.init_from)
    model = common.load_model(args.init_from, trainable=False).eval()
    common.load_adapter(model, tok, args.rm, made_by="python ppo_baseline.py")
    device = next(model.parameters()).device

    def ask(question, responses):
        prompts = [common.encode_prompt(tok, question)] * len(responses)
        encoded = [common.encode_response(tok, r, r.ended) for r in responses]
        frame = common.frame(prompts, encoded, device)
        with torch.no_grad():
            return dict(scores=ppo_baseline.scores(model, *frame).tolist())

    return ask


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=common.Help)
    p.add_argument("a", help="answers, AlpacaEval's format")
    p.add_argument("b", help="answers of the other, to the same questions")
    p.add_argument("--judge", default="gpt-4o-2024-08-06", help="model of the API (the paper's)")
    p.add_argument("--reward", help="FILE.py:function(prompt, response) -> float, in place of the API")
    p.add_argument("--rm", help="reward model folder, in place of the API")
    p.add_argument("--init-from", default="out/tiny/sft/model", help="the SFT model under --rm")
    p.add_argument("--pairwise", action="store_true", help="both answers in one message: order can matter")
    p.add_argument("--both-orders", action="store_true", help="--pairwise: ask in both orders, and average")
    p.add_argument("--to", default="verdicts.jsonl", help="verdicts; what is in it is not asked again")
    p.add_argument("--limit", type=int, help="only the first so many questions")
    p.add_argument("--at-once", type=int, default=8, help="calls at a time")
    p.add_argument("--timeout", type=float, default=120.0, help="seconds to wait for one call")
    p.add_argument("--price", type=float, nargs=2, metavar=("IN", "OUT"),
                   help="money per million tokens read and written, to show the cost")
    p.add_argument("--seed", type=int, default=1, help="of the order and the bootstrap")
    args = p.parse_args(argv)
    if args.reward and args.rm:
        common.die("--reward and --rm: give one judge")
    if args.both_orders and not args.pairwise:
        common.die("--both-orders: needs --pairwise; else the judge sees one answer at a time")
    (a, name_a), (b, name_b) = load(args.a), load(args.b)
    common.check_writable(args.to)
    here = args.reward or args.rm
    args.judge = here or args.judge
    todo = jobs(a, b, args)
    if not todo:
        common.die(f"{args.a} and {args.b} have no instruction in common")
    if here:                                            # costs nothing: asked anew each time
        ask, verdicts = local(args), {}
        for key, question, shown, _ in common.Progress(todo, desc="judge"):
            verdicts[key] = ask(question, shown)
    else:
        verdicts = ask_all(Endpoint(args.judge, args.timeout), todo, args)
    points = compare(todo, verdicts, args.pairwise)
    failed = [verdict["text"] for verdict in verdicts.values() if verdict["scores"] is None]
    if not points:
        common.die(f"no verdict at all; the last: {failed[-1]}")
    tokens_in = tokens_out = 0
    if not here:
        keys = {key for key, *_ in todo}
        with open(args.to) as f:                        # also what was paid for verdicts that never came
            paid = [verdict for verdict in map(json.loads, f) if verdict["key"] in keys]
        tokens_in, tokens_out = (sum(verdict[k] for verdict in paid) for k in ("tokens_in", "tokens_out"))
    values = list(points.values())
    result = dict(
        a=name_a, b=name_b, judge=args.judge, pairwise=args.pairwise, both_orders=args.both_orders,
        questions=len(values), unanswered=len({question for _, question, *_ in todo}) - len(values),
        only_in_one=len(set(a) ^ set(b)), wins=sum(v > 0.5 for v in values),
        ties=sum(v == 0.5 for v in values), losses=sum(v < 0.5 for v in values),
        win_rate=float(np.mean(values)), interval=bootstrap(values, args.seed), tokens_in=tokens_in,
        tokens_out=tokens_out)
    if args.price:
        result["cost"] = (tokens_in * args.price[0] + tokens_out * args.price[1]) / 1e6
    common.write_json(os.path.splitext(args.to)[0] + ".summary.json", result)
    low, high = result["interval"]
    counts = "{wins} wins, {ties} ties, {losses} losses; win rate {win_rate:.3f}".format(**result)
    print(f"{name_a} against {name_b}: {counts} ({low:.3f} to {high:.3f}, 95 %), ties half")
    cost = f", cost {result['cost']:.2f}" if args.price else ""
    print(f"judge {args.judge}; {tokens_in:,} tokens read, {tokens_out:,} written{cost}")
    if failed or result["only_in_one"]:
        print(f"left out: {result['unanswered']} questions without a verdict "
              f"({failed[-1] if failed else 'none failed'}), {result['only_in_one']} that only one file has",
              file=sys.stderr)
    return result


if __name__ == "__main__":
    main()
