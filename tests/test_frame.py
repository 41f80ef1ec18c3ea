from unittest import mock

import pytest
import torch
from helpers import PROMPT, close, example_frame, mask_and_first, path, tiny_gpt2, tiny_llama

import common
import sft
from data import toy
from runtime import checkpoints


def test_frame_positions_against_a_slow_loop():
    """Of rotary positions; test_smoke.py has learned ones."""
    tok = toy.tokenizer()
    for model in (tiny_llama(),):
        model.add_head("v")
        torch.nn.init.normal_(model.heads["v"].weight, std=0.1)
        prompts, responses, ids, attn, mask = example_frame(tok)

        def value_of(text, model=model):
            hidden = model.lm.base_model(torch.tensor([text])).last_hidden_state[0, -1]
            return model.heads["v"](hidden)[0]

        with torch.no_grad():
            logp = model(ids, attn, mask.shape[1], temperature=0.7)
            value = model(ids, attn, mask.shape[1], head="v")
            for b, (p, r) in enumerate(zip(prompts, responses, strict=True)):
                close(value[b, 0], value_of(p), 1e-5)
                for t in range(len(r)):                 # logp[t] is read before a_t, and Q[t] after it
                    logits = model.lm(torch.tensor([p + r[:t]])).logits[0, -1]
                    close(logp[b, t], (logits / 0.7).log_softmax(-1)[r[t]], 1e-5)
                    close(value[b, t + 1], value_of(p + r[:t + 1]), 1e-5)
        assert mask.sum(1).tolist() == [len(r) for r in responses]


def test_left_padding_changes_nothing():
    tok, model = toy.tokenizer(), tiny_gpt2()
    outs = []
    for pad_left in (0, 7):
        _, _, ids, attn, mask = example_frame(tok, pad_left)
        with torch.no_grad():
            outs.append(model(ids, attn, mask.shape[1]) * mask)
    close(outs[0], outs[1], 1e-6)


def test_a_prefix_read_once_is_a_prefix_read_with_every_row():
    """One cached tau equals the same tau in front of each row, and the cache can be used again."""
    tok = toy.tokenizer()
    for model in (tiny_gpt2(), tiny_llama()):
        model.add_adapter("gvm", 4, 8.0)
        model.add_head("gvm", sees_token=True)
        for k, p in model.named_parameters():
            if ".B." in k or "heads" in k:
                torch.nn.init.normal_(p, std=0.1)
        prompts, responses, ids, attn, mask = example_frame(tok)
        prefix = prompts[1] + responses[1]
        long = common.frame([prefix + p for p in prompts], responses)
        T, states = mask.shape[1], mask_and_first(mask)
        with torch.no_grad():
            want = model(*long[:2], T, "gvm", head="gvm")
            tau = common.read_prefix(model, prefix, "gvm", "gvm", "cpu")
            for _ in range(2):
                got = model(ids, attn, T, "gvm", head="gvm", cache=tau(2))
                close(got[states], want[states], 1e-5)
            assert common.read_prefix(model, [], "gvm", "gvm", "cpu") is None
            alone = model(ids, attn, T, "gvm", head="gvm")
            assert (alone - want).abs().max() > 1e-3    # it does matter


def test_eos_is_trained_although_it_may_be_the_filler():
    """Masks come from lengths: token 0 fills the frame, and some tokenizers have it as eos."""
    tok = toy.tokenizer()
    tok.eos_token = tok.convert_ids_to_tokens(0)
    _, responses, ids, attn, mask = example_frame(tok)
    for b, r in enumerate(responses):
        assert r[-1] == tok.eos_token_id and mask[b, len(r) - 1] and not mask[b, len(r):].any()
    model = tiny_gpt2()
    logp = model(ids, attn, mask.shape[1])
    logp.retain_grad()
    sft.sft_loss(logp, mask, mask.sum()).backward()
    assert (logp.grad[mask] != 0).all() and (logp.grad[~mask] == 0).all()


def test_bos_once_and_behind():
    tok = toy.tokenizer()
    p = common.encode_prompt(tok, PROMPT)
    r = common.encode_response(tok, "the soup was great .")
    ids, spans = common.prepend_tau(tok, [(p, r), (p, r)], p, 1000, 99)
    assert ids.count(tok.bos_token_id) == 1 and ids == p + r + p[1:] + r + p[1:]
    assert [(k, ids[begin:end]) for k, begin, end in spans] == [(0, r), (1, r)]
    room = 2 * len(p) + len(r)                          # what does not fit is left out
    fits = p + r + p[1:], [(1, len(p), room - len(p))]
    assert common.prepend_tau(tok, [(p, r * 2), (p, r)], p, room, 99) == fits
    assert common.prepend_tau(tok, [(p, r), (p, r)], p, 1000, 2)[0] == p + r[:2] + p[1:] + r[:2] + p[1:]
    chat = tok.apply_chat_template(
        [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": "the soup was great ."},
         {"role": "user", "content": PROMPT}], add_generation_prompt=True, return_dict=False)
    assert common.prepend_tau(tok, [(p, r)], p, 1000, 99)[0] == list(chat)      # the template's own


@pytest.mark.parametrize("chunk, temperature, dtype, bound", [
    (4, 0.7, torch.float32, 1e-5), (99, 0.7, torch.float32, 1e-5), (99, 1.0, torch.float32, 1e-6),
    (99, 0.7, torch.bfloat16, 3e-2), (4, 1.0, torch.bfloat16, 3e-2)])
