"""Theorem 3.1, looked at: do a reward model and a GVM from the same rows give the policy the same gradient,
and is the reward to be had back from Q?

    python data/toy.py && python experiments/seeds.py && python experiments/theorem.py
        about half an hour more on two cores

For n of the offline rows a GVM and, on pairs out of the same n rows, a reward model are trained, equally many
steps on 64 rows or pairs: nine passes over the rows.
Both, and the gold reward, then give a policy gradient of the SFT
model on the same rollouts: sum over tokens of A_t grad log pi(a_t | s_t), with

    gold, reward model    A_t = r(x, y) - its mean over the other rollouts of that prompt       REINFORCE with
    a leave-one-out baseline
    GVM, Q                A_t = Q_t - its mean over all tokens                                  the paper's
    advantage, eq. (2)
    GVM, delta            A_t = Q_t - Q_{t-1}                                                   the default of
    dvpo.py, there less its mean

The cosine between two such vectors is the measure. Rollouts are finite, so a signal does not even agree with
itself: "two halves" is the cosine of its gradients on
two halves of the rollouts, and h there predicts 2 h / (1 + h) for two sets of the whole size. Signals
compared here share the rollouts, and so part of their noise.
The second table reads the reward back, r_t = Q_t - Q_{t+1} (gamma 1), on held-out rows whose policies are
known. Writes results/theorem.json and .md.
"""
import argparse
import concurrent.futures
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
from experiments.shared import machine, stage, write_results

SIZES = (1000, 3000, 10000, 30000)


def train(seed):
    """out/theorem/SEED/N/{gvm,rm} for every n of SIZES."""
    base = f"out/seeds/{seed}"
    files = "data/toy/gvm.jsonl", f"{base}/labelled.jsonl"
    rows = [row for path in files for row in common.read_rows(path, [])]
    np.random.default_rng(seed).shuffle(rows)
    for n in SIZES:
        root = f"out/theorem/{seed}/{n}"
        os.makedirs(root, exist_ok=True)
        pairs = toy.pair_up(rows[:n], np.random.default_rng(seed))
        for name, part in ("rows", rows[:n]), ("pairs", pairs):
            with open(f"{root}/{name}.jsonl", "w") as f:
                f.writelines(json.dumps(r) + "\n" for r in part)
        sft = ("--seed", seed, "--init-from", f"{base}/sft/model")
        steps = 9 * n // 64
        stage("train_gvm.py", f"{root}/gvm", *sft, "--data", f"{root}/rows.jsonl", "--max-steps", steps)
        stage("ppo_baseline.py", f"{root}/ppo", *sft, "--rm", f"{root}/rm/model", "--pairs",
              f"{root}/pairs.jsonl", "--rm-max-steps", steps, "--max-steps", 1)


def gradient(model, ids, attn, mask, adv, rows):
    """Mean over the rows of sum_t A_t grad log pi(a_t | s_t), one vector."""
    model.zero_grad()
    for m in rows.split(64):
        logp = model(ids[m], attn[m], mask.shape[1])
        ((logp * adv[m] * mask[m]).sum() / len(rows)).backward()
    return torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None])


