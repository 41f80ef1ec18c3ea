"""Presets and flags: hyper-parameters of the paper and of each model, and the flags that all stages share.

Open this file to add a model, or to change a default. Flags of one stage stand in that stage.
"""
import argparse
import math
import os

from runtime.processes import CUDA, die

DS_CONFIG = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "ds_config.json")

# Appendix A's hyper-parameters where it gives them. Ours are the GVM's lr (at the paper's 2e-6
# its values stay near 0) and max_length, and in RL kl_target, max_steps and advantage. An update of RL has
# the paper's 2 x 2 rows in one pass, with half the kernel launches
PAPER = {
    "sft": dict(lr=2e-5, batch_size=16, epochs=3, warmup_steps=2, max_length=1024,
                max_new_tokens=1024, grad_accum=8, save_every=500),
    "gvm": dict(lr=1e-4, batch_size=32, epochs=1, max_length=2048, tau_pairs=3, tau_length=128,
                lora_rank=8, lora_alpha=32, lora_dropout=0.1, grad_accum=16, save_every=500),
    "rm": dict(rm_lr=2e-5, rm_batch_size=4, rm_epochs=2, max_length=1024, lora_rank=8,
               lora_alpha=32, lora_dropout=0.1),
    "rl": dict(lr=2e-6, critic_lr=2e-6, batch_size=8, mini_batch_size=4, ppo_epochs=4, grad_accum=1,
               kl_coef=0.2, kl_target=6.0, max_new_tokens=1024, max_prompt_length=512,
               max_steps=1000, save_every=100, advantage="delta", temperature=1.0),
    # comparators/, over rl
    "grpo": dict(kl_coef=0.04), "remax": {},
}
# What the toy needs instead
TINY = {
    "sft": dict(lr=4e-3, batch_size=32, epochs=12, max_length=256, max_new_tokens=32, grad_accum=1),
    "gvm": dict(lr=3e-3, batch_size=21, epochs=1.5, max_length=256, tau_pairs=2, lora_rank=32,
                lora_dropout=0.0, grad_accum=1),
    "rm": dict(rm_lr=5e-3, rm_batch_size=64, rm_epochs=3, max_length=256, lora_rank=32,
               lora_dropout=0.0),
    "rl": dict(lr=3e-4, critic_lr=1e-3, batch_size=64, mini_batch_size=32, grad_accum=1, kl_coef=0.1,
               kl_target=1.2, max_prompt_length=64, max_new_tokens=32, max_steps=100),
    "grpo": dict(kl_coef=0.3), "remax": dict(lr=3e-3, kl_coef=0.05),
}
# Settings that learn within an hour on two cores: data/smollm2.py
SMOLLM2 = {
    "gvm": dict(lr=1e-3, batch_size=8, max_length=400, tau_pairs=2, tau_length=32, lora_rank=16,
                lora_dropout=0.0, grad_accum=1, save_every=50),
    "rm": dict(rm_lr=1e-3, rm_batch_size=16, rm_epochs=1, max_length=128, lora_rank=16,
               lora_dropout=0.0),
    "rl": dict(lr=2e-5, critic_lr=2e-5, batch_size=32, mini_batch_size=8, grad_accum=1, ppo_epochs=1,
               max_prompt_length=64, max_new_tokens=32, max_steps=30, save_every=10, temperature=0.8),
}
# One line per model; any other hub id or folder has the paper's settings at ZeRO-1
PRESETS = {
    "tiny": dict(id="data/toy/model", data="data/toy", zero=0, stages=TINY,
                 reward="data/toy.py:gold_reward", true_q="data/toy.py:true_q"),
    "smollm2": dict(id="data/smollm2/model", start="data/smollm2/model", data="data/smollm2", zero=0,
                    stages=SMOLLM2, reward="data/smollm2.py:sentiment"),
    "smollm2-360m": dict(id="HuggingFaceTB/SmolLM2-360M-Instruct"),
    "smollm2-1.7b": dict(id="HuggingFaceTB/SmolLM2-1.7B-Instruct"),
    "qwen3-0.6b": dict(id="Qwen/Qwen3-0.6B"),
    "qwen3-1.7b": dict(id="Qwen/Qwen3-1.7B"),
    "llama3-1b": dict(id="unsloth/Llama-3.2-1B-Instruct"),              # Meta's weights, ungated
    "gpt2": dict(id="gpt2", stages=dict(sft=dict(max_new_tokens=512),   # 1,024 positions
        gvm=dict(max_length=1024), rl=dict(max_prompt_length=256, max_new_tokens=512))),
    "llama3-3b": dict(id="meta-llama/Llama-3.2-3B"),
    "llama3-8b": dict(id="meta-llama/Meta-Llama-3-8B", zero=3),
    "mistral-7b": dict(id="mistralai/Mistral-7B-Instruct-v0.2", zero=3),
}
# Flags that must be above 0; any other number may be 0, too
POSITIVE = ("max_new_tokens max_prompt_length ppo_epochs epochs max_length tau_length lora_rank "
            "save_every max_steps rm_max_steps rm_batch_size rm_epochs temperature batch_size "
            "mini_batch_size grad_accum").split()


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


