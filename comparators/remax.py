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
    python comparators/remax.py                                             the embedded world on a CPU
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
    p.add_argument("--data", default=f"{d.data}/prompts.jsonl", help="rows {prompt} to roll out")
    p.add_argument("--heldout", default=f"{d.data}/prompts_heldout.jsonl", help="rows {prompt} to measure on")
    p.add_argument("--init-from", default=d.start, help="SFT model: first policy, reference")
    p.add_argument("--rm", default=f"{d.out}/rm/model", help="the reward model, from ppo_baseline.py")
    p.add_argument("--reward", help="FILE.py:function(prompt, response) -> float, in place of --rm")
    p.add_argument("--gold", default=d.reward, help="the same, logged as gold and never trained on")
    p.add_argument("--out", default=f"{d.out}/remax", help="folder to write")
    p.add_argument("--max-steps", type=int, default=d.max_steps, help="rollout steps")
    p.add_argument("--batch-size", type=int, default=d.batch_size, help="rollouts per step and GPU")
    p.add_argument("--mini-batch-size", type=int, default=d.mini_batch_size, help="rows per pass")
    p.add_argument("--lr", type=float, default=d.lr, help="learning rate of the policy")
    p.add_argument("--max-prompt-length", type=int, default=d.max_prompt_length, help="tokens, of its end")
    p.add_argument("--max-new-tokens", type=int, default=d.max_new_tokens, help="of a response")
    p.add_argument("--temperature", type=float, default=d.temperature, help="of sampling and of scoring")
    p.add_argument("--missing-eos-penalty", type=float, default=1.0, help="for a response that never ends")
    p.add_argument("--kl-coef", type=float, default=d.kl_coef, help="KL coefficient")
    p.add_argument("--lora", action="store_true",
                   help="train the policy as an adapter (rank 8, alpha 32) on the trunk: one model in memory")
    p.set_defaults(grad_accum=1)
    return common.parse(p, argv)


@torch.no_grad()
@common.merges_adapter
def rollout(model, prompts, tok, args, device, adapter=None, greedy=0):
    """A response per prompt, the last `greedy` ones without sampling: lists of ids -> as in dvpo.py."""
    ids, attn, _ = common.frame(prompts, [[] for _ in prompts], device)      # (B, P)
    decode = common.Decoder(model, ids, attn, adapter)
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    end_ids = model.end_ids(tok)                                  # (E,)
    response, mask = [], []
    is_greedy = torch.arange(len(prompts), device=device) >= len(prompts) - greedy
    for t in range(args.max_new_tokens):
        p = (decode.logits / args.temperature).softmax(-1)                                     # (B, V)
        token = common.draw(p, torch.rand(len(p), 1, dtype=torch.float64, device=device))      # (B,), no sync
        token = torch.where(is_greedy, decode.logits.argmax(-1), token)
        response.append(token.masked_fill(ended, 0))
        mask.append(~ended)
        ended = ended | (token[:, None] == end_ids).any(1)
        if t + 1 == args.max_new_tokens or (t % 16 == 15 and ended.all()):
            break
        decode(token)
    response, mask = torch.stack(response, 1), torch.stack(mask, 1)
    return *common.append_responses(ids, attn, response, mask), ended


def remax_advantage(score, greedy_score, logp, ref_logp, kl_coef):
    """r(x, y) - r(x, y_greedy), (B,) each, minus the KL penalty of each token, (B, T) each -> (B, T)."""
    return (score - greedy_score)[:, None] - kl_coef * (logp - ref_logp).clamp(-20, 20)


def remax_loss(logp, adv, mask, n_tokens):
    """REINFORCE, negated: (B, T) each -> scalar, this mini-batch's sum by the tokens of the whole batch."""
    return -(logp * adv * mask).sum() / n_tokens


