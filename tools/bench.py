"""What a step of each method costs, in seconds and bytes, with random weights: the cost does not depend on
what the weights are.

    python tools/bench.py               124M on a CPU: PPO, DVPO and DVPO --lora, in turns step by step
    python tools/bench.py --methods ppo dvpo lora grpo remax dpo        and those of comparators/
    python tools/bench.py --lengths mixed       answers that end where real ones do, not at the last token
    python tools/bench.py --decode      the rollout against transformers' generate, at tiny and at --shape
    python tools/bench.py --attention --shape llama3-3b     one token's attention with shared K and V
    python tools/bench.py --growth      seconds and bytes against rows, new tokens and parameters
    python tools/bench.py --shape llama3-3b --prompt 256 --new 1024 --methods dvpo      on a GPU
    python tools/bench.py --plan --prompt 256 --new 1024    the memory plans of 3B and 8B; runs nothing
    python tools/bench.py --world 2     each method under torchrun

The scripts run as they are, each in a process of its own. All are in memory at once and take turns: each does
one step when it is its turn. The first step of each is dropped; medians over --rounds. The floor counts
operations and bytes, and divides by this machine's speed in a bare matrix product and a bare copy. Everything
goes to results/bench_DEVICE.json and to tables in .md; a new run replaces its own part alone.
"""
import argparse
import contextlib
import io
import itertools
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from unittest import mock

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np
import psutil
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

import common
import dvpo
import ppo_baseline
from comparators import dpo, grpo, remax
from runtime.metrics import synchronize
from tools import card


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
COMPARATORS = {"grpo": (grpo, ("--group-size", 4)), "remax": (remax, ()), "dpo": (dpo, ())}
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
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

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
    optimizer_seconds, begin = 0.0, time.perf_counter()

    def append_shorter(ids, attn, response, mask):
        ends = mixed(turn * common.world() + common.rank(), *mask.shape).to(mask.device)
        mask = mask & (torch.arange(mask.shape[1], device=mask.device) < ends[:, None])
        return append_responses(ids, attn, response, mask)

    def timed_step(self, *args, **kwargs):
        nonlocal optimizer_seconds
        synchronize()
        start = time.perf_counter()
        step(self, *args, **kwargs)
        synchronize()
        optimizer_seconds += time.perf_counter() - start

    def log_and_wait(self, number, **metrics):
        nonlocal optimizer_seconds, begin, turn
        turn = number + 1                               # all methods get the same lengths in a step
        row = log(self, number, **metrics)
        if common.rank() == 0:
            row |= dict(sec_step=time.perf_counter() - begin, sec_optimizer=optimizer_seconds)
            row["peak_reserved"] = torch.cuda.max_memory_reserved() if CUDA else row["peak_bytes"]
            row["libraries"] = libraries
            with open(f"{folder}/{method}.jsonl", "a") as f:
                f.write(json.dumps(row) + "\n")
            while turns_allowed(folder, method) <= number + 1:
                time.sleep(0.1)
        common.barrier()
        optimizer_seconds, begin = 0.0, time.perf_counter()
        return row

    engine.step, common.Metrics.log = timed_step, log_and_wait
    if lengths == "mixed":
        common.append_responses = append_shorter
    SCRIPTS[method][0].main(argv)


def turns_allowed(folder, method):
    with open(f"{folder}/{method}.turn") as f:
        return int("0" + f.read())                      # empty for a moment, while it is written


# ----------------------------------------------------------------------------------------------------
# All of them, in turns


def command(args, method, rounds, world, folder, rows, new):
    """What starts one method."""
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


def start(args, method, rounds, world, folder, rows, new):
    """The process of one method, allowed its first step."""
    if os.path.exists(f"{folder}/{method}.jsonl"):
        os.remove(f"{folder}/{method}.jsonl")
    with open(f"{folder}/{method}.turn", "w") as f:
        f.write("1")
    environment = {k: v for k, v in os.environ.items() if k not in common.LAUNCHER_VARIABLES}
    with open(f"{folder}/{method}.log", "w") as f:
        words = command(args, method, rounds, world, folder, rows, new)
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
    out |= dict(rounds=[row["sec_step"] for row in rows], peak=rows[-1]["peak_bytes"],
                reserved=rows[-1]["peak_reserved"], tokens_per_second=out["tokens"] / out["sec_step"])
    if method not in TRL:
        with open(f"{folder}/{method}/memory.json") as f:
            plan = {"python and libraries": rows[-1]["libraries"]} | json.load(f)["plan"]
        out |= dict(plan=plan, planned=sum(plan.values()))
    return out


