"""What DVPO replaces: RLHF with PPO, four roles, two of them trained. In the order of dvpo.py.

Reads   {prompt} rows                                   data/toy/prompts.jsonl
        the SFT model: first policy, reference, trunk   out/tiny/sft/model
        the reward model on that trunk                  out/tiny/rm/model, trained first where there is none
Writes  the policy, a transformers folder               out/tiny/ppo/model

Reward model (Bradley-Terry): L = -log sigmoid(r(x, chosen) - r(x, rejected)), read at the last token. PPO:
eq. (3) of arXiv 2502.16944 v1 with

    reward_t = -kl_coef (log pi_old(a_t | s_t) - log pi_ref(a_t | s_t)) + [t is the last token] r(x, y)
    A = GAE(reward, V), gamma 1, lambda 0.95, whitened;   G = A + V_old
    critic: 1/2 max((V - G)^2, (clip(V, V_old +- eps) - G)^2)

The critic starts from the reward model, its head included and in units of the standardised score.
--critic-from gvm starts it from the GVM: Q of a token is V of the state that it leads to. Reference (adapter
off) and reward model (adapter on) share a frozen trunk, as reference and GVM do in dvpo.py: PPO has every
saving that DVPO has but --lora.

Choices that the paper leaves open
1. Rewards are the reward model's scores, standardised by those of the last 100 batches of its training.
2. A response that never ends pays --missing-eos-penalty. Early stop and the rule of the KL coefficient are as
   in dvpo.py. The KL penalty runs through GAE and is whitened, so that equal coefficients are not equal
   penalties: compare the two methods at one --kl-target.

    python ppo_baseline.py                                          the toy, on a CPU
    python ppo_baseline.py --model llama3-3b                        one GPU
    deepspeed --num_gpus 8 ppo_baseline.py --model llama3-3b        eight
"""
import argparse
import math
import os
import sys

import numpy as np
import torch
import torch.nn.functional as F

import common

RM_FLAGS = ("pairs", "rm_lr", "rm_batch_size", "rm_epochs", "rm_max_steps", "max_length",
            "lora_rank", "lora_alpha", "lora_dropout")


def parse_args(argv=None):
    p, d = common.flags(__doc__, argv, "rm", "rl")
    flag = p.add_argument
    # Data and models
    flag("--data", default=f"{d.data}/prompts.jsonl", help="rows {prompt} to roll out")
    flag("--heldout", default=f"{d.data}/prompts_heldout.jsonl", help="rows {prompt} to measure")
    flag("--init-from", default=d.start, help="SFT model: first policy, reference")
    flag("--rm", default=f"{d.out}/rm/model", help="reward model; trained first if not there")
    flag("--reward", help="FILE.py:function(prompt, response) -> float, in place of --rm")
    flag("--critic-from", choices=("rm", "gvm"), default="rm", help="what the critic starts from")
    flag("--freeze-critic", action="store_true", help="leave the critic as it starts")
    flag("--gvm", default=f"{d.out}/gvm/model", help="--critic-from gvm: from train_gvm.py")
    flag("--gold", default=d.reward,
         help="FILE.py:function that is only logged, as gold; --reward takes its place")
    flag("--out", default=f"{d.out}/ppo", help="folder to write")
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
    flag("--critic-lr", type=float, default=d.critic_lr, help="of the critic (paper 2e-6)")
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
    # Advantage, loss
    flag("--gamma", type=float, default=1.0, help="discount per token")
    flag("--gae-lambda", type=float, default=0.95, help="lambda of GAE")
    flag("--missing-eos-penalty", type=float, default=1.0, help="for an answer that is cut")
    flag("--clip", type=float, default=0.2,
         help="eps of eq. (3) and of the value clip (paper: not given)")
    # Distance to the reference
    flag("--kl-coef", type=float, default=d.kl_coef, help="initial KL coefficient (paper 0.2)")
    flag("--kl-target", type=float, default=d.kl_target,
         help="nats per response that the coefficient adapts to; 0: constant")
    flag("--kl-stop", type=float, default=0.1,
         help="a step ends early above 1.5 times this KL per token (paper 0.1)")
    # The reward model, where it is trained first
    rm_flag = p.add_argument_group("reward model").add_argument
    rm_flag("--pairs", nargs="+", default=[f"{d.data}/pairs.jsonl"], help="rows to train on")
    rm_flag("--pairs-heldout", default=f"{d.data}/pairs_heldout.jsonl", help="rows to measure")
    rm_flag("--rm-only", action="store_true", help="train the reward model, then end")
    rm_flag("--rm-lr", type=float, default=d.rm_lr, help="peak learning rate (paper 2e-5)")
    rm_flag("--rm-batch-size", type=int, default=d.rm_batch_size, help="pairs per step (paper 4)")
    rm_flag("--rm-epochs", type=float, default=d.rm_epochs, help="passes over pairs (paper 2)")
    rm_flag("--rm-max-steps", type=int, help="stop after so many steps, whatever --rm-epochs says")
    rm_flag("--max-length", type=int, default=d.max_length, help="tokens of prompt + response")
    rm_flag("--lora-rank", type=int, default=d.lora_rank, help="rank of the adapter (paper 8)")
    rm_flag("--lora-alpha", type=float, default=d.lora_alpha, help="scale times rank (paper 32)")
    rm_flag("--lora-dropout", type=float, default=d.lora_dropout, help="of the adapter (paper 0.1)")
    args = common.parse(p, argv)
    args.pairs = [os.path.normpath(path) for path in args.pairs]

    # A reward model that exists must have been trained with the flags on this command line,
    # even with those that repeat a default
    words = sys.argv[1:] if argv is None else argv
    named = [word.partition("=")[0][2:].replace("-", "_") for word in words]
    args.rm_asked = {key: getattr(args, key) for key in RM_FLAGS if key in named}
    return args


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


