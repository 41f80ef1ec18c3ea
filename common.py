"""What a reader of the algorithm needs beside the stages: LoRA, model, log-probs, decoder, tokens.

One frame for every tensor. B rows, P prompt tokens (left-padded), T response tokens
(right-padded), a vocabulary of V tokens:

    position   0 .. P-1   P    P+1  ...  P+T-1
    token      prompt     a_0  a_1  ...  a_{T-1}       (the last one may be <eos>; it counts)

What leaves a forward pass is in the response frame: log-probs (B, T), and values (B, T+1), whose column
0 is V(s_0) and whose column t+1 is the value after a_t. `attn` (B, P+T) is 1 on real tokens. `mask` (B,
T) is True from a_0 to the first <eos>. In a packed row (see `pack`) the frame begins at the first
response, and mask is False on the prompts between responses. Both are built from lengths; token 0 pads.
"""
import contextlib
import copy
import functools
import math
import os
import re

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from jinja2 import TemplateError
from safetensors import SafetensorError
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.cache_utils import LinearAttentionCacheLayerMixin
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as hf_logging

# isort: off
# What the stages call as common.X and the method does not need: each file says when to open it
from runtime.checkpoints import load_adapter, tokenizer_fingerprint, trunk_fingerprint
from runtime.flags import check_context, flags, parse
from runtime.graphs import merged, static_decoder
from runtime.metrics import Progress, mean_over_ranks
from runtime.processes import CUDA, LOCAL, all_max, all_sum, die, gathered, missing_model
from runtime.processes import rank, say, world
from runtime.rows import as_messages, check_lengths, load_function, one_side, only_text, read_rows
from runtime.run import Run
# isort: on

CHUNK = 1024                                            # positions whose logits exist at one time

hf_logging.set_verbosity_error()
hf_logging.disable_progress_bar()

# --------------------------------------------------------------------------------------------
# Models: a causal LM with named LoRA adapters and named scalar heads


class Fp32Linear(nn.Linear):
    """A linear map that computes in the dtype of its input and keeps its weights in fp32.

    bf16 weights would have bf16 gradients, which lose digits as they are accumulated.
    """

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


