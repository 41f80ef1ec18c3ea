"""What the experiments share: runs of a stage, statistics over seeds, pages of results."""
import concurrent.futures
import json
import os
import platform
import subprocess
import sys

import numpy as np

# Student's t at 95 %, for 2 to 10 seeds
T95 = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def stage(script, out, *flags):
    """Run one stage unless it has finished before, with these very flags; its output goes to OUT.log."""
    done = os.path.join(out, "done")
    words = " ".join(map(str, flags))
    if os.path.exists(done):
        with open(done) as f:
            before = f.read()
        if before != words:
            sys.exit(f"error: {out} holds a run with other flags ({before}): remove it, or name another")
        return
    os.makedirs(out, exist_ok=True)
    with open(out + ".log", "w") as log:
        subprocess.run([sys.executable, script, "--out", out, *words.split()], stdout=log, stderr=log,
                       check=True, env=dict(os.environ, OMP_NUM_THREADS="1"))
    # A stage that was told to stop ends well, too, but without its measurements
    if not any(os.path.exists(f"{out}/{name}.json") for name in ("summary", "eval")):
        sys.exit(f"error: {out}: {script} was stopped; see {out}.log")
    with open(done, "w") as f:
        f.write(words)


def two_at_a_time(function, jobs):
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return list(pool.map(function, jobs))


def read_json(path):
    with open(path) as f:
        return json.load(f)


def read_lines(path):
    with open(path) as f:
        return [json.loads(line) for line in f]


def final(folder):
    """How an RL run ended: gold reward and KL over the last tenth of its steps, and of fresh answers."""
    rows = read_lines(f"{folder}/metrics.jsonl")
    summary = read_json(f"{folder}/summary.json")
    found = dict(heldout=summary["gold"], heldout_kl=summary["kl"], steps=len(rows))
    seconds = [row["seconds"] for row in rows]
    found["step_seconds"] = float(np.median(np.diff(seconds)))
    if "gold" in rows[0]:
        last = rows[-max(1, len(rows) // 10):]
        found["first"] = rows[0]["gold"]
        found["final"] = float(np.mean([row["gold"] for row in last]))
        found["kl"] = float(np.mean([row["kl"] for row in last]))
        found["gold"] = [round(row["gold"], 4) for row in rows]
    else:                                               # DPO has no rollouts while it trains
        found |= dict(final=summary["gold"], kl=summary["kl"])
    return found


def reach(gold, level, window=5):
    """Steps until the gold reward, a mean over `window` steps, is at this level; None: never."""
    smooth = np.convolve(gold, np.ones(window) / window, "valid")
    there = np.nonzero(smooth >= level)[0]
    return int(there[0]) + window if len(there) else None


def interval(x, digits=2, sign=""):
    """Mean of several seeds with its 95 % interval; of one seed, the mean alone."""
    x = np.array(x, dtype=float)
    if not len(x):
        return "never"
    mean = f"{x.mean():{sign}.{digits}f}"
    if not 1 < len(x) < len(T95) + 2:
        return mean
    return f"{mean} ± {T95[len(x) - 2] * x.std(ddof=1) / len(x) ** 0.5:.{digits}f}"


def table(names, rows):
    """A Markdown table -> its lines."""
    return ["| " + " | ".join(map(str, row)) + " |" for row in (names, ["---"] * len(names), *rows)]


def commit():
    """The short hash of the commit that is checked out."""
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip()


def machine(*notes):
    return ", ".join([f"{os.cpu_count()} cores", platform.machine(), *notes])


def write_results(name, data, lines):
    """results/NAME.json and results/NAME.md; the lines are printed too."""
    os.makedirs("results", exist_ok=True)
    with open(f"results/{name}.json", "w") as f:
        json.dump(data, f, indent=1)
    with open(f"results/{name}.md", "w") as f:
        f.write("\n".join(lines) + "\n")
    print("\n".join(lines))