def gae(rewards, values, mask, gamma, lam):
    """Generalised advantage estimation (arXiv 1506.02438): (B, T) each -> advantage (B, T), returns (B, T).

    values[t] = V(s_t), before a_t; the value after the last masked token is 0. Both are 0 outside the mask.
    """
    # Backwards in time: A_t = delta_t + gamma lambda A_{t+1}, nothing behind the last token
    values = values * mask
    adv = torch.zeros_like(rewards)
    next_adv = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        # V after the last token is 0
        next_value = values[:, t + 1] if t + 1 < rewards.shape[1] else 0.0
        # The TD error of one token
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_adv = (delta + gamma * lam * next_adv) * mask[:, t]
        adv[:, t] = next_adv
    return adv, (adv + values) * mask


def value_loss(values, old_values, returns, mask, clip):
    """Clipped squared error, a mean over the masked tokens: (B, T) each -> scalar."""
    # The greater of the two errors: no reward for moving a value beyond the clip
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    error = torch.max((values - returns) ** 2, (clipped - returns) ** 2)
    return 0.5 * (error * mask).sum() / mask.sum().clamp(min=1)


def pairwise_loss(chosen, rejected):
    """Bradley-Terry: scores (B,), (B,) -> scalar, the mean of -log sigmoid(chosen - rejected)."""
    return -F.logsigmoid(chosen - rejected).mean()


def scores(model, ids, attn, mask):
    """The reward model's head at the last token of each response: (B,)."""
    # One value after each token, and one before the first
    every_state = model(ids, attn, mask.shape[1], "rm", head="rm")      # (B, T+1)
    return every_state.gather(1, mask.sum(1, keepdim=True)).squeeze(1)


