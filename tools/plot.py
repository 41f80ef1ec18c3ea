"""Figures of what the stages wrote. Needs matplotlib.

    python tools/plot.py                                            curves of out/tiny/dvpo and out/tiny/ppo
    python tools/plot.py --run NAME FOLDER [...] --to FILE.png      of other runs; with seeds, mean and range
    python tools/plot.py --heatmap A/show.json B/show.json           token values, from train_gvm.py --show
"""
import argparse
import json
import pathlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

plt.rcParams["figure.constrained_layout.use"] = True
plt.rcParams["text.parse_math"] = False                 # a dollar sign in a text is no formula
TITLES = dict(gold="gold reward", q_mean="mean value (Q of the GVM; V of the critic)",
              kl="KL to SFT, nats per response")


def smooth(x, window=5):
    padded = np.pad(x, (window - 1, 0), "edge")
    return np.convolve(padded, np.ones(window) / window, "valid")


def column(seeds, key):
    """The numbers of one key -> (seeds, steps), with as many steps as all seeds have."""
    steps = min(map(len, seeds))
    return np.array([[row[key] for row in rows[:steps]] for rows in seeds])


def curves(runs):
    """Gold reward, value and KL against steps and seconds: runs {name: [rows of a seed, ...]}."""
    fig, axes = plt.subplots(2, 3, figsize=(13, 6.5))
    for name, seeds in runs.items():
        for row, time in enumerate(("step", "seconds")):
            for ax, (key, title) in zip(axes[row], TITLES.items(), strict=True):
                if key not in seeds[0][0]:
                    continue
                x = column(seeds, time).mean(0)
                y = np.array([smooth(numbers) for numbers in column(seeds, key)])
                line, = ax.plot(x, y.mean(0), label=f"{name} (seeds: {len(seeds)})")
                ax.fill_between(x, y.min(0), y.max(0), color=line.get_color(), alpha=0.2, lw=0)
                ax.set(xlabel=time, title=title)
                ax.grid(alpha=0.3)
    axes[0, 2].legend()
    return fig


def heatmap(responses):
    """Figure 4 of the paper: the token values of responses to one prompt, and the true ones if known."""
    names = dict(q="GVM", true_q="truth")
    values = [np.array([shown[key] for key in names if key in shown]) for shown in responses]
    scale = max(np.abs(value).max() for value in values)
    width = 0.75 * max(value.shape[1] for value in values) + 1.5
    height = sum(0.8 * len(value) + 1.4 for value in values)
    fig, axes = plt.subplots(len(responses), squeeze=False, figsize=(width, height))
    for shown, value, ax in zip(responses, values, axes[:, 0], strict=True):
        ax.imshow(value, cmap="RdYlGn", vmin=-scale, vmax=scale, aspect="auto")
        for i, j in np.ndindex(*value.shape):
            colour = "white" if abs(value[i, j]) > 0.8 * scale else "black"
            ax.text(j, i, f"{value[i, j]:+.2f}", ha="center", va="center", fontsize=8, color=colour)
        ax.set_xticks(range(value.shape[1]), shown["tokens"], rotation=40, ha="right")
        ax.set_yticks(range(len(value)), list(names.values())[:len(value)])
    axes[0, 0].set_title(responses[0]["prompt"], fontsize=10)
    return fig


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--run", nargs="+", action="append", metavar=("NAME", "FOLDER"),
                   help="a name and run folders, one per seed; may be repeated")
    p.add_argument("--heatmap", nargs="+", metavar="SHOW.json", help="draw a heat map instead of curves")
    p.add_argument("--to", help="file to write (default: out/tiny/curves.png, or heatmap.png)")
    args = p.parse_args(argv)
    try:
        if args.heatmap:
            fig = heatmap([json.loads(pathlib.Path(path).read_text()) for path in args.heatmap])
        else:
            runs = {}
            for name, *folders in args.run or [["DVPO", "out/tiny/dvpo"], ["PPO", "out/tiny/ppo"]]:
                files = [pathlib.Path(folder, "metrics.jsonl") for folder in folders]
                runs[name] = [[json.loads(line) for line in file.open()] for file in files]
            fig = curves(runs)
    except (OSError, ValueError) as e:
        p.error(str(e))
    path = pathlib.Path(args.to or f"out/tiny/{'heatmap' if args.heatmap else 'curves'}.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=120)
    print(path)


if __name__ == "__main__":
    main()
