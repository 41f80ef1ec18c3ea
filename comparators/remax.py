"""ReMax (arXiv 2310.10505): REINFORCE whose baseline is the reward of the greedy answer.

Reads   {prompt} rows                                   data/toy/prompts.jsonl
        the SFT model: first policy, reference, trunk   out/tiny/sft/model
        the reward model of ppo_baseline.py             out/tiny/rm/model
Writes  the policy, a transformers folder               out/tiny/remax/model

Objective, over response tokens, one gradient step per batch of rollouts, no ratio, no clipping:

    L = E[A_t log pi(a_t | s_t)]
    A_t = r(x, y) - r(x, y_greedy) - kl_coef (log pi(a_t | s_t) - log pi_ref(a_t | s_t))

The KL penalty of a token is its own, as in the authors' code (github.com/liziniu/ReMax), not a sum over the
tokens that follow. No critic: the policy is trained, a frozen trunk is reference and reward model. It pays
with a second answer per prompt, and every token of an answer gets the same credit.

Deviations
1. The greedy answer is not sampled at top_p 0.9, nor is the other: both are the policy's own.
2. Rewards, --missing-eos-penalty and linear decay are those of ppo_baseline.py; rewards are not clipped.

    python ppo_baseline.py --rm-only                                        the reward model
    python comparators/remax.py                                             the toy, on a CPU
    deepspeed --num_gpus 8 comparators/remax.py --model llama3-3b           eight GPUs
"""
import os
import sys

import numpy as np
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import common


def parse_args(argv=None):
    p, d = common.flags(__doc__, argv, "rl", "remax")
    flag = p.add_argument
    flag("--data", default=f"{d.data}/prompts.jsonl", help="rows {prompt} to roll out")
    flag("--heldout", default=f"{d.data}/prompts_heldout.jsonl", help="rows {prompt} to measure on")
    flag("--init-from", default=d.start, help="SFT model: first policy, reference")
    flag("--rm", default=f"{d.out}/rm/model", help="the reward model, from ppo_baseline.py")
    flag("--reward", help="FILE.py:function(prompt, response) -> float, in place of --rm")
    flag("--gold", default=d.reward, help="the same, logged as gold and never trained on")
    flag("--out", default=f"{d.out}/remax", help="folder to write")
    flag("--max-steps", type=int, default=d.max_steps, help="rollout steps")
    flag("--batch-size", type=int, default=d.batch_size, help="rollouts per step and GPU")
    flag("--mini-batch-size", type=int, default=d.mini_batch_size, help="rows per pass")
    flag("--lr", type=float, default=d.lr, help="learning rate of the policy")
    flag("--max-prompt-length", type=int, default=d.max_prompt_length, help="tokens, of its end")
    flag("--max-new-tokens", type=int, default=d.max_new_tokens, help="of a response")
    flag("--temperature", type=float, default=d.temperature, help="of sampling and of scoring")
    flag("--missing-eos-penalty", type=float, default=1.0, help="for a response that never ends")
    flag("--kl-coef", type=float, default=d.kl_coef, help="KL coefficient")
    flag("--lora", action="store_true",
         help="train the policy as an adapter (rank 8, alpha 32) on the trunk: one model in memory")
    p.set_defaults(grad_accum=1)
    return common.parse(p, argv)


@torch.no_grad()
def rollout(model, prompts, tok, args, device, adapter=None, greedy=0):
    """A response per prompt, the last `greedy` ones without sampling: else as in dvpo.py."""
    ids, attn, _ = common.frame(prompts, [[] for _ in prompts], device)         # (B, P)
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    end_ids = model.end_ids(tok)                                                # (E,)
    is_greedy = torch.arange(len(prompts), device=device) >= len(prompts) - greedy
    response = []
    mask = []
    with common.decoding(model, ids, attn, adapter, args) as decode:
        for t in range(args.max_new_tokens):
            p = (decode.logits / args.temperature).softmax(-1)                  # (B, V)
            u = torch.rand(len(p), 1, dtype=torch.float64, device=device)
            token = torch.where(is_greedy, decode.logits.argmax(-1), common.draw(p, u))
            response.append(token.masked_fill(ended, 0))
            mask.append(~ended)
            ended = ended | (token[:, None] == end_ids).any(1)
            if t + 1 == args.max_new_tokens or (t % 16 == 15 and ended.all()):
                break
            decode(token)
    frame = common.append_responses(ids, attn, torch.stack(response, 1), torch.stack(mask, 1))
    return *frame, ended


def remax_advantage(score, greedy_score, logp, ref_logp, kl_coef):
    """r(x, y) - r(x, y_greedy), (B,) each, minus the KL penalty of each token, (B, T) each -> (B, T)."""
    return (score - greedy_score)[:, None] - kl_coef * (logp - ref_logp).clamp(-20, 20)


