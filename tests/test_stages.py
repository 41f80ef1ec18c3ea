import contextlib
import io
import json
import os
import re
from unittest import mock

import pytest
import torch
from helpers import GVM, HERE, PROMPT, RL, close, path, resume_cases, run, weights, world

import common
import dvpo
import ppo_baseline
import sft
import train_gvm
from data import toy


def read_json(name):
    with open(path(name)) as f:
        return json.load(f)


def test_chain():
    """SFT -> GVM -> DVPO: tau matters, and a run leaves what it should. That it learns: test_smoke.py."""
    world()
    result = read_json("gvm/eval.json")
    by_policy = result["policies"]
    assert by_policy["expert"]["v0"] > by_policy["poor"]["v0"] + 0.3, by_policy     # tau matters
    assert result["accuracy"]["mean"] > 0.75 and result["true_q"]["correlation"] > 0.55, result
    before = weights(path("sft/model"))
    rows = run(dvpo, *RL, "--gvm", path("gvm/model"), "--out", path("dvpo"), "--max-steps", 3)
    assert all(row["ratio_first"] == 1.0 for row in rows)
    assert [row["step"] for row in rows] == list(range(3))
    need = ("step loss gold kl kl_coef q_mean adv_std clip_frac ratio_first ended length sec_generate "
            "sec_score sec_train tokens peak_bytes")
    assert set(need.split()) <= set(rows[0])
    assert any(not torch.equal(v, before[k]) for k, v in weights(path("dvpo/model")).items())
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(path("dvpo/model"))        # a plain transformers folder


def test_frozen_models_and_lora_policy():
    """--lora: one model in memory; the trunk does not move, and the saved policy is the merged one."""
    world()
    rows = run(dvpo, *RL, "--gvm", path("gvm/model"), "--out", path("lora"), "--max-steps", 3, "--lora",
               "--lr", 1e-3)
    assert all(r["ratio_first"] == 1.0 for r in rows)
    assert rows[0]["kl"] == 0.0                         # the adapter starts at the reference, bit for bit
    assert weights(path("lora/model")).keys() == weights(path("sft/model")).keys()


def test_ppo_chain():
    world()
    rows = run(ppo_baseline, *RL, "--pairs", path("toy/pairs.jsonl"), "--pairs-heldout",
               path("toy/pairs_heldout.jsonl"), "--rm", path("rm/model"), "--rm-max-steps", 100, "--out",
               path("ppo"), "--max-steps", 4)
    assert all(r["ratio_first"] == 1.0 for r in rows) and rows[0]["kl"] == 0.0
    assert read_json("rm/model/adapter.json")["accuracy"] == read_json("rm/eval.json")["accuracy"] > 0.75
    rows = run(ppo_baseline, *RL, "--reward", os.path.join(HERE, "data/toy.py:gold_reward"), "--out",
               path("ppo_fn"), "--max-steps", 2)
    close(rows[0]["score"], rows[0]["gold"])            # the function replaces the reward model


def test_eval_only_and_show():
    world()
    own = ["--gvm", path("gvm/model"), "--out", path("eval")]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        train_gvm.main([*GVM[:2], "--eval-only", "--data", path("toy/gvm_heldout.jsonl"), *own])
        shown = train_gvm.main([*GVM, *own, "--show", PROMPT, "the soup was great .", "--policy", "good"])
    assert read_json("eval/eval/eval.json")["pairs"] > 100 and "accuracy over" in out.getvalue()
    assert os.listdir(path("eval")) == ["eval"]         # nothing of the training in --out is written over
    assert shown["tokens"][1:] == "the soup was great . <eos>".split()
    assert len(shown["q"]) == len(shown["true_q"]) == 7
    with open(path("toy/gvm_small.jsonl")) as f:
        rows = [dict(json.loads(line), policy="stranger") for line in f]
    toy.write_jsonl(path("strangers.jsonl"), rows)
    with contextlib.redirect_stdout(io.StringIO()):
        shown = train_gvm.main([*GVM[:2], "--heldout", path("strangers.jsonl"), *own, "--show", PROMPT,
                                "the soup was great .", "--policy", "stranger"])
    assert len(shown["q"]) == 7 and "true_q" not in shown           # a policy whose truth is not known


@pytest.mark.parametrize("case", range(5))
def test_how_a_batch_is_cut_changes_nothing(case):
    """Four micro-batches of similar lengths give the updates of the whole optimizer batch in one piece."""
    world()
    name, stage, argv = resume_cases("0")[case]
    keys, cut = ["loss"], ["--grad-accum", "4"]
    if stage in (dvpo, ppo_baseline):
        keys, cut = ["loss", "kl", "kl_step", "clip_frac", "q_mean", "gold"], ["--mini-batch-size", "2", *cut]
    argv = [*argv, "--out", path("cut", name), *(["--lora-dropout", "0"] if stage is train_gvm else [])]
    plain = common.packed_frame

    def other_order(sequences, device="cpu"):
        return plain(sequences[::-1] if stage is sft else sequences, device)

    with (mock.patch("common.sort_by_length", lambda order, attn, size: order),
          mock.patch("common.packed_frame", other_order)):
        unsorted = run(stage, *argv)
    for a, b in zip(unsorted, run(stage, *argv, *cut), strict=True):
        for key in keys:
            close(a[key], b[key], 1e-4)
        assert b.get("ratio_first", 1.0) == 1.0


