"""What users of other projects ran into: each ends in the right value, or early in one line."""
import contextlib
import datetime
import fcntl
import io
import json
import os
import resource
import subprocess
import sys
from unittest import mock

import pytest
import torch
import transformers
from helpers import (
    CHATML_TEMPLATE,
    HERE,
    PROMPT,
    RL,
    close,
    path,
    quirky_tokenizer,
    refused,
    resume_cases,
    run,
    weights,
    world,
)

import common
import dvpo
import ppo_baseline
import sft
import train_gvm
from data import toy
from runtime import flags, metrics, processes
from tools import label, sample

SMALL = dict(vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2)
LINEAR = dict(head_dim=8, linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8,
              linear_value_head_dim=8, layer_types=["linear_attention", "full_attention"])
MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
           shared_expert_intermediate_size=16)


def chat_model(name, config):
    """A folder with a two-layer model of this configuration and a ChatML tokenizer."""
    if not os.path.exists(path(name)):
        torch.manual_seed(0)
        tok = quirky_tokenizer("qwen3")
        model = transformers.AutoModelForCausalLM.from_config(config)
        model.generation_config.eos_token_id = tok.eos_token_id
        model.save_pretrained(path(name))
        tok.save_pretrained(path(name))
    return path(name)


# I. Hybrid and recurrent models

HYBRIDS = {
    "qwen3_next": lambda: transformers.Qwen3NextConfig(**SMALL, **LINEAR, **MOE),
    "lfm2": lambda: transformers.Lfm2Config(**SMALL, layer_types=["conv", "full_attention"]),
    "jamba": lambda: transformers.JambaConfig(
        **SMALL, mamba_d_state=8, num_experts=2, attn_layer_period=2, attn_layer_offset=1,
        use_mamba_kernels=False),
}


@pytest.mark.parametrize("name", HYBRIDS)
def test_hybrid_models_through_gvm_and_dvpo(name):
    """Recurrent layers cannot continue a prefix: every row has tau in front of it."""
    world()
    folder = chat_model(name, HYBRIDS[name]())
    few = path("toy/gvm_small.jsonl")
    small = ("--init-from", folder, "--batch-size", "4", "--grad-accum", "1", "--max-steps", "2",
             "--lr", "1e-2")
    run(train_gvm, *small, "--data", few, "--heldout", few, "--out", path(name, "gvm"), "--max-length",
        "400", "--tau-pairs", "1", "--true-q", "")
    assert common.read_prefix(common.load_model(folder), [5, 6], None, None, "cpu") is None
    seen = []
    plain = common.forward_in_micro_batches

    def watched(model, ids, attn, T, order, size, prefix_cache=None, **kwargs):
        out = plain(model, ids, attn, T, order, size, prefix_cache, **kwargs)
        if kwargs.get("head") == "gvm":
            seen.append((ids, attn, T, out))
        return out

    with mock.patch("common.forward_in_micro_batches", watched), mock.patch("common.evaluate"):
        rows = run(dvpo, *small, *RL[2:], "--mini-batch-size", "2", "--max-new-tokens", "8", "--gvm",
                   path(name, "gvm/model"), "--out", path(name, "dvpo"), "--lora")
    assert all(row["ratio_first"] == 1.0 and row["tau_pairs"] == 1 for row in rows)
    tok = common.load_tokenizer(folder)
    trunk = common.load_model(folder, trainable=False).eval()
    common.load_adapter(trunk, tok, path(name, "gvm/model"), "")
    ids, attn, T, q = seen[0]
    tau = rows[0]["tau_tokens"]
    with torch.no_grad():
        for i in range(len(ids)):                       # alone, without padding
            own = ids[i, attn[i].bool()][None]
            n = int(own.shape[1] - (ids.shape[1] - T - int((attn[i, :-T] == 0).sum())))
            assert own.shape[1] > tau + n
            close(trunk(own, torch.ones_like(own), n, "gvm", head="gvm")[0], q[i, :n + 1], 1e-4)


def test_purely_recurrent_models_are_refused_when_loaded():
    config = transformers.MambaConfig(vocab_size=400, hidden_size=32, num_hidden_layers=2, state_size=8,
                                      initializer_range=0.5)
    refused(lambda: common.load_model(chat_model("mamba", config)), "rollouts would be wrong")