def gradients(seed, args):
    """[{n, signal, gold cosine, cosine with the other's, two halves}] of one seed."""
    folder = f"out/seeds/{seed}/sft/model"
    tok, policy = common.load_tokenizer(folder), common.load_model(folder).eval()
    texts = [r["prompt"] for r in common.read_rows("data/toy/prompts.jsonl", [])]
    per_prompt = args.rollouts // len(texts)
    texts = [t for t in texts for _ in range(per_prompt)]
    prompts = [common.encode_prompt(tok, t) for t in texts]
    torch.manual_seed(seed)
    ids, attn, mask, _ = dvpo.rollout(
        policy, prompts, tok, argparse.Namespace(max_new_tokens=32, temperature=1.0, static_cache=False),
        "cpu")
    responses, T = common.unpad(ids, mask), mask.shape[1]
    gold = torch.tensor(
        [toy.gold_reward(t, tok.decode(r, skip_special_tokens=True))
         for t, r in zip(texts, responses, strict=True)])

    def leave_one_out(r):
        r = r.view(-1, per_prompt).double()
        return ((r - (r.sum(1, keepdim=True) - r) / (per_prompt - 1)).flatten()[:, None] * mask).float()

    signals = {("", "gold"): leave_one_out(gold)}
    numbers = torch.arange(len(texts)).view(
        -1, per_prompt).T.flatten()  # prompt after prompt: each 64 in turn hold them all
    for n in SIZES:
        root = f"out/theorem/{seed}/{n}"
        trunk = common.load_model(folder, trainable=False).eval()
        common.load_adapter(trunk, tok, f"{root}/rm/model",
                            ""), (meta := common.load_adapter(trunk, tok, f"{root}/gvm/model", ""))
        with torch.no_grad():
            score = torch.cat([
                ppo_baseline.scores(trunk, ids[m], attn[m], mask[m])
                for m in torch.arange(len(texts)).split(256)
            ])
            draw = np.random.default_rng(seed)
            q = []
            for m in (m for half in numbers.chunk(2) for m in half.split(64)
                      ):  # a tau for each 64 rollouts, as in dvpo.py; the halves share none
                tau = [(prompts[i], responses[i])
                       for i in draw.choice(len(texts), meta["tau_pairs"], replace=False)]
                behind = [
                    common.prepend_tau(tok, tau, prompts[i], meta["max_length"] // 2, meta["tau_length"])[0]
                    for i in m
                ]
                f_ids, f_attn, f_mask = common.frame(behind, [responses[i] for i in m])
                value = trunk(f_ids, f_attn, f_mask.shape[1], "gvm", head="gvm")
                q.append(torch.nn.functional.pad(value, (0, T + 1 - value.shape[1])))
            q = torch.cat(q)[numbers.argsort()]  # back in their order
        signals[n, "reward model"] = leave_one_out(score)
        signals[n, "GVM, Q"] = (q[:, 1:] - common.masked_moments(q[:, 1:], mask)[0]) * mask
        signals[n, "GVM, delta"] = (q[:, 1:] - q[:, :-1]) * mask
    whole = {k: gradient(policy, ids, attn, mask, a, numbers) for k, a in signals.items()}
    halves = {
        k: [gradient(policy, ids, attn, mask, a, half) for half in numbers.chunk(2)]
        for k, a in signals.items()
    }

    def cosine(x, y):
        return torch.nn.functional.cosine_similarity(x, y, dim=0).item()

    return [
        dict(seed=seed, n=n, signal=name, gold=cosine(whole[n, name],
                                                      whole["", "gold"]), halves=cosine(*halves[n, name]),
             reward_model=cosine(whole[n, name], whole[n, "reward model"]) if n else None)
        for n, name in whole
    ]


def read_back(seed, n):
    """r_t = Q_t - Q_{t+1}, on held-out rows: at the last token Q itself, which should be the reward; before
    it nothing, on average."""
    folder, data = f"out/seeds/{seed}/sft/model", train_gvm.Labelled(["data/toy/gvm_heldout.jsonl"])
    tok, trunk = common.load_tokenizer(folder), common.load_model(folder, trainable=False).eval()
    meta = common.load_adapter(trunk, tok, f"out/theorem/{seed}/{n}/gvm/model", "")
    rows = [data[i] for i in range(len(data))]
    taus = [
        data.tau(r["policy"], r["prompt"], meta["tau_pairs"], np.random.default_rng([seed, i]))
        for i, r in enumerate(rows)
    ]
    values = [v for _, v in train_gvm.token_values(trunk, tok, rows, taus, argparse.Namespace(**meta), "cpu")]
    reward, last = np.array([r["reward"] for r in rows]), np.array([v[-1] for v in values])
    before = np.concatenate([v[1:-1] - v[2:] for v in values])
    return dict(seed=seed, n=n, correlation=float(np.corrcoef(last, reward)[0, 1]),
                rmse=float(np.sqrt(np.mean((last - reward)**2))), before_mean=float(before.mean()),
                before_sd=float(before.std()), reward_sd=float(reward.std()))


def report(args, cosines, back):
    lines = [
        "# Theorem 3.1 on the review world", "",
        f"Command: `python experiments/theorem.py`. Seeds {', '.join(map(str, args.seeds))}; mean (smallest "
        f"to largest). {args.rollouts:,} rollouts of the SFT model a seed; nine passes over the rows. "
        f"Machine: {machine()}. experiments/theorem.py says what is "
        "compared.", "",
        "| rows | gradient from | cosine with the gold reward's | with the reward model's of the same rows "
        "| two halves of the rollouts |",
        "|---|---|---|---|---|"
    ]

    def spread(rows, key):
        values = [r[key] for r in rows]
        if values[0] is None:
            return ""
        return f"{np.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"

    for n, signal in dict.fromkeys((r["n"], r["signal"]) for r in cosines):
        rows = [r for r in cosines if (r["n"], r["signal"]) == (n, signal)]
        lines.append(f"| {n} | {signal} | " +
                     " | ".join(spread(rows, k) for k in ("gold", "reward_model", "halves")) + " |")
    lines += [
        "",
        "The reward read back from Q on the held-out rows, r_t = Q_t - Q_{t+1}: at the last token (Q "
        "itself, against the gold reward), and before it, where the true reward is 0.",
        "", "| rows | last token: correlation | rms error | before: mean | sd |", "|---|---|---|---|---|"
    ]
    for n in SIZES:
        rows = [r for r in back if r["n"] == n]
        lines.append(f"| {n} | " +
                     " | ".join(spread(rows, k)
                                for k in ("correlation", "rmse", "before_mean", "before_sd")) + " |")
    lines += ["", f"The gold reward of those rows has sd {back[0]['reward_sd']:.3f}."]
    data = dict(command="python experiments/theorem.py", seeds=args.seeds, rollouts=args.rollouts,
                gradients=cosines, read_back=back)
    write_results("theorem", data, lines)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--seeds", type=int, nargs="+", default=[11, 12, 13], help="(default: 11 to 13)")
    p.add_argument("--rollouts", type=int, default=7680,
                   help="a multiple of the 30 prompts (default: %(default)s)")
    args = p.parse_args(argv)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        list(pool.map(train, args.seeds))
    report(args, [r for seed in args.seeds for r in gradients(seed, args)],
           [read_back(seed, n) for seed in args.seeds for n in SIZES])


if __name__ == "__main__":
    main()
