"""What a step of DVPO and of PPO costs, in seconds and bytes, with random weights: neither depends on what
the weights are.

    python tools/bench.py   124M on a CPU: PPO, DVPO and DVPO --lora, taking turns step by step
    python tools/bench.py --methods ppo dvpo lora grpo remax dpo        and those of comparators/
    python tools/bench.py --lengths mixed   answers that end where real ones do, not all at the last token
    python tools/bench.py --decode   the rollout against transformers' generate, at tiny and at --shape
    python tools/bench.py --attention --shape llama3-3b
        one token's attention where several query heads share keys and values
    python tools/bench.py --growth   seconds and bytes against rows, new tokens and parameters
    python tools/bench.py --shape llama3-3b --prompt 256 --new 1024 --methods dvpo     on a GPU
    python tools/bench.py --plan --prompt 256 --new 1024
        what the formulas say of 3B and 8B models; runs nothing
    python tools/bench.py --world 2                           each method under torchrun

The stages run as they are, each in a process of its own, all in memory at once; each does a step when it is
its turn, and its first step is
dropped. Medians over --rounds. `predict` counts operations and bytes, and divides by what this machine is
measured to do with a bare matrix
product and a bare copy. Everything goes to results/bench_DEVICE.json, then to a table in .md; a new run
replaces its own part alone.
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

import common
import dvpo
import ppo_baseline
from comparators import dpo, grpo, remax
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
METHODS = {"ppo": (ppo_baseline, ()), "dvpo": (dvpo, ()), "lora": (dvpo, ("--lora", ))}
COMPARATORS = {"grpo": (grpo, ("--group-size", 4)), "remax": (remax, ()), "dpo": (dpo, ())}
TRL = {"trl_ppo": ("ppo", "dvpo", "lora"), "trl_grpo": ("grpo",), "trl_dpo": ("dpo",)}      # and ours beside
PAIRS = 3  # in tau
CUDA = torch.cuda.is_available()
DTYPE = torch.bfloat16 if CUDA else torch.float32


def make(shape, prompt, new=1):
    """out/bench/SHAPE: a random model, its tokenizer, a GVM and a reward model on it, prompts of `prompt`
    tokens, pairs of responses of `new`. -> the folder"""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    out, config = f"out/bench/{shape}", AutoConfig.for_model(**SHAPES[shape])
    V = config.vocab_size
    os.makedirs(out, exist_ok=True)
    with open(f"{out}/prompts_{prompt}.jsonl", "w") as f:
        f.writelines(
            json.dumps(dict(prompt=" ".join(f"w{(97 * i + j) % V}" for j in range(prompt)))) + "\n"
            for i in range(512))
    def words(start, n):
        return " ".join(f"w{(start + j) % V}" for j in range(n))

    with open(f"{out}/pairs_{prompt}_{new}.jsonl", "w") as f:
        for i in range(64):
            row = dict(prompt=words(i, prompt), chosen=words(7 * i, new), rejected=words(11 * i + 5, new))
            f.write(json.dumps(row) + "\n")
    if not os.path.exists(f"{out}/rm"):
        torch.manual_seed(0)
        words = Tokenizer(
            models.WordLevel({f"w{i}": i
                              for i in range(V)} | {"<eos>": V},
                             unk_token="w0"))  # an <eos> that the model cannot say: full lengths
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0",
                                eos_token="<eos>").save_pretrained(f"{out}/model")
        with torch.device("cuda" if CUDA else "cpu"):
            AutoModelForCausalLM.from_config(config, dtype=DTYPE).save_pretrained(f"{out}/model")
        model, tok = common.load_model(f"{out}/model", trainable=False), common.load_tokenizer(f"{out}/model")
        for name, meta in ("gvm", dict(q_mean=0.0, q_std=1.0, tau_pairs=PAIRS, tau_length=128,
                                       max_length=1024)), ("rm", dict(mean=0.0, std=1.0)):
            model.add_adapter(name, 8, 32)
            model.add_head(name, sees_token=name == "gvm")
            common.save_adapter(model, name, tok, f"{out}/{name}", **meta)
    return out


# ----------------------------------------------------------------------------------------------------
# One stage in its own process, which waits for its turn after every step


def mixed(turn, rows, new):
    """Answer lengths of rollout number `turn`, spread like those of real chat models (AlpacaEval: log-normal,
    sigma 1.09; the median is put at a fifth of the room): (rows,)."""
    drawn = np.random.default_rng(turn).lognormal(math.log(new / 5), 1.09, rows)
    return torch.from_numpy(drawn.round().clip(1, new)).long()


def child(method, folder, lengths, argv):
    """Runs a stage. Its rows go to FOLDER/METHOD.jsonl, with the seconds of the whole step and of the
    optimizer; FOLDER/METHOD.turn says how many it may do."""
    stage, spent, begin = (METHODS | COMPARATORS)[method][0], dict(optimizer=0.0), [time.perf_counter()]
    engine, turns = common.deepspeed.DeepSpeedEngine, itertools.count()
    step, log, append_responses = engine.step, common.Metrics.log, common.append_responses

    def append_shorter(ids, attn, response, mask):
        ends = mixed(next(turns) * common.world() + common.rank(), *mask.shape).to(mask.device)
        mask = mask & (torch.arange(mask.shape[1], device=mask.device) < ends[:, None])
        return append_responses(ids, attn, response, mask)

    def timed_step(self, *a, **k):
        synchronize()
        start = time.perf_counter()
        step(self, *a, **k)
        synchronize()
        spent["optimizer"] += time.perf_counter() - start

    def log_and_wait(self, number, **metrics):
        row = log(self, number, **metrics)
        if common.rank() == 0:
            row |= dict(sec_step=time.perf_counter() - begin[0], sec_optimizer=spent["optimizer"])
            row["peak_reserved"] = torch.cuda.max_memory_reserved() if CUDA else row["peak_bytes"]
            with open(f"{folder}/{method}.jsonl", "a") as f:
                f.write(json.dumps(row) + "\n")
            while int("0" + open(f"{folder}/{method}.turn").read()) <= number + 1:
                time.sleep(0.002)
        common.barrier()
        spent["optimizer"], begin[0] = 0.0, time.perf_counter()
        return row

    engine.step, common.Metrics.log = timed_step, log_and_wait
    if lengths == "mixed":
        common.append_responses = append_shorter
    stage.main(argv)


def command(a, method, rounds, world, folder, rows, new):
    mini, accum = min(a.mini_batch_size, rows), min(a.grad_accum, rows // min(a.mini_batch_size, rows))
    if method in TRL:
        return [
            a.trl,
            "experiments/bench_trl.py", method, folder, world, a.lengths,
            *map(str, (rounds, a.prompt, new, rows, mini, accum, a.ppo_epochs))
        ]
    prompts, pairs = f"{world}/prompts_{a.prompt}.jsonl", f"{world}/pairs_{a.prompt}_{new}.jsonl"
    argv = ["--model", f"{world}/model", "--init-from", f"{world}/model", "--heldout", prompts, "--lr", 1e-6,
            "--out", f"{folder}/{method}", "--max-prompt-length", a.prompt, "--max-new-tokens", new,
            "--zero", a.zero, "--save-every", 10**6, *(METHODS | COMPARATORS)[method][1]]
    if method == "dpo":                                 # half as many pairs: as many responses
        argv += ["--pairs", pairs, "--pairs-heldout", pairs, "--batch-size", rows // 2, "--grad-accum",
                 rows // mini, "--max-length", a.prompt + new, "--max-steps", rounds + 2]
    else:
        value = "gvm" if method in ("dvpo", "lora") else "rm"
        argv += ["--data", prompts, f"--{value}", f"{world}/{value}"]
        argv += ["--batch-size", rows, "--mini-batch-size", mini]
    if method not in ("dpo", "remax"):
        argv += ["--grad-accum", accum, "--ppo-epochs", a.ppo_epochs]
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(a.world)] if a.world > 1 else []
    return [
        sys.executable, *launcher,
        os.path.abspath(__file__), "--child", method, folder, a.lengths, *map(str, argv)
    ]


def side_by_side(a, methods, rounds, shape=None, rows=None, new=None):
    """{method: its medians}, the methods taking turns."""
    shape, rows, new = shape or a.shape, rows or a.batch_size, new or a.new
    world, folder, files = make(shape, a.prompt, new), "out/bench/turns", {}
    os.makedirs(folder, exist_ok=True)
    if CUDA:
        torch.cuda.empty_cache()  # the stages need the room

    def turn(method, n):
        """Let `method` do its step number n, and wait for its row."""
        with open(f"{folder}/{method}.turn", "w") as f:
            f.write(str(n + 1))
        while not os.path.exists(f"{folder}/{method}.jsonl") or len(
                lines := open(f"{folder}/{method}.jsonl").readlines()) <= n or not lines[n].endswith("\n"):
            if files[method].poll() is not None:
                sys.exit(f"error: {method} ended: see {folder}/{method}.log")
            time.sleep(0.02)
        return json.loads(lines[n])

    try:
        for m in methods:
            if os.path.exists(f"{folder}/{m}.jsonl"):
                os.remove(f"{folder}/{m}.jsonl")
            with open(f"{folder}/{m}.turn", "w") as f:
                f.write("1")
            with open(f"{folder}/{m}.log", "w") as f:
                files[m] = subprocess.Popen(
                    command(a, m, rounds, world, folder, rows, new), stdout=f, stderr=f,
                    env={k: v
                         for k, v in os.environ.items() if k not in common.LAUNCHER_VARIABLES})
            turn(m, 0)
        seen = {m: [] for m in methods}
        for n in range(1, rounds + 1):
            for m in methods:
                seen[m].append(turn(m, n))
                print(
                    f"{shape}, {rows} rows, {new} new tokens, round {n}: {m} {seen[m][-1]['sec_step']:.2f} s",
                    flush=True)
    finally:
        for process in files.values():  # and the ranks of a launcher, which have sessions of their own
            for p in [*psutil.Process(process.pid).children(recursive=True), process
                      ] if process.poll() is None else []:
                p.kill()
            process.wait()
    out = {}
    for m in methods:
        middle = {
            k: statistics.median(r[k] for r in seen[m])
            for k in ("sec_step", "sec_generate", "sec_score", "sec_train", "sec_optimizer", "tokens")
            if k in seen[m][0]
        }
        out[m] = dict(middle, rounds=[r["sec_step"] for r in seen[m]], peak=seen[m][-1]["peak_bytes"],
                      reserved=seen[m][-1]["peak_reserved"],
                      tokens_per_second=middle["tokens"] / middle["sec_step"])
        if m not in TRL:
            with open(f"{folder}/{m}/memory.json") as f:
                plan = json.load(f)
            out[m] |= dict(plan=plan["plan"], planned=plan["total"])
    return out


# ----------------------------------------------------------------------------------------------------
# What it should cost


def machine(shape, rows):
    """Operations a second in a matrix product of the shape's own sizes, of 1,024 rows, and of `rows` rows
    through as many matrices as the model has weights (decoding); bytes a second in a copy. The best of
    several."""
    device, config = "cuda" if CUDA else "cpu", SHAPES[shape]
    D = config.get("n_embd") or config["hidden_size"]
    x, w = torch.randn(1024, D, device=device, dtype=DTYPE), torch.randn(D, 4 * D, device=device, dtype=DTYPE)
    big = torch.ones(2**28 if CUDA else 2**26, device=device)
    other = torch.empty_like(big)

    def best(f):
        times = []
        for _ in range(12):
            synchronize()
            begin = time.perf_counter()
            f()
            synchronize()
            times.append(time.perf_counter() - begin)
        return min(times)

    small = x[:rows].clone()
    many = [w.clone() for _ in range(max(1, round(weights(shape)[0] / w.numel())))]
    return dict(operations=2 * x.numel() * w.shape[1] / best(lambda: x @ w),
                decode=2 * small.numel() * w.shape[1] * len(many) / best(lambda: [small @ m for m in many]),
                bandwidth=2 * big.nbytes / best(lambda: other.copy_(big)))


def weights(shape):
    """Weights of the matrices in the blocks, of the head, of all there is; and the config."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(AutoConfig.for_model(**SHAPES[shape]))
    blocks = sum(p.numel() for k, p in lm.named_parameters()
                 if p.dim() == 2 and not any(name in k for name in ("emb", "wte", "wpe", "lm_head")))
    return blocks, lm.get_input_embeddings().weight.numel(), sum(p.numel()
                                                                 for p in lm.parameters()), lm.config


