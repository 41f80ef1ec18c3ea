"""What a step of each method costs, in seconds and bytes, with random weights: the cost does not depend on
what the weights are.

    python tools/bench.py               124M on a CPU: PPO, DVPO and DVPO --lora, in turns step by step
    python tools/bench.py --methods ppo dvpo lora grpo remax dpo        and those of comparators/
    python tools/bench.py --lengths mixed       answers that end where real ones do, not at the last token
    python tools/bench.py --decode      the rollout against transformers' generate, at tiny and at --shape
    python tools/bench.py --card        all that one CUDA machine should say, in six minutes: tools/card.py
    python tools/bench.py --plan --prompt 256 --new 1024    the memory plans of 3B and 8B; runs nothing
    python tools/bench.py --world 2     each method under torchrun

The scripts run as they are, each in a process of its own. All are in memory at once and take turns: each does
one step when it is its turn. The first step of each is dropped; medians over --rounds. Everything goes to
results/bench_DEVICE.json and to tables in .md; a new run replaces its own part alone.
"""
import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np
import psutil
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import common
import dvpo
import ppo_baseline
from comparators import critic_free, dpo
from runtime.metrics import synchronize


def gpt2(vocab, width, layers, heads):
    return dict(model_type="gpt2", vocab_size=vocab, n_embd=width, n_layer=layers, n_head=heads,
                n_positions=1024, bos_token_id=0, eos_token_id=0)


def llama(**sizes):
    return dict(model_type="llama", vocab_size=128256, num_key_value_heads=8, max_position_embeddings=8192,
                rope_theta=500000.0, **sizes)


SHAPES = {
    "tiny": gpt2(2048, 64, 2, 4),
    "14M": gpt2(8192, 384, 6, 6),
    "124M": gpt2(50257, 768, 12, 12),
    "llama3-3b": llama(hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24,
                       tie_word_embeddings=True),
    "llama3-8b": llama(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                       num_attention_heads=32, tie_word_embeddings=False),
}
STAGES = {"ppo": (ppo_baseline, ()), "dvpo": (dvpo, ()), "lora": (dvpo, ("--lora",))}
COMPARATORS = {"grpo": (critic_free, ("--group-size", 4)), "remax": (critic_free, ("--method", "remax")),
               "dpo": (dpo, ())}
SCRIPTS = STAGES | COMPARATORS
TRL = {"trl_ppo": ("ppo", "dvpo", "lora"), "trl_grpo": ("grpo",), "trl_dpo": ("dpo",)}      # and ours beside
TAU_PAIRS = 3
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPE = torch.bfloat16 if CUDA else torch.float32
MB = 2**20


def make_model(folder, shape):
    """folder/model: random weights, and a tokenizer with an <eos> that the model cannot say, so that every
    response has its full length; folder/gvm and folder/rm, on that model."""
    config = AutoConfig.for_model(**SHAPES[shape])
    config.eos_token_id = None                          # or an answer would end by chance
    vocabulary = {f"w{i}": i for i in range(config.vocab_size)} | {"<eos>": config.vocab_size}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", eos_token="<eos>")
    fast.save_pretrained(f"{folder}/model")
    torch.manual_seed(0)
    with torch.device(DEVICE):
        AutoModelForCausalLM.from_config(config, dtype=DTYPE).save_pretrained(f"{folder}/model")
    model = common.load_model(f"{folder}/model", trainable=False)
    tok = common.load_tokenizer(f"{folder}/model")
    gvm = dict(q_mean=0.0, q_std=1.0, tau_pairs=TAU_PAIRS, tau_length=128, max_length=2048)
    for name, meta in ("gvm", gvm), ("rm", dict(mean=0.0, std=1.0)):
        model.add_adapter(name, 8, 32)
        model.add_head(name, sees_token=name == "gvm")
        common.save_adapter(model, name, tok, f"{folder}/{name}", **meta)


