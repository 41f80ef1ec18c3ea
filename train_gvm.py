"""Stage 2: the global value model, Q(tau, s, a), trained offline on the data that a reward model would use.

Reads   {prompt, response, reward[, policy]} rows, or pairs {prompt, chosen, rejected[, chosen_policy,
        rejected_policy]}, which become two rows of reward +1 and -1        data/toy/gvm.jsonl
        the SFT model, which becomes the trunk                              out/tiny/sft/model
Writes  a LoRA adapter and a scalar head on that trunk                      out/tiny/gvm/model

tau shows which policy is at work: question-answer pairs of the same policy on other prompts, before the
prompt in the same template. Rows are packed: a sequence is one row behind up to --tau-pairs others of its
policy. All of them are trained, each given those before it, so that the GVM learns to work with a tau of any
length and without one. In an epoch every row is the last of one sequence. Objective: eq. (1) of arXiv
2502.16944 v1, with lambda 0.95 instead of 0:

    L = mean over response tokens of (G_t - Q(tau, s_t, a_t))^2,
    G_t = gamma ((1 - lambda) Q_{t+1} + lambda G_{t+1}), and the reward of the response at its last token.

No gradient flows into G. An answer that was cut (its row says ended: false) has no <eos>, and its reward is
lower by --missing-eos-penalty, so that Q learns to predict it. Q is also trained at the last
prompt token, t = -1, towards gamma G_0: V(s_0), what this policy will get on this prompt. The head reads
[h_t, h_{t-1} * e(a_t)], hidden states and the output embedding of a_t: the product tells whether the trunk
expected that token.

Deviations from the paper
1. TD(lambda) with lambda 0.95. The paper's lambda = 0 carries the reward back by one token per update.
2. Batch norm, eq. (2), is a flag and off: a Q in units of reward can be compared with the truth. Its mean and
   sigma at the end of training are saved; the sigma bounds the divisor of dvpo.py's advantage from below.
3. The learning rate is 1e-4 and decays to 0. At the paper's 2e-6 the values of SmolLM2 hardly left 0.
4. Answers in tau are cut to --tau-length tokens, and their reward moves to the cut. tau and prompt get half
   of --max-length, which is 2,048 (paper: 1,024): RL must not reach a position that was not trained.
5. The head sees the token beside the state. The paper's, --plain-head, hardly sees rare mistakes.

    python train_gvm.py                                         the toy, on a CPU
    python train_gvm.py --model llama3-3b                       one GPU
    deepspeed --num_gpus 8 train_gvm.py --model llama3-3b       eight

    python train_gvm.py --eval-only --data data/toy/gvm_heldout.jsonl           table 4 on any labelled file
    python train_gvm.py --show "review the soup ." "the soup was not bland ." --policy good         figure 4
"""
import argparse
import contextlib
import itertools
import json
import math
import os

import numpy as np
import torch
import torch.nn.functional as F

import common


