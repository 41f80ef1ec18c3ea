"""Stage 3: decoupled value policy optimization. Clipped PPO on the policy; value and reference are frozen.

Reads   {prompt} rows                                   data/toy/prompts.jsonl
        the SFT model: first policy, reference, trunk   out/tiny/sft/model
        the global value model on that trunk            out/tiny/gvm/model
Writes  the policy, a transformers folder               out/tiny/dvpo/model

Objective, eq. (3) of arXiv 2502.16944 v1 (all equation numbers here are v1's), over response tokens:

    L = E[min(r_t A_t, clip(r_t, 1 - eps, 1 + eps) A_t)],  r_t = pi(a_t | s_t) / pi_old(a_t | s_t)
    A_t = (Q_t - Q_{t-1}) / max(sigma, sigma_GVM) - kl_coef (log pi_old(a_t | s_t) - log pi_ref(a_t | s_t))

Q_t = Q(tau, s_t, a_t) is the GVM's value of the token a_t, in units of reward, and Q_{-1} = V(s_0); tau is
question-answer pairs from the policy's latest rollouts. PPO has four roles and trains two of them. This
trains one and holds two models: a frozen trunk is reference (adapter off) and GVM (adapter on).

Deviations from the paper
1. The paper's advantage is Q normalised over the batch, eq. (2): --advantage q. The default is Q minus the
   value of the state, the textbook advantage, which a frozen Q over deterministic transitions gives for
   free. It is centred over the responses.
2. sigma, that of the batch, is at least that of Q in the GVM's training: once answers are good, dividing by
   a shrinking sigma would turn the GVM's errors into full-size advantages. Changes of Q are smaller than Q,
   so that in practice sigma_GVM divides.
3. The KL penalty is in A_t, and each token pays its own. Its coefficient adapts to --kl-target. The paper's
   "target KL 0.1" is, as in its authors' code, the early stop of the inner epochs.
4. One tau serves all rows of a step and rank (they share a policy). It may hold an earlier answer to a row's
   own prompt. Prompt, response and tau stay within the length that the GVM was trained on.
5. AdamW with betas (0.9, 0.95) and eps 1e-8: the paper gives none. Batch sizes are per GPU, see sft.py.

    python dvpo.py                                              the toy, on a CPU
    python dvpo.py --model llama3-3b --lora                     one GPU
    deepspeed --num_gpus 8 dvpo.py --model llama3-3b            eight
"""
import argparse

import numpy as np
import torch

import common


