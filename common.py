"""Plumbing that every stage shares, and nothing of the algorithm: flags, processes, models, data, checkpoints, metrics.

One frame for every tensor. B rows, P prompt tokens (left-padded), T response tokens (right-padded), V vocabulary:

    position   0 .. P-1   P    P+1  ...  P+T-1
    token      prompt     a_0  a_1  ...  a_{T-1}       (the last one may be <eos>; it counts)

Whatever leaves a forward pass is brought at once into the response frame, (B, T) or (B, T+1), and stays there. `attn` (B, P+T)
is 1 on real tokens, `mask` (B, T) is True from a_0 up to and including the first <eos>; both are built from lengths, never
from `ids != pad`.
"""
import argparse
import array
import atexit
import contextlib
import copy
import functools
import gc
import gzip
import hashlib
import importlib.util
import itertools
import json
import math
import os
import re
import resource
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
import zlib

import torch

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

import deepspeed
import numpy as np
import psutil
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache, StaticCache
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as hf_logging

deepspeed.utils.logger.setLevel("WARNING")
hf_logging.set_verbosity_error()
hf_logging.disable_progress_bar()

HERE = os.path.dirname(os.path.abspath(__file__))
RANKS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")       # what launchers set

# ---------------------------------------------------------------------------------------------------------------------
# Presets. PAPER holds appendix A's hyper-parameters, TINY what the embedded world needs instead; one line a model.

PAPER = {
    "sft": dict(lr=2e-5, batch_size=16, epochs=3, warmup_steps=2, max_length=1024, max_new_tokens=1024, grad_accum=8, save_every=500),
    "gvm": dict(lr=2e-6, batch_size=32, epochs=1, max_length=1024, tau_pairs=3, tau_length=128, lora_rank=8, lora_alpha=32, lora_dropout=0.1,
                grad_accum=16, save_every=500),
    "rm": dict(rm_lr=2e-5, rm_batch_size=4, rm_epochs=2, max_length=1024, lora_rank=8, lora_alpha=32, lora_dropout=0.1),
    "rl": dict(lr=2e-6, critic_lr=2e-6, batch_size=8, mini_batch_size=2, ppo_epochs=4, grad_accum=2, max_new_tokens=1024,
               max_prompt_length=512, max_steps=1000, kl_coef=0.2, kl_target=6.0, save_every=100, advantage="delta"),
}
TINY = {
    "sft": dict(lr=4e-3, batch_size=32, epochs=12, max_length=256, max_new_tokens=32, grad_accum=1),
    "gvm": dict(lr=3e-3, batch_size=64, epochs=9, max_length=256, tau_pairs=2, lora_rank=32, lora_alpha=32, lora_dropout=0.0,
                grad_accum=1),
    "rm": dict(rm_lr=5e-3, rm_batch_size=64, rm_epochs=3, max_length=256, lora_rank=32, lora_alpha=32, lora_dropout=0.0),
    "rl": dict(lr=3e-4, critic_lr=1e-3, batch_size=64, mini_batch_size=32, grad_accum=1, max_prompt_length=128, max_new_tokens=32, max_steps=100,
               kl_coef=0.1),
}
PRESETS = {
    "tiny": dict(id="data/toy/model", data="data/toy", zero=0, stages=TINY,
                 reward="data/toy.py:gold_reward", true_q="data/toy.py:true_q"),
    "gpt2": dict(id="gpt2", zero=1, stages=dict(rl=dict(max_new_tokens=512))),          # 1,024 positions
    "llama3-3b": dict(id="meta-llama/Llama-3.2-3B", zero=1),
    "llama3-8b": dict(id="meta-llama/Meta-Llama-3-8B", zero=3),
    "mistral-7b": dict(id="mistralai/Mistral-7B-Instruct-v0.2", zero=3),
}


def defaults(model, *stages):
    """Every default of the chosen model and stages, as attributes; an unlisted hub id or local folder is its own preset."""
    name = os.path.basename(os.path.normpath(model))
    chosen = dict(id=model, data="data/ultrafeedback", zero=1, stages={}, reward=None, true_q=None) | PRESETS.get(model, {})
    values = dict(name=name, out=f"out/{name}") | chosen
    for stage in stages:
        values |= PAPER[stage] | chosen["stages"].get(stage, {})
    return argparse.Namespace(**values)


# ---------------------------------------------------------------------------------------------------------------------
# Flags and errors


def die(message, everywhere=False):
    """End with one line on stderr, what is wrong and how to mend it, and exit code 2; `everywhere`: also where rank 0 may not see it."""
    if everywhere or int(os.environ.get("RANK", 0)) == 0:
        tqdm.write(f"error: {message}", file=sys.stderr)       # on a line of its own, whatever bar is up
    raise SystemExit(2)


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


def flags(doc, argv, *stages):
    """Parser with the flags that every stage has, and the defaults of the `--model` that argv names.

    `--help` therefore shows the defaults of the model on the same line.
    """
    p = argparse.ArgumentParser(description=doc, formatter_class=Help)
    p.add_argument("--model", default="tiny", help=f"preset ({', '.join(PRESETS)}), hub id or local folder")
    d = defaults(p.parse_known_args([a for a in (sys.argv[1:] if argv is None else argv) if a not in ("-h", "--help")])[0].model, *stages)
    p.add_argument("--seed", type=int, default=1, help="seed of shuffling and sampling")
    p.add_argument("--zero", type=int, choices=range(4), default=d.zero, help="ZeRO stage (paper: 1 for 3B, 3 for 8B)")
    p.add_argument("--save-every", type=int, default=d.save_every, help="write a checkpoint to go on from every so many steps, and on SIGTERM and Ctrl-C")
    p.add_argument("--resume", action="store_true", help="go on from the last whole checkpoint in --out, where there is one")
    p.add_argument("--offload", action="store_true", help="keep the optimizer's states in CPU memory: slower, 12 bytes a trainable parameter less on the GPU (ZeRO 1 to 3)")
    p.add_argument("--gradient-checkpointing", action="store_true", help="keep each block's input only and compute the rest again in the backward pass: a third slower, far less memory")
    p.add_argument("--ds-config", default=os.path.join(HERE, "ds_config.json"), help="DeepSpeed's own settings")
    p.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)     # the deepspeed launcher adds it
    return p, d


def parse(p, argv):
    args = p.parse_args(argv)
    for a in p._actions:
        value = getattr(args, a.dest, None)
        if type(value) in (int, float) and (value < 0 or not math.isfinite(value)):
            die(f"{a.option_strings[0]} {value}: must be a number that is not negative")
    return args


def check_sizes(args):
    """Sizes that must fit each other; called by every stage before anything is loaded."""
    rows = getattr(args, "mini_batch_size", 1) * args.grad_accum
    if not rows or not args.batch_size or args.batch_size % rows:
        rule = "--mini-batch-size x --grad-accum" if hasattr(args, "mini_batch_size") else "--grad-accum"
        die(f"--batch-size {args.batch_size}: must be a multiple, not 0, of {rule} = {rows}")
    for name in ("save_every", "max_new_tokens", "max_prompt_length", "ppo_epochs", "kl_target", "epochs", "max_length", "lora_rank", "rm_batch_size", "rm_epochs", "max_steps",
                 "rm_max_steps"):
        if getattr(args, name, None) == 0:
            die(f"--{name.replace('_', '-')} 0: must be above 0")
    if args.offload and not args.zero:
        die("--offload: needs --zero 1, 2 or 3")
    if not getattr(args, "temperature", 1):
        die("--temperature 0: log-probs need a temperature above 0; 1 samples from the model as it is")


def load_function(spec):
    """`FILE.py:function` -> the function; None, or "", is none. What it raises ends the run in one line; a KeyError is the caller's ("not known")."""
    if not spec:
        return None
    path, _, name = spec.rpartition(":")
    if not path or not os.path.isfile(path):
        die(f"{spec}: no such file; give FILE.py:function")
    module_spec = importlib.util.spec_from_file_location(os.path.basename(path)[:-3], path)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    if not hasattr(module, name):
        die(f"{spec}: {path} has no function {name!r}")
    function = getattr(module, name)

    def call(*values):
        try:
            return function(*values)
        except KeyError:
            raise
        except Exception as e:
            line = next((f.lineno for f in reversed(traceback.extract_tb(e.__traceback__)) if os.path.basename(f.filename) == os.path.basename(path)), "?")
            die(f"{spec}: {type(e).__name__} in line {line}: {str(e)[:200]}; mend it, or name another function, or none with ''", everywhere=True)

    return call


