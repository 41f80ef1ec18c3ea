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

    python sft.py                                               the toy, on a CPU
    python sft.py --model llama3-3b                             one GPU
    deepspeed --num_gpus 8 sft.py --model llama3-3b             eight
"""
import math

import numpy as np
import torch
from transformers import GenerationConfig

import common


def parse_args(argv=None):
    p, d = common.flags(__doc__, argv, "gvm", "sft")        # "gvm" for --tau-length alone
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
    flag("--pack", type=int, default=0, help="rows of the same policy put before each one")
    flag("--tau-length", type=int, default=d.tau_length, help="--pack: tokens per earlier answer")
    # Samples at the end
    flag("--max-new-tokens", type=int, default=d.max_new_tokens, help="tokens of a held-out sample")
    flag("--gold", "--reward", default=d.reward,
         help="FILE.py:function(prompt, response) -> float, scores samples at the end")
    return common.parse(p, argv)


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


@torch.no_grad()
def sample_gold(run, actor, tok, rows, reward, n=256):
    """Mean reward of about n sampled answers to the held-out prompts, over all ranks.

    transformers samples them: a stage imports only common, and RL's rollout is in dvpo.py.
    """
    args = run.args
    # Plain sampling, as in training: no top-k, no top-p, every end token of the model
    end_ids = actor.end_ids(tok).tolist()
    plain = GenerationConfig(do_sample=True, top_k=0, top_p=1.0, pad_token_id=tok.eos_token_id,
                             eos_token_id=end_ids, max_new_tokens=args.max_new_tokens)
    # The model's own configuration would fill in what `plain` leaves open
    own = actor.lm.generation_config
    actor.lm.generation_config = plain
    scores = []                                              # of this rank
    stride = args.batch_size * run.world
    for start in range(0, n, stride):
        index = range(start + run.rank, start + stride, run.world)
        prompts = [rows[j % len(rows)]["prompt"] for j in index]
        prompt_ids = [common.encode_prompt(tok, p, args.max_length // 2) for p in prompts]
        ids, attn, _ = common.frame(prompt_ids, [[]] * len(prompts), run.device)
        # The responses follow the prompts, which are padded on the left
        whole = actor.lm.generate(ids, attention_mask=attn, generation_config=plain)
        texts = tok.batch_decode(whole[:, ids.shape[1]:], skip_special_tokens=True)
        scores += [reward(p, text) for p, text in zip(prompts, texts, strict=True)]
    actor.lm.generation_config = own
    return common.mean_over_ranks(dict(gold=sum(scores) / len(scores)))["gold"]


def main(argv=None):
    args = parse_args(argv)

    # Data: every line is checked before anything is trained
    tok = common.load_tokenizer(args.init_from)
    train = common.Rows(common.read_rows(args.data, ["prompt", "response"], tok=tok))
    heldout = common.read_rows(args.heldout, ["prompt", "response"], tok=tok)
    # Samples only matter where a function scores them
    reward = common.load_function(args.gold)
    prompts = common.read_rows(args.prompts, ["prompt"], tok=tok) if reward else None
    common.check_lengths(train, lambda row: common.encode_whole(tok, row), args.max_length)
    run = common.Run(args, "sft", show=("loss", "lr"))

    # The model, whole; DeepSpeed over it
    model = common.load_model(args.init_from, args)
    rows_per_pass = args.batch_size // args.grad_accum
    policy = run.engine(
        "policy", model, args.lr, args.max_length, rows_per_pass, args.grad_accum,
        decodes=bool(reward))
    rows_per_update = args.batch_size * run.world            # all ranks together
    steps = args.max_steps or math.ceil(args.epochs * len(train) / rows_per_update)
    run.resume()                                             # nothing but what Run itself keeps

    policy.train()                                           # for --gradient-checkpointing
    for step in run.steps(steps):
        # 1. Batch: rows, each after --pack others of its policy. Similar lengths stand side by side:
        #    less padding
        sequences = []
        for i in run.batch(len(train), args.batch_size, step):
            # Seeded by step and row: a resumed run draws the same
            rng = np.random.default_rng([args.seed, step, i])
            before = train.draw(train[i].get("policy"), train[i]["prompt"], args.pack, rng)
            sequence = common.pack(tok, train[i], before, args.max_length, args.tau_length)
            sequences.append(sequence)
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

    # 4. Save, held-out loss
    policy.eval()                                            # no checkpointing from here on
    run.save_model(model, tok)
    summary = dict(steps=steps, heldout_loss=heldout_loss(run, policy, tok, heldout))
    gold = ""
    if reward:
        summary["gold"] = sample_gold(run, run.actor(model), tok, prompts, reward)
        gold = f", gold reward of samples {summary['gold']:.3f}"
    run.write("summary.json", summary)
    loss = f"held-out loss {summary['heldout_loss']:.4f} nats per token"
    run.say(f"{loss}{gold}; wrote {args.out}/model")


if __name__ == "__main__":
    main()
    common.Run.end()
