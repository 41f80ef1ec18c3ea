"""Stage 3: decoupled value policy optimization. Clipped PPO on the policy alone; value model and reference are frozen.

Reads   {prompt} rows                                   data/toy/prompts.jsonl
        the SFT model: first policy, reference, trunk   out/tiny/sft/model
        the global value model on that trunk            out/tiny/gvm/model
Writes  the policy, a transformers folder               out/tiny/dvpo/model

Objective, eq. (3) of arXiv 2502.16944 v1 (which all equation numbers here follow), over response tokens:

    L = E[min(r_t A_t, clip(r_t, 1 - eps, 1 + eps) A_t)],  r_t = pi(a_t | s_t) / pi_old(a_t | s_t)
    A_t = Q~(tau, s_t, a_t) - kl_coef (log pi_old(a_t | s_t) - log pi_ref(a_t | s_t))

Q~ is the GVM's value of the token just said, normalised, eq. (2); tau is question-answer pairs out of the policy's own latest
rollouts. PPO has four roles here and trains two of them; this holds two models, one frozen trunk serving as reference (adapter
off) and as GVM (adapter on), and trains one. The diff with ppo_baseline.py is the method.

Deviations from the paper
1. Q~ is centred on the rollout batch, but its sigma never falls below the GVM's own of the training stage: once most responses
   are good, dividing by the shrinking sigma of the batch blows the GVM's errors up to full-size advantages.
2. The default, --advantage delta, takes A_t from Q_t - Q_{t-1} with Q_{-1} = V(s_0): Q minus the value of the state, the textbook
   advantage, which a frozen Q over deterministic transitions gives for free. --advantage q is the paper's A = Q~.
3. The KL penalty is in A_t and its coefficient adapts to --kl-target (Ziegler et al., arXiv 1909.08593); the paper's "target KL
   0.1" is, as in its authors' code, the early stop of the inner epochs.
4. One tau serves all rows of a step (they share a policy), so the GVM reads it once. It may hold an answer to a row's own prompt.
5. Batch sizes are per GPU, see sft.py.

    python dvpo.py                                              the embedded world on a CPU
    python dvpo.py --model llama3-3b --lora                     one GPU
    deepspeed --num_gpus 8 dvpo.py --model llama3-3b            eight
"""
import argparse
import os

import numpy as np
import torch

import common


def parse_args(argv=None):
    p, d = common.flags(__doc__, argv, "rl")
    p.add_argument("--data", default=f"{d.data}/prompts.jsonl", help="rows {prompt} to roll out")
    p.add_argument("--heldout", default=f"{d.data}/prompts_heldout.jsonl", help="rows {prompt} to measure on at the end")
    p.add_argument("--init-from", default=f"{d.out}/sft/model", help="the SFT model: first policy and reference")
    p.add_argument("--gvm", default=f"{d.out}/gvm/model", help="the global value model, from train_gvm.py")
    p.add_argument("--reward", default=d.reward, help="FILE.py:function(prompt, response) -> float, logged as gold and never trained on")
    p.add_argument("--out", default=f"{d.out}/dvpo", help="folder to write")
    p.add_argument("--max-steps", type=int, default=d.max_steps, help="rollout steps (paper, figure 3: about 450 at 3B)")
    p.add_argument("--batch-size", type=int, default=d.batch_size, help="rollouts per step and GPU (paper 8)")
    p.add_argument("--mini-batch-size", type=int, default=d.mini_batch_size, help="rows per forward and backward pass (paper 2)")
    p.add_argument("--grad-accum", type=int, default=d.grad_accum, help="mini-batches per optimizer step (paper 2)")
    p.add_argument("--ppo-epochs", type=int, default=d.ppo_epochs, help="passes over each batch of rollouts (paper 4)")
    p.add_argument("--lr", type=float, default=d.lr, help="learning rate of the policy (paper 2e-6)")
    p.add_argument("--lr-decay", action=argparse.BooleanOptionalAction, default=True, help="lr goes to 0 in a straight line, so that the last updates cannot break the policy, see Results in README.md (paper: not given)")
    p.add_argument("--max-prompt-length", type=int, default=d.max_prompt_length, help="tokens; longer prompts lose their beginning")
    p.add_argument("--max-new-tokens", type=int, default=d.max_new_tokens, help="tokens of a response at most (paper 1024)")
    p.add_argument("--temperature", type=float, default=1.0, help="divides the logits, in sampling and scoring alike")
    p.add_argument("--static-cache", action="store_true", help="roll out with a KV cache of full length and, on CUDA, the step as one graph: for speed (not yet run on a GPU)")
    p.add_argument("--tau-pairs", type=int, default=None, help="question-answer pairs in tau (default: as the GVM was trained)")
    p.add_argument("--advantage", choices=("q", "delta"), default=d.advantage, help="q: A = Q~ (paper); delta: A = Q[t] - Q[t-1]")
    p.add_argument("--clip", type=float, default=0.2, help="eps of eq. (3) (paper: not given)")
    p.add_argument("--kl-coef", type=float, default=d.kl_coef, help="first coefficient of the KL penalty (paper 0.2)")
    p.add_argument("--kl-target", type=float, default=d.kl_target, help="nats per response that the coefficient adapts to (Ziegler et al. 6)")
    p.add_argument("--kl-stop", type=float, default=0.1, help="inner epochs end once KL(old, new) per token passes 1.5 times this (paper 0.1)")
    p.add_argument("--lora", action="store_true", help="train the policy as an adapter (rank 8, alpha 32) on the trunk: one model in memory")
    return common.parse(p, argv)