def side_by_side(args, methods, rounds, shape=None, rows=None, new=None):
    """{method: its medians}, the methods taking turns."""
    shape, rows, new = shape or args.shape, rows or args.batch_size, new or args.new
    world, folder, processes = make(shape, args.prompt, new), "out/bench/turns", {}
    seen = {method: [] for method in methods}
    os.makedirs(folder, exist_ok=True)
    if CUDA:
        torch.cuda.empty_cache()                        # the methods need the room
    try:
        for method in methods:
            processes[method] = start(args, method, rounds, world, folder, rows, new)
            turn(method, 0, processes[method], folder)
        for number in range(1, rounds + 1):
            for method in methods:
                seen[method].append(turn(method, number, processes[method], folder))
                seconds = seen[method][-1]["sec_step"]
                print(f"{shape}, {rows} rows, {new} new tokens, round {number}: {method} {seconds:.2f} s",
                      flush=True)
    finally:
        for process in processes.values():
            stop(process)
    return {method: medians(method, seen[method], folder) for method in methods}


GROWTH = ([("14M", rows, 64) for rows in (2, 4, 8, 16)] + [("14M", 4, new) for new in (32, 128, 256)] +
          [(shape, 4, 64) for shape in ("tiny", "124M")])               # (shape, rows, new tokens)


def growth(args):
    points = []
    for shape, rows, new in GROWTH:
        rate = machine(shape, rows)
        measured = side_by_side(args, args.methods, args.rounds, shape, rows, new)
        for method, counted in predictions(args, args.methods, rate, shape, rows, new).items():
            measured[method]["floor"] = counted["step"]
        points.append(dict(shape=shape, rows=rows, new=new, measured=measured))
    return points


# ----------------------------------------------------------------------------------------------------
# What it should cost


def best_seconds(function, times=12):
    seconds = []
    for _ in range(times):
        synchronize()
        begin = time.perf_counter()
        function()
        synchronize()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def machine(shape, rows):
    """{operations, decode: operations per second in a matrix product of the shape's own sizes, of 1,024 rows,
    and of `rows` rows through as many matrices as the model has weights; bandwidth: bytes per second in a
    copy}."""
    width = SHAPES[shape].get("n_embd") or SHAPES[shape]["hidden_size"]
    x = torch.randn(1024, width, device=DEVICE, dtype=DTYPE)
    weight = torch.randn(width, 4 * width, device=DEVICE, dtype=DTYPE)
    weights = [weight.clone() for _ in range(max(1, round(count(shape)["blocks"] / weight.numel())))]
    few, source = x[:rows].clone(), torch.ones(2**28 if CUDA else 2**26, device=DEVICE)
    target = torch.empty_like(source)
    operations = 2 * weight.numel()                     # per row
    return dict(operations=operations * len(x) / best_seconds(lambda: x @ weight),
                decode=operations * rows * len(weights) / best_seconds(lambda: [few @ w for w in weights]),
                bandwidth=2 * source.nbytes / best_seconds(lambda: target.copy_(source)))


