import contextlib
import io
import math
import re
import shutil
from unittest import mock

import pytest
import torch
from helpers import PROMPT, Args, close, tiny_gpt2, tiny_llama
from transformers import AutoConfig, AutoModelForCausalLM

import common
from data import toy
from runtime import graphs


def test_greedy_rollout_equals_generate():
    tok, args = toy.tokenizer(), Args()
    args.temperature = 1e-6  # the token loop, made greedy
    prompts = [common.encode_prompt(tok, p) for p in (PROMPT, "review the wine .")]
    model = tiny_llama(3)                               # test_smoke.py has a GPT-2
    for args.static_cache in (False, True):
        ids, attn, mask, ended = common.rollout(model, prompts, tok, args, "cpu")
        P = ids.shape[1] - mask.shape[1]
        want = model.lm.generate(ids[:, :P], attention_mask=attn[:, :P], do_sample=False,
                                 max_new_tokens=24, pad_token_id=tok.pad_token_id,
                                 eos_token_id=tok.eos_token_id)
        got = ids.masked_fill(attn == 0, tok.pad_token_id)
        assert torch.equal(got[:, :want.shape[1]], want), (got, want)


def test_rollout_logp_equals_teacher_forced():
    """The distribution that was sampled from is the one that is scored, token by token."""
    tok, args, model = toy.tokenizer(), Args(), tiny_gpt2(1)
    args.temperature = 0.8
    prompts = [common.encode_prompt(tok, p) for p in (PROMPT, "review the wine .")] * 4
    torch.manual_seed(0)
    ids, attn, mask, ended = common.rollout(model, prompts, tok, args, "cpu")
    P = ids.shape[1] - mask.shape[1]
    with torch.no_grad():
        logp = model(ids, attn, mask.shape[1], temperature=0.8)
        growing, static = (common.Decoder(model, ids[:, :P], attn[:, :P]) for _ in range(2))
        for decode in growing, graphs.StaticDecoder(static, mask.shape[1]):
            for t in range(mask.shape[1]):
                step = (decode.logits / 0.8).log_softmax(-1).gather(1, ids[:, P + t, None]).squeeze(1)
                close((step * mask[:, t]), (logp[:, t] * mask[:, t]), 1e-4)
                decode(ids[:, P + t])
    for b in range(len(prompts)):  # the mask ends with the first eos
        r = ids[b, P:][mask[b]].tolist()
        assert tok.eos_token_id not in r[:-1] and bool(ended[b]) == (r[-1] == tok.eos_token_id)


def test_sampling_follows_the_distribution():
    tok, args, model = toy.tokenizer(), Args(), tiny_gpt2(1)
    args.max_new_tokens = 1
    p = common.encode_prompt(tok, PROMPT)
    torch.manual_seed(0)
    ids, *_ = common.rollout(model, [p] * 4000, tok, args, "cpu")
    want = model.lm(torch.tensor([p])).logits[0, -1].softmax(-1)
    seen = torch.bincount(ids[:, -1], minlength=len(tok)) / 4000
    assert (seen - want).abs().max() < 4 * math.sqrt(0.25 / 4000)


