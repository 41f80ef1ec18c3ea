import argparse
import json
import sys

import numpy as np
import pytest
import torch
from helpers import PROMPT, RL, close, example_frame, path, script, tiny_gpt2, tiny_llama, world

import common
import train_gvm
from data import toy


def test_interval_by_hand():
    from experiments.shared import interval

    assert interval([1, 2, 3]) == "2.00 ± 2.48"         # sd 1, t(2 degrees of freedom) 4.303 / sqrt(3)
    assert interval([0.5, -0.25], 3, "+") == "+0.125 ± 4.766"
    assert interval([0.7]) == "0.70" and interval([]) == "never"


def test_policy_gradient_of_the_theorem():
    """Against plain log-softmax over whole logits, row by row."""
    from experiments import theorem

    model = tiny_gpt2()
    _, _, ids, attn, mask = example_frame(toy.tokenizer())
    adv = torch.randn(mask.shape, generator=torch.Generator().manual_seed(0))
    got = theorem.gradient(model, ids, attn, mask, adv, torch.arange(len(ids)))
    model.zero_grad()
    for row in range(len(ids)):
        real = ids[row][attn[row].bool()][None]
        n = int(mask[row].sum())
        logp = model.lm(real).logits.log_softmax(-1)[0, -n - 1:-1].gather(1, real[0, -n:, None])[:, 0]
        ((logp * adv[row, :n]).sum() / len(ids)).backward()
    close(got, torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None]), 1e-4)


TAU = [("review the wine and the room .", "the wine was lovely . the room was not sad . <eos>".split())]


@pytest.mark.parametrize("before", [[], TAU])
@pytest.mark.parametrize("text", [
    "", "well , the soup", "the soup was not", "the soup was very very", "the soup was rude . the wine",
    "the soup was kind . the staff was bright ."])
def test_exact_value_is_the_mean_one_word_later(before, text):
    """Under the policies that may be writing, each as likely as what was read so far makes it."""
    from experiments import exact

    words, mean = text.split(), 0.0
    loglik = exact.read(PROMPT, words)[0][-1] + sum(exact.read(p, w)[0][-1] for p, w in before)
    posterior = np.exp(loglik - loglik.max()) / np.exp(loglik - loglik.max()).sum()
    state, _ = toy.read(PROMPT, text)
    said = [toy.next_words(state, policy, toy.requested(PROMPT)) for policy in toy.POLICIES.values()]
    for word in set().union(*said):
        p = sum(likely * by_policy.get(word, 0.0) for likely, by_policy in zip(posterior, said, strict=True))
        longer = [*words, words[-1] if word == toy.STUTTER else word]
        mean += p * exact.best_value(before, PROMPT, longer)[-1]
    close(mean, exact.best_value(before, PROMPT, words)[-1], 1e-6)


def test_exact_value_at_both_ends():
    """The mean of the policies at first, the reward at the end; and one policy's value once it is known."""
    from experiments import exact

    start = np.mean([toy.true_q(PROMPT, "", policy) for policy in toy.POLICIES])
    close(exact.best_value([], PROMPT, [])[0], start)
    close(exact.best_value([], PROMPT, "the soup was kind . <eos>".split())[-1], 0.0)
    rng = np.random.default_rng(0)
    known = [(PROMPT, [*toy.sample(PROMPT, "expert", rng).split(), toy.EOS]) for _ in range(300)]
    close(exact.best_value(known, PROMPT, ["the"])[-1], toy.true_q(PROMPT, "the", "expert"), 1e-3)


def test_exact_value_in_the_place_of_a_model():
    """Behind a tau, and beside a shorter row."""
    from experiments import exact

    tok, words = toy.tokenizer(), "the soup was rude . <eos>".split()
    trunk, ids = exact.Exact(None, tok), common.encode_prompt(tok, PROMPT)
    pairs = [(common.encode_prompt(tok, prompt), tok.convert_tokens_to_ids(said)) for prompt, said in TAU]
    prefix, _ = common.prepend_tau(tok, pairs, [], 99, 99)
    ids, attn, _ = common.frame([ids, ids], [tok.convert_tokens_to_ids(words), [tok.eos_token_id]])
    q = trunk(ids, attn, len(words), head="gvm", cache=trunk.turns(prefix))
    short = [*exact.best_value(TAU, PROMPT, [toy.EOS]), *[0.0] * (len(words) - 1)]
    close(q, np.array([exact.best_value(TAU, PROMPT, words), short]))


