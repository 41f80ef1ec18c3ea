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

    python comparators/dpo.py                                               the embedded world on a CPU
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
    p.add_argument("--pairs", nargs="+", default=[f"{d.data}/pairs.jsonl"], help="rows to train on")
    p.add_argument("--pairs-heldout", default=f"{d.data}/pairs_heldout.jsonl", help="rows to measure on")
    p.add_argument("--heldout", default=f"{d.data}/prompts_heldout.jsonl", help="rows {prompt} for samples")
    p.add_argument("--init-from", default=d.start, help="SFT model: first policy, reference")
    p.add_argument("--gold", default=d.reward, help="FILE.py:function(prompt, response) -> float, of samples")
    p.add_argument("--out", default=f"{d.out}/dpo", help="folder to write")
    p.add_argument("--beta", type=float, default=0.1, help="of the KL to the reference (paper 0.1)")
    p.add_argument("--epochs", type=float, default=1, help="passes over the pairs")
    p.add_argument("--max-steps", type=int, help="stop after so many updates, whatever --epochs says")
    p.add_argument("--batch-size", type=int, default=d.batch_size, help="pairs per update and GPU (paper 64)")
    p.add_argument("--grad-accum", type=int, default=d.grad_accum, help="forward passes per update")
    p.add_argument("--lr", type=float, default=d.lr, help="peak learning rate (paper 1e-6)")
    p.add_argument("--max-length", type=int, default=d.max_length, help="tokens of prompt + response")
    p.add_argument("--max-prompt-length", type=int, default=d.max_prompt_length, help="of samples: its end")
    p.add_argument("--max-new-tokens", type=int, default=d.max_new_tokens, help="tokens of a sample")
    p.add_argument("--temperature", type=float, default=d.temperature, help="of samples")
    p.add_argument("--static-cache", action=argparse.BooleanOptionalAction, default=common.CUDA,
                   help="sample with compiled blocks and CUDA graphs, for speed")
    p.add_argument("--lora", action="store_true", help="train the policy as an adapter (rank 8, alpha 32)")
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
    heldout, gold = common.read_rows(args.heldout, ["prompt"]), common.load_function(args.gold)
    tok = common.load_tokenizer(args.init_from)
    train = common.read_pairs(args.pairs, tok, args.max_length)
    heldout_pairs = common.read_pairs([args.pairs_heldout], tok, args.max_length)
    device = common.start(args)

    # Model: the policy. With --lora it is an adapter on the frozen SFT model.
    model, adapter = common.load_model(args.init_from, args, trainable=not args.lora), None
    common.check_context(model, args.max_length, "--max-length")
    length = args.max_prompt_length + args.max_new_tokens
    common.check_context(model, length, "--max-prompt-length and --max-new-tokens")
    if args.lora:
        model.add_adapter("policy", r=8, alpha=32)
        adapter = "policy"
    rows = args.batch_size // args.grad_accum                     # pairs per forward pass
    kv_cache = args.batch_size, length                            # of the samples at the end
    common.memory_plan({"policy": model}, args, 2 * rows, args.max_length, args.max_length, kv_cache)
    actor = common.actor(model, args)
    policy = common.engine(model, args, args.lr, rows, args.grad_accum)
    batch = args.batch_size * common.world()                      # pairs per update, all ranks together
    steps = args.max_steps or math.ceil(args.epochs * len(train) / batch)

    common.seed(args)
    if args.dry_run:
        return common.show_batch(tok, *frame(tok, train[:rows], args, device), steps)

    # The reference's log-probs: those of the policy before it is trained (an adapter is zero at first)
    policy.eval()
    ref_logp = score_pairs(policy, tok, train, args, device, adapter)
    ref_heldout = score_pairs(policy, tok, heldout_pairs, args, device, adapter)
    checkpoints = common.Checkpoints(args, args.out, policy=policy)
    first, _ = checkpoints.load()
    metrics = common.Metrics(args.out, steps, "dpo", ("loss", "accuracy", "margin"), policy, first)

    policy.train()
    for step in range(first, steps):
        # 1. batch
        index = torch.tensor(common.batch_indices(len(train), batch, step, args.seed))

        # 2. update
        common.set_lr(policy, args.lr * (1 - step / steps))
        stats, n_tokens = [], 0
        for m in index.split(rows):
            ids, attn, mask = frame(tok, [train[i] for i in m], args, device)
            logp = response_logp(policy, ids, attn, mask, adapter)
            loss, margin = dpo_loss(logp, ref_logp[m].T.flatten(), args.beta)
            policy.backward(loss)                                 # DeepSpeed averages over passes and ranks
            policy.step()
            chosen, rejected = logp.detach().chunk(2)
            accuracy = (margin > 0).float().mean()
            stats.append([loss.detach(), accuracy, margin.mean(), chosen.mean(), rejected.mean()])
            n_tokens += mask.sum()

        # 3. log, save
        names = "loss", "accuracy", "margin", "logp_chosen", "logp_rejected"
        means = dict(zip(names, torch.tensor(stats).mean(0), strict=True))
        metrics.log(step, **means, tokens=common.all_sum(n_tokens))
        checkpoints.save(step)

    # 4. save; accuracy on held-out pairs; reward and KL of fresh answers, which need the reference again
    policy.eval()
    common.save_model(model, tok, os.path.join(args.out, "model"), adapter)
    logp = score_pairs(policy, tok, heldout_pairs, args, device, adapter)
    _, margin = dpo_loss(logp.T.flatten(), ref_heldout.T.flatten(), args.beta)
    found = dict(accuracy=(margin > 0).float().mean().item(), margin=margin.mean().item())
    common.write_json(os.path.join(args.out, "eval.json"), found)
    if common.rank() == 0:
        print(f"implicit reward: held-out pair accuracy {found['accuracy']:.3f}; wrote {args.out}/model")
    reference = policy
    if not args.lora:
        reference = common.frozen(common.load_model(args.init_from, args, trainable=False), args)
    common.refresh(actor, model)
    common.evaluate(rollout, actor, policy, reference, tok, heldout, gold, args, device, adapter)


if __name__ == "__main__":
    main()
    common.finish()
