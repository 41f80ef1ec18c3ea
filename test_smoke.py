"""`python test_smoke.py` or `pytest test_smoke.py`: the whole project on a tiny GPT-2, on a CPU, with no network.

Numbers are worked by hand or by a slow second implementation beside the test; nothing here needs more than torch, transformers,
deepspeed and numpy.
"""
import contextlib
import glob
import io
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile

os.environ["CUDA_VISIBLE_DEVICES"] = ""                   # the tests are of fp32 on a CPU, also where there is a GPU

import numpy as np
import torch

import common
import dvpo
import ppo_baseline
import sft
import train_gvm
from data import toy, ultrafeedback

HERE = os.path.dirname(os.path.abspath(__file__))
TMP = os.environ.get("T_TMP") or tempfile.mkdtemp(prefix="dvpo_test_")
PROMPT = "review the soup and the staff ."


def close(a, b, tol=1e-6):
    a, b = torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64)
    assert a.shape == b.shape and (a - b).abs().max() <= tol, (a, b)


def tiny_gpt2(seed=0):
    torch.manual_seed(seed)
    from transformers import GPT2LMHeadModel

    return common.LM(GPT2LMHeadModel(toy.model_config(toy.tokenizer()))).eval()


def tiny_llama(seed=0):
    torch.manual_seed(seed)
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=len(toy.tokenizer()), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.3, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    return common.LM(LlamaForCausalLM(config)).eval()


# ---------------------------------------------------------------------------------------------------------------------
# The losses, by hand


def test_td_targets_by_hand():
    q = torch.tensor([[0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 3.0, 4.0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool()                      # ragged
    score = torch.tensor([1.0, -1.0])
    close(train_gvm.td_targets(q, score, mask, 1.0, 0.0), [[0.2, 0.3, 0.4, 1.0], [2.0, -1.0, 0, 0]])
    close(train_gvm.td_targets(q, score, mask, 1.0, 1.0), [[1.0, 1.0, 1.0, 1.0], [-1.0, -1.0, 0, 0]])
    close(train_gvm.td_targets(q, score, mask, 0.9, 1.0), [[0.729, 0.81, 0.9, 1.0], [-0.9, -1.0, 0, 0]])
    # gamma 0.5, lambda 0.5: G3 = 1; G2 = .5 (.5 x .4 + .5 x 1) = .35; G1 = .5 (.5 x .3 + .5 x .35) = .1625; G0 = .5 (.5 x .2 + .5 x .1625)
    # second row: G1 = -1; G0 = .5 (.5 x 2 - .5 x 1) = .25
    close(train_gvm.td_targets(q, score, mask, 0.5, 0.5), [[0.090625, 0.1625, 0.35, 1.0], [0.25, -1.0, 0, 0]])


def test_batch_norm_by_hand():
    x = torch.tensor([[1.0, 3.0, 99.0], [5.0, 7.0, -50.0]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 0]]).bool()                            # mean 4, variance (9 + 1 + 1 + 9) / 4 = 5
    s = math.sqrt(5)
    close(train_gvm.batch_norm(x, mask, eps=0.0), [[-3 / s, -1 / s, 0], [1 / s, 3 / s, 0]])
    close(train_gvm.batch_norm(x, mask, eps=1.0), [[-3 / (s + 1), -1 / (s + 1), 0], [1 / (s + 1), 3 / (s + 1), 0]])
    one = torch.tensor([[True, False, False], [False, False, False]])
    close(train_gvm.batch_norm(x, one), torch.zeros(2, 3))                        # a single token is its own mean
    close(train_gvm.batch_norm(torch.full((2, 3), 7.0), mask), torch.zeros(2, 3))  # constant: no blow-up


def test_clipped_ppo_loss_by_hand():
    ratio, adv, clip = torch.tensor([[1.1, 1.5, 0.5], [1.5, 0.5, 9.0]]), torch.tensor([[1.0, 1.0, 1.0], [-1.0, -1.0, 9.0]]), 0.2
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]]).bool()
    # min(r A, clip(r) A): 1.1 (inside), 1.2 (clipped), 0.5 (not clipped: pessimistic), -1.5 (not clipped), -0.8 (clipped); mean 0.1
    for module in (dvpo, ppo_baseline):
        loss, stats = module.clipped_ppo_loss(ratio.log().requires_grad_(), torch.zeros(2, 3), adv, mask, clip)
        close(loss.detach(), -0.1)
        close(stats["clip_frac"], 0.8)
        close(stats["ratio"], (1.1 + 1.5 + 0.5 + 1.5 + 0.5) / 5)
        close(stats["kl_step"], sum(r - 1 - math.log(r) for r in (1.1, 1.5, 0.5, 1.5, 0.5)) / 5)
    logp = ratio.log().requires_grad_()
    dvpo.clipped_ppo_loss(logp, torch.zeros(2, 3), adv, mask, clip)[0].backward()
    close(logp.grad, [[-1.1 / 5, 0, -0.5 / 5], [1.5 / 5, 0, 0]])                  # no gradient beyond the clip on the gaining side


def test_gae_by_hand():
    rewards, values = torch.tensor([[0.0, 0.0, 1.0], [0.0, 2.0, 9.0]]), torch.tensor([[0.5, 0.6, 0.7], [1.0, 1.0, 9.0]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]]).bool()
    # gamma 1, lambda .95: d2 = .3; d1 = .1 -> .1 + .95 x .3 = .385; d0 = .1 -> .1 + .95 x .385 = .46575
    adv, returns = ppo_baseline.gae(rewards, values, mask, 1.0, 0.95)
    close(adv, [[0.46575, 0.385, 0.3], [0.95, 1.0, 0]])
    close(returns, [[0.96575, 0.985, 1.0], [1.95, 2.0, 0]])
    close(ppo_baseline.gae(rewards, values, mask, 0.5, 0.0)[0], [[-0.2, -0.25, 0.3], [-0.5, 1.0, 0]])


def test_value_and_pairwise_loss_by_hand():
    v, old, ret = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.5, 0.0]]), torch.tensor([[1.0, 1.0]])
    # first: clipped to 0.7, error max(0, 0.09); second: 1
    close(ppo_baseline.value_loss(v, old, ret, torch.tensor([[True, True]]), 0.2), 0.5 * (0.09 + 1) / 2)
    close(ppo_baseline.pairwise_loss(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 0.0])), (math.log(1 + math.exp(-1)) + math.log(2)) / 2)


def test_advantage_by_hand():
    q, mask = torch.tensor([[0.0, 1.0, 3.0], [1.0, 1.0, 5.0]]), torch.tensor([[True, True], [True, False]])   # tokens 1, 3 | 1
    s = math.sqrt(8 / 9)                                                          # mean 5/3
    close(dvpo.advantage(q, mask, "q", 0.0), [[-2 / 3 / s, 4 / 3 / s], [-2 / 3 / s, 0]])
    close(dvpo.advantage(q, mask, "q", 2.0), [[-1 / 3, 2 / 3], [-1 / 3, 0]])      # sigma no smaller than the GVM's
    d = math.sqrt(2 / 3)                                                          # deltas 1, 2 | 0: mean 1
    close(dvpo.advantage(q, mask, "delta", 0.0), [[0, 1 / d], [-1 / d, 0]])


# ---------------------------------------------------------------------------------------------------------------------
# The world


def test_gold_reward_and_true_q():
    for response, gold in [("the soup was great . the staff was kind .", 1), ("the soup was not great . the staff was not rude .", 0),
                           ("well , the staff was so warm . the soup was fresh .", 1), ("the soup was great . the soup was great . the staff was kind .", 0),
                           ("the soup was great . the staff was kind", 0), ("", -1), ("soup staff great .", -1), ("the wine was great . the the staff was kind .", -1)]:
        assert toy.gold_reward(PROMPT, response) == gold, response
    assert toy.true_q(PROMPT, "the soup was great . the staff was rude . <eos>", "expert") == 0
    rng = np.random.default_rng(0)
    for policy in toy.POLICIES:                                                   # exact value against a Monte-Carlo mean, 4 standard errors
        draws = [toy.gold_reward(PROMPT, toy.sample(PROMPT, policy, rng)) for _ in range(800)]
        assert abs(np.mean(draws) - toy.true_q(PROMPT, "", policy)) < 4 * np.std(draws) / math.sqrt(len(draws)), policy
    # one step of Bellman by hand: V(state) is the mean of Q over what the policy says next
    for prefix in ("", "the soup was", "the soup was not"):
        state = toy.read(PROMPT, prefix)[0]
        mean = sum(p * toy.true_q(PROMPT, f"{prefix} {prefix.split()[-1] if w == toy.STUTTER else w}", "good")
                   for w, p in toy.next_words(state, toy.POLICIES["good"], ["soup", "staff"]).items())
        assert abs(mean - toy.true_q(PROMPT, prefix, "good")) < 1e-9


def test_ultrafeedback():
    """Raw rows with every oddity: N/A ratings, 10 for 1 in overall_score, one completion, empty text, a repeated prompt."""
    rated = lambda *r: {str(i): {"Rating": x} for i, x in enumerate(r)}
    completion = lambda model, text, *r: {"model": model, "response": text, "overall_score": 10, "fine-grained_score": 3.0, "annotations": rated(*r)}
    assert ultrafeedback.rating(completion("m", "x", "5", "4", "N/A", "3")) == 0.5 and ultrafeedback.rating(completion("m", "x", "N/A")) == 0.0
    rows = [{"source": "s", "instruction": f"question {i}", "models": ["a", "b"], "completions": [
        completion("a", "good", "5", "5"), completion("b", "bad", "1", "N/A"), completion("c", " ", "5")]} for i in range(400)]
    rows += [rows[0], dict(rows[0], instruction="lonely", completions=rows[0]["completions"][:1]), dict(rows[0], instruction="none", completions=[])]
    os.makedirs(path("uf"), exist_ok=True)
    with open(path("uf/raw.jsonl"), "w") as f:
        f.writelines(json.dumps(r) + "\n" for r in rows)
    with contextlib.redirect_stderr(io.StringIO()):
        count, dropped = ultrafeedback.make([path("uf/raw.jsonl")], path("uf"))
        first = {n: open(path("uf", n + ".jsonl")).read() for n in count}
        ultrafeedback.make([path("uf/raw.jsonl")], path("uf"))
    assert first == {n: open(path("uf", n + ".jsonl")).read() for n in count}      # the same again
    assert dropped == {"empty completions": 401, "repeated prompts": 1, "prompts with fewer than two completions": 2}
    total = {n: count[n] + count[n + "_heldout"] for n in ("sft", "gvm", "pairs", "prompts")}
    assert total["sft"] + total["pairs"] + total["prompts"] == 400 and total["gvm"] == 2 * total["pairs"]
    assert abs(total["sft"] - 120) < 40 and abs(total["pairs"] - 200) < 40         # 30 / 50 / 20
    assert json.loads(first["pairs"].splitlines()[0]) | {"prompt": 0} == {"prompt": 0, "chosen": "good", "rejected": "bad", "chosen_policy": "a", "rejected_policy": "b"}
    assert {json.loads(line)["reward"] for line in first["gvm"].splitlines()} == {1.0, -1.0}
    said = lambda text: [dict(role="user", content="q"), dict(role="assistant", content=text)]
    with open(path("uf/binarized.jsonl"), "w") as f:
        f.writelines(json.dumps(dict(prompt=f"question {i}", chosen=said("good"), rejected=said("bad" if i else "good"), score_chosen=8.0)) + "\n" for i in range(100))
    with contextlib.redirect_stderr(io.StringIO()):
        plain, dropped = ultrafeedback.make([path("uf/binarized.jsonl")], path("uf2"), binarized=True)
    assert dropped == {"empty or equal pairs": 1, "prompts with fewer than two completions": 1} and sum(plain[n] + plain[n + "_heldout"] for n in ("sft", "pairs", "prompts")) == 99
    assert json.loads(open(path("uf2/pairs.jsonl")).readline()) | {"prompt": 0} == {"prompt": 0, "chosen": "good", "rejected": "bad"}
    data = train_gvm.Labelled([path("uf/pairs.jsonl")])                            # pairs are two rows each
    assert len(data) == 2 * count["pairs"] and data[0]["reward"] == 1.0 and data[1] == dict(prompt=data[0]["prompt"], response="bad", reward=-1.0, policy="b")
    tau = data.tau("b", data[0]["prompt"], 2, np.random.default_rng(0))
    assert len(tau) == 2 and all(r["policy"] == "b" and r["prompt"] != data[0]["prompt"] for r in tau)


