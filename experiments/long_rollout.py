"""Does a long rollout stay flat? Seconds and memory per token, with a growing and with a static cache.

    python experiments/long_rollout.py              124M, 8 rows of 1,024 new tokens: 10 minutes, two cores

Random weights, no <eos>. Attention over the cache grows with the length; nothing else should. Each way runs
in a process of its own. Writes results/long_rollout.json and .md.
"""
import argparse
import concurrent.futures
import gc
import multiprocessing
import os
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import psutil
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import common
from experiments.shared import WINDOW, commit, machine, table, window_means, write_results

PROMPT = 64                                             # tokens


@torch.no_grad()
def rollout(static, rows, new, layers, width):
    """Seconds and resident MB after each token."""
    config = GPT2Config(n_positions=PROMPT + new, n_layer=layers, n_embd=width, n_head=width // 64)
    model, process = common.LM(GPT2LMHeadModel(config).eval()), psutil.Process()
    ids = torch.randint(0, config.vocab_size, (rows, PROMPT))
    gc.collect()
    before = process.memory_info().rss
    decode = common.Decoder(model, ids, torch.ones_like(ids))
    if static:
        decode = common.StaticDecoder(decode, new)
    seconds, held = [], []
    for _ in range(new - 1):
        begin = time.perf_counter()
        decode(decode.logits.argmax(-1))
        seconds.append(time.perf_counter() - begin)
        held.append((process.memory_info().rss - before) / 2**20)
    return dict(seconds=seconds, held=held, planned=rows * (PROMPT + new) * 2 * layers * width * 4 / 2**20)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=common.Help)
    p.add_argument("--rows", type=int, default=8, help="responses side by side")
    p.add_argument("--new", type=int, default=1024, help="tokens of each")
    p.add_argument("--layers", type=int, default=12, help="blocks (124M: 12)")
    p.add_argument("--width", type=int, default=768, help="hidden size (124M: 768)")
    args = p.parse_args()
    runs = {}
    for name, static in ("growing cache", False), ("--static-cache", True):
        with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            runs[name] = pool.submit(rollout, static, args.rows, args.new, args.layers, args.width).result()
    data = dict(command="python experiments/long_rollout.py", commit=commit(), runs=runs,
                machine=machine(f"{torch.get_num_threads()} threads"), **vars(args))
    names = [f"{name}, {what}" for name in runs for what in ("ms per token", "MB")]
    write_results("long_rollout", data, [
        "# A long rollout", "",
        f"Command: `{data['command']}`. Commit {data['commit']}. Machine: {data['machine']}. GPT-2 of "
        f"{args.layers} layers and width {args.width}, {args.rows} rows, {PROMPT} prompt tokens, {args.new} "
        f"new ones, fp32. Mean over {WINDOW} tokens; MB: resident, above the model alone. The cache is "
        f"planned to hold {runs['growing cache']['planned']:,.0f} MB at the end.", "",
        *table(["tokens", *names], window_means(runs, args.new))])


if __name__ == "__main__":
    main()
