import json
import sys

import numpy as np
import torch
from helpers import PROMPT, RL, close, example_frame, path, script, tiny_gpt2, world

import common
from data import toy


def test_interval_by_hand():
    from experiments.shared import interval

    assert interval([1, 2, 3]) == "2.00 ± 2.48"  # sd 1, t(2 degrees) 4.303 / sqrt(3)
    assert interval([0.5, -0.25], 3, "+") == "+0.125 ± 4.766" and interval([0.7]) == "0.70" and interval(
        []) == "never"


def test_policy_gradient_of_the_theorem():
    """Against plain log-softmax over whole logits, row by row."""
    from experiments import theorem

    model = tiny_gpt2()
    _, _, ids, attn, mask = example_frame(toy.tokenizer())
    adv, _T = torch.randn(mask.shape, generator=torch.Generator().manual_seed(0)), mask.shape[1]
    got = theorem.gradient(model, ids, attn, mask, adv, torch.arange(len(ids)))
    model.zero_grad()
    for row in range(len(ids)):
        real = ids[row][attn[row].bool()][None]
        n = int(mask[row].sum())
        logp = model.lm(real).logits.log_softmax(-1)[0, -n - 1:-1].gather(1, real[0, -n:, None])[:, 0]
        ((logp * adv[row, :n]).sum() / len(ids)).backward()
    close(got, torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None]), 1e-4)


def test_exact_values():
    """The value of text is the mean of the values one word later, under the policies that may be writing; it
    starts and ends where it must; and dvpo.py learns from it."""
    from experiments import exact

    tau = [("review the wine and the room .", "the wine was lovely . the room was not sad . <eos>".split())]
    for before in [], tau:
        for text in ("", "well , the soup", "the soup was not", "the soup was very very",
                     "the soup was rude . the wine", "the soup was kind . the staff was bright ."):
            words = text.split()
            loglik, weight = exact.read(PROMPT, words)[0][-1] + sum(
                exact.read(p, w)[0][-1] for p, w in before), 0.0
            posterior = np.exp(loglik - loglik.max()) / np.exp(loglik - loglik.max()).sum()
            state, _ = toy.read(PROMPT, text)
            said = [toy.next_words(state, p, toy.requested(PROMPT)) for p in toy.POLICIES.values()]
            for word in set().union(*said):
                p = sum(a * s.get(word, 0.0) for a, s in zip(posterior, said, strict=False))
                weight += p * exact.best_value(before, PROMPT,
                                               [*words, words[-1] if word == toy.STUTTER else word])[-1]
            close(weight, exact.best_value(before, PROMPT, words)[-1], 1e-6)
    close(exact.best_value([], PROMPT, [])[0], np.mean([toy.true_q(PROMPT, "", p) for p in toy.POLICIES]))
    close(exact.best_value([], PROMPT, "the soup was kind . <eos>".split())[-1], 0.0)
    rng = np.random.default_rng(0)
    known = [(PROMPT, [*toy.sample(PROMPT, "expert", rng).split(), toy.EOS]) for _ in range(300)]
    close(exact.best_value(known, PROMPT, ["the"])[-1], toy.true_q(PROMPT, "the", "expert"), 1e-3)
    tok, words = toy.tokenizer(), "the soup was rude . <eos>".split(
    )  # the same through the model's place, behind a tau and a shorter row
    trunk, ids = exact.Exact(None, tok), common.encode_prompt(tok, PROMPT)
    pairs = [(common.encode_prompt(tok, p), tok.convert_tokens_to_ids(w)) for p, w in tau]
    prefix, _ = common.prepend_tau(tok, pairs, [], 99, 99)
    responses = [tok.convert_tokens_to_ids(words), [tok.eos_token_id]]
    frame = common.frame([ids, ids], responses)[:2]
    q = trunk(*frame, len(words), head="gvm", cache=trunk.turns(prefix))
    close(
        q,
        np.array([
            exact.best_value(tau, PROMPT, words),
            [*exact.best_value(tau, PROMPT, [toy.EOS]), *[0.0] * (len(words) - 1)]
        ]))
    state, events = toy.State(), []
    for word in "the wine was very rude . the soup staff <eos>".split():
        kind, state = exact.event(state, word, toy.requested(PROMPT))
        events.append(kind)
    assert events == [None, "wrong noun", None, None, "unkind", None, None, None, "broken",
                      "early end"], events
    world()
    done = script(sys.executable, "experiments/exact.py", "--one", *RL, "--max-steps", "10", "--seed",
                  "7", "--out", path("exact"))
    assert done.returncode == 0, done.stderr
    assert json.load(open(
        path("exact/run.json")))["seed"] == 7  # no flag of dvpo.py's is taken for one of the tool's
    rows = [json.loads(line) for line in open(path("exact/metrics.jsonl"))]
    assert rows[0]["ratio_first"] == 1.0 and rows[-1]["gold"] > rows[0]["gold"] + 0.2, rows