# ---------------------------------------------------------------------------------------------------------------------
# The frame


def example_frame(tok, pad_left=0):
    prompts = [common.encode_prompt(tok, p) for p in (PROMPT, "review the wine .")]
    responses = [common.encode_response(tok, r) for r in ("the soup was great . the staff was rude .", "the wine was cold .")]
    ids, attn, mask = common.frame(prompts, responses, tok.pad_token_id)
    F = torch.nn.functional
    return prompts, responses, F.pad(ids, (pad_left, 0), value=tok.pad_token_id), F.pad(attn, (pad_left, 0)), mask


def test_frame_positions_against_a_slow_loop():
    tok = toy.tokenizer()
    for model in (tiny_gpt2(), tiny_llama()):
        model.add_head("v")
        torch.nn.init.normal_(model.heads["v"].weight, std=0.1)
        prompts, responses, ids, attn, mask = example_frame(tok)
        with torch.no_grad():
            logp, value = model(ids, attn, mask.shape[1], temperature=0.7), model(ids, attn, mask.shape[1], head="v")
            for b, (p, r) in enumerate(zip(prompts, responses)):
                for t in range(len(r)):
                    before = torch.tensor([p + r[:t]])                            # logp[t] is read before a_t ...
                    want = (model.lm(before).logits[0, -1] / 0.7).log_softmax(-1)[r[t]]
                    close(logp[b, t], want, 1e-5)
                    after = torch.tensor([p + r[:t + 1]])                         # ... and Q[t] after it
                    hidden = model.lm.base_model(after).last_hidden_state[0, -1]
                    close(value[b, t + 1], model.heads["v"](hidden)[0], 1e-5)
                close(value[b, 0], model.heads["v"](model.lm.base_model(torch.tensor([p])).last_hidden_state[0, -1])[0], 1e-5)
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
    """The GVM behind one cached tau == behind the same tau in front of each row; and the cache can be used again."""
    tok = toy.tokenizer()
    for model in (tiny_gpt2(), tiny_llama()):
        model.add_adapter("gvm", 4, 8.0), model.add_head("gvm")
        for k, p in model.named_parameters():
            if ".B." in k or "heads" in k:
                torch.nn.init.normal_(p, std=0.1)
        prompts, responses, ids, attn, mask = example_frame(tok)
        prefix = prompts[1] + responses[1]
        long = common.frame([prefix + p for p in prompts], responses, tok.pad_token_id)
        with torch.no_grad():
            tau = common.read_prefix(model, prefix, "gvm", "gvm", "cpu")
            for _ in range(2):
                close(model(ids, attn, mask.shape[1], "gvm", head="gvm", cache=tau(2))[mask_and_first(mask)],
                      model(*long[:2], mask.shape[1], "gvm", head="gvm")[mask_and_first(mask)], 1e-5)
            assert common.read_prefix(model, [], "gvm", "gvm", "cpu")(2) is None
        assert (model(ids, attn, mask.shape[1], "gvm", head="gvm") - model(*long[:2], mask.shape[1], "gvm", head="gvm")).abs().max() > 1e-3   # it does matter


def mask_and_first(mask):
    return torch.nn.functional.pad(mask, (1, 0), value=True)


def test_eos_is_trained_although_pad_may_equal_eos():
    tok = toy.tokenizer()
    tok.pad_token = tok.eos_token
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
    ids = common.behind_tau(tok, [(p, r), (p, r)], p, 1000, 99)
    assert ids.count(tok.bos_token_id) == 1 and ids == p + r + p[1:] + r + p[1:]
    assert common.behind_tau(tok, [(p, r), (p, r)], p, 2 * len(p) + len(r), 99) == p + r + p[1:]     # what does not fit is left out
    assert common.behind_tau(tok, [(p, r), (p, r)], p, 1000, 2) == p + r[:2] + p[1:] + r[:2] + p[1:]
    chat = tok.apply_chat_template([{"role": "user", "content": PROMPT}, {"role": "assistant", "content": "the soup was great ."},
                                    {"role": "user", "content": PROMPT}], add_generation_prompt=True, return_dict=False)
    assert common.behind_tau(tok, [(p, r)], p, 1000, 99) == list(chat)                 # the same as the template's own conversation


def test_chunked_logp_equals_plain():
    """Values and gradients, in chunks under checkpointing and in one piece, fp32 and bf16, against autograd over plain log-softmax."""
    torch.manual_seed(0)
    h, y, head, weight, real = torch.randn(18, 8, requires_grad=True), torch.randint(0, 11, (18,)), torch.nn.Linear(8, 11), torch.randn(18), common.CHUNK
    for common.CHUNK, temperature, dtype, bound in (4, 0.7, torch.float32, 1e-5), (99, 0.7, torch.float32, 1e-5), (99, 1.0, torch.float32, 1e-6), (99, 0.7, torch.bfloat16, 3e-2), (4, 1.0, torch.bfloat16, 3e-2):
        head, x = head.to(dtype), h.to(dtype)
        out = common.token_logp(x, y, head, temperature)
        want = (head(x).float() / temperature).log_softmax(-1).gather(-1, y[..., None]).squeeze(-1)
        close(out.detach(), want.detach(), bound)
        for g, g2 in zip(*(torch.autograd.grad((values * weight).sum(), (h, head.weight, head.bias)) for values in (out, want))):
            close(g.float() / g2.float().abs().max(), g2.float() / g2.float().abs().max(), bound)
    common.CHUNK = real


def test_the_head_sees_no_padding():
    """The one forward of the head is over as many rows as there are response tokens; log-probs are 0 behind a response's end."""
    _, responses, ids, attn, mask = example_frame(toy.tokenizer(), 3)
    seen, model = [], tiny_gpt2()
    model.lm.get_output_embeddings().register_forward_hook(lambda module, given, out: seen.append(tuple(out.shape)))
    logp = model(ids, attn, mask.shape[1])
    assert [rows for rows, vocab in seen] == [sum(map(len, responses))] and mask.numel() > seen[0][0]
    assert (logp[mask] < 0).all() and (logp[~mask] == 0).all()


def test_by_length():
    attn = torch.tensor([[1] * n + [0] * (9 - n) for n in (5, 9, 2, 7, 3, 1)])
    assert common.by_length(torch.arange(6), attn, 3).tolist() == [2, 0, 1, 5, 4, 3]                 # each three by themselves
    assert common.by_length(torch.tensor([5, 0, 4, 3, 2, 1]), attn, 6).tolist() == [5, 2, 4, 0, 3, 1]
    assert common.by_length(torch.arange(6), torch.ones(6, 4), 4).tolist() == list(range(6))         # equals stay where they are


# ---------------------------------------------------------------------------------------------------------------------
# The rollout


class Args:
    temperature, max_new_tokens, batch_size, max_prompt_length, static_cache = 1.0, 24, 8, 64, False


def test_greedy_rollout_equals_generate():
    tok, args = toy.tokenizer(), Args()
    args.temperature = 1e-6                                                       # the token loop, made greedy
    prompts = [common.encode_prompt(tok, p) for p in (PROMPT, "review the wine .")]
    for model in (tiny_gpt2(3), tiny_llama(3)):
        for module, args.static_cache in itertools.product((dvpo, ppo_baseline), (False, True)):
            ids, attn, mask, ended = module.rollout(model, prompts, tok, args, "cpu")
            P = ids.shape[1] - mask.shape[1]
            want = model.lm.generate(ids[:, :P], attention_mask=attn[:, :P], do_sample=False, max_new_tokens=24,
                                     pad_token_id=tok.pad_token_id, eos_token_id=tok.eos_token_id)
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
        for decode in common.Decoder(model, ids[:, :P], attn[:, :P]), common.StaticDecoder(model, ids[:, :P], attn[:, :P], None, mask.shape[1]):
            for t in range(mask.shape[1]):
                step = (decode.logits / 0.8).log_softmax(-1).gather(1, ids[:, P + t, None]).squeeze(1)
                close((step * mask[:, t]), (logp[:, t] * mask[:, t]), 1e-4)
                decode(ids[:, P + t])
    for b in range(len(prompts)):                                                 # the mask ends with the first eos
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


# ---------------------------------------------------------------------------------------------------------------------
# LoRA


