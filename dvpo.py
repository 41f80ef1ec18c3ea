"""Stage 3: decoupled value policy optimization. Clipped PPO on the policy; value and reference are frozen.

Reads   {prompt} rows                                   data/toy/prompts.jsonl
        the SFT model: first policy, reference, trunk   out/tiny/sft/model
        the global value model on that trunk            out/tiny/gvm/model
Writes  the policy, a transformers folder               out/tiny/dvpo/model

Objective, eq. (3) of arXiv 2502.16944 v1 (all equation numbers here are v1's), over response tokens:

    L = E[min(r_t A_t, clip(r_t, 1 - eps, 1 + eps) A_t)],  r_t = pi(a_t | s_t) / pi_old(a_t | s_t)
    A_t = Q~(tau, s_t, a_t) - kl_coef (log pi_old(a_t | s_t) - log pi_ref(a_t | s_t))

Q~ is the GVM's value of the token a_t, normalised, eq. (2); tau is question-answer pairs from the policy's
latest rollouts. PPO has four roles and trains two of them. This trains one and holds two models: a frozen
trunk is reference (adapter off) and GVM (adapter on). `diff dvpo.py ppo_baseline.py` is the method.

Deviations from the paper
1. The sigma that divides A is at least that of Q in the GVM's training: once answers are good, dividing by
   the shrinking sigma of the batch would turn the GVM's errors into full-size advantages.
2. The default, --advantage delta, is Q_t - Q_{t-1} with Q_{-1} = V(s_0): Q minus the value of the state, the
   textbook advantage, which a frozen Q over deterministic transitions gives for free. It is centred over the
   responses. Differences are smaller than levels, so that their divisor is in practice the constant of 1.
   --advantage q: A = Q~, eq. (2).
3. The KL penalty is in A_t, and each token pays its own. Its coefficient adapts to --kl-target. The paper's
   "target KL 0.1" is, as in its authors' code, the early stop of the inner epochs.
4. One tau serves all rows of a step and rank (they share a policy). It may hold an earlier answer to a row's
   own prompt. Prompt, response and tau stay within the length that the GVM was trained on.
5. AdamW with betas (0.9, 0.95) and eps 1e-8: the paper gives none. Batch sizes are per GPU, see sft.py.

    python dvpo.py                                              the embedded world on a CPU
    python dvpo.py --model llama3-3b --lora                     one GPU
    deepspeed --num_gpus 8 dvpo.py --model llama3-3b            eight
"""
import argparse
import os

import numpy as np
import torch
import torch.nn.functional as F

import common


def parse_args(argv=None):
    p, d = common.flags(__doc__, argv, "rl")
    p.add_argument("--data", default=f"{d.data}/prompts.jsonl", help="rows {prompt} to roll out")
    p.add_argument("--heldout", default=f"{d.data}/prompts_heldout.jsonl", help="rows {prompt} to measure on")
    p.add_argument("--init-from", default=d.start, help="SFT model: first policy, reference")
    p.add_argument("--gvm", default=f"{d.out}/gvm/model", help="the global value model, from train_gvm.py")
    p.add_argument("--gold", default=d.reward,
                   help="FILE.py:function(prompt, response) -> float, logged and never trained on")
    p.add_argument("--reward", help=argparse.SUPPRESS)          # its old name
    p.add_argument("--out", default=f"{d.out}/dvpo", help="folder to write")
    p.add_argument("--max-steps", type=int, default=d.max_steps, help="rollout steps (paper: about 450)")
    p.add_argument("--batch-size", type=int, default=d.batch_size, help="rollouts per step and GPU (paper 8)")
    p.add_argument("--mini-batch-size", type=int, default=d.mini_batch_size, help="rows per pass (paper 2)")
    p.add_argument("--grad-accum", type=int, default=d.grad_accum, help="mini-batches per update (paper 2)")
    p.add_argument("--ppo-epochs", type=int, default=d.ppo_epochs, help="passes over the rollouts (paper 4)")
    p.add_argument("--lr", type=float, default=d.lr, help="learning rate of the policy (paper 2e-6)")
    p.add_argument("--lr-decay", action=argparse.BooleanOptionalAction, default=True,
                   help="linear decay to 0: the last update cannot break the policy (paper: not given)")
    p.add_argument("--max-prompt-length", type=int, default=d.max_prompt_length, help="tokens, of its end")
    p.add_argument("--max-new-tokens", type=int, default=d.max_new_tokens, help="of a response (paper 1024)")
    p.add_argument("--temperature", type=float, default=d.temperature, help="of sampling and of scoring")
    p.add_argument("--static-cache", action=argparse.BooleanOptionalAction, default=common.CUDA,
                   help="roll out with compiled blocks and CUDA graphs, for speed")
    p.add_argument("--tau-pairs", type=int, help="question-answer pairs in tau (default: those of the GVM)")
    p.add_argument("--advantage", choices=("q", "delta", "authors"), default=d.advantage,
                   help="q: A = Q~ (paper); delta: A = Q[t] - Q[t-1]; authors: what their released code has")
    p.add_argument("--clip", type=float, default=0.2, help="eps of eq. (3) (paper: not given)")
    p.add_argument("--kl-coef", type=float, default=d.kl_coef, help="initial KL coefficient (paper 0.2)")
    p.add_argument("--kl-target", type=float, default=d.kl_target,
                   help="nats per response that the coefficient adapts to; 0: constant")
    p.add_argument("--kl-stop", type=float, default=0.1, help="KL per token that ends a step (paper 0.1)")
    p.add_argument("--lora", action="store_true",
                   help="train the policy as an adapter (rank 8, alpha 32) on the trunk: one model in memory")
    args = common.parse(p, argv)
    if args.reward is not None:
        common.die(f"--reward is --gold now, as it is not trained on: --gold {args.reward}")
    return args


