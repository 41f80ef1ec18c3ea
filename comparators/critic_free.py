"""RL without a critic: GRPO, Dr. GRPO, RLOO, ReMax. The baseline is other answers' reward.

Reads   {prompt} rows                                   data/toy/prompts.jsonl
        the SFT model: first policy, reference, trunk   out/tiny/sft/model
        the reward model of ppo_baseline.py             out/tiny/rm/model
Writes  the policy, a transformers folder               out/tiny/METHOD/model

Objective, for --group-size responses y_i to each prompt x, with dvpo.py's ratio r_t:

    A_i = (r(x, y_i) - baseline) / scale, for every token of y_i

    clipped     L = E[min(r_t A, clip(r_t, 1 - eps, 1 + eps) A) - kl_coef k3_t]
                k3_t = pi_ref / pi - log(pi_ref / pi) - 1, an estimate of the KL
    REINFORCE   L = E[(A - kl_coef (log pi - log pi_ref)) log pi], no gradient in (...);
                one update per batch of rollouts

    --method   arXiv        baseline              scale     loss_mean     update
    grpo       2402.03300   mean of the group     std       response      clipped
    dr_grpo    2503.20783   mean of the group     none      token         clipped
    rloo       2402.14740   mean of the others    none      token         REINFORCE
    remax      2310.10505   the greedy response   none      token         REINFORCE

E is a mean over the tokens of the batch, or over those of a response and then over responses.

Deviations from the papers
1. Dr. GRPO divides by the tokens of the batch; the paper by a constant. The paper has no KL
   penalty: use --kl-coef 0 for that.
2. RLOO: each token pays its own KL, as in the ReMax authors' code. In the paper the whole
   response pays the sum.
3. ReMax: both answers are the policy's own, without top_p 0.9, and rewards are not clipped.
4. Rewards, --missing-eos-penalty and linear decay are those of ppo_baseline.py.

    python ppo_baseline.py --rm-only                                        the reward model
    python comparators/critic_free.py                                       GRPO on the toy
    python comparators/critic_free.py --method remax                        ReMax
    deepspeed --num_gpus 8 comparators/critic_free.py --model llama3-3b     eight GPUs
"""
import argparse
import os
import sys

import numpy as np
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import common

METHODS = {
    "grpo": dict(clipped=True, baseline="mean", scale="std", loss_mean="response"),
    "dr_grpo": dict(clipped=True, baseline="mean", scale="none", loss_mean="token"),
    "rloo": dict(clipped=False, baseline="loo", scale="none", loss_mean="token"),
    "remax": dict(clipped=False, baseline="greedy", scale="none", loss_mean="token"),
}