def parse_args(argv=None):
    p, d = common.flags(__doc__, argv, "gvm")
    flag = p.add_argument
    # Data and models
    flag("--data", nargs="+", default=[f"{d.data}/gvm.jsonl"], help="labelled rows or pairs")
    flag("--heldout", default=f"{d.data}/gvm_heldout.jsonl", help="labelled rows to measure on")
    flag("--init-from", default=d.start, help="SFT model: the trunk")
    flag("--gvm", default=f"{d.out}/gvm/model", help="what --eval-only and --show load")
    flag("--out", default=f"{d.out}/gvm", help="folder to write (--eval-only, --show: its eval/)")
    # Optimizer, size of a batch and of the run
    flag("--lr", type=float, default=d.lr, help="peak learning rate (paper 2e-6)")
    flag("--batch-size", type=int, default=d.batch_size,
         help="sequences per update and GPU (paper: 32 rows)")
    flag("--grad-accum", type=int, default=d.grad_accum, help="forward passes per update")
    flag("--epochs", type=float, default=d.epochs, help="passes over the data (paper: not given)")
    flag("--max-steps", type=int, help="stop after so many updates, whatever --epochs says")
    flag("--max-length", type=int, default=d.max_length, help="tokens; half for the response (paper 1024)")
    # Target and loss
    flag("--missing-eos-penalty", type=float, default=1.0,
         help="lowers the reward of a truncated answer, in standard deviations of the rewards")
    flag("--td-lambda", type=float, default=0.95, help="0: eq. (1); 1: Monte Carlo (paper 0)")
    flag("--gamma", type=float, default=1.0, help="discount per token (paper: not given)")
    flag("--batch-norm", action=argparse.BooleanOptionalAction, default=False,
         help="normalise Q in the loss, eq. (2) (paper: yes)")
    # Head, tau, adapter
    flag("--plain-head", action="store_true", help="the head reads h_t alone (paper: yes)")
    flag("--tau-pairs", type=int, help=f"most pairs in tau (default: {d.tau_pairs} or --gvm's)")
    flag("--tau-length", type=int, default=d.tau_length, help="tokens per answer in tau (paper: all)")
    flag("--lora-rank", type=int, default=d.lora_rank, help="rank of the adapter (paper 8)")
    flag("--lora-alpha", type=float, default=d.lora_alpha, help="scale times rank (paper 32)")
    flag("--lora-dropout", type=float, default=d.lora_dropout, help="in the adapter (paper 0.1)")
    # What is measured, and what is done in place of training
    flag("--true-q", default=d.true_q, help="FILE.py:function(prompt, prefix, policy) -> value")
    flag("--eval-only", action="store_true",
         help="do not train; measure --gvm on --data (default: the training rows)")
    flag("--min-gap", type=float, default=0.0, help="table 4: skip pairs closer than this")
    flag("--show", nargs=2, metavar=("PROMPT", "RESPONSE"), help="print values of tokens")
    flag("--policy", help="--show: whose rows in --heldout give tau (default: no tau)")
    args = common.parse(p, argv)
    if args.eval_only or args.show:
        # Beside the files of the training. The GVM itself says what tau it was trained with
        args.out = os.path.join(args.out, "eval")
    elif args.tau_pairs is None:
        args.tau_pairs = d.tau_pairs
    return args


# The loss

def td_targets(q, score, gamma, lam):
    """TD(lambda) targets, (B, T) -> (B, T): score is the reward where a response ends and NaN elsewhere.

    Where a response ends the target is its reward; before, gamma ((1 - lam) q[t+1] + lam target[t+1]):
    lam = 0 is eq. (1), lam = 1 the discounted reward. Nothing passes from a response to the one before it.
    """
    # Backwards in time, like GAE
    targets = torch.zeros_like(q)
    target = q[:, -1]                   # any number: the first end of a response replaces it
    for t in reversed(range(q.shape[1])):
        # One token back: the next value, and the target behind it
        if t + 1 < q.shape[1]:
            target = gamma * ((1 - lam) * q[:, t + 1] + lam * target)
        # At the end of a response the reward replaces what came from the response behind it
        target = torch.where(score[:, t].isnan(), target, score[:, t])
        targets[:, t] = target
    return targets


def batch_norm(x, mask, eps=1e-5):
    """Eq. (2): (x - mu) / (sigma + eps) over the masked tokens of all ranks: (B, T) -> (B, T), 0 outside."""
    # With the gradient through mean and sigma, over all ranks
    mean, std = common.masked_moments(x, mask)
    return (x - mean) / (std + eps) * mask


def gvm_loss(q, score, states, args):
    """Eq. (1), summed over the states that are True: q, score, states (B, T+1) -> scalar."""
    if args.batch_norm:
        q = batch_norm(q, states)
    # Targets are constants: no gradient flows into them
    targets = td_targets(q.detach(), score, args.gamma, args.td_lambda)
    return ((targets - q) ** 2 * states).sum()                  # the caller divides by all states


# Offline data: rows, and tau