def test_blunders():
    from experiments import exact

    state, events = toy.State(), []
    for word in "the wine was very rude . the soup staff <eos>".split():
        kind, state = exact.event(state, word, toy.requested(PROMPT))
        events.append(kind)
    assert events == [None, "wrong noun", None, None, "unkind", None, None, None, "broken", "early end"]


def test_dvpo_learns_behind_exact_values():
    world()
    done = script(sys.executable, "experiments/exact.py", "--one", *RL, "--max-steps", "10", "--seed", "7",
                  "--out", path("exact"))
    assert done.returncode == 0, done.stderr
    with open(path("exact/run.json")) as f:
        assert json.load(f)["seed"] == 7                # no flag of dvpo.py's is taken for one of the tool's
    with open(path("exact/metrics.jsonl")) as f:
        rows = [json.loads(line) for line in f]
    assert rows[0]["ratio_first"] == 1.0 and rows[-1]["gold"] > rows[0]["gold"] + 0.2, rows


def test_real_text_pairs_by_hand():
    from experiments import real_text

    about = ("a", "x", 1.0), ("a", "jina-chat", 0.0), ("a", "x", 0.05), ("b", "x", -1.0), ("b", "y", 1.0)
    rows = [dict(prompt=prompt, policy=policy, reward=reward) for prompt, policy, reward in about]
    numbers = 3, 2, 2, 0, 0                             # a: two right pairs, one too close; b: a tie
    counts = real_text.right_pairs(rows, numbers)
    close(counts, [[[2, 2], [1, 1]], [[0.5, 1], [0, 0]]])
    close(real_text.accuracies(counts), [2.5 / 3, 1])
    table4, pairs = train_gvm.table4(rows, [(None, np.array([0.0, x])) for x in numbers], real_text.MIN_GAP)
    assert pairs == 3 and abs(table4["mean"] - 2.5 / 3) < 1e-9


def test_real_text_gain_by_hand():
    """Two prompts of one pair: better on the first, equal on the second. Drawn anew: 0, 1/2 or 1."""
    from experiments import real_text

    right, wrong = np.array([[1, 1], [1, 1]]), np.array([[0, 1], [0, 1]])
    found = real_text.gain([np.array([right, right])], [np.array([wrong, right])])
    close(found["mean"], [0.5, 0.5])
    close(found["low"], [0, 0])
    close(found["high"], [1, 1])


class Taus(common.Rows):
    tau = common.Rows.draw


def test_real_text_values_behind_a_tau_that_is_read_once():
    """Against train_gvm.py, which reads every row whole."""
    from experiments import real_text

    tok, model = toy.tokenizer(), tiny_llama()
    model.add_adapter("gvm", 4, 8)
    model.add_head("gvm", sees_token=True)
    with torch.no_grad():
        for p in model.adapter_parameters("gvm").values():
            p.normal_(0, 0.3)
    said = "the soup was great .", "the soup was not kind . the staff was rude .", "the wine was cold ."
    rows = [dict(prompt=PROMPT, response=text, reward=0.0, policy=policy)
            for text, policy in zip(said, "xyx", strict=True)]
    tau = [dict(rows[i], prompt="review the wine .", response=f"the room was {word} .")
           for i, word in ((0, "kind"), (1, "rude"))]
    meta = dict(name="gvm", tau_pairs=1, max_length=128, tau_length=16)
    got = real_text.row_values(model, tok, common.Rows(rows), Taus(tau), meta, seed=1)
    with torch.no_grad():
        args = argparse.Namespace(**meta)
        whole = train_gvm.token_values(model, tok, rows, [tau[:1], tau[1:], tau[:1]], args, "cpu")
        bare = train_gvm.token_values(model, tok, rows, [[], [], []], args, "cpu")
    for own, (_, values), (_, without) in zip(got, whole, bare, strict=True):
        close(own, values, 1e-4)
        assert abs(values - without).max() > 1e-2       # the tau is seen
