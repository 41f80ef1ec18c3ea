"""Memory: what a stage is going to hold, against what the device has, before anything is trained.

Weights, gradients and optimizer states follow from the parameters; activations are measured on one short row.
Open this file when a plan is wrong. docs/memory.md has plans of real models, and the flags that lower them.
"""
import contextlib
import os

import psutil
import torch
from transformers import AutoConfig

from runtime.processes import CUDA, all_max, die, rank, world, write_json

CHUNK = 1024                                            # positions whose logits exist at one time


def memory_plan(models, args, out, rows, length, sampled=0, decode=(0, 0)):
    """Print the plan, write it to out/memory.json, and end the run where memory or positions are too few.

    models {role: LM}, the policy first; the largest backward pass is over rows x length tokens, of which the
    log-softmax sees rows x sampled; decode: rows and length of the rollout's KV cache.
    """
    policy = next(iter(models.values()))
    check_context(policy, decode[1], "--max-prompt-length and --max-new-tokens")
    check_context(policy, length, "--max-length")

    # Weights, gradients, optimizer states: whole or sharded over the ranks
    about = {}
    gradients = optimizer = per_token = 0
    for role, model in models.items():
        weights = list(model.parameters())
        trained = [p for p in weights if p.requires_grad]
        about[role] = dict(parameters=sum(p.numel() for p in weights), bytes=sum(p.nbytes for p in weights),
                           trainable=sum(p.numel() for p in trained))
        for p in trained:                               # two moments, and fp32 weights unless its own are
            gradients += p.nbytes
            optimizer += p.numel() * (8 if p.element_size() == 4 and not args.zero else 12)
        per_token = max(per_token, activation_bytes(model) if trained else 0)
    held = sum(model["bytes"] for model in about.values())
    shards = [world() if args.zero >= stage else 1 for stage in range(4)]
    plan = {"weights": held / shards[3], "gradients": gradients / shards[2]}
    plan["optimizer"] = 0 if args.offload and CUDA else optimizer / shards[1]
    if args.zero == 3 and decode[0]:
        plan["a copy of the policy to decode with"] = next(iter(about.values()))["bytes"]

    # The update's activations and logits, or the rollout's KV cache and logits
    config = policy.lm.config.get_text_config(decoder=True)
    element = next(policy.parameters()).element_size()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache = 2 * config.num_hidden_layers * heads * width * element                  # bytes per token
    rollout = decode[0] * (decode[1] * cache + config.vocab_size * 12)
    if decode[0] and not getattr(args, "gradient_checkpointing", False):            # graphs.merged
        rollout += sum(layer.base.weight.nbytes for layer in policy.lora_layers())
    always = sum(plan.values())

    def step(rows):
        """The larger one of an update with so many rows per pass and the rollout."""
        logits = min(CHUNK, rows * sampled) * config.vocab_size * (4 + element)
        return max(rows * length * per_token + logits, rollout)

    plan["activations, or KV cache of the rollout"] = step(rows)
    total = sum(plan.values())
    free = psutil.virtual_memory().available + held
    if CUDA:
        free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_allocated()
    MB = 2**20
    if rank() == 0:
        for role, model in about.items():
            print(f"{role}: {model['parameters']:,} parameters, {model['trainable']:,} of them trained")
        for what, size in [*plan.items(), (f"together, of {free / MB:,.0f} MB that are free", total)]:
            print(f"{what:<52}{size / MB:>11,.0f} MB")
    found = dict(plan=plan, total=total, free=free, models=about)
    write_json(os.path.join(out, "memory.json"), found)
    if all_max(int(total > free)):
        fewer = [fit for fit in range(rows - 1, 0, -1) if always + step(fit) <= free]
        passes = f"{fewer[0]} rows per pass, which would fit" if fewer else "fewer rows per pass"
        die(f"needs {total / MB:,.0f} MB and {free / MB:,.0f} MB are free; try {passes} (lower "
            "--mini-batch-size, higher --grad-accum), --lora (dvpo.py), --zero 3, --offload or "
            "--gradient-checkpointing")


def context_length(config):
    """Tokens that a model can hold; 2^30 where its configuration names no limit.

    Some rotary embeddings (longrope, dynamic NTK) depend on the longest row once they are beyond the length
    of the pretraining: a row's log-probs would then depend on its batch. For them that length is the limit.
    """
    config = config.get_text_config(decoder=True)
    context = getattr(config, "max_position_embeddings", None) or 1 << 30
    rope = getattr(config, "rope_parameters", None) or {}
    by_layer_type = [part for part in rope.values() if isinstance(part, dict)]
    for part in [rope, *by_layer_type]:
        if part.get("rope_type") in ("longrope", "dynamic"):
            original = part.get("original_max_position_embeddings")
            original = original or getattr(config, "original_max_position_embeddings", None)
            context = min(context, original or context)
    return context


def positions(path):
    """The context length of the model in a local folder; 2^30 where there is no model."""
    with contextlib.suppress(OSError, ValueError):
        if os.path.isdir(path):
            return context_length(AutoConfig.from_pretrained(path))
    return 1 << 30


def check_context(model, tokens, flags):
    """Refuse what the positions of the model cannot hold."""
    context = context_length(model.lm.config)
    if tokens > context:
        die(f"{flags} need {tokens} positions and the model has {context}; lower one of them")


def activation_bytes(model):
    """Bytes that a backward pass keeps per token, measured on one short row."""
    ids = torch.zeros(1, 16, dtype=torch.long, device=next(model.parameters()).device)
    weights = {p.data_ptr() for p in model.parameters()}
    training = model.training
    kept = {}                                           # address: bytes

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    model.switch(list(model.adapters)[-1] if model.adapters else None)             # the one that is trained
    model.train()                                       # --gradient-checkpointing works in train mode only
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = model.hidden(ids, torch.ones_like(ids), 15)
    del out                                             # kept until here, so that no address is used twice
    model.train(training)
    return sum(size for address, size in kept.items() if address not in weights) / ids.numel()
