"""Everything that one CUDA machine should say: `python tools/bench.py --card` -> results/bench_gpu.md.

Six minutes, no network. Every part is a function of its own; the tests call them at a tiny size on a CPU.
"""
import argparse
import os
import shutil
import subprocess
import sys
import time

import deepspeed
import torch
import transformers

import common
from tools import bench

GIB = 2**30
LIMIT = 330                                             # seconds after which no further part begins
PAPER_STEPS, PAPER_ROWS = 450, 64                       # its RL stage; answers of up to 1,024 tokens
PARTS = {                                               # what a card should say
    "toy": "whether every stage runs on the toy, the first ratio is 1, and a run resumes bit for bit",
    "token": "milliseconds per token at 8 and at 64 rows, beside `generate`",
    "kernels": "the ten longest kernels of a token and of a training pass",
    "steps": "a step by phase: DVPO, --lora, and PPO where 130 GiB are free",
}

# ----------------------------------------------------------------------------------------------------
# The toy: every stage, side by side on the card

FOLDER, STEPS = "out/bench/toy", 12
RL, PAIRS = ("--batch-size", 32, "--mini-batch-size", 16), ("--pairs", "data/toy/pairs.jsonl")
RM = *PAIRS, "--rm-max-steps", 20
TOY = (                                                 # two rounds, each side by side: name, script, flags
    {"sft_z1": ("sft.py", "--zero", 1), "gvm": ("train_gvm.py",), "gvm_z3": ("train_gvm.py", "--zero", 3),
     "rm": ("ppo_baseline.py", *RM, "--rm-only"), "rm_z1": ("ppo_baseline.py", *RM, "--rm-only", "--zero", 1),
     "dpo": ("comparators/dpo.py", *PAIRS)},
    {"dvpo": ("dvpo.py", *RL), "dvpo_z1": ("dvpo.py", *RL, "--zero", 1),
     "dvpo_z3": ("dvpo.py", *RL, "--zero", 3), "offload": ("dvpo.py", *RL, "--zero", 1, "--offload"),
     "lora": ("dvpo.py", *RL, "--lora"), "lora_z3": ("dvpo.py", *RL, "--lora", "--zero", 3),
     "no_static": ("dvpo.py", *RL, "--no-static-cache"),
     "checkpointing": ("dvpo.py", *RL, "--gradient-checkpointing"),
     "ppo": ("ppo_baseline.py", *RL), "ppo_z1": ("ppo_baseline.py", *RL, "--zero", 1),
     "ppo_z3": ("ppo_baseline.py", *RL, "--zero", 3),
     "ppo_no_static": ("ppo_baseline.py", *RL, "--no-static-cache"),
     "grpo": ("comparators/critic_free.py", *RL),
     "remax": ("comparators/critic_free.py", "--method", "remax", *RL)},
)
RESUMED = "dvpo", "dvpo_z1", "lora", "ppo_z1"


