"""What is DVPO worth behind a value without error? The review world's exact values in the GVM's place, with a
tau and without one.

    python data/toy.py && python experiments/seeds.py && python experiments/exact.py
        ten minutes more on two cores

The five behaviour policies are known, so the best that a GVM can learn from their rows is known: the mean of
their exact values, each weighted by how
likely that policy is to have written what was read so far. With a tau that includes tau, and two answers
leave little doubt about their author;
without one the first words of the answer itself must tell. dvpo.py runs as it is but for the model that gives
Q; ppo_baseline.py with the gold reward in
place of its reward model. Same SFT models, seeds and flags as in experiments/seeds.py, whose runs behind
learned values they are set beside.

The second table says where the learned values err: what single words do to Q in fresh answers of the expert,
behind its tau, learned and exact.
Writes out/exact/SEED/..., results/exact.json and .md.
"""
import argparse
import collections
import concurrent.futures
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
from experiments.seeds import STEPS
from experiments.shared import commit, final, interval, machine, stage, write_results

# pairs in tau, flags: named as in experiments/seeds.py
DVPO = {"dvpo": (2, ()), "dvpo_no_tau": (0, ()),
        "dvpo_no_tau_kl0.2": (0, ("--kl-coef", "0.2"))}
BLUNDERS = ("unkind", "broken", "wrong noun", "early end")


@functools.lru_cache(None)
def next_words(state, policy, nouns):
    return toy.next_words(state, toy.POLICIES[policy], nouns)


def read(prompt, words):
    """-> log-likelihood of the first t words under each policy, and their value for each policy that goes on
    after them: (T+1, 5) each."""
    nouns, state, before, loglik, value = tuple(
        toy.requested(prompt)), toy.State(), None, [[0.0] * len(toy.POLICIES)], []
    value.append([toy.values(p)[state] for p in toy.POLICIES])
    for word in words:
        said = [next_words(state, p, nouns) for p in toy.POLICIES]
        loglik.append([
            a + np.log(s.get(word, 0.0) + (s.get(toy.STUTTER, 0.0) if word == before else 0.0) + 1e-9)
            for a, s in zip(loglik[-1], said, strict=False)
        ])
        if word == toy.EOS:
            value.append([toy.reward_of(state)] * len(toy.POLICIES))
            break
        state, before = toy.advance(state, word, nouns), word
        value.append([toy.values(p)[state] for p in toy.POLICIES])
    return np.array(loglik), np.array(value)


def best_value(tau, prompt, words):
    """tau [(prompt, words)], prompt, words -> E[reward | tau, prompt, the first t words], t = 0 .. T; every
    policy equally likely beforehand."""
    loglik, value = read(prompt, words)
    loglik = loglik + sum(read(p, w)[0][-1] for p, w in tau)
    weight = np.exp(loglik - loglik.max(1, keepdims=True))
    return (weight * value).sum(1) / weight.sum(1)


def spread(pairs, n=200):
    """Standard deviation of those values over the tokens of n answers of every policy: what train_gvm.py
    leaves to dvpo.py as q_std."""
    rng, values = np.random.default_rng(0), []
    prompts = [f"review the {a} and the {b} ." for a, b in itertools.permutations(toy.NOUNS, 2)]
    for policy in toy.POLICIES:
        said = [(p, toy.sample(p, policy, rng).split() + [toy.EOS]) for p in rng.choice(prompts, n)]
        values += [
            best_value([said[i - k] for k in range(1, pairs + 1)], *row)[1:] for i, row in enumerate(said)
        ]
    return float(np.concatenate(values).std())


class Exact(torch.nn.Module):
    """The frozen trunk of dvpo.py, whose value head tells what best_value says."""
    def __init__(self, trunk, tok):
        super().__init__()
        self.trunk, self.tok = trunk, tok

    def turns(self, ids):
        """Ids of one or more "<user> prompt <assistant> answer" -> [(prompt, words)]."""
        parts = re.split(r"<user> (review the \w+ and the \w+ \.) <assistant>",
                         " ".join(self.tok.convert_ids_to_tokens(ids)))[1:]
        return [(prompt, answer.split()) for prompt, answer in zip(parts[::2], parts[1::2], strict=False)]

    def forward(self, ids, attn, T, adapter=None, head=None, temperature=1.0, cache=None):
        if head is None:
            return self.trunk(ids, attn, T, adapter, temperature=temperature)
        q = torch.zeros(len(ids), T + 1)
        for row, i, a in zip(q, ids, attn, strict=False):
            value = best_value(cache or [], *self.turns(i[a.bool()])[-1])
            row[:len(value)] = torch.from_numpy(value)
        return q


def rl(name, argv):
    """One run of dvpo.py, flags argv, behind the exact values."""
    pairs, flags = DVPO[name]
    tok = common.load_tokenizer(dvpo.parse_args(argv).init_from)
    common.load_adapter = lambda *_, **__: dict(tau_pairs=pairs, max_length=256, tau_length=128, q_std=spread(
        pairs))
    common.frozen = lambda trunk, args: Exact(trunk, tok)
    common.read_prefix = lambda trunk, prefix, *_: lambda n: trunk.turns(prefix)
    dvpo.main([*argv, *flags])