def parse_args(argv=None):
    p, d = common.flags(__doc__, argv, "rl")
    flag = p.add_argument
    # Data and models
    flag("--data", default=f"{d.data}/prompts.jsonl", help="rows {prompt} to roll out")
    flag("--heldout", default=f"{d.data}/prompts_heldout.jsonl", help="rows {prompt} to measure")
    flag("--init-from", default=d.start, help="SFT model: first policy, reference")
    flag("--gvm", default=f"{d.out}/gvm/model", help="global value model, from train_gvm.py")
    flag("--gold", default=d.reward,
         help="FILE.py:function(prompt, response) -> float, logged and never trained on")
    flag("--out", default=f"{d.out}/dvpo", help="folder to write")
    # Size: a step is one batch of rollouts and several updates on it
    flag("--max-steps", type=int, default=d.max_steps, help="rollout steps (paper: about 450)")
    flag("--batch-size", type=int, default=d.batch_size,
         help="rollouts per step and GPU (paper 8)")
    flag("--mini-batch-size", type=int, default=d.mini_batch_size,
         help="rows per forward pass of an update (paper: 2, twice)")
    flag("--grad-accum", type=int, default=d.grad_accum, help="forward passes per update (paper 2)")
    flag("--ppo-epochs", type=int, default=d.ppo_epochs,
         help="passes over the rollouts of a step (paper 4)")
    # Optimizer
    flag("--lr", type=float, default=d.lr, help="learning rate of the policy (paper 2e-6)")
    flag("--lr-decay", action=argparse.BooleanOptionalAction, default=True,
         help="linear decay to 0: the last update cannot break the policy (paper: not given)")
    # Rollout
    flag("--max-prompt-length", type=int, default=d.max_prompt_length,
         help="tokens; the middle of a longer prompt is cut")
    flag("--max-new-tokens", type=int, default=d.max_new_tokens,
         help="tokens of a response at most (paper 1024)")
    flag("--temperature", type=float, default=d.temperature, help="for sampling and scoring")
    flag("--static-cache", action=argparse.BooleanOptionalAction, default=d.cuda,
         help="roll out with compiled blocks and CUDA graphs, for speed")
    # Value, advantage, loss
    flag("--tau-pairs", type=int, help="question-answer pairs in tau (default: the GVM's)")
    flag("--advantage", choices=("q", "delta"), default=d.advantage,
         help="delta: Q_t - Q_{t-1}, what a token did to the value; q: Q, eq. (2) (paper)")
    flag("--clip", type=float, default=0.2, help="eps of eq. (3) (paper: not given)")
    # Distance to the reference
    flag("--kl-coef", type=float, default=d.kl_coef, help="initial KL coefficient (paper 0.2)")
    flag("--kl-target", type=float, default=d.kl_target,
         help="nats per response that the coefficient adapts to; 0: constant")
    flag("--kl-stop", type=float, default=0.1,
         help="a step ends early above 1.5 times this KL per token (paper 0.1)")
    flag("--lora", action="store_true",
         help="train an adapter (rank 8, alpha 32) on the trunk: one model in memory")
    return common.parse(p, argv)


def clipped_ppo_loss(logp, old_logp, adv, mask, clip):
    """Eq. (3), negated, a mean over the masked tokens: (B, T) each -> scalar, {clip_frac, ...}.

    kl_step estimates KL(old, new) per token by (r - 1) - log r, which is never negative.
    """
    def mean(x):
        return (x * mask).sum() / mask.sum().clamp(min=1)

    log_ratio = (logp - old_logp).clamp(-20, 20)            # or exp would overflow
    ratio = log_ratio.exp()                                 # r_t of eq. (3)
    # The lesser of the two gains: no reward for moving a token beyond the clip
    clipped_ratio = ratio.clamp(1 - clip, 1 + clip)
    loss = mean(-torch.min(ratio * adv, clipped_ratio * adv))
    with torch.no_grad():
        was_clipped = ((ratio - 1).abs() > clip).float()
        kl_step = ratio - 1 - log_ratio
        return loss, dict(clip_frac=mean(was_clipped), kl_step=mean(kl_step), ratio=mean(ratio))


def advantage(q, mask, kind, min_sigma):
    """Values (B, T+1), q[:, 0] = V(s_0), q[:, t+1] = Q_t -> advantage (B, T), 0 outside the mask.

    q: Q normalised over the tokens, eq. (2). delta: Q_t - Q_{t-1}, over its sigma. Its sum over a response,
    Q_{T-1} - V(s_0), is centred over the responses by a shift of all V(s_0), in the first column: a mean
    taken off every token would make short answers pay wherever V(s_0) is too low.
    """
    if kind == "q":
        mean, std = common.masked_moments(q[:, 1:], mask)
        return (q[:, 1:] - mean) / std.clamp(min=min_sigma) * mask
    # What each token did to the value. The sums of all responses average 0.
    change = (q[:, 1:] - q[:, :-1]) * mask                          # (B, T)
    change[:, 0] -= common.all_sum(change.sum()) / common.all_sum(mask[:, 0].sum())
    _, std = common.masked_moments(change, mask)
    return change / std.clamp(min=min_sigma)