def make(shape, prompt, new=1):
    """out/bench/SHAPE: the models, prompts of `prompt` tokens, pairs of responses of `new`. -> the folder"""
    folder, vocab_size = f"out/bench/{shape}", SHAPES[shape]["vocab_size"]
    os.makedirs(folder, exist_ok=True)

    def words(start, n):
        return " ".join(f"w{(start + j) % vocab_size}" for j in range(n))

    prompts = [dict(prompt=words(97 * i, prompt)) for i in range(512)]
    pairs = [dict(prompt=words(i, prompt), chosen=words(7 * i, new), rejected=words(11 * i + 5, new))
             for i in range(64)]
    for name, rows in (f"prompts_{prompt}", prompts), (f"pairs_{prompt}_{new}", pairs):
        with open(f"{folder}/{name}.jsonl", "w") as f:
            f.writelines(json.dumps(row) + "\n" for row in rows)
    if not os.path.exists(f"{folder}/rm"):
        make_model(folder, shape)
    return folder


# ----------------------------------------------------------------------------------------------------
# One script in its own process, which waits for its turn after every step


def mixed(turn, rows, new):
    """Answer lengths of rollout number `turn`, spread like those of real chat models (AlpacaEval: log-normal,
    sigma 1.09; the median is put at a fifth of the room): (rows,)."""
    drawn = np.random.default_rng(turn).lognormal(math.log(new / 5), 1.09, rows)
    return torch.from_numpy(drawn.round().clip(1, new)).long()


def child(method, folder, lengths, argv):
    """Runs a script. Its rows go to FOLDER/METHOD.jsonl, with the seconds of the whole step and of the
    optimizer; FOLDER/METHOD.turn says how many steps it may do."""
    libraries = 0 if CUDA else psutil.Process().memory_info().rss       # no plan counts them
    engine, turn = common.deepspeed.DeepSpeedEngine, 0
    step, log, append_responses = engine.step, common.Metrics.log, common.append_responses
    optimizer_seconds, begin, peaks = 0.0, time.perf_counter(), {}

    def peak(phase):
        if CUDA:
            peaks[phase] = max(peaks.get(phase, 0), torch.cuda.max_memory_allocated())
            torch.cuda.reset_peak_memory_stats()

    def append(ids, attn, response, mask):              # at the end of a rollout
        peak("rollout")
        if lengths == "mixed":
            ends = mixed(turn * common.world() + common.rank(), *mask.shape).to(mask.device)
            mask = mask & (torch.arange(mask.shape[1], device=mask.device) < ends[:, None])
        return append_responses(ids, attn, response, mask)

    def timed_step(self, *args, **kwargs):
        nonlocal optimizer_seconds
        synchronize()
        peak("forward and backward")
        start = time.perf_counter()
        step(self, *args, **kwargs)
        synchronize()
        peak("optimizer")
        optimizer_seconds += time.perf_counter() - start

    def log_and_wait(self, number, **metrics):
        nonlocal optimizer_seconds, begin, turn
        turn = number + 1                               # all methods get the same lengths in a step
        row = log(self, number, **metrics)
        if common.rank() == 0:
            row |= dict(sec_step=time.perf_counter() - begin, sec_optimizer=optimizer_seconds,
                        libraries=libraries)
            if CUDA:
                row |= dict(peaks=peaks, peak_bytes=max(peaks.values()))
            with open(f"{folder}/{method}.jsonl", "a") as f:
                f.write(json.dumps(row) + "\n")
            while turns_allowed(folder, method) <= number + 1:
                time.sleep(0.1)
        common.barrier()
        optimizer_seconds, begin = 0.0, time.perf_counter()
        return row

    engine.step, common.Metrics.log, common.append_responses = timed_step, log_and_wait, append
    SCRIPTS[method][0].main(argv)


def turns_allowed(folder, method):
    with open(f"{folder}/{method}.turn") as f:
        return int("0" + f.read())                      # empty for a moment, while it is written


# ----------------------------------------------------------------------------------------------------
# All of them, in turns


