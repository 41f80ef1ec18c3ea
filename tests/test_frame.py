import torch
from helpers import PROMPT, close, example_frame, mask_and_first, tiny_gpt2, tiny_llama

import common
import sft
from data import toy


def test_frame_positions_against_a_slow_loop():
    tok = toy.tokenizer()
    for model in (tiny_gpt2(), tiny_llama()):
        model.add_head("v")
        torch.nn.init.normal_(model.heads["v"].weight, std=0.1)
        prompts, responses, ids, attn, mask = example_frame(tok)
        with torch.no_grad():
            logp, value = model(ids, attn, mask.shape[1],
                                temperature=0.7), model(ids, attn, mask.shape[1], head="v")
            for b, (p, r) in enumerate(zip(prompts, responses, strict=False)):
                for t in range(len(r)):
                    before = torch.tensor([p + r[:t]])  # logp[t] is read before a_t ...
                    want = (model.lm(before).logits[0, -1] / 0.7).log_softmax(-1)[r[t]]
                    close(logp[b, t], want, 1e-5)
                    after = torch.tensor([p + r[:t + 1]])  # ... and Q[t] after it
                    hidden = model.lm.base_model(after).last_hidden_state[0, -1]
                    close(value[b, t + 1], model.heads["v"](hidden)[0], 1e-5)
                close(value[b, 0],
                      model.heads["v"](model.lm.base_model(torch.tensor([p])).last_hidden_state[0,
                                                                                                -1])[0], 1e-5)
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
        with torch.no_grad():
            tau = common.read_prefix(model, prefix, "gvm", "gvm", "cpu")
            for _ in range(2):
                close(
                    model(ids, attn, mask.shape[1], "gvm", head="gvm", cache=tau(2))[mask_and_first(mask)],
                    model(*long[:2], mask.shape[1], "gvm", head="gvm")[mask_and_first(mask)], 1e-5)
            assert common.read_prefix(model, [], "gvm", "gvm", "cpu") is None
        assert (model(ids, attn, mask.shape[1], "gvm", head="gvm") -
                model(*long[:2], mask.shape[1], "gvm", head="gvm")).abs().max() > 1e-3  # it does matter


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


def test_chunked_logp_equals_plain():
    """Values and gradients, in chunks and in one piece, fp32 and bf16, against a plain log-softmax."""
    torch.manual_seed(0)
    h, y, head, weight, real = torch.randn(18, 8,
                                           requires_grad=True), torch.randint(0, 11, (18, )), torch.nn.Linear(
                                               8, 11), torch.randn(18), common.CHUNK
    for common.CHUNK, temperature, dtype, bound in (4, 0.7, torch.float32,
                                                    1e-5), (99, 0.7, torch.float32,
                                                            1e-5), (99, 1.0, torch.float32,
                                                                    1e-6), (99, 0.7, torch.bfloat16,
                                                                            3e-2), (4, 1.0, torch.bfloat16,
                                                                                    3e-2):
        head, x = head.to(dtype), h.to(dtype)
        out = common.token_logp(x, y, head, temperature)
        want = (head(x).float() / temperature).log_softmax(-1).gather(-1, y[..., None]).squeeze(-1)
        close(out.detach(), want.detach(), bound)
        for g, g2 in zip(*(torch.autograd.grad((values * weight).sum(), (h, head.weight, head.bias))
                           for values in (out, want)), strict=False):
            close(g.float() / g2.float().abs().max(), g2.float() / g2.float().abs().max(), bound)
    common.CHUNK = real


def test_the_head_sees_no_padding():
    """The head runs once, on the response tokens alone; log-probs are 0 after the end of a response."""
    _, responses, ids, attn, mask = example_frame(toy.tokenizer(), 3)
    seen, model = [], tiny_gpt2()
    model.lm.get_output_embeddings().register_forward_hook(
        lambda module, given, out: seen.append(tuple(out.shape)))
    logp = model(ids, attn, mask.shape[1])
    assert [rows for rows, vocab in seen] == [sum(map(len, responses))] and mask.numel() > seen[0][0]
    assert (logp[mask] < 0).all() and (logp[~mask] == 0).all()


def test_by_length():
    attn = torch.tensor([[1] * n + [0] * (9 - n) for n in (5, 9, 2, 7, 3, 1)])
    assert common.sort_by_length(torch.arange(6), attn, 3).tolist() == [2, 0, 1, 5, 4,
                                                                        3]  # each three by themselves
    assert common.sort_by_length(torch.tensor([5, 0, 4, 3, 2, 1]), attn, 6).tolist() == [5, 2, 4, 0, 3, 1]
    assert common.sort_by_length(torch.arange(6), torch.ones(6, 4),
                                 4).tolist() == list(range(6))  # equals stay where they are


def test_heads_compute_in_fp32_over_a_bf16_trunk():
    model = tiny_gpt2().bfloat16()
    model.add_head("v")
    torch.nn.init.normal_(model.heads["v"].weight)
    _, _, ids, attn, mask = example_frame(toy.tokenizer())
    with torch.no_grad():
        value, h = model(ids, attn, mask.shape[1], head="v"), model.hidden(ids, attn, mask.shape[1])
    assert value.dtype == torch.float32
    close(value, (h.double() @ model.heads["v"].weight[0].double()).float(), 1e-4)  # bf16 would miss by 1e-2
