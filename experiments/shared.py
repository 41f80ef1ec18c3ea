"""What the experiments share: runs of a stage, statistics over seeds, pages of results."""
import concurrent.futures
import json
import os
import platform
import subprocess

import numpy as np

# Student's t at 95 %, for 2 to 10 seeds
T95 = (12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def two_at_a_time(function, jobs):
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return list(pool.map(function, jobs))


def read_json(path):
    with open(path) as f:
        return json.load(f)


def read_lines(path):
    with open(path) as f:
        return [json.loads(line) for line in f]


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


def write_results(folder, name, data, lines):
    """FOLDER/NAME.json and .md; the lines are printed too."""
    os.makedirs(folder, exist_ok=True)
    with open(f"{folder}/{name}.json", "w") as f:
        json.dump(data, f, indent=1)
    with open(f"{folder}/{name}.md", "w") as f:
        f.write("\n".join(lines) + "\n")
    print("\n".join(lines))
