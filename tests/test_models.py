import argparse
import contextlib
import io
import sys
from unittest import mock

import pytest
import tokenizers
import torch
import transformers
from helpers import (
    PROMPT,
    RL,
    Args,
    close,
    example_frame,
    path,
    quirky_model,
    quirky_tokenizer,
    refused,
    run,
    script,
    tiny_gpt2,
    tiny_llama,
    world,
)

import common
import dvpo
import ppo_baseline
import sft
import train_gvm
from data import toy
from runtime import checkpoints


def test_lora_off_is_the_base_and_merged_is_on():
    tok = toy.tokenizer()
    for tiny in tiny_gpt2, tiny_llama:
        model = tiny()
        _, _, ids, attn, mask = example_frame(tok)
        T = mask.shape[1]
        with torch.no_grad():
            base = model(ids, attn, T)
            model.add_adapter("a", 4, 8)
            model.add_adapter("b", 2, 8)
            layers = sum(isinstance(m, common.LoRA) for m in model.modules())
            assert layers == (8 if tiny is tiny_gpt2 else 14)               # every projection of two blocks
            assert torch.equal(model(ids, attn, T), base)                   # off: bit for bit
            assert torch.equal(model(ids, attn, T, adapter="a"), base)      # B is zero at first
            for layer in model.lora_layers():
                torch.nn.init.normal_(layer.B["a"].weight, std=0.3)
            on = model(ids, attn, T, adapter="a")
            assert (on - base).abs().max() > 1e-3
            assert torch.equal(model(ids, attn, T, adapter="b"), base)
            assert torch.equal(model(ids, attn, T), base)
            plain = type(model.lm)(model.lm.config).eval()
            plain.load_state_dict(model.merged_state_dict("a"))
            close(common.LM(plain)(ids, attn, T), on, 1e-4)


def test_tokenizers_as_they_are():
    for kind in ("llama", "mistral"):
        tok = common.load_tokenizer(quirky_model(kind))
        p, r = common.encode_prompt(tok, PROMPT), common.encode_response(tok, "the soup was great .")
        assert p[0] == tok.bos_token_id and p.count(tok.bos_token_id) == 1 and tok.eos_token_id not in p
        assert r.count(tok.eos_token_id) == 1 and r[-1] == tok.eos_token_id and tok.bos_token_id not in r
        assert tok.decode(r, skip_special_tokens=True) == "the soup was great ."
        template = dict(mistral="[INST]", llama="### Assistant:")
        assert [name for name, mark in template.items() if mark in tok.decode(p)] == [kind]
        both, _ = common.prepend_tau(tok, [(p, r)], p, 1000, 99)
        assert both.count(tok.bos_token_id) == 1 and both[len(p) + len(r):] == p[1:]
        eager = quirky_tokenizer(kind, add_eos_token=True)  # some append eos by themselves, or claim to
        assert eager.eos_token_id not in common.encode_prompt(eager, PROMPT)
        assert common.encode_response(eager, "a").count(eager.eos_token_id) == 1
        roles = ("user", "a"), ("assistant", "b"), ("user", "c")
        chat = [dict(role=role, content=content) for role, content in roles]
        assert common.encode_prompt(tok, chat).count(tok.bos_token_id) == 1


@pytest.mark.parametrize("kind", ["llama", "mistral", "smollm2", "qwen3"])
def test_the_presets_architectures_through_all_stages(kind):
    """Two layers, their tokenizers' quirks; a saved --lora policy generates what that in memory does."""
    world()
    from transformers import AutoModelForCausalLM

    model = quirky_model(kind)

    def to(stage):
        return path("q", kind, stage)

    small = ("--model", model, "--batch-size", "4", "--grad-accum", "1", "--max-steps", "2")
    few = path("toy/gvm_small.jsonl")
    run(sft, *small, "--data", path("toy/sft.jsonl"), "--heldout", path("toy/sft_small.jsonl"), "--out",
        to("sft"), "--lr", "1e-2")
    own = ("--init-from", to("sft/model"))
    run(train_gvm, *small, *own, "--data", few, "--heldout", few, "--out", to("gvm"), "--lr", "1e-2")
    rl = (*small, *own, *RL[2:], "--max-new-tokens", "12", "--mini-batch-size", "2")
    pairs = ("--pairs", path("toy/pairs.jsonl"), "--pairs-heldout", path("toy/pairs_small.jsonl"))
    rows = run(dvpo, *rl, "--gvm", to("gvm/model"), "--out", to("dvpo"), "--lora", "--lr", "1e-2")
    rows += run(ppo_baseline, *rl, *pairs, "--rm", to("rm/model"), "--rm-max-steps", "1", "--out", to("ppo"))
    assert all(row["ratio_first"] == 1.0 for row in rows)
    tok = common.load_tokenizer(to("dvpo/model"))
    lm = common.load_model(to("sft/model"))             # the policy in memory: trunk and adapter
    lm.add_adapter("policy", 8, 32)
    for layer in lm.lora_layers():
        torch.nn.init.normal_(layer.B["policy"].weight, std=0.3)
    checkpoints.save_model(lm.eval(), tok, path("q", kind, "saved"), "policy")
    args, prompts = Args(), [common.encode_prompt(tok, p) for p in (PROMPT, "review the wine .")]
    args.temperature = 1e-6
    ids, attn, mask, _ = common.rollout(lm, prompts, tok, args, "cpu", "policy")
    loaded = AutoModelForCausalLM.from_pretrained(path("q", kind, "saved")).eval()
    P = ids.shape[1] - mask.shape[1]
    greedy = loaded.generate(ids[:, :P], attention_mask=attn[:, :P], do_sample=False, top_k=None,
                             temperature=None, pad_token_id=tok.pad_token_id, max_new_tokens=24)
    assert torch.equal(greedy[:, P:] * mask, ids[:, P:] * mask)


