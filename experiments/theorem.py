"""Theorem 3.1: do a reward model and a GVM from the same rows give the policy the same gradient, and can the
reward be read back from Q?

    python data/toy.py && python experiments/seeds.py
    python experiments/theorem.py --seeds 11 12                         some 40 minutes more on two cores

For n of the offline rows, a GVM and (on pairs out of the same n rows) a reward model are trained, both for
nine passes over the rows. Both, and the gold reward, then give a policy gradient of the SFT model on the same
rollouts: sum over tokens of A_t grad log pi(a_t | s_t), with

    gold, reward model    A_t = r(x, y) - mean of the prompt's other rollouts: REINFORCE, leave-one-out
    GVM, Q                A_t = Q_t - mean over all tokens: the paper's advantage, eq. (2)
    GVM, delta            A_t = Q_t - Q_{t-1}: the default of dvpo.py, there less its mean

They are compared by the cosine. Rollouts are finite, so a signal does not even agree with itself: "two
halves" is the cosine of its gradients on two halves of the rollouts, and a value of h there predicts
2 h / (1 + h) for two sets of the whole size. Signals compared here share the rollouts, and so part of their
noise.

The second table reads the reward back, r_t = Q_t - Q_{t+1} (gamma 1), on held-out rows of known policies.
Writes results/theorem.json and .md.
"""
import argparse
import json
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np
import torch

import common
import dvpo
import ppo_baseline
import train_gvm
from data import toy
from experiments.shared import commit, machine, seeds_parser, stage, table, two_at_a_time, write_results

SIZES = (1000, 3000, 10000, 30000)
ROLLOUTS = 7680                                         # a multiple of the 30 prompts


def train(seed):
    """out/theorem/SEED/N/{gvm,rm} for every n of SIZES."""
    base = f"out/seeds/{seed}"
    files = "data/toy/gvm.jsonl", f"{base}/labelled.jsonl"
    rows = [row for path in files for row in common.read_rows(path, [])]
    np.random.default_rng(seed).shuffle(rows)
    for n in SIZES:
        root, steps = f"out/theorem/{seed}/{n}", 9 * n // 64
        os.makedirs(root, exist_ok=True)
        pairs = toy.pair_up(rows[:n], np.random.default_rng(seed))
        for name, part in ("rows", rows[:n]), ("pairs", pairs):
            with open(f"{root}/{name}.jsonl", "w") as f:
                f.writelines(json.dumps(row) + "\n" for row in part)
        sft = "--seed", seed, "--init-from", f"{base}/sft/model"
        stage("train_gvm.py", f"{root}/gvm", *sft, "--data", f"{root}/rows.jsonl", "--max-steps", steps)
        stage("ppo_baseline.py", f"{root}/rm_only", *sft, "--rm", f"{root}/rm/model", "--pairs",
              f"{root}/pairs.jsonl", "--rm-max-steps", steps, "--rm-only")


def gradient(model, ids, attn, mask, adv, rows):
    """Mean over the rows of sum_t A_t grad log pi(a_t | s_t), one vector."""
    model.zero_grad()
    for m in rows.split(64):
        logp = model(ids[m], attn[m], mask.shape[1])
        ((logp * adv[m] * mask[m]).sum() / len(rows)).backward()
    return torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])


def leave_one_out(reward, mask, per_prompt):
    """r(x, y) less the mean of the prompt's other rollouts, at every token: (B, T)."""
    reward = reward.view(-1, per_prompt).double()
    baseline = (reward.sum(1, keepdim=True) - reward) / (per_prompt - 1)
    return ((reward - baseline).flatten()[:, None] * mask).float()