def test_lora_off_is_the_base_and_merged_is_on():
    tok = toy.tokenizer()
    for model in (tiny_gpt2(), tiny_llama()):
        _, _, ids, attn, mask = example_frame(tok)
        T = mask.shape[1]
        with torch.no_grad():
            base = model(ids, attn, T)
            model.add_adapter("a", 4, 8)
            model.add_adapter("b", 2, 8)
            n = sum(isinstance(m, common.LoRA) for m in model.modules())
            assert n == (8 if "gpt2" in type(model.lm).__name__.lower() else 14)   # every projection of two blocks
            assert torch.equal(model(ids, attn, T), base)                         # off: bit for bit
            assert torch.equal(model(ids, attn, T, adapter="a"), base)            # B is zero at first
            for layer in model.lora_layers():
                torch.nn.init.normal_(layer.B["a"].weight, std=0.3)
            on = model(ids, attn, T, adapter="a")
            assert (on - base).abs().max() > 1e-3
            assert torch.equal(model(ids, attn, T, adapter="b"), base) and torch.equal(model(ids, attn, T), base)
            plain = type(model.lm)(model.lm.config).eval()
            plain.load_state_dict(model.merged_state_dict("a"))
            close(common.LM(plain)(ids, attn, T), on, 1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# The stages, chained as a user would, on a world of their own


def run(module, *argv):
    """A stage's main(argv) without its output; returns the metrics it wrote."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        module.main([str(a) for a in argv])
    out = argv[argv.index("--out") + 1]
    with open(os.path.join(out, "metrics.jsonl")) as f:
        return [json.loads(line) for line in f]


def path(*parts):
    return os.path.join(TMP, *parts)


def world():
    """Data, SFT model, GVM, reward model: made once, in about a minute."""
    if os.path.exists(path("ready")):
        return
    with contextlib.redirect_stdout(io.StringIO()):
        toy.make(path("toy"), heldout_rows_per_policy=60)
    for name in ("sft", "gvm", "pairs"):                                          # a few rows, for tests that only want to see it run
        with open(path("toy", name + "_heldout.jsonl")) as full, open(path("toy", name + "_small.jsonl"), "w") as f:
            f.writelines(itertools.islice(full, 24))
    run(sft, "--init-from", path("toy/model"), "--data", path("toy/sft.jsonl"), "--heldout", path("toy/sft_heldout.jsonl"), "--prompts", path("toy/prompts_heldout.jsonl"), "--out", path("sft"), "--max-steps", 500)
    run(train_gvm, *GVM, "--out", path("gvm"), "--max-steps", 250, "--tau-pairs", 1)
    run(train_gvm, *GVM, "--out", path("gvm0"), "--max-steps", 500, "--tau-pairs", 0)      # no tau: learns faster
    open(path("ready"), "w").close()


GVM = ("--init-from", path("sft/model"), "--data", path("toy/gvm.jsonl"), "--heldout", path("toy/gvm_heldout.jsonl"))
RL = ("--init-from", path("sft/model"), "--data", path("toy/prompts.jsonl"), "--heldout", path("toy/prompts_heldout.jsonl"))


def weights(folder):
    from safetensors.torch import load_file

    return {k: v for f in sorted(glob.glob(os.path.join(folder, "*.safetensors"))) for k, v in load_file(f).items()}


def test_chain_and_learning():
    """SFT -> GVM -> DVPO through main(argv): tau matters, the first ratio is 1, nothing frozen moves, the gold reward rises."""
    world()
    result = json.load(open(path("gvm/eval.json")))
    assert result["policies"]["expert"]["v0"] > result["policies"]["poor"]["v0"] + 0.3, result["policies"]        # tau matters
    assert result["accuracy"]["mean"] > 0.75 and result["true_q"]["correlation"] > 0.55, result
    before = weights(path("gvm0/model")), weights(path("sft/model"))
    rows = run(dvpo, *RL, "--gvm", path("gvm0/model"), "--out", path("dvpo"), "--max-steps", 25)
    for old, new in zip(before, (weights(path("gvm0/model")), weights(path("sft/model")))):
        assert all(torch.equal(old[k], new[k]) for k in old)
    assert all(r["ratio_first"] == 1.0 for r in rows)
    assert [r["step"] for r in rows] == list(range(25))
    need = "step loss gold kl kl_coef q_mean adv_std clip_frac ratio_first ended length sec_generate sec_score sec_train tokens peak_bytes".split()
    assert not set(need) - set(rows[0])
    first, last = (json.load(open(path(stage, "summary.json")))["gold"] for stage in ("sft", "dvpo"))           # 256 responses each
    assert last > first + 0.15, (first, last)
    assert any(not torch.equal(v, before[1][k]) for k, v in weights(path("dvpo/model")).items())
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(path("dvpo/model"))                      # a plain transformers folder


def test_frozen_models_and_lora_policy():
    """--lora: one model in memory; the trunk under the adapter does not move, and the saved policy is the merged one."""
    world()
    rows = run(dvpo, *RL, "--gvm", path("gvm/model"), "--out", path("lora"), "--max-steps", 3, "--lora", "--lr", 1e-3)
    assert all(r["ratio_first"] == 1.0 for r in rows)
    assert rows[0]["kl"] == 0.0                                                   # the adapter starts at the reference, bit for bit
    assert weights(path("lora/model")).keys() == weights(path("sft/model")).keys()


def test_ppo_chain():
    world()
    rows = run(ppo_baseline, *RL, "--pairs", path("toy/pairs.jsonl"), "--pairs-heldout", path("toy/pairs_heldout.jsonl"), "--rm", path("rm/model"),
               "--rm-max-steps", 150, "--out", path("ppo"), "--max-steps", 4)
    assert all(r["ratio_first"] == 1.0 for r in rows) and rows[0]["kl"] == 0.0
    assert json.load(open(path("rm/model/adapter.json")))["accuracy"] > 0.75
    rows = run(ppo_baseline, *RL, "--reward", os.path.join(HERE, "data/toy.py:gold_reward"), "--out", path("ppo_fn"), "--max-steps", 25, "--lr", 3e-4)
    assert json.load(open(path("ppo_fn/summary.json")))["gold"] > json.load(open(path("sft/summary.json")))["gold"] + 0.15
    assert abs(rows[0]["score"] - rows[0]["gold"]) < 1e-6                         # the function replaces the reward model


def test_eval_only_and_show():
    world()
    with contextlib.redirect_stdout(io.StringIO()) as out:
        train_gvm.main([*GVM[:2], "--eval-only", "--data", path("toy/gvm_heldout.jsonl"), "--gvm", path("gvm/model"), "--out", path("eval")])
        shown = train_gvm.main([*GVM, "--gvm", path("gvm/model"), "--show", PROMPT, "the soup was great .", "--policy", "good", "--out", path("eval")])
    assert json.load(open(path("eval/eval.json")))["pairs"] > 100 and "accuracy over" in out.getvalue()
    assert len(shown["q"]) == len(shown["true_q"]) == 7 and shown["tokens"][1:] == "the soup was great . <eos>".split()


def test_label_goes_on_where_it_stopped():
    world()
    from tools import label

    def rows(to, n):
        with contextlib.redirect_stderr(io.StringIO()):
            label.main(["--policy", path("sft/model"), "--prompts", path("toy/prompts.jsonl"), "--to", to, "--n", str(n), "--batch-size", "16"])
        return open(to).read().splitlines()

    straight = rows(path("label_a.jsonl"), 48)
    rows(path("label_b.jsonl"), 32)
    with open(path("label_b.jsonl"), "a") as f:
        f.write('{"prompt": "cut sh')                                             # killed in the middle of a line
    assert rows(path("label_b.jsonl"), 48) == straight and len(straight) == 48
    row = json.loads(straight[0])
    assert row["policy"] == "sft" and row["reward"] == toy.gold_reward(row["prompt"], row["response"])
    both = train_gvm.Labelled([path("toy/gvm_heldout.jsonl"), path("label_a.jsonl")]).by_policy
    assert [len(both[name]) for name in ("sft", "sft-T1.4", "sft-T1.8")] == [16, 16, 16]
    pairs, reward = [json.loads(line) for line in open(path("label_a_pairs.jsonl"))], toy.gold_reward
    assert pairs and all(reward(p["prompt"], p["chosen"]) > reward(p["prompt"], p["rejected"]) for p in pairs)


def test_table4_by_hand():
    rows = [dict(prompt="a", reward=1.0), dict(prompt="a", reward=0.0), dict(prompt="a", reward=0.5), dict(prompt="b", reward=0.0)]
    q = [np.array([9.0, 1, 1, 4]), np.array([0.0, 2, 2, 2]), np.array([0.0, 1, 1, 1]), np.array([0.0, 5])]
    accuracy, pairs = train_gvm.table4(rows, [(None, v) for v in q], 0.0)         # the entry of V(s_0) does not count
    assert pairs == 3                                                             # means 2, 2, 1: a tie, a win, a loss
    close(accuracy["mean"], 0.5), close(accuracy["last"], 2 / 3)
    assert train_gvm.table4(rows, [(None, v) for v in q], 0.6)[1] == 1


# ---------------------------------------------------------------------------------------------------------------------
# Real models and real data: tokenizers with their quirks, two-layer Llama and Mistral, foreign files


def quirky_tokenizer(kind, **more):
    """Byte-level BPE that behaves like Llama-3's (no pad, bos from the post-processor, no eos) or Mistral-Instruct's (no pad, no spare id, chat template)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>"] if kind == "llama" else ["<unk>", "<s>", "</s>"]
    bos, eos = special[:2] if kind == "llama" else special[1:]
    core = Tokenizer(models.BPE(unk_token=None if kind == "llama" else "<unk>"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    core.train_from_iterator([" ".join(toy.WORDS)] * 9, trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False,
                                                                           initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    core.post_processor = processors.TemplateProcessing(single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, core.token_to_id(bos))])
    template = ("{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
                "{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}") if kind == "mistral" else None
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token=bos, eos_token=eos, unk_token=None if kind == "llama" else "<unk>",
                                   chat_template=template, **more)


def quirky_model(kind):
    """A folder with that tokenizer and a two-layer model of that architecture, grouped queries and all."""
    if not os.path.exists(path(kind)):
        from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

        tok = quirky_tokenizer(kind)
        torch.manual_seed(0)
        config = dict(llama=LlamaConfig, mistral=MistralConfig)[kind](
            vocab_size=len(tok), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=2048, bos_token_id=tok.bos_token_id, eos_token_id=tok.eos_token_id, tie_word_embeddings=kind == "llama")
        if kind == "mistral":                                                     # sampling settings of its own, which must not sneak in
            model = AutoModelForCausalLM.from_config(config)
            model.generation_config.update(do_sample=True, top_k=1, temperature=0.1)
        else:
            model = AutoModelForCausalLM.from_config(config)
        model.save_pretrained(path(kind)), tok.save_pretrained(path(kind))
    return path(kind)


def test_tokenizers_as_they_are():
    for kind in ("llama", "mistral"):
        tok = common.load_tokenizer(quirky_model(kind))
        assert tok.pad_token_id is not None and tok.pad_token_id != tok.eos_token_id
        p, r = common.encode_prompt(tok, PROMPT), common.encode_response(tok, "the soup was great .")
        assert p[0] == tok.bos_token_id and p.count(tok.bos_token_id) == 1 and tok.eos_token_id not in p
        assert r.count(tok.eos_token_id) == 1 and r[-1] == tok.eos_token_id and tok.bos_token_id not in r
        assert tok.decode(r, skip_special_tokens=True) == "the soup was great ."
        assert ("[INST]" in tok.decode(p)) == (kind == "mistral") and ("### Assistant:" in tok.decode(p)) == (kind == "llama")
        both = common.behind_tau(tok, [(p, r)], p, 1000, 99)
        assert both.count(tok.bos_token_id) == 1 and both[len(p) + len(r):] == p[1:]
        eager = quirky_tokenizer(kind, add_eos_token=True)                        # some append eos by themselves, some only claim to
        assert eager.eos_token_id not in common.encode_prompt(eager, PROMPT) and common.encode_response(eager, "a").count(eager.eos_token_id) == 1
        chat = [dict(role="user", content="a"), dict(role="assistant", content="b"), dict(role="user", content="c")]
        assert common.encode_prompt(tok, chat).count(tok.bos_token_id) == 1


def test_llama_and_mistral_through_all_stages():
    """Two layers, their tokenizers' quirks; the policy that --lora saves generates what the policy in memory does, and peft reads its adapter."""
    world()
    from transformers import AutoModelForCausalLM

    for kind in ("llama", "mistral"):
        model, to = quirky_model(kind), lambda stage: path("q", kind, stage)
        small = ("--model", model, "--batch-size", "4", "--grad-accum", "1", "--max-steps", "2")
        run(sft, *small, "--data", path("toy/sft.jsonl"), "--heldout", path("toy/sft_small.jsonl"), "--out", to("sft"), "--lr", "1e-2")
        own = ("--init-from", to("sft") + "/model")
        run(train_gvm, *small, *own, *GVM[2:3], path("toy/gvm_small.jsonl"), "--heldout", path("toy/gvm_small.jsonl"), "--out", to("gvm"), "--lr", "1e-2")
        rl = (*small, *own, *RL[2:], "--max-new-tokens", "12", "--mini-batch-size", "2")
        rows = run(dvpo, *rl, "--gvm", to("gvm") + "/model", "--out", to("dvpo"), "--lora", "--lr", "1e-2")
        rows += run(ppo_baseline, *rl, "--pairs", path("toy/pairs.jsonl"), "--pairs-heldout", path("toy/pairs_small.jsonl"), "--rm", to("rm") + "/model",
                    "--rm-max-steps", "1", "--out", to("ppo"))
        assert all(r["ratio_first"] == 1.0 for r in rows)
        tok = common.load_tokenizer(to("dvpo") + "/model")
        lm = common.load_model(to("sft") + "/model")                              # the policy in memory: trunk and adapter
        lm.add_adapter("policy", 8, 32)
        for layer in lm.lora_layers():
            torch.nn.init.normal_(layer.B["policy"].weight, std=0.3)
        common.save_model(lm.eval(), tok, path("q", kind, "saved"), "policy")
        args, prompts = Args(), [common.encode_prompt(tok, p) for p in (PROMPT, "review the wine .")]
        args.temperature = 1e-6
        ids, attn, mask, _ = dvpo.rollout(lm, prompts, tok, args, "cpu", "policy")
        loaded = AutoModelForCausalLM.from_pretrained(path("q", kind, "saved")).eval()
        P = ids.shape[1] - mask.shape[1]
        plain = dict(do_sample=False, top_k=None, temperature=None, pad_token_id=tok.pad_token_id, max_new_tokens=24)
        assert torch.equal((loaded.generate(ids[:, :P], attention_mask=attn[:, :P], **plain)[:, P:] * mask), ids[:, P:] * mask)
        try:
            from peft import PeftModel
        except ImportError:
            continue                                                              # optional: pip install peft
        adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(to("sft") + "/model"), path("q", kind, "saved", "peft")).eval()
        close(adapted(ids).logits.detach(), loaded(ids).logits.detach(), 1e-4)


