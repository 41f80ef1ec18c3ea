"""The table at the end of `make demo`: SFT, DVPO and PPO side by side, from what the stages wrote.

    python experiments/report.py [--out out/tiny]         prints the table, writes OUT/report.json
"""
import argparse
import json
import os

import numpy as np


def load(folder):
    """metrics.jsonl, summary.json and memory.json of one stage; the summary of a stage without them is empty.
    """
    def read(name, default):
        return json.load(open(os.path.join(folder, name))) if os.path.exists(os.path.join(folder,
                                                                                          name)) else default

    with open(os.path.join(folder, "metrics.jsonl")) as f:
        return [json.loads(line) for line in f], read("summary.json", {}), read("memory.json",
                                                                                {}).get("models", {})


def reach(rows, share=0.9, window=5):
    """(steps, seconds) until the gold reward, a mean over `window` steps, has made `share` of its whole gain.
    """
    gold = np.array([r["gold"] for r in rows])
    smooth = np.convolve(gold, np.ones(window) / window, "valid")  # entry i ends at step i + window - 1
    final = gold[-max(1, len(gold) // 10):].mean()
    there = np.nonzero(smooth >= gold[0] + share * (final - gold[0]))[0]
    i = min(int(there[0]) + window - 1, len(rows) - 1) if len(there) else len(rows) - 1
    return i + 1, rows[i]["seconds"]


def table(out):
    """-> list of rows (dicts), one a stage that has run."""
    rows = []
    for stage in ("sft", "dvpo", "ppo"):
        if not os.path.exists(os.path.join(out, stage, "summary.json")):
            continue
        metrics, summary, models = load(os.path.join(out, stage))
        row = dict(stage=stage.upper(), gold=summary.get("gold"), kl=summary.get("kl", 0.0),
                   peak_mb=max(r["peak_bytes"] for r in metrics) / 2**20,
                   held=sum(m["parameters"] for m in models.values()), trained=sum(m["trainable"]
                                                                                   for m in models.values()))
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
    print(
        f"{'':6}{'gold reward':>12}{'KL to SFT':>11}{'steps to 90 %':>15}{'seconds':>9}"
        f"{'of':>8}{'peak MB':>9}{'parameters held':>17}{'trained':>10}"
    )
    for r in rows:
        steps, seconds, total = (f"{r[k]:.0f}" if k in r else "-"
                                 for k in ("steps_90", "seconds_90", "seconds"))
        print(
            f"{r['stage']:6}{r['gold']:>12.3f}{r['kl']:>11.2f}{steps:>15}{seconds:>9}{total:>8}"
            f"{r['peak_mb']:>9.0f}{r['held']:>17,}{r['trained']:>10,}"
        )
    with open(os.path.join(args.out, "report.json"), "w") as f:
        json.dump(rows, f, indent=1)


if __name__ == "__main__":
    main()
