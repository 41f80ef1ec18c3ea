import json
import os
import sys

import pytest
from helpers import (
    GVM,
    RL,
    close,
    path,
    resume_cases,
    rewind,
    run,
    same_run,
    script,
    two_ranks,
    weights,
    world,
    zero_3,
)

import dvpo
import ppo_baseline
import train_gvm


@pytest.fixture
def straight_runs():
    """[(stage, flags, out, rows)] of runs on two ranks: an adapter, a model, and two models are trained."""
    world()
    cases = []
    for zero, names in ("1", ("gvm", "dvpo")), ("3", ("ppo",)):
        cases += [(stage, argv, path("straight2", zero, name))
                  for name, stage, argv in resume_cases(zero) if name in names]
    rows = two_ranks(*((stage, [*argv, "--out", out]) for stage, argv, out in cases))
    return [(*case, own) for case, own in zip(cases, rows, strict=True)]


def test_resume_on_two_ranks(straight_runs):
    commands = []
    for stage, argv, out, _ in straight_runs:
        rewind(out, out + "_again")
        commands.append((stage, [*argv, "--resume", "--out", out + "_again"]))
    for (*_, rows), again in zip(straight_runs, two_ranks(*commands), strict=True):
        same_run(again, rows)


def test_two_ranks_equal_one():
    """The same global batch gives the same losses on one rank and on two, whole and sharded."""
    world()
    gvm = (*GVM, "--max-steps", "3", "--tau-pairs", "1")
    one = run(train_gvm, *gvm, "--out", path("one"), "--batch-size", "32")
    half = (*gvm, "--batch-size", "16")
    whole, sharded = two_ranks((train_gvm, (*half, "--out", path("whole"), "--zero", "0")),
                               (train_gvm, (*half, "--out", path("sharded"), *zero_3())))
    for a, b, c in zip(one, whole, sharded, strict=True):
        for other in (b, c):
            close(a["loss"], other["loss"], 1e-5)
            close(a["q_std"], other["q_std"], 1e-5)


@pytest.mark.parametrize("stage", [dvpo, ppo_baseline])
def test_zero_3_equals_zero_1(stage):
    world()
    rl = (*RL, "--max-steps", "2", "--batch-size", "32", "--mini-batch-size", "16", "--max-new-tokens", "8")
    pairs = path("toy/pairs_small.jsonl")
    value = {dvpo: ("--gvm", path("gvm/model")),
             ppo_baseline: ("--rm-max-steps", "2", "--pairs", pairs, "--pairs-heldout", pairs)}
    commands = []
    for zero, sharding in ("1", ("--zero", "1")), ("3", zero_3()):
        folders = ("--out", path(stage.__name__, zero))
        if stage is ppo_baseline:
            folders += ("--rm", path("rm2", zero, "model"))
        commands.append((stage, (*rl, *value[stage], *folders, *sharding)))
    for a, b in zip(*two_ranks(*commands), strict=True):
        assert a["ratio_first"] == b["ratio_first"] == 1.0
        for key in ("loss", "kl", "gold", "q_mean"):
            close(a[key], b[key], 1e-4)
    sharded = weights(path(stage.__name__, "3/model"))
    for key, w in weights(path(stage.__name__, "1/model")).items():         # what ZeRO-3 saved is whole
        close(w, sharded[key], 1e-3)


def test_deepspeed_launcher():
    world()
    done = script(sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port",
                  str(20000 + os.getpid() % 20000), "dvpo.py", *RL, "--gvm", path("gvm/model"), "--out",
                  path("ds"), "--max-steps", "1", "--batch-size", "32", "--mini-batch-size", "16",
                  env=dict(OMP_NUM_THREADS="1"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(open(path("ds/metrics.jsonl")).readline())["ratio_first"] == 1.0
