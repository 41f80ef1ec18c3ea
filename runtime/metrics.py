"""Metrics: one JSON line per step, progress bars, seconds by phase, and warnings when training goes wrong.

docs/metrics.md says what each number means and which values are healthy.
Open this file to log elsewhere or to add a warning. A new number is logged where a stage computes it.
"""
import contextlib
import json
import math
import os
import re
import resource
import sys
import time

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from runtime.processes import CUDA, all_sum, die, rank, world


def masked_moments(x, mask):
    """Mean and standard deviation of x where mask, over all ranks, in fp32: of one shape -> two scalars."""
    x, n = x.float(), all_sum(mask.sum().float())
    mean = all_sum((x * mask).sum()) / n
    var = all_sum(((x - mean) ** 2 * mask).sum()) / n
    return mean, var.clamp(min=1e-12).sqrt()


def token_mean(stats, key):
    """Mean over tokens of the means of micro-batches: [{key: mean, n: tokens}, ...] -> scalar tensor."""
    n = torch.stack([s["n"] for s in stats])
    return (torch.stack([s[key] for s in stats]) * n).sum() / n.sum()


def mean_over_ranks(metrics):
    """{name: number or scalar tensor} -> {name: float}, averaged over ranks in one transfer."""
    values = torch.stack([torch.as_tensor(v, dtype=torch.float64).cpu() for v in metrics.values()])
    if world() > 1:
        values = values.to("cuda") if CUDA else values
        dist.all_reduce(values)
    return dict(zip(metrics, (values / world()).tolist(), strict=True))


def peak_bytes():
    """Peak memory of this process: allocated on CUDA, resident on a CPU."""
    if CUDA:
        return torch.cuda.max_memory_allocated()
    if not os.path.exists("/proc/self/status"):         # macOS (on Linux this would count the parent process)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with open("/proc/self/status") as f:
        return int(re.search(r"VmHWM:\s*(\d+) kB", f.read())[1]) * 1024


class Progress(tqdm):
    """tqdm on rank 0 alone. Where stderr is no terminal it prints a line every 30 seconds."""

    def __init__(self, *args, **kwargs):
        every = 1.0 if sys.stderr.isatty() else 30.0
        kwargs |= dict(mininterval=every, maxinterval=every, disable=rank() != 0, dynamic_ncols=True)
        super().__init__(*args, **kwargs)

    @staticmethod
    def status_printer(file):
        if file.isatty():
            return tqdm.status_printer(file)
        return lambda line: line.strip() and print(line, file=file, flush=True)


class Clock:
    """Seconds by phase: `with clock("generate"): ...` adds to clock.seconds["sec_generate"]."""

    def __init__(self):
        self.seconds = {}

    @contextlib.contextmanager
    def __call__(self, phase):
        self.wait()
        begin = time.perf_counter()
        yield
        self.wait()
        self.seconds["sec_" + phase] = self.seconds.get("sec_" + phase, 0.0) + time.perf_counter() - begin

    @staticmethod
    def wait():
        if CUDA:
            torch.cuda.synchronize()


class Metrics:
    """OUT/metrics.jsonl, the numbers to `show` in a progress bar, and DeepSpeed's monitor where it is on."""

    def __init__(self, out, steps, desc, show, engine=None, first=0):
        """first: the step of the next row. A resumed run keeps the rows before it."""
        self.path, self.show, self.engine, self.warned = os.path.join(out, "metrics.jsonl"), show, engine, []
        self.rows = []
        if rank() == 0:
            if first and os.path.exists(self.path):
                with open(self.path) as f:
                    self.rows = [json.loads(line) for line in f.readlines()[:first]]
            if len(self.rows) < first:
                die(f"{self.path}: does not hold the steps before {first}; put it back, or do not --resume")
            with open(self.path, "w") as f:
                f.writelines(json.dumps(row) + "\n" for row in self.rows)
        self.begin = time.time() - (self.rows[-1]["seconds"] if self.rows else 0)
        self.bar = Progress(total=steps, initial=first, desc=desc)

    def log(self, step, **metrics):
        """Write one row, means over ranks, and return it. A number that is not finite ends the run."""
        row = dict(step=step, **mean_over_ranks(metrics), seconds=round(time.time() - self.begin, 3))
        row["peak_bytes"] = peak_bytes()
        bad = [k for k, v in row.items() if not math.isfinite(v)]
        if rank() == 0:
            self.rows.append(row)
            warnings = find_warnings(self.rows)
            with open(self.path, "a") as f:
                f.write(json.dumps(row | (dict(warnings=warnings) if warnings else {})) + "\n")
            for warning in set(warnings) - set(self.warned):
                tqdm.write(f"warning: from step {step} on: {warning}", file=sys.stderr)
            if self.engine is not None and self.engine.monitor.enabled:
                self.engine.monitor.write_events([(k, v, step) for k, v in row.items()])
            self.bar.set_postfix({k: f"{row[k]:.3g}" for k in self.show if k in row}, refresh=False)
            self.warned = warnings
        self.bar.update()
        if bad or self.bar.n == self.bar.total:
            self.bar.close()
        if bad:
            die(f"{', '.join(bad)} at step {step} not finite, not saved; lower --lr, then --resume", code=1)
        return row


def find_warnings(rows, window=10):
    """What looks wrong in the last rows of a policy's training, one sentence each."""
    found, now, late, early = [], rows[-1], rows[-window:], rows[-2 * window:][:window]
    if "kl" in now and rows[:-1] and now["kl"] > 2 * np.mean([row["kl"] for row in rows[-6:-1]]) + 2:
        found.append("KL spike: one update changed the policy a lot; if the KL stays high, lower --lr")
    if "entropy" not in now or len(rows) < window:
        return found
    before, after = ({k: np.mean([row[k] for row in part]) for k in now} for part in (early, late))
    if after["entropy"] < 0.02:
        found.append("entropy collapse: the policy repeats one answer; raise --kl-coef or lower --lr")
    if after["ended"] < 0.05:
        found.append("endless: hardly any response ends; raise --max-new-tokens, or check that SFT data end")
    if "gold" in now and after["gold"] < before["gold"] - 0.05 and after["q_mean"] > before["q_mean"]:
        found.append("value hacking: value up, reward down; raise --kl-coef, or use tools/label.py")
    return found