def command(args, method, rounds, world, folder):
    """What starts one method."""
    rows, new = args.batch_size, args.new
    mini = min(args.mini_batch_size, rows)
    accum = min(args.grad_accum, rows // mini)
    if method in TRL:
        sizes = rounds, args.prompt, new, rows, mini, accum, args.ppo_epochs
        return [args.trl, "experiments/bench_trl.py", method, folder, world, args.lengths, *map(str, sizes)]
    prompts, pairs = f"{world}/prompts_{args.prompt}.jsonl", f"{world}/pairs_{args.prompt}_{new}.jsonl"
    argv = ["--model", f"{world}/model", "--init-from", f"{world}/model", "--heldout", prompts, "--lr", 1e-6,
            "--out", f"{folder}/{method}", "--max-prompt-length", args.prompt, "--max-new-tokens", new,
            "--zero", args.zero, "--save-every", 10**6, *SCRIPTS[method][1]]
    if method == "dpo":                                 # half as many pairs: as many responses
        argv += ["--pairs", pairs, "--pairs-heldout", pairs, "--batch-size", rows // 2, "--grad-accum",
                 rows // mini, "--max-length", args.prompt + new, "--max-steps", rounds + 2]
    else:
        value = "gvm" if method in ("dvpo", "lora") else "rm"
        argv += ["--data", prompts, f"--{value}", f"{world}/{value}", "--batch-size", rows,
                 "--mini-batch-size", mini]
    if method not in ("dpo", "remax"):
        argv += ["--grad-accum", accum, "--ppo-epochs", args.ppo_epochs]
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", args.world] if args.world > 1 else []
    script = sys.executable, *torchrun, os.path.abspath(__file__)
    return [str(word) for word in (*script, "--child", method, folder, args.lengths, *argv)]


def start(args, method, rounds, world, folder):
    """The process of one method, allowed its first step."""
    if os.path.exists(f"{folder}/{method}.jsonl"):
        os.remove(f"{folder}/{method}.jsonl")
    with open(f"{folder}/{method}.turn", "w") as f:
        f.write("1")
    environment = {k: v for k, v in os.environ.items() if k not in common.LAUNCHER_VARIABLES}
    with open(f"{folder}/{method}.log", "w") as f:
        words = command(args, method, rounds, world, folder)
        return subprocess.Popen(words, stdout=f, stderr=f, env=environment)


def rows_of(path):
    """The rows that are written to their end."""
    if not os.path.exists(path):
        return []
    with open(path) as f:
        return [json.loads(line) for line in f if line.endswith("\n")]


def turn(method, number, process, folder):
    """Lets `method` do its step `number`, and waits for its row."""
    with open(f"{folder}/{method}.turn", "w") as f:
        f.write(str(number + 1))
    while len(rows := rows_of(f"{folder}/{method}.jsonl")) <= number:
        if process.poll() is not None:
            sys.exit(f"error: {method} ended: see {folder}/{method}.log")
        time.sleep(0.1)
    return rows[number]


def stop(process):
    """Ends a method, and the ranks of its launcher, which have sessions of their own."""
    if process.poll() is None:
        for p in [*psutil.Process(process.pid).children(recursive=True), process]:
            p.kill()
    process.wait()


def medians(method, rows, folder):
    """Seconds by phase, bytes, tokens a second and the memory plan, of the rows of one method."""
    keys = "sec_step", "sec_generate", "sec_score", "sec_train", "sec_optimizer", "tokens"
    out = {key: statistics.median(row[key] for row in rows) for key in keys if key in rows[0]}
    out |= dict(rounds=[row["sec_step"] for row in rows], peak=rows[-1]["peak_bytes"])
    out["tokens_per_second"] = out["tokens"] / out["sec_step"]
    if "peaks" in rows[-1]:
        out["peaks"] = rows[-1]["peaks"]
    if method not in TRL:
        with open(f"{folder}/{method}/memory.json") as f:
            plan = {"python and libraries": rows[-1]["libraries"]} | json.load(f)["plan"]
        out |= dict(plan=plan, planned=sum(plan.values()))
    return out


def side_by_side(args, methods, rounds):
    """{method: its medians}, the methods taking turns."""
    world, folder, processes = make(args.shape, args.prompt, args.new), "out/bench/turns", {}
    seen = {method: [] for method in methods}
    os.makedirs(folder, exist_ok=True)
    if CUDA:
        torch.cuda.empty_cache()                        # the methods need the room
    try:
        for method in methods:
            processes[method] = start(args, method, rounds, world, folder)
            turn(method, 0, processes[method], folder)
        for number in range(1, rounds + 1):
            for method in methods:
                seen[method].append(turn(method, number, processes[method], folder))
                print(f"round {number}: {method} {seen[method][-1]['sec_step']:.2f} s", flush=True)
    finally:
        for process in processes.values():
            stop(process)
    return {method: medians(method, seen[method], folder) for method in methods}


# ----------------------------------------------------------------------------------------------------
# What this machine can do, and the rollout alone


def best_seconds(function, times=12):
    seconds = []
    for _ in range(times):
        synchronize()
        begin = time.perf_counter()
        function()
        synchronize()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def machine(shape):
    """{operations: a second in a product of the shape's width, bandwidth: bytes a second in a copy}."""
    width = SHAPES[shape].get("n_embd") or SHAPES[shape]["hidden_size"]
    x = torch.randn(8192 if CUDA else 1024, width, device=DEVICE, dtype=DTYPE)
    weight = torch.randn(width, 4 * width, device=DEVICE, dtype=DTYPE)
    source, target = torch.ones(2, 2**28 if CUDA else 2**26, device=DEVICE)
    operations = 2 * weight.numel() * len(x)
    return dict(operations=operations / best_seconds(lambda: x @ weight),
                bandwidth=2 * source.nbytes / best_seconds(lambda: target.copy_(source)))


def meta_model(shape, **changes):
    """The model without its weights, in bf16."""
    with torch.device("meta"):
        config = AutoConfig.for_model(**SHAPES[shape] | changes)
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def count(shape):
    """Weights of a model: all, and without the input embedding if it is not the head, too."""
    lm = meta_model(shape)
    total = sum(p.numel() for p in lm.parameters())
    return total, total if lm.config.tie_word_embeddings else total - lm.get_input_embeddings().weight.numel()


def bytes_per_token(shape, rows, context):
    """What decoding one token of `rows` rows must read: the weights and the cache."""
    config = meta_model(shape).config
    heads = config.num_attention_heads
    shared = getattr(config, "num_key_value_heads", heads)
    cache = 2 * config.num_hidden_layers * config.hidden_size * shared // heads         # numbers per token
    return (count(shape)[1] + rows * context * cache) * torch.finfo(DTYPE).bits // 8


def decode(args, shape, ways=("rollout", "static", "generate")):
    """Seconds of the rollout, with a static cache (on CUDA it has a graph), and of `generate`, in turns."""
    world = make(shape, args.prompt)
    model = common.load_model(f"{world}/model", trainable=False).eval()
    tok = common.load_tokenizer(f"{world}/model")
    device = next(model.parameters()).device
    rows = common.read_rows(f"{world}/prompts_{args.prompt}.jsonl", [])[:args.batch_size]
    prompts = [common.encode_prompt(tok, row["prompt"])[-args.prompt:] for row in rows]
    ids, attn, _ = common.frame(prompts, [[] for _ in prompts], device)

    def ours(static_cache, temperature=1.0):
        rollout_args = argparse.Namespace(max_new_tokens=args.new, temperature=temperature,
                                          static_cache=static_cache)
        return dvpo.rollout(model, prompts, tok, rollout_args, device)[0][:, args.prompt:]

    def theirs(**how):
        return model.lm.generate(ids, attention_mask=attn, max_new_tokens=args.new, pad_token_id=0,
                                 eos_token_id=tok.eos_token_id, **how)[:, args.prompt:]

    runs = {"rollout": lambda: ours(False), "static": lambda: ours(True),
            "generate": lambda: theirs(do_sample=True, top_k=0, top_p=1.0)}
    rounds = {way: [] for way in ways}
    with torch.no_grad():
        for _ in range(args.rounds + 1):                # the first one warms up
            for way in ways:
                rounds[way].append(best_seconds(runs[way], times=1))
        first = {way: seconds.pop(0) for way, seconds in rounds.items()}
        found = {way: statistics.median(seconds) for way, seconds in rounds.items()} | dict(first=first)
        if "rollout" in ways:                           # in bf16 the two best tokens are often equal
            model.float()
            greedy = theirs(do_sample=False)
            same = [(ours(static, 1e-5) == greedy).float().mean().item() for static in (False, True)]
            found |= dict(ratio=found["generate"] / found["rollout"], greedy_tokens_equal=min(same))
    return dict(found, rounds=rounds, rows=args.batch_size, prompt=args.prompt, new=args.new)


# ----------------------------------------------------------------------------------------------------
# Report


def cell(x, digits=0):
    return "" if x is None else f"{x:,.{digits}f}"


def table(head, rows):
    return ["", *("| " + " | ".join(map(str, row)) + " |" for row in (head, ["---"] * len(head), *rows)), ""]


def report_steps(title, part):
    """One row per method; its ratios to PPO and to TRL; what it planned to hold."""
    got, rate = part["measured"], part["rate"]
    rounds = len(next(iter(got.values()))["rounds"])
    lines = ["", f"## {title}", "",
             f"`{part['command']}`, {rounds} rounds. Bare product {rate['operations'] / 1e9:,.0f} G "
             f"operations/s, bare copy {rate['bandwidth'] / 1e9:,.1f} GB/s."]
    phases, rows = ("generate", "score", "train", "optimizer", "step"), []
    for method, run in got.items():
        planned = run.get("planned")
        rows.append([method, *(cell(run.get("sec_" + phase), 2) for phase in phases),
                     cell(run["tokens_per_second"], 1), cell(run["peak"] / MB),
                     cell(planned and planned / MB), cell(planned and planned / run["peak"], 2)])
    lines += table(["", "generate s", "score s", "train s", "of it optimizer s", "step s", "tokens/s",
                    "peak MB", "planned MB", "planned / peak"], rows)
    for base, beside in (TRL | {"ppo": ("dvpo", "lora", *COMPARATORS)}).items():
        rows = []
        for method in [method for method in got if base in got and method in beside]:
            run = got[method]
            each = [x / y for x, y in zip(run["rounds"], got[base]["rounds"], strict=True)]
            rows.append([method, cell(run["sec_step"] / got[base]["sec_step"], 3),
                         f"{min(each):.3f} to {max(each):.3f}", cell(run["peak"] / got[base]["peak"], 3)])
        if rows:
            head = [f"against {base}", "time", "smallest and largest of the rounds", "memory"]
            lines += table(head, rows)
    planned = [f"{method}: " + ", ".join(f"{what} {held / MB:,.0f}" for what, held in run["plan"].items())
               for method, run in got.items() if "plan" in run]
    return [*lines, f"Planned, and held by Python and its libraries before, MB: {'; '.join(planned)}."]


def report_decode(part):
    rows = []
    for shape, run in part["shapes"].items():
        sizes = [run[key] for key in ("rows", "prompt", "new")]
        seconds = [cell(run[key], 3) for key in ("rollout", "static", "generate")]
        rows.append([shape, *sizes, *seconds, cell(run["ratio"], 2), cell(run["greedy_tokens_equal"], 4)])
    return ["", "## The rollout against transformers' generate", "", f"`{part['command']}`",
            *table(["shape", "rows", "prompt", "new", "rollout s", "with --static-cache", "generate s",
                    "generate / rollout", "greedy tokens equal"], rows)]


def report(data, path):
    from tools import card, plan  # they import this file

    lines = [f"# Cost of a step, on {data.get('machine', 'GPUs')}", "",
             "Random weights; medians. Made by tools/bench.py; the commands stand with each part."]
    for title, part in data.get("steps", {}).items():
        lines += report_steps(title, part)
    parts = dict(decode=report_decode, plans=plan.report, cards=card.report)
    for name, lines_of in parts.items():
        if name in data:
            lines += lines_of(data[name])
    with open(path, "w") as f:
        f.write("\n".join(lines) + "\n")
    print("\n".join(lines))


def parser():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=common.Help)
    p.add_argument("--shape", choices=SHAPES, default="124M", help="sizes of the model")
    p.add_argument("--methods", nargs="+", choices=[*SCRIPTS, *TRL], default=list(STAGES), help="in turns")
    p.add_argument("--prompt", type=int, default=64, help="prompt tokens")
    p.add_argument("--new", type=int, default=128, help="new tokens")
    p.add_argument("--batch-size", type=int, default=8, help="rows per rollout and rank (paper)")
    p.add_argument("--mini-batch-size", type=int, default=2, help="rows per forward pass (paper)")
    p.add_argument("--grad-accum", type=int, default=2, help="mini-batches per update (paper)")
    p.add_argument("--ppo-epochs", type=int, default=4, help="passes over a rollout (paper)")
    p.add_argument("--lengths", choices=("full", "mixed"), default="full", help="mixed: like real ones")
    p.add_argument("--zero", type=int, default=int(CUDA), help="ZeRO stage")
    p.add_argument("--rounds", type=int, default=5, help="steps of each method that count")
    p.add_argument("--trl", help="python of an environment with TRL, for trl_ppo, trl_grpo and trl_dpo")
    p.add_argument("--world", type=int, default=1, help="ranks")
    p.add_argument("--decode", action="store_true", help="the rollout alone, against generate")
    p.add_argument("--card", action="store_true", help="everything about this CUDA machine")
    p.add_argument("--plan", action="store_true", help="what 3B and 8B models would hold; nothing is run")
    p.add_argument("--to", default=f"results/bench_{'gpu' if CUDA else 'cpu'}.json", help="where results go")
    return p


def main(argv=None):
    from tools import card, plan  # they import this file

    p = parser()
    args = p.parse_args(argv)
    if args.lengths == "mixed" and {*args.methods} - {*STAGES, "trl_ppo"}:
        p.error("--lengths mixed: only for ppo, dvpo, lora and trl_ppo")
    if args.card and not CUDA:
        p.error("--card: needs a CUDA machine")
    common.check_writable(args.to)
    words = " ".join(["python tools/bench.py", *(sys.argv[1:] if argv is None else argv)])
    data = {}
    if os.path.exists(args.to):
        with open(args.to) as f:
            data = json.load(f)
    if not args.card and (not args.plan or "machine" not in data):
        cpu = f"{os.cpu_count()} cores, {platform.machine()}, {torch.get_num_threads()} threads"
        data["machine"] = torch.cuda.get_device_name() if CUDA else cpu
    if args.card:
        data.setdefault("cards", {}).update(card.measure(words))
    elif args.decode:
        fits = [shape for shape in dict.fromkeys(("tiny", args.shape))
                if args.prompt + args.new <= SHAPES[shape].get("n_positions", 8192)]
        data["decode"] = dict(command=words, shapes={shape: decode(args, shape) for shape in fits})
    elif args.plan:
        data["plans"] = dict(command=words, plans=plan.plans(args.prompt, args.new))
    else:
        part = dict(command=words, rows=args.batch_size, rate=machine(args.shape),
                    measured=side_by_side(args, args.methods, args.rounds))
        title = f"{args.shape}, {args.batch_size} rows, {args.prompt} + {args.new} tokens"
        title += " at most" * (args.lengths == "mixed") + f", {args.world} ranks" * (args.world > 1)
        title += "; comparators" * bool({*args.methods} & {*COMPARATORS})
        data.setdefault("steps", {})[title] = part
    common.write_json(args.to, data)
    report(data, args.to[:-5] + ".md")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:5], sys.argv[5:])
    else:
        main()
