import json
import os
import shutil
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
)

import common
import dvpo
import ppo_baseline
import train_gvm


@pytest.mark.parametrize(("zero", "names"), [("1", ("gvm", "dvpo")), ("3", ("ppo",))])
def test_resume_on_two_ranks(zero, names):
    """Stages that train an adapter, a model, and two models."""
    world()
    cases = [(stage, argv, path("straight2", name), path("again2", name))
             for name, stage, argv in resume_cases(zero) if name in names]
    for *_, out, to in cases:
        shutil.rmtree(out, ignore_errors=True)
        shutil.rmtree(to, ignore_errors=True)
    straight = two_ranks(*((stage, [*argv, "--out", out]) for stage, argv, out, _ in cases))
    for *_, out, to in cases:
        rewind(out, to)
    resumed = two_ranks(*((stage, [*argv, "--resume", "--out", to]) for stage, argv, _, to in cases))
    for rows, again in zip(straight, resumed, strict=True):
        same_run(again, rows)


NOTHING_STAYS_GATHERED = {                                  # what a model too big to stay gathered would meet
    "gradient_clipping": 1.0, "steps_per_print": 10**9,
    "zero_optimization": {"reduce_bucket_size": 5000, "stage3_max_live_parameters": 0,
                          "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0,
                          "stage3_param_persistence_threshold": 0}}


def zero_3():
    common.write_json(path("ds3.json"), NOTHING_STAYS_GATHERED)
    return "--zero", "3", "--ds-config", path("ds3.json")


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
    rl = (*RL, "--max-steps", "2", "--batch-size", "32", "--mini-batch-size", "16")
    if stage is dvpo:
        rl = (*rl, "--gvm", path("gvm/model"))
    else:
        rl = (*rl, "--rm-max-steps", "3", "--pairs", path("toy/pairs_small.jsonl"), "--pairs-heldout",
              path("toy/pairs_small.jsonl"))
    commands = []
    for zero, flags in ("1", ("--zero", "1")), ("3", zero_3()):
        folders = ("--out", path(stage.__name__, zero))
        if stage is ppo_baseline:
            folders += ("--rm", path("rm2", zero, "model"))
        commands.append((stage, (*rl, *folders, *flags)))
    for a, b in zip(*two_ranks(*commands), strict=True):
        assert a["ratio_first"] == b["ratio_first"] == 1.0
        for key in ("loss", "kl", "gold", "q_mean"):
            close(a[key], b[key], 1e-4)
    sharded = weights(path(stage.__name__, "3/model"))
    for key, w in weights(path(stage.__name__, "1/model")).items():     # what ZeRO-3 saved is whole
        close(w, sharded[key], 1e-3)


def test_deepspeed_launcher():
    world()
    done = script(sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port",
                  str(20000 + os.getpid() % 20000), "dvpo.py", *RL, "--gvm", path("gvm/model"), "--out",
                  path("ds"), "--max-steps", "1", "--batch-size", "32", "--mini-batch-size", "16",
                  env=dict(OMP_NUM_THREADS="1"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(open(path("ds/metrics.jsonl")).readline())["ratio_first"] == 1.0
