"""Graphs: --compile for passes over whole rows, --static-cache for rollouts.

Without a compiler each norm and each rotary embedding is a dozen kernels. A rollout has a second cost: the
host launches every kernel of every layer for every token, and the GPU waits. So its step is also recorded as
a CUDA graph and replayed. A graph needs memory that never moves: a KV cache of full length from the start.
Open this file to make runs faster, or for an architecture with another attention or cache.
"""
import contextlib
import functools
import re

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, StaticCache
from transformers.cache_utils import Cache, LinearAttentionCacheLayerMixin, StaticLayer

from runtime.processes import CUDA, say

# A resumed run gets the same kernels. In a rollout only the length changes, and is marked.
OPTIONS = dict(force_pointwise_cat=True, deterministic=True)
say_once = functools.cache(say)


@contextlib.contextmanager
def merged(model, adapter, args):
    """Inside, the adapter is part of the weights, so that a token costs what it does without one.

    Yields the name of the adapter that is left to switch on: None once it is merged. Afterwards the weights
    have their own bits again. With --gradient-checkpointing, which saves memory, nothing is merged.
    """
    if adapter is None or getattr(args, "gradient_checkpointing", False):
        yield adapter
        return
    weights = [layer.base.weight.detach() for layer in model.lora_layers()]
    kept = [weight.clone() for weight in weights]       # lies where activations will
    try:
        for weight, layer in zip(weights, model.lora_layers(), strict=True):
            weight.copy_(weight.float() + layer.delta(adapter).detach())
        yield None
    finally:
        for weight, own in zip(weights, kept, strict=True):
            weight.copy_(own)


class Layer(StaticLayer):
    """The KV cache of one layer at its full length, keys and values in one tensor: one write per token."""

    def __init__(self, prompts, total, end):
        super().__init__(total)
        B, heads, length, width = prompts.keys.shape
        self.kv = prompts.keys.new_zeros(2, B, heads, total, width)
        self.kv[0, :, :, :length] = prompts.keys
        self.kv[1, :, :, :length] = prompts.values
        self.cumulative_length, self.is_initialized = end, True         # (1,): where the next token goes
        torch._dynamo.maybe_mark_dynamic(self.kv, 3)    # one compiled block serves every length

    def update(self, key, value, *args, **kwargs):
        self.kv.index_copy_(3, self.cumulative_length, torch.stack((key, value)))
        return self.kv[0], self.kv[1]


def one_token(module, query, key, value, mask, scaling=None, **kwargs):
    """Attention of one token per row; the query heads that share a key are rows of one product.

    Inside a compiled block, transformers would repeat keys and values for each of them.
    """
    B, heads, _, width = query.shape
    query = query.reshape(B, key.shape[1], -1, width)   # (B, heads of K, heads that share one, width)
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling)
    return out.reshape(B, 1, heads, -1), None


AttentionInterface.register("one_token", one_token)


@functools.cache
def compiled_block(dynamic=False):
    """One compiled function for all blocks: their weights and caches are its inputs.

    dynamic: for whole rows, of any number and length.
    """
    def run_block(block, *args, **kwargs):
        return type(block).forward(block, *args, **kwargs)

    # For every adapter, with a gradient and without, a row alone, and so on
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(run_block, fullgraph=True, dynamic=dynamic, options=OPTIONS)


def blocks_of(trunk):
    """The transformer blocks of a text model."""
    lists = [m for m in trunk.modules() if isinstance(m, torch.nn.ModuleList)]
    return next((m for m in lists if len(m) == trunk.config.num_hidden_layers), [])


def compile_blocks(model):
    """--compile: forward and backward passes without a KV cache run compiled blocks.

    The number of a layer would be compiled into a block with a cache.
    """
    compiles = True

    def forward(block, *args, **kwargs):
        nonlocal compiles
        has_cache = any(isinstance(x, Cache) for x in (*args, *kwargs.values()))
        if compiles and not has_cache:
            try:
                return compiled_block(dynamic=True)(block, *args, **kwargs)
            except torch.OutOfMemoryError:
                raise
            except Exception as e:                      # no compiler, or a block that it does not understand
                compiles = False
                say_once(f"--compile: going on without ({type(e).__name__}: {str(e)[:80]!r})")
        return type(block).forward(block, *args, **kwargs)

    for block in blocks_of(model.lm.get_decoder()):
        block.forward = functools.partial(forward, block)


