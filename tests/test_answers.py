"""How answers end: several end tokens, cut answers, sampled ids, tau, and the KL controller."""
import contextlib
import io
import json
import os
from unittest import mock

import pytest
import torch
import transformers
from helpers import GVM, RL, Args, close, path, refused, run, tiny_gpt2, tiny_llama, weights, world

import common
import dvpo
import runtime.run
import train_gvm
from data import toy
from runtime import checkpoints
from tools import label

CHATML = ("{% for m in messages %}<bos> {{ m.role }} {{ m.content }} <eos> {% endfor %}"
          "{% if add_generation_prompt %}<bos> <assistant>{% endif %}")


def emits(model, token):
    """The model says this token whatever it has read."""
    with torch.no_grad():
        model.lm.get_output_embeddings().weight.zero_()
        head = torch.nn.Linear(model.lm.config.hidden_size, model.lm.config.vocab_size)
        head.weight.data.zero_()
        head.bias.data.zero_()
        head.bias.data[token] = 100.0
    model.lm.lm_head = head
    return model


def test_any_id_of_the_generation_configuration_ends_an_answer():
    tok = toy.tokenizer()
    model = emits(tiny_llama(), 7)
    for named, steps in ([2, 7], 1), (7, 1), (2, 24), (None, 24):
        model.lm.generation_config.eos_token_id = named
        ids, _, mask, ended = common.rollout(model, [[1, 4, 9]], tok, Args, "cpu")
        assert mask.sum().item() == steps and ended.item() == (steps == 1)
        assert ids[0, 3].item() == 7
        if steps == 1:                                  # transformers stops there, too
            plain = model.lm.generate(ids[:, :3], do_sample=False, max_new_tokens=24, pad_token_id=0)
            assert plain[0, 3:].tolist() == [7]
    model = tiny_llama()
    model.lm.generation_config.eos_token_id = [2, 7]
    checkpoints.save_model(model, tok, path("two_ends"))
    config = transformers.GenerationConfig.from_pretrained(path("two_ends"))
    assert config.eos_token_id == [2, 7]


def test_a_cut_answer_gets_no_eos():
    """GVM, tau and reward model; ids are taken as they were sampled where the tokenizer is the same."""
    tok = toy.tokenizer()
    prompt, said = "review the soup and the staff .", "the soup was great"
    words = tok(said, add_special_tokens=False)["input_ids"]
    whole = dict(prompt=prompt, response=said, reward=0.5, policy="a")
    cut = dict(whole, ended=False)
    for row, want in (whole, [*words, 2]), (dict(whole, ended=True), [*words, 2]), (cut, words):
        for before in [], [cut]:
            ids, spans = common.pack(tok, row, before, 200, 99)
            assert ids[spans[-1][1]:] == want
            assert not before or ids[spans[0][1]:spans[0][2]] == words
    mine = dict(cut, ids=[9, 9, 9], tokenizer=common.tokenizer_fingerprint(tok))
    assert common.encode_row(tok, mine) == [9, 9, 9]
    assert common.encode_row(tok, dict(mine, tokenizer="another")) == words
    pair = dict(prompt=prompt, chosen=said, rejected="the soup", chosen_ended=False, rejected_ids=[8, 2],
                tokenizer=common.tokenizer_fingerprint(tok), rejected_policy="b")
    assert common.encode_row(tok, common.one_side(pair, "chosen")) == words
    assert common.encode_row(tok, common.one_side(pair, "rejected")) == [8, 2]
    toy.write_jsonl(path("ends.jsonl"), [whole, cut, dict(whole, ended=True)])
    toy.write_jsonl(path("end_pairs.jsonl"), [pair])
    rows = train_gvm.Labelled([path("ends.jsonl"), path("end_pairs.jsonl")])
    rows.penalise(0.75)
    assert [row["reward"] for row in rows] == [0.5, -0.25, 0.5, 0.25, -1.0]
    assert [row["policy"] for row in rows] == ["a", "a", "a", None, "b"]


@pytest.mark.parametrize(("key", "value"), [("ended", "no"), ("ids", []), ("ids", [1, "2"]), ("ids", [-1])])
def test_broken_rows_are_refused(key, value):
    row = {"prompt": "a", "response": "b", "reward": 1, key: value}
    toy.write_jsonl(path("broken.jsonl"), [row])
    refused(lambda: common.read_rows(path("broken.jsonl"), ["prompt", "response", "reward"]), f":1: {key}")


