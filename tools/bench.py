"""What a step of each method costs, in seconds and bytes, with random weights.

    python tools/bench.py               124M on a CPU: PPO, DVPO and DVPO --lora
    python tools/bench.py --decode      the rollout against transformers' generate
    python tools/bench.py --card        all measurements on a CUDA machine: card.py

The stages run as they are, each in a process of its own, one after another: let no other program
run beside them. The first step of each is dropped; medians over --rounds.

Results go to results/bench_DEVICE.json and to a section of the .md. A run replaces what the
same commit measured under the same title; everything else there stays.
"""
import argparse
import itertools
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedTokenizerFast

import common
from data import toy
from experiments.run import commit, read_lines, table
from runtime import checkpoints, flags, processes
from runtime.metrics import synchronize
from runtime.processes import CUDA, deepspeed


def gpt2(vocab, width, depth, heads):
    return GPT2Config(vocab_size=vocab, n_embd=width, n_layer=depth, n_head=heads,
                      bos_token_id=None, eos_token_id=None)


def llama(vocab, width, inner, depth, heads, kv_heads, tied):
    return LlamaConfig(
        vocab_size=vocab, hidden_size=width, intermediate_size=inner, num_hidden_layers=depth,
        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=8192,
        tie_word_embeddings=tied, bos_token_id=None, eos_token_id=None)


SHAPES = {
    "tiny": gpt2(2048, 64, 2, 4),
    "14M": gpt2(8192, 384, 6, 6),
    "124M": gpt2(50257, 768, 12, 12),
    "llama3-3b": llama(128256, 3072, 8192, 28, 24, 8, tied=True),
    "llama3-8b": llama(128256, 4096, 14336, 32, 32, 8, tied=False),
}
# name: (stage, its flags)
METHODS = {
    "ppo": ("ppo_baseline.py", ""),
    "dvpo": ("dvpo.py", ""),
    "dvpo-compile": ("dvpo.py", "--compile"),
    "lora": ("dvpo.py", "--lora"),
    "lora-compile": ("dvpo.py", "--lora --compile"),
}
DEVICE = "cuda" if CUDA else "cpu"


def make(shape):
    """-> out/bench/SHAPE with a model and the adapters gvm and rm.

    The model cannot say the <eos> of its tokenizer: every response has its full length.
    """
    folder = f"out/bench/{shape}"
    if os.path.exists(f"{folder}/rm"):
        return folder
    config = SHAPES[shape]
    vocabulary = {f"w{i}": i for i in range(config.vocab_size)} | {"<eos>": config.vocab_size}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tok = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", eos_token="<eos>")
    tok.save_pretrained(f"{folder}/model")
    torch.manual_seed(0)
    with torch.device(DEVICE):
        dtype = torch.bfloat16 if CUDA else torch.float32
        lm = AutoModelForCausalLM.from_config(config, dtype=dtype)
    lm.save_pretrained(f"{folder}/model")
    model = common.load_model(f"{folder}/model", trainable=False)
    gvm = dict(q_mean=0.0, q_std=1.0, tau_pairs=3, tau_length=128, max_length=2048)
    for name, meta in ("gvm", gvm), ("rm", dict(mean=0.0, std=1.0)):
        model.add_adapter(name, 8, 32)
        model.add_head(name, sees_token=name == "gvm")
        checkpoints.save_adapter(model, name, tok, f"{folder}/{name}", **meta)
    return folder


