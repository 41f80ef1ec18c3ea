"""DPO (arXiv 2305.18290): the policy learns from pairs. No rollouts, no reward, no value.

Reads   pairs {prompt, chosen, rejected}                data/toy/pairs.jsonl
        the SFT model: first policy, reference          out/tiny/sft/model
Writes  the policy, a transformers folder               out/tiny/dpo/model

Objective, eq. (7) there, with the implicit reward h of a whole response:

    L = -log sigmoid(h(x, chosen) - h(x, rejected))
    h(x, y) = beta (log pi(y | x) - log pi_ref(y | x))

The policy starts as the reference: it scores all pairs once, before training, and no second
model is held. Deviations: AdamW and linear decay to 0 in place of RMSprop and warm-up.

    python comparators/dpo.py                                               the toy, on a CPU
    python comparators/dpo.py --model llama3-3b --lora                      one GPU
    deepspeed --num_gpus 8 comparators/dpo.py --model llama3-3b             eight
"""
import argparse
import math
import os
import sys

import torch
import torch.nn.functional as F

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import common


def parse_args(argv=None):
    p, d = common.flags(__doc__, argv, "rm", "rl", "dpo")
    flag = p.add_argument
    flag("--pairs", nargs="+", default=[f"{d.data}/pairs.jsonl"], help="rows to train on")
    flag("--pairs-heldout", default=f"{d.data}/pairs_heldout.jsonl", help="rows to measure on")
    flag("--heldout", default=f"{d.data}/prompts_heldout.jsonl", help="prompts of samples")
    flag("--init-from", default=d.start, help="SFT model: first policy, reference")
    flag("--gold", default=d.reward, help="FILE.py:function(prompt, response) -> float")
    flag("--out", default=f"{d.out}/dpo", help="folder to write")
    flag("--beta", type=float, default=0.1, help="of the KL to the reference (paper 0.1)")
    flag("--epochs", type=float, default=1, help="passes over the pairs")
    flag("--max-steps", type=int, help="stop after so many updates, whatever --epochs says")
    flag("--batch-size", type=int, default=d.batch_size, help="pairs per GPU (paper 64)")
    flag("--grad-accum", type=int, default=d.grad_accum, help="forward passes per update")
    flag("--lr", type=float, default=d.lr, help="peak learning rate (paper 1e-6)")
    flag("--max-length", type=int, default=d.max_length, help="tokens of prompt + response")
    flag("--max-prompt-length", type=int, default=d.max_prompt_length, help="of samples")
    flag("--max-new-tokens", type=int, default=d.max_new_tokens, help="tokens of a sample")
    flag("--temperature", type=float, default=d.temperature, help="of samples")
    flag("--static-cache", action=argparse.BooleanOptionalAction, default=d.cuda,
         help="sample with compiled blocks and CUDA graphs, for speed")
    flag("--lora", action="store_true", help="train an adapter (rank 8, alpha 32) alone")
    return common.parse(p, argv)


def dpo_loss(logp, ref_logp, beta):
    """log pi(y | x) of chosen and rejected, (2, B) each -> scalars: loss, accuracy, margin."""
    chosen, rejected = beta * (logp - ref_logp)         # the implicit reward, (B,) each
    margin = chosen - rejected
    accuracy = (margin > 0).float().mean()
    return -F.logsigmoid(margin).mean(), accuracy, margin.detach().mean()


def pair_logp(run, policy, tok, pairs, adapter):
    """log pi(y | x) of chosen and rejected, sums over the tokens: (2, B); number of tokens."""
    ids, attn, mask = common.pair_frame(tok, pairs, run.args.max_length, run.device)
    logp = policy(ids, attn, mask.shape[1], adapter)    # (2 B, T)
    return (logp * mask).sum(1).view(2, -1), mask.sum()