def test_draw_equals_a_plain_cumsum():
    """Block, then word: the choice of one running sum over all; a word of probability 0 is never drawn."""
    torch.manual_seed(0)
    for V in 50, 8193, 50257, 128256:                   # one block; a last one in part; full ones
        p = (3 * torch.randn(4, V)).softmax(-1)
        p[:, torch.rand(V) < 0.3] = 0.0                 # among them often the first and the last
        p[:, -V // 9:] = 0.0
        cdf = p.double().cumsum(-1)
        edges = [torch.full((4, 1), u, dtype=torch.float64) for u in (0.0, 2**-60, 0.5, 1 - 2**-53)]
        for u in [*torch.rand(50, 4, 1, dtype=torch.float64), *edges]:
            token = common.draw(p, u)
            want = torch.searchsorted(cdf, u * cdf[:, -1:], right=True).squeeze(1)
            assert torch.equal(token, want.clamp(max=V - 1)) or u[0] > 1 - 2**-52
            assert (p.gather(1, token[:, None]) > 0).all() and (token < V).all()
    word = torch.full((3, 9000), 0.0)
    for i in 0, 255, 256, 8999:                         # a single word, at the edges of blocks
        word.zero_()[:, i] = 1e-30
        assert (common.draw(word, torch.tensor([[0.0], [0.5], [1 - 2**-53]], dtype=torch.float64)) == i).all()


def test_draw_follows_the_distribution():
    """Shares of 20,000 draws from 9,000 words in blocks of unlike weight: chi squared over 40 groups."""
    torch.manual_seed(1)
    p = torch.randn(9000).mul(2).softmax(-1)
    u = torch.rand(20_000, 1, dtype=torch.float64)
    drawn = torch.cat([common.draw(p.expand(len(part), -1), part) for part in u.split(400)])
    group = torch.arange(9000) % 40
    want = 20_000 * torch.zeros(40).index_add(0, group, p)
    seen = torch.bincount(group[drawn], minlength=40)
    assert seen.sum() == 20_000 and ((seen - want)**2 / want).sum() < 73  # 39 degrees of freedom: p = 0.001


def narrow_llama(layers):
    config = AutoConfig.for_model("llama", vocab_size=512, hidden_size=96, intermediate_size=256,
                                  num_hidden_layers=layers, num_attention_heads=6, num_key_value_heads=2)
    torch.manual_seed(0)
    return common.LM(AutoModelForCausalLM.from_config(config).eval())


NO_KERNEL = re.compile(r"aten::(as_strided|view|_?reshape(_alias)?|_unsafe_view|resolve_\w+|empty\w*|"
                       r"resize_|to|result_type|scalar_tensor|expand|transpose|t|slice|select|"
                       r"(un)?squeeze|detach_?|_local_scalar_dense|item|alias|dropout|lift_fresh)$")


def kernels(decode, token):
    """What one token would launch: generated kernels, and aten operations that are made of no others."""
    def count(event):
        inner = sum(map(count, event.cpu_children))
        name = event.name
        counts = "cpp_fused" in name or (name.startswith("aten::") and not NO_KERNEL.match(name))
        return inner or counts

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        decode(token)
    return sum(count(event) for event in seen.events() if event.cpu_parent is None)


def decoders(model, lengths, new):
    """Rows left-padded to these lengths: a plain decoder, and one with a static cache."""
    attn = (torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(0, 512, attn.shape)
    return common.Decoder(model, ids, attn), common.static_decoder(common.Decoder(model, ids, attn), new)


@torch.no_grad()
def test_compiled_blocks():
    """One compiled block serves 28 layers, prompts of any length, and saves most of a token's kernels."""
    if not shutil.which("g++"):
        pytest.skip("no compiler")
    model, token = narrow_llama(28), torch.randint(0, 512, (9, 4))
    options = graphs.OPTIONS | {"cpp.enable_kernel_profile": True}         # shows generated kernels
    torch._dynamo.reset()
    graphs.compiled_block.cache_clear()
    with mock.patch.object(graphs, "OPTIONS", options):
        for lengths in (20, 9, 20, 3), (70, 70, 70, 70):
            growing, static = decoders(model, lengths, 30)
            before = kernels(static, token[0])          # on a CPU blocks are compiled only where asked
            growing(token[0])
            with mock.patch.object(graphs.StaticDecoder, "compiles", True):
                for t in token[1:]:
                    growing(t)
                    static(t)
                    close(static.logits, growing.logits, 1e-4)
                after = kernels(static, token[0])
                assert graphs.StaticDecoder.compiles
    assert 1000 < before < 1200 and after <= 400, (before, after)
    assert all(block.forward == type(block).forward.__get__(block) for block in model.lm.model.layers)
    found = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert found == 1, found
    graphs.compiled_block.cache_clear()


def test_compiled_passes():
    """--compile: few graphs for all layers and rows of any number and length; equal gradients."""
    if not shutil.which("g++"):
        pytest.skip("no compiler")
    torch._dynamo.reset()
    graphs.compiled_block.cache_clear()
    model = narrow_llama(5)
    model.requires_grad_(False).add_adapter("policy", 4, 8)
    model.lm.get_input_embeddings().requires_grad_(True)        # one kind of input for all blocks
    own = model.adapter_parameters("policy").values()
    for p in own:
        torch.nn.init.normal_(p, std=0.1)

    def log_probs(rows, length):
        """With a gradient, as in training, and without, as in scoring."""
        ids = torch.randint(0, 512, (rows, length), generator=torch.Generator().manual_seed(length))
        logp = model(ids, torch.ones_like(ids), length // 2, "policy")
        with torch.no_grad():
            scored = model(ids, torch.ones_like(ids), length // 2, "policy")
        return logp, scored, torch.autograd.grad(logp.sum(), own)

    shapes = (2, 30), (4, 19), (3, 64)
    want = [log_probs(*shape) for shape in shapes]
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        graphs.compile_blocks(model)
        for shape, (logp, _, gradients) in zip(shapes, want, strict=True):
            compiled, scored, compiled_gradients = log_probs(*shape)
            close(compiled, logp, 1e-5)
            assert (scored - compiled).abs().max() < 1e-6           # the first ratio
            for a, b in zip(compiled_gradients, gradients, strict=True):
                close(a, b, 1e-4)
    found = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert 2 <= found <= 3 and not said.getvalue(), (found, said.getvalue())
    graphs.compiled_block.cache_clear()


@torch.no_grad()
def test_without_a_compiler():
    """Where torch.compile fails, at once or in the block, the plain step runs, and one line says so."""
    graphs.say_once.cache_clear()
    model, token, said = narrow_llama(2), torch.randint(0, 512, (5, 4)), io.StringIO()
    story = "no compiler\nlong story"

    def compiles_nothing(function, **options):
        def fails(block, hidden, *args, **kwargs):
            if cache := kwargs["past_key_values"]:
                cache.update(*torch.randn(2, 4, 2, 1, 16))                          # half a step is done
            raise RuntimeError(story)
        return fails

    for compile_ in (compiles_nothing, mock.Mock(side_effect=RuntimeError(story))):
        graphs.compiled_block.cache_clear()
        growing, static = decoders(model, (9, 4, 9, 2), 30)
        with (mock.patch("torch.compile", compile_), contextlib.redirect_stderr(said),
              mock.patch.object(graphs.StaticDecoder, "compiles", True)):
            for t in token:
                growing(t)
                static(t)
                close(static.logits, growing.logits, 1e-4)
            assert not graphs.StaticDecoder.compiles
            ids = torch.randint(0, 512, (2, 9))
            want = model(ids, torch.ones_like(ids), 4)
            graphs.compile_blocks(model)
            close(model(ids, torch.ones_like(ids), 4), want, 0)
    graphs.compiled_block.cache_clear()
    lines = [f"torch.compile: decoding goes on without (RuntimeError: {story!r})"]
    lines.append(f"--compile: going on without (RuntimeError: {story!r})")
    assert said.getvalue().splitlines() == lines


@torch.no_grad()
def test_no_static_cache_where_it_does_not_fit():
    graphs.say_once.cache_clear()
    model, said = narrow_llama(1), io.StringIO()
    model.lm.config.rope_parameters = dict(rope_type="dynamic", factor=2.0, rope_theta=1e4)
    with contextlib.redirect_stderr(said):
        for _ in range(2):
            _, same = decoders(model, (9, 4), 30)
            assert type(same) is common.Decoder
    assert said.getvalue().count("\n") == 1 and "its positions depend on the length" in said.getvalue()


def test_merged_adapter():
    """A rollout decodes with the adapter in the weights, which then have their own bits again."""
    tok, args, model = toy.tokenizer(), Args(), tiny_llama(3)
    model.requires_grad_(False).add_adapter("policy", 4, 8)
    for layer in model.lora_layers():
        torch.nn.init.normal_(layer.B["policy"].weight, std=0.3)
    own = {key: p.clone() for key, p in model.named_parameters()}
    prompts = [common.encode_prompt(tok, p) for p in (PROMPT, "review the wine .")]
    ids, attn, _ = common.frame(prompts, [[], []])
    args.temperature = 1e-6
    want = common.Decoder(model, ids, attn, "policy").logits
    with graphs.merged(model, "policy", args) as left:
        assert left is None
        close(common.Decoder(model, ids, attn).logits, want, 1e-4)
        assert (common.Decoder(model, ids, attn, "policy").logits - want).abs().max() > 0.01      # twice
    active = []
    with mock.patch.object(common.Decoder, "__init__", autospec=True,
                           side_effect=lambda self, model, ids, attn, name: active.append(name)):
        for args.gradient_checkpointing in (False, True):
            with contextlib.suppress(AttributeError):
                common.rollout(model, prompts, tok, args, "cpu", "policy")
    assert active == [None, "policy"]                   # --gradient-checkpointing: memory before speed
    plain = common.rollout(model, prompts, tok, args, "cpu", "policy")
    del args.gradient_checkpointing
    out = common.rollout(model, prompts, tok, args, "cpu", "policy")
    assert all(torch.equal(a, b) for a, b in zip(out, plain, strict=True))         # greedy: the same tokens
    for key, p in model.named_parameters():
        assert torch.equal(p, own[key]), key