def remax_loss(logp, adv, mask, n_tokens):
    """REINFORCE, negated: (B, T) each -> scalar, this mini-batch's sum by the tokens of the whole batch."""
    return -(logp * adv * mask).sum() / n_tokens


def main(argv=None):
    args = parse_args(argv)
    reward = common.load_function(args.reward)
    gold = common.load_function(args.reward or args.gold)
    tok = common.load_tokenizer(args.init_from)
    data = common.read_prompts(tok, args.data, args.max_prompt_length)
    heldout = common.read_prompts(tok, args.heldout, args.max_prompt_length)
    run = common.Run(args, "remax", show=("gold", "kl", "score"))
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
    kv_cache = (2 * args.batch_size, length)                            # sampled and greedy responses
    run.plan_memory(models, args.mini_batch_size, length, args.max_new_tokens, kv_cache)
    accum = args.batch_size // args.mini_batch_size                     # one update per step
    policy = run.engine("policy", model, args.lr, args.mini_batch_size, accum, decodes=True)
    trunk = policy if args.lora else run.frozen(trunk)

    run.resume()
    for step in run.steps(args.max_steps):
        index = run.batch(len(data), args.batch_size, step)
        prompts = [common.encode_prompt(tok, data[i]["prompt"], args.max_prompt_length) for i in index]

        # 1. Rollout: a sampled and a greedy response per prompt
        with run.phase("generate"):
            policy.eval()
            every = rollout(run.actor(model), prompts * 2, tok, args, device, adapter, args.batch_size)
        ids, attn, mask, ended = every
        T = mask.shape[1]
        texts = [tok.decode(r, skip_special_tokens=True) for r in common.unpad(ids, mask)]
        if args.dry_run:
            return run.show_batch(tok, ids, attn, mask, args.max_steps)

        with run.phase("score"), torch.no_grad():
            # 2. Reward of all responses, and log-probs of the sampled ones under the reference
            if reward:
                score = [reward(data[i]["prompt"], t) for i, t in zip(index * 2, texts, strict=True)]
                score = torch.tensor(score, device=device)                              # (2 B,)
            else:
                order = common.sort_by_length(torch.arange(len(ids)), attn, len(ids))
                rows = (ids, attn, T, order, args.mini_batch_size)
                score = common.forward_in_micro_batches(trunk, *rows, adapter="rm", head="rm")
                score = score.gather(1, mask.sum(1, keepdim=True)).squeeze(1)           # (2 B,)
                score = (score - rm["mean"]) / rm["std"]
            score = score - args.missing_eos_penalty * ~ended
            score, greedy_score = score.chunk(2)
            ids, attn, mask, ended = (x[:args.batch_size] for x in every)
            order = common.sort_by_length(torch.arange(args.batch_size), attn, args.batch_size)
            rows = (ids, attn, T, order, args.mini_batch_size)
            ref_logp = common.forward_in_micro_batches(trunk, *rows, temperature=args.temperature)

        # 3. Update: one step of REINFORCE
        with run.phase("train"):
            policy.train()
            run.set_lr(policy, args.lr * (1 - step / args.max_steps))
            n_tokens = run.sum(mask.sum())
            old_logp = torch.zeros_like(ref_logp)
            loss = torch.zeros((), device=device)
            for m in order.split(args.mini_batch_size):
                logp = policy(ids[m], attn[m], T, adapter, temperature=args.temperature)
                old_logp[m] = logp.detach()
                adv = remax_advantage(score[m], greedy_score[m], old_logp[m], ref_logp[m], args.kl_coef)
                loss_m = remax_loss(logp, adv, mask[m], n_tokens)
                policy.backward(loss_m * run.world * accum)             # DeepSpeed divides by both
                policy.step()
                loss += loss_m.detach()

        # 4. Log
        row = dict(loss=loss * run.world, score=score.mean(), greedy_score=greedy_score.mean())
        if gold:
            pairs = zip(index, texts[:args.batch_size], strict=True)
            row["gold"] = np.mean([gold(data[i]["prompt"], t) for i, t in pairs])
        minus_entropy, _ = common.masked_moments(old_logp, mask)
        run.log(**row, kl=((old_logp - ref_logp) * mask).sum(1).mean(), ended=ended.float().mean(),
                entropy=-minus_entropy, length=mask.sum(1).float().mean(), tokens=n_tokens)

    run.save_model(model, tok, adapter)
    common.evaluate(run, rollout, model, policy, trunk, tok, heldout, gold, adapter)


if __name__ == "__main__":
    main()
    common.Run.end()
