"""Engines: DeepSpeed over the models of a stage, and what it does to them at ZeRO-3.

ds_config.json holds DeepSpeed's settings; what the flags decide is filled in here.
Open this file for another optimizer, or another way to shard.
"""
import copy
import itertools
import json
import re

import torch

from runtime.processes import CUDA, deepspeed, die, gathered, world


def ds_config(args, model, rows, accum=1):
    """ds_config.json (--ds-config), with what the flags decide filled in."""
    try:
        with open(args.ds_config) as f:
            config = json.load(f)
    except (OSError, ValueError) as e:
        die(f"--ds-config {args.ds_config}: {e}")
    decided = dict(train_micro_batch_size_per_gpu=rows, gradient_accumulation_steps=accum)
    zero = config.setdefault("zero_optimization", {})
    ours = {"train_batch_size", "optimizer", "scheduler", "fp16", "stage", *decided}
    if taken := ours & {*config, *zero}:
        die(f"--ds-config {args.ds_config}: {', '.join(sorted(taken))}: the flags decide that; take it out")
    zero["stage"] = args.zero
    if args.offload:                                    # with torch's own AdamW, which needs no compiler
        zero["offload_optimizer"] = dict(device="cpu", pin_memory=CUDA)
        config["zero_force_ds_cpu_optimizer"] = False
    # DeepSpeed's bf16 mode casts every weight. A whole model needs it, for the fp32 weights of its optimizer;
    # adapters and heads are fp32 and must stay so, trained or frozen.
    bf16 = torch.bfloat16 in {p.dtype for p in model.parameters() if p.requires_grad}
    return config | decided | dict(bf16=dict(enabled=bf16))


def engine(model, args, lr, rows, accum=1):
    """DeepSpeed engine with fused AdamW over what is trainable: `accum` forwards of `rows` rows each."""

    def layer(item):
        return (re.match(r".*?\.\d+\.", item[0]) or [""])[0]

    # One optimizer group per layer: ZeRO-1/2 upcast the gradients of one group at a time (all: 19 GB at 3B).
    trainable = [(key, p) for key, p in model.named_parameters() if p.requires_grad]
    groups = [dict(params=[p for _, p in items]) for _, items in itertools.groupby(trainable, layer)]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    config = ds_config(args, model, rows, accum)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    if world() == 1 and not args.zero:
        engine.enable_backward_allreduce = False        # a copy of all gradients, to sum them over one rank
    return engine


def frozen(model, args):
    """A model that only runs forward: as it is, or at ZeRO-3 sharded over the ranks."""
    if args.zero == 3:
        model = deepspeed.initialize(model=model, config=ds_config(args, model, 1))[0]
    model.eval()
    return model


def actor(model, args):
    """The module that rollouts decode with. Call it before `engine`, and `refresh` before each rollout.

    Below ZeRO-3 the model itself. At ZeRO-3 each token would gather all layers again, so a plain copy
    decodes: the weights once more per GPU, and ranks may stop at different lengths.
    """
    return copy.deepcopy(model).requires_grad_(False).eval() if args.zero == 3 else model


def refresh(actor, model):
    """Bring the copy up to date: the only gather of a rollout, one weight at a time."""
    if actor is not model:
        for own, trained in zip(actor.parameters(), model.parameters(), strict=True):
            with torch.no_grad(), gathered([trained]):
                own.copy_(trained)