@torch.no_grad()
@common.merges_adapter
def rollout(model, prompts, tok, args, device, adapter=None):
    """A sampled response per prompt: lists of ids -> ids (B, P+T), attn (B, P+T), mask (B, T), ended (B,)."""
    ids, attn, _ = common.frame(prompts, [[] for _ in prompts], device)      # (B, P)
    decode = common.Decoder(model, ids, attn, adapter)
    if args.static_cache:
        decode = common.static_decoder(decode, args.max_new_tokens)
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    end_ids = model.end_ids(tok)                                  # (E,)
    response, mask = [], []
    for t in range(args.max_new_tokens):
        p = (decode.logits / args.temperature).softmax(-1)                                     # (B, V)
        token = common.draw(p, torch.rand(len(p), 1, dtype=torch.float64, device=device))      # (B,), no sync
        response.append(token.masked_fill(ended, 0))
        mask.append(~ended)
        ended = ended | (token[:, None] == end_ids).any(1)
        if t + 1 == args.max_new_tokens or (t % 16 == 15 and ended.all()):
            break
        decode(token)
    response, mask = torch.stack(response, 1), torch.stack(mask, 1)
    return *common.append_responses(ids, attn, response, mask), ended


def clipped_ppo_loss(logp, old_logp, adv, mask, clip):
    """Eq. (3), negated, a mean over the masked tokens: (B, T) each -> scalar, {clip_frac, kl_step, ratio}.

    kl_step estimates KL(old, new) per token by (r - 1) - log r, which is never negative.
    """
    log_ratio = (logp - old_logp).clamp(-20, 20)
    ratio = log_ratio.exp()

    def mean(x):
        return (x * mask).sum() / mask.sum().clamp(min=1)

    loss = mean(-torch.min(ratio * adv, ratio.clamp(1 - clip, 1 + clip) * adv))
    with torch.no_grad():
        clipped = ((ratio - 1).abs() > clip).float()
        return loss, dict(clip_frac=mean(clipped), kl_step=mean(ratio - 1 - log_ratio), ratio=mean(ratio))


def advantage(q, mask, kind, sigma):
    """Token values (B, T+1), the first is V(s_0) -> advantage (B, T), in units of at least sigma.

    q: A = Q~, eq. (2), centred over the tokens. delta: Q[t] - Q[t-1], what a_t did to the value. Its sum over
    a response, Q[T-1] - V(s_0), is centred over the responses, by a shift of V(s_0): a mean taken off every
    token would make short answers pay wherever V(s_0) is too low. 0 outside the mask.
    """
    if kind == "authors":
        return gae_without_reward(q[:, :-1], mask)
    if kind == "q":
        mean, std = common.masked_moments(q[:, 1:], mask)
        return (q[:, 1:] - mean) / std.clamp(min=sigma) * mask
    a = (q[:, 1:] - q[:, :-1]) * mask
    a[:, 0] -= common.all_sum(a.sum()) / common.all_sum(mask[:, 0].sum())
    return a / common.masked_moments(a, mask)[1].clamp(min=sigma)