def gvm_values(trunk, tok, meta, prompts, responses, order, T, seed):
    """Q of every rollout behind a tau: (B, T + 1). A tau for each 64 rollouts, as in dvpo.py; the two halves
    of `order` share none."""
    draw, q = np.random.default_rng(seed), torch.zeros(len(prompts), T + 1)
    for half in order.chunk(2):
        for m in half.split(64):
            drawn = draw.choice(len(prompts), meta["tau_pairs"], replace=False)
            tau = [(prompts[i], responses[i]) for i in drawn]
            behind = [common.prepend_tau(tok, tau, prompts[i], meta["max_length"] // 2, meta["tau_length"])[0]
                      for i in m]
            ids, attn, mask = common.frame(behind, [responses[i] for i in m])
            q[m, :mask.shape[1] + 1] = trunk(ids, attn, mask.shape[1], "gvm", head="gvm")
    return q


def cosine(x, y):
    return torch.nn.functional.cosine_similarity(x, y, dim=0).item()


def gradients(seed):
    """[{n, signal, cosine with the gold reward's and the reward model's gradient, and of two halves}]."""
    folder = f"out/seeds/{seed}/sft/model"
    tok, policy = common.load_tokenizer(folder), common.load_model(folder).eval()
    texts = [row["prompt"] for row in common.read_rows("data/toy/prompts.jsonl", [])]
    per_prompt = ROLLOUTS // len(texts)
    texts = [text for text in texts for _ in range(per_prompt)]
    prompts = [common.encode_prompt(tok, text) for text in texts]
    torch.manual_seed(seed)
    sampling = argparse.Namespace(max_new_tokens=32, temperature=1.0, static_cache=False)
    ids, attn, mask, _ = dvpo.rollout(policy, prompts, tok, sampling, "cpu")
    responses = common.unpad(ids, mask)
    said = [tok.decode(response, skip_special_tokens=True) for response in responses]
    gold = torch.tensor([toy.gold_reward(x, y) for x, y in zip(texts, said, strict=True)])
    signals = {("", "gold"): leave_one_out(gold, mask, per_prompt)}
    order = torch.arange(len(texts)).view(-1, per_prompt).T.flatten()   # each 64 in a row hold all prompts
    for n in SIZES:
        trunk = common.load_model(folder, trainable=False).eval()
        common.load_adapter(trunk, tok, f"out/theorem/{seed}/{n}/rm/model", "")
        meta = common.load_adapter(trunk, tok, f"out/theorem/{seed}/{n}/gvm/model", "")
        with torch.no_grad():
            score = torch.cat([ppo_baseline.scores(trunk, ids[m], attn[m], mask[m])
                               for m in torch.arange(len(texts)).split(256)])
            q = gvm_values(trunk, tok, meta, prompts, responses, order, mask.shape[1], seed)
        signals[n, "reward model"] = leave_one_out(score, mask, per_prompt)
        signals[n, "GVM, Q"] = (q[:, 1:] - common.masked_moments(q[:, 1:], mask)[0]) * mask
        signals[n, "GVM, delta"] = (q[:, 1:] - q[:, :-1]) * mask
    found, whole = [], {}
    for (n, name), adv in signals.items():
        whole[n, name] = gradient(policy, ids, attn, mask, adv, order)
        halves = [gradient(policy, ids, attn, mask, adv, half) for half in order.chunk(2)]
        found.append(dict(seed=seed, n=n, signal=name, gold=cosine(whole[n, name], whole["", "gold"]),
                          halves=cosine(*halves),
                          reward_model=cosine(whole[n, name], whole[n, "reward model"]) if n else None))
    return found


def read_back(seed, n):
    """r_t = Q_t - Q_{t+1}, on held-out rows: at the last token Q itself, which should be the reward; before
    it nothing, on average."""
    folder, data = f"out/seeds/{seed}/sft/model", train_gvm.Labelled(["data/toy/gvm_heldout.jsonl"])
    tok, trunk = common.load_tokenizer(folder), common.load_model(folder, trainable=False).eval()
    meta = common.load_adapter(trunk, tok, f"out/theorem/{seed}/{n}/gvm/model", "")
    rows = [data[i] for i in range(len(data))]
    taus = [data.tau(row["policy"], row["prompt"], meta["tau_pairs"], np.random.default_rng([seed, i]))
            for i, row in enumerate(rows)]
    values = [q for _, q in train_gvm.token_values(trunk, tok, rows, taus, argparse.Namespace(**meta), "cpu")]
    reward, last = np.array([row["reward"] for row in rows]), np.array([q[-1] for q in values])
    before = np.concatenate([q[1:-1] - q[2:] for q in values])
    return dict(seed=seed, n=n, correlation=float(np.corrcoef(last, reward)[0, 1]),
                rmse=float(np.sqrt(np.mean((last - reward) ** 2))), before_mean=float(before.mean()),
                before_sd=float(before.std()), reward_sd=float(reward.std()))


def spread(runs, key):
    values = [run[key] for run in runs]
    if values[0] is None:
        return ""
    return f"{np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def report(seeds, cosines, back):
    command = f"python experiments/theorem.py --seeds {' '.join(map(str, seeds))}"
    data = dict(command=command, commit=commit(), machine=machine("one thread a training run"), seeds=seeds,
                rollouts=ROLLOUTS, gradients=cosines, read_back=back)
    lines = ["# Theorem 3.1 on the toy", "",
             f"Command: `{data['command']}`. Commit {data['commit']}. Machine: {data['machine']}. Seeds "
             f"{', '.join(map(str, seeds))}; mean (smallest to largest). {ROLLOUTS:,} rollouts of the SFT "
             "model per seed; nine passes over the rows. experiments/theorem.py says what is compared.", ""]
    cells = []
    for n, signal in dict.fromkeys((run["n"], run["signal"]) for run in cosines):
        runs = [run for run in cosines if (run["n"], run["signal"]) == (n, signal)]
        cells.append([n, signal, *(spread(runs, key) for key in ("gold", "reward_model", "halves"))])
    lines += table(["rows", "gradient from", "cosine with the gold reward's",
                    "with the reward model's of the same rows", "two halves of the rollouts"], cells)
    lines += ["", "The reward read back from Q on the held-out rows, r_t = Q_t - Q_{t+1}: at the last token "
              "(Q itself, against the gold reward), and before it, where the true reward is 0.", ""]
    cells, keys = [], ("correlation", "rmse", "before_mean", "before_sd")
    for n in SIZES:
        runs = [run for run in back if run["n"] == n]
        cells.append([n, *(spread(runs, key) for key in keys)])
    lines += table(["rows", "last token: correlation", "rms error", "before: mean", "sd"], cells)
    lines += ["", f"The gold reward of those rows has sd {back[0]['reward_sd']:.3f}."]
    write_results("theorem", data, lines)


def main():
    args = seeds_parser(__doc__).parse_args()
    if not args.report:
        two_at_a_time(train, args.seeds)
    report(args.seeds, [found for seed in args.seeds for found in gradients(seed)],
           [read_back(seed, n) for seed in args.seeds for n in SIZES])


if __name__ == "__main__":
    main()