def main(argv=None):
    args = parse_args(argv)
    data, heldout = common.read_rows(args.data, ["prompt"]), common.read_rows(args.heldout, ["prompt"])
    reward, gold = common.load_function(args.reward), common.load_function(args.reward or args.gold)
    tok = common.load_tokenizer(args.init_from)
    device = common.start(args)

    # Models: the policy, and one frozen trunk for reference and reward model. With --lora it is its adapter.
    trunk = common.load_model(args.init_from, args, trainable=False)
    length = args.max_prompt_length + args.max_new_tokens
    common.check_context(trunk, length, "--max-prompt-length and --max-new-tokens")
    if reward is None:
        meta = common.load_adapter(trunk, tok, args.rm, "python ppo_baseline.py --rm-only")
    model, adapter = trunk, "policy"
    if args.lora:
        trunk.add_adapter("policy", r=8, alpha=32)
    else:
        model, adapter = common.load_model(args.init_from, args), None
    models, kv_cache = {"policy": model}, (2 * args.batch_size, length)
    models |= {} if args.lora else {"frozen": trunk}
    common.memory_plan(models, args, args.mini_batch_size, length, args.max_new_tokens, kv_cache)
    actor = common.actor(model, args)
    accum = args.batch_size // args.mini_batch_size
    policy = common.engine(model, args, args.lr, args.mini_batch_size, accum)
    trunk = policy if args.lora else common.frozen(trunk, args)

    batch = args.batch_size * common.world()                      # rollouts per step, all ranks together
    common.seed(args)
    checkpoints = common.Checkpoints(args, args.out, policy=policy)
    first, _ = checkpoints.load()
    metrics = common.Metrics(args.out, args.max_steps, "remax", ("gold", "kl", "score"), policy, first)

    for step in range(first, args.max_steps):
        seconds = {}
        index = common.batch_indices(len(data), batch, step, args.seed)
        prompts = [common.encode_prompt(tok, data[i]["prompt"])[-args.max_prompt_length:] for i in index]

        # 1. rollout: a sampled and a greedy response per prompt
        with common.clock(seconds, "generate"):
            policy.eval()
            common.refresh(actor, model)
            every = rollout(actor, prompts * 2, tok, args, device, adapter, greedy=args.batch_size)
            ids, attn, mask, ended = every
            T, responses = mask.shape[1], common.unpad(ids, mask)
        if args.dry_run:
            return common.show_batch(tok, ids, attn, mask, args.max_steps)

        with common.clock(seconds, "score"), torch.no_grad():
            # 2. reward of all responses, and log-probs of the sampled ones under the reference
            texts = [tok.decode(r, skip_special_tokens=True) for r in responses]
            if reward:                                                                              # (2 B,)
                score = [reward(data[i]["prompt"], t) for i, t in zip(index * 2, texts, strict=True)]
                score = torch.tensor(score, device=device)
            else:
                order = common.sort_by_length(torch.arange(len(ids)), attn, len(ids))
                rows = ids, attn, T, order, args.mini_batch_size
                score = common.forward_in_micro_batches(trunk, *rows, adapter="rm", head="rm")
                score = (score.gather(1, mask.sum(1, keepdim=True)).squeeze(1) - meta["mean"]) / meta["std"]
            score = score - args.missing_eos_penalty * ~ended
            score, greedy_score = score.chunk(2)
            ids, attn, mask, ended = (x[:args.batch_size] for x in every)
            order = common.sort_by_length(torch.arange(args.batch_size), attn, args.batch_size)
            rows, sampled = (ids, attn, T, order, args.mini_batch_size), dict(temperature=args.temperature)
            ref_logp = common.forward_in_micro_batches(trunk, *rows, **sampled)                     # (B, T)

        # 3. update: one step
        with common.clock(seconds, "train"):
            policy.train()
            common.set_lr(policy, args.lr * (1 - step / args.max_steps))
            n_tokens, old_logp = common.all_sum(mask.sum()), torch.zeros_like(ref_logp)
            loss = torch.zeros((), device=device)
            for m in order.split(args.mini_batch_size):                     # rows of one mini-batch
                logp = policy(ids[m], attn[m], T, adapter, temperature=args.temperature)
                old_logp[m] = logp.detach()
                adv = remax_advantage(score[m], greedy_score[m], old_logp[m], ref_logp[m], args.kl_coef)
                loss_m = remax_loss(logp, adv, mask[m], n_tokens)
                policy.backward(loss_m * common.world() * accum)              # DeepSpeed divides by both
                policy.step()
                loss += loss_m.detach()

        # 4. log, save
        row = dict(seconds, loss=loss * common.world(), score=score.mean(), greedy_score=greedy_score.mean())
        if gold:
            pairs = zip(index, texts[:args.batch_size], strict=True)
            row["gold"] = np.mean([gold(data[i]["prompt"], t) for i, t in pairs])
        row |= dict(kl=((old_logp - ref_logp) * mask).sum(1).mean(), ended=ended.float().mean(),
                    entropy=-common.masked_moments(old_logp, mask)[0], length=mask.sum(1).float().mean(),
                    tokens=n_tokens)
        metrics.log(step, **row)
        checkpoints.save(step)

    common.save_model(model, tok, os.path.join(args.out, "model"), adapter)
    common.refresh(actor, model)
    common.evaluate(rollout, actor, policy, trunk, tok, heldout, gold, args, device, adapter)


if __name__ == "__main__":
    main()
    common.finish()