def steps_of(args, method):
    """Runs a stage for some steps -> medians of their seconds, its peak in bytes."""
    world = make(args.shape)
    torch.cuda.empty_cache()                            # the stage needs the room
    out = f"out/bench/{method}"
    shutil.rmtree(out, ignore_errors=True)
    os.makedirs(out)
    prompts = f"{out}/prompts.jsonl"
    toy.write_jsonl(prompts, [dict(prompt=f"w{row} " * args.prompt) for row in range(512)])
    script, flags = METHODS[method]
    value = "rm" if script == "ppo_baseline.py" else "gvm"
    words = (f"--model {world}/model --init-from {world}/model --{value} {world}/{value} "
             f"--data {prompts} --heldout {prompts} --out {out} --zero {int(CUDA)} "
             f"--max-prompt-length {args.prompt} --max-new-tokens {args.new} --lr 1e-6 "
             f"--batch-size {args.batch_size} --save-every 1000000 {flags}").split()
    own = {key: x for key, x in os.environ.items() if key not in processes.LAUNCHER_VARIABLES}
    command = [sys.executable, f"{ROOT}/{script}", *words]
    with open(f"{out}.log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=own)
    rows = []
    try:
        while len(rows) <= args.rounds:
            time.sleep(0.1)
            if process.poll() is not None:
                sys.exit(f"error: {method} ended: see {out}.log")
            if os.path.exists(f"{out}/metrics.jsonl"):
                rows = read_lines(f"{out}/metrics.jsonl")[:args.rounds + 1]
    finally:
        process.kill()                                  # the rest would measure the policy
        process.wait()

    ends = [row["seconds"] for row in rows]
    seconds = [end - begin for begin, end in itertools.pairwise(ends)]
    found = dict(sec_step=statistics.median(seconds), rounds=seconds, peak=rows[-1]["peak_bytes"])
    for phase in ("sec_generate", "sec_score", "sec_train"):
        found[phase] = statistics.median(row[phase] for row in rows[1:])
    print(f"{method}: {found['sec_step']:.2f} s per step", flush=True)
    return found


def seconds_of(function):
    synchronize()
    begin = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - begin


def about(command):
    """Where and when a part was measured, and the bytes a second of a copy at its best."""
    source, target = torch.ones(2, 2**28 if CUDA else 2**26, device=DEVICE)
    copy = min(seconds_of(lambda: target.copy_(source)) for _ in range(12))
    name = f"{os.cpu_count()} cores, {torch.get_num_threads()} threads"
    if CUDA:
        query = "nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader"
        name = subprocess.check_output(query.split(), text=True).splitlines()[0]
    packages = [f"{p.__name__} {p.__version__}" for p in (torch, transformers, deepspeed)]
    return dict(command=command, machine=name, packages=packages, commit=commit() or "unknown",
                date=time.strftime("%Y-%m-%d"), bandwidth=2 * source.nbytes / copy)


def bytes_per_token(lm, rows, context):
    """What decoding one token of `rows` rows must read: the weights and the cache."""
    config = lm.config
    weights = lm.num_parameters()
    if not config.tie_word_embeddings:                  # of the embedding, one line per row
        weights -= lm.get_input_embeddings().weight.numel()
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    width = config.hidden_size // config.num_attention_heads
    cache = 2 * rows * context * config.num_hidden_layers * heads * width
    return (weights + cache) * lm.dtype.itemsize


def decode(args, rows, new):
    """Seconds of our rollout, of it with --static-cache, and of `generate`, in turns."""
    world = make(args.shape)
    model = common.load_model(f"{world}/model", trainable=False).eval()
    tok = common.load_tokenizer(f"{world}/model")
    prompts = torch.randint(0, 2048, (rows, args.prompt)).tolist()
    ids, attn, _ = common.frame(prompts, [[] for _ in prompts], DEVICE)

    def rollout(static):
        how = argparse.Namespace(max_new_tokens=new, temperature=1.0, static_cache=static)
        common.rollout(model, prompts, tok, how, DEVICE)

    def generate():
        model.lm.generate(ids, attention_mask=attn, max_new_tokens=new, pad_token_id=0,
                          eos_token_id=tok.eos_token_id, do_sample=True, top_k=0, top_p=1.0)

    ways = dict(ours=lambda: rollout(False), static=lambda: rollout(True), generate=generate)
    seconds = {way: [] for way in ways}
    with torch.no_grad():
        for _ in range(args.rounds + 1):
            for way, run in ways.items():
                seconds[way].append(seconds_of(run))
    first = {way: times.pop(0) for way, times in seconds.items()}       # compiles, warms up
    found = {way: statistics.median(times) for way, times in seconds.items()}
    read = bytes_per_token(model.lm, rows, args.prompt + new / 2)
    return found | dict(rows=rows, new=new, read=read, first=first, rounds=seconds)


def report_steps(measured):
    """One row per method: seconds by phase, peak of memory, and ratios to PPO."""
    phases = "generate", "score", "train", "step"
    rows = []
    for method, run in measured.items():
        seconds = [f"{run['sec_' + phase]:.2f}" for phase in phases]
        ratios = ["", ""]
        if ppo := measured.get("ppo"):
            ratios = [f"{run[key] / ppo[key]:.3f}" for key in ("sec_step", "peak")]
        rows.append([method, *seconds, f"{run['peak'] / 2**20:,.0f}", *ratios])
    head = [*(f"{phase} s" for phase in phases), "peak MB"]
    return table(["", *head, "time / PPO's", "peak / PPO's"], rows)


def report_decode(runs, bandwidth):
    """Milliseconds per token, the prompt's included; least: to read weights and cache."""
    rows = []
    for run in runs:
        ms = [1000 * run[way] / run["new"] for way in ("ours", "static", "generate")]
        least = 1000 * run["read"] / bandwidth
        warm_up = run["first"]["static"] - run["static"]
        numbers = *ms, ms[2] / ms[0], least, least / ms[1], warm_up
        rows.append([run["rows"], *(f"{x:.2f}" for x in numbers)])
    head = ["rows", "ms per token", "with --static-cache", "`generate`", "`generate` / ours"]
    head += ["least", "with --static-cache: share of the bandwidth", "its warm-up s"]
    return table(head, rows)


def save(path, title, part, lines):
    """Puts a part into the JSON and its section into the .md; everything else there stays."""
    data = json.loads(path.read_text()) if path.exists() else {}
    data.setdefault("runs", {})[title] = part
    processes.write_json(str(path), data)
    page = path.with_suffix(".md")
    text = "# Cost of a step\n\nRandom weights; medians. Made by tools/bench.py."
    sections = (page.read_text() if page.exists() else text).strip().split("\n\n## ")
    sections = [section for section in sections if section.partition("\n")[0] != title]
    about_it = (f"`{part['command']}` on {part['machine']}; {', '.join(part['packages'])}; "
                f"{part['date']}. Bare copy {part['bandwidth'] / 1e9:,.1f} GB/s.")
    sections.append("\n".join([title, "", about_it, "", *lines]))
    page.write_text("\n\n## ".join(sections) + "\n")
    print(sections[-1])


def main(argv=None):
    words = sys.argv[1:] if argv is None else argv
    p = argparse.ArgumentParser(description=__doc__, formatter_class=flags.Help)
    p.add_argument("--shape", choices=SHAPES, default="124M", help="sizes of the model")
    p.add_argument("--methods", nargs="+", choices=METHODS, default=["ppo", "dvpo", "lora"],
                   help="one after another")
    p.add_argument("--prompt", type=int, default=64, help="prompt tokens")
    p.add_argument("--new", type=int, default=128, help="new tokens")
    p.add_argument("--batch-size", type=int, default=8, help="rows of a rollout (paper)")
    p.add_argument("--rounds", type=int, default=5, help="steps of each method that count")
    p.add_argument("--decode", action="store_true", help="the rollout alone")
    p.add_argument("--card", action="store_true", help="all measurements on a CUDA machine")
    to = f"results/bench_{'gpu' if CUDA else 'cpu'}.json"
    p.add_argument("--to", type=pathlib.Path, default=to, help="where results go")
    if "--card" in words:
        p.set_defaults(shape="llama3-3b", prompt=256, new=1024, rounds=2,
                       methods=["ppo", "dvpo", "lora", "dvpo-compile", "lora-compile"])
    args = p.parse_args(words)
    if args.card and not CUDA:
        p.error("--card: needs a CUDA machine")
    processes.check_writable(args.to)
    part = about(" ".join(["python tools/bench.py", *words]))
    title = f"{args.shape}, {args.batch_size} rows, {args.prompt} + {args.new} tokens"
    if args.card:
        from tools import card  # which imports this file

        lines = card.measure(args, part)
        title = f"{torch.cuda.get_device_name()}, {title}"
    elif args.decode:
        part["rollouts"] = [decode(args, args.batch_size, args.new)]
        lines = report_decode(part["rollouts"], part["bandwidth"])
        title = f"Rollout of {title}"
    else:
        part["steps"] = {method: steps_of(args, method) for method in args.methods}
        lines = report_steps(part["steps"])
    save(args.to, f"{title}, commit {part['commit']}", part, lines)


if __name__ == "__main__":
    main()