def bytes_a_token(shape, rows, context):
    """What decoding one token for `rows` rows must read: the weights and the cache."""
    _, head, total, config = weights(shape)
    kv = config.hidden_size * getattr(config, "num_key_value_heads",
                                      config.num_attention_heads) // config.num_attention_heads
    return (total - (0 if config.tie_word_embeddings else head) +
            rows * context * 2 * config.num_hidden_layers * kv) * torch.finfo(DTYPE).bits // 8


def predict(a, method, rate, shape=None, rows=None, new=None):
    """Seconds by phase of one step, from counted operations and bytes alone.

    n tokens forward through the blocks: 2 n (weights) + attention over half the length; through the head: 2 n
    V D. Backward: twice that; once
    where the weights are frozen. Decoding reads all weights, and the cache, once per token, or computes
    `rows` rows, whichever takes longer.
    """
    shape, rows, new = shape or a.shape, rows or a.batch_size, new or a.new
    blocks, vocabulary, total, config = weights(shape)
    D, layers, length = config.hidden_size, config.num_hidden_layers, a.prompt + new

    def forward(n, context):
        return 2 * n * blocks + 4 * n * (context / 2) * D * layers

    body, top = forward(rows * length, length), 2 * rows * new * vocabulary
    pairs = max(0, min(PAIRS, (512 - a.prompt) //
                       (a.prompt + min(new, 128))))  # of tau, that fit in half the GVM's --max-length
    tau = pairs * (a.prompt + min(new, 128))
    value = {"ppo": 2 * body, "grpo": body, "remax": 2 * body}.get(     # ReMax: twice the rows
        method, forward(tau, tau) + body + 4 * rows * length * tau * D * layers)
    again = min(a.mini_batch_size,
                rows) * new > common.CHUNK  # the head runs forward once more in the backward pass
    attention = 4 * rows * length * (length /
                                     2) * D * layers  # its backward is twice its forward, whatever is frozen
    one_pass = 3 * body + (3 + again) * top             # over the rows, forward and backward
    one_pass += {"ppo": 3 * body, "lora": attention - body - top}.get(method, 0)
    once = method in ("remax", "dpo")
    train = one_pass if once else a.ppo_epochs * one_pass
    updates = 1 if once else a.ppo_epochs * rows // (a.mini_batch_size * a.grad_accum)
    decoded = 2 * rows if method == "remax" else rows   # ReMax: a greedy response beside each
    token = max(
        bytes_a_token(shape, decoded, a.prompt + new / 2) / rate["bandwidth"],
        2 * decoded * (blocks + vocabulary) / rate["decode"])
    seconds = dict(generate=forward(decoded * a.prompt, a.prompt) / rate["operations"] + new * token,
                   score=((2 - (method == "remax")) * (body + top) + value) / rate["operations"],
                   optimizer={"ppo": 2, "lora": 0}.get(method, 1) * updates * total * 4 * 10 /
                   rate["bandwidth"])  # norm, clip; AdamW: 4 reads, 3 writes
    if method == "dpo":
        seconds |= dict(generate=0.0, score=0.0)
    return dict(seconds, train=train / rate["operations"] + seconds["optimizer"],
                step=sum(seconds.values()) + train / rate["operations"])