def test_label_writes_what_was_sampled():
    """`ended` and ids of the rollout; a system message is sampled behind, and not written."""
    world()
    toy.write_jsonl(path("asked.jsonl"), [
        dict(prompt="review the soup and the wine .", system="be kind", policy="kind"),
        dict(prompt="review the wine and the soup .")])
    to = path("cut.jsonl")
    label.main(["--policy", path("sft/model"), "--prompts", path("asked.jsonl"), "--to", to, "--n", "32",
                "--max-new-tokens", "8", "--batch-size", "16", "--temperatures", "1.0"])
    tok = toy.tokenizer()
    with open(to) as f:
        rows = [json.loads(line) for line in f]
    assert {row["policy"] for row in rows} == {"kind", "sft"}
    assert {row["ended"] for row in rows} == {True, False}
    for row in rows:
        assert row["ended"] == (row["ids"][-1] == tok.eos_token_id) and len(row["ids"]) <= 8
        assert row["ended"] or len(row["ids"]) == 8
        assert tok.decode(row["ids"], skip_special_tokens=True) == row["response"]
        assert "be kind" not in json.dumps(row)
    with open(path("cut_pairs.jsonl")) as f:
        pairs = [json.loads(line) for line in f]
    for pair in pairs:
        for side in "chosen", "rejected":
            ids = common.encode_row(tok, common.one_side(pair, side))
            assert (ids[-1] == tok.eos_token_id) == pair[f"{side}_ended"]


def test_the_gvm_sees_it_coming_that_an_answer_will_not_end():
    """Half of the answers with these words end there, half are cut: Q is between the two before <eos>."""
    world()
    text = "the soup was great . the wine was"
    rows = [dict(prompt=f"review the {a} and the wine .", response=text, reward=0.5, ended=ended)
            for a in ("soup", "staff", "room") for ended in (True, False)]
    rows += [dict(prompt="review the wine .", response="the wine was cold .", reward=-0.5)] * 6
    toy.write_jsonl(path("halves.jsonl"), rows)
    out = path("ends_gvm")
    run(train_gvm, *GVM[:2], "--data", path("halves.jsonl"), "--heldout", path("halves.jsonl"), "--out", out,
        "--max-steps", 100, "--batch-size", 6, "--true-q", "", "--missing-eos-penalty", 2.0)
    tok, gvm = toy.tokenizer(), common.load_model(path("sft/model"), trainable=False).eval()
    meta = common.load_adapter(gvm, tok, os.path.join(out, "model"), "")
    assert meta["missing_eos_penalty"] == 1.0
    ids, attn, mask, _, _ = train_gvm.training_frame([common.pack(tok, rows[0], [], 200, 99)], "cpu")
    with torch.no_grad():
        q = gvm(ids, attn, mask.shape[1], "gvm", head="gvm")
    close(q[0, -1], 0.5, 0.1)                           # <eos>
    close(q[0, -2], 0.0, 0.1)                           # the last word


def test_q_std_is_that_of_the_end_of_training():
    world()
    out = path("sigma_gvm")
    rows = run(train_gvm, *GVM, "--out", out, "--max-steps", 50, "--batch-size", 16)
    with open(os.path.join(out, "model", "adapter.json")) as f:
        meta = json.load(f)
    late = sum(row["q_std"] for row in rows[-10:]) / 10
    assert abs(meta["q_std"] / late - 1) < 0.2
    for sigma, warns in (0.1, True), (0.4, False):      # of rewards of 0.89: one that has hardly learned
        moments = [torch.tensor(0.0), torch.tensor(sigma)]
        argv = *GVM, "--out", path("warned"), "--max-steps", "1", "--batch-size", "8"
        with (contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(io.StringIO()),
              mock.patch("common.masked_moments", return_value=moments)):
            train_gvm.main(argv)
        assert ("warning: sigma of Q is" in said.getvalue()) == warns
    equal = [dict(prompt="review the wine .", response=r, reward=0.5) for r in ("a", "b")]
    toy.write_jsonl(path("equal.jsonl"), equal)
    refused(lambda: train_gvm.main([*GVM[:2], "--data", path("equal.jsonl"), "--heldout", path("equal.jsonl"),
                                    "--out", path("x")]), "all rewards are equal")


def test_bos_that_opens_every_turn_stays():
    """ChatML: each turn opens with the bos token. One that stands only at the beginning is dropped."""
    tok = toy.tokenizer()
    once = common.encode_prompt(tok, "review the wine .")
    assert common.append_to_prefix(tok, [9], once) == [9, *once[1:]]
    tok = toy.tokenizer()                               # encode_prompt remembers what a tokenizer made
    tok.chat_template = CHATML
    turns = common.encode_prompt(tok, "review the wine .")
    assert turns.count(tok.bos_token_id) == 2
    assert common.append_to_prefix(tok, [9], turns) == [9, *turns]
    ids, _ = common.prepend_tau(tok, [(turns, [9, 2])], turns, 999, 9)
    assert ids == [*turns, 9, 2, *turns]


def test_a_long_prompt_does_not_take_tau_from_the_others():
    """tau depends on the run's lengths alone; what does not fit is passed over, and one pair always fits."""
    tok, rng = toy.tokenizer(), torch.Generator()
    import numpy as np

    rng = np.random.default_rng(0)
    short, long = ([1, 4, 9], [8, 2]), ([1] + [9] * 50, [8] * 30)
    buffer = list(zip(*[long, short, long, short, long], strict=True))
    ids, pairs = common.draw_tau(tok, buffer, 2, 20, 10, rng)
    assert pairs == 2 and ids == [1, 4, 9, 8, 2, 4, 9, 8, 2]
    ids, pairs = common.draw_tau(tok, buffer, 3, 20, 10, rng)
    assert pairs == 2                                   # the third does not fit
    ids, pairs = common.draw_tau(tok, list(zip(long, strict=False)), 2, 20, 10, rng)
    # The beginning and the end of its prompt, its answer cut to tau_length
    assert pairs == 1 and ids == [1] + [9] * 9 + [8] * 10