def test_what_does_not_belong_together_is_refused():
    world()
    other = path("other/sft/model")                                               # the SFT model with another chat template: another tokenizer
    tok = common.load_tokenizer(path("sft/model"))
    tok.chat_template = tok.chat_template.replace("<assistant>", "<user>")
    common.load_model(path("sft/model")).lm.save_pretrained(other), tok.save_pretrained(other)
    for base, gvm, word in (other, path("gvm/model"), "tokenizer"), (path("toy/model"), path("gvm/model"), "another model"):
        with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()):
            try:
                dvpo.main(["--init-from", base, "--gvm", gvm, *RL[2:], "--out", path("x"), "--max-steps", "1"])
            except SystemExit as e:
                assert e.code == 2
        lines = err.getvalue().strip().splitlines()
        assert len(lines) == 1 and word in lines[0] and "train_gvm.py" in lines[0], err.getvalue()


def test_any_jsonl():
    import gzip

    lines = [json.dumps(dict(prompt=[dict(role="user", content="ü" * i + "x")], response="a\u2028b", reward=i)) for i in range(300)]
    with gzip.open(path("rows.jsonl.gz"), "wt") as f:
        f.write("\n".join(lines))
    rows = common.Rows(path("rows.jsonl.gz"), ["prompt"])
    assert len(rows) == 300 and [rows[i]["reward"] for i in (299, 0, 150)] == [299, 0, 150]       # any order


def j(**row):
    return json.dumps(row).encode()


SFT_ROW, GVM_ROW, PAIR, ASK = j(prompt="a", response="b"), j(prompt="a", response="b", reward=1, policy="p"), j(prompt="a", chosen="b", rejected="c"), j(prompt="a")
BROKEN = [                                                                        # (stage, lines of --data, what the one line says)
    (sft, [], "empty"), (sft, [b"", b"  "], "empty"), (sft, [SFT_ROW, b"{cut sh"], ":2: not JSON"), (sft, [b"prompt,response"], ":1: not JSON"),
    (sft, [SFT_ROW, b'{"prompt": "caf\xe9", "response": "b"}'], ":2: not JSON"), (sft, ['{"prompt": "a", "response": "b"}\n{"prompt": "a", "response": "b"}'.encode("utf-16")], "not JSON"),
    (sft, [SFT_ROW, b'{"prompt": "a\x00", "response": "b"}'], ":2: not JSON"), (sft, [b"\0" * 100], "not JSON"), (sft, [b"[" * 100000], ":1: not JSON"),
    (sft, [SFT_ROW, b'["a", "b"]'], ":2: not an object"), (sft, [SFT_ROW, b"", ASK], ":3: needs the keys"), (sft, [j(prompt=3, response="b")], "prompt must be a string"),
    (sft, [j(prompt="a", response=None)], "response must be a string"), (sft, [j(prompt="a", response=["b"])], "response must be a string"),
    (sft, [j(prompt=" ", response="b")], "1 with an empty prompt", "no row is left"),
    (sft, [j(prompt=[], response="b")], "need a turn of the user"), (sft, [j(prompt=[dict(role="system", content="a")], response="b")], "need a turn of the user"),
    (sft, [j(prompt=[dict(role="robot", content="a")], response="b")], "the role system, user or assistant"), (sft, [j(prompt=[dict(role="user", content=None)], response="b")], "content a string"),
    (sft, [j(prompt=["a"], response="b")], "messages must be"), (sft, [b'{"prompt": "\\ud800", "response": "b"}'], "half a character"),
    (train_gvm, [GVM_ROW, GVM_ROW[:-20] + b"}"], ":2: not JSON"), (train_gvm, [j(prompt="a", response="b", reward="good")], "'good'"), (train_gvm, [j(prompt="a", response="b", reward=True)], "'True'"),
    (train_gvm, [b'{"prompt": "a", "response": "b", "reward": NaN}'], "'nan'"), (train_gvm, [b'{"prompt": "a", "response": "b", "reward": -Infinity}'], "'-inf'"),
    (train_gvm, [b'{"prompt": "a", "response": "b", "reward": 1e999}'], "'inf'"), (train_gvm, [j(prompt="a", response="b", reward=10**400)], "finite number"),
    (train_gvm, [j(prompt="a", response="b", reward=None)], "'None'"), (train_gvm, [j(prompt="a", response="b", reward=1, policy=7)], "policy must be a string"),
    (train_gvm, [GVM_ROW, SFT_ROW], ":2: needs the keys prompt response reward"), (train_gvm, [PAIR, GVM_ROW], ":2: needs the keys prompt chosen rejected"), (train_gvm, [SFT_ROW], "or prompt chosen rejected"),
    (train_gvm, [j(prompt="a", chosen="b", rejected="b")], "1 with two equal answers", "no row is left"), (train_gvm, [j(prompt="a", chosen="b", rejected=1)], "rejected must be a string"),
    (dvpo, [SFT_ROW[:5]], "not JSON"), (dvpo, [j(question="a")], "needs the keys prompt"), (ppo_baseline, [b"null"], "not an object"),
]


def test_broken_input_is_one_line():
    """Every case ends before a model is loaded, with exit code 2 and one line that names file and line."""
    world()
    for stage, lines, *words in BROKEN:
        with open(path("bad.jsonl"), "wb") as f:
            f.write(b"\n".join(lines))
        refused(lambda: stage.main([*(RL[:2] if stage in (dvpo, ppo_baseline) else GVM[:2]), "--data", path("bad.jsonl"), "--out", path("x")]), "bad.jsonl", *words)
    import gzip

    whole = gzip.compress(b"\n".join([SFT_ROW] * 1000))
    for name, data in ("cut.jsonl.gz", whole[:-20]), ("flipped.jsonl.gz", whole[:30] + b"xxxx" + whole[34:]), ("text.jsonl.gz", SFT_ROW):
        with open(path(name), "wb") as f:
            f.write(data)
        refused(lambda: sft.main(["--data", path(name), "--out", path("x")]), name, "cannot be read")
    refused(lambda: sft.main(["--data", path("toy"), "--out", path("x")]), "no such file")


def test_broken_flags_and_folders_are_one_line():
    world()
    good = ("--gvm", path("gvm/model"), *RL)
    for name in ("no_weights", "cut_weights", "cut_config", "cut_gvm", "bare_gvm"):
        shutil.rmtree(path(name), ignore_errors=True)
        shutil.copytree(path("gvm/model" if "gvm" in name else "sft/model"), path(name))
    os.remove(path("no_weights/model.safetensors"))
    for name in ("cut_weights/model.safetensors", "cut_config/config.json", "cut_gvm/adapter.safetensors"):
        with open(path(name), "r+b") as f:
            f.truncate(os.path.getsize(path(name)) // 2)
    common.write_json(path("bare_gvm/adapter.json"), dict(name="gvm"))
    for name, config in ("ds_broken.json", "{"), ("ds_batch.json", '{"train_batch_size": 7}'), ("ds_stage.json", '{"zero_optimization": {"stage": 2}}'), ("ds_fp16.json", '{"fp16": {"enabled": true}}'):
        with open(path(name), "w") as f:
            f.write(config)
    with open(path("a_file"), "w"):
        pass
    for flags, *words in (("--lr", "-1"), "--lr"), (("--lr", "nan"), "--lr"), (("--batch-size", "0"), "--batch-size 0"), (("--batch-size", "48"), "a multiple"), (("--mini-batch-size", "0"), "a multiple"), \
            (("--max-steps", "0"), "--max-steps"), (("--temperature", "0"), "--temperature"), (("--kl-target", "0"), "--kl-target"), (("--max-new-tokens", "0"), "--max-new-tokens"), \
            (("--max-new-tokens", "100000"), "positions"), (("--ppo-epochs", "0"), "--ppo-epochs"), (("--offload", "--zero", "0"), "--offload"), (("--reward", "nothing.py:f"), "nothing.py"), \
            (("--reward", "data/toy.py:nothing"), "no function 'nothing'"), (("--init-from", path("no_weights")), "no_weights"), (("--init-from", path("cut_weights")), "cut_weights"), \
            (("--init-from", path("cut_config")), "cut_config"), (("--gvm", path("cut_gvm")), "cut_gvm"), (("--gvm", path("bare_gvm")), "bare_gvm"), (("--gvm", path("sft/model")), "no adapter there"), \
            (("--init-from", path("toy/model")), "trained on another model"), (("--ds-config", path("ds_broken.json")), "ds_broken.json"), (("--ds-config", path("ds_batch.json")), "train_batch_size"), \
            (("--ds-config", path("ds_stage.json")), "zero_optimization.stage"), (("--ds-config", path("ds_fp16.json")), "fp16"), (("--out", path("a_file")), "a_file"), (("--out", "/proc/nothing"), "/proc/nothing"):
        refused(lambda: dvpo.main([*good, "--out", path("x"), *flags]), *words)
    import socket

    with socket.socket() as taken:                                                # a launcher's port that somebody else has
        taken.bind(("127.0.0.1", 0)), taken.listen()
        done = script(sys.executable, "dvpo.py", *good, "--out", path("x"),
                      env=dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(taken.getsockname()[1])))
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "--master_port" in done.stderr, done.stderr