def test_chunked_logp_equals_plain(monkeypatch, chunk, temperature, dtype, bound):
    """Values and gradients, in chunks and in one piece, fp32 and bf16, against a plain log-softmax."""
    monkeypatch.setattr(common, "CHUNK", chunk)
    torch.manual_seed(0)
    h, y, weight = torch.randn(18, 8, requires_grad=True), torch.randint(0, 11, (18,)), torch.randn(18)
    head, x = torch.nn.Linear(8, 11).to(dtype), h.to(dtype)
    out = common.token_logp(x, y, head, temperature)
    want = (head(x).float() / temperature).log_softmax(-1).gather(-1, y[:, None])[:, 0]
    close(out, want, bound)
    gradients = [torch.autograd.grad((values * weight).sum(), (h, head.weight, head.bias))
                 for values in (out, want)]
    for a, b in zip(*gradients, strict=True):
        largest = b.float().abs().max()
        close(a.float() / largest, b.float() / largest, bound)


def test_the_head_sees_no_padding():
    """The head runs once, on the response tokens alone; log-probs are 0 after the end of a response."""
    _, responses, ids, attn, mask = example_frame(toy.tokenizer(), 3)
    seen, model = [], tiny_gpt2()
    model.lm.get_output_embeddings().register_forward_hook(
        lambda module, given, out: seen.append(tuple(out.shape)))
    logp = model(ids, attn, mask.shape[1])
    assert [rows for rows, vocab in seen] == [sum(map(len, responses))] and mask.numel() > seen[0][0]
    assert (logp[mask] < 0).all() and (logp[~mask] == 0).all()


def test_lora_by_hand():
    """y = W x + alpha / r B A x, and what merging adds to W."""
    layer = common.LoRA(torch.nn.Linear(2, 2, bias=False))
    layer.add("a", r=2, alpha=3, dropout=0.0)
    layer.base.weight.data = torch.eye(2)
    layer.A["a"].weight.data = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    layer.B["a"].weight.data = torch.tensor([[1.0, 1.0], [0.0, 1.0]])       # B A = [[1, 2], [0, 2]]
    x = torch.tensor([[1.0, 2.0], [3.0, -1.0]])
    close(layer(x), x)                                  # off
    layer.active = "a"
    close(layer(x), [[1 + 1.5 * 5, 2 + 1.5 * 4], [3 + 1.5 * 1, -1 - 1.5 * 2]])
    close(layer.delta("a"), [[1.5, 3.0], [0.0, 3.0]])


def test_by_length():
    attn = torch.tensor([[1] * n + [0] * (9 - n) for n in (5, 9, 2, 7, 3, 1)])
    assert common.sort_by_length(torch.arange(6), attn, 3).tolist() == [2, 0, 1, 5, 4, 3]  # threes alone
    assert common.sort_by_length(torch.tensor([5, 0, 4, 3, 2, 1]), attn, 6).tolist() == [5, 2, 4, 0, 3, 1]
    equal = torch.ones(6, 4)
    assert common.sort_by_length(torch.arange(6), equal, 4).tolist() == list(range(6))    # as they were


def test_passes_over_whole_rows_need_no_mask():
    """So that a GPU takes its fastest attention: causal, no mask, keys of shared heads not repeated."""
    model, tok = tiny_llama(), toy.tokenizer()
    _, _, ids, attn, mask = example_frame(tok, pad_left=3)          # two prompts of unlike lengths
    plain = torch.nn.functional.scaled_dot_product_attention
    seen = []

    def attention(query, key, value, attn_mask=None, is_causal=False, **kwargs):
        seen.append((attn_mask is None and is_causal, key.shape[1]))
        return plain(query, key, value, attn_mask=attn_mask, is_causal=is_causal, **kwargs)

    with mock.patch("torch.nn.functional.scaled_dot_product_attention", attention):
        model.train()(ids, attn, mask.shape[1]).sum().backward()
        with torch.no_grad():
            model.eval()(ids, attn, mask.shape[1])
    assert seen == [(True, 2)] * 4                      # two passes of two layers, two heads of keys


def test_heads_compute_in_fp32_over_a_bf16_trunk():
    model = tiny_gpt2().bfloat16()
    model.add_head("v")
    torch.nn.init.normal_(model.heads["v"].weight)
    _, _, ids, attn, mask = example_frame(toy.tokenizer())
    with torch.no_grad():
        value, h = model(ids, attn, mask.shape[1], head="v"), model.hidden(ids, attn, mask.shape[1])
    assert value.dtype == torch.float32
    want = h.double() @ model.heads["v"].weight[0].double()
    close(value, want, 1e-4)                            # bf16 would miss by 1e-2


@torch.no_grad()
def test_a_saved_adapter_comes_back():
    tok, model = toy.tokenizer(), tiny_gpt2()
    _, _, ids, attn, mask = example_frame(tok)
    model.add_adapter("gvm", r=4, alpha=8)
    model.add_head("gvm", sees_token=True)
    for weight in model.adapter_parameters("gvm").values():
        weight.normal_(0, 0.3)
    want = model(ids, attn, mask.shape[1], "gvm", head="gvm")
    checkpoints.save_adapter(model, "gvm", tok, path("saved_adapter"))
    again = tiny_gpt2()
    common.load_adapter(again, tok, path("saved_adapter"), "made by hand")
    assert torch.equal(again(ids, attn, mask.shape[1], "gvm", head="gvm"), want)