def decode(a, shape):
    """The stage's rollout against `generate` on the same prompts, in turns; and greedily: the same tokens."""
    world = make(shape, a.prompt)
    model, tok = common.load_model(f"{world}/model",
                                   trainable=False).eval(), common.load_tokenizer(f"{world}/model")
    device = next(model.parameters()).device
    prompts = [
        common.encode_prompt(tok, r["prompt"])[-a.prompt:]
        for r in common.read_rows(f"{world}/prompts_{a.prompt}.jsonl", [])[:a.batch_size]
    ]
    ids, attn, _ = common.frame(prompts, [[] for _ in prompts], device)
    args = argparse.Namespace(max_new_tokens=a.new, temperature=1.0, static_cache=False)
    plain = dict(attention_mask=attn, max_new_tokens=a.new, eos_token_id=tok.eos_token_id,
                 pad_token_id=0, top_k=0, top_p=1.0)

    def ours(static):
        args.static_cache = static  # on CUDA with a graph
        return dvpo.rollout(model, prompts, tok, args, device)[0][:, a.prompt:]

    runs = {
        "rollout": lambda: ours(False), "static": lambda: ours(True),
        "generate": lambda: model.lm.generate(ids, do_sample=True, **plain)
    }
    seconds = {k: [] for k in runs}
    with torch.no_grad():
        for _ in range(a.rounds + 1):
            for name, f in runs.items():
                synchronize()
                begin = time.perf_counter()
                f()
                synchronize()
                seconds[name].append(time.perf_counter() - begin)
        args.temperature, _ = 1e-5, model.float()  # in bf16 the two best are often equal
        greedy = model.lm.generate(ids, do_sample=False, **{**plain, "top_k": None, "top_p": None})[:,
                                                                                                    a.prompt:]
        same = min((ours(static) == greedy).float().mean().item() for static in (False, True))
    middle = {k: statistics.median(v[1:]) for k, v in seconds.items()}
    floor = bytes_a_token(shape, a.batch_size, a.prompt + a.new / 2) / machine(shape,
                                                                               a.batch_size)["bandwidth"]
    return dict(middle, ratio=middle["generate"] / middle["rollout"], floor=floor * a.new,
                greedy_tokens_equal=same, rows=a.batch_size, prompt=a.prompt, new=a.new,
                rounds={k: v[1:]
                        for k, v in seconds.items()})


