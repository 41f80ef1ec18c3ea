import itertools
import math

import torch
from helpers import PROMPT, Args, close, tiny_gpt2, tiny_llama

import common
import dvpo
import ppo_baseline
from data import toy


def test_greedy_rollout_equals_generate():
    tok, args = toy.tokenizer(), Args()
    args.temperature = 1e-6  # the token loop, made greedy
    prompts = [common.encode_prompt(tok, p) for p in (PROMPT, "review the wine .")]
    for model in (tiny_gpt2(3), tiny_llama(3)):
        for module, args.static_cache in itertools.product((dvpo, ppo_baseline), (False, True)):
            ids, attn, mask, ended = module.rollout(model, prompts, tok, args, "cpu")
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
    ids, attn, mask, ended = dvpo.rollout(model, prompts, tok, args, "cpu")
    P = ids.shape[1] - mask.shape[1]
    with torch.no_grad():
        logp = model(ids, attn, mask.shape[1], temperature=0.8)
        growing, static = (common.Decoder(model, ids[:, :P], attn[:, :P]) for _ in range(2))
        for decode in growing, common.StaticDecoder(static, mask.shape[1]):
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
    ids, *_ = dvpo.rollout(model, [p] * 4000, tok, args, "cpu")
    want = model.lm(torch.tensor([p])).logits[0, -1].softmax(-1)
    seen = torch.bincount(ids[:, -1], minlength=len(tok)) / 4000
    assert (seen - want).abs().max() < 4 * math.sqrt(0.25 / 4000)


def test_draw_equals_a_plain_cumsum():
    """Two steps, block and word, choose what one running sum does; words of probability 0 are never drawn."""
    torch.manual_seed(0)
    for V in 50, 8193, 50257, 128256:                   # one block; a last block that is not full; one that is
        p = (3 * torch.randn(4, V)).softmax(-1)
        p[:, torch.rand(V) < 0.3] = 0.0                 # among them often the first and the last
        p[:, -V // 9:] = 0.0
        cdf = p.double().cumsum(-1)
        edges = torch.tensor([0.0, 2**-60, 0.5, 1 - 2**-53], dtype=torch.float64).view(4, 1, 1).expand(4, 4, 1)
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
