"""What is DVPO worth behind a value without error? The toy's exact values in the GVM's place.

    python data/toy.py && python experiments/seeds.py && python experiments/exact.py        20 minutes more

The five behaviour policies are known, so the best that a GVM can learn from their rows is known: the mean of
their exact values, each weighted by how likely that policy is to have written what was read so far. That
includes tau, and two answers leave little doubt about their author; without a tau the first words of the
answer itself must tell. dvpo.py runs as it is but for the model that gives Q; ppo_baseline.py with the gold
reward in place of its reward model. SFT models, seeds and flags are those of experiments/seeds.py, whose runs
behind learned values they are compared with.

The second table says where the learned values err: what single words do to Q in fresh answers of the expert,
behind its tau and without one, learned and exact.
Writes out/exact/SEED/..., results/exact.json and .md.
"""
import argparse
import collections
import functools
import itertools
import os
import re
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np
import torch

import common
import dvpo
import train_gvm
from data import toy
from experiments.seeds import DVPO, STEPS
from experiments.shared import (
    commit,
    final,
    interval,
    machine,
    seeds_parser,
    stage,
    table,
    two_at_a_time,
    write_results,
)

RUNS = {name: DVPO[name] for name in ("dvpo", "dvpo_no_tau", "dvpo_no_tau_kl0.2")}
BLUNDERS = "unkind", "broken", "wrong noun", "early end"


@functools.lru_cache(None)
def next_words(state, policy, nouns):
    return toy.next_words(state, toy.POLICIES[policy], nouns)


def read(prompt, words):
    """-> log-likelihood of the first t words under each policy, and their value for each: (T+1, 5) both."""
    nouns, state, before = tuple(toy.requested(prompt)), toy.State(), None
    loglik, value = [[0.0] * len(toy.POLICIES)], [[toy.values(p)[state] for p in toy.POLICIES]]
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
        state, before = toy.advance(state, word, nouns), word
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
    """Standard deviation of the best values over the tokens of n answers of every policy: dvpo.py's q_std."""
    rng, values = np.random.default_rng(0), []
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
        self.trunk, self.tok = trunk, tok

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


def rl(argv):
    """One run of dvpo.py behind the exact values."""
    args = dvpo.parse_args(argv)
    tok, pairs = common.load_tokenizer(args.init_from), 2 if args.tau_pairs is None else args.tau_pairs
    meta = dict(tau_pairs=pairs, max_length=256, tau_length=128, q_std=value_std(pairs))
    common.load_adapter = lambda *_, **__: meta
    common.Run.frozen = lambda run, trunk: Exact(trunk, tok)
    common.read_prefix = lambda trunk, prefix, *_: lambda n: trunk.turns(prefix)
    dvpo.main(argv)


def runs(seed):
    argv = "--seed", seed, "--init-from", f"out/seeds/{seed}/sft/model", "--max-steps", STEPS
    argv = *argv, "--kl-target", 0                      # a constant coefficient
    for name, flags in RUNS.items():
        stage("experiments/exact.py", f"out/exact/{seed}/{name}", "--one", *argv, *flags)
    stage("ppo_baseline.py", f"out/exact/{seed}/ppo", *argv, "--reward", "data/toy.py:gold_reward")


def event(state, word, nouns):
    """What a word does to the review -> (its name in BLUNDERS, or None; the state after it)."""
    if word == toy.EOS:
        return ("early end" if state.clauses < 2 else None), state
    after = toy.advance(state, word, nouns)
    if after.at == "broken" and state.at != "broken":
        return "broken", after
    if after.at == "adjective" and not after.positive:
        return "unkind", after
    return ("wrong noun" if after.at == "noun" and after.noun == 2 else None), after


