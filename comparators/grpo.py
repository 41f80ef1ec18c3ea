"""GRPO (arXiv 2402.03300): the baseline of a response is the mean reward of other responses to its prompt.

Reads   {prompt} rows                                   data/toy/prompts.jsonl
        the SFT model: first policy, reference, trunk   out/tiny/sft/model
        the reward model of ppo_baseline.py             out/tiny/rm/model
Writes  the policy, a transformers folder               out/tiny/grpo/model

Objective, for --group-size responses y_i to one prompt, with dvpo.py's ratio r_t:

    L = E[min(r_t A, clip(r_t, 1 - eps, 1 + eps) A) - kl_coef k3_t]
    A_i = (r(x, y_i) - mean of the group) / standard deviation of the group, for every token of y_i
    k3_t = pi_ref / pi - log(pi_ref / pi) - 1, an estimate of the KL with a gradient of its own

E is a mean over the tokens of a response, then over responses. A group whose rewards are all equal teaches
nothing: `no_signal` in the log is their share. The flags give the rest of the family:

    --scale none --loss-mean token --kl-coef 0          Dr. GRPO (arXiv 2503.20783)
    --scale none --loss-mean token --baseline loo       RLOO (arXiv 2402.14740)

Deviations: --loss-mean token divides by the tokens of the batch, Dr. GRPO by a constant; RLOO has its KL in
the reward and no clipping. Rewards, --missing-eos-penalty and linear decay are those of ppo_baseline.py.

    python ppo_baseline.py --rm-only                                        the reward model
    python comparators/grpo.py                                              the toy, on a CPU
    deepspeed --num_gpus 8 comparators/grpo.py --model llama3-3b            eight GPUs
"""
import argparse
import os
import sys

import numpy as np
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import common
from dvpo import rollout


def parse_args(argv=None):
    p, d = common.flags(__doc__, argv, "rl", "grpo")
    flag = p.add_argument
    flag("--data", default=f"{d.data}/prompts.jsonl", help="rows {prompt} to roll out")
    flag("--heldout", default=f"{d.data}/prompts_heldout.jsonl", help="rows {prompt} to measure on")
    flag("--init-from", default=d.start, help="SFT model: first policy, reference")
    flag("--rm", default=f"{d.out}/rm/model", help="the reward model, from ppo_baseline.py")
    flag("--reward", help="FILE.py:function(prompt, response) -> float, in place of --rm")
    flag("--gold", default=d.reward, help="the same, logged as gold and never trained on")
    flag("--out", default=f"{d.out}/grpo", help="folder to write")
    flag("--max-steps", type=int, default=d.max_steps, help="rollout steps")
    flag("--batch-size", type=int, default=d.batch_size, help="rollouts per step and GPU")
    flag("--mini-batch-size", type=int, default=d.mini_batch_size, help="rows per pass")
    flag("--grad-accum", type=int, default=d.grad_accum, help="mini-batches per update")
    flag("--ppo-epochs", type=int, default=d.ppo_epochs, help="passes over the rollouts (paper 1)")
    flag("--group-size", type=int, default=8, help="responses per prompt (paper 64)")
    flag("--baseline", choices=("mean", "loo"), default="mean", help="of all, or of others")
    flag("--scale", choices=("std", "none"), default="std", help="what divides the advantage")
    flag("--loss-mean", choices=("response", "token"), default="response", help="equal weights")
    flag("--lr", type=float, default=d.lr, help="learning rate of the policy")
    flag("--max-prompt-length", type=int, default=d.max_prompt_length, help="tokens, of its end")
    flag("--max-new-tokens", type=int, default=d.max_new_tokens, help="of a response")
    flag("--temperature", type=float, default=d.temperature, help="of sampling and of scoring")
    flag("--static-cache", action=argparse.BooleanOptionalAction, default=d.cuda,
         help="roll out with compiled blocks and CUDA graphs, for speed")
    flag("--missing-eos-penalty", type=float, default=1.0, help="for a response that never ends")
    flag("--clip", type=float, default=0.2, help="eps of the ratio")
    flag("--kl-coef", type=float, default=d.kl_coef, help="beta of the KL loss (paper 0.04)")
    flag("--kl-target", type=float, default=0.0, help="as in dvpo.py; 0: constant (paper)")
    flag("--lora", action="store_true",
         help="train the policy as an adapter (rank 8, alpha 32) on the trunk: one model in memory")
    args = common.parse(p, argv)
    if args.group_size < 2 or args.batch_size % args.group_size:
        common.die(f"--batch-size {args.batch_size}: must be a multiple of --group-size, which is 2 or more")
    return args