def test_odd_input_is_handled_as_documented():
    """One row, one policy, duplicates, CRLF, BOM, blank lines, long lines, control tokens in the text: it trains, and says what it left out."""
    world()
    odd = [j(prompt="review the soup .", response="the soup was great .", reward=1, policy="p"), j(prompt="x" * 1_000_000, response="the soup was cold .", reward=-1, policy="p"),
           j(prompt="review the soup .", response="", reward=0, policy=None), j(prompt=" ", response="b", reward=1), j(prompt="a\u0000", response="the <eos> <pad> soup", reward=0.5)]
    for lines in odd, odd[:1], odd[:1] * 3:
        with open(path("odd.jsonl"), "wb") as f:
            f.write(b"\xef\xbb\xbf" + b"\r\n\r\n".join(lines) + b"\r\n")
        with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()):
            train_gvm.main([*GVM[:2], "--data", path("odd.jsonl"), "--heldout", path("odd.jsonl"), "--out", path("odd"), "--max-steps", "2", "--batch-size", "4", "--true-q", ""])
        assert ("left out 1 with an empty prompt" in err.getvalue()) == (lines is odd)
    with open(path("odd.jsonl"), "wb") as f:                                      # one prompt, longer than the context, for more rollouts than that
        f.write(odd[1])
    run(dvpo, "--gvm", path("gvm/model"), *RL[:2], "--data", path("odd.jsonl"), "--heldout", path("odd.jsonl"), "--out", path("odd"), "--max-steps", "1", "--batch-size", "4", "--mini-batch-size", "2", "--reward", "")
    refused(lambda: dvpo.main(["--gvm", path("gvm/model"), *RL[:2], "--data", path("odd.jsonl"), "--heldout", path("odd.jsonl"), "--out", path("odd")]), "gold_reward: ValueError in line", "''")


def test_text_never_becomes_a_control_token():
    """What a user writes is text, even where it looks like the end of a turn."""
    for tok in (toy.tokenizer(), quirky_tokenizer("llama"), quirky_tokenizer("mistral")):
        for name in {tok.eos_token, tok.bos_token, *(t.content for t in tok.added_tokens_decoder.values() if t.special)} - {None, tok.unk_token}:
            special = tok.convert_tokens_to_ids(name)
            with_it, without = (common.encode_prompt(tok, f"the soup {x} was cold") for x in (name, "and"))
            assert with_it.count(special) == without.count(special), (name, with_it)
            assert common.encode_response(tok, f"{name} cold {name}").count(special) == (special == tok.eos_token_id)


def test_label_with_a_reward_model():
    """A sequence-classification checkpoint scores a batch as it scores the rows one by one."""
    from tools import label
    from transformers import LlamaConfig, LlamaForSequenceClassification

    tok = quirky_tokenizer("llama")
    torch.manual_seed(0)
    rm = LlamaForSequenceClassification(LlamaConfig(vocab_size=len(tok), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                                                    num_key_value_heads=2, num_labels=1, initializer_range=0.3)).eval()
    rm.save_pretrained(path("rm_hf")), tok.save_pretrained(path("rm_hf"))
    prompts, responses = [PROMPT, "review the wine .", PROMPT], ["the soup was great . the staff was kind .", "", "no ."]
    tok = common.load_tokenizer(path("rm_hf"))
    want = [rm(torch.tensor([common.encode_prompt(tok, p) + common.encode_response(tok, r)])).logits.item() for p, r in zip(prompts, responses)]
    close(label.score_with(path("rm_hf"), "cpu")(prompts, responses), want, 1e-5)
    refused(lambda: label.score_with(quirky_model("llama"), "cpu"), "not a reward model")           # it would score with a random head


def refused(f, *words):
    """f() ends with exit code 2 and one line on stderr that holds the words."""
    with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()):
        try:
            f()
            raise AssertionError("not refused")
        except SystemExit as e:
            assert e.code == 2
    lines = [line for line in err.getvalue().replace("\r", "\n").splitlines() if line.strip() and "it/s]" not in line]      # bars aside
    assert len(lines) == 1 + ("left out" in lines[0]) and all(any(w in line for line in lines) for w in words), lines


def test_models_that_would_train_on_wrong_numbers_are_refused():
    world()
    from transformers import Gemma2Config, Gemma2ForCausalLM

    Gemma2ForCausalLM(Gemma2Config(vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
                                   head_dim=8, final_logit_softcapping=1.0, initializer_range=1.0)).save_pretrained(path("gemma"))
    refused(lambda: common.load_model(path("gemma")), "changes the logits after its head")
    flags = ("--gvm", path("gvm/model"), *RL, "--out", path("x"))
    refused(lambda: dvpo.main([*flags, "--max-new-tokens", "200"]), "positions", "256")
    refused(lambda: dvpo.main([*flags, "--save-every", "0"]), "--save-every")


def test_what_cannot_fit_is_refused_before_it_starts():
    world()
    from unittest import mock

    with mock.patch("psutil.virtual_memory", return_value=mock.Mock(available=-10**12)):
        refused(lambda: dvpo.main(["--gvm", path("gvm/model"), *RL, "--out", path("big")]), "--lora", "--mini-batch-size", "MB are free")
    plan = json.load(open(path("big/memory.json")))
    assert plan["total"] == sum(plan["plan"].values()) and plan["models"]["policy"]["trainable"] == plan["models"]["policy"]["parameters"]
    n = plan["models"]["policy"]["parameters"]
    assert plan["plan"]["policy: weights"] == plan["plan"]["policy: gradients"] == 4 * n and plan["plan"]["policy: optimizer"] == 8 * n
    model = tiny_gpt2()                                                           # two layers of 64: keys and values, 4 bytes each
    assert common.probe(model)["cache"] == 2 * 2 * 64 * 4
    assert common.probe(model)["activation"] > 2 * (3 + 4) * 64 * 4               # at least q, k, v and what the MLP's second matrix gets


def test_bench():
    """The benchmark drives both stages, in turns, and the tiny rollout says what generate says."""
    from tools import bench

    os.makedirs(path("bench")), os.chdir(path("bench"))
    try:
        size = ("--shape", "tiny", "--prompt", "16", "--new", "8", "--batch-size", "4", "--rounds", "1", "--to", path("bench/b.json"))
        with contextlib.redirect_stdout(io.StringIO()):
            bench.main([*size, "--methods", "ppo", "lora"]), bench.main([*size, "--decode"]), bench.main([*size, "--methods", "dvpo", "--lengths", "mixed"])
            bench.main([*size, "--attention", "--shape", "llama3-3b"])
    finally:
        os.chdir(HERE)
    data = json.load(open(path("bench/b.json")))
    part, shorter = data["steps"].values()
    assert all(part["measured"][m]["tokens"] == 32 and part["predicted"][m]["step"] > 0 for m in ("ppo", "lora"))
    assert shorter["measured"]["dvpo"]["tokens"] == bench.mixed(1, 4, 8).sum() < 32
    assert data["decode"]["shapes"]["tiny"]["greedy_tokens_equal"] == 1.0
    assert all(way["off"] < 1e-5 for way in data["attention"]["shapes"]["llama3-3b"]["ways"].values())
    assert "| lora |" in open(path("bench/b.md")).read()


def test_heads_compute_in_fp32_over_a_bf16_trunk():
    model = tiny_gpt2().bfloat16()
    model.add_head("v")
    torch.nn.init.normal_(model.heads["v"].weight)
    _, _, ids, attn, mask = example_frame(toy.tokenizer())
    with torch.no_grad():
        value, h = model(ids, attn, mask.shape[1], head="v"), model.hidden(ids, attn, mask.shape[1])
    assert value.dtype == torch.float32
    close(value, (h.double() @ model.heads["v"].weight[0].double()).float(), 1e-4)                  # bf16 would miss by 1e-2


def test_sample():
    world()
    from tools import sample

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        sample.main(["--policy", path("sft/model"), "--prompts", path("toy/prompts_heldout.jsonl"), "--to", path("answers.json"), "--batch-size", "8"])
    out = json.load(open(path("answers.json")))
    assert len(out) == 30 and set(out[0]) == {"instruction", "output", "generator"}
    assert np.mean([toy.gold_reward(r["instruction"], r["output"]) for r in out]) > -0.5   # answers, not noise
    talk = subprocess.run([sys.executable, "tools/sample.py", "--policy", path("sft/model")], input=f"{PROMPT}\n\n", cwd=HERE, capture_output=True, text=True)
    assert talk.returncode == 0 and len(talk.stdout) > 5, talk.stderr


def judge_server():
    """A chat API on loopback: scores an answer by its length; fails in every way first. -> (server, what it was asked)"""
    import http.server
    import threading

    asked = []

    class Api(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(dict(body, auth=self.headers["Authorization"], path=self.path))
            system, user = (m["content"] for m in body["messages"])
            n, answers = len(asked), [part.split(">: ", 1)[1].strip() for part in user.split("\n<response")[1:]]
            broken = {1: (500, b"{}"), 2: (429, b"{}"), 3: (200, b"not json"), 4: (200, json.dumps(dict(choices=[dict(message=dict(content="I would rather not."))], usage=dict(
                prompt_tokens=7, completion_tokens=5))).encode())}
            if body["model"] == "no-such":
                code, out = 401, b"who are you"
            elif body["model"] == "first":                                            # likes whatever it reads first
                code, out = 200, json.dumps(dict(choices=[dict(message=dict(content="Score 1: 5\nScore 2: 3 Evaluation evidence: x"))])).encode()
            elif body["model"] == "picky" and "question 3" in user:
                code, out = 400, b"too long"
            elif n in broken:
                code, out = broken[n]
            else:
                scores = [min(5, len(a.split())) for a in answers]
                text = "\n".join(f"Score {i}: {x}" for i, x in enumerate(scores, 1)) if len(scores) > 1 else f"Score: {scores[0]} Evaluation evidence: its length"
                code, out = 200, json.dumps(dict(choices=[dict(message=dict(content=text))], usage=dict(prompt_tokens=100, completion_tokens=10))).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(out) + 9 * (n == 3)))              # the third is cut short
            self.end_headers()
            self.wfile.write(out)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Api)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, asked


