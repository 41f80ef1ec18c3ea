"""What `python tools/bench.py --card` writes about one CUDA machine: results/bench_gpu.md."""
GIB = 2**30
PAPER_STEPS, PAPER_ROWS = 450, 64                       # its RL stage; answers of up to 1,024 tokens
PARTS = {                                               # what a card should say
    "toy": "whether every stage runs on the toy, the first ratio is 1, and a run resumes bit for bit",
    "token": "milliseconds per token at 8 and at 64 rows, beside `generate`",
    "steps": "a step of 3B by phase (DVPO, --lora, PPO where 130 GiB are free), and of 8B with --lora",
    "kernels": "the ten longest kernels of a token and of a training pass",
}


def table(head, rows):
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in (head, ["---"] * len(head), *rows)]
    return ["", *lines, ""]


def hours(step, rows):
    """Of the paper's RL stage on one card, by the seconds of a step of `rows` rollouts."""
    return PAPER_STEPS * PAPER_ROWS / rows * step / 3600


def train_share(part, method, rate):
    """Share of the bare bf16 product's speed in a step's training.

    Operations per token and trained model: 2 N forward, 4 N backward (2 N where the weights are frozen).
    """
    tokens = part["ppo_epochs"] * part["rows"] * (part["prompt"] + part["new"])
    per_weight = {"ppo": 12, "lora": 4}.get(method, 6)
    operations = per_weight * part["parameters"] * tokens
    return operations / rate["operations"] / part["measured"][method]["sec_train"]


def report_toy(card):
    toy, resumed = card["toy"], card["resumed"]
    ended = sum(run["ended"] for run in toy.values())
    off = {name: run["first_ratio_off"] for name, run in toy.items()}
    off = {name: x for name, x in off.items() if x is not None}
    rest = ", ".join(f"{name} {x:.0e}" for name, x in off.items() if x)
    exact = f"{sum(x == 0 for x in off.values())} of {len(off)}" + (f" (off by: {rest})" if rest else "")
    return ["", f"{ended} of {len(toy)} runs on the toy ended well ({', '.join(toy)}). The first ratio is "
            f"exactly 1 in every step of {exact}. Resumed bit for bit: {sum(resumed.values())} of "
            f"{len(resumed)} ({', '.join(resumed)}).", ""]


def report_steps(card):
    head = ["", "generate s", "score s", "train s", "step s", "peak GiB", "planned GiB", "planned / peak",
            "training: share of the bare product", "paper's RL stage, hours, computed"]
    lines = []
    for shape, part in card["steps"].items():
        rows = []
        for method, run in part["measured"].items():
            cells = [f"{run['sec_' + phase]:.2f}" for phase in ("generate", "score", "train")]
            cells += [f"{run['sec_step']:.1f}", f"{run['peak'] / GIB:.1f}", f"{run['planned'] / GIB:.1f}"]
            cells += [f"{run['planned'] / run['peak']:.2f}", f"{train_share(part, method, card['rate']):.2f}"]
            rows.append([method, *cells, f"{hours(run['sec_step'], part['rows']):.1f}"])
        lines += ["", f"A step of {shape}, {part['rows']} rollouts of {part['prompt']} + {part['new']} "
                  f"tokens, mini-batch {part['mini_batch_size']}, {part['ppo_epochs']} epochs; medians of "
                  f"{len(run['rounds'])} steps:", *table(head, rows)]
    return [*lines, f"The last column is {PAPER_STEPS} steps of {PAPER_ROWS} rollouts on this card alone, as "
            "that many times a step of the rollouts above. More rows in one rollout would cost less: one "
            "reading of the weights serves them all.", ""]


def report_token(card):
    rows = []
    for run in card["token"]:
        least = 1000 * run["read"] / card["rate"]["bandwidth"]
        theirs = f"{run['generate']:.2f}" if "generate" in run else ""
        cells = f"{run['ms']:.2f}", f"{least:.2f}", f"{least / run['ms']:.2f}", theirs
        rows.append([run["shape"], run["rows"], *cells])
    return ["", "One token of the rollout (all of the rollout over its tokens, the prompt included); the "
            "least is what weights and cache take at the bandwidth:",
            *table(["shape", "rows", "ms", "least ms", "share of the bandwidth", "`generate` ms"], rows)]


def report_kernels(card):
    lines = []
    for what, kernels in card["kernels"].items():
        rows = [[f"{kernel['ms']:.3f}", kernel["calls"], f"`{kernel['name']}`"] for kernel in kernels]
        lines += ["", f"The longest kernels of {what}:", *table(["ms", "calls", "kernel"], rows)]
    return lines


def report(cards):
    """The lines of results/bench_gpu.md for {name of card and commit: what was measured there}."""
    writers = dict(toy=report_toy, steps=report_steps, token=report_token, kernels=report_kernels)
    lines = []
    for name, card in cards.items():
        rate = card["rate"]
        packages = ", ".join(f"{key} {card[key]}" for key in ("torch", "transformers", "deepspeed"))
        lines += ["", f"## {name}", "",
                  f"{card['machine']}, {card['gib']} GiB, driver {card['driver']}, Python {card['python']}, "
                  f"{packages}; {card['date']}. Bare bf16 product {rate['operations'] / 1e12:,.0f} T "
                  f"operations/s, bare copy {rate['bandwidth'] / 1e12:.1f} TB/s.",
                  "", *(f"* {what}: `{command}`" for what, command in card["commands"].items())]
        for part, write in writers.items():
            lines += write(card) if part in card else []
        absent = {what: "`python tools/bench.py --card`" for part, what in PARTS.items() if part not in card}
        absent |= card.get("not_measured", {})
        if absent:
            lines += ["", "Not measured yet on this card, and what will measure it:", "",
                      *(f"* {what}: {command}" for what, command in absent.items())]
    return lines