def main(argv=None):
    args = parse_args(argv)

    # Data: every line is checked before anything is loaded or trained
    gold = common.load_function(args.gold)
    tok = common.load_tokenizer(args.init_from)
    data = common.read_prompts(tok, args.data, args.max_prompt_length)
    heldout = common.read_prompts(tok, args.heldout, args.max_prompt_length)
    run = common.Run(args, "dvpo", show=("gold", "kl", "q_mean", "ended", "length"))
    device = run.device

    # One frozen trunk is the reference (adapter off) and the value model (adapter "gvm" on).
    trunk = common.load_model(args.init_from, args, trainable=False)
    made_by = f"python train_gvm.py --model {args.model}"           # for an error message
    gvm = common.load_adapter(trunk, tok, args.gvm, made_by)        # dict: how it was trained
    tau_pairs = gvm["tau_pairs"] if args.tau_pairs is None else args.tau_pairs

    # The policy is a second model, or with --lora another adapter on the trunk.
    if args.lora:
        trunk.add_adapter("policy", r=8, alpha=32)
        model = trunk
        adapter = "policy"
    else:
        model = common.load_model(args.init_from, args)
        adapter = None

    # DeepSpeed: it makes the optimizer, and at ZeRO-3 it shards the weights
    length = args.max_prompt_length + args.max_new_tokens           # tokens of the longest row
    policy = run.engine(
        "policy", model, args.lr, length, args.mini_batch_size, args.grad_accum, decodes=True)
    trunk = policy if args.lora else run.frozen(trunk)
    tau_room = common.room_for_tau(gvm, args, tau_pairs)            # tokens

    def prompts_of(step):
        """Row numbers and prompt ids of this rank's rollouts: they depend on the step's number alone."""
        index = run.batch(len(data), args.batch_size, step)
        prompts = [data[i]["prompt"] for i in index]
        return index, [common.encode_prompt(tok, p, args.max_prompt_length) for p in prompts]

    # What a run must remember beside weights, optimizer and random states
    state = run.resume()
    kl_coef = state.get("kl_coef", args.kl_coef)
    kl_before = state.get("kl", 0.0)                                # of the last step
    buffer = state.get("buffer")                                    # the last rollouts, for tau

    # Tau must not contain the answers that are being valued. Before the first step it comes from
    # a rollout that is not trained on, with the prompts that would follow the last step.
    if buffer is None and tau_pairs:
        _, prompts = prompts_of(args.max_steps)
        policy.eval()
        ids, _, mask, _ = common.rollout(run.actor(model), prompts, tok, args, device, adapter)
        buffer = (prompts, common.unpad(ids, mask))

    for step in run.steps(args.max_steps):
        index, prompts = prompts_of(step)

        # 1. Rollout: a sampled response per prompt
        with run.phase("generate"):
            policy.eval()
            rolled_out = common.rollout(run.actor(model), prompts, tok, args, device, adapter)
        ids, attn, mask, ended = rolled_out                         # (B, P+T), mask (B, T)
        T = mask.shape[1]                                           # the longest response
        responses = common.unpad(ids, mask)
        texts = [tok.decode(r, skip_special_tokens=True) for r in responses]

        with run.phase("score"), torch.no_grad():
            # 2. Log-probs of policy and reference. The micro-batches are those of the update, so that
            #    the first ratio is exactly 1; rows of one update are sorted by length: less padding.
            rows_per_update = args.mini_batch_size * args.grad_accum
            order = common.sort_by_length(torch.arange(args.batch_size), attn, rows_per_update)
            batches = (ids, attn, T, order, args.mini_batch_size)
            sampling = dict(temperature=args.temperature)
            old_logp = common.forward_in_micro_batches(
                policy, *batches, adapter=adapter, **sampling)                          # (B, T)
            ref_logp = common.forward_in_micro_batches(trunk, *batches, **sampling)       # (B, T)

            # 3. Value of every token, given tau: some of the policy's own latest answers. One tau
            #    serves all rows of this rank, and is read once.
            rng = np.random.default_rng([args.seed, step, run.rank])
            tau, tau_shown = common.draw_tau(
                tok, buffer, tau_pairs, tau_room, gvm["tau_length"], rng)
            gvm_ids, gvm_attn, prefix_cache = common.frame_behind_tau(
                trunk, tok, tau, prompts, responses, device)
            gvm_batches = (gvm_ids, gvm_attn, T, order, args.mini_batch_size)
            q = common.forward_in_micro_batches(
                trunk, *gvm_batches, prefix_cache, adapter="gvm", head="gvm")           # (B, T+1)
            buffer = (prompts, responses)
            del prefix_cache                                        # frees memory for the update

        # 4. Advantage: what the token did to the value, less its own share of the KL to the reference
        log_ratio_ref = (old_logp - ref_logp).clamp(-20, 20)                            # (B, T)
        adv = advantage(q, mask, args.advantage, gvm["q_std"]) - kl_coef * log_ratio_ref
        kl = (log_ratio_ref * mask).sum(1).mean()                   # nats per response

        # 5. Update: a few passes of clipped PPO over the rollouts, eq. (3)
        with run.phase("train"):
            policy.train()
            if args.lr_decay:
                run.set_lr(policy, args.lr * (1 - step / args.max_steps))
            stats = []
            updates = 0
            for epoch in range(args.ppo_epochs):
                # The first pass keeps the micro-batches of the scores, later ones draw their own
                if epoch > 0:
                    shuffled = torch.randperm(args.batch_size)
                    order = common.sort_by_length(shuffled, attn, rows_per_update)
                epoch_begin = len(stats)
                for group in order.split(rows_per_update):
                    n_tokens = run.sum(mask[group].sum())
                    for m in group.split(args.mini_batch_size):
                        logp = policy(ids[m], attn[m], T, adapter, **sampling)
                        loss, stat = clipped_ppo_loss(
                            logp, old_logp[m], adv[m], mask[m], args.clip)
                        # A mean over all tokens of the update. DeepSpeed divides by passes and ranks.
                        share = mask[m].sum() / n_tokens
                        policy.backward(loss * share * run.world * args.grad_accum)
                        policy.step()
                        stats.append(dict(stat, loss=loss.detach(), n=mask[m].sum()))
                    updates += 1
                # Early stop: this epoch moved the policy too far from the one that sampled
                if common.token_mean(stats[epoch_begin:], "kl_step") > 1.5 * args.kl_stop:
                    break

        if args.dry_run:
            return run.show_batch(tok, ids, attn, mask, args.max_steps)

        # 6. Log, save, adapt the KL coefficient
        row = {key: common.token_mean(stats, key) for key in ("loss", "clip_frac", "kl_step")}
        if gold:
            answers = zip(index, texts, strict=True)
            row["gold"] = np.mean([gold(data[i]["prompt"], text) for i, text in answers])
        # docs/metrics.md says what each number should look like
        q_mean, q_std = common.masked_moments(q[:, 1:], mask)
        _, adv_std = common.masked_moments(adv, mask)
        minus_entropy, _ = common.masked_moments(old_logp, mask)
        row = run.log(
            **row, kl=kl, kl_coef=kl_coef, q_mean=q_mean, q_std=q_std, v0=q[:, 0].mean(),
            adv_std=adv_std, ratio_first=stats[0]["ratio"], updates=updates,
            entropy=-minus_entropy, ended=ended.float().mean(),
            length=mask.sum(1).float().mean(), tokens=run.sum(mask.sum()),
            tau_pairs=tau_shown, tau_tokens=len(tau))
        kl_coef = common.adapt_kl_coef(kl_coef, row["kl"], kl_before, args.kl_target)
        kl_before = row["kl"]
        run.keep(kl_coef=kl_coef, kl=kl_before, buffer=buffer)
        if (step + 1) % args.save_every == 0:
            run.save_model(model, tok, adapter)

    # Save, and measure on fresh answers to held-out prompts
    run.save_model(model, tok, adapter)
    common.evaluate(run, model, policy, trunk, tok, heldout, gold, adapter)


if __name__ == "__main__":
    main()
    common.Run.end()
