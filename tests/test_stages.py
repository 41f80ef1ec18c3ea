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

import numpy as np
import torch

import common
import dvpo
import ppo_baseline
import sft
import train_gvm
from data import toy, ultrafeedback
from helpers import *


def test_chain_and_learning():
    """SFT -> GVM -> DVPO through main(argv): tau matters, the first ratio is 1, nothing frozen moves, the gold reward rises."""
    world()
    result = json.load(open(path("gvm/eval.json")))
    assert result["policies"]["expert"]["v0"] > result["policies"]["poor"]["v0"] + 0.3, result[
        "policies"]  # tau matters
    assert result["accuracy"]["mean"] > 0.75 and result["true_q"]["correlation"] > 0.55, result
    before = weights(path("gvm0/model")), weights(path("sft/model"))
    rows = run(dvpo, *RL, "--gvm", path("gvm0/model"), "--out", path("dvpo"), "--max-steps", 25)
    for old, new in zip(before, (weights(path("gvm0/model")), weights(path("sft/model")))):
        assert all(torch.equal(old[k], new[k]) for k in old)
    assert all(r["ratio_first"] == 1.0 for r in rows)
    assert [r["step"] for r in rows] == list(range(25))
    need = "step loss gold kl kl_coef q_mean adv_std clip_frac ratio_first ended length sec_generate sec_score sec_train tokens peak_bytes".split(
    )
    assert not set(need) - set(rows[0])
    first, last = (json.load(open(path(stage, "summary.json")))["gold"]
                   for stage in ("sft", "dvpo"))  # 256 responses each
    assert last > first + 0.15, (first, last)
    assert any(not torch.equal(v, before[1][k]) for k, v in weights(path("dvpo/model")).items())
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(path("dvpo/model"))  # a plain transformers folder


def test_frozen_models_and_lora_policy():
    """--lora: one model in memory; the trunk under the adapter does not move, and the saved policy is the merged one."""
    world()
    rows = run(dvpo, *RL, "--gvm", path("gvm/model"), "--out", path("lora"), "--max-steps", 3, "--lora",
               "--lr", 1e-3)
    assert all(r["ratio_first"] == 1.0 for r in rows)
    assert rows[0]["kl"] == 0.0  # the adapter starts at the reference, bit for bit
    assert weights(path("lora/model")).keys() == weights(path("sft/model")).keys()


def test_ppo_chain():
    world()
    rows = run(ppo_baseline, *RL, "--pairs", path("toy/pairs.jsonl"), "--pairs-heldout",
               path("toy/pairs_heldout.jsonl"), "--rm", path("rm/model"), "--rm-max-steps", 150, "--out",
               path("ppo"), "--max-steps", 4)
    assert all(r["ratio_first"] == 1.0 for r in rows) and rows[0]["kl"] == 0.0
    assert json.load(open(path("rm/model/adapter.json")))["accuracy"] > 0.75
    rows = run(ppo_baseline, *RL, "--reward", os.path.join(HERE, "data/toy.py:gold_reward"), "--out",
               path("ppo_fn"), "--max-steps", 25, "--lr", 3e-4)
    assert json.load(open(
        path("ppo_fn/summary.json")))["gold"] > json.load(open(path("sft/summary.json")))["gold"] + 0.15
    assert abs(rows[0]["score"] - rows[0]["gold"]) < 1e-6  # the function replaces the reward model


def test_eval_only_and_show():
    world()
    with contextlib.redirect_stdout(io.StringIO()) as out:
        train_gvm.main([
            *GVM[:2], "--eval-only", "--data",
            path("toy/gvm_heldout.jsonl"), "--gvm",
            path("gvm/model"), "--out",
            path("eval")
        ])
        shown = train_gvm.main([
            *GVM, "--gvm",
            path("gvm/model"), "--show", PROMPT, "the soup was great .", "--policy", "good", "--out",
            path("eval")
        ])
    assert json.load(open(path("eval/eval.json")))["pairs"] > 100 and "accuracy over" in out.getvalue()
    assert len(shown["q"]) == len(
        shown["true_q"]) == 7 and shown["tokens"][1:] == "the soup was great . <eos>".split()


def test_how_a_batch_is_cut_changes_nothing():
    """Four micro-batches of like lengths give the updates of the whole optimizer batch in one piece, rows as they come, in every stage."""
    world()
    by_length = common.sort_by_length
    for name, stage, argv in resume_cases("0"):
        cut = ("--grad-accum", "4") if stage in (sft, train_gvm) else ("--mini-batch-size", "2",
                                                                       "--grad-accum", "4")
        argv = (*argv, "--out", path("cut", name), *(("--lora-dropout", "0") if stage is train_gvm else ()))
        common.sort_by_length = lambda order, attn, size: order
        try:
            unsorted = run(stage, *argv)
        finally:
            common.sort_by_length = by_length
        for a, b in zip(unsorted, run(stage, *argv, *cut), strict=True):
            for key in ("loss", ) if stage in (sft, train_gvm) else ("loss", "kl", "kl_step", "clip_frac",
                                                                     "q_mean", "gold"):
                close(a[key], b[key], 1e-4)
            assert b.get("ratio_first", 1.0) == 1.0


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
            flags = (*argv, "--out", path("decay", name), "--lr", 4e-4,
                     *(("--critic-lr", 8e-4) if stage is ppo_baseline else ()))
            seen.clear()
            run(stage, *flags)
            assert seen[-4 * (1 + (stage is ppo_baseline)):] == ([
                4e-4, 8e-4, 3e-4, 6e-4, 2e-4, 4e-4, 1e-4, 2e-4
            ] if stage is ppo_baseline else [4e-4, 3e-4, 2e-4, 1e-4]), seen
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
        assert err.getvalue().count("warning: ") == (word is not None) + (change.get("kl") == 99.0) and (
            word or "") in err.getvalue(), (change, err.getvalue())
        assert ("from step 10 on: jumped" in err.getvalue()) == (change.get("kl", 0.0) > 4)
        with open(path("watch/metrics.jsonl")) as f:
            assert [json.loads(line).get("warnings", [""])[0].split(":")[0] for line in f][-1] == (word or "")

    world()  # and after the last update, which no step follows
    jumped, common.jumped = common.jumped, lambda kl, rows: len(rows) == 4
    try:
        for name, stage, argv in resume_cases("0")[2:]:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as err:
                stage.main([*argv, "--out", path("jumped", name)])
            assert err.getvalue().count("warning: ") == err.getvalue().count(
                "warning: the last updates took the policy far") == 1, err.getvalue()
    finally:
        common.jumped = jumped


def test_help_teaches():
    for stage in sft, train_gvm, dvpo, ppo_baseline:
        with contextlib.redirect_stdout(io.StringIO()) as text:
            try:
                stage.main(["--help"])
            except SystemExit as e:
                assert e.code == 0
        assert all(word in text.getvalue() for word in ("2502.16944", "paper", "(default: "))