@pytest.mark.parametrize("case", [2, 3, 4])
def test_lr_decay(case):
    """Linear to 0, in the optimizers themselves, unless --no-lr-decay; four steps."""
    world()
    name, stage, argv = resume_cases("0")[case]
    seen, set_lr = [], common.Run.set_lr
    flags = [*argv, "--out", path("decay", name), "--lr", 4e-4]
    rates = [4e-4, 3e-4, 2e-4, 1e-4]
    if stage is ppo_baseline:
        flags += ["--critic-lr", 8e-4]
        rates = [4e-4, 8e-4, 3e-4, 6e-4, 2e-4, 4e-4, 1e-4, 2e-4]

    def record(self, engine, lr):
        set_lr(self, engine, lr)
        seen.append(round(engine.optimizer.param_groups[-1]["lr"], 9))

    with mock.patch("common.Run.set_lr", record):
        run(stage, *flags)
        assert seen[-len(rates):] == rates, seen            # the reward model's come before
        seen.clear()
        run(stage, *flags, "--no-lr-decay")
        assert not seen, seen


def test_progress_without_a_terminal():
    """Whole lines, and few of them."""
    with contextlib.redirect_stderr(io.StringIO()) as err:
        for _ in common.Progress(range(5000), desc="rows"):
            pass
    lines = [line for line in err.getvalue().splitlines() if line]
    assert "\r" not in err.getvalue() and len(lines) <= 3 and "5000/5000" in lines[-1], lines


def test_help_teaches():
    for stage in sft, train_gvm, dvpo, ppo_baseline:
        with contextlib.redirect_stdout(io.StringIO()) as text:
            try:
                stage.main(["--help"])
            except SystemExit as e:
                assert e.code == 0
        assert all(word in text.getvalue() for word in ("2502.16944", "paper", "(default: "))


def test_dry_run():
    """Every stage shows its first row, the trained part marked, and leaves what is in --out as it is."""
    world()
    rl = (*RL, "--batch-size", "16", "--mini-batch-size", "8")
    gvm = (*GVM, "--out", path("gvm"))
    pairs = ("--pairs", path("toy/pairs_small.jsonl"), "--pairs-heldout", path("toy/pairs_small.jsonl"))
    texts = ("--data", path("toy/sft.jsonl"), "--heldout", path("toy/sft_heldout.jsonl"), "--prompts",
             path("toy/prompts.jsonl"))
    dry = ("--out", path("dry"))
    before = weights(path("gvm/model")), open(path("gvm/metrics.jsonl")).read()
    for stage, argv in ((sft, (*RL[:2], *texts, *dry)), (train_gvm, gvm),
                        (dvpo, (*rl, "--gvm", path("gvm/model"), *dry)),
                        (ppo_baseline, (*rl, *pairs, "--rm", path("no_rm/model"), *dry))):
        with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(io.StringIO()):
            stage.main([*argv, "--dry-run"])
        *_, peak, _, text = said.getvalue().splitlines()
        assert re.fullmatch(r"peak memory of one step: \d[\d,]* MB", peak), peak
        parts = text.replace("]]", "[[").split("[[")                # prompt, trained, prompt, trained, ...
        assert parts[0].startswith("<bos> <user> review") and parts[0].endswith("<assistant>"), text
        assert len(parts) >= 3 and not any("<user>" in part for part in parts[1::2]), text
        assert stage is not train_gvm or len(parts) == 7, text      # three packed rows
    after = weights(path("gvm/model")), open(path("gvm/metrics.jsonl")).read()
    assert before[1] == after[1] and all(torch.equal(w, after[0][key]) for key, w in before[0].items())
    assert os.listdir(path("dry")) == ["dry_run"] and not os.path.exists(path("no_rm"))


def test_rows_without_names_make_a_gvm_without_tau():
    """And dvpo.py uses none; with the paper's head."""
    world()
    with open(path("toy/gvm_small.jsonl")) as f:
        rows = [json.loads(line) for line in f]
    with open(path("unnamed.jsonl"), "w") as f:
        f.writelines(json.dumps({k: v for k, v in row.items() if k != "policy"}) + "\n" for row in rows)
    run(train_gvm, *GVM[:2], "--data", path("unnamed.jsonl"), "--heldout", path("unnamed.jsonl"), "--out",
        path("unnamed"), "--max-steps", 1, "--plain-head")
    about = read_json("unnamed/model/adapter.json")
    assert about["tau_pairs"] == 0 and about["sees_token"] is False
    row, = run(dvpo, *RL, "--gvm", path("unnamed/model"), "--out", path("unnamed_dvpo"), "--max-steps", 1)
    assert row["tau_pairs"] == row["tau_tokens"] == 0 and row["ratio_first"] == 1.0


def test_the_defaults_of_gpt2_fit_its_positions():
    """1,024: the preset gives a GVM, and an RL run within what that GVM was trained on."""
    gvm = train_gvm.parse_args(["--model", "gpt2"])
    rl = dvpo.parse_args(["--model", "gpt2"])
    assert gvm.max_length <= 1024
    assert common.room_for_tau(vars(gvm), rl, gvm.tau_pairs) > 0