def test_tau_of_the_first_step_is_not_what_is_valued(monkeypatch):
    """At every step tau holds answers of an earlier rollout; pairs and tokens are logged."""
    world()
    drawn, sampled = [], []
    real_draw, real_rollout = common.draw_tau, common.rollout

    def rollout(*args, **kwargs):
        out = real_rollout(*args, **kwargs)
        sampled.append(common.unpad(out[0], out[2]))
        return out

    def draw(tok, buffer, *rest):
        drawn.append((buffer[1], len(sampled)))
        return real_draw(tok, buffer, *rest)

    monkeypatch.setattr(common, "draw_tau", draw)
    monkeypatch.setattr(common, "rollout", rollout)
    rows = run(dvpo, *RL, "--gvm", path("gvm/model"), "--out", path("taus"), "--max-steps", 2,
               "--batch-size", 8, "--mini-batch-size", 8)
    for responses, rollouts in drawn:
        assert responses == sampled[rollouts - 2]       # the rollout before the one that is valued
    assert all(row["tau_pairs"] == 1 and row["tau_tokens"] > 10 for row in rows)


def test_no_position_beyond_the_gvms():
    world()
    flags = ("--gvm", path("gvm/model"), *RL, "--out", path("x"))
    refused(lambda: dvpo.main([*flags, "--max-prompt-length", "200"]), "trained on 256 tokens")


def test_kl_coefficient():
    """By a tenth at most; up where the KL is too high or rises to it within five steps, else down."""
    close(common.adapt_kl_coef(0.2, 6.0, 6.0, 6.0), 0.2)
    close(common.adapt_kl_coef(0.2, 9.0, 9.0, 6.0), 0.2 * 1.05)
    close(common.adapt_kl_coef(0.2, 60.0, 60.0, 6.0), 0.2 * 1.1)
    close(common.adapt_kl_coef(0.2, 3.0, 3.0, 6.0), 0.2 * 0.95)
    close(common.adapt_kl_coef(0.2, 3.0, 2.0, 6.0), 0.2 * (1 + 0.1 * (8 / 6 - 1)))      # on its way to 8
    close(common.adapt_kl_coef(0.2, 9.0, 9.0, 0.0), 0.2)                                # constant
    close(common.adapt_kl_coef(0.2, 9.0, 12.0, 6.0), 0.2 * 0.9)                         # on its way back


def test_adapter_of_the_forward_is_that_of_the_recomputation():
    """Gradient checkpointing: a reference pass before the backward one changes no gradient."""
    grads = []
    for recompute in False, True:
        tok, model = toy.tokenizer(), tiny_gpt2()
        model.add_adapter("policy", 4, 8)
        model.add_adapter("gvm", 4, 8)
        for layer in model.lora_layers():
            for name in "policy", "gvm":
                torch.nn.init.normal_(layer.B[name].weight, std=0.3)
        if recompute:
            model.lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(
                use_reentrant=False, context_fn=model.recompute_contexts))
        model.train()
        ids = torch.arange(6, 30).view(2, 12)
        logp = model(ids, torch.ones_like(ids), 6, adapter="policy")
        with torch.no_grad():
            model(ids, torch.ones_like(ids), 6)
            model(ids, torch.ones_like(ids), 6, adapter="gvm")
        logp.sum().backward()
        assert model.active == "gvm"                    # as the last forward left it
        own = model.adapter_parameters("policy").values()
        grads.append(torch.cat([p.grad.flatten() for p in own]))
        assert all(p.grad is None for p in model.adapter_parameters("gvm").values())
        assert tok.eos_token_id == 2
    assert grads[0].abs().max() > 0.1
    close(grads[1], grads[0], 1e-5)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_adapters_accumulate_in_fp32(zero):
    """On a bf16 trunk, 16 micro-batches: adapter and head stay fp32 and so do their gradients, saved too."""
    world()
    out = path("bf16_gvm", str(zero))
    few = path("toy/gvm_small.jsonl")
    flags = (*GVM[:2], "--data", few, "--heldout", few, "--out", out, "--dtype", "bf16", "--zero", zero,
             "--batch-size", 16, "--grad-accum", 16, "--max-steps", 2)
    grads = []
    real = runtime.run.engine

    def engine(model, *rest):
        for p in model.adapter_parameters("gvm").values():
            p.register_hook(lambda grad: grads.append(grad.dtype))
        return real(model, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime.run, "engine", engine)
        rows = run(train_gvm, *flags)
    assert len(rows) == 2 and set(grads) == {torch.float32}
    saved = weights(os.path.join(out, "model"))
    assert all(w.dtype == torch.float32 for w in saved.values())
    B = torch.cat([w.flatten() for key, w in saved.items() if ".B." in key])
    assert not torch.equal(B, B.bfloat16().float())     # fp32 in more than name
