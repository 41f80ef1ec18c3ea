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


def test_not_a_number_ends_the_run():
    """In the loss: the step is named, its batch kept. In the weights alone, by a gradient: nothing is saved of them either."""
    world()
    argv = [*resume_cases("0")[0][2], "--save-every", "1", "--max-steps", "9"]
    err = ends_with_1(lambda: sft.main([*argv, "--out", path("nan"), "--lr", "1e30"]))
    with open(path("nan/metrics.jsonl")) as f:
        bad = len(f.readlines())
    assert 1 <= bad < 9 and f"loss at step {bad - 1} not finite" in err and f"step_{bad}" not in os.listdir(
        path("nan/checkpoint") if bad > 1 else path("nan"))
    assert set(torch.load(path(f"nan/bad_step_{bad - 1}_rank_0.pt"),
                          weights_only=True)) == {"ids", "attn", "mask"}
    from unittest import mock

    loss, calls = sft.sft_loss, []

    def poisoned(*a):  # a finite loss with a gradient that is not, at the third step
        calls.append(1)
        out = loss(*a)
        return out + (out * 0).sqrt() if len(calls) == 3 else out

    with mock.patch("sft.sft_loss", poisoned):
        err = ends_with_1(lambda: sft.main([*argv, "--out", path("nan2")]))
        calls.clear()
        with contextlib.redirect_stderr(io.StringIO()) as warned, contextlib.redirect_stdout(io.StringIO()):
            sft.main([*argv, "--out", path("nan3"), "--zero",
                      "1"])  # DeepSpeed leaves that update out: said, and the run goes on
    assert "gradient at step 2 was not finite" in warned.getvalue() and warned.getvalue().count(
        "not finite") == 1
    with mock.patch("sft.sft_loss", lambda *a: loss(*a) + (loss(*a) * 0).sqrt()):
        assert "steps in a row, 0 to 2, are not finite" in ends_with_1(
            lambda: sft.main([*argv, "--out", path("nan4"), "--zero", "1"]))
        assert "weights for" in ends_with_1(lambda: sft.main(
            [*argv, "--out", path("nan5"), "--save-every", "100", "--max-steps", "1"]))
    assert not os.path.exists(path("nan5/model"))
    assert "weights of the policy after step 2 are not finite" in err and "checkpoint/step_2" in err and sorted(
        os.listdir(path("nan2/checkpoint"))) == ["step_1", "step_2"]


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
            err = ends_with_1(
                lambda: sft.main([*resume_cases("0")[0][2], "--save-every", "1", "--out",
                                  path("full")]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, soft_hard)
    assert "step_2 cannot be written" in err and "step_1, stays" in err and os.listdir(
        path("full/checkpoint")) == ["step_1"], err
    rows = run(sft, *resume_cases("0")[0][2], "--out", path("full"), "--resume")
    assert [r["step"] for r in rows] == [0, 1, 2, 3]


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