def train_reward_model(args, tok):
    """LoRA and a scalar head on the SFT model, pairwise loss; writes --rm."""
    # Data, model, DeepSpeed. It writes beside the adapter, and not into the folder of RL.
    train = common.read_pairs(args.pairs, tok, args.max_length)
    heldout = common.read_pairs([args.pairs_heldout], tok, args.max_length)
    out = args.out if args.dry_run else os.path.dirname(args.rm)
    run = common.Run(args, "rm", show=("loss", "accuracy"), out=out)
    model = common.load_model(args.init_from, args, trainable=False)
    model.add_adapter("rm", args.lora_rank, args.lora_alpha, args.lora_dropout)
    model.add_head("rm")
    pairs_per_step = args.rm_batch_size * run.world
    # Passes over the pairs, or a number of steps
    steps = args.rm_max_steps or math.ceil(args.rm_epochs * len(train) / pairs_per_step)
    engine = run.engine("rm", model, args.rm_lr, args.max_length, args.rm_batch_size)

    def score_pairs(pairs):
        """Scores of the chosen answers and of the rejected, (B,) each, in one pass."""
        frame = common.pair_frame(tok, pairs, args.max_length, run.device)      # 2 B rows
        return scores(engine, *frame).chunk(2)

    # Scores of the last batches: their moments are the units of the reward
    state = run.resume()
    seen = [x.to(run.device) for x in state.get("seen", [])]        # scores, last 100 batches
    engine.train()                                                  # dropout in the adapter
    for step in run.steps(steps):
        index = run.batch(len(train), args.rm_batch_size, step)
        pairs = [train[i] for i in index]
        chosen, rejected = score_pairs(pairs)
        loss = pairwise_loss(chosen, rejected)
        # Linear decay to 0
        run.set_lr(engine, args.rm_lr * (1 - step / steps))
        engine.backward(loss)
        engine.step()
        if args.dry_run:
            frame = common.pair_frame(tok, pairs, args.max_length, run.device)
            return run.show_batch(tok, *frame, steps)
        seen = [*seen, torch.cat([chosen, rejected]).detach()][-100:]
        run.log(loss=loss.detach(), accuracy=(chosen > rejected).float().mean())
        run.keep(seen=seen)

    # Held-out accuracy: every rank scores as many pairs, and none counts twice
    engine.eval()                                                   # no dropout
    right = torch.zeros((), device=run.device)
    with torch.no_grad():
        for start in range(0, len(heldout), pairs_per_step):
            # The last pairs wrap around
            index = range(start + run.rank, start + pairs_per_step, run.world)
            chosen, rejected = score_pairs([heldout[i % len(heldout)] for i in index])
            new = torch.tensor([i < len(heldout) for i in index], device=run.device)
            right += ((chosen > rejected) & new).sum()
    accuracy = run.sum(right) / len(heldout)

    # Save, with the units and with what it was trained on
    seen = torch.cat(seen)
    mean, std = common.masked_moments(seen, torch.ones_like(seen))
    std = std.clamp(min=0.1)                                        # after few steps scores are 0
    about = {key: getattr(args, key) for key in (*RM_FLAGS, "init_from")}
    about |= dict(mean=mean.item(), std=std.item(), accuracy=accuracy.item())
    run.save_adapter(model, "rm", tok, args.rm, **about)
    run.write("eval.json", dict(accuracy=about["accuracy"]))
    run.say(f"reward model: held-out pair accuracy {about['accuracy']:.3f}; wrote {args.rm}")


@torch.no_grad()
def start_critic(critic, trunk, name, mean, std):
    """Make the critic the trunk with this adapter and its head, in units where (mean, std) are (0, 1)."""
    # The adapter goes into the weights: the critic is trained whole
    critic.lm.load_state_dict(trunk.merged_state_dict(name))
    # (w h + b - mean) / std
    head = trunk.heads[name]
    critic.add_head("critic", head.sees_token, head.token_scale)
    critic.heads["critic"].weight.copy_(head.weight / std)
    critic.heads["critic"].bias.copy_((head.bias - mean) / std)