def test_no_word_is_lost_to_a_pad_token():
    """GPT-2's tokenizer has neither pad nor spare tokens: what SFT saves must decode all the words it had."""
    world()
    core = tokenizers.Tokenizer(tokenizers.models.BPE())
    core.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(initial_alphabet=core.pre_tokenizer.alphabet())
    core.train_from_iterator(["what a soup !"], trainer)
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    transformers.PreTrainedTokenizerFast(tokenizer_object=core, **special).save_pretrained(path("no_pad"))
    tok = common.load_tokenizer(path("no_pad"))
    checkpoints.save_model(common.load_model(quirky_model("llama")), tok, path("no_pad_saved"))
    ids = tok("what a soup!")["input_ids"]
    assert 0 in ids                                         # "!", which fills frames
    assert common.load_tokenizer(path("no_pad_saved")).decode(ids, skip_special_tokens=True) == "what a soup!"


def test_a_tokenizer_with_more_ids_than_the_model_has_embeddings():
    """A pad added behind the vocabulary has no embedding, and needs none."""
    world()
    tok = common.load_tokenizer(path("sft/model"))
    tok.add_special_tokens(dict(pad_token="<behind>"))
    model = common.load_model(path("sft/model"))
    assert tok.pad_token_id >= model.lm.get_input_embeddings().num_embeddings
    model.lm.save_pretrained(path("more_ids"))
    tok.save_pretrained(path("more_ids"))
    data = ("--data", path("toy/sft.jsonl"), "--heldout", path("toy/sft_small.jsonl"))
    flags = ("--init-from", path("more_ids"), "--reward", "", "--max-steps", "2")
    rows = run(sft, *flags, *data, "--out", path("more_ids_sft"))
    assert len(rows) == 2


@pytest.mark.parametrize("what", ["tokenizer", "trunk"])
def test_gvm_of_another_model_is_refused(what):
    world()
    base = path("toy/model")
    if what == "tokenizer":                                # the SFT model with another chat template
        base, tok = path("other/sft/model"), common.load_tokenizer(path("sft/model"))
        tok.chat_template = tok.chat_template.replace("<assistant>", "<user>")
        common.load_model(path("sft/model")).lm.save_pretrained(base)
        tok.save_pretrained(base)
    argv = ["--init-from", base, "--gvm", path("gvm/model"), *RL[2:], "--out", path("x"), "--max-steps", "1"]
    refused(lambda: dvpo.main(argv), f"trained on another {what}", "train_gvm.py")


SCALED = [("Cohere", dict(logit_scale=0.3)), ("Granite", dict(logits_scaling=4.0)),
          ("Gemma2", dict(final_logit_softcapping=1.0, head_dim=8))]


@pytest.mark.parametrize(("name", "more"), SCALED)
def test_logits_behind_a_scale_or_a_cap(name, more):
    """Scores, gradients and decoding are those of the model's own forward."""
    torch.manual_seed(0)
    config = getattr(transformers, name + "Config")(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, initializer_range=1.0, **more)
    getattr(transformers, name + "ForCausalLM")(config).save_pretrained(path(name))
    model, rows = common.load_model(path(name)).eval(), torch.randint(3, 64, (2, 9))
    want = model.lm(rows).logits[:, 4:-1].log_softmax(-1).gather(-1, rows[:, 5:, None])[..., 0]
    want_gradients = torch.autograd.grad(want.sum(), list(model.lm.parameters()))
    for common.CHUNK in (3, 1024):
        logp = model(rows, torch.ones_like(rows), 4)
        close(logp, want, 1e-5)
        gradients = torch.autograd.grad(logp.sum(), list(model.lm.parameters()))
        for a, b in zip(gradients, want_gradients, strict=True):
            close(a, b, 1e-4)
    decode = common.Decoder(model, rows[:, :5], torch.ones(2, 5, dtype=torch.long))
    close(decode.logits, model.lm(rows[:, :5]).logits[:, -1], 1e-5)
    decode(rows[:, 5])
    close(decode.logits, model.lm(rows[:, :6]).logits[:, -1], 1e-5)


