"""What models of 3B and 8B would hold, by the formulas of the stages: `python tools/bench.py --plan`."""
import argparse
import contextlib
import io
import itertools
import json
import os
from unittest import mock

import torch

import common
from tools import bench

OUT = "out/bench/plan"


class Sizes(common.LM):
    """An LM without weights, for its sizes alone: nothing to hash."""

    def __init__(self, shape, layers, device):
        torch.nn.Module.__init__(self)
        self.lm = bench.meta_model(shape, num_hidden_layers=layers).to_empty(device=device)
        self.heads, self.adapters = torch.nn.ModuleDict(), {}


def activation_bytes(shape, lora, checkpointed):
    """What common.activation_bytes would measure at full depth, from models of one layer and of two."""
    layers, seen = bench.SHAPES[shape]["num_hidden_layers"], []
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


def plan(shape, method, ranks, zero, checkpointed, activation, prompt, new):
    """What memory_plan says on each of `ranks` GPUs."""
    layers = bench.SHAPES[shape]["num_hidden_layers"]
    names = dict(ppo=("policy", "critic", "frozen"), dvpo=("policy", "frozen"), lora=("policy",))[method]
    models = {name: Sizes(shape, layers, "meta") for name in names}
    if method == "lora":
        models["policy"].requires_grad_(False)
        with torch.device("meta"):
            models["policy"].add_adapter("policy", 8, 32)
    else:
        models["frozen"].requires_grad_(False)
    args = argparse.Namespace(zero=zero, offload=False, gradient_checkpointing=checkpointed, out=OUT)
    stand_ins = dict(world=lambda: ranks, all_max=lambda n: 0, activation_bytes=lambda model: activation)
    with mock.patch.multiple("runtime.memory", **stand_ins), contextlib.redirect_stdout(io.StringIO()):
        common.memory_plan(models, args, 2, prompt + new, new, (8, prompt + new))
    with open(f"{OUT}/memory.json") as f:
        return json.load(f)


def plans(prompt, new):
    """What the stages would plan for the paper's batch in bf16 -> [{shape, method, ranks, zero,
    gradient_checkpointing, total bytes per rank, plan}]. No model is made."""
    found = []
    os.makedirs(OUT, exist_ok=True)
    shapes = "llama3-3b", "llama3-8b"
    for shape, method, checkpointed in itertools.product(shapes, bench.STAGES, (False, True)):
        activation = activation_bytes(shape, method == "lora", checkpointed)
        for ranks, zero in ((1, 1), (8, 1), (8, 3)):
            memory = plan(shape, method, ranks, zero, checkpointed, activation, prompt, new)
            found.append(dict(shape=shape, method=method, ranks=ranks, zero=zero, total=memory["total"],
                              gradient_checkpointing=checkpointed, plan=memory["plan"]))
    return found


def report(part):
    """One row per shape, ranks, ZeRO stage and gradient checkpointing; one column per method, in GB."""
    rows = {}
    for p in part["plans"]:
        key = p["shape"], p["ranks"], p["zero"], "yes" if p["gradient_checkpointing"] else "no"
        rows.setdefault(key, {})[p["method"]] = bench.cell(p["total"] / 2**30, 1)
    return ["", "## Planned for real models, not measured", "",
            f"`{part['command']}`: GB a GPU in bf16 by the formulas of common.memory_plan, batch 8, "
            "mini-batch 2.",
            *bench.table(["shape", "ranks", "ZeRO", "gradient checkpointing", *bench.STAGES],
                   [[*key, *(cells[method] for method in bench.STAGES)] for key, cells in rows.items()])]
