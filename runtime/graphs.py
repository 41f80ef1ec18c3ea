"""Graphs: --static-cache, a rollout whose decode step CUDA records once and then replays.

Without a graph the host launches every kernel of every layer for every token, and the GPU waits. A graph
needs memory that never moves: a KV cache of full length from the start.
Open this file to make rollouts faster, or for an architecture with another attention or cache.
"""
import re

import torch
import torch.nn.functional as F
from transformers import StaticCache

from runtime.processes import die


class StaticDecoder:
    """A common.Decoder that has read the prompts, with room for `new` tokens: same calls, same logits.

    The graph and the cache live for one rollout, so that no address of a weight outlives an update.
    """

    stream = None                                       # one for all: cuBLAS keeps a workspace per stream

    def __init__(self, decoder, new):
        config, prompts, length = decoder.trunk.config, decoder.cache, decoder.positions.shape[1]
        total = -(-(length + new) // 64) * 64
        decoder.cache = StaticCache(config=config, max_cache_len=total)
        moving = re.search("dynamic|longrope", str(getattr(config, "rope_parameters", "")))
        if config._attn_implementation != "sdpa" or any(decoder.cache.is_sliding) or moving:
            die("--static-cache: this architecture's attention is not scaled_dot_product over all tokens, or "
                "its positions depend on the length; leave the flag out")
        for i, layer in enumerate(prompts.layers):
            decoder.cache.update(layer.keys, layer.values, i)
            layer.keys = layer.values = None            # never hold both caches
        mask = torch.ones_like(decoder.positions) if decoder.mask is None else decoder.mask
        decoder.mask = F.pad(mask.bool(), (0, total - length))[:, None, None]      # (B, 1, 1, total)
        decoder.positions = decoder.positions[:, -1:].clone()
        self.decoder, self.logits, self.graph = decoder, decoder.logits, None
        self.token, self.end = decoder.positions.clone(), torch.tensor([length], device=mask.device)

    def append(self):
        """Append self.token, all in place and without the host: what a graph can hold."""
        self.decoder.mask.index_fill_(3, self.end, True)
        self.end += 1
        self.decoder.positions += 1
        self.logits.copy_(self.decoder.step(self.token))

    def __call__(self, token):
        self.token.copy_(token[:, None])
        if self.graph:
            self.graph.replay()
        elif not token.is_cuda:
            self.append()
        else:                                           # run once, to warm up; then record for later calls
            StaticDecoder.stream = self.stream or torch.cuda.Stream()
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                self.append()
            torch.cuda.current_stream().wait_stream(self.stream)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="thread_local"):
                self.append()
