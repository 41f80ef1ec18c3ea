"""Metrics: one JSON line per step, progress bars, seconds by phase, and warnings when training goes wrong.

docs/metrics.md says what each number means and which values are healthy.
Open this file to log to another place or to add a warning. A new number is logged where a stage computes it.
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

from runtime.processes import all_sum, die, rank, world

WINDOW = 10                                             # steps over which a warning averages


def masked_moments(x, mask):
    """Mean and standard deviation of x where mask, over all ranks, in fp32: tensors of one shape -> scalars."""
    x = x.float()
    n = all_sum(mask.sum().float())
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
        values = values.to("cuda") if torch.cuda.is_available() else values
        dist.all_reduce(values)
    return dict(zip(metrics, (values / world()).tolist(), strict=True))


def peak_bytes():
    """Peak memory of this process: allocated on CUDA, resident on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if not os.path.exists("/proc/self/status"):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss          # macOS; on Linux it includes the parent's
    with open("/proc/self/status") as f:
        return int(re.search(r"VmHWM:\s*(\d+) kB", f.read())[1]) * 1024


class Progress(tqdm):
    """tqdm on rank 0 alone. Where stderr is no terminal it prints a line every 30 seconds."""

    def __init__(self, *args, **kwargs):
        every = 1.0 if sys.stderr.isatty() else 30.0
        options = dict(mininterval=every, maxinterval=every, disable=rank() != 0, dynamic_ncols=True)
        super().__init__(*args, **options | kwargs)

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
        if torch.cuda.is_available():
            torch.cuda.synchronize()


class Metrics:
    """Rows of OUT/metrics.jsonl, the numbers to `show` in a progress bar, DeepSpeed's monitor where it is on.

    first: the step of the next row. A resumed run keeps the rows before it.
    """

    def __init__(self, out, steps, desc, show, engine=None, first=0):
        self.show, self.engine, self.path, self.last = show, engine, os.path.join(out, "metrics.jsonl"), []
        self.warned, self.begin = set(), time.time()
        if rank() == 0:
            lines = []
            if first and os.path.exists(self.path):
                with open(self.path) as f:
                    lines = f.readlines()[:first]
                self.last = [json.loads(line) for line in lines[-2 * WINDOW:]]
            if first and (not self.last or self.last[-1]["step"] != first - 1):
                die(f"{self.path}: does not hold the steps before {first}; put it back, or do not --resume")
            self.begin -= self.last[-1]["seconds"] if first else 0
            with open(self.path, "w") as f:
                f.writelines(lines)
        self.bar = Progress(total=steps, initial=first, desc=desc)

    def log(self, step, **metrics):
        """Write one row, means over ranks, and return it. A number that is not finite ends the run."""
        row = dict(step=step, **mean_over_ranks(metrics), seconds=round(time.time() - self.begin, 3))
        row["peak_bytes"] = peak_bytes()
        self.last = (self.last + [row])[-2 * WINDOW:]
        warnings = find_warnings(self.last)
        if rank() == 0:
            with open(self.path, "a") as f:
                f.write(json.dumps(row | (dict(warnings=warnings) if warnings else {})) + "\n")
            for warning in set(warnings) - self.warned:
                tqdm.write(f"warning: from step {step} on: {warning}", file=sys.stderr)
            if self.engine is not None and self.engine.monitor.enabled:
                self.engine.monitor.write_events([(k, v, step) for k, v in row.items()])
        self.warned = set(warnings)
        shown = {k: f"{row[k]:.3g}" for k in self.show if k in row}
        shown |= {"WARNING": warning.split(":")[0] for warning in warnings[:1]}
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update()
        if self.bar.n == self.bar.total:
            self.bar.close()
        bad = [k for k, v in row.items() if not math.isfinite(v)]
        if bad:
            self.bar.close()
            die(f"{', '.join(bad)} at step {step} not finite; nothing of this step was saved. Lower --lr, then "
                "continue from the last checkpoint with --resume", code=1)
        return row


def find_warnings(rows):
    """What looks wrong in the last rows of a policy's training, one sentence each."""
    found, now = [], rows[-1]
    if "kl" in now and kl_spiked(now["kl"], rows[:-1]):
        found.append("KL spike: one step of updates changed the policy a lot; if the KL stays high, lower --lr")
    if "entropy" not in now or len(rows) < WINDOW:
        return found
    early, late = ({k: np.mean([row[k] for row in part]) for k in now} for part in (rows[:WINDOW], rows[-WINDOW:]))
    if late["entropy"] < 0.02:
        found.append("entropy collapse: the policy repeats one answer; raise --kl-coef or lower --lr")
    if late["ended"] < 0.05:
        found.append("endless: hardly any response ends; raise --max-new-tokens, or check that the SFT data end")
    if late["length"] < 1.5:
        found.append("empty: the responses are empty; raise --kl-coef")
    if late["kl"] > 60:
        found.append("KL too high: over 60 nats per response from the SFT model; raise --kl-coef or lower --lr")
    if "gold" in now and late["gold"] < early["gold"] - 0.05 and late["q_mean"] > early["q_mean"]:
        found.append("value hacking: the value rises and the reward falls; stop, raise --kl-coef, or train the GVM "
                     "on this policy's answers (tools/label.py)")
    return found


def kl_spiked(kl, rows):
    """Whether the KL exceeds twice that of the last rows by 2 nats."""
    return len(rows) > 0 and kl > 2 * np.mean([row["kl"] for row in rows[-5:]]) + 2
