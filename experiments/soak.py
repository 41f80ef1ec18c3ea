"""Kills, and a long run: what the tests have no time for.

    python data/toy.py && python experiments/soak.py                     about half an hour on two cores
    python experiments/soak.py --kills 0 --steps 0 --rank                only one part

1. Every stage runs once undisturbed, then again, killed with SIGKILL at random moments, from the
   imports to the saving, and resumed until it is through: metrics and
   weights must come out bit for bit the same.  2. One rank of two is killed: the other must end, and soon.
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

from experiments.shared import machine, write_results

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
    lines = open(path).read().split("\n")[:-1] if os.path.exists(path) else []
    return [{k: v
             for k, v in json.loads(line).items() if not k.startswith("sec") and k != "peak_bytes"}
            for line in lines]


def kills(n, seed):
    """-> a list of {stage, kills, lost steps, equal}."""
    draw, found = random.Random(seed), []
    for i, (stage, argv) in enumerate(STAGES.items()):
        straight, again, argv = f"{ROOT}/straight/{stage}", f"{ROOT}/killed/{stage}", [
            *argv, "--save-every", "5", "--zero", "1"
        ]
        begin = time.time()
        finish(straight, argv)
        whole, lost, done, equal = time.time() - begin, [], 0, []

        def look(straight=straight, again=again, argv=argv, equal=equal):
            """Let it come to its end, compare, and make room for another run."""
            finish(again, [*argv, "--resume"])
            weights = [{
                k: v
                for f in sorted(glob.glob(f"{out}/model/*.safetensors"))
                for k, v in load_file(f).items()
            } for out in (straight, again)]
            equal.append(
                rows(again) == rows(straight) and all(
                    (weights[0][k] == weights[1][k]).all().item() for k in weights[0]))
            os.rename(again, f"{again}_{len(equal)}")

        while done < n // len(STAGES) + (i < n % len(STAGES)):
            process = start(again, [*argv, "--resume"])
            time.sleep(draw.uniform(0.2, 1.0) * whole)
            if process.poll() is not None:  # it got through before it was hit
                look()
                continue
            os.killpg(process.pid, 9)
            process.wait()
            done += 1
            saved = [
                int(os.path.basename(p)[5:]) for p in glob.glob(f"{again}/checkpoint/step_*")
                if p[-1].isdigit()
            ]
            lost.append(max(0, len(rows(again)) - max(saved, default=0)))
            print(f"{stage}: kill {done}, {len(rows(again))} steps done, {lost[-1]} to do again", flush=True)
            if len(rows(again)) == len(rows(straight)):  # nothing is left to lose
                look()
        if os.path.exists(again):
            look()
        found.append(
            dict(stage=stage, kills=done, runs=len(equal), steps=len(rows(straight)), lost=lost,
                 equal=all(equal)))
    return found


def one_rank_of_two():
    """Kill one of two ranks in the middle of a run -> seconds until the other and the launcher are gone, its
    exit code, the last lines of its log."""
    out = f"{ROOT}/rank"
    process = start(out, [*STAGES["dvpo"][:-1], "100000"],
                    ("-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv-backend", "c10d",
                     "--rdzv-endpoint", "localhost:0"))
    while len(rows(out)) < 3:
        time.sleep(0.2)
        assert process.poll() is None, out + ".log"
    family = [
        p for p in psutil.Process(process.pid).children(recursive=True) if "dvpo.py" in " ".join(p.cmdline())
    ]
    family[-1].kill()
    begin = time.time()
    code = process.wait(timeout=300)
    seconds = time.time() - begin
    alive = [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    with open(out + ".log") as f:
        said = [line.strip() for line in f if "exitcode" in line or "Signal" in line]
    return dict(seconds=round(seconds, 1), exit_code=code, left_alive=len(alive), said=said[-3:])


def long_run(steps):
    """-> RSS every two seconds, its slope over the last three quarters, and what lies in the folder at the
    end."""
    out = f"{ROOT}/long"
    process, seen = start(out, [*STAGES["dvpo"][:-1], str(steps)]), []
    while process.poll() is None:
        time.sleep(2)
        try:
            seen.append((len(rows(out)), psutil.Process(process.pid).memory_info().rss / 2**20))
        except psutil.NoSuchProcess:
            break
    assert process.wait() == 0, out + ".log"
    late = [(s, m) for s, m in seen if steps // 4 <= s < steps]
    slope = float(np.polyfit(*zip(*late, strict=False), 1)[0]) * 1024
    files = [p for p in glob.glob(f"{out}/**", recursive=True) if os.path.isfile(p)]
    gold = [r["gold"] for r in rows(out)]
    return dict(steps=len(rows(out)), slope_kb_per_step=slope, first_mb=late[0][1], last_mb=late[-1][1],
                files=len(files), mb_on_disk=sum(map(os.path.getsize, files)) / 2**20,
                metrics_kb=os.path.getsize(f"{out}/metrics.jsonl") / 1024,
                log_kb=os.path.getsize(out + ".log") / 1024, gold_first=float(np.mean(gold[:50])),
                gold_last=float(np.mean(gold[-200:])),
                lowest_of_200=float(np.convolve(gold[200:],
                                                np.ones(200) / 200, "valid").min()))


def report(data):
    lines = ["# Soak", "", f"Command: `{data['command']}`. Machine: {data['machine']}."]
    if "kills" in data:
        lines += [
            "",
            f"## {sum(r['kills'] for r in data['kills'])} kills with SIGKILL at random moments, "
            "--save-every 5, ZeRO-1",
            "",
            "| stage | steps | runs | kills | steps to do again, each kill | metrics and weights equal to "
            "an undisturbed run, bit for bit |",
            "|---|---|---|---|---|---|"
        ]
        lines += [
            f"| {r['stage']} | {r['steps']} | {r['runs']} | {r['kills']} | {' '.join(map(str, r['lost']))} "
            f"| {'yes' if r['equal'] else 'NO'} |"
            for r in data["kills"]
        ]
    if "rank" in data:
        r = data["rank"]
        lines += [
            "", "## One rank of two killed", "",
            f"The launcher ended {r['seconds']} s later with exit code {r['exit_code']}; processes left: "
            f"{r['left_alive']}. It said: `{' / '.join(r['said'])}`"
        ]
    if "long" in data:
        r = data["long"]
        lines += [
            "", f"## {r['steps']:,} steps of dvpo.py, --model tiny", "",
            f"Resident memory over the last three quarters: {r['first_mb']:.1f} MB to {r['last_mb']:.1f} "
            f"MB, slope {r['slope_kb_per_step']:.3f} kB a step. On disk {r['files']} files, "
            f"{r['mb_on_disk']:.1f} MB, of it "
            f"metrics.jsonl {r['metrics_kb']:.0f} kB; console log {r['log_kb']:.0f} kB. Gold reward: "
            f"{r['gold_first']:.3f} over the first 50 steps, {r['gold_last']:.3f} over the last 200, lowest "
            "mean of 200 steps in a row after "
            f"the first 200: {r['lowest_of_200']:.3f}."
        ]
    write_results("soak", data, lines)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--kills", type=int, default=25, help="over all stages (default: %(default)s)")
    p.add_argument("--steps", type=int, default=2000, help="of the long run (default: %(default)s)")
    p.add_argument("--rank", action=argparse.BooleanOptionalAction, default=True, help="kill one rank of two")
    p.add_argument("--seed", type=int, default=1, help="of the moments (default: %(default)s)")
    args = p.parse_args(argv)
    if 0 < args.steps < 500:
        sys.exit("error: --steps: 0, or at least 500")
    for part in ("straight", "killed", "rank", "long"):
        shutil.rmtree(f"{ROOT}/{part}", ignore_errors=True)
    data = dict(command=" ".join(["python data/toy.py && python experiments/soak.py", *sys.argv[1:]]),
                machine=machine())
    if not os.path.exists(f"{ROOT}/base/gvm/model"):
        finish(f"{ROOT}/base/sft", ["sft.py"])
        finish(f"{ROOT}/base/gvm", ["train_gvm.py", "--init-from", f"{ROOT}/base/sft/model"])
    if args.kills:
        data["kills"] = kills(args.kills, args.seed)
    if args.rank:
        data["rank"] = one_rank_of_two()
    if args.steps:
        data["long"] = long_run(args.steps)
    report(data)


if __name__ == "__main__":
    main()