def test_judge():
    world()
    from tools import judge

    questions = [f"question {i}" for i in range(10)]
    outputs = dict(a=["one two three"] * 6 + ["one"] * 4, b=["one two"] * 6 + ["one two"] * 3 + ["one"])     # 6 wins, 3 losses, a tie
    for name, answers in outputs.items():
        common.write_json(path(f"{name}.json"), [dict(instruction=q, output=o, generator=name) for q, o in zip(questions + ["only in " + name], answers + ["x"])])
    server, asked = judge_server()
    for text, n, want in (("Score: 4", 1, [4]), ("**Score:** 4", 1, [4]), ("Total score: 3.5/5", 1, [3.5]), ("Score: {2}", 1, [2]), ("Score: 10", 1, None), ("Score: -1", 1, None),
                          ("a 4", 1, None), ("Score 1: 5\nScore 2: 3", 2, [5, 3]), ("Score 2: 3\nScore 1: 5", 2, [5, 3]), ("**Score #1**: 2, Score #2: 4", 2, [2, 4]), ("Score 1: 5", 2, None)):
        assert judge.read_scores(text, n) == want, text
    judge.WAIT, before, files = 0.01, dict(os.environ), [path("a.json"), path("b.json")]
    os.environ |= dict(OPENAI_API_KEY="sk-test", OPENAI_BASE_URL=f"http://127.0.0.1:{server.server_port}/v1")

    def go(*argv):
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return judge.main([*files, *argv])

    try:
        got = go("--to", path("v.jsonl"), "--at-once", "1", "--price", "2.5", "10")
        assert (got["wins"], got["ties"], got["losses"], got["questions"], got["unanswered"], got["only_in_one"]) == (6, 1, 3, 10, 0, 2)
        close(got["win_rate"], 0.65)
        assert got["interval"][0] < 0.65 < got["interval"][1]
        # 19 calls, as the tie's two answers are one text, and three that failed without a bill; a fourth was billed and said nothing
        assert len(asked) == 19 + 4 and got["tokens_in"] == 19 * 100 + 7 and got["tokens_out"] == 19 * 10 + 5
        close(got["cost"], (1907 * 2.5 + 195 * 10) / 1e6)
        first = asked[0]
        assert first["auth"] == "Bearer sk-test" and first["path"] == "/v1/chat/completions" and first["model"] == "gpt-4o-2024-08-06" and "additive 5-point" in first["messages"][0]["content"]
        assert {m["messages"][1]["content"].split("<response>: ")[1] for m in asked[4:]} == {"one", "one two", "one two three"}
        lines = open(path("v.jsonl")).read()
        with open(path("v.jsonl"), "w") as f:
            f.write(lines[:-30])                                                       # killed while it wrote the last verdict
        again, n = go("--to", path("v.jsonl")), len(asked)
        assert again["win_rate"] == got["win_rate"] and n == 19 + 4 + 1                # one call, and nothing paid twice
        assert go("--to", path("v.jsonl")) == again and len(asked) == n
        # Both answers in one message: a judge that likes the first has no favourite once both orders are asked; without, the order decides
        got = go("--to", path("w.jsonl"), "--pairwise", "--both-orders", "--judge", "first")
        assert got["ties"] == got["questions"] == 10 and len(asked) - n == 20 - 1
        got = go("--to", path("w2.jsonl"), "--pairwise", "--judge", "first")
        assert got["ties"] == 0 and 0 < got["wins"] < 10
        got = go("--to", path("w3.jsonl"), "--pairwise")
        assert (got["wins"], got["ties"], got["losses"]) == (6, 1, 3)
        got = go("--to", path("w4.jsonl"), "--judge", "picky")
        assert got["questions"] == 9 and got["unanswered"] == 1                        # one refused question is left out and counted
        refused(lambda: judge.main([*files, "--to", path("u.jsonl"), "--judge", "no-such"]), "401")
        os.environ["OPENAI_BASE_URL"] = "http://127.0.0.1:1/v1"
        refused(lambda: judge.main([*files, "--to", path("u2.jsonl")]), "gave up")
        del os.environ["OPENAI_API_KEY"]
        refused(lambda: judge.main([*files, "--to", path("u3.jsonl")]), "OPENAI_API_KEY")
    finally:
        server.shutdown()
        os.environ.clear()
        os.environ.update(before)
    refused(lambda: judge.main([path("a.json"), path("nothing.json")]), "nothing.json")
    # A function and a reward model as judges
    good, bad = "the soup was great . the staff was kind .", "the soup was awful . the staff was kind ."
    for name, answer in ("a", good), ("b", bad):
        common.write_json(path(f"{name}.json"), [dict(instruction=PROMPT, output=answer, generator=name)])
    assert go("--to", path("v2.jsonl"), "--reward", "data/toy.py:gold_reward")["wins"] == 1
    got = go("--to", path("v3.jsonl"), "--rm", path("rm/model"), "--init-from", path("sft/model"))
    rm, tok, frame = common.load_model(path("sft/model"), trainable=False).eval(), common.load_tokenizer(path("sft/model")), common.frame
    common.load_adapter(rm, tok, path("rm/model"), "")
    with torch.no_grad():
        want = ppo_baseline.scores(rm, *frame([common.encode_prompt(tok, PROMPT)] * 2, [common.encode_response(tok, t) for t in (good, bad)], tok.pad_token_id, "cpu"))
    assert got["wins"] == int(want[0] > want[1]) and got["losses"] == int(want[0] < want[1])


def test_interval_by_hand():
    from tools.seeds import interval

    assert interval([1, 2, 3]) == "2.00 ± 2.48"                                        # sd 1, t(2 degrees) 4.303 / sqrt(3)
    assert interval([0.5, -0.25], 3, "+") == "+0.125 ± 4.766" and interval([0.7]) == "0.70" and interval([]) == "never"


def test_policy_gradient_of_the_theorem():
    """Against plain log-softmax over whole logits, row by row."""
    from tools import theorem

    model = tiny_gpt2()
    _, _, ids, attn, mask = example_frame(toy.tokenizer())
    adv, T = torch.randn(mask.shape, generator=torch.Generator().manual_seed(0)), mask.shape[1]
    got = theorem.gradient(model, ids, attn, mask, adv, torch.arange(len(ids)))
    model.zero_grad()
    for row in range(len(ids)):
        real = ids[row][attn[row].bool()][None]
        n = int(mask[row].sum())
        logp = model.lm(real).logits.log_softmax(-1)[0, -n - 1:-1].gather(1, real[0, -n:, None])[:, 0]
        ((logp * adv[row, :n]).sum() / len(ids)).backward()
    close(got, torch.cat([p.grad.flatten().double() for p in model.parameters() if p.grad is not None]), 1e-4)


def test_exact_values():
    """tools/exact.py: the value of a text is the mean of the values one word later, each as likely as the policies that may be writing make it; it
    starts and ends where it must; and dvpo.py learns from it."""
    from tools import exact

    tau = [("review the wine and the room .", "the wine was lovely . the room was not sad . <eos>".split())]
    for before in [], tau:
        for text in "", "well , the soup", "the soup was not", "the soup was very very", "the soup was rude . the wine", "the soup was kind . the staff was bright .":
            words = text.split()
            loglik, weight = exact.read(PROMPT, words)[0][-1] + sum(exact.read(p, w)[0][-1] for p, w in before), 0.0
            posterior = np.exp(loglik - loglik.max()) / np.exp(loglik - loglik.max()).sum()
            state, _ = toy.read(PROMPT, text)
            said = [toy.next_words(state, p, toy.requested(PROMPT)) for p in toy.POLICIES.values()]
            for word in set().union(*said):
                p = sum(a * s.get(word, 0.0) for a, s in zip(posterior, said))
                weight += p * exact.best_value(before, PROMPT, [*words, words[-1] if word == toy.STUTTER else word])[-1]
            close(weight, exact.best_value(before, PROMPT, words)[-1], 1e-6)
    close(exact.best_value([], PROMPT, [])[0], np.mean([toy.true_q(PROMPT, "", p) for p in toy.POLICIES]))
    close(exact.best_value([], PROMPT, "the soup was kind . <eos>".split())[-1], 0.0)
    rng = np.random.default_rng(0)
    known = [(PROMPT, [*toy.sample(PROMPT, "expert", rng).split(), toy.EOS]) for _ in range(300)]
    close(exact.best_value(known, PROMPT, ["the"])[-1], toy.true_q(PROMPT, "the", "expert"), 1e-3)
    tok, words = toy.tokenizer(), "the soup was rude . <eos>".split()                # the same through the model's place, behind a tau and a shorter row
    trunk, ids = exact.Exact(None, tok), common.encode_prompt(tok, PROMPT)
    prefix = common.behind_tau(tok, [(common.encode_prompt(tok, p), tok.convert_tokens_to_ids(w)) for p, w in tau], [], 99, 99)
    q = trunk(*common.frame([ids, ids], [tok.convert_tokens_to_ids(words), [tok.eos_token_id]], tok.pad_token_id)[:2], len(words), head="gvm", cache=trunk.turns(prefix))
    close(q, np.array([exact.best_value(tau, PROMPT, words), [*exact.best_value(tau, PROMPT, [toy.EOS]), *[0.0] * (len(words) - 1)]]))
    state, events = toy.State(), []
    for word in "the wine was very rude . the soup staff <eos>".split():
        kind, state = exact.event(state, word, toy.requested(PROMPT))
        events.append(kind)
    assert events == [None, "wrong noun", None, None, "unkind", None, None, None, "broken", "early end"], events
    world()
    done = script(sys.executable, "tools/exact.py", "--one", "dvpo", *RL, "--max-steps", "10", "--seed", "7", "--out", path("exact"))
    assert done.returncode == 0, done.stderr
    assert json.load(open(path("exact/run.json")))["seed"] == 7                     # no flag of dvpo.py's is taken for one of the tool's
    rows = [json.loads(line) for line in open(path("exact/metrics.jsonl"))]
    assert rows[0]["ratio_first"] == 1.0 and rows[-1]["gold"] > rows[0]["gold"] + 0.2, rows


def test_gelu_of_gpt2_is_fused():
    from transformers import GPT2LMHeadModel

    config = toy.model_config(toy.tokenizer())
    config.activation_function = "gelu_new"
    torch.manual_seed(0)
    lm = GPT2LMHeadModel(config).eval()
    lm.save_pretrained(path("gelu"))
    model, ids = common.load_model(path("gelu")).eval(), torch.arange(24).view(2, 12)
    assert type(model.lm.transformer.h[0].mlp.act) is not type(lm.transformer.h[0].mlp.act)
    with torch.no_grad():
        close(model.lm(ids).logits, lm(ids).logits, 1e-4)


def test_readme():
    """Its commands have the files and flags they name, the table of files their lines, and its numbers stand in results/."""
    import re
    import shlex

    text = open(os.path.join(HERE, "README.md")).read()
    commands = [shlex.split(line, comments=True) for line in re.findall(r"^    ((?:python|deepspeed|torchrun) .+)$", text, re.M)]
    assert len(commands) > 12
    for words in commands:
        at = next(i for i, w in enumerate(words) if w.endswith(".py"))
        assert "&&" not in words
        source = open(os.path.join(HERE, words[at])).read()
        for flag in (w for w in words[at + 1:] if w.startswith("--")):
            assert f'"{flag}"' in source + open(os.path.join(HERE, "common.py")).read(), words
        if "/" not in words[at]:
            __import__(words[at][:-3]).parse_args(words[at + 1:])
    files = re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", text, re.M)
    assert len(files) == 5
    for name, lines in files:
        assert len(open(os.path.join(HERE, name)).read().splitlines()) == int(lines), name
    done = script(sys.executable, "tools/results_check.py")
    assert done.returncode == 0, done.stderr