@torch.no_grad()
def rollout(model, prompts, tok, args, device, adapter=None):
    """One sampled response a prompt: lists of ids -> ids (B, P+T), attn (B, P+T), mask (B, T), ended (B,)."""
    ids, attn, _ = common.frame(prompts, [[] for _ in prompts], tok.pad_token_id, device)      # (B, P)
    decode = common.StaticDecoder(model, ids, attn, adapter, args.max_new_tokens) if args.static_cache else common.Decoder(model, ids, attn, adapter)
    ended, response, mask = torch.zeros(len(prompts), dtype=torch.bool, device=device), [], []
    for t in range(args.max_new_tokens):
        cdf = (decode.logits / args.temperature).softmax(-1).cumsum(-1, dtype=torch.float64)   # (B, V)
        u = torch.rand(len(cdf), 1, dtype=torch.float64, device=device) * cdf[:, -1:]
        token = torch.searchsorted(cdf, u, right=True).squeeze(1).clamp(max=cdf.shape[1] - 1)  # a sample; the host need not wait
        response.append(token.masked_fill(ended, tok.pad_token_id))
        mask.append(~ended)
        ended = ended | (token == tok.eos_token_id)
        if t + 1 == args.max_new_tokens or (t % 16 == 15 and ended.all()):
            break
        decode(token)
    return *common.join(ids, attn, torch.stack(response, 1), torch.stack(mask, 1), tok.pad_token_id), ended


def clipped_ppo_loss(logp, old_logp, adv, mask, clip):
    """Eq. (3), negated, a mean over the masked tokens: (B, T) each -> scalar, {clip_frac, kl_step, ratio}.

    kl_step estimates KL(old, new) per token by (r - 1) - log r, which is never negative.
    """
    log_ratio = (logp - old_logp).clamp(-20, 20)
    ratio, n = log_ratio.exp(), mask.sum().clamp(min=1)
    loss = -torch.min(ratio * adv, ratio.clamp(1 - clip, 1 + clip) * adv)
    mean = lambda x: (x.detach() * mask).sum() / n
    return (loss * mask).sum() / n, dict(clip_frac=mean(((ratio - 1).abs() > clip).float()), kl_step=mean(ratio - 1 - log_ratio), ratio=mean(ratio))


