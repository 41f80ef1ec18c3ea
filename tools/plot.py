"""The figures, from what the stages wrote. Needs matplotlib, which nothing else does.

    python tools/plot.py [--out out/tiny]
        writes OUT/curves.png and, after train_gvm.py --show, OUT/heatmap.png
    python tools/plot.py --dvpo RUN [RUN ...] --ppo RUN [RUN ...] [--no-tau RUN ...] --to FILE.png
        several seeds: mean and band
    python tools/plot.py --heatmap GOOD/show.json BAD/show.json --to FILE.png   two responses to one prompt
"""
import argparse
import json
import os

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np


def load(path):
    with open(path) as f:
        return json.load(f)


def read(folder):
    with open(os.path.join(folder, "metrics.jsonl")) as f:
        return [json.loads(line) for line in f]


TITLES = dict(gold="gold reward", q_mean="mean value (Q of the GVM; V of the critic)",
              kl="KL to SFT, nats per response")
COLOURS = "tab:blue", "tab:orange", "tab:green"


def curves(runs, path, window=5):
    """Gold reward, value and KL against steps and seconds: runs {name: [folder, ...]}; band: all seeds."""
    fig, axes = plt.subplots(2, 3, figsize=(13, 6.5))

    def smooth(x):
        return np.convolve(np.pad(x, (window - 1, 0), "edge"), np.ones(window) / window, "valid")

    for (name, folders), colour in zip(runs.items(), COLOURS, strict=False):
        seeds = [read(f) for f in folders]
        n, label = min(map(len, seeds)), f"{name} ({len(seeds)} seed{'s' * (len(seeds) > 1)})"
        for row, x_key in enumerate(("step", "seconds")):
            x = np.mean([[r[x_key] for r in s[:n]] for s in seeds], 0)
            for ax, (key, title) in zip(axes[row], TITLES.items(), strict=True):
                if key not in seeds[0][0]:
                    continue
                y = np.array([smooth([r[key] for r in s[:n]]) for s in seeds])
                ax.plot(x, y.mean(0), color=colour, label=label)
                ax.fill_between(x, y.min(0), y.max(0), color=colour, alpha=0.2, lw=0)
                ax.set(xlabel=x_key + "s" * (x_key == "step"), title=title)
                ax.grid(alpha=0.3)
    axes[0, 0].legend()
    fig.tight_layout()
    fig.savefig(path, dpi=120)
    print(path)


def heatmap(responses, path):
    """Figure 4: the token values of responses to one prompt, and the true ones, from train_gvm.py --show."""

    def plain(text):
        return text.replace("$", r"\$")                 # no mathtext from other people's text

    kinds = [[key for key in ("q", "true_q") if key in shown] for shown in responses]
    scale = max(1e-6, *(np.abs([shown[key] for key in keys]).max()
                        for shown, keys in zip(responses, kinds, strict=True)))
    width = 0.75 * max(len(shown["q"]) for shown in responses) + 1.5
    height = sum(0.8 * len(keys) + 1.4 for keys in kinds)
    fig, axes = plt.subplots(len(responses), 1, squeeze=False, figsize=(width, height))
    for shown, keys, ax in zip(responses, kinds, axes[:, 0], strict=True):
        values = np.array([shown[key] for key in keys])
        ax.imshow(values, cmap="RdYlGn", vmin=-scale, vmax=scale, aspect="auto")
        for i, j in np.ndindex(*values.shape):
            colour = "white" if abs(values[i, j]) > 0.8 * scale else "black"
            ax.text(j, i, f"{values[i, j]:+.2f}", ha="center", va="center", fontsize=8, color=colour)
        ax.set_xticks(range(values.shape[1]), [plain(t) for t in shown["tokens"]], rotation=40, ha="right")
        ax.set_yticks(range(len(values)), [dict(q="GVM", true_q="truth")[key] for key in keys])
    prompt = responses[0]["prompt"]
    question = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    axes[0, 0].set_title(plain(question), fontsize=10)
    fig.tight_layout()
    fig.savefig(path, dpi=120)
    print(path)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", default="out/tiny", help="folder with the stages' output (default: out/tiny)")
    p.add_argument("--dvpo", nargs="+", help="run folders of dvpo.py, one a seed (default: OUT/dvpo)")
    p.add_argument("--ppo", nargs="+", help="run folders of ppo_baseline.py, one a seed (default: OUT/ppo)")
    p.add_argument("--no-tau", nargs="+",
                   help="run folders of dvpo.py behind a GVM without tau: a third line")
    p.add_argument("--to", help="file to write (default: OUT/curves.png)")
    p.add_argument("--heatmap", nargs="+", metavar="SHOW.json",
                   help="figure 4 of several responses to one prompt, from train_gvm.py --show; needs --to")
    args = p.parse_args(argv)
    if args.to:
        os.makedirs(os.path.dirname(os.path.abspath(args.to)), exist_ok=True)
    if args.heatmap:
        if not args.to:
            p.error("--heatmap needs --to FILE.png")
        return heatmap([load(path) for path in args.heatmap], args.to)
    dvpo, ppo = os.path.join(args.out, "dvpo"), os.path.join(args.out, "ppo")
    runs = dict(DVPO=args.dvpo or [dvpo], PPO=args.ppo or [ppo])
    if args.no_tau:
        runs["DVPO, no tau"] = args.no_tau
    runs = {name: folders for name, folders in runs.items()
            if os.path.exists(os.path.join(folders[0], "metrics.jsonl"))}
    curves(runs, args.to or os.path.join(args.out, "curves.png"))
    shown = os.path.join(args.out, "gvm", "show.json")
    if os.path.exists(shown) and not args.to:
        heatmap([load(shown)], os.path.join(args.out, "heatmap.png"))


if __name__ == "__main__":
    main()