# ---------------------------------------------------------------------------------------------------------------------
# Processes: plain python, torchrun and the deepspeed launcher, CPU and CUDA, with no change to the code


def start(args):
    """Join the process group, seed everything (each rank differently), make `args.out`; returns the device."""
    if "RANK" not in os.environ:                        # plain python: a world of one, on a port that is free now
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        os.environ |= dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
        torch.backends.cuda.enable_cudnn_sdp(False)      # it plans anew for every shape it meets, and here lengths change all the time
    if not dist.is_initialized():
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False      # gloo serves; this op would be compiled at the first start
        try:
            deepspeed.init_distributed("nccl" if cuda else "gloo", verbose=False)
        except dist.DistNetworkError as e:
            die(f"the processes cannot meet at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} ({str(e).splitlines()[0][:120]}); give the launcher another --master_port", everywhere=True)
    seed(args)
    try:
        os.makedirs(args.out, exist_ok=True)
        with tempfile.TemporaryFile(dir=args.out):
            pass
    except OSError as e:
        die(f"--out {args.out}: cannot be written to ({e.strerror}); name another folder", everywhere=True)
    write_json(os.path.join(args.out, "run.json"), vars(args) | dict(world_size=world(), device=str(device)))
    return device


def seed(args):
    """Every rank its own random numbers; again before the loop, so that what the set-up drew does not matter."""
    torch.manual_seed(args.seed * 1000 + rank())


def finish(code=0):
    """End the process, all ranks together, and without more of Python's own shutdown than atexit (wandb's, say); does not return.

    DeepSpeed holds on to its process groups, so that gloo's threads outlive destroy_process_group. One of them that frees a tensor while Python shuts
    down aborts the process (pytorch issue 190489): a 2-rank run whose work was all on disk was called failed by its launcher.
    """
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    atexit._run_exitfuncs()
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


class AllSum(torch.autograd.Function):
    """Sum over all ranks, through which gradients flow: every rank's loss depends on every rank's input."""

    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        if world() > 1:
            dist.all_reduce(x)
        return x

    backward = staticmethod(lambda ctx, grad: AllSum.forward(ctx, grad))


def all_sum(x):
    return AllSum.apply(x)


def all_max(n):
    """Maximum of a Python int over all ranks."""
    if world() == 1:
        return n
    n = torch.tensor(n, device="cuda" if torch.cuda.is_available() else "cpu")
    dist.all_reduce(n, dist.ReduceOp.MAX)
    return int(n)


def masked_moments(x, mask):
    """Mean and standard deviation of x where mask, over all ranks, in fp32; x, mask of one shape -> two scalars."""
    x = x.float()
    n = all_sum(mask.sum().float())
    mean = all_sum((x * mask).sum()) / n
    var = all_sum(((x - mean) ** 2 * mask).sum()) / n
    return mean, var.clamp(min=1e-12).sqrt()


# ---------------------------------------------------------------------------------------------------------------------
# Models: a causal LM, LoRA adapters by name, scalar heads by name


class LoRA(nn.Module):
    """y = base(x) + alpha/r B A dropout(x), with several named adapters of which at most one is on (arXiv 2106.09685).

    With all of them off the output is the base layer's, bit for bit.
    """

    def __init__(self, base):
        super().__init__()
        self.base, self.active = base, None
        self.A, self.B, self.scale, self.dropout = nn.ModuleDict(), nn.ModuleDict(), {}, {}

    def add(self, name, r, alpha, dropout):
        w = self.base.weight
        d_in, d_out = w.shape if isinstance(self.base, Conv1D) else w.shape[::-1]
        self.A[name] = nn.Linear(d_in, r, bias=False, dtype=w.dtype, device=w.device)
        self.B[name] = nn.Linear(r, d_out, bias=False, dtype=w.dtype, device=w.device)
        nn.init.kaiming_uniform_(self.A[name].weight, a=math.sqrt(5))
        nn.init.zeros_(self.B[name].weight)             # the adapted model starts as the base model
        self.scale[name], self.dropout[name] = alpha / r, dropout

    def forward(self, x):
        y, name = self.base(x), self.active
        if name is None:
            return y
        return torch.add(y, self.B[name](self.A[name](F.dropout(x, self.dropout[name], self.training))), alpha=self.scale[name])

    def delta(self, name):
        """What the adapter adds to the base weight, in that weight's own layout."""
        d = self.scale[name] * self.B[name].weight.float() @ self.A[name].weight.float()
        return d.T if isinstance(self.base, Conv1D) else d


class Head(nn.Linear):
    """Scalar head that computes in fp32 whatever its weights' dtype: bf16 would round away the steps of Q from token to token."""

    def forward(self, h):
        return F.linear(h.float(), self.weight.float(), self.bias.float())


class LM(nn.Module):
    """A transformers causal LM in the frame of this file, with named adapters and named scalar heads."""

    def __init__(self, lm):
        super().__init__()
        self.lm, self.heads, self.adapters, self.fingerprint = lm, nn.ModuleDict(), {}, fingerprint(lm)

    def checkpoint_blocks(self):
        """--gradient-checkpointing; in train() mode only."""
        self.lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=False))

    def add_adapter(self, name, r, alpha, dropout=0.0, trainable=True):
        """LoRA on every linear projection of the blocks, Conv1D (GPT-2) included, whatever the architecture."""
        for path, layer in list(self.lm.base_model.named_modules()):
            if isinstance(layer, (nn.Linear, Conv1D)) and not re.search(r"\.(base|[AB]\.\w+)$", path):
                self.lm.base_model.set_submodule(path, LoRA(layer))
        for layer in self.lora_layers():
            layer.add(name, r, alpha, dropout)
        self.adapters[name] = dict(r=r, alpha=alpha, dropout=dropout)
        for key, p in self.named_parameters():
            if f".A.{name}." in key or f".B.{name}." in key:
                p.requires_grad_(trainable)

    def lora_layers(self):
        return [m for m in self.modules() if isinstance(m, LoRA)]

    def switch(self, name=None):
        """The one switch: this adapter on and every other one off; None for the bare trunk."""
        for layer in self.lora_layers():
            layer.active = name

    def add_head(self, name):
        """A scalar head on the last hidden state, zero at first."""
        w = self.lm.get_input_embeddings().weight
        self.heads[name] = Head(w.shape[1], 1, dtype=w.dtype, device=w.device)
        nn.init.zeros_(self.heads[name].weight)
        nn.init.zeros_(self.heads[name].bias)

    def merged_state_dict(self, adapter=None, keep=True):
        """State dict of the plain transformers model, on the CPU, with one adapter merged into its weights.

        A weight at a time is whole on the GPU, so all ranks must enter; without `keep` a rank only takes part in that.
        """
        out, copies, layers = {}, {}, {f"{path}.base.weight": layer for path, layer in self.lm.named_modules() if isinstance(layer, LoRA)}
        for key, p in self.lm.state_dict(keep_vars=True).items():
            if re.search(r"\.[AB]\.\w+\.weight$", key):
                continue
            layer = layers.get(key) if adapter else None
            with gathered([p, *((layer.A[adapter].weight, layer.B[adapter].weight) if layer else ())]), torch.no_grad():
                if keep:
                    w = p if layer is None else (p.float() + layer.delta(adapter)).to(p.dtype)
                    out[key.replace(".base.", ".")] = copies.setdefault(id(p), w.detach().to("cpu", copy=hasattr(p, "ds_id")))     # tied weights stay one
        return out

    def hidden(self, ids, attn, T, cache=None):
        """Last hidden states at the last prompt token and at each response token: (B, P+T) -> (B, T+1, D).

        Rows are moved left against the wall first, so that causal attention alone hides the padding: no mask, the fast
        attention kernel, and positions that count from 0. A cache (B rows) stands in front of them, and grows by them.
        """
        (B, L), left, length = ids.shape, attn.argmax(1, keepdim=True), int(attn.sum(1).max())
        positions = torch.arange(length, device=ids.device)
        ids = ids.gather(1, (positions + left).clamp(max=L - 1))
        h = self.lm.base_model(input_ids=ids, past_key_values=cache, use_cache=cache is not None).last_hidden_state
        at = (torch.arange(L - T - 1, L, device=ids.device) - left).clamp(max=length - 1)
        return h.gather(1, at[..., None].expand(-1, -1, h.shape[-1]))

    def forward(self, ids, attn, T, adapter=None, head=None, temperature=1.0, cache=None):
        """Without `head`: log-probs of the response tokens, (B, T). With it: its scalar at each of the T+1 states, (B, T+1).

        Both fp32. Entry t of the log-probs is read BEFORE a_t, and is 0 behind the end of the response; entry 0 of the scalars
        stands at the last prompt token, entry t+1 AFTER a_t.
        """
        self.switch(adapter)
        h = self.hidden(ids, attn, T, cache)
        if head is not None:
            return self.heads[head](h).squeeze(-1)
        real = attn[:, -T:].flatten().nonzero().squeeze(1)                 # the head, the widest product of all, sees no padding
        logp = token_logp(h[:, :-1].flatten(0, 1)[real], ids[:, -T:].flatten()[real], self.lm.get_output_embeddings(), temperature)
        return logp.new_zeros(len(ids) * T).index_copy(0, real, logp).view(-1, T)


