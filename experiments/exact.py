"""dvpo.py behind a value without error: the toy's exact values in the GVM's place.

    python experiments/exact.py [flags of dvpo.py]          one run
    python experiments/toy.py exact                         beside DVPO and PPO, several seeds

The five behaviour policies of the toy are known, so the best that a GVM can learn from their rows is known:
the mean of their exact values, each weighted by how likely that policy is to have written what was read so
far. That includes tau, and two answers leave little doubt about their author. Without a tau the first words
of the answer itself must tell.
"""
import functools
import itertools
import os
import re
import sys

import numpy as np
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import common
import dvpo
from data import toy


@functools.lru_cache(None)
def next_words(state, policy, nouns):
    return toy.next_words(state, toy.POLICIES[policy], nouns)


def read(prompt, words):
    """-> log-likelihood of the first t words under each policy, and their value for each: (T+1, 5) both."""
    nouns = tuple(toy.requested(prompt))
    state = toy.State()
    before = None
    loglik = [[0.0] * len(toy.POLICIES)]
    value = [[toy.values(p)[state] for p in toy.POLICIES]]
    for word in words:
        longer = []
        for so_far, policy in zip(loglik[-1], toy.POLICIES, strict=True):
            said = next_words(state, policy, nouns)
            stutter = said.get(toy.STUTTER, 0.0) if word == before else 0.0
            longer.append(so_far + np.log(said.get(word, 0.0) + stutter + 1e-9))
        loglik.append(longer)
        if word == toy.EOS:
            value.append([toy.reward_of(state)] * len(toy.POLICIES))
            break
        state = toy.advance(state, word, nouns)
        before = word
        value.append([toy.values(p)[state] for p in toy.POLICIES])
    return np.array(loglik), np.array(value)


def best_value(tau, prompt, words):
    """tau [(prompt, words)], prompt, words -> E[reward | tau, prompt, the first t words], t = 0 .. T.

    Every policy is equally likely beforehand.
    """
    loglik, value = read(prompt, words)
    loglik = loglik + sum(read(p, w)[0][-1] for p, w in tau)
    weight = np.exp(loglik - loglik.max(1, keepdims=True))
    return (weight * value).sum(1) / weight.sum(1)


def value_std(pairs, n=200):
    """Standard deviation of the best values over the tokens of n answers of every policy: the GVM's q_std."""
    rng = np.random.default_rng(0)
    values = []
    prompts = [f"review the {a} and the {b} ." for a, b in itertools.permutations(toy.NOUNS, 2)]
    for policy in toy.POLICIES:
        said = [(p, [*toy.sample(p, policy, rng).split(), toy.EOS]) for p in rng.choice(prompts, n)]
        for i, row in enumerate(said):
            tau = [said[i - k] for k in range(1, pairs + 1)]
            values.append(best_value(tau, *row)[1:])
    return float(np.concatenate(values).std())


class Exact(torch.nn.Module):
    """The frozen trunk of dvpo.py, whose value head says what best_value does."""

    def __init__(self, trunk, tok):
        super().__init__()
        self.trunk = trunk
        self.tok = tok

    def turns(self, ids):
        """Ids of one or more "<user> prompt <assistant> answer" -> [(prompt, words)]."""
        text = " ".join(self.tok.convert_ids_to_tokens(ids))
        parts = re.split(r"<user> (review the \w+ and the \w+ \.) <assistant>", text)[1:]
        return [(prompt, answer.split()) for prompt, answer in zip(parts[::2], parts[1::2], strict=True)]

    def forward(self, ids, attn, T, adapter=None, head=None, temperature=1.0, cache=None):
        if head is None:
            return self.trunk(ids, attn, T, adapter, temperature=temperature)
        q = torch.zeros(len(ids), T + 1)
        for row, i, a in zip(q, ids, attn, strict=True):
            value = best_value(cache or [], *self.turns(i[a.bool()])[-1])
            row[:len(value)] = torch.from_numpy(value)
        return q


def main(argv=None):
    args = dvpo.parse_args(argv)
    tok = common.load_tokenizer(args.init_from)
    pairs = 2 if args.tau_pairs is None else args.tau_pairs
    meta = dict(tau_pairs=pairs, max_length=256, tau_length=128, q_std=value_std(pairs))
    common.load_adapter = lambda *_, **__: meta
    common.Run.frozen = lambda run, trunk: Exact(trunk, tok)
    common.read_prefix = lambda trunk, prefix, *_: lambda n: trunk.turns(prefix)
    dvpo.main(argv)


if __name__ == "__main__":
    main()
    common.Run.end()
