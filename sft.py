"""Stage 1: supervised fine-tuning, the policy that everything else starts from.

Reads   {prompt, response} rows                    data/toy/sft.jsonl
Writes  a transformers folder and metrics.jsonl    out/tiny/sft/model

Objective: cross-entropy on the response tokens, <eos> included, a mean over the tokens of the whole batch.
AdamW, cosine decay, 2 warm-up steps, batch 16, 3 epochs (arXiv 2502.16944 v1, appendix A: "the paper").

Deviations from the paper
1. It gives one batch size for 8 GPUs. Here every batch size is per GPU, the only reading under which its
   batches of 4 and 8 can be split over 8 GPUs.
2. --pack N puts N rows of the same policy (where rows name one) before each, and trains all of them: the
   trunk of train_gvm.py should know conversations that look like a tau.

    python sft.py                                               the embedded world on a CPU
    python sft.py --model llama3-3b                             one GPU
    deepspeed --num_gpus 8 sft.py --model llama3-3b             eight
"""
import math
import os

import numpy as np
import torch

import common


def parse_args(argv=None):
    p, d = common.flags(__doc__, argv, "gvm", "sft")
    p.add_argument("--data", default=f"{d.data}/sft.jsonl", help="rows {prompt, response} to train on")
    p.add_argument("--heldout", default=f"{d.data}/sft_heldout.jsonl", help="rows to measure on")
    p.add_argument("--prompts", default=f"{d.data}/prompts_heldout.jsonl", help="rows {prompt} for samples")
    p.add_argument("--init-from", default=d.id, help="transformers folder or hub id to start from")
    p.add_argument("--out", default=f"{d.out}/sft", help="folder to write")
    p.add_argument("--lr", type=float, default=d.lr, help="peak learning rate (paper 2e-5)")
    p.add_argument("--batch-size", type=int, default=d.batch_size, help="rows per update and GPU (paper 16)")
    p.add_argument("--grad-accum", type=int, default=d.grad_accum, help="forward passes per update")
    p.add_argument("--epochs", type=float, default=d.epochs, help="passes over the data (paper 3)")
    p.add_argument("--warmup-steps", type=int, default=d.warmup_steps, help="of linear warm-up (paper 2)")
    p.add_argument("--max-steps", type=int, help="stop after so many updates, whatever --epochs says")
    p.add_argument("--max-length", type=int, default=d.max_length, help="tokens; prompts get half at most")
    p.add_argument("--pack", type=int, default=0, help="rows of the same policy put before each one")
    p.add_argument("--tau-length", type=int, default=d.tau_length, help="--pack: of each answer in front")
    p.add_argument("--max-new-tokens", type=int, default=d.max_new_tokens, help="tokens of a held-out sample")
    p.add_argument("--reward", default=d.reward,
                   help="FILE.py:function(prompt, response) -> float, scores samples at the end")
    return common.parse(p, argv)


def sft_loss(logp, mask, n_tokens):
    """Cross-entropy, (B, T) -> scalar: sum over this micro-batch by the tokens of the whole batch."""
    return -(logp * mask).sum() / n_tokens