def advantage(q, mask, kind, sigma):
    """Token values (B, T+1), the first of them V(s_0), -> advantage (B, T), centred, in units of at least sigma.

    kind q: A = Q~, eq. (2); delta: Q[t] - Q[t-1], what saying a_t did to the value. 0 outside the mask.
    """
    a = q[:, 1:] if kind == "q" else q[:, 1:] - q[:, :-1]
    mean, std = common.masked_moments(a, mask)
    return (a - mean) / std.clamp(min=sigma) * mask


def main(argv=None):
    args = parse_args(argv)
    common.check_sizes(args)
    data, heldout = common.Rows(args.data, ["prompt"]), common.Rows(args.heldout, ["prompt"])
    reward = common.load_function(args.reward)
    tok = common.load_tokenizer(args.init_from)
    device = common.start(args)

    # Models: the policy, and one frozen trunk for reference and GVM. With --lora the policy is an adapter on that trunk.
    trunk = common.load_model(args.init_from, trainable=False)
    common.check_context(trunk, args.max_prompt_length + args.max_new_tokens, "--max-prompt-length and --max-new-tokens")
    meta = common.load_adapter(trunk, tok, args.gvm, made_by=f"python train_gvm.py --model {args.model}")
    common.check_context(trunk, meta["max_length"] // 2 + args.max_new_tokens, "tau (half the GVM's --max-length) and --max-new-tokens")
    tau_pairs = meta["tau_pairs"] if args.tau_pairs is None else args.tau_pairs
    model, adapter = (trunk, "policy") if args.lora else (common.load_model(args.init_from), None)
    if args.lora:
        trunk.add_adapter("policy", r=8, alpha=32)
    if args.gradient_checkpointing:
        model.checkpoint_blocks()
    length = args.max_prompt_length + args.max_new_tokens
    common.memory_plan({"policy, reference, GVM": model} if args.lora else {"policy": model, "reference, GVM": trunk}, args,
                       args.mini_batch_size, length, args.max_new_tokens, decode=(args.batch_size, length))
    actor = common.actor(model, args)
    policy = common.engine(model, args, args.lr, args.mini_batch_size, args.grad_accum)
    trunk = policy if args.lora else common.frozen(trunk, args)

    batch = args.batch_size * common.world()                      # rollouts per step, all ranks together
    opt_rows = args.mini_batch_size * args.grad_accum             # rows per optimizer step and rank
    common.seed(args)
    checkpoints = common.Checkpoints(args, args.out, policy=policy)
    first, state = checkpoints.load()
    metrics = common.Metrics(args.out, args.max_steps, "dvpo", ("gold", "kl", "q_mean", "ended", "length"), policy, first)
    kl_coef, buffer = state.get("kl_coef", args.kl_coef), state.get("buffer")      # buffer: (prompt ids, response ids) of the last rollouts

    for step in range(first, args.max_steps):
        clock = common.Clock()
        index = common.batch_indices(len(data), batch, step, args.seed)
        prompts = [common.encode_prompt(tok, data[i]["prompt"])[-args.max_prompt_length:] for i in index]

        # 1. rollout
        with clock("generate"):
            policy.eval()
            common.refresh(actor, model)
            ids, attn, mask, ended = rollout(actor, prompts, tok, args, device, adapter)
            T, responses = mask.shape[1], common.unpad(ids, mask)

        with clock("score"), torch.no_grad():
            # 2. log-probs, by the very forward that the update uses, so that the first ratio is exactly 1; rows of like length together
            in_turn = common.by_length(torch.arange(args.batch_size), attn, opt_rows)
            each = lambda forward: torch.cat([forward(m) for m in in_turn.split(args.mini_batch_size)])[in_turn.argsort()]
            old_logp = each(lambda m: policy(ids[m], attn[m], T, adapter, temperature=args.temperature))
            ref_logp = each(lambda m: trunk(ids[m], attn[m], T, None, temperature=args.temperature))

            # 3. value, behind one tau for all rows (they share a policy), read once: some of the policy's own latest answers
            prefix = draw_tau(buffer or (prompts, responses), tau_pairs, np.random.default_rng([args.seed, step, common.rank()]))
            prefix = common.behind_tau(tok, prefix, [], meta["max_length"] // 2 - max(map(len, prompts)), meta["tau_length"])
            behind = [common.behind(tok, prefix, p)[len(prefix):] for p in prompts]                            # bos comes once
            tau_ids, tau_attn, _ = common.frame(behind, responses, tok.pad_token_id, device)
            tau = common.read_prefix(trunk, prefix, "gvm", "gvm", device)
            q = each(lambda m: trunk(tau_ids[m], tau_attn[m], T, "gvm", head="gvm", cache=tau(len(m))))  # (B, T+1)
            buffer = prompts, responses
            del tau                                                         # its cache

        # 4. advantage
        log_ratio_ref = (old_logp - ref_logp).clamp(-20, 20)
        adv = advantage(q, mask, args.advantage, meta["q_std"]) - kl_coef * log_ratio_ref                      # (B, T)
        kl = (log_ratio_ref * mask).sum(1).mean()                                                              # nats a response

        # 5. update
        with clock("train"):
            policy.train()
            if args.lr_decay:
                common.set_lr(policy, args.lr * (1 - step / args.max_steps))
            stats, updates = [], 0
            for epoch in range(args.ppo_epochs):
                order = in_turn if epoch == 0 else common.by_length(torch.randperm(args.batch_size), attn, opt_rows)
                done = len(stats)
                for group in order.split(opt_rows):
                    n_tokens = common.all_sum(mask[group].sum())
                    for m in group.split(args.mini_batch_size):
                        logp = policy(ids[m], attn[m], T, adapter, temperature=args.temperature)
                        loss, stat = clipped_ppo_loss(logp, old_logp[m], adv[m], mask[m], args.clip)
                        share = mask[m].sum() / n_tokens * common.world()       # a token mean over the whole optimizer batch
                        policy.backward(loss * share * args.grad_accum)         # DeepSpeed divides by world and accumulation
                        policy.step()
                        stats.append(dict(stat, loss=loss.detach(), n=mask[m].sum()))
                    updates += 1
                if common.mean_over_ranks(dict(kl=common.token_mean(stats[done:], "kl_step")))["kl"] > 1.5 * args.kl_stop:
                    break

        # 6. log, save, adapt the KL coefficient
        texts = [tok.decode(r, skip_special_tokens=True) for r in responses]
        gold = {"gold": np.mean([reward(data[i]["prompt"], t) for i, t in zip(index, texts)])} if reward else {}
        mean = {k: common.token_mean(stats, k) for k in ("loss", "clip_frac", "kl_step")}
        q_mean, q_std = common.masked_moments(q[:, 1:], mask)
        row = metrics.log(step, dict(ids=ids, attn=attn, mask=mask), **mean, **gold, **clock.seconds, kl=kl, kl_coef=kl_coef, q_mean=q_mean,
                          q_std=q_std, v0=q[:, 0].mean(), adv_std=common.masked_moments(adv, mask)[1], ratio_first=stats[0]["ratio"], updates=updates,
                          entropy=-(old_logp * mask).sum() / mask.sum(), ended=ended.float().mean(), length=mask.sum(1).float().mean(),
                          tokens=common.all_sum(mask.sum()))
        kl_coef *= 1 + float(np.clip(row["kl"] / args.kl_target - 1, -0.2, 0.2)) * batch / 10_000
        if (step + 1) % args.save_every == 0:
            common.save_model(model, tok, os.path.join(args.out, "model"), adapter)
        checkpoints.save(step, kl_coef=kl_coef, buffer=buffer)
    metrics.close()

    common.save_model(model, tok, os.path.join(args.out, "model"), adapter)
    common.refresh(actor, model)
    common.evaluate(rollout, actor, policy, trunk, tok, heldout, reward, args, device, adapter, before=metrics.last)


def draw_tau(buffer, pairs, rng):
    """Up to `pairs` (prompt ids, response ids) out of the buffer."""
    buffer = list(zip(*buffer))
    return [buffer[i] for i in rng.permutation(len(buffer))[:pairs]]


if __name__ == "__main__":
    main()
    common.finish()
