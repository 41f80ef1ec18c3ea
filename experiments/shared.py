"""What the experiments share: runs of a stage, intervals over seeds, commit and machine, results on disk."""
import argparse
import concurrent.futures
import json
import os
import platform
import subprocess
import sys

import numpy as np

T95 = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)     # Student's t, for 2 to 10 seeds


def stage(script, out, *argv):
    """Run one stage unless it has finished before, with these very flags; its output goes to OUT.log.

    The KL coefficient is constant unless they name a --kl-target: an experiment sets what it compares.
    """
    if script in ("dvpo.py", "ppo_baseline.py") and "--kl-target" not in argv:
        argv = *argv, "--kl-target", 0
    done, words = os.path.join(out, "done"), " ".join(map(str, argv))
    if os.path.exists(done):
        with open(done) as f:
            if (before := f.read()) not in ("", words):
                sys.exit(f"error: {out} holds a run with other flags ({before}): remove it, or name another")
        return
    os.makedirs(out, exist_ok=True)
    with open(out + ".log", "w") as log:
        subprocess.run([sys.executable, script, "--out", out, *words.split()], stdout=log, stderr=log,
                       check=True, env=dict(os.environ, OMP_NUM_THREADS="1"))
    with open(done, "w") as f:
        f.write(words)


def seeds_parser(doc, **kwargs):
    """--seeds and --report, which every experiment over seeds has."""
    kwargs |= dict(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    p = argparse.ArgumentParser(**kwargs)
    p.add_argument("--seeds", type=int, nargs="+", default=[11, 12, 13, 14, 15], help="(default: 11 to 15)")
    p.add_argument("--report", action="store_true", help="train nothing")
    return p


def two_at_a_time(function, jobs):
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return list(pool.map(function, jobs))


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


WINDOW = 64                                             # tokens


def window_means(runs, new):
    """Of a rollout of `new` tokens, {way: seconds and MB after each} -> rows: tokens, ms per token and MB of
    each way. The first of the new tokens is read off the prompt, so that there are new - 1 steps."""
    rows = []
    for end in [*range(WINDOW, new, max(1, new // WINDOW // 4) * WINDOW), new]:
        last, cells = min(end, new - 1), [f"{end - WINDOW} to {end}"]
        for run in runs.values():
            cells += [f"{1000 * np.mean(run['seconds'][last - WINDOW:last]):.0f}",
                      f"{run['held'][last - 1]:,.0f}"]
        rows.append(cells)
    return rows


def final(folder):
    """{final, best, fall, kl, held-out gold and KL} of one RL run.

    final: mean gold reward of the last tenth of the steps; fall: from the best window to the worst of the
    last third.
    """
    with open(f"{folder}/metrics.jsonl") as f:
        rows = [json.loads(line) for line in f]
    n = max(1, len(rows) // 10)
    gold = np.convolve([r["gold"] for r in rows], np.ones(n) / n, "valid")
    with open(f"{folder}/summary.json") as f:
        summary = json.load(f)
    return dict(first=rows[0]["gold"], final=gold[-1], best=gold.max(),
                fall=gold.max() - gold[-len(gold) // 3:].min(), kl=np.mean([r["kl"] for r in rows[-n:]]),
                heldout=summary["gold"], heldout_kl=summary["kl"], seconds=rows[-1]["seconds"],
                steps=len(rows))


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