@torch.no_grad()
def score_all(run, policy, tok, pairs, adapter):
    """pair_logp of all pairs, every rank a share: (2, pairs)."""
    stride = run.args.batch_size // run.args.grad_accum * run.world     # pairs of all ranks
    starts = range(0, len(pairs), stride)
    found = torch.zeros(2, len(starts) * stride, device=run.device)
    for start in common.Progress(starts, desc="log-probs", leave=False):
        # As many on every rank, or ZeRO-3 would hang. Behind the last pair come the first,
        # whose scores are cut off.
        own = list(range(start + run.rank, start + stride, run.world))
        share = [pairs[i % len(pairs)] for i in own]
        found[:, own], _ = pair_logp(run, policy, tok, share, adapter)
    return run.sum(found)[:, :len(pairs)]


def main(argv=None):
    args = parse_args(argv)
    gold = common.load_function(args.gold)
    tok = common.load_tokenizer(args.init_from)
    heldout = common.read_prompts(tok, args.heldout, args.max_prompt_length)
    train = common.read_pairs(args.pairs, tok, args.max_length)
    heldout_pairs = common.read_pairs([args.pairs_heldout], tok, args.max_length)
    run = common.Run(args, "dpo", show=("loss", "accuracy", "margin"))

    # One model, the policy. With --lora it is an adapter on the frozen SFT model.
    model = common.load_model(args.init_from, args, trainable=not args.lora)
    adapter = "policy" if args.lora else None
    if args.lora:
        model.add_adapter("policy", r=8, alpha=32)
    B = args.batch_size // args.grad_accum              # pairs of a pass, 2 B rows
    length = max(args.max_length, args.max_prompt_length + args.max_new_tokens)
    policy = run.engine("policy", model, args.lr, length, B, args.grad_accum, decodes=True)
    pairs_per_step = args.batch_size * run.world
    steps = args.max_steps or math.ceil(args.epochs * len(train) / pairs_per_step)
    if args.dry_run:                                    # the pairs of one step are enough
        train = train[:pairs_per_step]
        heldout_pairs = heldout_pairs[:B]

    # The reference's log-probs are those of the untrained policy: an adapter is zero at first.
    policy.eval()
    ref_train = score_all(run, policy, tok, train, adapter)             # (2, pairs)
    ref_heldout = score_all(run, policy, tok, heldout_pairs, adapter)

    run.resume()
    policy.train()
    for step in run.steps(steps):
        # 1. Update: a mean over the pairs. DeepSpeed divides by passes and ranks.
        run.set_lr(policy, args.lr * (1 - step / steps))
        index = torch.tensor(run.batch(len(train), args.batch_size, step))
        stats = []                                      # of each pass
        n_tokens = 0
        for m in index.split(B):
            pairs = [train[i] for i in m]
            logp, tokens = pair_logp(run, policy, tok, pairs, adapter)  # (2, B)
            loss, accuracy, margin = dpo_loss(logp, ref_train[:, m], args.beta)
            policy.backward(loss)
            policy.step()
            stats.append([loss.detach(), accuracy, margin, *logp.detach().mean(1)])
            n_tokens += tokens

        if args.dry_run:
            frame = common.pair_frame(tok, pairs, args.max_length, run.device)
            return run.show_batch(tok, *frame, steps)

        # 2. Log. Both log-probs fall: only their difference is trained.
        names = ("loss", "accuracy", "margin", "logp_chosen", "logp_rejected")
        row = dict(zip(names, torch.tensor(stats).mean(0), strict=True))
        run.log(**row, tokens=run.sum(n_tokens))

    # 3. Save, and measure the implicit reward on held-out pairs
    policy.eval()
    run.save_model(model, tok, adapter)
    logp = score_all(run, policy, tok, heldout_pairs, adapter)
    _, accuracy, margin = dpo_loss(logp, ref_heldout, args.beta)
    run.write("eval.json", dict(accuracy=accuracy.item(), margin=margin.item()))
    run.say(f"implicit reward: held-out pair accuracy {accuracy:.3f}; wrote {args.out}/model")

    # 4. Reward and KL of fresh answers, which need the reference again
    trunk = policy                                      # with its adapter off
    if not args.lora:
        trunk = run.frozen(common.load_model(args.init_from, args, trainable=False))
    common.evaluate(run, model, policy, trunk, tok, heldout, gold, adapter)


if __name__ == "__main__":
    main()
    common.Run.end()