def test_lora_of_a_weight_that_a_block_reads_itself():
    """LoRA.weight is the adapted weight, as forward applies it."""
    base = torch.nn.Linear(5, 3)
    lora = common.LoRA(base)
    lora.add("a", 2, 4, 0.0)
    torch.nn.init.normal_(lora.B["a"].weight)
    x = torch.randn(4, 5)
    for active in None, "a":
        lora.active = active
        close(torch.nn.functional.linear(x, lora.weight, lora.bias), lora(x), 1e-5)


# J, M. Positions

def rope(kind, **more):
    scaling = dict(rope_type=kind, rope_theta=1e4, factor=4.0, **more)
    return transformers.LlamaConfig(**SMALL, max_position_embeddings=512, rope_parameters=scaling)


def test_positions_that_depend_on_the_batch_are_not_used():
    longrope = transformers.Phi3Config(
        **SMALL, max_position_embeddings=512, original_max_position_embeddings=64, pad_token_id=0,
        rope_parameters=dict(rope_type="longrope", rope_theta=1e4, short_factor=[1.0] * 4,
                             long_factor=[4.0] * 4, original_max_position_embeddings=64))
    assert flags.context_length(longrope) == 64
    assert flags.context_length(rope("dynamic", original_max_position_embeddings=128)) == 128
    assert flags.context_length(rope("linear")) == 512
    assert flags.context_length(transformers.MambaConfig()) == 1 << 30
    model = common.load_model(chat_model("longrope", longrope))
    refused(lambda: common.check_context(model, 65), "64", "--max-length")


def gemma3():
    text = dict(SMALL, head_dim=8, sliding_window=16, max_position_embeddings=128)
    vision = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
                  image_size=16, patch_size=8)
    return transformers.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=1,
                                     image_token_index=399, boi_token_index=398, eoi_token_index=397)


def test_a_model_that_also_sees():
    """Of Gemma 3 only the text model is adapted and trained; its positions are those that are checked."""
    folder = chat_model("gemma3", gemma3())
    model = common.load_model(folder)
    trained = [key for key, p in model.named_parameters() if p.requires_grad]
    assert trained and not [key for key in trained if "vision" in key or "projector" in key]
    model.add_adapter("a", 2, 4)
    assert len(model.lora_layers()) == 14               # seven projections of two blocks
    assert flags.context_length(model.lm.config) == 128
    refused(lambda: common.check_context(model, 129), "128", "--max-length")
    with torch.no_grad():
        kept = model.lm.model.vision_tower.embeddings.patch_embedding.weight.clone()
    data = ("--data", path("toy/sft_small.jsonl"), "--heldout", path("toy/sft_small.jsonl"))
    run(sft, "--init-from", folder, *data, "--out", path("gemma_sft"), "--max-steps", "1", "--batch-size",
        "4", "--max-length", "128", "--reward", "")
    saved = weights(path("gemma_sft/model"))
    key, = [key for key in saved if key.endswith("patch_embedding.weight")]
    assert torch.equal(saved[key], kept)


# G, H, S. Chat templates

STRICT = ("{% for m in messages %}"
          "{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
          "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
          "{{ raise_exception('roles must alternate') }}{% endif %}<|im_start|>{{ m.content }}{% endfor %}")
SYSTEM_ROW = [dict(role="system", content="be kind"), dict(role="user", content="a")]
TWO_TURNS = [dict(role="user", content="a"), dict(role="user", content="b")]
REFUSED = [(SYSTEM_ROW, "system, user", "System role"), (TWO_TURNS, "user, user", "must alternate")]


@pytest.mark.parametrize(("prompt", "roles", "why"), REFUSED)
def test_a_template_that_refuses_a_row_does_so_before_training(prompt, roles, why):
    world()
    common.load_model(path("sft/model")).lm.save_pretrained(path("strict"))
    tok = common.load_tokenizer(path("sft/model"))
    tok.chat_template = STRICT
    tok.save_pretrained(path("strict"))
    good = dict(prompt="a", response="b", reward=1.0, policy="p", chosen="b", rejected="c")
    toy.write_jsonl(path("late.jsonl"), [good, good, dict(good, prompt=prompt)])
    words = "late.jsonl:3: ", roles, why
    init = ("--init-from", path("strict"))
    data = ("--data", path("late.jsonl"), "--heldout", path("toy/prompts_heldout.jsonl"))
    refused(lambda: sft.main([*init, *data, "--out", path("x")]), *words)
    refused(lambda: train_gvm.main([*init, *data, "--out", path("x")]), *words)
    refused(lambda: dvpo.main([*init, *data, "--out", path("x")]), *words)
    refused(lambda: ppo_baseline.main([*init, *data, "--out", path("x")]), *words)
    refused(lambda: common.read_pairs([path("late.jsonl")], tok, 99), *words)
    refused(lambda: sample.main(["--policy", path("strict"), "--prompts", path("late.jsonl"), "--to",
                                 path("x.json")]), *words)