def meta_model(shape, **changes):
    """The model without its weights, in bf16."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        config = AutoConfig.for_model(**SHAPES[shape] | changes)
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def count(shape):
    """{blocks: weights in the matrices of all layers, head: in the output layer, total; cache: numbers that
    one token leaves in it; width, layers}."""
    lm = meta_model(shape)
    config, others = lm.config, ("emb", "wte", "wpe", "lm_head")
    blocks = sum(p.numel() for name, p in lm.named_parameters()
                 if p.dim() == 2 and not any(other in name for other in others))
    heads, width, layers = config.num_attention_heads, config.hidden_size, config.num_hidden_layers
    cache = 2 * layers * width * getattr(config, "num_key_value_heads", heads) // heads
    return dict(blocks=blocks, head=lm.get_input_embeddings().weight.numel(), cache=cache, width=width,
                layers=layers, total=sum(p.numel() for p in lm.parameters()), tied=config.tie_word_embeddings)


def bytes_per_token(shape, rows, context):
    """What decoding one token of `rows` rows must read: the weights and the cache."""
    n = count(shape)
    weights = n["total"] if n["tied"] else n["total"] - n["head"]
    return (weights + rows * context * n["cache"]) * torch.finfo(DTYPE).bits // 8


def predict(args, method, rate, shape=None, rows=None, new=None):
    """Seconds by phase of one step, from counted operations and bytes alone.

    rate: what machine() says for as many rows as are decoded (ReMax: twice the batch). n tokens forward
    through the blocks: 2 n (weights) + attention over half the length; through the head: 2 n V D. Backward:
    twice that; once where the weights are frozen. Decoding reads all weights and the cache once per token, or
    computes `rows` rows, whichever takes longer.
    """
    shape, rows, new = shape or args.shape, rows or args.batch_size, new or args.new
    n, length = count(shape), args.prompt + new
    both = n["width"] * n["layers"]

    def forward(tokens, context):
        return 2 * tokens * n["blocks"] + 2 * tokens * context * both

    body, top = forward(rows * length, length), 2 * rows * new * n["head"]
    pair = args.prompt + min(new, 128)
    tau = pair * max(0, min(TAU_PAIRS, (512 - args.prompt) // pair))    # in half the GVM's --max-length
    gvm = forward(tau, tau) + body + 4 * rows * length * tau * both
    value = {"ppo": 2 * body, "grpo": body, "remax": 2 * body}.get(method, gvm)     # ReMax: twice the rows
    head_again = min(args.mini_batch_size, rows) * new > common.CHUNK   # forward once more in the backward
    one_pass = 3 * body + (3 + head_again) * top
    if method == "ppo":
        one_pass += 3 * body
    if method == "lora":                                # attention's backward is whole all the same
        one_pass += 2 * rows * length**2 * both - body - top
    single = method in ("remax", "dpo")
    train = one_pass if single else args.ppo_epochs * one_pass
    updates = 1 if single else args.ppo_epochs * rows // (args.mini_batch_size * args.grad_accum)
    decoded = 2 * rows if method == "remax" else rows   # ReMax: a greedy response beside each
    read = bytes_per_token(shape, decoded, args.prompt + new / 2) / rate["bandwidth"]
    computed = 2 * decoded * (n["blocks"] + n["head"]) / rate["decode"]
    generate = forward(decoded * args.prompt, args.prompt) / rate["operations"] + new * max(read, computed)
    passes = 1 if method == "remax" else 2
    score = (passes * (body + top) + value) / rate["operations"]
    trained = {"ppo": 2, "lora": 0}.get(method, 1) * n["total"]
    optimizer = updates * trained * 4 * 10 / rate["bandwidth"]          # norm, clip; AdamW: 4 reads, 3 writes
    train = train / rate["operations"] + optimizer
    if method == "dpo":
        generate = score = 0.0
    return dict(generate=generate, score=score, optimizer=optimizer, train=train,
                step=generate + score + train)


def predictions(args, methods, rate, shape=None, rows=None, new=None):
    """{method: seconds by phase}; ReMax decodes twice the rows, at a speed of its own."""
    shape, rows, new = shape or args.shape, rows or args.batch_size, new or args.new
    return {method: predict(args, method, machine(shape, 2 * rows) if method == "remax" else rate,
                            shape, rows, new) for method in methods}


# ----------------------------------------------------------------------------------------------------
# The rollout and one token's attention, alone


def decode(args, shape):
    """The rollout against `generate` on the same prompts, in turns; and greedily: the same tokens."""
    world = make(shape, args.prompt)
    model = common.load_model(f"{world}/model", trainable=False).eval()
    tok = common.load_tokenizer(f"{world}/model")
    device = next(model.parameters()).device
    rows = common.read_rows(f"{world}/prompts_{args.prompt}.jsonl", [])[:args.batch_size]
    prompts = [common.encode_prompt(tok, row["prompt"])[-args.prompt:] for row in rows]
    ids, attn, _ = common.frame(prompts, [[] for _ in prompts], device)

    def ours(static_cache, temperature=1.0):            # on CUDA the static cache has a graph
        rollout_args = argparse.Namespace(max_new_tokens=args.new, temperature=temperature,
                                          static_cache=static_cache)
        return dvpo.rollout(model, prompts, tok, rollout_args, device)[0][:, args.prompt:]

    def theirs(**how):
        return model.lm.generate(ids, attention_mask=attn, max_new_tokens=args.new, pad_token_id=0,
                                 eos_token_id=tok.eos_token_id, **how)[:, args.prompt:]

    runs = {"rollout": lambda: ours(False), "static": lambda: ours(True),
            "generate": lambda: theirs(do_sample=True, top_k=0, top_p=1.0)}
    seconds = {name: [] for name in runs}
    with torch.no_grad():
        for _ in range(args.rounds + 1):
            for name, run in runs.items():
                seconds[name].append(best_seconds(run, times=1))
        model.float()                                   # in bf16 the two best tokens are often equal
        greedy = theirs(do_sample=False)
        same = min((ours(static, 1e-5) == greedy).float().mean().item() for static in (False, True))
    rounds = {name: times[1:] for name, times in seconds.items()}
    middle = {name: statistics.median(times) for name, times in rounds.items()}
    read = args.new * bytes_per_token(shape, args.batch_size, args.prompt + args.new / 2)
    return dict(middle, ratio=middle["generate"] / middle["rollout"], rounds=rounds, greedy_tokens_equal=same,
                floor=read / machine(shape, args.batch_size)["bandwidth"], rows=args.batch_size,
                prompt=args.prompt, new=args.new)


@torch.no_grad()
def attention(args):
    """One token's attention where several query heads share K and V, over the cache at its longest: seconds
    and bytes per layer, for four ways to write it.

    All four compute the same. Decoding left-padded rows, or in a static cache, has a mask; and there torch
    has no fast kernel for shared heads. Every layer has a cache of its own, so that none is found in the
    processor's cache; timed from the first layer to the last.
    """
    config = meta_model(args.shape).config
    rows, heads, shared = args.batch_size, config.num_attention_heads, config.num_key_value_heads
    group, width, length = heads // shared, config.hidden_size // heads, args.prompt + args.new
    q = torch.randn(rows, heads, 1, width, device=DEVICE, dtype=DTYPE)
    layers = [torch.randn(2, rows, shared, length, width, device=DEVICE, dtype=DTYPE)
              for _ in range(config.num_hidden_layers)]
    mask = torch.ones(rows, 1, 1, length, dtype=torch.bool, device=DEVICE)

    def repeated(k, v):
        return sdpa(q, k.repeat_interleave(group, 1), v.repeat_interleave(group, 1), mask)

    def gqa(k, v):
        return sdpa(q, k, v, mask, enable_gqa=True)

    def as_rows(k, v):
        return sdpa(q.view(rows, shared, group, width), k, v, mask).view_as(q)

    def no_mask(k, v):
        return sdpa(q, k, v, enable_gqa=True)

    def all_layers(way):
        for k, v in layers:
            way(k, v)

    ways = {"K and V repeated (transformers 5.17)": repeated, "enable_gqa": gqa,
            "the group's queries as rows (transformers 5.23)": as_rows, "enable_gqa, no mask": no_mask}
    out = {}
    for name, way in ways.items():
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated() if CUDA else 0
        seconds = [best_seconds(lambda way=way: all_layers(way), times=1) / len(layers)
                   for _ in range(1 + args.rounds)]
        extra = torch.cuda.max_memory_allocated() - held if CUDA else None
        off = (way(*layers[-1]) - no_mask(*layers[-1])).abs().max().item()
        out[name] = dict(seconds=statistics.median(seconds[1:]), off=off, extra=extra)
    floor = layers[0].nbytes / machine(args.shape, rows)["bandwidth"]
    return dict(ways=out, rows=rows, length=length, query_heads=heads, heads=shared, floor=floor)


# ----------------------------------------------------------------------------------------------------
# Memory plans of models that do not fit here


class Sizes(common.LM):
    """An LM without weights, for its sizes alone: nothing to hash."""

    def __init__(self, shape, layers, device):
        torch.nn.Module.__init__(self)
        self.lm = meta_model(shape, num_hidden_layers=layers).to_empty(device=device)
        self.heads, self.adapters = torch.nn.ModuleDict(), {}


def activation_bytes(shape, lora, checkpointed):
    """What common.activation_bytes would measure at full depth, from models of one layer and of two."""
    layers, seen = SHAPES[shape]["num_hidden_layers"], []
    for depth in (1, 2):
        model = Sizes(shape, depth, "cpu")
        if lora:
            model.requires_grad_(False)
            model.add_adapter("policy", 8, 32)
        if checkpointed:
            model.lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs=dict(use_reentrant=False))
        seen.append(common.activation_bytes(model))
    one, two = seen
    return one + (layers - 1) * (two - one)


def plan(shape, method, ranks, zero, activation, prompt, new):
    """What memory_plan says on each of `ranks` GPUs."""
    layers = SHAPES[shape]["num_hidden_layers"]
    names = dict(ppo=("policy", "critic", "frozen"), dvpo=("policy", "frozen"), lora=("policy",))[method]
    models = {name: Sizes(shape, layers, "meta") for name in names}
    if method == "lora":
        models["policy"].requires_grad_(False)
        with torch.device("meta"):
            models["policy"].add_adapter("policy", 8, 32)
    else:
        models["frozen"].requires_grad_(False)
    args = argparse.Namespace(zero=zero, offload=False, out="out/bench/plan")
    stand_ins = dict(world=lambda: ranks, all_max=lambda n: 0, activation_bytes=lambda model: activation)
    with mock.patch.multiple("runtime.memory", **stand_ins), contextlib.redirect_stdout(io.StringIO()):
        common.memory_plan(models, args, 2, prompt + new, new, (8, prompt + new))
    with open("out/bench/plan/memory.json") as f:
        return json.load(f)


def plans(prompt, new):
    """What the stages would plan for the paper's batch in bf16 -> [{shape, method, ranks, zero,
    gradient_checkpointing, total bytes per rank, plan}]. No model is made."""
    found = []
    os.makedirs("out/bench/plan", exist_ok=True)
    for shape, method, checkpointed in itertools.product(("llama3-3b", "llama3-8b"), STAGES, (False, True)):
        activation = activation_bytes(shape, method == "lora", checkpointed)
        for ranks, zero in ((1, 1), (8, 1), (8, 3)):
            memory = plan(shape, method, ranks, zero, activation, prompt, new)
            found.append(dict(shape=shape, method=method, ranks=ranks, zero=zero, total=memory["total"],
                              gradient_checkpointing=checkpointed, plan=memory["plan"]))
    return found


# ----------------------------------------------------------------------------------------------------
# Report


def cell(x, digits=0):
    return "" if x is None else f"{x:,.{digits}f}"


def table(head, rows):
    return ["", *("| " + " | ".join(map(str, row)) + " |" for row in (head, ["---"] * len(head), *rows)), ""]


def report_steps(title, part):
    """One row per method; its ratios to PPO and to TRL; what it planned to hold."""
    got, want, rate = part["measured"], part["predicted"], part["rate"]
    rounds = len(next(iter(got.values()))["rounds"])
    lines = ["", f"## {title}", "",
             f"`{part['command']}`, {rounds} rounds. Bare product {rate['operations'] / 1e9:,.0f} G "
             f"operations/s, of {part['rows']} rows {rate['decode'] / 1e9:,.0f} G; bare copy "
             f"{rate['bandwidth'] / 1e9:,.1f} GB/s."]
    phases, rows = ("generate", "score", "train", "optimizer", "step"), []
    for method, run in got.items():
        floor = want[method]["step"] if method in want else None
        planned = run.get("planned")
        rows.append([method, *(cell(run.get("sec_" + phase), 2) for phase in phases),
                     cell(run["tokens_per_second"], 1), cell(floor, 2),
                     cell(floor and run["sec_step"] / floor, 2), cell(run["peak"] / MB),
                     cell(planned and planned / MB), cell(planned and planned / run["peak"], 2)])
    lines += table(["", "generate s", "score s", "train s", "of it optimizer s", "step s", "tokens/s",
                    "floor s", "step / floor", "peak MB", "planned MB", "planned / peak"], rows)
    for base, beside in (TRL | {"ppo": ("dvpo", "lora", *COMPARATORS)}).items():
        if base not in got or not {*beside} & {*got}:
            continue
        rows = []
        for method in [method for method in got if method in beside]:
            run, floor = got[method], None
            time_ratio = run["sec_step"] / got[base]["sec_step"]
            each = [x / y for x, y in zip(run["rounds"], got[base]["rounds"], strict=True)]
            if {base, method} <= want.keys():
                floor = want[method]["step"] / want[base]["step"]
            rows.append([method, cell(time_ratio, 3), cell(floor, 3), cell(floor and time_ratio / floor, 3),
                         f"{min(each):.3f} to {max(each):.3f}", cell(run["peak"] / got[base]["peak"], 3)])
        lines += table([f"against {base}", "time", "predicted", "measured / predicted",
                        "smallest and largest of the rounds", "memory"], rows)
    planned = [f"{method}: " + ", ".join(f"{what} {held / MB:,.0f}" for what, held in run["plan"].items())
               for method, run in got.items() if "plan" in run]
    return [*lines, f"What each plans to hold, and what Python and its libraries held before, MB: "
            f"{'; '.join(planned)}."]


def report_decode(part):
    rows = []
    for shape, run in part["shapes"].items():
        seconds = [cell(run[key], 3) for key in ("rollout", "static", "generate")]
        rows.append([shape, run["rows"], run["prompt"], run["new"], *seconds, cell(run["ratio"], 2),
                     cell(run["floor"], 3), cell(run["greedy_tokens_equal"], 4)])
    return ["", "## The rollout against transformers' generate", "", f"`{part['command']}`",
            *table(["shape", "rows", "prompt", "new", "rollout s", "with --static-cache", "generate s",
                    "generate / rollout", "bytes over bandwidth s", "greedy tokens equal"], rows)]


def report_attention(part):
    rows = []
    for shape, run in part["shapes"].items():
        for way, seen in run["ways"].items():
            extra = seen["extra"] and seen["extra"] / MB
            rows.append([shape, run["rows"], run["length"], f"{run['query_heads']} / {run['heads']}", way,
                         cell(1000 * seen["seconds"], 3), cell(1000 * run["floor"], 3), cell(extra),
                         f"{seen['off']:.0e}"])
    return ["", "## One token's attention, one layer, several query heads to a key", "",
            f"`{part['command']}`",
            *table(["shape", "rows", "cache", "query heads / heads", "how", "ms", "bytes over bandwidth ms",
                    "extra MB", "largest difference"], rows)]


def report_plans(part):
    """One row per shape, ranks, ZeRO stage and gradient checkpointing; one column per method, in GB."""
    rows = {}
    for p in part["plans"]:
        key = p["shape"], p["ranks"], p["zero"], "yes" if p["gradient_checkpointing"] else "no"
        rows.setdefault(key, {})[p["method"]] = cell(p["total"] / 2**30, 1)
    return ["", "## Planned for real models, not measured", "",
            f"`{part['command']}`: GB a GPU in bf16 by the formulas of common.memory_plan, batch 8, "
            "mini-batch 2.",
            *table(["shape", "ranks", "ZeRO", "gradient checkpointing", *STAGES],
                   [[*key, *(cells[method] for method in STAGES)] for key, cells in rows.items()])]


def report_growth(part):
    rows = []
    for point in part["points"]:
        for method, run in point["measured"].items():
            rows.append([point["shape"], point["rows"], point["new"], method, cell(run["sec_step"], 2),
                         cell(run["floor"], 2), cell(run["sec_step"] / run["floor"], 2),
                         cell(run["peak"] / MB), cell(run["planned"] / MB),
                         cell(run["planned"] / run["peak"], 2)])
    return ["", "## How cost grows", "",
            f"`{part['command']}`; measured against the floor, which counts operations and bytes.",
            *table(["shape", "rows", "new tokens", "method", "step s", "floor s", "step / floor", "peak MB",
                    "planned MB", "planned / peak"], rows)]


def report(data, path):
    lines = [f"# Cost of a step, on {data.get('machine', 'GPUs')}", "",
             "Random weights; medians. Made by tools/bench.py; the commands stand with each part."]
    lines += card.report(data.get("cards", {}))
    for title, part in data.get("steps", {}).items():
        lines += report_steps(title, part)
    parts = dict(decode=report_decode, attention=report_attention, plans=report_plans, growth=report_growth)
    for name, lines_of in parts.items():
        if name in data:
            lines += lines_of(data[name])
    if "growth" in data and os.path.exists(os.path.join(os.path.dirname(path), "bench_growth.png")):
        lines += ["![how cost grows](bench_growth.png)"]
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
    p.add_argument("--lengths", choices=("full", "mixed"), default="full",
                   help="mixed: answers end early, spread like real ones; no floor is counted then")
    p.add_argument("--zero", type=int, default=int(CUDA), help="ZeRO stage")
    p.add_argument("--rounds", type=int, default=5, help="steps of each method that count")
    p.add_argument("--trl", help="python of an environment with TRL, for trl_ppo, trl_grpo and trl_dpo")
    p.add_argument("--world", type=int, default=1, help="ranks")
    p.add_argument("--decode", action="store_true", help="the rollout alone, against generate")
    p.add_argument("--attention", action="store_true",
                   help="one token's attention with shared heads, four ways (--shape llama3-3b or llama3-8b)")
    p.add_argument("--growth", action="store_true", help="a series of sizes around 14M")
    p.add_argument("--plan", action="store_true", help="what 3B and 8B models would hold; nothing is run")
    p.add_argument("--to", default=f"results/bench_{'gpu' if CUDA else 'cpu'}.json", help="where results go")
    return p


def main(argv=None):
    p = parser()
    args = p.parse_args(argv)
    if args.lengths == "mixed" and {*args.methods} - {*STAGES, "trl_ppo"}:
        p.error("--lengths mixed: only for ppo, dvpo, lora and trl_ppo")
    if args.attention and SHAPES[args.shape]["model_type"] != "llama":
        p.error(f"--attention: no heads of {args.shape} share keys; take --shape llama3-3b or llama3-8b")
    words = " ".join(["python tools/bench.py", *(sys.argv[1:] if argv is None else argv)])
    data = {}
    if os.path.exists(args.to):
        with open(args.to) as f:
            data = json.load(f)
    if not args.plan or "machine" not in data:
        cpu = f"{os.cpu_count()} cores, {platform.machine()}, {torch.get_num_threads()} threads"
        data["machine"] = torch.cuda.get_device_name() if CUDA else cpu
    if args.decode:
        fits = [shape for shape in dict.fromkeys(("tiny", args.shape))
                if args.prompt + args.new <= SHAPES[shape].get("n_positions", 8192)]
        data["decode"] = dict(command=words, shapes={shape: decode(args, shape) for shape in fits})
    elif args.attention:
        data["attention"] = dict(command=words, shapes={args.shape: attention(args)})
    elif args.plan:
        data["plans"] = dict(command=words, plans=plans(args.prompt, args.new))
    elif args.growth:
        data["growth"] = dict(command=words, points=growth(args))
    else:
        rate = machine(args.shape, args.batch_size)
        counted = [method for method in args.methods if method in SCRIPTS and args.lengths == "full"]
        predicted = predictions(args, counted, rate)
        part = dict(command=words, rows=args.batch_size, rate=rate, predicted=predicted,
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
