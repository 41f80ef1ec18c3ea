"""The table at the end of `make demo`: SFT, DVPO and PPO side by side, from what the stages wrote.

    python experiments/report.py [--out out/tiny]         prints it, writes OUT/report.md
"""
import argparse
import os
import sys

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from experiments.shared import reach, read_json, read_lines, table

NAMES = ["", "gold reward", "KL to SFT", "RL steps to 90 % of its own gain", "seconds to there",
         "seconds in all", "peak MB"]


def row(folder):
    """One stage: what it ended with, what it took."""
    metrics = read_lines(f"{folder}/metrics.jsonl")
    summary = read_json(f"{folder}/summary.json")
    cells = [os.path.basename(folder).upper(), f"{summary['gold']:.3f}", f"{summary.get('kl', 0):.2f}"]
    if "gold" in metrics[0]:
        gold = [step["gold"] for step in metrics]
        final = np.mean(gold[-max(1, len(gold) // 10):])
        steps = reach(gold, gold[0] + 0.9 * (final - gold[0])) or len(gold)
        steps = min(steps, len(gold))                   # a run shorter than the window
        seconds = [metrics[i]["seconds"] for i in (steps - 1, -1)]
        cells += [steps, *(f"{x:.0f}" for x in seconds)]
    else:
        cells += ["", "", ""]
    return cells + [f"{max(step['peak_bytes'] for step in metrics) / 2**20:.0f}"]


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", default="out/tiny", help="folder with the stages' output (default: out/tiny)")
    args = p.parse_args(argv)
    folders = [f"{args.out}/{stage}" for stage in ("sft", "dvpo", "ppo")]
    rows = [row(folder) for folder in folders if os.path.exists(f"{folder}/summary.json")]
    lines = table(NAMES, rows)
    with open(f"{args.out}/report.md", "w") as f:
        f.write("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
