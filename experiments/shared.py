"""What the experiments share: runs of a stage, intervals over seeds, Markdown tables, results on disk."""
import argparse
import concurrent.futures
import json
import os
import platform
import subprocess
import sys
import time

import numpy as np

SEEDS = [11, 12, 13, 14, 15]
T95 = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)     # Student's t, for 2 to 10 seeds


def parser(doc, seeds=None):
    """A parser that prints the docstring as it is, with --seeds where there is a default for it."""
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter,
                                allow_abbrev=False)
    if seeds:
        p.add_argument("--seeds", type=int, nargs="+", default=seeds,
                       help=f"(default: {seeds[0]} to {seeds[-1]})")
    return p


def python(script, *argv, log=subprocess.DEVNULL, threads=1):
    """Run a program of this project; its output goes to the file `log`."""
    subprocess.run([sys.executable, script, *map(str, argv)], stdout=log, stderr=log, check=True,
                   env=dict(os.environ, OMP_NUM_THREADS=str(threads)))


def stage(script, out, *argv, threads=1):
    """Run one stage unless it has finished before, with these flags -> seconds. It writes OUT.log."""
    done, flags = os.path.join(out, "done"), " ".join(map(str, argv))
    if not os.path.exists(done):
        os.makedirs(out, exist_ok=True)
        begin = time.time()
        with open(out + ".log", "w") as log:
            python(script, "--out", out, *argv, log=log, threads=threads)
        with open(os.path.join(out, "seconds"), "w") as f:
            json.dump(round(time.time() - begin), f)
        with open(done, "w") as f:
            f.write(flags)
    with open(done) as f:
        before = f.read()
    if before != flags:
        sys.exit(f"error: {out} holds a run with other flags ({before}): remove it, or give it other flags")
    return read_json(os.path.join(out, "seconds"))


def two_at_a_time(run, jobs):
    """[run(job) for all jobs], in two threads: each run is a subprocess of one thread."""
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return list(pool.map(run, jobs))


def read_json(path):
    with open(path) as f:
        return json.load(f)


def read_lines(path):
    with open(path) as f:
        return [json.loads(line) for line in f]


def write_lines(path, rows):
    with open(path, "w") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)


def smooth(values, window):
    """Means over `window` values in a row; entry i ends at value i + window - 1."""
    return np.convolve(values, np.ones(window) / window, "valid")


def final(folder):
    """The rewards and KL of one RL run.

    final: mean over the last tenth of the steps; best: highest mean over such a window; fall: from the best
    to the lowest window in the last third; heldout: fresh answers after training.
    """
    rows, summary = read_lines(f"{folder}/metrics.jsonl"), read_json(f"{folder}/summary.json")
    n = max(1, len(rows) // 10)
    gold = smooth([r["gold"] for r in rows], n)
    fall = gold.max() - gold[-len(gold) // 3:].min()
    kl = np.mean([r["kl"] for r in rows[-n:]])
    return dict(first=rows[0]["gold"], final=gold[-1], best=gold.max(), fall=fall, kl=kl,
                heldout=summary["gold"], heldout_kl=summary["kl"], seconds=rows[-1]["seconds"],
                steps=len(rows))


def interval(x, digits=2, sign=""):
    """Mean of several seeds with its 95 % interval; of one seed, the mean alone."""
    x = np.array(x, dtype=float)
    if not len(x):
        return "never"
    mean = f"{x.mean():{sign}.{digits}f}"
    if not 1 < len(x) < len(T95) + 2:
        return mean
    half = T95[len(x) - 2] * x.std(ddof=1) / len(x) ** 0.5
    return f"{mean} ± {half:.{digits}f}"


def spread(x):
    """Mean of several seeds, smallest and largest."""
    return f"{np.mean(x):.3f} ({min(x):.3f} to {max(x):.3f})"


def table(head, rows):
    """Lines of a Markdown table; head: "a | b | c", rows: lists of cells, numbers with three decimals."""
    lines = [f"| {head} |", "|" + "---|" * len(head.split(" | "))]
    for row in rows:
        cells = [f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


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
