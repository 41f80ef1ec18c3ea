"""DPO (arXiv 2305.18290): the policy learns from the pairs themselves. No rollouts, no reward, no value.

Reads   pairs {prompt, chosen, rejected}                data/toy/pairs.jsonl
        the SFT model: first policy, reference          out/tiny/sft/model
Writes  the policy, a transformers folder               out/tiny/dpo/model

Objective, eq. (7) there, sums over the tokens of a response:

    L = -log sigmoid(beta [(log pi(chosen) - log pi_ref(chosen)) - (log pi(rejected) - log pi_ref(rejected))])

The policy starts as the reference, so that the first policy scores all pairs once, before training, and no
second model is held. Logged: accuracy and margin of the implicit reward beta (log pi - log pi_ref), and the
log-probs of both sides. That of the chosen one falls, too: only the difference is trained.

Deviations: AdamW and linear decay to 0 in place of RMSprop and warm-up, as in the other stages.

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
from dvpo import rollout


def parse_args(argv=None):
    p, d = common.flags(__doc__, argv, "rm", "rl", "dpo")
    flag = p.add_argument
    flag("--pairs", nargs="+", default=[f"{d.data}/pairs.jsonl"], help="rows to train on")
    flag("--pairs-heldout", default=f"{d.data}/pairs_heldout.jsonl", help="rows to measure on")
    flag("--heldout", default=f"{d.data}/prompts_heldout.jsonl", help="rows {prompt} for samples")
    flag("--init-from", default=d.start, help="SFT model: first policy, reference")
    flag("--gold", default=d.reward, help="FILE.py:function(prompt, response) -> float, of samples")
    flag("--out", default=f"{d.out}/dpo", help="folder to write")
    flag("--beta", type=float, default=0.1, help="of the KL to the reference (paper 0.1)")
    flag("--epochs", type=float, default=1, help="passes over the pairs")
    flag("--max-steps", type=int, help="stop after so many updates, whatever --epochs says")
    flag("--batch-size", type=int, default=d.batch_size, help="pairs per update and GPU (paper 64)")
    flag("--grad-accum", type=int, default=d.grad_accum, help="forward passes per update")
    flag("--lr", type=float, default=d.lr, help="peak learning rate (paper 1e-6)")
    flag("--max-length", type=int, default=d.max_length, help="tokens of prompt + response")
    flag("--max-prompt-length", type=int, default=d.max_prompt_length, help="of samples: its end")
    flag("--max-new-tokens", type=int, default=d.max_new_tokens, help="tokens of a sample")
    flag("--temperature", type=float, default=d.temperature, help="of samples")
    flag("--static-cache", action=argparse.BooleanOptionalAction, default=d.cuda,
         help="sample with compiled blocks and CUDA graphs, for speed")
    flag("--lora", action="store_true", help="train the policy as an adapter (rank 8, alpha 32)")
    return common.parse(p, argv)


def dpo_loss(logp, ref_logp, beta):
    """Sums of log-probs (2 B,), the chosen ones first -> scalar, margins of the implicit reward (B,)."""
    chosen, rejected = (beta * (logp - ref_logp)).chunk(2)
    return -F.logsigmoid(chosen - rejected).mean(), (chosen - rejected).detach()


def frame(tok, rows, args, device):
    """Pairs -> the frame of 2 B rows, the chosen responses first."""
    sides = [common.one_side(pair, side) for side in ("chosen", "rejected") for pair in rows]
    return common.packed_frame([common.pack(tok, r, [], args.max_length, 0) for r in sides], device)


def response_logp(policy, ids, attn, mask, adapter):
    """log pi(y | x), the sum over the response: (B,)."""
    return (policy(ids, attn, mask.shape[1], adapter) * mask).sum(1)


@torch.no_grad()
def score_pairs(policy, tok, rows, args, device, adapter):
    """log pi(chosen), log pi(rejected) of all pairs, every rank a share: (pairs, 2)."""
    size = args.batch_size // args.grad_accum
    found, step = torch.zeros(len(rows), 2, device=device), size * common.world()
    for i in common.Progress(range(0, len(rows), step), desc="log-probs", leave=False):
        own = range(i + common.rank(), i + step, common.world())            # as many on every rank
        logp = response_logp(policy, *frame(tok, [rows[j % len(rows)] for j in own], args, device), adapter)
        own = [j for j in own if j < len(rows)]
        found[own] = logp.view(2, -1).T[:len(own)]
    return common.all_sum(found)


def main(argv=None):
    args = parse_args(argv)
    gold = common.load_function(args.gold)
    tok = common.load_tokenizer(args.init_from)
    heldout = common.read_prompts(tok, args.heldout, args.max_prompt_length)
    train = common.read_pairs(args.pairs, tok, args.max_length)
    heldout_pairs = common.read_pairs([args.pairs_heldout], tok, args.max_length)
    run = common.Run(args, "dpo", show=("loss", "accuracy", "margin"))
    device = run.device

    # Model: the policy. With --lora it is an adapter on the frozen SFT model.
    model = common.load_model(args.init_from, args, trainable=not args.lora)
    adapter = None
    if args.lora:
        model.add_adapter("policy", r=8, alpha=32)
        adapter = "policy"
    pairs_per_pass = args.batch_size // args.grad_accum
    kv_cache = (args.batch_size, args.max_prompt_length + args.max_new_tokens)      # of samples at the end
    run.plan_memory({"policy": model}, 2 * pairs_per_pass, args.max_length, args.max_length, kv_cache)
    policy = run.engine("policy", model, args.lr, pairs_per_pass, args.grad_accum, decodes=True)
    steps = args.max_steps or math.ceil(args.epochs * len(train) / (args.batch_size * run.world))
    if args.dry_run:
        return run.show_batch(tok, *frame(tok, train[:pairs_per_pass], args, device), steps)

    # The reference's log-probs: those of the policy before it is trained (an adapter is zero at first)
    policy.eval()
    ref_logp = score_pairs(policy, tok, train, args, device, adapter)
    ref_heldout = score_pairs(policy, tok, heldout_pairs, args, device, adapter)

    run.resume()
    policy.train()
    for step in run.steps(steps):
        # 1. Batch
        index = torch.tensor(run.batch(len(train), args.batch_size, step))

        # 2. Update
        run.set_lr(policy, args.lr * (1 - step / steps))
        stats = []
        n_tokens = 0
        for m in index.split(pairs_per_pass):
            ids, attn, mask = frame(tok, [train[i] for i in m], args, device)
            logp = response_logp(policy, ids, attn, mask, adapter)
            loss, margin = dpo_loss(logp, ref_logp[m].T.flatten(), args.beta)
            policy.backward(loss)                                       # DeepSpeed averages
            policy.step()
            chosen, rejected = logp.detach().chunk(2)
            accuracy = (margin > 0).float().mean()
            stats.append([loss.detach(), accuracy, margin.mean(), chosen.mean(), rejected.mean()])
            n_tokens += mask.sum()

        # 3. Log
        names = ("loss", "accuracy", "margin", "logp_chosen", "logp_rejected")
        means = dict(zip(names, torch.tensor(stats).mean(0), strict=True))
        run.log(**means, tokens=run.sum(n_tokens))

    # 4. Save; accuracy on held-out pairs; reward and KL of fresh answers, which need the reference again
    policy.eval()
    run.save_model(model, tok, adapter)
    logp = score_pairs(policy, tok, heldout_pairs, args, device, adapter)
    _, margin = dpo_loss(logp.T.flatten(), ref_heldout.T.flatten(), args.beta)
    found = dict(accuracy=(margin > 0).float().mean().item(), margin=margin.mean().item())
    run.write("eval.json", found)
    run.say(f"implicit reward: held-out pair accuracy {found['accuracy']:.3f}; wrote {args.out}/model")
    reference = policy
    if not args.lora:
        reference = run.frozen(common.load_model(args.init_from, args, trainable=False))
    common.evaluate(run, rollout, model, policy, reference, tok, heldout, gold, adapter)


if __name__ == "__main__":
    main()
    common.Run.end()
