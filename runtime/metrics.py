"""Metrics: one JSON line per step, progress bars, and seconds by phase.

docs/metrics.md says what each number means and which values are healthy.
Open this file to log elsewhere. A new number is logged where a stage computes it.
"""
import json
import math
import os
import re
import resource
import sys
import time

import torch
from tqdm import tqdm

from runtime.processes import CUDA, all_sum, die, rank, say, world, writing


def mean_over_ranks(metrics):
    """{name: number or scalar tensor} -> {name: float}, averaged over ranks in one transfer."""
    values = torch.stack([torch.as_tensor(v, dtype=torch.float64).cpu() for v in metrics.values()])
    means = all_sum(values.to("cuda" if CUDA else "cpu")) / world()
    return dict(zip(metrics, means.tolist(), strict=True))


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
        return lambda line: line.strip() and say(line)


def synchronize():
    """Wait for the device, so that the clock sees its work."""
    if CUDA:
        torch.cuda.synchronize()


class Metrics:
    """OUT/metrics.jsonl, the numbers to `show` in a progress bar, and DeepSpeed's monitor where it is on."""

    def __init__(self, out, steps, desc, show, engine=None, first=0):
        """first: the step of the next row. A resumed run keeps the rows before it."""
        self.path = os.path.join(out, "metrics.jsonl")
        self.show = show
        self.engine = engine
        rows = []
        if rank() == 0:
            if first and os.path.exists(self.path):
                with open(self.path) as f:
                    rows = f.readlines()[:first]
            if len(rows) < first:
                die(f"{self.path}: does not hold the steps before {first}; put it back, or do not --resume")
            with writing(self.path), open(self.path, "w") as f:
                f.writelines(rows)
        self.begin = time.time() - (json.loads(rows[-1])["seconds"] if rows else 0)
        self.bar = Progress(total=steps, initial=first, desc=desc)

    def log(self, step, **metrics):
        """Write one row, means over ranks, and return it. A number that is not finite ends the run."""
        row = dict(step=step, **mean_over_ranks(metrics), seconds=round(time.time() - self.begin, 3))
        row["peak_bytes"] = peak_bytes()
        bad = [k for k, v in row.items() if not math.isfinite(v)]
        if rank() == 0:
            with writing(self.path), open(self.path, "a") as f:
                f.write(json.dumps(row) + "\n")
            if self.engine is not None and self.engine.monitor.enabled:
                self.engine.monitor.write_events([(k, v, step) for k, v in row.items()])
            self.bar.set_postfix({k: f"{row[k]:.3g}" for k in self.show if k in row}, refresh=False)
        self.bar.update()
        if bad or self.bar.n == self.bar.total:
            self.bar.close()
        if bad:
            die(f"{', '.join(bad)} at step {step} not finite, not saved; lower --lr, then --resume", code=1)
        return row