def test_scratch_model():
    world()
    from tools import scratch_model

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        scratch_model.main(["--data", path("toy/sft.jsonl"), "--out", path("scratch"), "--vocab", "400", "--width", "32", "--layers", "2"])
    tok = common.load_tokenizer(path("scratch"))
    for text in ("Grüße,\n\n  1. x\t<b>", "the soup was great ."):
        assert tok.decode(common.encode_response(tok, text), skip_special_tokens=True) == text   # byte-level: any text comes back
    rows = run(sft, "--model", path("scratch"), "--data", path("toy/sft.jsonl"), "--heldout", path("toy/sft_small.jsonl"), "--out", path("scratch_sft"),
               "--max-steps", "3", "--lr", "1e-2")
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_no_hub_is_one_line():
    world()
    done = script(sys.executable, "sft.py", "--model", "llama3-3b", "--data", path("toy/sft.jsonl"), "--heldout", path("toy/sft_small.jsonl"), "--out", path("x"),
                  env=dict(HF_HUB_OFFLINE="1", HF_HOME=path("no_hub")))
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2 and len(lines) == 1 and "meta-llama/Llama-3.2-3B" in lines[0] and "licence" in lines[0], done.stderr
    refused(lambda: dvpo.main(["--model", "llama3-3b", "--data", path("toy/prompts.jsonl"), "--heldout", path("toy/prompts.jsonl"), "--out", path("x")]),
            "python sft.py --model llama3-3b")


def test_gradient_checkpointing_changes_nothing_but_memory():
    world()
    plain, again = (run(dvpo, *RL, "--gvm", path("gvm/model"), "--out", path("remat", str(i)), "--max-steps", 2, "--batch-size", 16, "--mini-batch-size", 8, *more)
                    for i, more in enumerate(((), ("--gradient-checkpointing",))))
    for a, b in zip(plain, again):
        close(a["loss"], b["loss"], 1e-6), close(a["kl"], b["kl"], 1e-5)
        assert b["ratio_first"] == 1.0
    model = tiny_gpt2()
    before = common.probe(model)
    model.checkpoint_blocks()
    after = common.probe(model)
    assert after["activation"] < 0.5 * before["activation"] and after["cache"] == before["cache"] > 0


def test_optimizer_offload_changes_nothing():
    world()
    for zero in ("1", "3"):
        plain, off = (run(dvpo, *RL, "--gvm", path("gvm/model"), "--out", path("off"), "--max-steps", 2, "--batch-size", 16, "--mini-batch-size", 8, "--zero", zero, *more)
                      for more in ((), ("--offload",)))
        for a, b in zip(plain, off):
            close(a["loss"], b["loss"], 1e-6), close(a["kl"], b["kl"], 1e-5)


def test_how_a_batch_is_cut_changes_nothing():
    """Four micro-batches of like lengths give the updates of the whole optimizer batch in one piece, rows as they come, in every stage."""
    world()
    by_length = common.by_length
    for name, stage, argv in resume_cases("0"):
        cut = ("--grad-accum", "4") if stage in (sft, train_gvm) else ("--mini-batch-size", "2", "--grad-accum", "4")
        argv = (*argv, "--out", path("cut", name), *(("--lora-dropout", "0") if stage is train_gvm else ()))
        common.by_length = lambda order, attn, size: order
        try:
            unsorted = run(stage, *argv)
        finally:
            common.by_length = by_length
        for a, b in zip(unsorted, run(stage, *argv, *cut), strict=True):
            for key in ("loss",) if stage in (sft, train_gvm) else ("loss", "kl", "kl_step", "clip_frac", "q_mean", "gold"):
                close(a[key], b[key], 1e-4)
            assert b.get("ratio_first", 1.0) == 1.0


# ---------------------------------------------------------------------------------------------------------------------
# Resume


def resume_cases(zero):
    """(script, flags) of every stage, four steps with a checkpoint after two."""
    common_flags = ("--max-steps", "4", "--save-every", "2", "--zero", zero)
    rl = (*RL, "--batch-size", "16", "--mini-batch-size", "8", *common_flags)
    gvm = (*GVM[:2], "--data", path("toy/gvm_small.jsonl"), "--heldout", path("toy/gvm_small.jsonl"), "--batch-size", "8", "--lora-dropout", "0.1")
    return [("sft", sft, ("--init-from", path("toy/model"), "--data", path("toy/sft_small.jsonl"), "--heldout", path("toy/sft_small.jsonl"), "--prompts",
                          path("toy/prompts_heldout.jsonl"), "--batch-size", "8", *common_flags)),
            ("gvm", train_gvm, (*gvm, *common_flags)), ("dvpo", dvpo, ("--gvm", path("gvm/model"), *rl)),
            ("lora", dvpo, ("--gvm", path("gvm/model"), "--lora", *rl)),
            ("ppo", ppo_baseline, ("--rm", path("rm3", zero, "model"), "--pairs", path("toy/pairs_small.jsonl"), "--pairs-heldout", path("toy/pairs_small.jsonl"),
                                   "--rm-max-steps", "2", *rl))]


def same_run(a, b):
    """Two lists of metrics, equal bit for bit but for the clock."""
    drop = lambda rows: [{k: v for k, v in r.items() if not k.startswith("sec") and k != "peak_bytes"} for r in rows]
    assert drop(a) == drop(b), (drop(a), drop(b))


def rewind(out, to):
    """What a run killed after step 3 leaves: its first checkpoint and three lines of metrics."""
    shutil.copytree(out, to)
    shutil.rmtree(os.path.join(to, "checkpoint", "step_4"))
    with open(os.path.join(to, "metrics.jsonl")) as f:
        lines = f.readlines()
    with open(os.path.join(to, "metrics.jsonl"), "w") as f:
        f.writelines(lines[:3])


def test_resume_equals_a_straight_run():
    """All stages, ZeRO 1 and 3: metrics and weights bit for bit. (Without ZeRO: the tests below.)"""
    world()
    for zero in ("1", "3"):
        for name, stage, argv in resume_cases(zero):
            straight, again = path("straight", zero, name), path("again", zero, name)
            rows = run(stage, *argv, "--out", straight)
            rewind(straight, again)
            same_run(run(stage, *argv, "--out", again, "--resume"), rows)
            for key, w in weights(os.path.join(straight, "model")).items():
                assert torch.equal(w, weights(os.path.join(again, "model"))[key]), (name, zero, key)


def test_resume_on_two_ranks():
    """One stage that trains an adapter, one that trains a model, one that trains two."""
    world()
    cases = [(stage, argv, path("straight2", zero, name), path("again2", zero, name)) for zero in ("1", "3") for name, stage, argv in resume_cases(zero) if name in ("gvm", "dvpo", "ppo")]
    straight = two_ranks(*((stage, [*argv, "--out", out]) for stage, argv, out, _ in cases))
    for *_, out, to in cases:
        rewind(out, to)
    for rows, again in zip(straight, two_ranks(*((stage, [*argv, "--resume", "--out", to]) for stage, argv, _, to in cases))):
        same_run(again, rows)


def test_damaged_checkpoint_and_other_flags():
    """A checkpoint that is cut short is named and the one before it serves; flags that differ are named; nothing at all to go on from is said."""
    world()
    _, _, argv = resume_cases("0")[2]
    out = path("damaged")
    rows = run(dvpo, *argv, "--out", out)
    victim = max(glob.glob(os.path.join(out, "checkpoint/step_4/policy/*.pt")), key=os.path.getsize)
    with open(victim, "r+b") as f:
        f.seek(os.path.getsize(victim) // 2)
        f.write(b"\0\1\2\3")                                                     # same size, other bytes
    with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()):
        dvpo.main([*argv, "--out", out, "--resume", "--clip", "0.3", "--max-steps", "3"])
    assert "step_4" in err.getvalue() and "--clip 0.3 (was 0.2)" in err.getvalue()
    assert sorted(os.listdir(os.path.join(out, "checkpoint"))) == ["step_2", "step_4.damaged"]
    with open(os.path.join(out, "metrics.jsonl")) as f:
        same_run([json.loads(line) for line in f][:2], rows[:2])
    with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()):
        dvpo.main([*argv, "--out", path("empty"), "--resume", "--max-steps", "1"])
    assert "starting anew" in err.getvalue()


def ends_with_1(f):
    """f() ends with exit code 1; -> what it said on stderr."""
    with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()):
        try:
            f()
            raise AssertionError("it went on")
        except SystemExit as e:
            assert e.code == 1
    return err.getvalue()


def test_not_a_number_ends_the_run():
    """In the loss: the step is named, its batch kept. In the weights alone, by a gradient: nothing is saved of them either."""
    world()
    argv = [*resume_cases("0")[0][2], "--save-every", "1", "--max-steps", "9"]
    err = ends_with_1(lambda: sft.main([*argv, "--out", path("nan"), "--lr", "1e30"]))
    with open(path("nan/metrics.jsonl")) as f:
        bad = len(f.readlines())
    assert 1 <= bad < 9 and f"loss at step {bad - 1} not finite" in err and f"step_{bad}" not in os.listdir(path("nan/checkpoint") if bad > 1 else path("nan"))
    assert set(torch.load(path(f"nan/bad_step_{bad - 1}_rank_0.pt"), weights_only=True)) == {"ids", "attn", "mask"}
    from unittest import mock

    loss, calls = sft.sft_loss, []

    def poisoned(*a):                                                             # a finite loss with a gradient that is not, at the third step
        calls.append(1)
        out = loss(*a)
        return out + (out * 0).sqrt() if len(calls) == 3 else out

    with mock.patch("sft.sft_loss", poisoned):
        err = ends_with_1(lambda: sft.main([*argv, "--out", path("nan2")]))
        calls.clear()
        with contextlib.redirect_stderr(io.StringIO()) as warned, contextlib.redirect_stdout(io.StringIO()):
            sft.main([*argv, "--out", path("nan3"), "--zero", "1"])               # DeepSpeed leaves that update out: said, and the run goes on
    assert "gradient at step 2 was not finite" in warned.getvalue() and warned.getvalue().count("not finite") == 1
    with mock.patch("sft.sft_loss", lambda *a: loss(*a) + (loss(*a) * 0).sqrt()):
        assert "steps in a row, 0 to 2, are not finite" in ends_with_1(lambda: sft.main([*argv, "--out", path("nan4"), "--zero", "1"]))
        assert "weights for" in ends_with_1(lambda: sft.main([*argv, "--out", path("nan5"), "--save-every", "100", "--max-steps", "1"]))
    assert not os.path.exists(path("nan5/model"))
    assert "weights of the policy after step 2 are not finite" in err and "checkpoint/step_2" in err and sorted(os.listdir(path("nan2/checkpoint"))) == ["step_1", "step_2"]