class LoRA(nn.Module):
    """y = base(x) + alpha/r B A dropout(x), named adapters, at most one of them on (arXiv 2106.09685)."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.active = None
        self.transposed = isinstance(base, Conv1D)      # GPT-2's projections
        self.A = nn.ModuleDict()
        self.B = nn.ModuleDict()
        self.scale = {}
        self.dropout = {}

    def add(self, name, r, alpha, dropout):
        w = self.base.weight
        d_in, d_out = w.shape if self.transposed else w.shape[::-1]
        self.A[name] = Fp32Linear(d_in, r, bias=False, device=w.device)
        self.B[name] = Fp32Linear(r, d_out, bias=False, device=w.device)
        nn.init.kaiming_uniform_(self.A[name].weight, a=math.sqrt(5))
        nn.init.zeros_(self.B[name].weight)             # the adapted model starts as the base model
        self.scale[name] = alpha / r
        self.dropout[name] = dropout

    def forward(self, x):
        y = self.base(x)
        name = self.active
        if name is None:
            return y
        low = self.A[name](F.dropout(x, self.dropout[name], self.training))
        return torch.add(y, self.B[name](low), alpha=self.scale[name])

    @property
    def weight(self):
        """The adapted weight, for blocks that read it without calling the layer (Mamba's)."""
        w = self.base.weight
        return w if self.active is None else w + self.delta(self.active).to(w.dtype)

    @property
    def bias(self):
        return self.base.bias

    def delta(self, name):
        """What the adapter adds to the base weight, in that weight's own layout."""
        d = self.scale[name] * self.B[name].weight.float() @ self.A[name].weight.float()
        return d.T if self.transposed else d


class Head(nn.Linear):
    """Scalar head in fp32, whatever the trunk's dtype."""

    def forward(self, h):
        # bf16 would round away the steps of Q from token to token. The weights are cast, too,
        # for the critic: it is trained whole, and DeepSpeed holds it in bf16
        return F.linear(h.float(), self.weight.float(), self.bias.float())


class LM(nn.Module):
    """A transformers causal LM in the frame of this file, with named adapters and named scalar heads."""

    def __init__(self, lm):
        super().__init__()
        self.lm = lm
        self.heads = nn.ModuleDict()
        self.adapters = {}                              # name: what add_adapter was given
        self.active = None                              # name of the adapter that is on
        self.fingerprint = trunk_fingerprint(lm)        # now, as ZeRO-3 will shard the weights

    def add_adapter(self, name, r, alpha, dropout=0.0):
        """LoRA on every linear projection of the text model's blocks, whatever the architecture."""
        decoder = self.lm.get_decoder()
        for path, layer in list(decoder.named_modules()):
            part_of_lora = re.search(r"\.(base|[AB]\.\w+)$", path)
            if isinstance(layer, (nn.Linear, Conv1D)) and not part_of_lora:
                decoder.set_submodule(path, LoRA(layer))
        for layer in self.lora_layers():
            layer.add(name, r, alpha, dropout)
        self.adapters[name] = dict(r=r, alpha=alpha, dropout=dropout)

    def add_head(self, name, sees_token=False, token_scale=None):
        """A scalar head on the last hidden state h_t, zero at first.

        sees_token: on [h_t, token_scale * h_{t-1} * e(a_t)], e(a_t) the row of a_t in the output embedding:
        the product sums to the logit of a_t.
        """
        w = self.lm.get_output_embeddings().weight
        if sees_token:
            # A module of its own, which ZeRO-3 can gather, around the same parameter
            self.token_embedding = nn.Embedding(*w.shape, _weight=w.detach())
            self.token_embedding.weight = w
        if sees_token and token_scale is None:
            # The entries of e are small (0.02 or so), and a zero head would hardly learn from them:
            # 1 / rms(e) brings them to the size of h_t
            norm = torch.linalg.vector_norm(w.detach(), dtype=torch.float32).item()
            token_scale = math.sqrt(w.numel()) / norm
        head = Head(w.shape[1] * (1 + sees_token), 1, device=w.device)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        head.sees_token = sees_token
        head.token_scale = token_scale
        self.heads[name] = head

    def adapter_parameters(self, name):
        """{key: parameter} of the adapter and the head of that name."""
        parts = (f".A.{name}.", f".B.{name}.", f"heads.{name}.")
        return {key: p for key, p in self.named_parameters() if any(part in key for part in parts)}

    def lora_layers(self):
        return [m for m in self.modules() if isinstance(m, LoRA)]

    def switch(self, name=None):
        """Turn this adapter on and every other one off; None leaves the bare trunk."""
        self.active = name
        for layer in self.lora_layers():
            layer.active = name

    def recompute_contexts(self):
        """For activation checkpointing: (around a forward, around its recomputation)."""
        name = self.active                              # of the forward

        @contextlib.contextmanager
        def as_in_forward():
            before = self.active
            self.switch(name)
            try:
                yield
            finally:                                    # a recomputation may stop early, by an exception
                self.switch(before)

        return contextlib.nullcontext(), as_in_forward()

    def merged_state_dict(self, adapter=None, keep=True):
        """State dict of the plain transformers model, on the CPU, one adapter merged into its weights.

        At ZeRO-3 one weight at a time is gathered, so all ranks must enter; without `keep` the dict is empty.
        """
        modules = self.lm.named_modules()
        lora = {f"{path}.base.weight": m for path, m in modules if isinstance(m, LoRA)}
        state = {}
        copies = {}                                     # of tied weights, which stay one
        for key, p in self.lm.state_dict(keep_vars=True).items():
            if re.search(r"\.[AB]\.\w+\.weight$", key):
                continue
            layer = lora.get(key) if adapter else None
            with gathered(layer.parameters() if layer else [p]), torch.no_grad():
                if keep:
                    w = (p.float() + layer.delta(adapter)).to(p.dtype) if layer else p
                    w = w.detach().to("cpu", copy=hasattr(p, "ds_id"))
                    state[key.replace(".base.", ".")] = copies.setdefault(id(p), w)
        return state

    def hidden(self, ids, attn, T, cache=None):
        """Last hidden states at the last prompt token and at each response token: (B, P+T) -> (B, T+1, D).

        A cache (B rows) stands in front of them and grows by them.
        """
        L = ids.shape[1]
        left = attn.argmax(1, keepdim=True)                             # padding of each row, (B, 1)
        length = int(attn.sum(1).max())
        # Rows are shifted left, so that causal attention alone hides the padding: no mask, the fast
        # kernel, positions from 0
        positions = torch.arange(length, device=ids.device)
        ids = ids.gather(1, (positions + left).clamp(max=L - 1))
        decoder = self.lm.get_decoder()
        h = decoder(input_ids=ids, past_key_values=cache, use_cache=cache is not None)[0]
        # And back into the frame
        frame_positions = torch.arange(L - T - 1, L, device=ids.device)
        at = (frame_positions - left).clamp(0, length - 1)              # (B, T+1)
        return h.gather(1, at[..., None].expand(-1, -1, h.shape[-1]))

    def end_ids(self, tok):
        """Ids that end an answer, (E,): the tokenizer's eos and those of the generation configuration."""
        named = self.lm.generation_config.eos_token_id                  # None, an id, or a list of ids
        named = named if isinstance(named, list) else [named]
        ids = {tok.eos_token_id, *named} - {None}
        return torch.tensor(sorted(ids), device=self.lm.device)

    def logits(self, h):
        """(N, D) -> (N, V), with the scale (Cohere, Granite) or cap (Gemma 2) of the configuration."""
        config = self.lm.config.get_text_config()
        logits = self.lm.get_output_embeddings()(h)
        divisor = getattr(config, "logits_scaling", None) or 1
        scale = getattr(config, "logit_scale", None) or 1 / divisor
        logits = logits if scale == 1 else logits * scale
        cap = getattr(config, "final_logit_softcapping", None)
        return cap * torch.tanh(logits / cap) if cap else logits

    def forward(self, ids, attn, T, adapter=None, head=None, temperature=1.0, cache=None):
        """Without `head`: log-probs of the response tokens, (B, T). With it: its scalar at the T+1 states.

        Both in fp32. logp[t] is read BEFORE a_t and is 0 after the response ends; scalar 0 is read at the
        last prompt token, scalar t+1 AFTER a_t.
        """
        self.switch(adapter)

        # Values: a head on the hidden state, or on what add_head(sees_token=True) says
        if head is not None:
            head = self.heads[head]
            # One state more on the left where the head also reads h_{t-1}
            h = self.hidden(ids, attn, T + head.sees_token, cache)
            if head.sees_token:
                token = self.token_embedding(ids[:, -T - 1:]).detach() * head.token_scale
                h = torch.cat([h[:, 1:], h[:, :-1] * token], -1)        # (B, T+1, 2 D)
            return head(h).squeeze(-1)

        # Log-probs. lm_head, the most expensive layer, sees no padding
        h = self.hidden(ids, attn, T, cache)
        real = attn[:, -T:].flatten().nonzero().squeeze(1)
        targets = ids[:, -T:].flatten()[real]
        h = h[:, :-1].flatten(0, 1)[real]
        sharded = hasattr(self.lm.get_output_embeddings().weight, "ds_id")
        logp = token_logp(h, targets, self.logits, temperature, sharded)
        return logp.new_zeros(len(ids) * T).index_copy(0, real, logp).view(-1, T)


class TokenLogp(torch.autograd.Function):
    """log softmax(logits / temperature)[targets], fp32: (N, V), (N,) -> (N,).

    The logits, the largest tensor of all, are kept once, in their own dtype, and become their own gradient.
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
        # -grad softmax(logits / temperature), one tensor in fp32 and in place
        p = logits.float().div_(ctx.temperature).sub_(lse[:, None]).exp_().mul_(-grad)
        return logits.copy_(p.scatter_add_(1, targets[:, None], grad)).detach(), None, None


def token_logp(hidden, targets, logits, temperature=1.0, sharded=False):
    """log softmax(logits(hidden) / temperature)[targets] in fp32: (N, D), (N,) -> (N,)."""
    def logp(h, y):
        return TokenLogp.apply(logits(h), y, temperature)

    # In chunks of at most CHUNK positions, recomputed in the backward pass: the (N, V) logits are never
    # whole. A single chunk is kept instead, as its backward pass would hold it anyway
    n = max(1, -(-len(targets) // CHUNK))
    # ZeRO-3 gathers the head at each call: as many calls on every rank
    if sharded:
        n = all_max(n)
    if n > 1 and torch.is_grad_enabled():
        logp = functools.partial(checkpoint, logp, use_reentrant=False)
    return torch.cat(list(map(logp, hidden.tensor_split(n), targets.tensor_split(n))))


def forward_in_micro_batches(model, ids, attn, T, order, size, prefix_cache=None, **kwargs):
    """The model's forward on `size` rows at a time, in this order -> (B, ...), unsorted again.

    prefix_cache: what read_prefix returned, where all rows have one prefix.
    """
    parts = []
    for rows in order.split(size):
        cache = prefix_cache(len(rows)) if prefix_cache else None
        parts.append(model(ids[rows], attn[rows], T, cache=cache, **kwargs))
    return torch.cat(parts)[order.argsort()]


def read_prefix(model, prefix, adapter, head, device):
    """Read once what stands in front of many rows: ids -> rows(n), the cache of n of them for LM.forward.

    None where there is no prefix, or where each row must begin with the prefix itself.
    """
    cache = new_cache(model)
    # A recurrent layer's state cannot be continued by whole rows (Qwen3-Next, LFM2)
    if any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in cache.layers):
        return None
    if all_max(len(prefix)):                            # at ZeRO-3 on all ranks, even for no prefix
        ids = torch.tensor([prefix or [0]], device=device)
        model(ids, torch.ones_like(ids), 0, adapter, head=head, cache=cache)

    def rows(n):
        own = copy.deepcopy(cache)                      # a forward appends to its cache
        own.batch_repeat_interleave(n)
        return own

    return rows if prefix else None


def new_cache(model):
    # With the configuration, as recurrent layers have states of their own
    return DynamicCache(config=model.lm.config.get_text_config(decoder=True))


def frame_behind_tau(model, tok, tau, prompts, responses, device):
    """The frame in which responses are valued given tau -> ids, attn (B, P+T), a prefix or None.

    model None: tau stands in front of every row, for a model that is trained.
    """
    # Read tau once, for forward_in_micro_batches, where the architecture allows that
    prefix_cache = read_prefix(model, tau, "gvm", "gvm", device) if model else None
    begin = [append_to_prefix(tok, tau, ids) for ids in prompts]        # one bos
    if prefix_cache:
        begin = [ids[len(tau):] for ids in begin]
    ids, attn, _ = frame(begin, responses, device)
    return ids, attn, prefix_cache


class Decoder:
    """The one-token step of a rollout, with its KV cache.

    decode = Decoder(model, ids, attn)      ids, attn (B, P), left-padded
    decode.logits                           (B, V) fp32, for the next token
    decode(token)                           token (B,): append it; the logits move on
    """

    def __init__(self, model, ids, attn, adapter=None):
        model.switch(adapter)
        self.model = model
        self.trunk = model.lm.get_decoder()
        self.cache = new_cache(model)
        self.mask = None if attn.all() else attn        # prompts of one length need no mask
        self.positions = (attn.cumsum(1) - 1).clamp(min=0)
        self.logits = self.step(ids)

    def step(self, ids):
        h = self.trunk(input_ids=ids, attention_mask=self.mask, position_ids=self.positions,
                       past_key_values=self.cache, use_cache=True).last_hidden_state
        return self.model.logits(h[:, -1]).float()

    def __call__(self, token):
        self.mask = None if self.mask is None else F.pad(self.mask, (0, 1), value=1)
        self.positions = self.positions[:, -1:] + 1
        self.logits = self.step(token[:, None])


@contextlib.contextmanager
def decoding(model, ids, attn, adapter, args):
    """A Decoder that has read the prompts (B, P). Inside, an adapter is merged into the weights."""
    with merged(model, adapter, args) as adapter_left:
        decode = Decoder(model, ids, attn, adapter_left)
        if getattr(args, "static_cache", False):
            decode = static_decoder(decode, args.max_new_tokens)
        yield decode


def locate(weights, u):
    """Lay a row's weights end to end, and find the one at the share u in [0, 1) of their sum.

    (B, N), (B, 1) -> where each weight ends (B, N), where u falls (B, 1), index found (B, 1).
    """
    ends = weights.cumsum(-1, dtype=torch.float64)
    # Below the last end, so that the weight that is found is above 0
    place = u.clamp(0, 1 - 2**-52) * ends[:, -1:]
    index = torch.searchsorted(ends, place, right=True)
    return ends, place, index.clamp(max=weights.shape[1] - 1)


def draw(p, u, size=256):
    """A token per row: probabilities p (B, V), uniform numbers u (B, 1) fp64 -> ids (B,)."""
    # A cumsum over a large vocabulary is one long scan per row, which a GPU cannot spread. So in two
    # steps: which block of tokens, then which one in it. Sums in fp32 would blur rare tokens
    V = p.shape[1]
    first = 0
    if V > 32 * size:
        p = F.pad(p, (0, -V % size)).unflatten(1, (-1, size))                   # (B, V / size, size)
        ends, place, block = locate(p.sum(-1, dtype=torch.float64), u)
        begin = F.pad(ends, (1, 0)).gather(1, block)
        u = (place - begin) / (ends.gather(1, block) - begin)                   # inside the block
        p = p[torch.arange(len(p), device=p.device), block.squeeze(1)]          # (B, size)
        first = block * size
    _, _, word = locate(p, u)
    return (first + word).squeeze(1).clamp(max=V - 1)


@torch.no_grad()
def rollout(model, prompts, tok, args, device, adapter=None):
    """A sampled response per prompt, until an end token or for --max-new-tokens.

    prompts: B lists of ids -> ids (B, P+T), attn (B, P+T), mask (B, T), ended (B,).
    """
    # The prompts, padded on the left so that all responses begin in one column
    ids, attn, _ = frame(prompts, [[] for _ in prompts], device)                # (B, P)
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    end_ids = model.end_ids(tok)                                                # (E,)
    response = []
    mask = []
    with decoding(model, ids, attn, adapter, args) as decode:
        for t in range(args.max_new_tokens):
            p = (decode.logits / args.temperature).softmax(-1)                  # (B, V)
            u = torch.rand(len(p), 1, dtype=torch.float64, device=device)
            token = draw(p, u)                                                  # (B,)
            # A row that has ended goes on as padding. Its end token itself is trained.
            response.append(token.masked_fill(ended, 0))
            mask.append(~ended)
            ended = ended | (token[:, None] == end_ids).any(1)
            # The host waits for the device only here, every 16 tokens
            if t + 1 == args.max_new_tokens or (t % 16 == 15 and ended.all()):
                break
            decode(token)
    answered = append_responses(ids, attn, torch.stack(response, 1), torch.stack(mask, 1))
    return *answered, ended


@torch.no_grad()
def check_model(model, path):
    """Refuse an architecture whose log-probs differ: by transformers, by LM.forward, or in a rollout."""
    # By transformers, and by LM.forward
    words = model.lm.config.get_text_config().vocab_size
    ids = torch.arange(1, 17, device=model.lm.device)[None] % words
    attn = torch.ones_like(ids)
    plain = model.lm(input_ids=ids).logits[:, :-1].float().log_softmax(-1)
    plain = plain.gather(-1, ids[:, 1:, None])[..., 0]
    tolerance = plain.abs().max() * (0.05 if model.lm.dtype == torch.bfloat16 else 0.001)
    if (plain - model(ids, attn, 15)).abs().max() > tolerance:
        die(f"{path}: this architecture changes the logits after its head; add that to LM.logits")
    # And in a rollout: 4 tokens of padding, 8 as prompt, 4 as response
    attn[:, :4] = 0
    decode = Decoder(model, ids[:, :12], attn[:, :12])
    decoded = []
    for token in ids[0, 12:]:
        decoded.append(decode.logits[0].log_softmax(-1)[token])
        decode(token[None])
    if (torch.stack(decoded) - model(ids, attn, 4)[0]).abs().max() > tolerance:
        die(f"{path}: token by token this architecture computes other log-probs than in one pass "
            "behind padding, so that rollouts would be wrong; choose another model")


def load_model(path, args=None, trainable=True):
    """A causal LM from a transformers folder or hub id, all dropout at 0.

    args: --dtype and --gradient-checkpointing of a stage; without them bf16 on CUDA and fp32 on a CPU.
    """
    dtypes = dict(fp32=torch.float32, bf16=torch.bfloat16)
    dtypes["auto"] = torch.bfloat16 if CUDA else torch.float32
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=path.startswith(LOCAL))
        # No dropout: rollouts and updates must see the same policy
        for key, value in vars(config).items():
            if "drop" in key and isinstance(value, float):
                setattr(config, key, 0.0)
        # GPT-2's gelu is eight operations; this is the same one, fused
        if getattr(config, "activation_function", None) == "gelu_new":
            config.activation_function = "gelu_pytorch_tanh"
        dtype = dtypes[args.dtype if args else "auto"]
        lm = AutoModelForCausalLM.from_pretrained(
            path, config=config, use_safetensors=True, dtype=dtype)
    except (OSError, ValueError, SafetensorError) as e:
        die(missing_model(path, e))
    # The vision tower of a multimodal model stays frozen
    lm.requires_grad_(False)
    for part in lm.get_decoder(), lm.get_output_embeddings():
        part.requires_grad_(trainable)
    model = LM(lm).to("cuda" if CUDA else "cpu")
    if getattr(args, "gradient_checkpointing", False):  # works in train() mode only
        how = dict(use_reentrant=False, context_fn=model.recompute_contexts)
        lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
    check_model(model, path)
    return model


# --------------------------------------------------------------------------------------------
# Statistics over tokens and ranks


def masked_moments(x, mask):
    """Mean and standard deviation of x where mask, over all ranks, in fp32 -> two scalars."""
    x = x.float()
    n = all_sum(mask.sum().float())
    mean = all_sum((x * mask).sum()) / n
    var = all_sum(((x - mean) ** 2 * mask).sum()) / n
    return mean, var.clamp(min=1e-12).sqrt()


def token_mean(stats, key):
    """Means of micro-batches, [{key: mean, n: tokens}, ...] -> the mean over the tokens of all ranks."""
    # Not a mean of means: micro-batches hold unlike numbers of tokens
    n = torch.stack([s["n"] for s in stats]).float()
    total = (torch.stack([s[key] for s in stats]) * n).sum()
    return all_sum(total) / all_sum(n.sum())


def adapt_kl_coef(kl_coef, kl, kl_before, target):
    """The KL coefficient of the next step, after arXiv 1909.08593: at most a tenth up or down.

    kl: nats per response. target 0: constant.
    """
    if not target:
        return kl_coef
    # Not the present KL, but the KL five steps ahead at its present rate of change: a coefficient
    # that falls while the KL still rises would rise again too late
    ahead = kl + 5 * (kl - kl_before)
    return kl_coef * (1 + 0.1 * min(max(ahead / target - 1, -1), 1))


# --------------------------------------------------------------------------------------------
# Text to tokens, tokens to the frame: one template for every stage


def load_tokenizer(path):
    """The tokenizer as it is: masks come from lengths, so that it needs no pad token."""
    try:
        tok = AutoTokenizer.from_pretrained(path, local_files_only=path.startswith(LOCAL))
    except (OSError, ValueError) as e:
        die(missing_model(path, e))
    if tok.eos_token_id is None:
        die(f"{path}: its tokenizer has no eos token; set eos_token in tokenizer_config.json")
    return tok


def encode_prompt(tok, prompt, max_length=None):
    """Prompt, text or a list of {role, content} -> ids up to the beginning of the response, one bos."""
    # No text of a user is a control token
    messages = tuple((m["role"], only_text(tok, m["content"])) for m in as_messages(prompt))
    ids = list(encode_messages(tok, messages))
    return ids if max_length is None else cut_prompt(tok, ids, max_length)


def cut_prompt(tok, ids, max_length):
    """At most max_length ids: what opens every prompt (bos, a chat header), then the end of this one."""
    if len(ids) <= max_length:
        return ids
    opening = os.path.commonprefix([ids, prompt_opening(tok)])[:max_length // 2]
    return opening + ids[len(opening) - max_length:]


@functools.lru_cache(4)
def prompt_opening(tok):
    """The ids that two prompts have in common at their beginning."""
    prompts = [list(encode_messages(tok, (("user", text),))) for text in ("a", "b")]
    return os.path.commonprefix(prompts)


@functools.lru_cache(1 << 14)                           # prompts recur: as pairs, as tau, in every epoch
def encode_messages(tok, messages):
    if tok.chat_template:
        chat = [dict(role=role, content=text) for role, text in messages]
        template = tok.chat_template
        if "strftime_now" in template:
            # A fixed day, so that all stages see the same prompt
            template = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}" + template
        try:
            ids = list(tok.apply_chat_template(chat, chat_template=template, return_dict=False,
                                               add_generation_prompt=True))
        except TemplateError as e:
            # read_rows has tried this order of roles, but not this text
            roles = ", ".join(role for role, _ in messages)
            die(f"{tok.name_or_path}: its chat template refuses a prompt of {roles}: {e}",
                all_ranks=True)
    else:
        text = "".join(f"### {role.capitalize()}:\n{text}\n\n" for role, text in messages)
        ids = tok(text + "### Assistant:\n")["input_ids"]
        # Some tokenizers append eos by themselves
        ids = ids[:-1] if ids[-1] == tok.eos_token_id else ids
    # A template may write bos, and the tokenizer once more
    return ids[1:] if ids[:2] == [tok.bos_token_id] * 2 else ids


def encode_response(tok, text, ended=True):
    """Response -> ids, with eos if it ended."""
    # Eos by hand, as some tokenizers ignore add_eos_token
    ids = tok(only_text(tok, text), add_special_tokens=False)["input_ids"]
    return ids + [tok.eos_token_id] if ended else ids


def encode_row(tok, row):
    """The response of a data row -> ids, without an eos where the row says that it was cut."""
    # tools/label.py writes the sampled ids: text that is encoded anew may become other tokens
    if "ids" in row and row.get("tokenizer") == tokenizer_fingerprint(tok):
        return row["ids"]
    return encode_response(tok, row["response"], row.get("ended", True))


def append_to_prefix(tok, prefix, ids):
    """prefix + ids, with bos only at the beginning."""
    # A bos that opens every turn, as in ChatML, stays
    opens_text = ids[:1] == [tok.bos_token_id] and ids.count(tok.bos_token_id) == 1
    if prefix and opens_text and tok.bos_token_id != tok.eos_token_id:
        return prefix + ids[1:]
    return prefix + ids


def prepend_tau(tok, pairs, prompt, max_length, tau_length):
    """Pairs of (prompt ids, response ids) in front of a prompt -> ids, spans of the responses.

    Responses are cut to tau_length tokens. A pair with which the ids, prompt included, would be longer than
    max_length is left out. A span is (number of the pair, begin, end).
    """
    prefix = []
    spans = []
    for k, (p, r) in enumerate(pairs):
        longer = append_to_prefix(tok, prefix, p)
        end = len(longer) + len(r[:tau_length])
        if end + len(prompt) <= max_length:
            spans.append((k, len(longer), end))
            prefix = longer + r[:tau_length]
    return append_to_prefix(tok, prefix, prompt), spans


def room_for_tau(gvm, args, pairs):
    """Tokens that tau may have, so that the GVM reads no position that it was not trained on."""
    length = args.max_prompt_length + args.max_new_tokens
    answer = min(gvm["tau_length"], args.max_new_tokens)
    room = gvm["max_length"] - length
    if room < 0 or (pairs and room <= answer):
        die(f"--gvm {args.gvm}: trained on {gvm['max_length']} tokens, too few for {length} of prompt "
            f"and response and over {answer} of tau; lower --max-new-tokens or --max-prompt-length, or "
            "train the GVM with a larger --max-length")
    return room


def draw_tau(tok, buffer, pairs, room, tau_length, rng):
    """Up to `pairs` of the buffer (prompts, responses), at least one -> ids of tau, how many are in it."""
    if not pairs:
        return [], 0
    answered = list(zip(*buffer, strict=True))
    ids = []
    shown = 0
    for i in rng.permutation(len(answered)):
        # A pair that does not fit is passed over for another
        prompt, response = answered[i]
        longer = append_to_prefix(tok, ids, prompt) + response[:tau_length]
        if shown < pairs and len(longer) <= room:
            ids = longer
            shown += 1
    if not shown:
        # No pair fits whole: cut the middle out of the shortest prompt
        prompt, response = min(answered, key=lambda pair: len(pair[0]))
        response = response[:tau_length]
        ids = cut_prompt(tok, prompt, room - len(response)) + response
    return ids, max(1, shown)


def frame(prompts, responses, device="cpu"):
    """Lists of ids -> ids (B, P+T), attn (B, P+T), mask (B, T)."""
    P = max(map(len, prompts))
    # One T on all ranks, or ZeRO-3 would hang
    T = all_max(max(map(len, responses)))
    ids, attn = torch.zeros(2, len(prompts), P + T, dtype=torch.long)
    for row, (p, r) in enumerate(zip(prompts, responses, strict=True)):
        real = slice(P - len(p), P + len(r))
        ids[row, real] = torch.tensor(p + r)
        attn[row, real] = 1
    return ids.to(device), attn.to(device), attn[:, P:].bool().to(device)


def pack(tok, row, before, max_length, tau_length):
    """The rows `before`, then this row -> ids, spans [(row, begin, end), ...] of responses.

    The responses of `before` are cut to tau_length tokens. All that stands in front of the last response
    gets at most half of max_length.
    """
    pairs = [(encode_prompt(tok, r["prompt"]), encode_row(tok, r)) for r in before]
    half = max_length // 2
    prompt = encode_prompt(tok, row["prompt"], half)
    ids, spans = prepend_tau(tok, pairs, prompt, half, tau_length)
    response = encode_row(tok, row)[:max_length - len(ids)]         # one that is cut here has no eos
    spans = [(before[k], begin, end) for k, begin, end in spans]
    return ids + response, [*spans, (row, len(ids), len(ids) + len(response))]


def read_pairs(paths, tok, max_length):
    """Rows {prompt, chosen, rejected}; says how many of them are cut to max_length tokens."""
    keys = ["prompt", "chosen", "rejected"]
    pairs = [pair for path in paths for pair in read_rows(path, keys, tok=tok)]
    check_lengths(pairs, lambda pair: encode_whole(tok, one_side(pair, "chosen")), max_length)
    return pairs


def encode_whole(tok, row):
    """A row without a tau, uncut -> ids."""
    return encode_prompt(tok, row["prompt"]) + encode_row(tok, row)


def read_prompts(tok, path, max_length, flag="--max-prompt-length"):
    """Rows {prompt}; says how many of them are cut to max_length tokens."""
    rows = read_rows(path, ["prompt"], tok=tok)
    check_lengths(rows, lambda row: encode_prompt(tok, row["prompt"]), max_length, flag)
    return rows


def packed_frame(sequences, device="cpu"):
    """What pack returned, B times -> ids, attn (B, P+T), mask (B, T), True on every response."""
    prompts = []
    responses = []
    for ids, spans in sequences:
        _, begin, _ = spans[0]                          # of the first response
        prompts.append(ids[:begin])
        responses.append(ids[begin:])
    ids, attn, mask = frame(prompts, responses, device)
    mask[:] = False
    for row, prompt, (_, spans) in zip(mask, prompts, sequences, strict=True):
        for _, begin, end in spans:
            row[begin - len(prompt):end - len(prompt)] = True
    return ids, attn, mask


def pair_frame(tok, pairs, max_length, device):
    """B pairs -> the frame of 2 B rows without tau: the chosen answers, then the rejected."""
    rows = [one_side(pair, side) for side in ("chosen", "rejected") for pair in pairs]
    return packed_frame([pack(tok, row, [], max_length, 0) for row in rows], device)


def append_responses(ids, attn, response, mask):
    """Prompts (B, P) and what a rollout sampled, (B, T), as one frame; T is the longest of all ranks."""
    T = all_max(int(mask.any(0).sum()))
    missing = (0, max(0, T - mask.shape[1]))
    response = F.pad(response[:, :T], missing)
    mask = F.pad(mask[:, :T], missing)
    return torch.cat([ids, response], 1), torch.cat([attn, mask.long()], 1), mask


def unpad(ids, mask):
    """The responses of a frame as lists of ids."""
    return [row[m].tolist() for row, m in zip(ids[:, -mask.shape[1]:], mask, strict=True)]


def sort_by_length(order, attn, size):
    """Row numbers (B,), each optimizer batch of `size` sorted by length."""
    # Rows of like length in one micro-batch need less padding
    length = attn.sum(1)
    batches = order.to(attn.device).split(size)
    return torch.cat([rows[length[rows].argsort(stable=True)] for rows in batches])


@torch.no_grad()
def evaluate(run, model, policy, trunk, tok, rows, reward, adapter=None, n=256, about=None):
    """Means over about n held-out prompts -> OUT/summary.json, the answers -> OUT/samples.jsonl.

    trunk: the reference of the KL, or None. about: what else the summary says.
    """
    args = run.args
    stride = args.batch_size * run.world
    batches = -(-n // stride)
    actor = run.actor(model)
    policy.eval()
    sums = {}
    samples = []
    for i in range(batches):
        # 1. Rollout, of this rank's prompts
        index = range(i * stride + run.rank, (i + 1) * stride, run.world)
        prompts = [rows[j % len(rows)]["prompt"] for j in index]
        prompt_ids = [encode_prompt(tok, p, args.max_prompt_length) for p in prompts]
        ids, attn, mask, ended = rollout(actor, prompt_ids, tok, args, run.device, adapter)
        texts = tok.batch_decode(unpad(ids, mask), skip_special_tokens=True)
        answers = list(zip(prompts, texts, ended.tolist(), strict=True))
        samples += [dict(prompt=p, response=text, ended=end) for p, text, end in answers]

        # 2. Means over the answers and ranks
        found = dict(ended=ended.float().mean(), length=mask.sum(1).float().mean())
        if trunk is not None:
            batch = (ids, attn, mask.shape[1])
            logp = policy(*batch, adapter, temperature=args.temperature)
            ref_logp = trunk(*batch, None, temperature=args.temperature)
            found["kl"] = ((logp - ref_logp) * mask).sum(1).mean()
        if reward:
            found["gold"] = np.mean([reward(p, text) for p, text, _ in answers])
        for key, value in mean_over_ranks(found).items():
            sums[key] = sums.get(key, 0.0) + value / batches
    run.write("summary.json", (about or {}) | sums | dict(rollouts=batches * stride))
    run.write_lines("samples.jsonl", samples)           # those of rank 0
    numbers = ", ".join(f"{key} {value:.3f}" for key, value in sums.items())
    run.say(f"fresh answers to held-out prompts: {numbers}; wrote {args.out}/model")