class Labelled(list):
    """{prompt, response, reward, policy} rows from files of such rows or of pairs, and who wrote what."""

    def __init__(self, paths, tok=None):
        rows = []
        for path in paths:
            kinds = ["prompt", "response", "reward"], ["prompt", "chosen", "rejected"]
            lines = common.read_rows(path, *kinds, tok=tok)
            # All lines: some lines of a file of pairs may have these keys, too
            labelled = all(set(kinds[0]) <= set(line) for line in lines)
            for line in lines:
                if labelled:
                    rows.append(line)
                else:
                    # A pair is two rows
                    rows.append(dict(common.one_side(line, "chosen"), reward=1))
                    rows.append(dict(common.one_side(line, "rejected"), reward=-1))
        for row in rows:
            # Rows without a name share the policy None, which gets no tau
            row.setdefault("policy", None)
            row["reward"] = float(row["reward"])
        super().__init__(rows)
        self.by_policy = {}                                     # {policy: numbers of its rows}
        for i, row in enumerate(self):
            self.by_policy.setdefault(row["policy"], []).append(i)

    def penalise(self, penalty):
        """Lower the reward of every answer that was cut: nothing else says that an answer must end."""
        for row in self:
            row["reward"] -= penalty * (not row.get("ended", True))

    def tau(self, policy, prompt, pairs, rng):
        """Up to `pairs` rows of one policy on prompts other than this one; none for rows without a policy."""
        if policy is None or not pairs:
            return []
        own = self.by_policy[policy]
        # Twice as many as needed, since some may be on this prompt
        drawn = rng.choice(len(own), min(len(own), 2 * pairs), replace=False)
        others = [self[own[i]] for i in drawn if self[own[i]]["prompt"] != prompt]
        return others[:pairs]


def training_frame(sequences, device):
    """What common.pack returned, B times -> ids, attn (B, P+T), mask (B, T), states, score (B, T+1).

    mask is True on all responses, that of the row and those of its tau; states has the last prompt token of
    each beside them; score is for td_targets.
    """
    ids, attn, mask = common.packed_frame(sequences, device)
    after = F.pad(mask, (1, 0))                                 # (B, T+1) after a response token
    before = F.pad(mask, (0, 1))                                # (B, T+1) before one
    # The reward stands where a response ends: a state after a token and before none
    score = torch.full(after.shape, math.nan, device=device)
    rewards = [row["reward"] for _, spans in sequences for row, _, _ in spans]
    score[after & ~before] = torch.tensor(rewards, device=device)
    return ids, attn, mask, after | before, score


# Table 4, figure 4