def gae_without_reward(v, mask, lam=0.95):
    """What the authors' released code has: GAE over whitened values, without a reward at the end.

    v (B, T), the value before each token -> (B, T), 0 outside the mask. With lambda 1 this is -v.
    """
    mean, std = common.masked_moments(v, mask)
    v = (v - mean) / std * mask
    after = F.pad(v[:, 1:], (0, 1))                               # 0 behind the last token
    a, adv = torch.zeros_like(v[:, 0]), torch.zeros_like(v)
    for t in reversed(range(v.shape[1])):
        a = (after[:, t] - v[:, t] + lam * a) * mask[:, t]
        adv[:, t] = a
    return adv


def main(argv=None):
    args = parse_args(argv)
    data, heldout = common.read_rows(args.data, ["prompt"]), common.read_rows(args.heldout, ["prompt"])
    gold = common.load_function(args.gold)
    tok = common.load_tokenizer(args.init_from)
    device = common.start(args)

    # Models: the policy, and one frozen trunk for reference and GVM. With --lora the policy is its adapter.
    trunk = common.load_model(args.init_from, args, trainable=False)
    length = args.max_prompt_length + args.max_new_tokens
    common.check_context(trunk, length, "--max-prompt-length and --max-new-tokens")
    meta = common.load_adapter(trunk, tok, args.gvm, made_by=f"python train_gvm.py --model {args.model}")
    tau_pairs = meta["tau_pairs"] if args.tau_pairs is None else args.tau_pairs
    tau_room = common.room_for_tau(meta, args, tau_pairs)         # tokens
    model, adapter = trunk, "policy"
    if args.lora:
        trunk.add_adapter("policy", r=8, alpha=32)
    else:
        model, adapter = common.load_model(args.init_from, args), None
    models = {"policy": model} if args.lora else {"policy": model, "frozen": trunk}
    kv_cache = args.batch_size, length                            # rows and length of the rollout
    common.memory_plan(models, args, args.mini_batch_size, length, args.max_new_tokens, kv_cache)
    actor = common.actor(model, args)
    policy = common.engine(model, args, args.lr, args.mini_batch_size, args.grad_accum)
    trunk = policy if args.lora else common.frozen(trunk, args)

    batch = args.batch_size * common.world()                      # rollouts per step, all ranks together
    opt_rows = args.mini_batch_size * args.grad_accum             # rows per optimizer step and rank
    common.seed(args)
    checkpoints = common.Checkpoints(args, args.out, policy=policy)
    first, state = checkpoints.load()
    shown = "gold", "kl", "q_mean", "ended", "length"
    metrics = common.Metrics(args.out, args.max_steps, "dvpo", shown, policy, first)

    def encode_prompts(step):
        index = common.batch_indices(len(data), batch, step, args.seed)
        return [common.encode_prompt(tok, data[i]["prompt"])[-args.max_prompt_length:] for i in index]

    kl_coef = state.get("kl_coef", args.kl_coef)
    kl_before = state.get("kl", 0.0)                              # of the last step
    buffer = state.get("buffer")                                  # prompts and responses of the last rollouts
    if buffer is None and tau_pairs and not args.dry_run:         # tau must not show the answers it values
        prompts = encode_prompts(args.max_steps)                  # of the step that would follow the last
        common.refresh(actor, model)
        policy.eval()
        ids, _, mask, _ = rollout(actor, prompts, tok, args, device, adapter)
        buffer = prompts, common.unpad(ids, mask)

    for step in range(first, args.max_steps):
        seconds = {}
        index = common.batch_indices(len(data), batch, step, args.seed)
        prompts = encode_prompts(step)

        # 1. rollout
        with common.clock(seconds, "generate"):
            policy.eval()
            common.refresh(actor, model)
            ids, attn, mask, ended = rollout(actor, prompts, tok, args, device, adapter)
            T, responses = mask.shape[1], common.unpad(ids, mask)
        if args.dry_run:
            return common.show_batch(tok, ids, attn, mask, args.max_steps)

        with common.clock(seconds, "score"), torch.no_grad():
            # 2. log-probs, in the micro-batches of the update, so that the first ratio is exactly 1
            order = common.sort_by_length(torch.arange(args.batch_size), attn, opt_rows)
            rows, sampled = (ids, attn, T, order, args.mini_batch_size), dict(temperature=args.temperature)
            old_logp = common.forward_in_micro_batches(policy, *rows, adapter=adapter, **sampled)
            ref_logp = common.forward_in_micro_batches(trunk, *rows, **sampled)       # (B, T)

            # 3. value, given tau: some of the policy's own latest answers, read once for all rows
            rng = np.random.default_rng([args.seed, step, common.rank()])
            drawn = common.draw_tau(tok, buffer, tau_pairs, tau_room, meta["tau_length"], rng)
            tau_ids, tau_shown = drawn
            cache = common.read_prefix(trunk, tau_ids, "gvm", "gvm", device)
            after_tau = [common.append_to_prefix(tok, tau_ids, p)[len(tau_ids):] for p in prompts]  # one bos
            gvm_ids, gvm_attn, _ = common.frame(after_tau, responses, device)
            rows = gvm_ids, gvm_attn, T, order, args.mini_batch_size
            q = common.forward_in_micro_batches(trunk, *rows, cache, adapter="gvm", head="gvm")     # (B, T+1)
            buffer = prompts, responses
            del cache                                             # frees memory for the update

        # 4. advantage
        log_ratio_ref = (old_logp - ref_logp).clamp(-20, 20)
        adv = advantage(q, mask, args.advantage, meta["q_std"]) - kl_coef * log_ratio_ref           # (B, T)
        kl = (log_ratio_ref * mask).sum(1).mean()                                         # nats per response

        # 5. update
        with common.clock(seconds, "train"):
            policy.train()
            if args.lr_decay:
                common.set_lr(policy, args.lr * (1 - step / args.max_steps))
            stats, updates = [], 0
            for epoch in range(args.ppo_epochs):
                if epoch > 0:
                    order = common.sort_by_length(torch.randperm(args.batch_size), attn, opt_rows)
                done = len(stats)
                for group in order.split(opt_rows):
                    n_tokens = common.all_sum(mask[group].sum())
                    for m in group.split(args.mini_batch_size):             # rows of one mini-batch
                        logp = policy(ids[m], attn[m], T, adapter, temperature=args.temperature)
                        loss, stat = clipped_ppo_loss(logp, old_logp[m], adv[m], mask[m], args.clip)
                        share = mask[m].sum() / n_tokens        # a token mean over the whole optimizer batch
                        scale = common.world() * args.grad_accum                # DeepSpeed divides by both
                        policy.backward(loss * share * scale)
                        policy.step()
                        stats.append(dict(stat, loss=loss.detach(), n=mask[m].sum()))
                    updates += 1
                kl_step = common.token_mean(stats[done:], "kl_step")
                if common.mean_over_ranks(dict(kl=kl_step))["kl"] > 1.5 * args.kl_stop:
                    break

        # 6. log, save, adapt the KL coefficient
        texts = [tok.decode(r, skip_special_tokens=True) for r in responses]
        row = {key: common.token_mean(stats, key) for key in ("loss", "clip_frac", "kl_step")}
        if gold:
            row["gold"] = np.mean([gold(data[i]["prompt"], t) for i, t in zip(index, texts, strict=True)])
        q_mean, q_std = common.masked_moments(q[:, 1:], mask)
        adv_std = common.masked_moments(adv, mask)[1]
        row |= dict(seconds, kl=kl, kl_coef=kl_coef, q_mean=q_mean, q_std=q_std, v0=q[:, 0].mean(),
                    adv_std=adv_std, ratio_first=stats[0]["ratio"], updates=updates,
                    entropy=-common.masked_moments(old_logp, mask)[0], ended=ended.float().mean(),
                    length=mask.sum(1).float().mean(), tokens=common.all_sum(mask.sum()),
                    tau_pairs=tau_shown, tau_tokens=len(tau_ids))
        row = metrics.log(step, **row)
        kl_coef = common.adapt_kl_coef(kl_coef, row["kl"], kl_before, args.kl_target)
        kl_before = row["kl"]
        if (step + 1) % args.save_every == 0:
            common.save_model(model, tok, os.path.join(args.out, "model"), adapter)
        checkpoints.save(step, kl_coef=kl_coef, kl=kl_before, buffer=buffer)

    common.save_model(model, tok, os.path.join(args.out, "model"), adapter)
    common.refresh(actor, model)
    common.evaluate(rollout, actor, policy, trunk, tok, heldout, gold, args, device, adapter)


if __name__ == "__main__":
    main()
    common.finish()