def test_the_system_message_of_a_prompt_to_label_is_rendered_too():
    tok = quirky_tokenizer("llama")
    tok.chat_template = STRICT
    toy.write_jsonl(path("personas.jsonl"), [dict(prompt="a"), dict(prompt="a", system="be kind")])
    read = lambda: common.read_prompts(tok, path("personas.jsonl"), 99)  # noqa: E731
    refused(read, "personas.jsonl:2: ", "system, user")


def test_a_template_with_the_date_says_the_same_every_day():
    tok = quirky_tokenizer("qwen3")
    tok.chat_template = "Today is {{ strftime_now('%d %b %Y') }}. " + CHATML_TEMPLATE
    first = common.encode_prompt(tok, PROMPT)
    common.encode_messages.cache_clear()

    class Later(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls(2031, 1, 2)

    with mock.patch("transformers.utils.chat_template_utils.datetime", Later):
        turn = [dict(role="user", content="a")]
        assert "02 Jan 2031" in tok.apply_chat_template(turn, tokenize=False)       # the mock works
        assert common.encode_prompt(tok, PROMPT) == first
    assert tok.decode(first).startswith("Today is 26 Jul 2024. ")


# N. Long prompts

def test_a_long_prompt_keeps_its_header_and_its_end():
    tok = quirky_tokenizer("smollm2")                   # ChatML, its bos opens every turn
    ids = common.encode_prompt(tok, "the soup " * 50)
    header = tok("<|im_start|>user\n")["input_ids"]
    tail = tok("<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
    for most in 40, 41:
        cut = common.encode_prompt(tok, "the soup " * 50, most)
        assert len(cut) == most and cut[:len(header)] == header and cut[-len(tail):] == tail
        assert cut[len(header):] == ids[len(header) - most:]
    assert common.encode_prompt(tok, "the soup " * 50, len(ids)) == ids
    plain = quirky_tokenizer("llama")                   # no template: bos, and the words that open a prompt
    cut = common.encode_prompt(plain, "the soup " * 50, 40)
    assert cut[0] == plain.bos_token_id and "### User:" in plain.decode(cut) and len(cut) == 40
    row = dict(prompt="the soup " * 50, response="the wine .")
    whole, spans = common.pack(tok, row, [], 80, 9)
    assert whole[:len(header)] == header and spans[-1][1] == 40


def test_long_prompts_are_cut_the_same_way_in_every_program():
    """label.py and sample.py, too, which ended in an IndexError; the cut is said once."""
    world()
    toy.write_jsonl(path("long.jsonl"), [dict(prompt="the soup " * 200), dict(prompt="review the wine .")])
    seen = []
    plain = common.rollout

    def watched(model, prompts, *rest):
        seen.append(prompts)
        return plain(model, prompts, *rest)

    with open(path("one.py"), "w") as f:
        f.write("def one(prompt, response):\n    return 1.0\n")
    labels = ("--policy", path("sft/model"), "--prompts", path("long.jsonl"))
    reward = ("--reward", path("one.py:one"))
    with mock.patch("common.rollout", watched), contextlib.redirect_stderr(io.StringIO()) as said:
        label.main([*labels, *reward, "--to", path("long_rows.jsonl"), "--n", "2", "--max-new-tokens", "16"])
        sample.main([*labels, "--to", path("new/folder/long.json"), "--max-new-tokens", "16"])
    tok = common.load_tokenizer(path("sft/model"))
    for prompts in seen:
        assert prompts[0] == common.encode_prompt(tok, "the soup " * 200, 256 - 16)
    assert len(seen) == 2 and said.getvalue().count("240 cuts 1 of the first 2 rows") == 2
    with contextlib.redirect_stderr(io.StringIO()) as said:
        common.read_prompts(tok, path("long.jsonl"), 64)
    assert "--max-prompt-length 64 cuts 1 of the first 2 rows" in said.getvalue()
    refused(lambda: label.main([*labels, "--to", path("x.jsonl"), "--max-new-tokens", "256"]), "position")


# K, L. Another run in the same folder

def test_resume_with_other_flags():
    """--kl-coef is taken and said; what would make it another run is refused in one line."""
    world()
    _, _, argv = resume_cases("0")[2]
    out = ("--out", path("flags"), "--kl-target", "0")
    run(dvpo, *argv, *out, "--kl-coef", "0.1")
    again = [*argv, *out, "--resume", "--max-steps", "5"]
    for changed in (["--lora"], ["--seed", "2"], ["--batch-size", "32"], ["--temperature", "0.5"],
                    ["--data", path("toy/prompts_heldout.jsonl")], ["--advantage", "q"], ["--zero", "1"]):
        other = [*again, "--kl-coef", "0.1", *changed]
        refused(lambda other=other: dvpo.main(other), changed[0] + " ", "step_4")
    with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()):
        dvpo.main([*again, "--kl-coef", "0.7", "--mini-batch-size", "4"])
    said, = [line for line in err.getvalue().splitlines() if line.startswith("--resume with")]
    said = set(said.removeprefix("--resume with ").split(", "))
    assert said == {"--kl-coef 0.1 -> 0.7", "--max-steps 4 -> 5", "--mini-batch-size 8 -> 4"}
    with open(path("flags/metrics.jsonl")) as f:
        assert [json.loads(line)["kl_coef"] for line in f] == [0.1] * 4 + [0.7]


def test_resume_with_another_shape():
    """In place of torch's traceback."""
    world()
    _, _, gvm = resume_cases("0")[1]
    _, _, lora = resume_cases("0")[3]
    run(train_gvm, *gvm, "--out", path("shape_gvm"))
    again = [*gvm, "--out", path("shape_gvm"), "--resume"]
    refused(lambda: train_gvm.main([*again, "--lora-rank", "4"]), "--lora-rank 32 -> 4")
    refused(lambda: train_gvm.main([*again, "--plain-head"]), "--plain-head False -> True")
    run(dvpo, *lora, "--out", path("shape_lora"))
    whole = [flag for flag in lora if flag != "--lora"]
    refused(lambda: dvpo.main([*whole, "--out", path("shape_lora"), "--resume"]), "--lora True -> False")


def test_two_runs_in_one_folder():
    """The second is refused in one line, and the first's files stay; the lock ends with its process."""
    world()
    os.makedirs(path("shared_out"))
    code = ("import sys, time; from runtime.processes import lock; lock(sys.argv[1]); "
            "print('locked', flush=True); time.sleep(99)")
    first = subprocess.Popen([sys.executable, "-c", code, path("shared_out")], cwd=HERE, text=True,
                             stdout=subprocess.PIPE)
    try:
        assert first.stdout.readline() == "locked\n"
        _, _, argv = resume_cases("0")[2]
        refused(lambda: dvpo.main([*argv, "--out", path("shared_out")]), "another run is writing there")
        assert os.listdir(path("shared_out")) == []
    finally:
        first.kill()
        first.wait()
    assert len(run(dvpo, *argv, "--out", path("shared_out"), "--max-steps", "1")) == 1


def test_two_programs_that_label_into_one_file():
    """The second is refused before it takes off what looks like an incomplete batch."""
    world()
    with open(path("labelled_twice.jsonl"), "w") as first:
        fcntl.flock(first, fcntl.LOCK_EX)
        first.write('{"prompt": "of the first program"}\n')
        first.flush()
        argv = ["--policy", path("sft/model"), "--prompts", path("toy/prompts.jsonl"), "--to", first.name]
        refused(lambda: label.main([*argv, "--n", "16"]), "labelled_twice.jsonl: another run is writing")
    with open(path("labelled_twice.jsonl")) as f:
        assert f.read() == '{"prompt": "of the first program"}\n'


# O. Reward files

REWARDS = [
    ("def reward(p, r):\n    return {}['x']\n", "KeyError in line 2"),
    ("def reward(p, r)\n    return 1\n", "cannot be run: SyntaxError"),
    ("import nothing_there\n", "cannot be run: ModuleNotFoundError"),
    ("reward = 3\n", "no function 'reward'"),
]


@pytest.mark.parametrize(("text", "words"), REWARDS)
def test_broken_reward_files(text, words):
    with open(path("broken_reward.py"), "w") as f:
        f.write(text)
    refused(lambda: common.load_function(path("broken_reward.py:reward"))("a", "b"), words)


NUMBERS = ["numpy.array(0.5)", "numpy.float64(0.5)", "torch.tensor(0.5)", "Decimal('0.5')", "Fraction(1, 2)",
           "helper_beside.HALF"]


@pytest.mark.parametrize("value", NUMBERS)
def test_what_counts_as_a_number(value):
    with open(path("helper_beside.py"), "w") as f:
        f.write("HALF = 0.5\n")
    with open(path("number_reward.py"), "w") as f:
        f.write("import numpy, torch, helper_beside\nfrom decimal import Decimal\n"
                f"from fractions import Fraction\ndef reward(p, r):\n    return {value}\n")
    assert common.load_function(path("number_reward.py:reward"))("a", "b") == 0.5


def test_a_true_value_may_be_unknown():
    """KeyError of --true-q says that the value is not known; the same of a reward is a fault."""
    with open(path("unknown.py"), "w") as f:
        f.write("def q(prompt, prefix, policy):\n    return {'good': 1.0}[policy]\n")
    true_q = common.load_function(path("unknown.py:q"), unknown=KeyError)
    assert true_q("a", "b", "good") == 1.0
    with pytest.raises(KeyError):
        true_q("a", "b", "other")


# P, Q, R. What is lost at the end

def test_where_it_will_write_is_checked_before_the_work():
    world()
    policy = ("--policy", path("sft/model"), "--prompts", path("toy/prompts.jsonl"))
    with mock.patch("common.rollout", side_effect=AssertionError("worked first")):
        for main in sample.main, label.main:
            refused(lambda main=main: main([*policy, "--to", "/proc/nothing/x.json"]), "/proc/nothing/x.json")


def test_a_sigma_of_one_step_has_a_floor():
    """After one step all scores are still 0: divided by their sigma, scores would be tens of thousands."""
    world()
    pairs = ("--pairs", path("toy/pairs_small.jsonl"), "--pairs-heldout", path("toy/pairs_small.jsonl"))
    rows = run(ppo_baseline, *RL, *pairs, "--rm", path("rm_one/model"), "--rm-max-steps", "1",
               "--rm-batch-size", "8", "--max-steps", "1", "--batch-size", "8", "--mini-batch-size", "8",
               "--grad-accum", "1", "--out", path("ppo_one"))
    with open(path("rm_one/model/adapter.json")) as f:
        assert json.load(f)["std"] >= 0.1
    assert abs(rows[0]["score"]) < 10


@pytest.mark.parametrize("kind", ["full", "vanished"])
def test_a_full_disk_or_a_vanished_folder_is_one_line(kind):
    world()
    folder = path(kind)
    os.makedirs(folder, exist_ok=True)
    log = metrics.Metrics(folder, 3, "x", ())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    argv = ["--policy", path("sft/model"), "--prompts", path("toy/prompts.jsonl"), "--to",
            os.path.join(folder, "rows.jsonl"), "--n", "32", "--batch-size", "16"]
    plain = common.rollout

    def fails(*args):
        if kind == "full":
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        return plain(*args)

    def one_line(f, word):
        with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()):
            with pytest.raises(SystemExit) as end:
                f()
        lines = [line for line in err.getvalue().splitlines() if line.startswith("error: ")]
        assert end.value.code == 1 and len(lines) == 1 and word in lines[0], err.getvalue()

    try:
        if kind == "full":
            with mock.patch("common.rollout", fails):
                one_line(lambda: label.main(argv), "rows.jsonl: cannot be written")
            long = {f"number_{i}": float(i) for i in range(100)}
            one_line(lambda: log.log(0, **long), "metrics.jsonl: cannot be written")
        else:
            os.remove(os.path.join(folder, "metrics.jsonl"))
            os.rmdir(folder)
            one_line(lambda: log.log(0, loss=1.0), "metrics.jsonl: cannot be written")
            a_file = os.path.join(folder, "a.json")
            one_line(lambda: processes.write_json(a_file, {}), "a.json: cannot be written")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