def unfit(decoder):
    """Why this architecture cannot have a static cache, or None."""
    config = decoder.trunk.config
    if any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in decoder.cache.layers):
        return "it has recurrent layers"
    sliding = StaticCache(config=config, max_cache_len=1).is_sliding
    if config._attn_implementation != "sdpa" or any(sliding):
        return "its attention is not scaled_dot_product over all tokens"
    if any(layer.keys.shape != layer.values.shape for layer in decoder.cache.layers):
        return "its keys and values have different widths"
    if re.search("dynamic|longrope", str(getattr(config, "rope_parameters", ""))):
        return "its positions depend on the length"


def static_decoder(decoder, new):
    """A StaticDecoder where the architecture allows one; or else the decoder as it is, and a line."""
    if reason := unfit(decoder):
        say_once(f"--static-cache: not for this architecture ({reason}); decoding without")
        return decoder
    return StaticDecoder(decoder, new)


class StaticDecoder:
    """A common.Decoder that has read the prompts, with room for `new` tokens: same calls, same logits.

    The compiled block is kept for the whole run. Graph and cache live for one rollout: recording costs the
    launches of one token, and an update needs their memory.
    """

    stream = None                                       # one for all: cuBLAS keeps a workspace per stream
    compiles = CUDA                                     # until it fails; on a CPU it does not pay

    def __init__(self, decoder, new):
        layers = decoder.cache.layers
        length = decoder.positions.shape[1]
        total = -(-(length + new) // 64) * 64
        real = torch.ones_like(decoder.positions) if decoder.mask is None else decoder.mask
        real = F.pad(real, (0, total - length))[:, None, None]                     # (B, 1, 1, total)
        decoder.mask = decoder.logits.new_zeros(real.shape, dtype=layers[0].keys.dtype)
        decoder.mask.masked_fill_(real == 0, -torch.inf)
        torch._dynamo.maybe_mark_dynamic(decoder.mask, 3)
        self.end = torch.tensor([length], device=real.device)
        static = []
        for layer in layers:
            static.append(Layer(layer, total, self.end))
            layer.keys = layer.values = None            # never hold both caches
        decoder.cache = Cache(layers=static)
        decoder.positions = decoder.positions[:, -1:].clone()
        self.decoder = decoder
        self.logits = decoder.logits
        self.token = decoder.positions.clone()
        self.graph = None
        self.warm = 0                                   # calls without a graph
        self.blocks = blocks_of(decoder.trunk)

    def run_compiled(self, block, layer, *args, **kwargs):
        """A block whose cache is its own layer: the number of the layer would be compiled into it."""
        def own(x):
            return layer if x is self.decoder.cache else x

        return compiled_block()(block, *map(own, args), **{key: own(x) for key, x in kwargs.items()})

    def step(self):
        """Logits after self.token. Half a step does no harm: the same step, uncompiled, writes over it."""
        config = self.decoder.trunk.config
        blocks = self.blocks if StaticDecoder.compiles else []
        forwards = [block.forward for block in blocks]
        config._attn_implementation = "one_token"
        for block, layer in zip(blocks, self.decoder.cache.layers, strict=False):   # all, or none
            block.forward = functools.partial(self.run_compiled, block, layer)
        try:
            return self.decoder.step(self.token)
        except Exception as e:                          # no compiler, or a block that it does not understand
            if not blocks:
                raise
            self.give_up(e)
        finally:
            for block, forward in zip(blocks, forwards, strict=True):
                block.forward = forward
            config._attn_implementation = "sdpa"
        return self.step()

    def give_up(self, error):
        StaticDecoder.compiles = False
        say_once(f"torch.compile: decoding goes on without ({type(error).__name__}: {str(error)[:80]!r})")

    def append(self):
        """Append self.token, all in place and without the host: what a graph can hold."""
        self.decoder.mask.index_fill_(3, self.end, 0)
        self.decoder.positions += 1
        self.logits.copy_(self.step())
        self.end += 1

    def __call__(self, token):
        self.token.copy_(token[:, None])
        if self.graph:
            self.graph.replay()
        elif not token.is_cuda:
            self.append()
        else:                                           # twice as it is: compile, warm up; then record
            StaticDecoder.stream = self.stream or torch.cuda.Stream()
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                self.append()
            torch.cuda.current_stream().wait_stream(self.stream)
            self.warm += 1
            if self.warm == 2:
                self.record()

    def record(self):
        """The graph of one call, for later ones. Recording runs nothing."""
        graph = torch.cuda.CUDAGraph()
        compiles = StaticDecoder.compiles
        try:
            with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                self.append()
            self.graph = graph
        except Exception as e:
            if not compiles:
                raise
            self.give_up(e)
            self.warm = 0                               # warm up again, and record the plain step