def parse_args(argv=None):
    # The method first: the defaults of the other flags depend on it
    method_parser = argparse.ArgumentParser(add_help=False)
    method_parser.add_argument("--method", choices=METHODS, default="grpo")
    method = method_parser.parse_known_args(argv)[0].method
    own = argparse.Namespace(**METHODS[method])
    # One update per rollout needs a larger learning rate than several: RLOO takes ReMax's
    p, d = common.flags(__doc__, argv, "rl", "grpo" if own.clipped else "remax")
    flag = p.add_argument
    p.set_defaults(**METHODS[method])                               # args.baseline and so on
    flag("--method", choices=METHODS, default=method, help="see the table above")
    flag("--data", default=f"{d.data}/prompts.jsonl", help="rows {prompt} to roll out")
    flag("--heldout", default=f"{d.data}/prompts_heldout.jsonl", help="rows to measure on")
    flag("--init-from", default=d.start, help="SFT model: first policy, reference")
    flag("--rm", default=f"{d.out}/rm/model", help="the reward model, from ppo_baseline.py")
    flag("--reward", help="FILE.py:function(prompt, response) -> float, in place of --rm")
    flag("--gold", default=d.reward,
         help="FILE.py:function that is only logged, as gold; --reward takes its place")
    flag("--out", default=f"{d.out}/{method}", help="folder to write")
    flag("--max-steps", type=int, default=d.max_steps, help="rollout steps")
    flag("--batch-size", type=int, default=d.batch_size, help="rollouts per step and GPU")
    flag("--mini-batch-size", type=int, default=d.mini_batch_size, help="rows per pass")
    flag("--group-size", type=int, default=1 if own.baseline == "greedy" else 8,
         help="sampled responses per prompt (GRPO's paper 64)")
    flag("--lr", type=float, default=d.lr, help="learning rate of the policy")
    flag("--max-prompt-length", type=int, default=d.max_prompt_length, help="in tokens")
    flag("--max-new-tokens", type=int, default=d.max_new_tokens, help="of a response")
    flag("--temperature", type=float, default=d.temperature, help="for sampling and scoring")
    flag("--static-cache", action=argparse.BooleanOptionalAction, default=d.cuda,
         help="roll out with compiled blocks and CUDA graphs, for speed")
    flag("--missing-eos-penalty", type=float, default=1.0, help="for a truncated response")
    flag("--kl-coef", type=float, default=d.kl_coef, help="KL coefficient (GRPO's paper 0.04)")
    flag("--kl-target", type=float, default=0.0, help="as in dvpo.py; 0: constant (papers)")
    # Only a ratio can correct a second update on the same rollouts
    if own.clipped:
        flag("--grad-accum", type=int, default=d.grad_accum, help="mini-batches per update")
        flag("--ppo-epochs", type=int, default=d.ppo_epochs, help="per step (GRPO's paper 1)")
        flag("--clip", type=float, default=0.2, help="eps of the ratio")
    else:
        p.set_defaults(grad_accum=1, ppo_epochs=1)
    args = common.parse(p, argv)
    if not own.clipped:
        args.grad_accum = args.batch_size // args.mini_batch_size
    # A single response has no others and no standard deviation
    least = 1 if args.baseline == "greedy" else 2
    if args.group_size < least or args.batch_size % args.group_size:
        common.die(f"--group-size {args.group_size}: must be {least} or more, and divide "
                   f"--batch-size {args.batch_size}")
    return args


def with_greedy_rows(args, n_greedy, device):
    """The flags of a rollout that has n_greedy rows behind its --batch-size sampled ones."""
    temperature = torch.full((args.batch_size + n_greedy, 1), args.temperature, device=device)
    temperature[args.batch_size:] = 1e-6                            # argmax, but for ties
    return argparse.Namespace(**vars(args) | dict(temperature=temperature))


def group_advantage(score, size, baseline, scale, greedy_score=None):
    """Scores (B,), a group in a row -> advantage (B,), share of groups whose scores are equal.

    greedy_score: (B / size,), that of the greedy response to each prompt.
    """
    groups = score.view(-1, size)                                   # (B / size, size)
    if baseline == "greedy":
        adv = groups - greedy_score[:, None]
    else:
        adv = groups - groups.mean(1, keepdim=True)
    if baseline == "loo":                                           # r less the others' mean
        adv = adv * size / (size - 1)
    if scale == "std":
        adv = adv / (groups.std(1, keepdim=True) + 1e-6)
    is_equal = (groups == groups[:, :1]).all(1)
    return adv.flatten(), is_equal.float().mean()


def clipped_loss(logp, old_logp, ref_logp, adv, weight, clip, kl_coef):
    """Clipped ratio and k3, negated: (B, T) each, adv (B, 1) -> scalar, {clip_frac, ...}.

    weight (B, T): each token's share in the mean over the update, 0 outside the responses.
    """
    log_ratio = (logp - old_logp).clamp(-20, 20)
    ratio = log_ratio.exp()
    gain = torch.min(ratio * adv, ratio.clamp(1 - clip, 1 + clip) * adv)
    log_ref = (ref_logp - logp).clamp(-20, 20)                      # keeps exp finite
    k3 = log_ref.exp() - log_ref - 1
    loss = -((gain - kl_coef * k3) * weight).sum()
    with torch.no_grad():
        was_clipped = ((ratio - 1).abs() > clip).float()
        stat = dict(clip_frac=was_clipped, kl_step=ratio - 1 - log_ratio, ratio=ratio)
        return loss, {key: x[weight > 0].mean() for key, x in stat.items()}


