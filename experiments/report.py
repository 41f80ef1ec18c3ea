"""The table at the end of `make demo`: SFT, DVPO and PPO side by side, from what the stages wrote.

    python experiments/report.py [--out out/tiny]         prints the table, writes OUT/report.json
"""
import argparse
import json
import os

import numpy as np


def read(path, default=None):
    if default is not None and not os.path.exists(path):
        return default
    with open(path) as f:
        return json.load(f)


def load(folder):
    """metrics.jsonl, summary.json, and the models of memory.json; empty where not written."""
    with open(os.path.join(folder, "metrics.jsonl")) as f:
        metrics = [json.loads(line) for line in f]
    summary, memory = (read(os.path.join(folder, name), {}) for name in ("summary.json", "memory.json"))
    return metrics, summary, memory.get("models", {})


def reach(rows, share=0.9, window=5):
    """(steps, seconds) until the gold reward, a mean over `window` steps, made `share` of its whole gain."""
    gold = np.array([row["gold"] for row in rows])
    smooth = np.convolve(gold, np.ones(window) / window, "valid")       # entry i ends at step i + window - 1
    final = gold[-max(1, len(gold) // 10):].mean()
    reached = np.nonzero(smooth >= gold[0] + share * (final - gold[0]))[0]
    i = min(int(reached[0]) + window - 1, len(rows) - 1) if len(reached) else len(rows) - 1
    return i + 1, rows[i]["seconds"]


def table(out):
    """-> list of rows (dicts), one for each stage that has run."""
    rows = []
    for stage in ("sft", "dvpo", "ppo"):
        if not os.path.exists(os.path.join(out, stage, "summary.json")):
            continue
        metrics, summary, models = load(os.path.join(out, stage))
        row = dict(stage=stage.upper(), gold=summary.get("gold"), kl=summary.get("kl", 0.0))
        row["peak_mb"] = max(step["peak_bytes"] for step in metrics) / 2**20
        row["held"] = sum(model["parameters"] for model in models.values())
        row["trained"] = sum(model["trainable"] for model in models.values())
        if "gold" in metrics[0]:
            row["steps_90"], row["seconds_90"] = reach(metrics)
            row["seconds"] = metrics[-1]["seconds"]
        rows.append(row)
    return rows


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", default="out/tiny", help="folder with the stages' output (default: out/tiny)")
    args = p.parse_args(argv)
    rows = table(args.out)
    print(f"{'':6}{'gold reward':>12}{'KL to SFT':>11}{'steps to 90 %':>15}{'seconds':>9}{'of':>8}"
          f"{'peak MB':>9}{'parameters held':>17}{'trained':>10}")
    for row in rows:
        to_90 = "steps_90", "seconds_90", "seconds"
        steps, seconds, total = (f"{row[key]:.0f}" if key in row else "-" for key in to_90)
        print(f"{row['stage']:6}{row['gold']:>12.3f}{row['kl']:>11.2f}{steps:>15}{seconds:>9}{total:>8}"
              f"{row['peak_mb']:>9.0f}{row['held']:>17,}{row['trained']:>10,}")
    with open(os.path.join(args.out, "report.json"), "w") as f:
        json.dump(rows, f, indent=1)


if __name__ == "__main__":
    main()
