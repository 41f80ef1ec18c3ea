"""The figures, from what the stages wrote. Needs matplotlib, which nothing else does.

    python tools/plot.py [--out out/tiny]
        writes OUT/curves.png and, after train_gvm.py --show, OUT/heatmap.png
    python tools/plot.py --dvpo RUN [RUN ...] --ppo RUN [RUN ...] [--no-tau RUN ...] --to FILE.png
        several seeds: mean and band
    python tools/plot.py --heatmap GOOD/show.json BAD/show.json --to FILE.png   two responses to one prompt
    python tools/plot.py --growth results/bench_cpu.json
        seconds and bytes of a step against rows, tokens and parameters
"""
import argparse
import json
import os

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np


def read(folder):
    with open(os.path.join(folder, "metrics.jsonl")) as f:
        return [json.loads(line) for line in f]


TITLES = "gold reward", "mean value (Q of the GVM; V of the critic)", "KL to SFT, nats per response"


def curves(runs, path, window=5):
    """Gold reward, value and KL against steps and seconds: runs {name: [folder, ...]}; band: smallest to
    largest seed."""
    fig, axes = plt.subplots(2, 3, figsize=(13, 6.5))

    def smooth(x):
        return np.convolve(np.pad(x, (window - 1, 0), "edge"), np.ones(window) / window, "valid")

    for (name, folders), colour in zip(runs.items(), ("tab:blue", "tab:orange", "tab:green"), strict=False):
        seeds = [read(f) for f in folders]
        n = min(map(len, seeds))
        for row, x_key in enumerate(("step", "seconds")):
            x = np.mean([[r[x_key] for r in s[:n]] for s in seeds], 0)
            for ax, key, label in zip(axes[row], ("gold", "q_mean", "kl"), TITLES, strict=True):
                if key not in seeds[0][0]:
                    continue
                y = np.array([smooth([r[key] for r in s[:n]]) for s in seeds])
                ax.plot(x, y.mean(0), color=colour,
                        label=f"{name} ({len(seeds)} seed{'s' * (len(seeds) > 1)})")
                ax.fill_between(x, y.min(0), y.max(0), color=colour, alpha=0.2, lw=0)
                ax.set(xlabel=x_key + "s" * (x_key == "step"), title=label)
                ax.grid(alpha=0.3)
    axes[0, 0].legend()
    fig.tight_layout()
    fig.savefig(path, dpi=120)
    print(path)


def heatmap(responses, path):
    """Figure 4: the token values of responses to one prompt, the true ones underneath. responses: what
    train_gvm.py --show wrote, one or several."""
    def plain(text):
        return text.replace("$", r"\$")  # no mathtext from other people's text

    def rows(shown):
        return [(k, label) for k, label in (("q", "GVM"), ("true_q", "truth")) if k in shown]

    scale = max(1e-6, *(abs(v) for shown in responses for k, _ in rows(shown) for v in shown[k]))
    fig, axes = plt.subplots(
        len(responses), 1, squeeze=False, figsize=(0.75 * max(len(s["q"]) for s in responses) + 1.5,
                                                   sum(0.8 * len(rows(s)) + 1.4 for s in responses)))
    for shown, ax in zip(responses, axes[:, 0], strict=False):
        values = np.array([shown[k] for k, _ in rows(shown)])
        ax.imshow(values, cmap="RdYlGn", vmin=-scale, vmax=scale, aspect="auto")
        for i, j in np.ndindex(*values.shape):
            ax.text(j, i, f"{values[i, j]:+.2f}", ha="center", va="center", fontsize=8,
                    color="white" if abs(values[i, j]) > 0.8 * scale else "black")
        ax.set_xticks(range(values.shape[1]), [plain(t) for t in shown["tokens"]], rotation=40, ha="right")
        ax.set_yticks(range(len(values)), [label for _, label in rows(shown)])
    axes[0, 0].set_title(
        plain(shown["prompt"] if isinstance(shown["prompt"], str) else shown["prompt"][-1]["content"]),
        fontsize=10)
    fig.tight_layout()
    fig.savefig(path, dpi=120)
    print(path)


def growth(points, path):
    """Measured seconds over their floor, and peak memory over its plan, each against one size while the
    others stand still."""
    fig, axes = plt.subplots(2, 3, figsize=(13, 6.5))
    size = {"tiny": 2.9e5, "14M": 1.42e7, "124M": 1.24e8}
    base = dict(shape="14M", rows=4, new=64)
    for column, (key, label) in enumerate(
        (("rows", "rows of a rollout"), ("new", "new tokens"), ("shape", "parameters"))):
        line = sorted((p for p in points if all(p[k] == v for k, v in base.items() if k != key)),
                      key=lambda p: size.get(p[key], p[key]))
        x = [size.get(p[key], p[key]) for p in line]
        for method, colour in zip(line[0]["measured"], ("tab:orange", "tab:blue", "tab:green"), strict=False):
            for ax, measured, formula, unit in (axes[0, column], "sec_step", "floor",
                                                1), (axes[1, column], "peak", "planned", 2**20):
                ax.loglog(x, [p["measured"][method][measured] / unit for p in line], "o-", color=colour,
                          label=method)
                ax.loglog(x, [p["measured"][method][formula] / unit for p in line], ":", color=colour)
                ax.set_xticks(x, [f"{n:.2g}" if key == "shape" else n for n in x])
                ax.xaxis.minorticks_off()
        axes[0, column].set_title(label)
        axes[0, column].set_ylabel("seconds a step; dotted: counted floor")
        axes[1, column].set_ylabel("peak MB; dotted: the plan")
    axes[0, 0].legend()
    for ax in axes.flat:
        ax.grid(alpha=0.3, which="both")
    fig.tight_layout()
    fig.savefig(path, dpi=110)
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
    p.add_argument("--growth", help="JSON of tools/bench.py --growth; writes bench_growth.png beside it")
    args = p.parse_args(argv)
    if args.growth:
        with open(args.growth) as f:
            return growth(
                json.load(f)["growth"]["points"],
                os.path.join(os.path.dirname(args.growth), "bench_growth.png"))
    if args.heatmap:
        return heatmap([json.load(open(path)) for path in args.heatmap], args.to
                       or p.error("--heatmap needs --to FILE.png"))
    runs = dict(DVPO=args.dvpo or [os.path.join(args.out, "dvpo")], PPO=args.ppo
                or [os.path.join(args.out, "ppo")])
    runs |= {"DVPO, no tau": args.no_tau} if args.no_tau else {}
    curves({k: v
            for k, v in runs.items() if os.path.exists(os.path.join(v[0], "metrics.jsonl"))}, args.to
           or os.path.join(args.out, "curves.png"))
    shown = os.path.join(args.out, "gvm", "show.json")
    if os.path.exists(shown) and not args.to:
        with open(shown) as f:
            heatmap([json.load(f)], os.path.join(args.out, "heatmap.png"))


if __name__ == "__main__":
    main()