def words(folder, name, script, *flags):
    """The flags of one run of the toy."""
    argv = [*flags, "--model", "tiny", "--init-from", "data/toy/model", "--out", f"{folder}/{name}"]
    if name.startswith(("gvm", "dpo", "sft")):
        argv += ["--max-steps", 3 * STEPS]
    elif "--rm-only" not in flags:
        argv += ["--max-steps", STEPS, "--save-every", STEPS // 2]
    if script == "dvpo.py":
        argv += ["--gvm", f"{folder}/gvm/model"]
    elif name.startswith(("ppo", "grpo", "remax", "rm")):
        argv += ["--rm", f"{folder}/{name if '--rm-only' in flags else 'rm'}/model"]
    return list(map(str, argv))


def start(folder, name, script, *flags):
    """One run of the toy in a process of its own."""
    argv = [sys.executable, script, *words(folder, name, script, *flags)]
    environment = {key: value for key, value in os.environ.items() if key not in common.LAUNCHER_VARIABLES}
    with open(f"{folder}/{name}.log", "a") as log:
        return subprocess.Popen(argv, stdout=log, stderr=log, env=environment)


def metrics(folder, name):
    return bench.rows_of(f"{folder}/{name}/metrics.jsonl")


def toy():
    """-> what each run did, and whether those that are resumed come out bit for bit."""
    folder = FOLDER
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    if not os.path.exists("data/toy/pairs.jsonl"):
        subprocess.run([sys.executable, "data/toy.py"], check=True, stdout=subprocess.DEVNULL)
    found, flags = {}, {}
    for round_ in TOY:
        flags |= round_
        running = {name: start(folder, name, *how) for name, how in round_.items()}
        for name, process in running.items():
            ended, rows = process.wait() == 0, metrics(folder, name)
            off = [abs(row["ratio_first"] - 1) for row in rows if "ratio_first" in row]
            found[name] = dict(ended=ended, steps=len(rows), first_ratio_off=max(off, default=None))
    resumed, again = {}, {}
    for name in [name for name in RESUMED if name in found]:
        shutil.copytree(f"{folder}/{name}", f"{folder}/{name}_again")
        shutil.rmtree(f"{folder}/{name}_again/checkpoint/step_{STEPS}", ignore_errors=True)
        again[name] = start(folder, f"{name}_again", *flags[name], "--resume")
    for name, process in again.items():
        process.wait()
        rows = [[{key: value for key, value in row.items() if not key.startswith(("sec", "peak"))}
                 for row in metrics(folder, run)] for run in (name, f"{name}_again")]
        resumed[name] = rows[0] == rows[1] and len(rows[0]) == STEPS
    return dict(toy=found, resumed=resumed)


# ----------------------------------------------------------------------------------------------------
# One token, a training pass, a step


def token(shape, prompt, new):
    """Milliseconds per token at 8 and at 64 rows, ours and `generate`'s, and the bytes that it must read."""
    found = []
    for rows in 8, 64:
        args = argparse.Namespace(prompt=prompt, new=new, batch_size=rows, rounds=1)
        run = bench.decode(args, shape, ("static", "generate"))
        ours, theirs = (1000 * run[way] / new for way in ("static", "generate"))
        read = bench.bytes_per_token(shape, rows, prompt + new / 2)
        more = run["first"]["static"] - run["static"]                       # compilation, warming up
        found.append(dict(shape=shape, rows=rows, ms=ours, generate=theirs, read=read, first=more))
    return found


def longest(run, count=10):
    """The kernels (on a CPU: the operations) that take longest in one call of `run`."""
    run()
    on = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * bench.CUDA
    with torch.profiler.profile(activities=on) as seen:
        run()
        bench.synchronize()
    key = "self_device_time_total" if bench.CUDA else "self_cpu_time_total"
    kernels = sorted(seen.key_averages(), key=lambda e: getattr(e, key), reverse=True)[:count]
    return [dict(name=e.key[:70], ms=getattr(e, key) / 1000, calls=e.count) for e in kernels]


def kernels(shape, prompt, new, rows=8):
    """The longest of a token behind half of the answer, and of a forward and backward pass of two rows."""
    model = common.load_model(f"{bench.make(shape, prompt)}/model").eval()
    ids = torch.randint(0, 2048, (rows, prompt), device=bench.DEVICE)
    with torch.no_grad():
        decode = common.static_decoder(common.Decoder(model, ids, torch.ones_like(ids)), new)
        for _ in range(new // 2):
            decode(ids[:, 0])
        of_token = longest(lambda: decode(ids[:, 0]))
    ids = torch.randint(0, 2048, (2, prompt + new), device=bench.DEVICE)
    model.requires_grad_(True).train()
    of_pass = longest(lambda: model(ids, torch.ones_like(ids), new).sum().backward())
    return {f"a token of {shape}, {rows} rows": of_token, f"a training pass of {shape}, 2 rows": of_pass}


def steps(shape, methods, prompt, new, rounds=2):
    """A step of each method by phase, one after the other: together they would not fit."""
    args = bench.parser().parse_args(["--shape", shape, "--prompt", str(prompt), "--new", str(new)])
    measured = {}
    for method in methods:
        measured |= bench.side_by_side(args, [method], rounds)
    keys = "prompt", "new", "mini_batch_size", "grad_accum", "ppo_epochs"
    return dict({key: getattr(args, key) for key in keys}, rows=args.batch_size,
                parameters=bench.count(shape)[0], measured=measured)


def about():
    """The machine and the versions."""
    driver = "none"
    if bench.CUDA:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True).stdout.split()[0]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout
    return dict(machine=torch.cuda.get_device_name() if bench.CUDA else "CPU", driver=driver,
                gib=round(torch.cuda.mem_get_info()[1] / GIB) if bench.CUDA else 0,
                python=".".join(map(str, sys.version_info[:2])), torch=torch.__version__,
                transformers=transformers.__version__, deepspeed=deepspeed.__version__,
                commit=commit.strip() or "unknown", date=time.strftime("%Y-%m-%d"))


def measure(command, shape="llama3-3b", prompt=256, new=1024, methods=("dvpo", "lora", "ppo")):
    """All parts in turn -> {name of card and commit: what they found}; after the limit, no more."""
    begin, card = time.perf_counter(), about()
    large = f"`{command.split(' --')[0]} --shape llama3-8b --prompt 256 --new 1024 --methods lora --rounds 2`"
    card |= dict(commands={"all of it": command}, not_measured={"a step of 8B with --lora": large})
    if bench.CUDA and torch.cuda.mem_get_info()[0] < 130 * GIB:
        methods = ("dvpo", "lora") if torch.cuda.mem_get_info()[0] > 75 * GIB else ("lora",)
    card["rate"] = bench.machine(shape)
    make = f"from tools import bench; bench.make({shape!r}, {prompt}, {new})"
    making = subprocess.Popen([sys.executable, "-c", make])             # writes the models beside the toy
    parts = {"toy": lambda: card.update(toy()) or making.wait(),
             "token": lambda: card.update(token=token(shape, prompt, min(new, 128))),
             "kernels": lambda: card.update(kernels=kernels(shape, prompt, new)),
             "steps": lambda: card.update(steps={shape: steps(shape, methods, prompt, new)})}
    for name, part in parts.items():
        if time.perf_counter() - begin < LIMIT:
            part()
            print(f"{time.perf_counter() - begin:.0f} s: {name}", flush=True)
    card["seconds"] = time.perf_counter() - begin
    return {f"{card['machine']}, commit {card['commit']}": card}


# ----------------------------------------------------------------------------------------------------
# Report


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
        peaks = [f"{method}: " + ", ".join(f"{what} {held / GIB:.1f}" for what, held in run["peaks"].items())
                 for method, run in part["measured"].items() if "peaks" in run]
        lines += ["", f"A step of {shape}, {part['rows']} rollouts of {part['prompt']} + {part['new']} "
                  f"tokens, mini-batch {part['mini_batch_size']}, {part['ppo_epochs']} epochs; medians of "
                  f"{len(run['rounds'])} steps:", *bench.table(head, rows)]
        lines += [f"Peaks, GiB: {'; '.join(peaks)}.", ""] if peaks else []
    return [*lines, f"The last column is {PAPER_STEPS} steps of {PAPER_ROWS} rollouts on this card alone, as "
            "that many times a step of the rollouts above. More rows in one rollout would cost less: one "
            "reading of the weights serves them all.", ""]


def report_token(card):
    rows = []
    for run in card["token"]:
        least = 1000 * run["read"] / card["rate"]["bandwidth"]
        theirs = f"{run['generate']:.2f}" if "generate" in run else ""
        more = f"{run['first']:.1f}" if "first" in run else ""
        cells = f"{run['ms']:.2f}", f"{least:.2f}", f"{least / run['ms']:.2f}", theirs, more
        rows.append([run["shape"], run["rows"], *cells])
    return ["", "One token of the rollout (all of the rollout over its tokens, the prompt included); the "
            "least is what weights and cache take at the bandwidth:",
            *bench.table(["shape", "rows", "ms", "least ms", "share of bandwidth", "`generate` ms",
                          "compilation and warm-up s"], rows)]


def report_kernels(card):
    lines = []
    for what, kernels in card["kernels"].items():
        rows = [[f"{kernel['ms']:.3f}", kernel["calls"], f"`{kernel['name']}`"] for kernel in kernels]
        lines += ["", f"The longest kernels of {what}:", *bench.table(["ms", "calls", "kernel"], rows)]
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
