import json
import os
import sys

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

import dvpo
import ppo_baseline
import train_gvm


def test_resume_on_two_ranks():
    """One stage that trains an adapter, one that trains a model, one that trains two."""
    world()
    cases = [(stage, argv, path("straight2", zero, name), path("again2", zero, name)) for zero in ("1", "3")
             for name, stage, argv in resume_cases(zero) if name in ("gvm", "dvpo", "ppo")]
    straight = two_ranks(*((stage, [*argv, "--out", out]) for stage, argv, out, _ in cases))
    for *_, out, to in cases:
        rewind(out, to)
    for rows, again in zip(
            straight,
            two_ranks(*((stage, [*argv, "--resume", "--out", to]) for stage, argv, _, to in cases)), strict=False):
        same_run(again, rows)


def test_two_ranks_equal_one_and_zero_3_equals_zero_1():
    """The same global batch gives the same losses, on one rank and on two, sharded and whole.

    ZeRO-3 with no live parameters allowed: the path of a model too big to stay gathered.
    """
    world()
    with open(path("ds3.json"), "w") as f:
        json.dump(
            {
                "gradient_clipping": 1.0, "steps_per_print": 10**9, "zero_optimization": {
                    "reduce_bucket_size": 5000, "stage3_max_live_parameters": 0,
                    "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0,
                    "stage3_param_persistence_threshold": 0
                }
            }, f)
    ds3 = ("--zero", "3", "--ds-config", path("ds3.json"))
    gvm = (*GVM, "--max-steps", "3", "--tau-pairs", "1")
    one = run(train_gvm, *gvm, "--out", path("one"), "--batch-size", "32")
    rl = (*RL, "--max-steps", "2", "--batch-size", "32", "--mini-batch-size", "16")
    ppo = ("--rm-max-steps", "3", "--pairs", path("toy/pairs.jsonl"), "--pairs-heldout",
           path("toy/pairs_heldout.jsonl"))
    two, whole, *rest = two_ranks(
        *((train_gvm, (*gvm, "--out", path(name), "--batch-size", "16", *zero))
          for name, zero in (("two", ds3), ("two0", ("--zero", "0")))),
        *((stage, (*rl, *own(zero[1]), "--out", path(stage.__name__, zero[1]), *zero))
          for stage, own in ((dvpo, lambda z: ("--gvm", path("gvm/model"))),
                             (ppo_baseline, lambda z: (*ppo, "--rm", path("rm2", z, "model"))))
          for zero in (("--zero", "1"), ds3)))
    for a, b in (*zip(one, two, strict=False), *zip(one, whole, strict=False)):
        close(a["loss"], b["loss"], 1e-5), close(a["q_std"], b["q_std"], 1e-5)
    for stage, z1, z3 in ("dvpo", *rest[:2]), ("ppo_baseline", *rest[2:]):
        for a, b in zip(z1, z3, strict=False):
            assert a["ratio_first"] == b["ratio_first"] == 1.0
            for key in ("loss", "kl", "gold", "q_mean"):
                close(a[key], b[key], 1e-4)
        for key, w in weights(path(stage, "1/model")).items():  # what ZeRO-3 saved is whole
            close(w, weights(path(stage, "3/model"))[key], 1e-3)


def test_deepspeed_launcher():
    world()
    done = script(sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port",
                  str(20000 + os.getpid() % 20000), "dvpo.py", *RL, "--gvm", path("gvm/model"), "--out",
                  path("ds"), "--max-steps", "1", "--batch-size", "32", "--mini-batch-size", "16",
                  env=dict(OMP_NUM_THREADS="1"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(open(path("ds/metrics.jsonl")).readline())["ratio_first"] == 1.0