@torch.no_grad()
def attention(a):
    """One token's attention where n query heads share K and V, over the cache at its longest: seconds and
    bytes a layer, by how it is said.

    All four compute the same. Decoding left-padded rows, or in a static cache, has a mask; and there torch
    has no fast kernel for shared heads. Every
    layer has a cache of its own, so that none is found in a processor's cache; timed from the first to the
    last.
    """
    _, _, _, config = weights(a.shape)
    B, H, KV = a.batch_size, config.num_attention_heads, config.num_key_value_heads
    L, device = a.prompt + a.new, "cuda" if CUDA else "cpu"
    q, *layers = (torch.randn(*shape, config.hidden_size // H, device=device, dtype=DTYPE)
                  for shape in [(B, H, 1)] + config.num_hidden_layers * [(2, B, KV, L)])
    mask, sdpa = torch.ones(B, 1, 1, L, dtype=torch.bool,
                            device=device), torch.nn.functional.scaled_dot_product_attention
    ways = {
        "K and V repeated (transformers 5.17)": lambda k, v: sdpa(q, k.repeat_interleave(H // KV, 1),
                                                                  v.repeat_interleave(H // KV, 1), mask),
        "enable_gqa": lambda k, v: sdpa(q, k, v, mask, enable_gqa=True),
        "the group's queries as rows (transformers 5.23)": lambda k, v: sdpa(q.view(B, KV, H // KV, -1), k, v,
                                                                             mask).view_as(q),
        "enable_gqa, no mask": lambda k, v: sdpa(q, k, v, enable_gqa=True)
    }
    out = {}
    for way, f in ways.items():
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
        held, seconds = torch.cuda.memory_allocated() if CUDA else 0, []
        for _ in range(1 + a.rounds):
            synchronize()
            begin = time.perf_counter()
            for k, v in layers:
                f(k, v)
            synchronize()
            seconds.append((time.perf_counter() - begin) / len(layers))
        out[way] = dict(seconds=statistics.median(seconds[1:]),
                        off=(f(k, v) - ways["enable_gqa, no mask"](k, v)).abs().max().item(),
                        extra=torch.cuda.max_memory_allocated() - held if CUDA else None)
    return dict(ways=out, rows=B, length=L, query_heads=H, heads=KV,
                floor=layers[0].nbytes / machine(a.shape, B)["bandwidth"])


class Sizes(common.LM):
    """An LM without weights, for its sizes alone: nothing to hash."""

    def __init__(self, shape, layers, device):
        torch.nn.Module.__init__(self)
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.for_model(**dict(SHAPES[shape], num_hidden_layers=layers))
        with torch.device("meta"):
            lm = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        self.lm, self.heads, self.adapters = lm.to_empty(device=device), torch.nn.ModuleDict(), {}


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
    names = dict(ppo=("policy", "critic", "frozen"), dvpo=("policy", "frozen"), lora=("policy", ))[method]
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
    for shape, method, checkpointed in itertools.product(("llama3-3b", "llama3-8b"), METHODS, (False, True)):
        activation = activation_bytes(shape, method == "lora", checkpointed)
        for ranks, zero in ((1, 1), (8, 1), (8, 3)):
            memory = plan(shape, method, ranks, zero, activation, prompt, new)
            found.append(dict(shape=shape, method=method, ranks=ranks, zero=zero, total=memory["total"],
                              gradient_checkpointing=checkpointed, plan=memory["plan"]))
    return found


# ----------------------------------------------------------------------------------------------------
# Report


def spread(rounds, others):
    ratios = [x / y for x, y in zip(rounds, others, strict=True)]
    return f"{min(ratios):.3f} to {max(ratios):.3f}"


def plan_rows(plans):
    """One row per shape, ranks, ZeRO stage and gradient checkpointing; one column per method, in GB."""
    rows = {}
    for p in plans:
        checkpointed = "yes" if p["gradient_checkpointing"] else "no"
        key = p["shape"], str(p["ranks"]), str(p["zero"]), checkpointed
        rows.setdefault(key, {})[p["method"]] = f"{p['total'] / 2**30:.1f}"
    return [(*key, *(cells[method] for method in METHODS)) for key, cells in rows.items()]


def table(head, rows):
    return [
        "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head),
        *("| " + " | ".join(r) + " |" for r in rows), ""
    ]


def report(data, path):
    MB, out = 2**20, [
        f"# Cost of a step, on {data['machine']}", "",
        "Random weights; medians. Made by tools/bench.py; the commands stand with each part."
    ]
    for shape, part in data.get("steps", {}).items():
        got, want = part["measured"], part["predicted"]
        out += [
            "", f"## {shape}: PPO and DVPO in turns", "",
            f"`{part['command']}`, {len(next(iter(got.values()))['rounds'])} rounds. Bare product "
            f"{part['rate']['operations'] / 1e9:,.0f} G operations/s, "
            f"of {part['rows']} rows {part['rate']['decode'] / 1e9:,.0f} G; bare copy "
            f"{part['rate']['bandwidth'] / 1e9:,.1f} GB/s."
        ]
        out += table(
            ("", "generate s", "score s", "train s", "of it optimizer s", "step s", "tokens/s", "floor s",
             "step / floor", "peak MB", "planned MB", "planned / peak"),
            [(m, *(f"{r['sec_' + k]:.2f}" if "sec_" + k in r else ""
                   for k in ("generate", "score", "train", "optimizer", "step")),
              f"{r['tokens_per_second']:.1f}",
              *((f"{want[m]['step']:.2f}", f"{r['sec_step'] / want[m]['step']:.2f}") if m in want else
                ("", "")), f"{r['peak'] / MB:,.0f}",
              *((f"{r['planned'] / MB:,.0f}", f"{r['planned'] / r['peak']:.2f}") if "planned" in r else
                ("", ""))) for m, r in got.items()])
        beside = TRL | {"trl": TRL["trl_ppo"], "ppo": ("dvpo", "lora", *COMPARATORS)}
        for base in [m for m in beside if m in got and {*beside[m]} & {*got}]:
            out += table(
                (f"against {base}", "time", "predicted", "measured / predicted",
                 "smallest and largest of the rounds", "memory"),
                [(m, f"{r['sec_step'] / got[base]['sec_step']:.3f}",
                  *((f"{want[m]['step'] / want[base]['step']:.3f}",
                     f"{r['sec_step'] / got[base]['sec_step'] / (want[m]['step'] / want[base]['step']):.3f}")
                    if base in want else
                    ("", "")), spread(r["rounds"], got[base]["rounds"]),
                  f"{r['peak'] / got[base]['peak']:.3f}")
                 for m, r in got.items() if m in beside[base]])
        out += [
            "What each plans to hold, MB: " + "; ".join(f"{m}: " + ", ".join(f"{k} {v / MB:,.0f}"
                                                                             for k, v in r["plan"].items())
                                                        for m, r in got.items() if "plan" in r) + "."
        ]
    if "decode" in data:
        out += ["", "## The rollout against transformers' generate", "", f"`{data['decode']['command']}`"]
        out += table(
            ("shape", "rows", "prompt", "new", "rollout s", "with --static-cache", "generate s",
             "generate / rollout", "bytes over bandwidth s", "greedy tokens equal"),
            [(shape, *(str(r[k])
                       for k in ("rows", "prompt", "new")), *(f"{r[k]:.3f}"
                                                              for k in ("rollout", "static", "generate")),
              f"{r['ratio']:.2f}", f"{r['floor']:.3f}", f"{r['greedy_tokens_equal']:.4f}")
             for shape, r in data["decode"]["shapes"].items()])
    if "attention" in data:
        out += [
            "", "## One token's attention, one layer, several query heads to a key", "",
            f"`{data['attention']['command']}`"
        ]
        out += table(("shape", "rows", "cache", "query heads / heads", "how", "ms", "bytes over bandwidth ms",
                      "extra MB", "largest difference"),
                     [(shape, str(r["rows"]), str(r["length"]), f"{r['query_heads']} / {r['heads']}", how,
                       f"{x['seconds'] * 1e3:.3f}", f"{r['floor'] * 1e3:.3f}",
                       "" if x["extra"] is None else f"{x['extra'] / MB:,.0f}", f"{x['off']:.0e}")
                      for shape, r in data["attention"]["shapes"].items() for how, x in r["ways"].items()])
    if "plans" in data:
        out += [
            "", "## Planned for real models, not measured", "",
            f"`{data['plans']['command']}`: GB a GPU in bf16 by the formulas of common.memory_plan, batch "
            "8, mini-batch 2."
        ]
        out += table((
            "shape", "ranks", "ZeRO", "gradient checkpointing", *METHODS
        ), plan_rows(data["plans"]["plans"]))
    if "growth" in data:
        out += [
            "", "## How cost grows", "",
            f"`{data['growth']['command']}`; measured against the floor, which counts operations and bytes."
        ]
        out += table(("shape", "rows", "new tokens", "method", "step s", "floor s", "step / floor", "peak MB",
                      "planned MB", "planned / peak"),
                     [(p["shape"], str(p["rows"]), str(p["new"]), m, f"{r['sec_step']:.2f}",
                       f"{r['floor']:.2f}", f"{r['sec_step'] / r['floor']:.2f}", f"{r['peak'] / MB:,.0f}",
                       f"{r['planned'] / MB:,.0f}", f"{r['planned'] / r['peak']:.2f}")
                      for p in data["growth"]["points"] for m, r in p["measured"].items()])
        out += ["![how cost grows](bench_growth.png)"] if os.path.exists(
            os.path.join(os.path.dirname(path), "bench_growth.png")) else []
    with open(path, "w") as f:
        f.write("\n".join(out) + "\n")
    print("\n".join(out))


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--shape", choices=SHAPES, default="124M", help="(default: %(default)s)")
    p.add_argument("--methods", nargs="+", choices=[*METHODS, *COMPARATORS, *TRL], default=list(METHODS),
                   help="in turns (default: ppo dvpo lora)")
    p.add_argument("--prompt", type=int, default=64, help="tokens (default: %(default)s)")
    p.add_argument("--new", type=int, default=128, help="tokens (default: %(default)s)")
    p.add_argument("--batch-size", type=int, default=8,
                   help="rows a rollout and rank (paper, default: %(default)s)")
    p.add_argument("--mini-batch-size", type=int, default=2,
                   help="rows a forward pass (paper, default: %(default)s)")
    p.add_argument("--grad-accum", type=int, default=2,
                   help="mini-batches an update (paper, default: %(default)s)")
    p.add_argument("--ppo-epochs", type=int, default=4, help="(paper, default: %(default)s)")
    p.add_argument(
        "--lengths", choices=("full", "mixed"), default="full",
        help="mixed: answers end early, spread like real ones; no floor is counted then (default: "
             "%(default)s)"
    )
    p.add_argument("--zero", type=int, default=int(CUDA), help="(default: %(default)s)")
    p.add_argument("--rounds", type=int, default=5,
                   help="steps of each method that count (default: %(default)s)")
    p.add_argument("--trl", help="python of an environment with TRL, for trl_ppo, trl_grpo and trl_dpo")
    p.add_argument("--world", type=int, default=1, help="ranks (default: %(default)s)")
    p.add_argument("--decode", action="store_true", help="the rollout alone, against generate")
    p.add_argument("--attention", action="store_true",
                   help="one token's attention with shared heads, four ways (--shape llama3-3b or llama3-8b)")
    p.add_argument("--growth", action="store_true",
                   help="a series of sizes around 14M, 4 rows, 64 new tokens")
    p.add_argument("--plan", action="store_true",
                   help="what real models would hold by the formulas alone; nothing is run")
    p.add_argument("--to", default=f"results/bench_{'gpu' if CUDA else 'cpu'}.json",
                   help="(default: %(default)s)")
    a = p.parse_args(argv)
    if a.lengths == "mixed" and {*a.methods} - {*METHODS, "trl_ppo"}:
        p.error("--lengths mixed: only for ppo, dvpo, lora and trl_ppo")
    words = " ".join(["python tools/bench.py", *(sys.argv[1:] if argv is None else argv)])
    data = json.load(open(a.to)) if os.path.exists(a.to) else {}
    if not a.plan or "machine" not in data:
        data["machine"] = torch.cuda.get_device_name(
        ) if CUDA else f"{os.cpu_count()} cores, {platform.machine()}, {torch.get_num_threads()} threads"
    if a.decode:
        data["decode"] = dict(
            command=words, shapes={
                shape: decode(a, shape)
                for shape in dict.fromkeys(("tiny", a.shape))
                if a.prompt + a.new <= SHAPES[shape].get("n_positions", 8192)
            })
    elif a.attention:
        if SHAPES[a.shape]["model_type"] != "llama":
            common.die(
                f"--attention: each query head of {a.shape} has keys of its own; take --shape llama3-3b or "
                "llama3-8b"
            )
        data["attention"] = dict(command=words, shapes={a.shape: attention(a)})
    elif a.plan:
        os.makedirs("out/bench/plan", exist_ok=True)
        data["plans"] = dict(command=words, plans=plans(a.prompt, a.new))
    elif a.growth:
        series = [("14M", rows, 64)
                  for rows in (2, 4, 8, 16)] + [("14M", 4, new)
                                                for new in (32, 128, 256)] + [(shape, 4, 64)
                                                                              for shape in ("tiny", "124M")]
        points = []
        for shape, rows, new in series:
            rate, measured = machine(shape, rows), side_by_side(a, a.methods, a.rounds, shape, rows, new)
            points.append(
                dict(
                    shape=shape, rows=rows, new=new, measured={
                        m: dict(r, floor=predict(a, m, rate, shape, rows, new)["step"])
                        for m, r in measured.items()
                    }))
        data["growth"] = dict(command=words, points=points)
    else:
        rate = machine(a.shape, a.batch_size)
        part = dict(
            command=words, rows=a.batch_size, rate=rate,
            predicted={m: predict(a, m, rate)
                       for m in a.methods
                       if m not in TRL and a.lengths == "full"},
            measured=side_by_side(a, a.methods, a.rounds))
        data.setdefault("steps", {})[f"{a.shape}, {a.batch_size} rows, {a.prompt} + {a.new} tokens" +
                                     (" at most" if a.lengths == "mixed" else "") +
                                     (f", {a.world} ranks" if a.world > 1 else "") +
                                     ("; comparators" if {*a.methods} & {*COMPARATORS} else "")] = part
    common.write_json(a.to, data)
    report(data, a.to[:-5] + ".md")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:5], sys.argv[5:])
    else:
        main()