def reinforce_loss(logp, ref_logp, adv, weight, kl_coef):
    """REINFORCE, the KL in the reward, negated: (B, T) each, adv (B, 1) -> scalar, a sum."""
    log_ratio_ref = (logp.detach() - ref_logp).clamp(-20, 20)
    adv = adv - kl_coef * log_ratio_ref                             # (B, T)
    return -(logp * adv * weight).sum()


def main(argv=None):
    args = parse_args(argv)
    reward = common.load_function(args.reward)
    gold = common.load_function(args.reward or args.gold)
    tok = common.load_tokenizer(args.init_from)
    data = common.read_prompts(tok, args.data, args.max_prompt_length)
    heldout = common.read_prompts(tok, args.heldout, args.max_prompt_length)
    run = common.Run(args, args.method, show=("gold", "kl", "score"))
    device = run.device

    # One frozen trunk is the reference (adapter off) and the reward model (adapter "rm" on).
    trunk = common.load_model(args.init_from, args, trainable=False)
    if reward is None:
        rm = common.load_adapter(trunk, tok, args.rm, "python ppo_baseline.py --rm-only")

    # The policy is a second model.
    model = common.load_model(args.init_from, args)

    # A rollout has B sampled responses, a group in a row; then the greedy one of each prompt.
    B = args.batch_size
    n_prompts = B // args.group_size
    n_greedy = n_prompts if args.baseline == "greedy" else 0
    rollout_args = with_greedy_rows(args, n_greedy, device) if n_greedy else args

    # DeepSpeed: it makes the optimizer, and at ZeRO-3 it shards the weights
    length = args.max_prompt_length + args.max_new_tokens           # tokens of the longest row
    policy = run.engine(
        "policy", model, args.lr, length, args.mini_batch_size, args.grad_accum, decodes=True)
    trunk = run.frozen(trunk)

    state = run.resume()
    kl_coef = state.get("kl_coef", args.kl_coef)
    kl_before = state.get("kl", 0.0)                                # of the last step
    for step in run.steps(args.max_steps):
        drawn = run.batch(len(data), n_prompts, step)
        index = [i for i in drawn for _ in range(args.group_size)] + drawn[:n_greedy]
        prompts = [data[i]["prompt"] for i in index]                # B + n_greedy of them
        prompt_ids = [common.encode_prompt(tok, p, args.max_prompt_length) for p in prompts]

        # 1. Rollout: a group of responses per prompt
        with run.phase("generate"):
            policy.eval()
            rolled_out = common.rollout(
                run.actor(model), prompt_ids, tok, rollout_args, device)
        ids, attn, mask, ended = rolled_out
        T = mask.shape[1]                                           # tokens of the longest
        texts = [tok.decode(r, skip_special_tokens=True) for r in common.unpad(ids, mask)]

        with run.phase("score"), torch.no_grad():
            # 2. Reward of each response as a whole, from the reward model or a function
            if reward:
                score = [reward(p, text) for p, text in zip(prompts, texts, strict=True)]
                score = torch.tensor(score, device=device)
            else:
                order = common.sort_by_length(torch.arange(len(ids)), attn, len(ids))
                batches = (ids, attn, T, order, args.mini_batch_size)
                score = common.forward_in_micro_batches(trunk, *batches, adapter="rm", head="rm")
                # Read after the last token: (B + n_greedy, T+1) -> (B + n_greedy,)
                score = score.gather(1, mask.sum(1, keepdim=True)).squeeze(1)
                score = (score - rm["mean"]) / rm["std"]
            # Logged with the penalty in it, unlike the score of ppo_baseline.py
            score = score - args.missing_eos_penalty * ~ended       # (B + n_greedy,)
            greedy_score = score[B:]                                # (n_greedy,)

            # 3. Advantage of the sampled responses, one number for all tokens of each. The
            #    greedy ones are not trained on.
            ids, attn, mask, ended, score = (x[:B] for x in (*rolled_out, score))
            adv, no_signal = group_advantage(
                score, args.group_size, args.baseline, args.scale, greedy_score)
            weight = mask.float()                                   # (B, T)
            if args.loss_mean == "response":
                weight = weight / mask.sum(1, keepdim=True)

            # 4. Log-probs of reference and policy. The micro-batches are those of the update,
            #    so that the first ratio is exactly 1; rows are sorted by length: less padding.
            rows_per_update = args.mini_batch_size * args.grad_accum
            order = common.sort_by_length(torch.arange(B), attn, rows_per_update)
            batches = (ids, attn, T, order, args.mini_batch_size)
            sampling = dict(temperature=args.temperature)
            ref_logp = common.forward_in_micro_batches(trunk, *batches, **sampling)   # (B, T)
            old_logp = torch.zeros_like(ref_logp)                   # filled in by part 5
            if args.clipped:
                old_logp = common.forward_in_micro_batches(
                    policy, *batches, **sampling)

        # 5. Update: passes of clipped policy gradient, or one step of REINFORCE
        with run.phase("train"):
            policy.train()
            run.set_lr(policy, args.lr * (1 - step / args.max_steps))
            scale = run.world * args.grad_accum                     # DeepSpeed divides by both
            stats = []
            for epoch in range(args.ppo_epochs):
                if epoch > 0:
                    shuffled = torch.randperm(B)
                    order = common.sort_by_length(shuffled, attn, rows_per_update)
                for group in order.split(rows_per_update):
                    total = run.sum(weight[group].sum())
                    for m in group.split(args.mini_batch_size):
                        logp = policy(ids[m], attn[m], T, **sampling)
                        parts = (ref_logp[m], adv[m, None])
                        if args.clipped:
                            share = weight[m] / total
                            loss, stat = clipped_loss(
                                logp, old_logp[m], *parts, share, args.clip, kl_coef)
                        else:
                            loss = reinforce_loss(logp, *parts, weight[m], kl_coef) / total
                            stat = {}
                            old_logp[m] = logp.detach()
                        policy.backward(loss * scale)
                        policy.step()
                        stats.append(dict(stat, loss=loss.detach(), n=mask[m].sum()))

        if args.dry_run:
            return run.show_batch(tok, ids, attn, mask, args.max_steps)

        # 6. Log, adapt the KL coefficient
        row = dict(greedy_score=greedy_score.mean()) if n_greedy else dict(no_signal=no_signal)
        if args.clipped:
            row |= {key: common.token_mean(stats, key) for key in ("clip_frac", "kl_step")}
            row["ratio_first"] = stats[0]["ratio"]
        if gold:
            answers = zip(prompts[:B], texts[:B], strict=True)
            row["gold"] = np.mean([gold(p, text) for p, text in answers])
        kl = ((old_logp - ref_logp).clamp(-20, 20) * mask).sum(1).mean()    # nats per response
        minus_entropy, _ = common.masked_moments(old_logp, mask)
        row = run.log(
            **row, loss=sum(s["loss"] for s in stats) / len(stats) * scale, kl=kl,
            kl_coef=kl_coef, score=score.mean(), entropy=-minus_entropy,
            ended=ended.float().mean(), length=mask.sum(1).float().mean(),
            tokens=run.sum(mask.sum()))
        kl_coef = common.adapt_kl_coef(kl_coef, row["kl"], kl_before, args.kl_target)
        kl_before = row["kl"]
        run.keep(kl_coef=kl_coef, kl=kl_before)

    # Save, and measure on fresh answers to held-out prompts
    run.save_model(model, tok)
    common.evaluate(run, model, policy, trunk, tok, heldout, gold)


if __name__ == "__main__":
    main()
    common.Run.end()