CHUNK = 1024                                             # positions whose logits exist at one time


class TokenLogp(torch.autograd.Function):
    """log softmax(logits / temperature)[targets], fp32: (N, V), (N,) -> (N,).

    The logits are the largest tensor of all. They are kept once for the backward pass, in their own dtype, and become their
    gradient in their own place.
    """

    @staticmethod
    def forward(ctx, logits, targets, temperature):
        x = logits.float() if temperature == 1 else logits.float() / temperature
        lse = x.logsumexp(-1)
        ctx.save_for_backward(logits, targets, lse)
        ctx.temperature = temperature
        return x.gather(-1, targets[:, None]).squeeze(-1) - lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        logits, targets, lse = ctx.saved_tensors
        grad = grad[:, None] / ctx.temperature
        p = logits.float().div_(ctx.temperature).sub_(lse[:, None]).exp_().mul_(-grad)         # fp32 logits: in place
        return logits.copy_(p.scatter_add_(1, targets[:, None], grad)).detach(), None, None


def token_logp(hidden, targets, lm_head, temperature=1.0):
    """log softmax(lm_head(hidden) / temperature)[targets] in fp32: (N, D), (N,) -> (N,).

    In chunks of at most CHUNK positions under activation checkpointing: the (N, V) logits never exist at once, forward or
    backward. A single chunk is kept for the backward pass instead: it would be there again anyway.
    """
    def part(h, y):
        return TokenLogp.apply(lm_head(h), y, temperature)

    n = max(1, -(-len(targets) // CHUNK))
    if hasattr(lm_head.weight, "ds_id"):                 # ZeRO-3 gathers the head at each call: every rank makes equally many
        n = all_max(n)
    pieces = zip(hidden.tensor_split(n), targets.tensor_split(n))
    return torch.cat([checkpoint(part, h, y, use_reentrant=False) if torch.is_grad_enabled() and n > 1 else part(h, y) for h, y in pieces])


def read_prefix(model, prefix, adapter, head, device):
    """Read once what stands in front of many rows: ids -> rows(n), which gives the cache of n such rows for `LM.forward`.

    Every rank runs the forward, also one whose prefix is empty, or ZeRO-3 would hang.
    """
    cache = DynamicCache() if all_max(len(prefix)) else None
    if cache is not None:
        ids = torch.tensor([prefix or [0]], device=device)
        model(ids, torch.ones_like(ids), 0, adapter, head=head, cache=cache)

    def rows(n):
        if not prefix:
            return None
        mine = DynamicCache()                            # a forward appends to its cache, and only then copies what it holds
        for layer in cache.layers:
            mine.layers.append(copy.copy(layer))
            mine.layers[-1].keys, mine.layers[-1].values = (x.expand(n, -1, -1, -1) for x in (layer.keys, layer.values))
        return mine

    return rows


class Decoder:
    """The one-token step of a rollout, with its KV cache.

    decode = Decoder(model, ids, attn)      ids, attn (B, P), left-padded
    decode.logits                           (B, V) fp32, for the next token
    decode(token)                           token (B,): append it; the logits move on
    """

    def __init__(self, model, ids, attn, adapter=None):
        model.switch(adapter)
        self.trunk, self.head, self.cache = model.lm.base_model, model.lm.get_output_embeddings(), DynamicCache()
        self.mask = None if attn.all() else attn         # prompts of one length need no mask
        self.positions = (attn.cumsum(1) - 1).clamp(min=0)
        self.logits = self.step(ids)

    def step(self, ids):
        out = self.trunk(input_ids=ids, attention_mask=self.mask, position_ids=self.positions, past_key_values=self.cache, use_cache=True)
        return self.head(out.last_hidden_state[:, -1]).float()

    def __call__(self, token):
        self.mask = None if self.mask is None else F.pad(self.mask, (0, 1), value=1)
        self.positions = self.positions[:, -1:] + 1
        self.logits = self.step(token[:, None])


class StaticDecoder(Decoder):
    """--static-cache: the same in memory that never moves, `new` tokens long from the start: CUDA can record the step and replay it as one graph.

    Without a graph the host launches every kernel of every layer for every token, and the GPU waits for it (28 layers: 11.5 to
    13 ms a token, gpt-fast). It is recorded anew for each rollout, which costs two steps of a thousand, and nothing of it
    outlives the rollout: neither the cache, which the update has better use for, nor addresses of weights.
    """

    side = None                                          # one CUDA stream for all graphs: cuBLAS keeps a workspace for each that it sees

    def __init__(self, model, ids, attn, adapter, new):
        super().__init__(model, ids, attn, adapter)      # reads the prompts
        config, length, prompts = model.lm.config, -(-(ids.shape[1] + new) // 64) * 64, self.cache
        self.cache = StaticCache(config=config, max_cache_len=length)
        if config._attn_implementation != "sdpa" or any(self.cache.is_sliding) or re.search("dynamic|longrope", str(getattr(config, "rope_parameters", ""))):
            die("--static-cache: made for scaled_dot_product_attention over all tokens, and positions that do not depend on the length; this architecture has another: leave the flag out")
        for i, layer in enumerate(prompts.layers):
            self.cache.update(layer.keys, layer.values, i)
            layer.keys = layer.values = None             # never both whole
        self.mask = F.pad(attn.bool(), (0, length - ids.shape[1]))[:, None, None]      # (B, 1, 1, length)
        self.at, self.positions, self.token, self.graph = torch.tensor([ids.shape[1]], device=ids.device), self.positions[:, -1:].clone(), ids[:, -1:].clone(), None

    def append(self):
        """Appends self.token. All in place and without the host: what a graph can hold."""
        self.mask.index_fill_(3, self.at, True)
        self.at += 1
        self.positions += 1
        self.logits.copy_(self.step(self.token))

    def __call__(self, token):
        self.token.copy_(token[:, None])
        if self.graph:
            self.graph.replay()
        elif not token.is_cuda:
            self.append()
        else:                                            # once as it is, on the stream that records: warms up the libraries; then recorded, which computes nothing
            StaticDecoder.side = self.side or torch.cuda.Stream()
            self.side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.side):
                self.append()
            torch.cuda.current_stream().wait_stream(self.side)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=self.side, capture_error_mode="thread_local"):      # NCCL's watchdog may go on meanwhile
                self.append()


def load_model(path, trainable=True):
    """A causal LM from a transformers folder or hub id, bf16 on CUDA, fp32 on CPU, with every dropout at 0."""
    try:
        config = AutoConfig.from_pretrained(path)
        for key, value in vars(config).items():          # rollouts and updates must see one and the same policy
            if "drop" in key and isinstance(value, float):
                setattr(config, key, 0.0)
        if getattr(config, "activation_function", None) == "gelu_new":        # GPT-2's: eight operations, each kept for the backward pass; torch has the same as one
            config.activation_function = "gelu_pytorch_tanh"
        lm = AutoModelForCausalLM.from_pretrained(path, config=config, use_safetensors=True,
                                                  dtype=torch.bfloat16 if torch.cuda.is_available() else torch.float32)
    except (OSError, ValueError, SafetensorError) as e:
        die(missing_model(path, e))
    model = LM(lm.requires_grad_(trainable)).to("cuda" if torch.cuda.is_available() else "cpu")
    check_logits(model, path)
    return model


@torch.no_grad()
def check_logits(model, path):
    """Refuse an architecture that caps or scales its logits after the head: compare one short row with what the model itself says."""
    ids = torch.arange(1, 17, device=next(model.parameters()).device)[None] % model.lm.config.get_text_config().vocab_size
    own = model.lm(input_ids=ids).logits[:, :-1].float().log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    if (own - model(ids, torch.ones_like(ids), 15)).abs().max() > 0.05 * own.abs().max():         # bf16 rounds
        die(f"{path}: this architecture changes the logits after its head (a soft cap, a scale), which token_logp in common.py does not; add it there first")


def check_context(model, tokens, flags):
    """Refuse what the positions of the model cannot hold."""
    context = getattr(model.lm.config, "max_position_embeddings", None)
    if context and tokens > context:
        die(f"{flags} need {tokens} positions and the model has {context}; lower one of them")


def missing_model(path, error):
    if path.startswith("out") or path.startswith("data"):
        stage = {"sft": "sft.py", "gvm": "train_gvm.py", "dvpo": "dvpo.py", "ppo": "ppo_baseline.py"}
        parts = os.path.normpath(path).split(os.sep)
        model = f" --model {parts[1]}" if parts[0] == "out" and len(parts) == 4 and parts[1] != "tiny" else ""
        return f"{path}: no model there; make it with: python {stage.get(parts[-2], 'data/toy.py')}{model}"
    if os.path.isdir(path):
        return f"{path}: not a transformers folder with safetensors weights ({str(error).splitlines()[0]})"
    return (f"{path}: neither a local folder nor reachable on the Hugging Face hub; log in with `hf auth login` and accept its licence "
            "there, or give --model a local folder")


def fingerprint(lm):
    """Which trunk this is: a hash over the names, shapes and first values of all its weights, in bf16, so that CPU and GPU agree."""
    digest = hashlib.sha256()
    for key, w in sorted(lm.state_dict().items()):
        digest.update(f"{key}{tuple(w.shape)}".encode() + w.detach().flatten()[:64].bfloat16().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def save_adapter(model, name, tok, folder, **meta):
    """Adapter and head `name` as one safetensors file, with what they need to be loaded, and `meta`, beside it in a JSON."""
    own = [p for k, p in model.named_parameters() if f".A.{name}." in k or f".B.{name}." in k or f"heads.{name}." in k]
    must_be_finite(model, f"the weights for {folder}")
    with gathered(own), disk(folder), aside(folder) as tmp:
        if tmp:
            own = {k: v.contiguous().cpu() for k, v in model.state_dict().items() if f".A.{name}." in k or f".B.{name}." in k or f"heads.{name}." in k}
            save_file(own, os.path.join(tmp, "adapter.safetensors"))
            with open(os.path.join(tmp, "adapter.json"), "w") as f:
                json.dump(dict(name=name, **model.adapters[name], trunk=model.fingerprint, tokenizer=tokenizer_print(tok), **meta), f, indent=1)
    barrier()                                            # the folder is there before anyone reads it


def load_adapter(model, tok, folder, made_by):
    """Put a saved adapter and its head, frozen, on `model`; returns the meta data. One of another trunk or tokenizer is refused."""
    try:
        with open(os.path.join(folder, "adapter.json")) as f:
            meta = json.load(f)
        with safe_open(os.path.join(folder, "adapter.safetensors"), "pt") as f:
            own = {k: f.get_tensor(k) for k in f.keys()}
    except (OSError, ValueError, SafetensorError) as e:
        die(f"{folder}: no adapter there ({e}); train it with: {made_by}")
    if meta.get("trunk") != model.fingerprint:
        die(f"{folder}: trained on another model than the one given by --init-from; train it on this one with: {made_by}")
    if meta.get("tokenizer") != tokenizer_print(tok):
        die(f"{folder}: trained with another tokenizer or chat template than that of --init-from; train it with this one: {made_by}")
    model.add_adapter(meta["name"], meta["r"], meta["alpha"], trainable=False)
    model.add_head(meta["name"])
    model.heads[meta["name"]].requires_grad_(False)
    missing = model.load_state_dict(own, strict=False).unexpected_keys
    assert not missing, missing
    return meta


def memory_plan(models, args, rows, length, sampled=0, decode=(0, 0)):
    """What a stage is going to hold, a line each, against what the device has; ends the run, with advice, where it cannot fit.

    models {role: LM}; rows x length tokens, `sampled` of each row's under the log-softmax: its largest forward with a backward;
    decode: rows, tokens of the KV cache. Also in OUT/memory.json. tools/bench.py sets it beside the measured peak.
    """
    n, cuda, MB = world(), torch.cuda.is_available(), 2**20
    sizes = {role: sum(p.numel() * p.element_size() for p in m.parameters()) for role, m in models.items()}
    trained = {role: sum(p.numel() for p in m.parameters() if p.requires_grad) for role, m in models.items()}
    element = next(next(iter(models.values())).parameters()).element_size()
    shard = lambda stage: n if args.zero >= stage else 1
    states = (12 if element == 2 else 12 if args.zero else 8) / shard(1)   # Adam's two moments; a master copy, unless plain fp32 without ZeRO
    probes = {role: probe(m) for role, m in models.items() if trained[role]}
    vocab = next(iter(models.values())).lm.config.get_text_config().vocab_size
    chunk = min(CHUNK, rows * sampled)
    plan = {"python and libraries": 0 if cuda else max(0, resident() - sum(sizes.values()))}
    plan |= {f"{role}: weights": size / shard(3) for role, size in sizes.items()}
    plan |= {f"{role}: a copy to decode with": size for role, size in list(sizes.items())[:1] if decode[0] and args.zero == 3}
    plan |= {f"{role}: gradients": count * element / shard(2) for role, count in trained.items() if count}
    plan |= {f"{role}: optimizer": 0 if args.offload and cuda else count * states for role, count in trained.items() if count}
    # A backward pass begins with the logits, kept once in their own dtype (its forward has two fp32 copies, see TokenLogp), and the
    # head's gradient: in several chunks, their sum, a new one and the new sum. On a CPU (fp32) the heap gives back little of what is
    # freed: three quarters of the activations once more (measured), and a tied head's gradient still there beside the embedding's.
    largest = element * max(p.numel() for m in models.values() for p in m.parameters() if p.requires_grad)
    logits = max(chunk * vocab * (8 if element == 4 else 8 + element), chunk * vocab * element + largest * (3 if rows * sampled > CHUNK else 1 if element == 2 else 2))
    passing = {f"activations of {rows} x {length} tokens": rows * length * max(p["activation"] for p in probes.values()) * (1 if element == 2 else 1.75) + logits,
               f"KV cache of {decode[0]} x {decode[1]} tokens": decode[0] * (decode[1] * probes[min(probes)]["cache"] + vocab * 12)}
    if element == 2 and not args.zero:
        passing["fp32 gradients in the optimizer step"] = 4 * max(trained.values())
    plan |= {what: size for what, size in passing.items() if size == max(passing.values())}                  # never at the same time
    if args.zero == 3:
        plan["whole layers of one model at a time"] = min(10**9, max(sizes.values()) // element) * element          # stage3_max_live_parameters
    whole = sum(sizes.values()) + plan.get(f"{list(sizes)[0]}: a copy to decode with", 0)
    if whole > sum(plan.values()):
        plan["whole models at the start, before they are sharded"] = whole - sum(plan.values())
    if cuda:
        gc.collect()
        torch.cuda.empty_cache()
    total, has = sum(plan.values()), torch.cuda.mem_get_info()[0] + torch.cuda.memory_allocated() if cuda else psutil.virtual_memory().available + resident()
    if rank() == 0:
        print("\n".join(f"{what:<52}{size / MB:>11,.0f} MB" for what, size in plan.items()))
        print(f"{'together, of ' + format(has / MB, ',.0f') + ' MB that are free':<52}{total / MB:>11,.0f} MB")
    write_json(os.path.join(args.out, "memory.json"), dict(plan=plan, total=total, free=has, models={
        role: dict(parameters=sum(p.numel() for p in models[role].parameters()), trainable=trained[role], bytes=sizes[role]) for role in models}))
    if all_max(int(total > has)):
        advice = [flag for flag, helps in (("--lora", getattr(args, "lora", True) is False), ("--zero 3 on more GPUs", args.zero < 3), ("--offload", cuda and not args.offload), ("--gradient-checkpointing", not args.gradient_checkpointing),
                                           ("a smaller --mini-batch-size" if hasattr(args, "mini_batch_size") else "a larger --grad-accum", True)) if helps]
        die(f"this would need {total / MB:,.0f} MB and {has / MB:,.0f} MB are free; {', or '.join(advice)}")


def probe(model):
    """Bytes that a backward keeps of each token, and bytes of its KV cache: measured on one short row, whatever the architecture."""
    ids = torch.zeros(1, 16, dtype=torch.long, device=next(model.parameters()).device)
    adapter = [k for k in model.adapters if any(layer.A[k].weight.requires_grad for layer in model.lora_layers())]
    own, kept, mode = {p.data_ptr() for p in model.parameters()}, {}, model.training
    model.train()

    def keep(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        model.switch((adapter or [None])[0])
        out = model.hidden(ids, torch.ones_like(ids), 15)              # the head's logits are counted by themselves
    activation = sum(size for at, size in kept.items() if at not in own) / 16
    del out
    cache = DynamicCache()
    model.eval()                                                       # checkpointed blocks keep none in train mode
    with torch.no_grad():
        model.hidden(ids, torch.ones_like(ids), 0, cache)
    model.train(mode)
    return dict(activation=activation, cache=sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) / 16)


def ds_config(args, model, rows, accum=1):
    """ds_config.json (--ds-config), with what the flags decide filled in."""
    try:
        with open(args.ds_config) as f:
            config = json.load(f)
    except (OSError, ValueError) as e:
        die(f"--ds-config {args.ds_config}: {e}")
    own = [k for k in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "optimizer", "scheduler", "fp16") if k in config]
    own += ["zero_optimization.stage"] * ("stage" in config.get("zero_optimization", {}))
    if own:
        die(f"--ds-config {args.ds_config}: {', '.join(own)}: the flags decide that; take it out of the file")
    config |= dict(train_micro_batch_size_per_gpu=rows, gradient_accumulation_steps=accum)
    config.setdefault("bf16", {})["enabled"] = next(model.parameters()).dtype == torch.bfloat16
    config.setdefault("zero_optimization", {})["stage"] = args.zero
    if args.offload:
        config["zero_optimization"]["offload_optimizer"] = dict(device="cpu", pin_memory=torch.cuda.is_available())
        config["zero_force_ds_cpu_optimizer"] = False       # torch's own AdamW runs there too, and needs no compiler
    return config


def engine(model, args, lr, rows, accum=1):
    """DeepSpeed engine with fused AdamW over the trainable parameters of `model`.

    rows: rows of one forward pass on one rank; accum: forward passes per optimizer step.
    """
    # One optimizer group a layer: ZeRO-1/2 upcast the gradients one group at a time (by arithmetic 19 GB at 3B if it is all one group).
    layer = lambda item: (re.match(r".*?\.\d+\.", item[0]) or [""])[0]
    trainable = [(k, p) for k, p in model.named_parameters() if p.requires_grad]
    groups = [dict(params=[p for _, p in items]) for _, items in itertools.groupby(trainable, layer)]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=ds_config(args, model, rows, accum))[0]
    if world() == 1 and not args.zero:
        engine.enable_backward_allreduce = False                           # it would copy all gradients out and in again, to sum them over one rank
    return engine


def frozen(model, args):
    """A model that only runs forward: as it is, or at ZeRO-3 sharded over the ranks."""
    engine = deepspeed.initialize(model=model, config=ds_config(args, model, 1))[0] if args.zero == 3 else model
    engine.eval()
    return engine


def gathered(params):
    """Whole weights on every rank inside this context; at ZeRO-3 they are sharded outside of it. All ranks must enter."""
    params = [p for p in params if hasattr(p, "ds_id")]
    return deepspeed.zero.GatheredParameters(params) if params else contextlib.nullcontext()


def actor(model, args):
    """The module that rollouts decode with. Call it before `engine`, and `refresh` before each rollout.

    Below ZeRO-3 that is the model itself. At ZeRO-3 every forward would gather every layer again for every token, so a plain
    copy decodes; it costs the weights once more per GPU, and lets ranks stop at different lengths.
    """
    return copy.deepcopy(model).requires_grad_(False).eval() if args.zero == 3 else model


def refresh(actor, model):
    """Bring the copy up to date: the only gather of a rollout."""
    if actor is not model:
        for mine, theirs in zip(actor.parameters(), model.parameters()):
            with torch.no_grad(), gathered([theirs]):    # one at a time: the whole model is never there twice
                mine.copy_(theirs)


def set_lr(engine, lr):
    for group in engine.optimizer.param_groups:
        group["lr"] = lr


# ---------------------------------------------------------------------------------------------------------------------
# Text to tokens: one template for every stage


def load_tokenizer(path):
    """The tokenizer as it is, with a pad that is never eos (it is only a filler: every mask comes from lengths)."""
    try:
        tok = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as e:
        die(missing_model(path, e))
    if tok.eos_token_id is None:
        die(f"{path}: its tokenizer has no eos token; set eos_token in tokenizer_config.json")
    if tok.pad_token_id in (None, tok.eos_token_id):
        vocab, spare = tok.get_vocab(), ("<|finetune_right_pad_id|>", "<|reserved_special_token_0|>", tok.unk_token, tok.bos_token)
        ids = [vocab[t] for t in spare if t in vocab] + [0, 1]
        tok.pad_token = tok.convert_ids_to_tokens(next(i for i in ids if i != tok.eos_token_id))
    return tok


def tokenizer_print(tok):
    """Which tokenizer this is: a hash over its vocabulary, special tokens and chat template."""
    what = [sorted(tok.get_vocab().items()), tok.bos_token, tok.eos_token, tok.chat_template]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]