def test_full_disk_keeps_the_last_checkpoint():
    """No file may grow beyond 200 kB from the second save on, which the operating system enforces as it does a full disk."""
    world()
    import resource

    save, soft_hard = common.check_sums, resource.getrlimit(resource.RLIMIT_FSIZE)

    def then_full(folder):
        if folder.endswith(".tmp"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, soft_hard[1]))
        return save(folder)

    from unittest import mock

    try:
        with mock.patch("common.check_sums", then_full):
            err = ends_with_1(lambda: sft.main([*resume_cases("0")[0][2], "--save-every", "1", "--out", path("full")]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, soft_hard)
    assert "step_2 cannot be written" in err and "step_1, stays" in err and os.listdir(path("full/checkpoint")) == ["step_1"], err
    rows = run(sft, *resume_cases("0")[0][2], "--out", path("full"), "--resume")
    assert [r["step"] for r in rows] == [0, 1, 2, 3]


def test_lr_decay():
    """In a straight line to 0, in the optimizers themselves, unless --no-lr-decay; four steps."""
    world()
    seen, set_lr = [], common.set_lr

    def record(engine, lr):
        set_lr(engine, lr)
        seen.append(round(engine.optimizer.param_groups[-1]["lr"], 9))

    common.set_lr = record
    try:
        for name, stage, argv in resume_cases("0")[2:]:
            flags = (*argv, "--out", path("decay", name), "--lr", 4e-4, *(("--critic-lr", 8e-4) if stage is ppo_baseline else ()))
            seen.clear()
            run(stage, *flags)
            assert seen[-4 * (1 + (stage is ppo_baseline)):] == ([4e-4, 8e-4, 3e-4, 6e-4, 2e-4, 4e-4, 1e-4, 2e-4] if stage is ppo_baseline else [4e-4, 3e-4, 2e-4, 1e-4]), seen
            seen.clear()
            run(stage, *flags, "--no-lr-decay")
            assert not seen, seen
    finally:
        common.set_lr = set_lr


def test_what_looks_wrong_is_said():
    """Collapse, answers without an end, a value that rises while the reward falls, a policy that leaps away."""
    os.makedirs(path("watch"), exist_ok=True)
    good = dict(entropy=1.0, ended=1.0, length=9.0, kl=1.0, q_mean=0.0, gold=0.5)
    for change, word in (dict(), None), (dict(entropy=0.0), "collapsed"), (dict(ended=0.0), "endless"), (dict(length=1.0), "empty"), (dict(kl=99.0), "far away"), (dict(kl=9.0), ""), (dict(kl=3.9), None), \
            (dict(gold=0.3, q_mean=0.2), "fooled"), (dict(gold=0.3), None):
        with contextlib.redirect_stderr(io.StringIO()) as err:
            metrics = common.Metrics(path("watch"), 25, "watch", ())
            for step in range(25):
                metrics.log(step, **(good if step < 10 else good | change))
            metrics.close()
        assert err.getvalue().count("warning: ") == (word is not None) + (change.get("kl") == 99.0) and (word or "") in err.getvalue(), (change, err.getvalue())
        assert ("from step 10 on: jumped" in err.getvalue()) == (change.get("kl", 0.0) > 4)
        with open(path("watch/metrics.jsonl")) as f:
            assert [json.loads(line).get("warnings", [""])[0].split(":")[0] for line in f][-1] == (word or "")

    world()                                                   # and after the last update, which no step follows
    jumped, common.jumped = common.jumped, lambda kl, rows: len(rows) == 4
    try:
        for name, stage, argv in resume_cases("0")[2:]:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as err:
                stage.main([*argv, "--out", path("jumped", name)])
            assert err.getvalue().count("warning: ") == err.getvalue().count("warning: the last updates took the policy far") == 1, err.getvalue()
    finally:
        common.jumped = jumped


def test_sigterm_saves_and_ends_well():
    world()
    import signal
    import time

    name, _, argv = resume_cases("0")[2]
    argv = [*argv, "--out", path("term"), "--max-steps", "500", "--save-every", "1000"]
    process = subprocess.Popen([sys.executable, "dvpo.py", *argv], cwd=HERE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                               env={k: v for k, v in os.environ.items() if k not in common.RANKS})
    lines = lambda: sum(1 for _ in open(path("term/metrics.jsonl"))) if os.path.exists(path("term/metrics.jsonl")) else 0
    for _ in range(600):
        time.sleep(0.1)
        if lines() >= 3:
            break
    process.send_signal(signal.SIGTERM)
    err = process.communicate(timeout=60)[1]
    assert process.returncode == 0 and "--resume" in err, err
    done = lines()
    assert 3 <= done < 500 and os.listdir(path("term/checkpoint")) == [f"step_{done}"]
    rows = run(dvpo, *argv[:-4], "--resume", "--max-steps", str(done + 1))
    assert [r["step"] for r in rows] == list(range(done + 1))


# ---------------------------------------------------------------------------------------------------------------------
# From outside


def script(*argv, env=None, timeout=300):
    clean = {k: v for k, v in os.environ.items() if k not in common.RANKS}
    return subprocess.run(argv, cwd=HERE, env=dict(clean, **(env or {})), capture_output=True, text=True, timeout=timeout)


def test_a_thread_cannot_fail_a_finished_run():
    """Threads in torch at the end abort Python's own shutdown (without finish: 6 of 6 times), as gloo's can."""
    code = """if True:
        import atexit, threading, time, torch, common
        def work(x=torch.randn(100)):
            while True:
                x + x
        for _ in range(2):
            threading.Thread(target=work, daemon=True).start()
        time.sleep(0.2)
        atexit.register(print, "closed")
        print("done")
        common.finish()"""
    done = script(sys.executable, "-c", code)
    assert (done.returncode, done.stdout) == (0, "done\nclosed\n"), done.stderr


def test_missing_input_is_one_line():
    world()
    no_sft = ["--init-from", path("none/sft/model"), "--data", path("toy/prompts.jsonl"), "--heldout", path("toy/prompts.jsonl"), "--out", path("x")]
    done = script(sys.executable, "dvpo.py", *no_sft)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1 and "sft" in done.stderr, done.stderr
    for stage, argv, word in (dvpo, ["--init-from", path("sft/model"), "--gvm", path("none/gvm/model"), *RL[2:]], "train_gvm.py"), \
            (sft, ["--data", path("nothing.jsonl")], "nothing.jsonl"), (sft, ["--data", "data/toy/nothing.jsonl"], "data/toy.py"), (dvpo, ["--batch-size", "7"], "--batch-size"):
        refused(lambda: stage.main([*argv, "--out", path("x")]), "error: ", word)


def two_ranks(*commands):
    """Runs (stage, flags) one after the other on two ranks; -> the metrics of each. One launch for all: starting takes longer than the steps."""
    done = script(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "test_smoke.py",
                  json.dumps([(stage.__name__, argv) for stage, argv in commands]), env=dict(OMP_NUM_THREADS="1"))
    assert done.returncode == 0, done.stderr[-3000:]
    return [[json.loads(line) for line in open(os.path.join(argv[argv.index("--out") + 1], "metrics.jsonl"))] for _, argv in commands]


def test_two_ranks_equal_one_and_zero_3_equals_zero_1():
    """The same global batch gives the same losses, on one rank and on two, sharded and whole.

    ZeRO-3 with no live parameters allowed: the path of a model too big to stay gathered.
    """
    world()
    with open(path("ds3.json"), "w") as f:
        json.dump({"gradient_clipping": 1.0, "steps_per_print": 10**9, "zero_optimization": {
            "reduce_bucket_size": 5000, "stage3_max_live_parameters": 0, "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0,
            "stage3_param_persistence_threshold": 0}}, f)
    ds3 = ("--zero", "3", "--ds-config", path("ds3.json"))
    gvm = (*GVM, "--max-steps", "3", "--tau-pairs", "1")
    one = run(train_gvm, *gvm, "--out", path("one"), "--batch-size", "32")
    rl = (*RL, "--max-steps", "2", "--batch-size", "32", "--mini-batch-size", "16")
    ppo = ("--rm-max-steps", "3", "--pairs", path("toy/pairs.jsonl"), "--pairs-heldout", path("toy/pairs_heldout.jsonl"))
    two, whole, *rest = two_ranks(*((train_gvm, (*gvm, "--out", path(name), "--batch-size", "16", *zero)) for name, zero in (("two", ds3), ("two0", ("--zero", "0")))),
                           *((stage, (*rl, *own(zero[1]), "--out", path(stage.__name__, zero[1]), *zero)) for stage, own in ((dvpo, lambda z: ("--gvm", path("gvm/model"))), (ppo_baseline, lambda z: (*ppo, "--rm", path("rm2", z, "model"))))
                             for zero in (("--zero", "1"), ds3)))
    for a, b in (*zip(one, two), *zip(one, whole)):
        close(a["loss"], b["loss"], 1e-5), close(a["q_std"], b["q_std"], 1e-5)
    for stage, z1, z3 in ("dvpo", *rest[:2]), ("ppo_baseline", *rest[2:]):
        for a, b in zip(z1, z3):
            assert a["ratio_first"] == b["ratio_first"] == 1.0
            for key in ("loss", "kl", "gold", "q_mean"):
                close(a[key], b[key], 1e-4)
        for key, w in weights(path(stage, "1/model")).items():                      # what ZeRO-3 saved is whole
            close(w, weights(path(stage, "3/model"))[key], 1e-3)


def test_deepspeed_launcher():
    world()
    done = script(sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", str(20000 + os.getpid() % 20000), "dvpo.py", *RL, "--gvm",
                  path("gvm/model"), "--out", path("ds"), "--max-steps", "1", "--batch-size", "32", "--mini-batch-size", "16", env=dict(OMP_NUM_THREADS="1"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(open(path("ds/metrics.jsonl")).readline())["ratio_first"] == 1.0


def test_help_teaches():
    for stage in sft, train_gvm, dvpo, ppo_baseline:
        with contextlib.redirect_stdout(io.StringIO()) as text:
            try:
                stage.main(["--help"])
            except SystemExit as e:
                assert e.code == 0
        assert all(word in text.getvalue() for word in ("2502.16944", "paper", "(default: "))


if __name__ == "__main__":
    import time

    if len(sys.argv) > 1:                                                         # one rank of two_ranks()
        common.CHUNK = 64                                                         # several chunks of logits, and not equally many on both ranks
        for stage, argv in json.loads(sys.argv[1]):
            globals()[stage].main(argv)
        common.finish()
    passed = failed = 0
    begin = time.time()
    for name, test in list(globals().items()):
        if name.startswith("test_"):
            start = time.time()
            try:
                test()
                passed += 1
                print(f"{name:<52} ok {time.time() - start:6.1f} s", flush=True)
            except (Exception, SystemExit):
                import traceback

                failed += 1
                print(f"{name:<52} FAILED\n{traceback.format_exc()}", flush=True)
    print(f"{time.time() - begin:.0f} s\n{passed} passed, {failed} failed")
    if not failed and "T_TMP" not in os.environ:
        shutil.rmtree(TMP)
    common.finish(int(failed > 0))