def main(argv=None):
    args = parse_args(argv)

    # Data: every line is checked before anything is loaded or trained
    reward = common.load_function(args.reward)
    gold = common.load_function(args.reward or args.gold)
    tok = common.load_tokenizer(args.init_from)
    data = common.read_prompts(tok, args.data, args.max_prompt_length)
    heldout = common.read_prompts(tok, args.heldout, args.max_prompt_length)
    run = common.Run(args, "ppo", show=("gold", "kl", "score", "ended", "length"))
    device = run.device

    # The reward model comes first, unless there is one, or a function
    if args.rm_only or (reward is None and not os.path.exists(args.rm)):
        train_reward_model(args, tok)
        if args.dry_run or args.rm_only:
            return

    # One frozen trunk is the reference (adapter off) and the reward model (adapter "rm" on).
    trunk = common.load_model(args.init_from, args, trainable=False)
    if reward is None:
        # rm: a dict with its flags and with mean and std of its scores
        made_by = f"rm -r {args.rm}; python ppo_baseline.py"
        rm = common.load_adapter(trunk, tok, args.rm, made_by, asked=args.rm_asked)

    # The policy is a second model. The critic is a third, and predicts in units of the score.
    model = common.load_model(args.init_from, args)
    critic_model = common.load_model(args.init_from, args, trainable=not args.freeze_critic)
    if args.critic_from == "gvm":
        # The GVM learned raw rewards; in RL the reward model's score is standardised
        made_by = f"python train_gvm.py --model {args.model}"
        gvm = common.load_adapter(trunk, tok, args.gvm, made_by)
        unit = (0.0, 1.0) if reward else (gvm["reward_mean"], gvm["reward_std"])
        start_critic(critic_model, trunk, "gvm", *unit)
    elif reward is None:
        start_critic(critic_model, trunk, "rm", rm["mean"], rm["std"])
    else:
        # A reward function says nothing of values: the head starts at 0
        critic_model.add_head("critic")

    # DeepSpeed: it makes the optimizers, and at ZeRO-3 it shards the weights
    length = args.max_prompt_length + args.max_new_tokens           # tokens of the longest row
    update = (length, args.mini_batch_size, args.grad_accum)
    policy = run.engine("policy", model, args.lr, *update, decodes=True)
    if args.freeze_critic:
        critic = run.frozen(critic_model)
    else:
        critic = run.engine("critic", critic_model, args.critic_lr, *update)
    trunk = run.frozen(trunk)
    # A critic from the GVM reads a tau of so many tokens at most
    if args.critic_from == "gvm":
        tau_room = common.room_for_tau(gvm, args, gvm["tau_pairs"])

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

    # A critic from the GVM reads a tau. Before the first step tau comes from a rollout that is
    # not trained on, as in dvpo.py.
    if buffer is None and args.critic_from == "gvm":
        _, prompts = prompts_of(args.max_steps)
        policy.eval()
        ids, _, mask, _ = common.rollout(run.actor(model), prompts, tok, args, device)
        buffer = (prompts, common.unpad(ids, mask))

    for step in run.steps(args.max_steps):
        index, prompts = prompts_of(step)

        # 1. Rollout: a sampled response per prompt
        with run.phase("generate"):
            policy.eval()
            critic.eval()
            rolled_out = common.rollout(run.actor(model), prompts, tok, args, device)
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
            old_logp = common.forward_in_micro_batches(policy, *batches, **sampling)      # (B, T)
            ref_logp = common.forward_in_micro_batches(trunk, *batches, **sampling)       # (B, T)

            # 3. Value of the critic before each token, and the reward of the whole response.
            #    The critic reads what the policy wrote, alone or behind a tau.
            critic_ids = ids
            critic_attn = attn
            if args.critic_from == "gvm":
                rng = np.random.default_rng([args.seed, step, run.rank])
                tau, _ = common.draw_tau(
                    tok, buffer, gvm["tau_pairs"], tau_room, gvm["tau_length"], rng)
                # In front of every row, since the critic may be trained
                critic_ids, critic_attn, _ = common.frame_behind_tau(
                    None, tok, tau, prompts, responses, device)
                buffer = (prompts, responses)
            critic_batches = (critic_ids, critic_attn, T, order, args.mini_batch_size)
            values = common.forward_in_micro_batches(critic, *critic_batches, head="critic")
            values = values[:, :-1]                                                     # (B, T)
            if reward:
                # A function scores the text
                answers = zip(index, texts, strict=True)
                score = [reward(data[i]["prompt"], text) for i, text in answers]
                score = torch.tensor(score, device=device)                              # (B,)
            else:
                # The reward model's head at the last token
                score = common.forward_in_micro_batches(trunk, *batches, adapter="rm", head="rm")
                score = score.gather(1, mask.sum(1, keepdim=True)).squeeze(1)           # (B,)
                score = (score - rm["mean"]) / rm["std"]

        # 4. Advantage: GAE of the KL penalties and, at the last token, the reward
        log_ratio_ref = (old_logp - ref_logp).clamp(-20, 20)                            # (B, T)
        # Each token pays its own KL
        rewards = -kl_coef * log_ratio_ref * mask
        # The score arrives at the last token. An answer that was cut pays the penalty there.
        last = mask.sum(1) - 1                                      # (B,)
        score_with_penalty = score - args.missing_eos_penalty * ~ended
        rewards[torch.arange(args.batch_size), last] += score_with_penalty
        adv, returns = gae(rewards, values, mask, args.gamma, args.gae_lambda)
        # Whitened over the tokens of all ranks
        mean, std = common.masked_moments(adv, mask)
        adv = (adv - mean) / (std + 1e-8) * mask
        kl = (log_ratio_ref * mask).sum(1).mean()                   # nats per response

        # 5. Update: a few passes of clipped PPO over the rollouts, eq. (3), and of the critic
        with run.phase("train"):
            policy.train()
            critic.train(not args.freeze_critic)
            # Both learning rates decay to 0
            if args.lr_decay:
                left = 1 - step / args.max_steps
                run.set_lr(policy, args.lr * left)
                if not args.freeze_critic:
                    run.set_lr(critic, args.critic_lr * left)
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
                        logp = policy(ids[m], attn[m], T, **sampling)
                        loss, stat = clipped_ppo_loss(
                            logp, old_logp[m], adv[m], mask[m], args.clip)
                        # A mean over all tokens of the update. DeepSpeed divides by passes and ranks.
                        share = mask[m].sum() / n_tokens
                        scale = run.world * args.grad_accum
                        policy.backward(loss * share * scale)
                        policy.step()
                        # The critic, a second model with an optimizer of its own
                        v = values[m]
                        if not args.freeze_critic:
                            v = critic(critic_ids[m], critic_attn[m], T, head="critic")[:, :-1]
                        v_loss = value_loss(v, values[m], returns[m], mask[m], args.clip)
                        if not args.freeze_critic:
                            critic.backward(v_loss * share * scale)
                            critic.step()
                        stat |= dict(loss=loss.detach(), value_loss=v_loss.detach())
                        stats.append(dict(stat, n=mask[m].sum()))
                    updates += 1
                # Early stop: this epoch moved the policy too far from the one that sampled
                if common.token_mean(stats[epoch_begin:], "kl_step") > 1.5 * args.kl_stop:
                    break

        if args.dry_run:
            return run.show_batch(tok, ids, attn, mask, args.max_steps)

        # 6. Log, save, adapt the KL coefficient
        keys = ("loss", "value_loss", "clip_frac", "kl_step")
        row = {key: common.token_mean(stats, key) for key in keys}
        if gold:
            answers = zip(index, texts, strict=True)
            row["gold"] = np.mean([gold(data[i]["prompt"], text) for i, text in answers])
        # docs/metrics.md says what each number should look like
        q_mean, q_std = common.masked_moments(values, mask)
        _, adv_std = common.masked_moments(adv, mask)
        minus_entropy, _ = common.masked_moments(old_logp, mask)
        row = run.log(
            **row, kl=kl, kl_coef=kl_coef, q_mean=q_mean, q_std=q_std, v0=values[:, 0].mean(),
            adv_std=adv_std, ratio_first=stats[0]["ratio"], updates=updates, score=score.mean(),
            entropy=-minus_entropy, ended=ended.float().mean(),
            length=mask.sum(1).float().mean(), tokens=run.sum(mask.sum()))
        # One coefficient for all ranks, by their mean KL
        kl_coef = common.adapt_kl_coef(kl_coef, row["kl"], kl_before, args.kl_target)
        kl_before = row["kl"]
        run.keep(kl_coef=kl_coef, kl=kl_before, buffer=buffer)
        if (step + 1) % args.save_every == 0:
            run.save_model(model, tok)

    # Save, and measure on fresh answers to held-out prompts
    run.save_model(model, tok)
    common.evaluate(run, model, policy, trunk, tok, heldout, gold)


if __name__ == "__main__":
    main()
    common.Run.end()
