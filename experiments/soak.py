"""Kills, and a long run: what the tests have no time for.

    python data/toy.py && python experiments/soak.py                     about half an hour on two cores
    python experiments/soak.py --kills 0 --steps 0 --rank                only one part

1. Every stage runs once undisturbed, then again, killed with SIGKILL at random moments, from the imports to
   the saving, and resumed until it is through: metrics and weights must come out bit for bit the same.
2. One rank of two is killed: the other must end, and soon.
3. A long DVPO run: memory, files.

Writes results/soak.json and results/soak.md.
"""
import argparse
import glob
import json
import os
import random
import shutil
import subprocess
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np
import psutil
from safetensors.torch import load_file

from common import Help
from experiments.shared import machine, table, write_results

ROOT = "out/soak"
STAGES = {
    "sft": ("sft.py", "--max-steps", "400"),
    "gvm": ("train_gvm.py", "--init-from", f"{ROOT}/base/sft/model", "--max-steps", "150"),
    "dvpo": ("dvpo.py", "--init-from", f"{ROOT}/base/sft/model", "--gvm", f"{ROOT}/base/gvm/model",
             "--max-steps", "60"),
    "ppo": ("ppo_baseline.py", "--init-from", f"{ROOT}/base/sft/model", "--rm", f"{ROOT}/base/rm/model",
            "--rm-max-steps", "30", "--max-steps", "60"),
}


def start(out, argv, launcher=()):
    os.makedirs(out, exist_ok=True)
    log = open(out + ".log", "a")
    return subprocess.Popen([sys.executable, *launcher, *argv, "--out", out], stdout=log, stderr=log,
                            start_new_session=True)


def finish(out, argv):
    if start(out, argv).wait():
        sys.exit(f"error: {argv[0]} failed: see {out}.log")


def rows(out):
    """Metrics without the clock; a line that the kill cut short does not count."""
    path = os.path.join(out, "metrics.jsonl")
    if not os.path.exists(path):
        return []
    with open(path) as f:
        found = [json.loads(line) for line in f if line.endswith("\n")]
    clock = ("sec", "peak_bytes")
    return [{key: x for key, x in row.items() if not key.startswith(clock)} for row in found]


def weights(out):
    return {name: w for path in sorted(glob.glob(f"{out}/model/*.safetensors"))
            for name, w in load_file(path).items()}


def equal_runs(a, b):
    old, new = weights(a), weights(b)
    return rows(a) == rows(b) and old.keys() == new.keys() and all(old[k].equal(new[k]) for k in old)


def last_checkpoint(out):
    steps = [path.rsplit("_", 1)[1] for path in glob.glob(f"{out}/checkpoint/step_*")]
    return max([int(step) for step in steps if step.isdigit()], default=0)


def kill_stage(stage, argv, kills, draw):
    """-> {stage, kills, lost: steps to do again after each, equal: to an undisturbed run}."""
    straight, again = f"{ROOT}/straight/{stage}", f"{ROOT}/killed/{stage}"
    argv = [*argv, "--save-every", "5", "--zero", "1"]
    begin = time.time()
    finish(straight, argv)
    whole, lost, equal = time.time() - begin, [], []

    def finish_and_compare():
        """Resume to the end, compare, and make room for another run."""
        finish(again, [*argv, "--resume"])
        equal.append(equal_runs(straight, again))
        os.rename(again, f"{again}_{len(equal)}")

    while len(lost) < kills:
        process = start(again, [*argv, "--resume"])
        time.sleep(draw.uniform(0.2, 1.0) * whole)
        if process.poll() is not None:                  # it got through before it was hit
            finish_and_compare()
            continue
        os.killpg(process.pid, 9)
        process.wait()
        done = len(rows(again))
        lost.append(max(0, done - last_checkpoint(again)))
        print(f"{stage}: kill {len(lost)}, {done} steps done, {lost[-1]} to do again", flush=True)
        if done == len(rows(straight)):                 # nothing is left to lose
            finish_and_compare()
    if os.path.exists(again):
        finish_and_compare()
    return dict(stage=stage, kills=kills, runs=len(equal), steps=len(rows(straight)), lost=lost,
                equal=all(equal))


