import contextlib
import io
import os
import resource
import sys
from unittest import mock

import torch
from helpers import ends_with_1, path, resume_cases, run, script, world

import sft


def nan_case():
    return [*resume_cases("0")[0][2], "--save-every", "1", "--max-steps", "9"]


def poison(*steps):
    """sft_loss with a finite value and a gradient that is not, at these calls (none: at all)."""
    loss, calls = sft.sft_loss, []

    def poisoned(*args):
        calls.append(len(calls))
        out = loss(*args)
        return out + (out * 0).sqrt() if calls[-1] in steps or not steps else out

    return mock.patch("sft.sft_loss", poisoned)


def test_loss_not_finite():
    world()
    err = ends_with_1(lambda: sft.main([*nan_case(), "--out", path("nan"), "--lr", "1e30"]))
    with open(path("nan/metrics.jsonl")) as f:
        bad = len(f.readlines())
    assert 1 <= bad < 9 and f"loss at step {bad - 1} not finite" in err, err
    saved = os.listdir(path("nan/checkpoint")) if os.path.exists(path("nan/checkpoint")) else []
    assert f"step_{bad}" not in saved


def test_gradient_not_finite():
    """Weights that are not finite are never saved: not in a checkpoint, not in the model."""
    world()
    with poison(2):
        err = ends_with_1(lambda: sft.main([*nan_case(), "--out", path("nan2")]))
    assert "weights of the policy after step 2 are not finite" in err, err
    assert sorted(os.listdir(path("nan2/checkpoint"))) == ["step_1", "step_2"]
    last = [*nan_case(), "--out", path("nan5"), "--save-every", "100", "--max-steps", "1"]
    with poison():
        assert "weights for" in ends_with_1(lambda: sft.main(last))
    assert not os.path.exists(path("nan5/model"))


def test_skipped_updates_are_reported():
    """With ZeRO DeepSpeed skips an update whose gradient is not finite."""
    world()
    quiet = contextlib.redirect_stdout(io.StringIO())
    with poison(2), quiet, contextlib.redirect_stderr(io.StringIO()) as err:
        sft.main([*nan_case(), "--out", path("nan3"), "--zero", "1"])
    assert err.getvalue().count("warning") == 1 and "step 2: gradient not finite" in err.getvalue()


def test_full_disk_keeps_the_last_checkpoint():
    """No file may grow beyond 200 kB from the second save on: the system's error is that of a full disk."""
    world()
    save, limits = torch.save, resource.getrlimit(resource.RLIMIT_FSIZE)

    def then_full(value, file, *args, **kwargs):
        save(value, file, *args, **kwargs)
        if str(file).endswith("rank_0.pt"):             # the last large file of a checkpoint
            resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))

    argv = [*resume_cases("0")[0][2], "--out", path("full")]
    try:
        with mock.patch("torch.save", then_full):
            err = ends_with_1(lambda: sft.main([*argv, "--save-every", "1"]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "step_2 cannot be written" in err and os.listdir(path("full/checkpoint")) == ["step_1"], err
    assert [row["step"] for row in run(sft, *argv, "--resume")] == [0, 1, 2, 3]


def test_a_thread_cannot_fail_a_finished_run():
    """Threads in torch at the end abort Python's own shutdown, as gloo's can; finish() does not let them."""
    code = """if True:
        import atexit, threading, time, torch, common
        from runtime import processes
        def work(x=torch.randn(100)):
            while True:
                x + x
        for _ in range(2):
            threading.Thread(target=work, daemon=True).start()
        time.sleep(0.2)
        atexit.register(print, "closed")
        print("done")
        processes.finish()"""
    done = script(sys.executable, "-c", code)
    assert (done.returncode, done.stdout) == (0, "done\nclosed\n"), done.stderr