def encode_prompt(tok, prompt):
    """Prompt (a string, or a list of {role, content}) -> ids up to where the response begins; bos at most once."""
    return list(prompt_ids(tok, prompt if isinstance(prompt, str) else json.dumps(prompt), isinstance(prompt, str)))


@functools.lru_cache(4)
def control_tokens(tok):
    names = {t.content for t in tok.added_tokens_decoder.values() if t.special} | set(tok.all_special_tokens)
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)")


def only_text(tok, text):
    """User text in which no string is a control token: `<|eot_id|>` becomes `< |eot_id|>`."""
    return control_tokens(tok).sub(lambda m: m[0][:1] + " " + m[0][1:], text)


@functools.lru_cache(1 << 14)                           # prompts come back: as pairs, as tau, in every epoch
def prompt_ids(tok, prompt, is_text):
    messages = [{"role": "user", "content": prompt}] if is_text else json.loads(prompt)
    messages = [dict(m, content=only_text(tok, m["content"])) for m in messages]
    if tok.chat_template:
        ids = list(tok.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
    else:
        text = "".join(f"### {m['role'].capitalize()}:\n{m['content']}\n\n" for m in messages) + "### Assistant:\n"
        ids = tok(text)["input_ids"]
        ids = ids[:-1] if ids[-1] == tok.eos_token_id else ids
    while ids[:2] == [tok.bos_token_id] * 2:
        ids = ids[1:]
    return ids


def encode_response(tok, text):
    """Response -> ids with eos appended by hand (add_eos_token is ignored by some tokenizers)."""
    return response_ids(tok, text).tolist()


@functools.lru_cache(1 << 15)                           # so do responses; 4 bytes a token
def response_ids(tok, text):
    return np.array(tok(only_text(tok, text), add_special_tokens=False)["input_ids"] + [tok.eos_token_id], dtype=np.int32)


def behind(tok, prefix, ids):
    """ids put behind a prefix: the bos of the second part goes."""
    return prefix + (ids[1:] if prefix and ids and ids[0] == tok.bos_token_id != tok.eos_token_id else ids)


def frame(prompts, responses, pad, device="cpu"):
    """Lists of ids -> ids (B, P+T), attn (B, P+T), mask (B, T). All ranks get the same T, or ZeRO-3 would hang."""
    P, T = max(map(len, prompts)), all_max(max(map(len, responses)))
    ids = torch.full((len(prompts), P + T), pad)
    attn = torch.zeros_like(ids)
    for row, (p, r) in enumerate(zip(prompts, responses)):
        ids[row, P - len(p):P + len(r)] = torch.tensor(p + r)
        attn[row, P - len(p):P + len(r)] = 1
    return ids.to(device), attn.to(device), attn[:, P:].bool().to(device)


def join(ids, attn, response, mask, pad):
    """Prompts (B, P) and what a rollout said, (B, T) each, as one frame whose T is the longest response of any rank."""
    T = all_max(int(mask.any(0).sum()))
    response = F.pad(response[:, :T], (0, max(0, T - response.shape[1])), value=pad)
    mask = F.pad(mask[:, :T], (0, max(0, T - mask.shape[1])))
    return torch.cat([ids, response], 1), torch.cat([attn, mask.long()], 1), mask


def by_length(order, attn, size):
    """Row numbers (B,), in turns of `size`, an optimizer batch: each turn sorted by its rows' lengths, so that micro-batches hold rows of
    like length and little padding. What an optimizer batch sums up stays the same."""
    length = attn.sum(1)
    return torch.cat([rows[length[rows].argsort(stable=True)] for rows in order.to(attn.device).split(size)])


def unpad(ids, mask):
    """The responses of a frame as lists of ids."""
    return [row[m].tolist() for row, m in zip(ids[:, -mask.shape[1]:], mask)]


def behind_tau(tok, tau, prompt, room, tau_length):
    """tau, a list of (prompt ids, response ids), in front of a prompt: the first tau_length tokens of each response; what `room` tokens,
    prompt included, do not hold is left out, whole pairs at a time."""
    prefix = []
    for p, r in tau:
        longer = behind(tok, prefix, p) + r[:tau_length]
        prefix = longer if len(longer) + len(prompt) <= room else prefix
    return behind(tok, prefix, prompt)


# ---------------------------------------------------------------------------------------------------------------------
# Data


class Rows:
    """A .jsonl or .jsonl.gz file as a sequence of dicts, read by line offsets: only the offsets live in memory.

    kinds: sets of keys, of which the first line shows one; every row must have them. All lines are looked at before anything else
    happens: a broken one ends the run and is named; an empty prompt, and a pair of equals, is left out and counted; an empty answer
    is kept: it teaches to end at once. each(row, its keys): called for every row kept. A .gz is unpacked into an unnamed temporary
    file first: seeking in a compressed file would unpack it from the start each time.
    """

    def __init__(self, path, *kinds, each=None):
        if not os.path.isfile(path):
            maker = [f"make it with: python {folder}.py" for folder in ("data/toy", "data/ultrafeedback") if path.startswith(folder + "/")]
            die(f"{path}: no such file; " + (maker or ["name one with a flag, see --help"])[0])
        self.path, self.offsets, dropped, at = path, array.array("q"), {}, 0
        try:
            self.file = tempfile.TemporaryFile() if path.endswith(".gz") else open(path, "rb")
            if path.endswith(".gz"):
                with gzip.open(path, "rb") as packed:
                    shutil.copyfileobj(packed, self.file)
        except (OSError, EOFError, zlib.error) as e:
            die(f"{path}: cannot be read ({e})" + ("; it is cut short or not gzip: unpack it and look" if path.endswith(".gz") else ""))
        size = self.file.seek(0, os.SEEK_END)
        self.file.seek(0)
        try:
            with tqdm(total=size, unit="B", unit_scale=True, desc=os.path.basename(path), delay=2, disable=rank() != 0, leave=False) as bar:
                for number, line in enumerate(self.file, 1):
                    if line.strip():
                        row = read_row(line)
                        kinds = kinds if self.offsets else [k for k in kinds if not set(k) - set(row)][:1] or kinds
                        reason = check_row(row, kinds)
                        if reason:
                            dropped[reason] = dropped.get(reason, 0) + 1
                        else:
                            self.offsets.append(at)
                            if each:
                                each(row, next(k for k in kinds if set(k) <= set(row)))
                    at += len(line)
                    bar.update(len(line))
        except BadRow as e:
            die(f"{path}:{number}: {e}")
        if dropped and rank() == 0:
            print(f"{path}: left out " + ", ".join(f"{n} with {reason}" for reason, n in dropped.items()), file=sys.stderr)
        if not self.offsets:
            die(f"{path}: " + ("no row is left" if dropped else "the file is empty"))

    def __len__(self):
        return len(self.offsets)

    def __getitem__(self, i):
        self.file.seek(self.offsets[i])
        return json.loads(self.file.readline())


class BadRow(Exception):
    pass


def read_row(line):
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as e:
        raise BadRow(f"not JSON ({e}); rows are one object a line, in UTF-8")
    if not isinstance(row, dict):
        raise BadRow("not an object {...}")
    return row


def check_row(row, kinds):
    """None for a good row, the reason to leave it out for one without a lesson; BadRow where it is broken."""
    keys = next((k for k in kinds if set(k) <= set(row)), None)
    if keys is None:
        raise BadRow("needs the keys " + ", or ".join(" ".join(k) for k in kinds))
    for key in [k for k in keys if k in ("response", "chosen", "rejected")] + [k for k in ("policy", "chosen_policy", "rejected_policy") if row.get(k) is not None]:
        if not isinstance(row[key], str):
            raise BadRow(f"{key} must be a string, not {str(row[key])[:40]!r}")
    if "reward" in keys and not is_number(row["reward"]):
        raise BadRow(f"the reward must be a finite number, not {str(row['reward'])[:40]!r}")
    prompt = row["prompt"] if "prompt" in keys else "-"
    if isinstance(prompt, list):
        if not all(isinstance(m, dict) and m.get("role") in ("system", "user", "assistant") and isinstance(m.get("content"), str) for m in prompt):
            raise BadRow("messages must be {role, content} with the role system, user or assistant, and content a string")
        if "user" not in (m["role"] for m in prompt):
            raise BadRow("messages need a turn of the user")
        prompt = "".join(m["content"] for m in prompt)
    if not isinstance(prompt, str):
        raise BadRow(f"prompt must be a string or a list of {{role, content}}, not {str(prompt)[:40]!r}")
    try:
        "".join([prompt, *(row[key] for key in keys if key != "prompt" and isinstance(row[key], str))]).encode()
    except UnicodeEncodeError as e:
        raise BadRow(f"half a character, {e.object[e.start]!r}; write whole ones")
    if not prompt.strip():
        return "an empty prompt"
    return "two equal answers" if "chosen" in keys and row["chosen"] == row["rejected"] else None


def is_number(x):
    try:
        return type(x) in (int, float) and math.isfinite(x)
    except OverflowError:                                # an integer beyond any float
        return False


@functools.lru_cache(4)
def permutation(n, seed, epoch):
    return np.random.default_rng([seed, epoch]).permutation(n)


def batch_indices(n, size, step, seed):
    """Row numbers of batch `step`: shuffled epochs laid end to end, so that no row is dropped or repeated.

    A function of the step alone: nothing to save for a resume. `size` counts all ranks; this rank gets its share.
    """
    mine = range(step * size + rank(), (step + 1) * size, world())
    return [int(permutation(n, seed, i // n)[i % n]) for i in mine]


# ---------------------------------------------------------------------------------------------------------------------
# Results: metrics.jsonl with a bar, and folders that are never half-written


def token_mean(stats, key):
    """Mean over tokens: stats [{key: mean of a micro-batch, n: its tokens}] -> scalar. Sorted by length, micro-batches are unequal."""
    n = torch.stack([s["n"] for s in stats])
    return (torch.stack([s[key] for s in stats]) * n).sum() / n.sum()


def mean_over_ranks(metrics):
    """{name: number or scalar tensor} -> {name: float}, averaged over ranks; one transfer for all of them."""
    values = torch.stack([torch.as_tensor(v, dtype=torch.float64).cpu() for v in metrics.values()])
    if world() > 1:
        values = values.to("cuda") if torch.cuda.is_available() else values
        dist.all_reduce(values)
    return dict(zip(metrics, (values / world()).tolist()))


def resident():
    """Bytes of memory that this process holds now."""
    return psutil.Process().memory_info().rss


def peak_bytes():
    """Peak memory so far: allocated on CUDA, resident on CPU (not getrusage's, which starts from that of the process that started this one)."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if not os.path.exists("/proc/self/status"):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss        # macOS, in bytes
    with open("/proc/self/status") as f:
        return int(re.search(r"VmHWM:\s*(\d+) kB", f.read())[1]) * 1024


def barrier():
    if world() > 1:
        dist.barrier()


def gather_dicts(mine):
    """The union of every rank's dict, on every rank."""
    parts = [None] * world()
    if world() > 1:
        dist.all_gather_object(parts, mine)
    return {k: v for part in parts if part for k, v in part.items()} or mine


class Metrics:
    """One JSON line a step in out/metrics.jsonl, the numbers that matter in a bar, DeepSpeed's monitor where it is on."""

    def __init__(self, out, steps, desc, show, engine=None, first=0):
        """first: the step of the first row to come; after a resume the file keeps the rows before it and no other."""
        self.out, self.show, self.engine, self.start, self.file, self.last, self.warned = out, show, engine, time.time(), None, [], set()
        if rank() == 0:
            path, kept = os.path.join(out, "metrics.jsonl"), []
            if first:
                if os.path.exists(path):
                    with open(path) as f:
                        kept = list(itertools.islice(f, first))
                if len(kept) < first or json.loads(kept[-1])["step"] != first - 1:
                    die(f"{path}: does not hold the steps before {first} that the checkpoint follows; put it back, or start anew without --resume")
                self.start, self.last = self.start - json.loads(kept[-1])["seconds"], [json.loads(line) for line in kept[-20:]]
            with open(path + ".tmp", "w") as f:
                f.writelines(kept)
            os.replace(path + ".tmp", path)
            self.file = open(path, "a")
        self.bar = tqdm(total=steps, initial=first, desc=desc, disable=rank() != 0, dynamic_ncols=True, mininterval=1.0)

    def log(self, step, batch=None, **metrics):
        """One line for `step`, means over ranks. Ends the run, exit code 1, where a number is not finite: before a checkpoint of it is written.

        batch: tensors of the step, which are then saved aside.
        """
        row = dict(step=step, **mean_over_ranks(metrics), seconds=round(time.time() - self.start, 3), peak_bytes=peak_bytes())
        warnings = self.watch(row)
        if self.file:
            self.file.write(json.dumps(row | (dict(warnings=warnings) if warnings else {})) + "\n")
            self.file.flush()
            self.bar.set_postfix({k: f"{row[k]:.3g}" for k in self.show if k in row} | {"WARNING": w.split(":")[0] for w in warnings[:1]}, refresh=False)
            for w in set(warnings) - self.warned:
                tqdm.write(f"warning: from step {step} on: {w}", file=sys.stderr)
        self.warned = set(warnings)
        self.bar.update()
        bad = [k for k, v in row.items() if not math.isfinite(v)]
        if bad:
            if batch:
                torch.save({k: v.cpu() for k, v in batch.items()}, os.path.join(self.out, f"bad_step_{step}_rank_{rank()}.pt"))
            good = [n for n in Checkpoints.steps_in(os.path.join(self.out, "checkpoint")) if n <= step]
            self.close()
            if rank() == 0:
                print(f"error: {', '.join(bad)} at step {step} not finite; nothing of it was saved" + (f", but its batch is in {self.out}/bad_step_{step}_rank_0.pt. " if batch else ". ")
                      + (f"The last good checkpoint is {self.out}/checkpoint/step_{good[0]}: lower" if good else "Lower") + " --lr, then go on with --resume", file=sys.stderr)
            raise SystemExit(1)
        if self.engine is not None and self.engine.monitor.enabled and rank() == 0:
            self.engine.monitor.write_events([(k, v, step) for k, v in row.items()])
        return row

    def watch(self, row, window=10):
        """What looks wrong in the last `window` rows of a policy's training, a sentence each."""
        self.last = (self.last + [row])[-2 * window:]
        found, late, early = [], self.last[-window:], self.last[:window]
        if "kl" in row and jumped(row["kl"], self.last[:-1]):
            found.append("jumped: a single step of updates took the policy far from where it was; where the next steps do not bring it back, lower --lr")
        mean = lambda rows, k: sum(r[k] for r in rows) / len(rows)
        if "entropy" in row and len(late) == window:
            if mean(late, "entropy") < 0.02:
                found.append("collapsed: the policy says one thing only (entropy near 0); go back and raise --kl-coef or lower --lr")
            if mean(late, "ended") < 0.05:
                found.append("endless: hardly any response ends; raise --max-new-tokens, or see that the SFT data end")
            if mean(late, "length") < 1.5:
                found.append("empty: the responses are empty; go back and raise --kl-coef")
            if mean(late, "kl") > 60:
                found.append("far away: over 60 nats a response from the SFT model; raise --kl-coef, lower --lr")
            if all("gold" in r for r in self.last) and len(self.last) == 2 * window and mean(late, "gold") < mean(early, "gold") - 0.05 and mean(late, "q_mean") > mean(early, "q_mean"):
                found.append("fooled: the value rises and the reward falls; stop, raise --kl-coef, or train the GVM on this policy's answers (tools/label.py)")
        return found

    def close(self):
        self.bar.close()
        if self.file:
            self.file.close()


def jumped(kl, rows):
    """Whether the KL is far beyond that of the last rows, by a factor of two and 2 nats: one step of updates has broken the policy (results/last_update.json)."""
    return len(rows) > 0 and kl > 2 * np.mean([r["kl"] for r in rows[-5:]]) + 2


class Clock:
    """Seconds by phase: `with clock("generate"): ...`"""

    def __init__(self):
        self.seconds = {}

    @contextlib.contextmanager
    def __call__(self, phase):
        self.wait()
        begin = time.perf_counter()
        yield
        self.wait()
        self.seconds["sec_" + phase] = self.seconds.get("sec_" + phase, 0.0) + time.perf_counter() - begin

    @staticmethod
    def wait():
        if torch.cuda.is_available():
            torch.cuda.synchronize()


@contextlib.contextmanager
def aside(folder):
    """A folder to write in, on rank 0, that takes the place of `folder` only once it is complete."""
    if rank() != 0:
        yield None
        return
    tmp = folder.rstrip("/") + ".tmp"
    shutil.rmtree(tmp, ignore_errors=True)
    os.makedirs(tmp)
    yield tmp
    old = folder.rstrip("/") + ".old"
    shutil.rmtree(old, ignore_errors=True)
    if os.path.exists(folder):
        os.rename(folder, old)
    os.rename(tmp, folder)
    shutil.rmtree(old, ignore_errors=True)


def save_model(model, tok, folder, adapter=None):
    """A plain transformers folder, adapter merged, which AutoModelForCausalLM loads; in its folder peft/ the adapter alone, for peft."""
    must_be_finite(model, f"the weights for {folder}")
    with disk(folder), aside(folder) as tmp:
        state = model.merged_state_dict(adapter, keep=bool(tmp))
        with gathered([p for k, p in model.named_parameters() if f".A.{adapter}." in k or f".B.{adapter}." in k]):
            if tmp:
                model.lm.save_pretrained(tmp, state_dict=state)
                tok.save_pretrained(tmp)
                if adapter:
                    save_peft(model, adapter, os.path.join(tmp, "peft"))
    barrier()


def save_peft(model, name, folder):
    """An adapter in the layout that peft reads: PeftModel.from_pretrained(the model --init-from named, folder)."""
    os.makedirs(folder)
    layers = {path: m for path, m in model.lm.named_modules() if isinstance(m, LoRA)}
    save_file({f"base_model.model.{path}.lora_{x}.weight": getattr(m, x)[name].weight.detach().cpu().contiguous() for path, m in layers.items() for x in "AB"},
              os.path.join(folder, "adapter_model.safetensors"), metadata={"format": "pt"})
    config = model.adapters[name]
    write_json(os.path.join(folder, "adapter_config.json"), dict(
        peft_type="LORA", task_type="CAUSAL_LM", inference_mode=True, base_model_name_or_path=model.lm.config._name_or_path, r=config["r"],
        lora_alpha=config["alpha"], lora_dropout=config["dropout"], bias="none", target_modules=sorted(layers),
        fan_in_fan_out=isinstance(next(iter(layers.values())).base, Conv1D)))


class Checkpoints:
    """Everything that a run needs to go on, in OUT/checkpoint/step_N: whole, or not there.

    checkpoints = Checkpoints(args, out, policy=engine, ...)
    first, state = checkpoints.load()                the step to go on with, and what `save` was given; 0 and {} for a new run
    checkpoints.save(step, name=value, ...)          after each step; writes where one is due: tensors, numbers, lists of them

    Weights and optimizer are DeepSpeed's own files, one set an engine; beside them every rank's random state, and sizes and check sums of it all.
    Signals (SIGTERM, Ctrl-C) end the run after the step under way, with a checkpoint and exit code 0; a second Ctrl-C ends it at once.
    """

    def __init__(self, args, out, keep=2, **engines):
        self.args, self.folder, self.keep, self.engines, self.stop = args, os.path.join(out, "checkpoint"), keep, engines, 0
        self.left_out, self.skipped = 0, self.count_skipped()
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, self.on_signal)

    def count_skipped(self):
        return sum(engine.skipped_steps for engine in self.engines.values())

    def updates_left_out(self, step):
        """With ZeRO or in bf16 DeepSpeed leaves out, without a word, an update whose gradient is not finite: say it, and end the run
        after three steps of it in a row."""
        skipped, before, self.skipped = self.count_skipped(), self.skipped, self.count_skipped()
        self.left_out = self.left_out + 1 if skipped > before else 0
        if self.left_out and rank() == 0:
            tqdm.write(f"warning: the gradient at step {step} was not finite; DeepSpeed left {skipped - before} updates out", file=sys.stderr)
        if self.left_out == 3:
            end(f"the gradients of three steps in a row, {step - 2} to {step}, are not finite", self)

    def on_signal(self, number, _):
        if number == signal.SIGINT:                                      # a launcher may send SIGTERM twice
            signal.signal(number, signal.SIG_DFL)
        self.stop = 1

    @staticmethod
    def steps_in(folder):
        names = os.listdir(folder) if os.path.isdir(folder) else []
        return sorted((int(n[5:]) for n in names if re.fullmatch(r"step_\d+", n)), reverse=True)

    def steps(self):
        """Steps of the checkpoints that are there, the last one first."""
        return self.steps_in(self.folder)

    def load(self):
        if not self.args.resume:
            if rank() == 0 and self.steps():                             # a new run: what an older one left goes out of its way
                shutil.rmtree(self.folder + ".old", ignore_errors=True)
                os.rename(self.folder, self.folder + ".old")
                log = os.path.join(os.path.dirname(self.folder), "metrics.jsonl")
                if os.path.exists(log):
                    shutil.copy(log, self.folder + ".old")
            barrier()
        if not self.steps():
            if self.args.resume and rank() == 0:
                print(f"{self.folder}: nothing there to go on from; starting anew", file=sys.stderr)
            return 0, {}
        for step in self.steps():
            path = os.path.join(self.folder, f"step_{step}")
            broken = all_max(int(rank() == 0 and not self.whole(path)))
            if not broken:
                break
            if rank() == 0:
                print(f"{path}: cut short or damaged, going back to the one before it", file=sys.stderr)
                os.rename(path, path + ".damaged")
            barrier()
        else:
            die(f"{self.folder}: no whole checkpoint to go on from; start anew without --resume")
        with open(os.path.join(path, "run.json")) as f:
            was = json.load(f)
        if was["world_size"] != world() or was["zero"] != self.args.zero:
            die(f"--resume: {path} was written by {was['world_size']} processes at --zero {was['zero']}; go on with as many and the same")
        differ = [f"--{k.replace('_', '-')} {v} (was {was.get(k)})" for k, v in vars(self.args).items()
                  if k not in ("resume", "out", "local_rank", "save_every") and json.loads(json.dumps(v)) != was.get(k)]
        if differ and rank() == 0:
            print("resuming with other flags than the run had: " + ", ".join(differ), file=sys.stderr)
        for name, engine in self.engines.items():
            engine.load_checkpoint(path, tag=name, load_module_strict=False, load_lr_scheduler_states=False)
        mine = torch.load(os.path.join(path, f"rank_{rank()}.pt"), weights_only=True)
        self.skipped = self.count_skipped()
        torch.set_rng_state(mine["random"])
        if torch.cuda.is_available():
            torch.cuda.set_rng_state(mine["random_cuda"])
        return step, mine["state"]

    def save(self, step, **state):
        """`step` has just been done (counted from 0)."""
        self.updates_left_out(step)
        self.stop = all_max(self.stop)
        if not self.stop and (step + 1) % self.args.save_every:
            return
        path = os.path.join(self.folder, f"step_{step + 1}")
        for name, engine in self.engines.items():
            must_be_finite(engine.module, f"weights of the {name} after step {step}", self)
        with disk(path, self), aside(path) as tmp:
            tmp = tmp or path + ".tmp"
            barrier()                                                    # rank 0 has made the folder
            for name, engine in self.engines.items():
                engine.save_checkpoint(tmp, tag=name, save_latest=False, exclude_frozen_parameters=True)
            cuda = dict(random_cuda=torch.cuda.get_rng_state()) if torch.cuda.is_available() else {}
            torch.save(dict(cuda, random=torch.get_rng_state(), state=state), os.path.join(tmp, f"rank_{rank()}.pt"))
            barrier()
            if rank() == 0:
                write_json(os.path.join(tmp, "run.json"), vars(self.args) | dict(world_size=world()))
                write_json(os.path.join(tmp, "files.json"), check_sums(tmp))
        barrier()
        for old in self.steps()[self.keep:] if rank() == 0 else ():
            shutil.rmtree(os.path.join(self.folder, f"step_{old}"))
        if self.stop:
            if rank() == 0:
                print(f"\nstopped after step {step}; go on with the same command and --resume", file=sys.stderr)
            finish()

    @staticmethod
    def whole(path):
        try:
            with open(os.path.join(path, "files.json")) as f:
                return json.load(f) == check_sums(path)
        except (OSError, ValueError):
            return False


def must_be_finite(model, what, checkpoints=None):
    """Ends the run, exit code 1, where a trained weight of this rank's is not: a gradient was not, though the loss was."""
    weights = [p for p in model.parameters() if p.requires_grad]
    weights = [p.ds_tensor[:max(0, p.ds_numel - rank() * p.ds_tensor.numel())] if hasattr(p, "ds_tensor") else p for p in weights]     # a shard's padding is never written
    if weights and all_max(int(not torch.stack([w.isfinite().all() for w in weights]).all())):
        end(f"{what} are not finite", checkpoints)


def end(what, checkpoints=None):
    """Ends the run, exit code 1: what is wrong, and what to go on from."""
    if rank() == 0:
        steps = checkpoints.steps() if checkpoints else []
        print(f"\nerror: {what}; not saved. " + (f"The last good checkpoint is {checkpoints.folder}/step_{steps[0]}: lower" if steps else "Lower") + " --lr, then go on with --resume",
              file=sys.stderr)
    raise SystemExit(1)


@contextlib.contextmanager
def disk(path, checkpoints=None):
    """One line, exit code 1, where what is written in here cannot be: the disk is full, most often."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as e:                # torch and safetensors wrap the operating system's word
        if isinstance(e, (torch.OutOfMemoryError, dist.DistError)) or any(w in str(e).lower() for w in ("connection", "timed out", "out of memory")):
            raise                                                        # not the disk: another rank has ended, say
        shutil.rmtree(path + ".tmp", ignore_errors=True)
        steps = checkpoints.steps() if checkpoints else []
        print(f"\nerror: {path} cannot be written ({str(e).splitlines()[0][:150]}); {shutil.disk_usage(os.path.dirname(os.path.abspath(path)) or '.').free / 2**20:,.0f} MB are free. "
              + (f"The last whole checkpoint, {checkpoints.folder}/step_{steps[0]}, stays; m" if steps else "M") + "ake room, then go on with --resume", file=sys.stderr)
        raise SystemExit(1)


def check_sums(folder):
    """{file: [bytes, CRC-32]} of every file in a folder but the list itself."""
    sums = {}
    for path in sorted(os.path.join(root, name) for root, _, names in os.walk(folder) for name in names if name != "files.json"):
        crc = 0
        with open(path, "rb") as f:
            while block := f.read(1 << 24):
                crc = zlib.crc32(block, crc)
        sums[os.path.relpath(path, folder)] = [os.path.getsize(path), crc]
    return sums


@torch.no_grad()
def evaluate(rollout, actor, policy, trunk, tok, rows, reward, args, device, adapter=None, before=(), n=256):
    """Roll out about n held-out prompts with the stage's own `rollout`: gold reward, KL to the reference, length, ended.

    Prints and writes them to out/summary.json. before: rows of metrics.jsonl, the last of which the policy must not have left far behind.
    """
    sums, count = {}, -(-n // (args.batch_size * world()))
    policy.eval()
    for i in range(count):
        mine = [rows[(i * args.batch_size * world() + j * world() + rank()) % len(rows)]["prompt"] for j in range(args.batch_size)]
        ids, attn, mask, ended = rollout(actor, [encode_prompt(tok, p)[-args.max_prompt_length:] for p in mine], tok, args, device, adapter)
        logp, ref_logp = (m(ids, attn, mask.shape[1], a, temperature=args.temperature) for m, a in ((policy, adapter), (trunk, None)))
        texts = [tok.decode(r, skip_special_tokens=True) for r in unpad(ids, mask)]
        part = dict(kl=((logp - ref_logp) * mask).sum(1).mean(), length=mask.sum(1).float().mean(), ended=ended.float().mean())
        if reward:
            part["gold"] = float(np.mean([reward(p, t) for p, t in zip(mine, texts)]))
        for k, v in mean_over_ranks(part).items():
            sums[k] = sums.get(k, 0.0) + v / count
    write_json(os.path.join(args.out, "summary.json"), dict(sums, rollouts=count * args.batch_size * world(), peak_bytes=peak_bytes()))
    if rank() == 0:
        if jumped(sums["kl"], before):
            print(f"warning: the last updates took the policy far from where it was (KL {before[-1]['kl']:.2f}, now {sums['kl']:.2f}); go on for a few steps: --resume --max-steps {args.max_steps + 5}", file=sys.stderr)
        print("fresh answers to --heldout: " + ", ".join(f"{k} {v:.3f}" for k, v in sums.items()) + f"; wrote {args.out}/model")
    return sums


def write_json(path, value):
    if rank() == 0:
        with open(path + ".tmp", "w") as f:
            json.dump(value, f, indent=1)
        os.replace(path + ".tmp", path)