def grpo_loss(logp, old_logp, ref_logp, adv, weight, clip, kl_coef):
    """Clipped ratio and k3, negated: (B, T) each, adv (B, 1) -> scalar, {clip_frac, kl_step, ratio}.

    weight (B, T) is each token's share in the mean over the optimizer batch, 0 outside the responses.
    """
    log_ratio, log_ref = (logp - old_logp).clamp(-20, 20), (ref_logp - logp).clamp(-20, 20)
    ratio = log_ratio.exp()
    gain = torch.min(ratio * adv, ratio.clamp(1 - clip, 1 + clip) * adv)
    loss = -((gain - kl_coef * (log_ref.exp() - log_ref - 1)) * weight).sum()
    with torch.no_grad():
        real, clipped = weight > 0, ((ratio - 1).abs() > clip).float()
        stat = dict(clip_frac=clipped, kl_step=ratio - 1 - log_ratio, ratio=ratio)
        return loss, {key: x[real].mean() for key, x in stat.items()}


def group_advantage(score, size, baseline, scale):
    """Scores (B,), a group in a row -> advantage (B,), share of the groups whose scores are all equal."""
    groups = score.view(-1, size)
    adv = groups - groups.mean(1, keepdim=True)
    if baseline == "loo":
        adv = adv * size / (size - 1)
    if scale == "std":
        adv = adv / (groups.std(1, keepdim=True) + 1e-6)
    return adv.flatten(), (groups == groups[:, :1]).all(1).float().mean()