def test_models_that_would_train_on_wrong_numbers_are_refused():
    world()
    folder = path("unknown_scale")
    common.load_model(path("sft/model")).lm.save_pretrained(folder)
    plain = transformers.GPT2LMHeadModel.forward

    def scaled(self, *args, **kwargs):
        out = plain(self, *args, **kwargs)
        out.logits = out.logits * 0.5
        return out

    with mock.patch("transformers.GPT2LMHeadModel.forward", scaled):
        refused(lambda: common.load_model(folder), "changes the logits after its head")
    flags = ("--gvm", path("gvm/model"), *RL, "--out", path("x"))
    refused(lambda: dvpo.main([*flags, "--max-new-tokens", "200"]), "positions", "256")
    refused(lambda: dvpo.main([*flags, "--save-every", "0"]), "--save-every")
    small = path("toy/sft_small.jsonl")
    sft_argv = ["--init-from", path("sft/model"), "--data", small, "--heldout", small, "--out", path("x"),
                "--prompts", path("toy/prompts_heldout.jsonl")]
    small = path("toy/gvm_small.jsonl")
    gvm_argv = ["--init-from", path("sft/model"), "--data", small, "--heldout", small, "--out", path("x")]
    long = ["--max-length", "257"]
    refused(lambda: sft.main([*sft_argv, *long]), "257", "256 positions")
    samples = ["--max-length", "256", "--max-new-tokens", "129"]        # and prompts of 128 tokens
    refused(lambda: sft.main([*sft_argv, *samples]), "257", "256 positions")
    refused(lambda: train_gvm.main([*gvm_argv, *long]), "257", "256 positions")


def test_too_little_memory_ends_in_one_line():
    from runtime.processes import report_error

    for error in torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("[x] can't allocate memory: 12"):
        with contextlib.redirect_stderr(io.StringIO()) as said:
            report_error(sys.excepthook, type(error), error, None)
        line, = said.getvalue().splitlines()
        assert line.startswith("error: out of memory; try fewer rows") and "--lora" in line
    with contextlib.redirect_stderr(io.StringIO()) as said:
        report_error(sys.excepthook, RuntimeError, RuntimeError("another"), None)
    assert "RuntimeError: another" in said.getvalue()
    # And in a run
    world()
    argv = [*RL, "--gvm", path("gvm/model"), "--out", path("too_large")]
    code = ("import dvpo, torch, unittest.mock as m; e = torch.OutOfMemoryError('CUDA out of memory'); "
            f"m.patch('common.rollout', side_effect=e).start(); dvpo.main({argv})")
    done = script(sys.executable, "-c", code)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert "error: out of memory; try fewer rows" in done.stderr


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


def kept_bytes(model):
    """What the backward pass of one row keeps beside the weights."""
    ids = torch.arange(16)[None]
    weights = {p.data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    model.train()                                       # --gradient-checkpointing works in train mode only
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = model.hidden(ids, torch.ones_like(ids), 15)
    del out                                             # kept until here, so that no address is used twice
    return sum(size for address, size in kept.items() if address not in weights)


def test_gradient_checkpointing_changes_nothing_but_memory():
    world()
    flags = (*RL, "--gvm", path("gvm/model"), "--max-steps", 2, "--batch-size", 16, "--mini-batch-size", 8)
    plain = run(dvpo, *flags, "--out", path("plain"))
    again = run(dvpo, *flags, "--out", path("recomputed"), "--gradient-checkpointing")
    for a, b in zip(plain, again, strict=True):
        close(a["loss"], b["loss"], 1e-6)
        close(a["kl"], b["kl"], 1e-5)
        assert b["ratio_first"] == 1.0
    recomputing = argparse.Namespace(dtype="auto", gradient_checkpointing=True)
    before = kept_bytes(common.load_model(path("sft/model")))
    after = kept_bytes(common.load_model(path("sft/model"), recomputing))
    assert 0 < after < 0.5 * before


def test_optimizer_offload_changes_nothing():
    world()
    flags = (*RL, "--gvm", path("gvm/model"), "--max-steps", 2, "--batch-size", 16, "--mini-batch-size", 8,
             "--out", path("off"))
    for zero in ("1", "3"):
        plain, off = run(dvpo, *flags, "--zero", zero), run(dvpo, *flags, "--zero", zero, "--offload")
        for a, b in zip(plain, off, strict=True):
            close(a["loss"], b["loss"], 1e-6)
            close(a["kl"], b["kl"], 1e-5)