def flags(doc, argv, *stages):
    """-> a parser with the flags that all stages share, and the defaults of argv's --model."""
    # No abbreviations: ppo_baseline.py looks for the full names on the command line
    p = argparse.ArgumentParser(
        description=doc, formatter_class=Help, add_help=False, allow_abbrev=False)
    flag = p.add_argument
    presets = ", ".join(PRESETS)
    flag("--model", default="tiny", help=f"preset ({presets}), hub id or local folder")
    model = p.parse_known_args(argv)[0].model           # before --help, which shows its defaults
    out = f"out/{os.path.basename(os.path.normpath(model))}"
    # Stages after SFT begin at `start`
    preset = dict(id=model, start=f"{out}/sft/model", data="data/ultrafeedback", zero=1, stages={},
                  reward=None, true_q=None)
    d = argparse.Namespace(out=out, cuda=CUDA, **(preset | PRESETS.get(model, {})))
    for stage in stages:
        vars(d).update(PAPER[stage] | d.stages.get(stage, {}))

    flag("-h", "--help", action="help", help="show this and end")
    flag("--seed", type=int, default=1, help="seed of shuffling and sampling")
    flag("--zero", type=int, choices=range(4), default=d.zero, help="ZeRO stage (paper: 1; 8B: 3)")
    flag("--save-every", type=int, default=d.save_every, help="steps between checkpoints")
    flag("--resume", action="store_true", help="continue from the last checkpoint in --out")
    flag("--offload", action="store_true", help="optimizer states in CPU memory (ZeRO 1 to 3)")
    flag("--gradient-checkpointing", action="store_true", help="less memory, a third slower")
    flag("--compile", action="store_true",
         help="compile the blocks: faster steps after a slow first one (ZeRO 0 to 2)")
    flag("--dtype", choices=("auto", "fp32", "bf16"), default="auto", help="auto: bf16 on CUDA")
    flag("--ds-config", default=DS_CONFIG, help="DeepSpeed's settings")
    flag("--dry-run", action="store_true", help="one step: print its memory and batch, save nothing")
    flag("--local_rank", type=int, default=0, help=argparse.SUPPRESS)       # from the launcher
    return p, d


def parse(p, argv):
    """The arguments, after the checks that need nothing else: numbers in range, batches that divide."""
    args = p.parse_args(argv)
    for name, value in vars(args).items():
        is_number = type(value) in (int, float)
        must_be_positive = name in POSITIVE
        if is_number and (not 0 <= value < math.inf or (must_be_positive and value == 0)):
            least = "above 0" if must_be_positive else "0 or above"
            die(f"--{name.replace('_', '-')} {value}: must be a number {least}")
    rows = getattr(args, "mini_batch_size", 1) * args.grad_accum
    if args.batch_size % rows:
        die(f"--batch-size {args.batch_size}: must be a multiple of {rows}: --grad-accum, "
            "--mini-batch-size")
    if args.offload and not args.zero:
        die("--offload: needs --zero 1, 2 or 3")
    if args.compile and (args.zero == 3 or args.gradient_checkpointing):
        # ZeRO-3's hooks run inside a block; torch cannot compile a recomputation that switches adapters
        die("--compile: not with --zero 3 or --gradient-checkpointing")
    if args.dry_run:                                    # leaves what is in --out as it is
        args.out = os.path.join(args.out, "dry_run")
    return args


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


def check_context(model, tokens):
    """Refuse rows that the positions of the model cannot hold."""
    context = context_length(model.lm.config)
    if tokens > context:
        die(f"rows of {tokens} tokens and a model of {context} positions: lower --max-length, "
            "--max-prompt-length or --max-new-tokens")