def changes(seed, pairs, gvm="gvm", n=4000):
    """What each word of BLUNDERS does to Q in n answers of the expert, behind so many pairs of its tau.

    -> {blunder: (how many, learned, exact)}
    """
    root, rng, found = f"out/seeds/{seed}", np.random.default_rng(seed), collections.defaultdict(list)
    tok = common.load_tokenizer(f"{root}/sft/model")
    model = common.load_model(f"{root}/sft/model", trainable=False).eval()
    meta = common.load_adapter(model, tok, f"{root}/{gvm}/model", made_by="python experiments/seeds.py")
    data = train_gvm.Labelled(["data/toy/gvm_heldout.jsonl"])
    prompts = [row["prompt"] for row in common.read_rows("data/toy/prompts_heldout.jsonl", ["prompt"])]
    prompts = itertools.islice(itertools.cycle(prompts), n)
    rows = [dict(prompt=p, response=toy.sample(p, "expert", rng)) for p in prompts]
    taus = [data.tau("expert", row["prompt"], pairs, rng) for row in rows]
    values = train_gvm.token_values(model, tok, rows, taus, argparse.Namespace(**meta), "cpu", 64)
    for row, (ids, q) in zip(rows, values, strict=True):
        state, nouns, words = toy.State(), toy.requested(row["prompt"]), tok.convert_ids_to_tokens(ids)
        exact = [toy.true_q(row["prompt"], " ".join(words[:t]), "expert") for t in range(len(words) + 1)]
        for t, word in enumerate(words):
            kind, state = event(state, word, nouns)
            found[kind].append((q[t + 1] - q[t], exact[t + 1] - exact[t]))
    return {kind: (len(found[kind]), *np.mean(found[kind], 0).tolist()) for kind in BLUNDERS}


def report(seeds):
    about = dict(command="python experiments/exact.py", commit=commit(), machine=machine("one thread a run"))
    results = {}
    for name in (*RUNS, "ppo"):
        results[name] = {}
        for kind, folder in ("learned", "seeds"), ("exact", "exact"):
            results[name][kind] = [final(f"out/{folder}/{seed}/{name}") for seed in seeds]
    blunders = dict(gvm=[changes(seed, 2) for seed in seeds], gvm_no_tau=[changes(seed, 0) for seed in seeds])
    data = dict(about, seeds=seeds, q_std={f"{pairs} pairs": value_std(pairs) for pairs in (0, 2)},
                runs=results, blunders=blunders)
    lines = ["# DVPO behind exact values", "",
             f"Command: `{about['command']}`. Commit {about['commit']}. Machine: {about['machine']}. Seeds "
             f"{', '.join(map(str, seeds))}; mean and 95 % interval (Student's t).", ""]
    cells = []
    for name, kinds in results.items():
        for kind, found in kinds.items():
            values = [interval([run[key] for run in found], 3) for key in ("final", "heldout", "kl")]
            cells.append([name, kind, *values])
    lines += table(["run", "value or reward", "last tenth", "fresh", "KL"], cells)
    lines += ["", "learned: the runs of toy.md, behind the GVM (DVPO) or the reward model (PPO). exact: "
              "behind the exact values (DVPO) or the gold reward (PPO).", "",
              "## What a blunder does to Q", "",
              "Mean over seeds of the change of Q at that word, in 4,000 fresh answers of the expert.", ""]
    cells = []
    for kind in BLUNDERS:
        with_tau, without = ([seed[kind] for seed in blunders[name]] for name in ("gvm", "gvm_no_tau"))
        times, learned, exact = np.mean(with_tau, 0)
        bare = np.mean(without, 0)[1]
        cells.append([kind, f"{times:.0f}", f"{exact:+.2f}", f"{learned:+.2f}", f"{bare:+.2f}"])
    names = ["word", "times per seed", "exact", "GVM, behind the expert's tau", "GVM without tau"]
    lines += table(names, cells)
    write_results("exact", data, lines)


def main():
    p = seeds_parser(__doc__, allow_abbrev=False)       # --seed is dvpo.py's
    p.add_argument("--one", action="store_true", help="only one run of dvpo.py, with the other flags")
    args, rest = p.parse_known_args()
    if args.one:
        rl(rest)
        common.finish()
    if rest:
        p.error(f"{' '.join(rest)}: only with --one")
    if not args.report:
        two_at_a_time(runs, args.seeds)
    report(args.seeds)


if __name__ == "__main__":
    main()
