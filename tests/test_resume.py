import contextlib
import glob
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from unittest import mock

import pytest
import torch
from helpers import HERE, path, refused, resume_cases, rewind, run, same_run, weights, world

import dvpo
import sft
from runtime import processes


@pytest.mark.parametrize("zero", ["1", "3"])
@pytest.mark.parametrize("case", range(5))
def test_resume_equals_a_straight_run(case, zero):
    """Metrics and weights bit for bit, every stage, in bf16 as on a GPU."""
    world()
    name, stage, argv = resume_cases(zero)[case]
    argv = [*argv, "--dtype", "bf16"]
    straight, again = path("straight", zero, name), path("again", zero, name)
    rows = run(stage, *argv, "--out", straight)
    rewind(straight, again)
    same_run(run(stage, *argv, "--out", again, "--resume"), rows)
    resumed = weights(os.path.join(again, "model"))
    for key, w in weights(os.path.join(straight, "model")).items():
        kept = torch.float32 if name == "gvm" else torch.bfloat16           # adapters stay fp32
        assert w.dtype == kept and torch.equal(w, resumed[key]), key


def test_damaged_checkpoint():
    """A checkpoint that is cut short is named; without it the one before serves; other flags may differ."""
    world()
    _, _, argv = resume_cases("0")[2]
    out = path("damaged")
    rows = run(dvpo, *argv, "--out", out)
    last = os.path.join(out, "checkpoint/step_4")
    victim = max(glob.glob(f"{last}/policy/*.pt"), key=os.path.getsize)
    os.truncate(victim, os.path.getsize(victim) // 2)
    refused(lambda: dvpo.main([*argv, "--out", out, "--resume"]), "step_4: cannot be read", "remove it")
    with mock.patch("deepspeed.DeepSpeedEngine.load_checkpoint", side_effect=torch.OutOfMemoryError("full")):
        with pytest.raises(torch.OutOfMemoryError):     # which damages no checkpoint
            run(dvpo, *argv, "--out", out, "--resume")
    with open(f"{last}/run.json") as f:
        flags = json.load(f)
    with open(f"{last}/run.json", "w") as f:
        json.dump(dict(flags, pack=2), f)               # a flag that is no more
    refused(lambda: dvpo.main([*argv, "--out", out, "--resume"]), "--pack 2", "start a new run")
    with open(f"{last}/run.json", "r+") as f:
        f.truncate(9)
    refused(lambda: dvpo.main([*argv, "--out", out, "--resume"]), "step_4: cannot be read", "JSONDecodeError")
    os.remove(f"{last}/run.json")
    refused(lambda: dvpo.main([*argv, "--out", out, "--resume"]), "step_4: cannot be read", "remove it")
    shutil.rmtree(last)
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        dvpo.main([*argv, "--out", out, "--resume", "--clip", "0.3", "--max-steps", "3"])
    refused(lambda: dvpo.main([*argv, "--out", out, "--resume", "--dtype", "bf16"]), "--dtype auto")
    with open(os.path.join(out, "metrics.jsonl")) as f:
        same_run([json.loads(line) for line in f][:2], rows[:2])
    with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()):
        dvpo.main([*argv, "--out", path("empty"), "--resume", "--max-steps", "1"])
    assert "starting a new run" in err.getvalue()


def test_sigterm_saves_and_ends_well():
    world()
    name, _, argv = resume_cases("0")[2]
    argv = [*argv, "--out", path("term"), "--max-steps", "500", "--save-every", "1000"]
    environment = {k: v for k, v in os.environ.items() if k not in processes.LAUNCHER_VARIABLES}
    process = subprocess.Popen([sys.executable, "dvpo.py", *argv], cwd=HERE, stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, text=True, env=environment)

    def lines():
        if not os.path.exists(path("term/metrics.jsonl")):
            return 0
        with open(path("term/metrics.jsonl")) as f:
            return sum(1 for _ in f)

    for _ in range(600):
        time.sleep(0.1)
        if lines() >= 3:
            break
    process.send_signal(signal.SIGTERM)
    err = process.communicate(timeout=60)[1]
    assert process.returncode == 0 and "--resume" in err, err
    done = lines()
    assert 3 <= done < 500 and os.listdir(path("term/checkpoint")) == [f"step_{done}"]
    rows = run(dvpo, *argv[:-4], "--resume", "--max-steps", str(done + 1))
    assert [r["step"] for r in rows] == list(range(done + 1))


def test_a_reader_that_has_gone_ends_the_run_well():
    """Who reads the output dies in step 0, as a launcher may: a checkpoint is written, not a traceback.

    A progress bar prints after at most 30 seconds, and at its end: here at the end, of the third step.
    """
    world()
    argv = [*resume_cases("0")[0][2], "--max-steps", "3", "--save-every", "100", "--out", path("gone")]
    env = {k: v for k, v in os.environ.items() if k not in processes.LAUNCHER_VARIABLES}
    process = subprocess.Popen([sys.executable, "-u", "sft.py", *argv], cwd=HERE, env=env,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while not process.stdout.readline().startswith(b"sft: "):       # the bar's first line
        assert process.poll() is None
    process.stdout.close()
    assert process.wait(100) == 0
    assert os.listdir(path("gone/checkpoint")) == ["step_3"] and not os.path.exists(path("gone/model"))
    assert len(run(sft, *argv, "--resume")) == 3
    assert os.path.exists(path("gone/model"))