def cosine(step, steps, warmup):
    """Learning-rate factor: linear over the warm-up, then half a cosine down to 0."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


@torch.no_grad()
def heldout_loss(policy, tok, rows, args, device):
    """Mean cross-entropy per response token over the held-out rows, every rank a share."""
    total, count = torch.zeros((), device=device), torch.zeros((), device=device)
    step = args.batch_size * common.world()
    for i in range(0, len(rows), step):
        index = range(i + common.rank(), i + step, common.world())           # as many on every rank
        alone = [common.pack(tok, rows[j % len(rows)], [], args.max_length, 0) for j in index]
        ids, attn, mask = common.packed_frame(alone, device)
        mask = mask & torch.tensor([j < len(rows) for j in index], device=device)[:, None]   # no row twice
        total -= (policy(ids, attn, mask.shape[1]) * mask).sum()
        count += mask.sum()
    return (common.all_sum(total) / common.all_sum(count).clamp(min=1)).item()


@torch.no_grad()
def sample_gold(actor, tok, rows, reward, args, device, n=256):
    """Mean reward of about n sampled answers to the held-out prompts, this rank's share."""
    from transformers import GenerationConfig

    plain = GenerationConfig(do_sample=True, top_k=0, top_p=1.0, pad_token_id=tok.eos_token_id,
                             eos_token_id=actor.end_ids(tok).tolist(), max_new_tokens=args.max_new_tokens)
    own, actor.lm.generation_config = actor.lm.generation_config, plain     # it would fill gaps in `plain`
    scores, step = [], args.batch_size * common.world()
    for i in range(0, n, step):
        index = range(i + common.rank(), i + step, common.world())
        prompts = [rows[j % len(rows)]["prompt"] for j in index]
        prompt_ids = [common.encode_prompt(tok, p, args.max_length // 2) for p in prompts]
        ids, attn, _ = common.frame(prompt_ids, [[]] * len(prompts), device)
        sampled = actor.lm.generate(ids, attention_mask=attn, generation_config=plain)[:, ids.shape[1]:]
        texts = tok.batch_decode(sampled, skip_special_tokens=True)
        scores += [reward(p, text) for p, text in zip(prompts, texts, strict=True)]
    actor.lm.generation_config = own
    return sum(scores) / len(scores)


def main(argv=None):
    args = parse_args(argv)
    tok = common.load_tokenizer(args.init_from)
    train = common.Rows(common.read_rows(args.data, ["prompt", "response"], tok=tok))
    heldout = common.read_rows(args.heldout, ["prompt", "response"], tok=tok)
    reward = common.load_function(args.reward)
    prompts = common.read_rows(args.prompts, ["prompt"], tok=tok) if reward else None
    common.check_lengths(train, lambda row: common.encode_whole(tok, row), args.max_length)
    device = common.start(args)
    model = common.load_model(args.init_from, args)
    common.check_context(model, args.max_length, "--max-length")
    micro_rows = args.batch_size // args.grad_accum
    common.memory_plan({"policy": model}, args, micro_rows, args.max_length, args.max_length)
    actor = common.actor(model, args) if reward else model
    policy = common.engine(model, args, args.lr, micro_rows, args.grad_accum)
    batch = args.batch_size * common.world()                 # rows per update, all ranks together
    steps = args.max_steps or math.ceil(args.epochs * len(train) / batch)
    common.seed(args)
    checkpoints = common.Checkpoints(args, args.out, policy=policy)
    first, _ = checkpoints.load()
    metrics = common.Metrics(args.out, steps, "sft", ("loss", "lr"), policy, first)

    policy.train()
    for step in range(first, steps):
        # 1. batch: rows, each after --pack others of its policy
        sequences = []
        for i in common.batch_indices(len(train), batch, step, args.seed):
            rng = np.random.default_rng([args.seed, step, i])
            before = train.draw(train[i].get("policy"), train[i]["prompt"], args.pack, rng)
            sequences.append(common.pack(tok, train[i], before, args.max_length, args.tau_length))
        ids, attn, mask = common.packed_frame(sequences, device)
        order = common.sort_by_length(torch.arange(args.batch_size), attn, args.batch_size)
        ids, attn, mask = ids[order], attn[order], mask[order]
        if args.dry_run:
            return common.show_batch(tok, ids, attn, mask, steps)
        n_tokens = common.all_sum(mask.sum())

        # 2. update
        lr = args.lr * cosine(step, steps, args.warmup_steps)
        common.set_lr(policy, lr)
        loss = torch.zeros((), device=device)
        for m in torch.arange(args.batch_size).split(micro_rows):
            loss_m = sft_loss(policy(ids[m], attn[m], mask.shape[1]), mask[m], n_tokens)
            policy.backward(loss_m * args.grad_accum * common.world())       # DeepSpeed divides by both
            policy.step()
            loss += loss_m.detach()

        # 3. log, save
        metrics.log(step, loss=loss * common.world(), lr=lr, tokens=n_tokens)
        checkpoints.save(step)

    # 4. save, held-out loss
    policy.eval()
    common.save_model(model, tok, os.path.join(args.out, "model"))
    summary = dict(steps=steps, heldout_loss=heldout_loss(policy, tok, heldout, args, device))
    if reward:
        common.refresh(actor, model)
        gold = sample_gold(actor, tok, prompts, reward, args, device)
        summary |= common.mean_over_ranks(dict(gold=gold))
    common.write_json(os.path.join(args.out, "summary.json"), summary)
    if common.rank() == 0:
        gold = f", gold reward of samples {summary['gold']:.3f}" if reward else ""
        print(f"held-out loss {summary['heldout_loss']:.4f} nats per token{gold}; wrote {args.out}/model")


if __name__ == "__main__":
    main()
    common.finish()