def kill_stages(n, seed):
    draw, share = random.Random(seed), len(STAGES)
    return [kill_stage(stage, argv, n // share + (i < n % share), draw)
            for i, (stage, argv) in enumerate(STAGES.items())]


def one_rank_of_two():
    """Kill one of two ranks in the middle of a run -> seconds until the other and the launcher are gone, its
    exit code, the last lines of its log."""
    out = f"{ROOT}/rank"
    torchrun = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv-backend", "c10d",
                "--rdzv-endpoint", "localhost:0")
    process = start(out, [*STAGES["dvpo"][:-1], "100000"], torchrun)
    while len(rows(out)) < 3:
        time.sleep(0.2)
        assert process.poll() is None, out + ".log"
    family = [p for p in psutil.Process(process.pid).children(recursive=True)
              if "dvpo.py" in " ".join(p.cmdline())]
    family[-1].kill()
    begin = time.time()
    code = process.wait(timeout=300)
    seconds = time.time() - begin
    alive = [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    with open(out + ".log") as f:
        said = [line.strip() for line in f if "exitcode" in line or "Signal" in line]
    return dict(seconds=round(seconds, 1), exit_code=code, left_alive=len(alive), said=said[-3:])


def long_run(steps):
    """-> resident memory over the last three quarters and its slope, what lies in the folder at the end, and
    the gold reward."""
    out = f"{ROOT}/long"
    process, seen = start(out, [*STAGES["dvpo"][:-1], str(steps)]), []
    while process.poll() is None:
        time.sleep(2)
        try:
            seen.append((len(rows(out)), psutil.Process(process.pid).memory_info().rss / 2**20))
        except psutil.NoSuchProcess:
            break
    assert process.wait() == 0, out + ".log"
    late = [(step, mb) for step, mb in seen if steps // 4 <= step < steps]
    slope = float(np.polyfit(*zip(*late, strict=True), 1)[0]) * 1024
    files = [path for path in glob.glob(f"{out}/**", recursive=True) if os.path.isfile(path)]
    gold = [row["gold"] for row in rows(out)]
    lowest = np.convolve(gold[200:], np.ones(200) / 200, "valid").min()
    return dict(steps=len(gold), slope_kb_per_step=slope, first_mb=late[0][1], last_mb=late[-1][1],
                files=len(files), mb_on_disk=sum(map(os.path.getsize, files)) / 2**20,
                metrics_kb=os.path.getsize(f"{out}/metrics.jsonl") / 1024,
                log_kb=os.path.getsize(out + ".log") / 1024, gold_first=float(np.mean(gold[:50])),
                gold_last=float(np.mean(gold[-200:])), lowest_of_200=float(lowest))


def report(data):
    lines = ["# Soak", "", f"Command: `{data['command']}`. Machine: {data['machine']}."]
    if "kills" in data:
        kills = sum(stage["kills"] for stage in data["kills"])
        cells = [[stage["stage"], stage["steps"], stage["runs"], stage["kills"],
                  " ".join(map(str, stage["lost"])), "yes" if stage["equal"] else "NO"]
                 for stage in data["kills"]]
        lines += ["", f"## {kills} kills with SIGKILL at random moments, --save-every 5, ZeRO-1", "",
                  *table(["stage", "steps", "runs", "kills", "steps to do again, each kill",
                          "metrics and weights equal to an undisturbed run, bit for bit"], cells)]
    if "rank" in data:
        r = data["rank"]
        lines += ["", "## One rank of two killed", "",
                  f"The launcher ended {r['seconds']} s later with exit code {r['exit_code']}; processes "
                  f"left: {r['left_alive']}. It said: `{' / '.join(r['said'])}`"]
    if "long" in data:
        r = data["long"]
        lines += ["", f"## {r['steps']:,} steps of dvpo.py, --model tiny", "",
                  f"Resident memory over the last three quarters: {r['first_mb']:.1f} MB to "
                  f"{r['last_mb']:.1f} MB, slope {r['slope_kb_per_step']:.3f} kB a step. On disk "
                  f"{r['files']} files, {r['mb_on_disk']:.1f} MB, of it metrics.jsonl {r['metrics_kb']:.0f} "
                  f"kB; console log {r['log_kb']:.0f} kB. Gold reward: {r['gold_first']:.3f} over the first "
                  f"50 steps, {r['gold_last']:.3f} over the last 200, lowest mean of 200 steps in a row "
                  f"after the first 200: {r['lowest_of_200']:.3f}."]
    write_results("soak", data, lines)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    p.add_argument("--kills", type=int, default=25, help="over all stages")
    p.add_argument("--steps", type=int, default=2000, help="of the long run; 0, or at least 500")
    p.add_argument("--rank", action=argparse.BooleanOptionalAction, default=True, help="kill one rank of two")
    p.add_argument("--seed", type=int, default=1, help="of the moments")
    args = p.parse_args()
    if 0 < args.steps < 500:
        p.error("--steps: 0, or at least 500")
    for part in ("straight", "killed", "rank", "long"):
        shutil.rmtree(f"{ROOT}/{part}", ignore_errors=True)
    data = dict(command=" ".join(["python data/toy.py && python experiments/soak.py", *sys.argv[1:]]),
                machine=machine())
    if not os.path.exists(f"{ROOT}/base/gvm/model"):
        finish(f"{ROOT}/base/sft", ["sft.py"])
        finish(f"{ROOT}/base/gvm", ["train_gvm.py", "--init-from", f"{ROOT}/base/sft/model"])
    if args.kills:
        data["kills"] = kill_stages(args.kills, args.seed)
    if args.rank:
        data["rank"] = one_rank_of_two()
    if args.steps:
        data["long"] = long_run(args.steps)
    report(data)


if __name__ == "__main__":
    main()