@torch.no_grad()
def token_values(gvm, tok, rows, taus, args, device, batch=32):
    """[(response ids, values (T+1,))] of all rows; values[0] is V(s_0), values[t+1] Q at a_t."""
    # Prompt with its tau in front, and response
    prompts = []
    responses = []
    for row, tau in zip(rows, taus, strict=True):
        ids, spans = common.pack(tok, row, tau, args.max_length, args.tau_length)
        begin = spans[-1][1]                                    # of the row's own response
        prompts.append(ids[:begin])
        responses.append(ids[begin:])
    batch = min(batch, -(-len(rows) // common.world()))         # no more than there are
    values = torch.zeros(len(rows), args.max_length + 1, device=device)     # (rows, T+1)
    stride = batch * common.world()
    for start in common.Progress(range(0, len(rows), stride), desc="values", leave=False):
        # Every rank has as many rows: the last ones wrap around, and are not kept
        index = range(start + common.rank(), start + stride, common.world())
        some_prompts = [prompts[j % len(rows)] for j in index]
        some_responses = [responses[j % len(rows)] for j in index]
        ids, attn, mask = common.frame(some_prompts, some_responses, device)
        q = gvm(ids, attn, mask.shape[1], adapter="gvm", head="gvm")        # (B, T+1)
        kept = [j for j in index if j < len(rows)]
        values[kept, :q.shape[1]] = q[:len(kept)]
    # Each rank has filled in its share; the rest is 0
    values = common.all_sum(values).cpu().numpy()
    return [(r, v[:len(r) + 1]) for r, v in zip(responses, values, strict=True)]


def table4(rows, values, min_gap):
    """Pairs of rows on one prompt whose rewards differ: how often a statistic is higher for the better row.

    -> {statistic of the token values: accuracy in [0, 1]}, a tie counting one half; number of pairs.
    """
    # One number per row, as in the paper: mean, percentiles, the last value; not V(s_0)
    stats = {"mean": [q[1:].mean() for _, q in values]}
    for percentile in (1, 5, 10, 90, 95, 99):
        stats[f"P{percentile}"] = [np.percentile(q[1:], percentile) for _, q in values]
    stats["last"] = [q[-1] for _, q in values]
    # Pairs of rows on one prompt, the better one first
    by_prompt = {}
    pairs = []
    for i, row in enumerate(rows):
        by_prompt.setdefault(json.dumps(row["prompt"]), []).append(i)
    for group in by_prompt.values():
        for i, j in itertools.combinations(group, 2):
            gap = rows[i]["reward"] - rows[j]["reward"]
            if abs(gap) > min_gap:
                pairs.append((i, j) if gap > 0 else (j, i))
    # How often the better row has the higher number
    better, worse = np.array(pairs, dtype=int).reshape(-1, 2).T
    accuracy = {}
    for name, stat in stats.items():
        sign = np.sign(np.array(stat)[better] - np.array(stat)[worse])
        accuracy[name] = float((sign + 1).mean() / 2) if pairs else math.nan
    return accuracy, len(pairs)


def correlation(x, y):
    return float(np.corrcoef(x, y)[0, 1]) if min(np.std(x), np.std(y)) > 1e-6 else math.nan


def evaluate(run, gvm, tok, data):
    """What the paper reports of a GVM, and on the toy its distance from the truth -> OUT/eval.json."""
    args = run.args
    # Each row stands behind a tau of its own policy, always the same one
    taus = []
    for i, row in enumerate(data):
        rng = np.random.default_rng([args.seed, i])
        taus.append(data.tau(row["policy"], row["prompt"], args.tau_pairs, rng))
    # Table 4: which of two answers is better, by their token values
    values = token_values(gvm, tok, data, taus, args, run.device)
    accuracy, n_pairs = table4(data, values, args.min_gap)

    # Does V(s_0 | tau) follow the policies' mean rewards?
    policies = {}
    for policy in sorted(p for p in data.by_policy if p is not None):
        index = data.by_policy[policy]
        policies[policy] = dict(mean_reward=float(np.mean([data[i]["reward"] for i in index])),
                                v0=float(np.mean([values[i][1][0] for i in index])))
    # One policy alone has no order
    rewards = [about["mean_reward"] for about in policies.values()]
    v0s = [about["v0"] for about in policies.values()]
    v0_correlation = correlation(rewards, v0s) if len(policies) > 1 else math.nan
    # The truth is known on the toy, and nowhere else
    truth = against_truth(tok, data, values, args.true_q) if args.true_q else None
    found = dict(pairs=n_pairs, accuracy=accuracy, policies=policies, v0_correlation=v0_correlation,
                 true_q=truth)
    run.write("eval.json", found)
    if run.rank == 0:
        report(found)
    return found


def against_truth(tok, data, values, spec):
    """Token values beside the true ones, of the policies whose true value is known."""
    true_q = common.load_function(spec, unknown=KeyError)
    q = []
    truth = []
    for row, (ids, value) in zip(data, values, strict=True):
        # The values after 0, 1, 2, ... tokens of the response
        prefixes = [tok.decode(ids[:t]) for t in range(len(ids) + 1)]
        try:
            truth += [true_q(row["prompt"], prefix, row["policy"]) for prefix in prefixes]
            q += list(value)
        except KeyError:                    # a policy whose true value is not known
            pass
    if not q:
        return None
    # Over all tokens of all rows
    rmse = float(np.sqrt(np.mean((np.array(q) - truth) ** 2)))
    return dict(correlation=correlation(q, truth), rmse=rmse, tokens=len(q))


def report(result):
    """Print table 4 and the policies' values."""
    accuracy = "  ".join(f"{name} {value:.3f}" for name, value in result["accuracy"].items())
    print(f"accuracy over {result['pairs']} pairs:  {accuracy}")
    for name, about in result["policies"].items():
        print(f"{name:>24}: mean reward {about['mean_reward']:+.3f}   V(s_0 | tau) {about['v0']:+.3f}")
    if len(result["policies"]) > 1:
        print(f"V(s_0 | tau) and mean rewards: correlation {result['v0_correlation']:.3f}")
    if truth := result["true_q"]:
        print("true value of each token: correlation {correlation:.3f}, rmse {rmse:.3f}".format(**truth))


def colour(text, x):
    """Text on a background from red (x = -1) over white (0) to green (1)."""
    # Red takes green and blue away, green takes red and blue
    r, g, b = (255 - int(max(0, x) * 155), 255 + int(min(0, x) * 155), 255 - int(abs(x) * 155))
    return f"\033[48;2;{r};{g};{b}m\033[30m{text}\033[0m"


def show(run, gvm, tok, prompt, response, tau):
    """Figure 4: print the tokens coloured by value, and the truth where it is known -> dict to plot."""
    args = run.args
    row = dict(prompt=prompt, response=response)
    (ids, value), = token_values(gvm, tok, [row], [tau], args, run.device)
    # The first value belongs to no token
    tokens = ["V(s_0)"] + [tok.decode([i]) for i in ids]
    found = dict(row, policy=args.policy, tokens=tokens, q=value.tolist())
    # The truth, of a policy of the toy
    if args.true_q and args.policy:
        true_q = common.load_function(args.true_q, unknown=KeyError)
        prefixes = [tok.decode(ids[:t]) for t in range(len(ids) + 1)]
        with contextlib.suppress(KeyError):         # a policy whose true value is not known
            found["true_q"] = [true_q(prompt, prefix, args.policy) for prefix in prefixes]
    # One scale for both rows
    scale = max(1e-6, np.abs(found["q"] + found.get("true_q", [])).max())
    for key in ("q", "true_q"):
        if key in found:
            cells = [colour(f" {t} {v:+.2f} ", v / scale) for t, v in zip(tokens, found[key], strict=True)]
            run.say(f"{key:>7}  " + " ".join(cells))
    run.write("show.json", found)
    return found


def main(argv=None):
    args = parse_args(argv)

    # Data: every line is checked before anything is trained
    tok = common.load_tokenizer(args.init_from)
    data = Labelled([args.heldout] if args.show else args.data, tok)
    run = common.Run(args, "gvm", show=("loss", "q_mean", "q_std"))
    device = run.device

    # The trunk: the SFT model, frozen
    gvm = common.load_model(args.init_from, args, trainable=False)
    if args.show or args.eval_only:
        # A GVM that is there goes onto this trunk
        return use_trained(run, gvm, tok, data)

    # The penalty for an answer that was cut, in units of reward
    heldout = Labelled([args.heldout], tok)
    penalty = args.missing_eos_penalty * float(np.std([row["reward"] for row in data]))
    data.penalise(penalty)
    heldout.penalise(penalty)
    # Say what there is to learn, and refuse data that teach nothing
    rewards = [row["reward"] for row in data]
    if np.std(rewards) == 0:
        common.die("--data: all rewards are equal, so that there is nothing to learn from them")
    cut = np.mean([not row.get("ended", True) for row in data])
    run.say(f"{len(data)} rows, reward {np.mean(rewards):.3f} on average, sigma {np.std(rewards):.3f}; "
            f"{cut:.0%} of the answers never end")
    common.check_lengths(data, lambda row: common.encode_whole(tok, row), args.max_length)
    if set(data.by_policy) == {None}:       # no names, no tau: dvpo.py must not use one
        args.tau_pairs = 0

    # The value model is an adapter and a head on the frozen SFT model.
    gvm.add_adapter("gvm", args.lora_rank, args.lora_alpha, args.lora_dropout)
    gvm.add_head("gvm", sees_token=not args.plain_head)
    # DeepSpeed over adapter and head, all that is trained
    rows_per_pass = args.batch_size // args.grad_accum
    engine = run.engine("gvm", gvm, args.lr, args.max_length, rows_per_pass, args.grad_accum)
    rows_per_update = args.batch_size * run.world               # all ranks together
    steps = args.max_steps or math.ceil(args.epochs * len(data) / rows_per_update)
    state = run.resume()
    running = state["running"].to(device) if state else None   # moments of Q in the last updates

    engine.train()                                              # dropout in the adapter
    for step in run.steps(steps):
        # 1. Batch: rows, each after --tau-pairs others of its policy
        sequences = []
        for i in run.batch(len(data), args.batch_size, step):
            # Seeded by step and row: a resumed run draws the same
            rng = np.random.default_rng([args.seed, step, i])
            tau = data.tau(data[i]["policy"], data[i]["prompt"], args.tau_pairs, rng)
            # Ids of all these rows, and where each of their responses begins and ends
            sequences.append(common.pack(tok, data[i], tau, args.max_length, args.tau_length))
        # Similar lengths side by side: less padding. Batch norm needs random micro-batches.
        if not args.batch_norm:
            sequences.sort(key=lambda sequence: len(sequence[0]))
        ids, attn, mask, states, score = training_frame(sequences, device)      # states (B, T+1)
        n_states = run.sum(states.sum())                        # of all ranks

        # 2. Update: squared TD errors, eq. (1), a mean over the states of all passes and ranks.
        #    DeepSpeed divides the loss by the numbers of both, so it is multiplied by them
        run.set_lr(engine, args.lr * (1 - step / steps))
        loss = torch.zeros((), device=device)
        q = []                                                  # of all passes, for the log
        for m in torch.arange(args.batch_size).split(rows_per_pass):
            # One pass: a value at every state, (b, T+1)
            q_m = engine(ids[m], attn[m], mask.shape[1], adapter="gvm", head="gvm")
            loss_m = gvm_loss(q_m, score[m], states[m], args) / n_states
            engine.backward(loss_m * args.grad_accum * run.world)
            engine.step()
            loss += loss_m.detach()                             # the sum over passes is the mean
            q.append(q_m.detach())

        if args.dry_run:
            return run.show_batch(tok, ids, attn, mask, steps)

        # 3. Log, which takes the mean over ranks; this loss is a sum over them. Also keep the
        #    moments of Q over about five updates: dvpo.py divides by no smaller sigma
        moments = torch.stack(common.masked_moments(torch.cat(q)[:, 1:], mask))
        running = moments if running is None else running.lerp(moments, 0.2)
        q_mean, q_std = moments
        run.log(loss=loss * run.world, q_mean=q_mean, q_std=q_std, tokens=run.sum(mask.sum()))
        run.keep(running=running)

    # 4. Save what RL must know of the GVM beside its weights, measure on held-out rows
    engine.eval()                                               # no dropout
    q_mean, q_std = running.tolist()                            # in units of reward
    keys = ("tau_pairs", "tau_length", "max_length", "init_from")
    about = {key: getattr(args, key) for key in keys}
    about |= dict(missing_eos_penalty=penalty, q_mean=q_mean, q_std=q_std,
                  reward_mean=float(np.mean(rewards)), reward_std=float(np.std(rewards)))
    run.save_adapter(gvm, "gvm", tok, f"{args.out}/model", **about)
    if q_std < about["reward_std"] / 4:
        run.say(f"warning: sigma of Q is {q_std:.3f}, that of the rewards {about['reward_std']:.3f}: "
                "this GVM has hardly learned, and dvpo.py would follow its errors; train it for longer")
    evaluate(run, engine, tok, heldout)


def use_trained(run, gvm, tok, data):
    """--show or --eval-only: figure 4 or table 4 of --gvm."""
    args = run.args
    # The GVM, and how it was trained: rows are cut and penalised as then
    about = common.load_adapter(gvm, tok, args.gvm, f"python train_gvm.py --model {args.model}")
    data.penalise(about.get("missing_eos_penalty", 0.0))
    args.tau_pairs = about["tau_pairs"] if args.tau_pairs is None else args.tau_pairs
    args.tau_length = about["tau_length"]
    args.max_length = about["max_length"]
    common.check_context(gvm, args.max_length)
    gvm.eval()                                                  # no dropout
    if not args.show:
        # Table 4, on --data
        return evaluate(run, gvm, tok, data)
    if args.policy and args.policy not in data.by_policy:
        common.die(f"--policy {args.policy}: {args.heldout} has only {sorted(map(str, data.by_policy))}")
    # Without --policy there is no tau
    prompt, response = args.show
    tau = data.tau(args.policy, prompt, args.tau_pairs, np.random.default_rng(args.seed))
    return show(run, gvm, tok, prompt, response, tau)


if __name__ == "__main__":
    main()
    common.Run.end()