def main(argv=None):
    args = parse_args(argv)
    reward = common.load_function(args.reward)
    gold = common.load_function(args.reward or args.gold)
    tok = common.load_tokenizer(args.init_from)
    data = common.read_prompts(tok, args.data, args.max_prompt_length)
    heldout = common.read_prompts(tok, args.heldout, args.max_prompt_length)
    run = common.Run(args, "grpo", show=("gold", "kl", "score"))
    device = run.device

    # One frozen trunk is the reference and the reward model. The policy is a second model, or an adapter.
    trunk = common.load_model(args.init_from, args, trainable=False)
    if reward is None:
        rm = common.load_adapter(trunk, tok, args.rm, "python ppo_baseline.py --rm-only")
    if args.lora:
        trunk.add_adapter("policy", r=8, alpha=32)
        model = trunk
        adapter = "policy"
        models = {"policy": trunk}
    else:
        model = common.load_model(args.init_from, args)
        adapter = None
        models = {"policy": model, "frozen": trunk}
    length = args.max_prompt_length + args.max_new_tokens
    run.plan_memory(models, args.mini_batch_size, length, args.max_new_tokens, (args.batch_size, length))
    policy = run.engine("policy", model, args.lr, args.mini_batch_size, args.grad_accum, decodes=True)
    trunk = policy if args.lora else run.frozen(trunk)

    state = run.resume()
    kl_coef = state.get("kl_coef", args.kl_coef)
    kl_before = state.get("kl", 0.0)                                    # of the last step
    for step in run.steps(args.max_steps):
        index = run.batch(len(data), args.batch_size // args.group_size, step)
        index = [i for i in index for _ in range(args.group_size)]
        prompts = [common.encode_prompt(tok, data[i]["prompt"], args.max_prompt_length) for i in index]

        # 1. Rollout: a group of sampled responses per prompt
        with run.phase("generate"):
            policy.eval()
            ids, attn, mask, ended = rollout(run.actor(model), prompts, tok, args, device, adapter)
        T = mask.shape[1]
        texts = [tok.decode(r, skip_special_tokens=True) for r in common.unpad(ids, mask)]
        if args.dry_run:
            return run.show_batch(tok, ids, attn, mask, args.max_steps)

        with run.phase("score"), torch.no_grad():
            # 2. Log-probs, in the micro-batches of the update, so that the first ratio is exactly 1
            rows_per_update = args.mini_batch_size * args.grad_accum
            order = common.sort_by_length(torch.arange(args.batch_size), attn, rows_per_update)
            rows = (ids, attn, T, order, args.mini_batch_size)
            old_logp = common.forward_in_micro_batches(
                policy, *rows, adapter=adapter, temperature=args.temperature)           # (B, T)
            ref_logp = common.forward_in_micro_batches(trunk, *rows, temperature=args.temperature)

            # 3. Reward of the whole response, and advantage over its group
            if reward:
                score = [reward(data[i]["prompt"], t) for i, t in zip(index, texts, strict=True)]
                score = torch.tensor(score, device=device)                              # (B,)
            else:
                score = common.forward_in_micro_batches(trunk, *rows, adapter="rm", head="rm")
                score = score.gather(1, mask.sum(1, keepdim=True)).squeeze(1)           # (B,)
                score = (score - rm["mean"]) / rm["std"]
            score = score - args.missing_eos_penalty * ~ended
            adv, no_signal = group_advantage(score, args.group_size, args.baseline, args.scale)
            weight = mask / (mask.sum(1, keepdim=True) if args.loss_mean == "response" else 1)
            kl = ((old_logp - ref_logp).clamp(-20, 20) * mask).sum(1).mean()            # nats per response

        # 4. Update
        with run.phase("train"):
            policy.train()
            run.set_lr(policy, args.lr * (1 - step / args.max_steps))
            scale = run.world * args.grad_accum                         # DeepSpeed divides by both
            stats = []
            for epoch in range(args.ppo_epochs):
                if epoch > 0:
                    shuffled = torch.randperm(args.batch_size)
                    order = common.sort_by_length(shuffled, attn, rows_per_update)
                for group in order.split(rows_per_update):
                    total = run.sum(weight[group].sum())
                    for m in group.split(args.mini_batch_size):
                        logp = policy(ids[m], attn[m], T, adapter, temperature=args.temperature)
                        parts = (old_logp[m], ref_logp[m], adv[m, None], weight[m] / total)
                        loss, stat = grpo_loss(logp, *parts, args.clip, kl_coef)
                        policy.backward(loss * scale)
                        policy.step()
                        stats.append(dict(stat, loss=loss.detach(), n=mask[m].sum()))

        # 5. Log, adapt the KL coefficient
        row = {key: common.token_mean(stats, key) for key in ("clip_frac", "kl_step")}
        if gold:
            row["gold"] = np.mean([gold(data[i]["prompt"], t) for i, t in zip(index, texts, strict=True)])
        minus_entropy, _ = common.masked_moments(old_logp, mask)
        row = run.log(
            **row, loss=sum(s["loss"] for s in stats) / len(stats) * scale, kl=kl, kl_coef=kl_coef,
            score=score.mean(), no_signal=no_signal, ratio_first=stats[0]["ratio"], entropy=-minus_entropy,
            ended=ended.float().mean(), length=mask.sum(1).float().mean(),
            tokens=run.sum(mask.sum()))
        kl_coef = common.adapt_kl_coef(kl_coef, row["kl"], kl_before, args.kl_target)
        kl_before = row["kl"]
        run.keep(kl_coef=kl_coef, kl=kl_before)

    run.save_model(model, tok, adapter)
    common.evaluate(run, rollout, model, policy, trunk, tok, heldout, gold, adapter)


if __name__ == "__main__":
    main()
    common.Run.end()