def runs(seed):
    argv = ("--seed", seed, "--init-from", f"out/seeds/{seed}/sft/model", "--max-steps", STEPS)
    for name in DVPO:
        stage("experiments/exact.py", f"out/exact/{seed}/{name}", *argv, "--one", name)
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


def changes(seed, name, n=4000):
    """What each word of BLUNDERS does to Q in n answers of the expert: {blunder: (how many, learned, exact)}.
    """
    root, rng, found = f"out/seeds/{seed}", np.random.default_rng(seed), collections.defaultdict(list)
    tok, model = common.load_tokenizer(f"{root}/sft/model"), common.load_model(
        f"{root}/sft/model", trainable=False).eval()
    meta = common.load_adapter(model, tok, f"{root}/{name}/model", made_by="python experiments/seeds.py")
    data = train_gvm.Labelled(["data/toy/gvm_heldout.jsonl"])
    prompts = [r["prompt"] for r in common.read_rows("data/toy/prompts_heldout.jsonl", ["prompt"])]
    rows = [
        dict(prompt=p, response=toy.sample(p, "expert", rng))
        for p in itertools.islice(itertools.cycle(prompts), n)
    ]
    taus = [data.tau("expert", r["prompt"], meta["tau_pairs"], rng) for r in rows]
    for row, (ids,
              q) in zip(rows,
                        train_gvm.token_values(model, tok, rows, taus, argparse.Namespace(**meta), "cpu",
                                               64), strict=False):
        state, nouns, words = toy.State(), toy.requested(row["prompt"]), tok.convert_ids_to_tokens(ids)
        exact = [toy.true_q(row["prompt"], " ".join(words[:t]), "expert") for t in range(len(words) + 1)]
        for t, word in enumerate(words):
            kind, state = event(state, word, nouns)
            found[kind].append((q[t + 1] - q[t], exact[t + 1] - exact[t]))
    return {k: (len(found[k]), *np.mean(found[k], 0).tolist()) for k in BLUNDERS}


def report(seeds):
    data = dict(
        command="python experiments/exact.py", commit=commit(),
        machine=machine("one thread a run"), seeds=seeds,
        q_std={name: spread(pairs)
               for name, (pairs, _) in DVPO.items()}, runs={
                   name: {
                       kind: [final(f"out/{folder}/{seed}/{name}") for seed in seeds]
                       for kind, folder in (("learned", "seeds"), ("exact", "exact"))
                   }
                   for name in (*DVPO, "ppo")
               }, blunders={name: [changes(seed, name) for seed in seeds]
                            for name in ("gvm", "gvm_no_tau")})
    lines = [
        "# DVPO behind exact values", "",
        f"Command: `{data['command']}`. Commit {data['commit']}. Machine: {data['machine']}. Seeds "
        f"{', '.join(map(str, seeds))}; mean and 95 % interval (Student's t).",
        "", "| run | value or reward | last tenth | held-out | KL |", "|---|---|---|---|---|"
    ]
    for name, kinds in data["runs"].items():
        lines += [
            f"| {name} | {kind} | " +
            " | ".join(interval([r[k] for r in kinds[kind]], 3) for k in ("final", "heldout", "kl")) + " |"
            for kind in kinds
        ]
    lines += [
        "",
        "learned: the runs of toy.md, behind the GVM (DVPO) or the reward model (PPO). exact: behind the "
        "exact values (DVPO) or the gold reward (PPO).",
        "", "## What a blunder does to Q", "",
        "Mean over the seeds of the change of Q at that word, in 4,000 fresh answers of the expert.", "",
        "| word | times a seed | exact | GVM, behind the expert's tau | GVM without tau |",
        "|---|---|---|---|---|"
    ]
    for k in BLUNDERS:
        times, exact, learned, bare = (np.mean([seed[k][i] for seed in data["blunders"][name]])
                                       for name, i in (("gvm", 0), ("gvm", 2), ("gvm", 1), ("gvm_no_tau", 1)))
        lines.append(f"| {k} | {times:.0f} | {exact:+.2f} | {learned:+.2f} | {bare:+.2f} |")
    write_results("exact", data, lines)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                allow_abbrev=False)  # --seed is dvpo.py's
    p.add_argument("--seeds", type=int, nargs="+", default=[11, 12, 13, 14, 15], help="(default: 11 to 15)")
    p.add_argument("--report", action="store_true", help="run nothing")
    p.add_argument("--one", choices=DVPO,
                   help="only this run of dvpo.py, whose other flags are dvpo.py's own")
    args, rest = p.parse_known_args()
    if args.one:
        rl(args.one, rest)
        common.finish()
    if rest:
        p.error(f"{' '.join(rest)}: only with --one")
    if not args.report:
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            list(pool.map(runs, args.seeds))
    report(args.seeds)


if __name__ == "__main__":
    main()
