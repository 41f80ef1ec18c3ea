"""Stage 1: supervised fine-tuning, the policy that everything else starts from.

Reads   {prompt, response} rows                    data/toy/sft.jsonl
Writes  a transformers folder and metrics.jsonl    out/tiny/sft/model

Objective: cross-entropy on the response tokens, <eos> included, a mean over the tokens of the whole batch.
AdamW, cosine decay, 2 warm-up steps, batch 16, 3 epochs (arXiv 2502.16944 v1, appendix A: "the paper").

Deviation from the paper: it gives one batch size for 8 GPUs. Here every batch size is per GPU, the only
reading under which its batches of 4 and 8 can be split over 8 GPUs.

    python sft.py                                               the toy, on a CPU
    python sft.py --model llama3-3b                             one GPU
    deepspeed --num_gpus 8 sft.py --model llama3-3b             eight
"""
import math

import torch

import common


def parse_args(argv=None):
    p, d = common.flags(__doc__, argv, "sft")
    flag = p.add_argument
    # Data and models
    flag("--data", default=f"{d.data}/sft.jsonl", help="rows {prompt, response} to train on")
    flag("--heldout", default=f"{d.data}/sft_heldout.jsonl", help="rows to measure on")
    flag("--prompts", default=f"{d.data}/prompts_heldout.jsonl", help="rows {prompt} for samples")
    flag("--init-from", default=d.id, help="transformers folder or hub id to start from")
    flag("--out", default=f"{d.out}/sft", help="folder to write")
    # Optimizer, size of a batch and of the run
    flag("--lr", type=float, default=d.lr, help="peak learning rate (paper 2e-5)")
    flag("--batch-size", type=int, default=d.batch_size, help="rows per update and GPU (paper 16)")
    flag("--grad-accum", type=int, default=d.grad_accum, help="forward passes per update")
    flag("--epochs", type=float, default=d.epochs, help="passes over the data (paper 3)")
    flag("--warmup-steps", type=int, default=d.warmup_steps, help="linear warm-up steps (paper 2)")
    flag("--max-steps", type=int, help="stop after so many updates, whatever --epochs says")
    # What a row may look like
    flag("--max-length", type=int, default=d.max_length, help="tokens; prompts get half at most")
    # Samples at the end
    flag("--max-new-tokens", type=int, default=d.max_new_tokens, help="tokens of a held-out sample")
    flag("--gold", "--reward", default=d.reward,
         help="FILE.py:function(prompt, response) -> float, scores samples at the end")
    p.set_defaults(temperature=1.0, static_cache=False)      # of samples
    args = common.parse(p, argv)
    args.max_prompt_length = args.max_length // 2            # of samples, as of training
    return args


def sft_loss(logp, mask, n_tokens):
    """Cross-entropy, (B, T) -> scalar: sum over this micro-batch by the tokens of the whole batch."""
    return -(logp * mask).sum() / n_tokens


def cosine(step, steps, warmup):
    """Learning-rate factor: linear over the warm-up, then half a cosine down to 0."""
    # The first update has a rate above 0
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


@torch.no_grad()
def heldout_loss(run, policy, tok, rows):
    """Mean cross-entropy per response token over the held-out rows, every rank a share."""
    args = run.args
    total = torch.zeros((), device=run.device)               # nats
    count = torch.zeros((), device=run.device)
    stride = args.batch_size * run.world                     # rows of all ranks in one pass
    for start in range(0, len(rows), stride):
        # Every rank has as many rows: the last ones wrap around, and count once
        index = range(start + run.rank, start + stride, run.world)
        alone = [common.pack(tok, rows[j % len(rows)], [], args.max_length, 0) for j in index]
        ids, attn, mask = common.packed_frame(alone, run.device)            # (B, P+T), (B, T)
        is_new = torch.tensor([j < len(rows) for j in index], device=run.device)
        mask = mask & is_new[:, None]
        total -= (policy(ids, attn, mask.shape[1]) * mask).sum()
        count += mask.sum()
    return (run.sum(total) / run.sum(count).clamp(min=1)).item()


def main(argv=None):
    args = parse_args(argv)

    # Data: every line is checked before anything is trained
    tok = common.load_tokenizer(args.init_from)
    train = common.read_rows(args.data, ["prompt", "response"], tok=tok)
    heldout = common.read_rows(args.heldout, ["prompt", "response"], tok=tok)
    # Samples only matter where a function scores them
    reward = common.load_function(args.gold)
    prompts = common.read_rows(args.prompts, ["prompt"], tok=tok) if reward else None
    common.check_lengths(train, lambda row: common.encode_whole(tok, row), args.max_length)
    run = common.Run(args, "sft", show=("loss", "lr"))

    # The model, whole; DeepSpeed over it
    model = common.load_model(args.init_from, args)
    rows_per_pass = args.batch_size // args.grad_accum
    sample_length = args.max_prompt_length + args.max_new_tokens if reward else 0
    length = max(args.max_length, sample_length)             # tokens of the longest row
    policy = run.engine(
        "policy", model, args.lr, length, rows_per_pass, args.grad_accum, decodes=bool(reward))
    rows_per_update = args.batch_size * run.world            # all ranks together
    steps = args.max_steps or math.ceil(args.epochs * len(train) / rows_per_update)
    run.resume()                                             # nothing but what Run itself keeps

    policy.train()                                           # for --gradient-checkpointing
    for step in run.steps(steps):
        # 1. Batch. Similar lengths stand side by side: less padding
        index = run.batch(len(train), args.batch_size, step)
        sequences = [common.pack(tok, train[i], [], args.max_length, 0) for i in index]
        sequences.sort(key=lambda sequence: len(sequence[0]))
        ids, attn, mask = common.packed_frame(sequences, run.device)        # (B, P+T), (B, T)
        n_tokens = run.sum(mask.sum())                       # of all ranks

        # 2. Update: a mean over the tokens of all passes and ranks. DeepSpeed divides the loss by
        #    the numbers of both, so it is multiplied by them
        lr = args.lr * cosine(step, steps, args.warmup_steps)
        run.set_lr(policy, lr)
        loss = torch.zeros((), device=run.device)
        for m in torch.arange(args.batch_size).split(rows_per_pass):
            # One pass: log-probs of the response tokens, (b, T)
            loss_m = sft_loss(policy(ids[m], attn[m], mask.shape[1]), mask[m], n_tokens)
            policy.backward(loss_m * args.grad_accum * run.world)
            policy.step()
            loss += loss_m.detach()                          # the sum over passes is the mean

        if args.dry_run:
            return run.show_batch(tok, ids, attn, mask, steps)

        # 3. Log, which takes the mean over ranks; this loss is a sum over them
        run.log(loss=loss * run.world, lr=lr, tokens=n_tokens)

    # 4. Save, and measure: the loss on held-out rows, and where a function scores them, samples
    policy.eval()                                            # no checkpointing from here on
    run.save_model(model, tok)
    found = dict(steps=steps, heldout_loss=heldout_loss(run, policy, tok, heldout))
    run.say(f"held-out loss {found['heldout_loss']:.4f} nats per token; wrote {args.out}/model")
    if reward:
        return common.evaluate(run, model, policy, None, tok, prompts, reward, about=found)
    run.write("summary.json", found)


if __name__ == "__main__":
    main()
    common.Run.end()
