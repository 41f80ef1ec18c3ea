"""A run: all that a stage has around its algorithm, in one object.

    run = common.Run(args, "dvpo", show=("gold", "kl"))     joins the processes; locks and makes --out
    policy = run.engine("policy", model, lr, length, rows)  DeepSpeed
    state = run.resume()                                    what `keep` was given; {} in a new run
    for step in run.steps(args.max_steps):                  a progress bar, checkpoints, clean ends
        with run.phase("generate"):                         its seconds are logged as sec_generate
            ...
        run.log(kl=kl)                                      one line of metrics.jsonl, a mean over ranks
        run.keep(kl_coef=kl_coef)                           what --resume must restore

The loop stays in the stage. Open this file to change what surrounds it: the optimizer, the way to shard.
"""
import contextlib
import copy
import itertools
import json
import os
import re
import time

import numpy as np
import torch
import torch.nn.functional as F

from runtime import processes
from runtime.checkpoints import Checkpoints, save_adapter, save_model
from runtime.flags import check_context
from runtime.graphs import compile_blocks
from runtime.metrics import Metrics, peak_bytes, synchronize
from runtime.processes import CUDA, all_sum, deepspeed, die, gathered, rank, world, write_json, writing


def ds_config(args, model, rows, accum=1):
    """ds_config.json (--ds-config), with what the flags decide filled in."""
    try:
        with open(args.ds_config) as f:
            config = json.load(f)
    except (OSError, ValueError) as e:
        die(f"--ds-config {args.ds_config}: {e}")
    decided = dict(train_micro_batch_size_per_gpu=rows, gradient_accumulation_steps=accum)
    zero = config.setdefault("zero_optimization", {})
    ours = {"train_batch_size", "optimizer", "scheduler", "fp16", "stage", *decided}
    if taken := ours & {*config, *zero}:
        names = ", ".join(sorted(taken))
        die(f"--ds-config {args.ds_config}: {names}: the flags decide that; take it out")
    zero["stage"] = args.zero
    if args.offload:                                    # with torch's own AdamW, which needs no compiler
        zero["offload_optimizer"] = dict(device="cpu", pin_memory=CUDA)
        config["zero_force_ds_cpu_optimizer"] = False
    # DeepSpeed's bf16 mode casts every weight. A whole model needs it, for the fp32 weights of its
    # optimizer; adapters and heads are fp32 and must stay so, trained or frozen.
    bf16 = torch.bfloat16 in {p.dtype for p in model.parameters() if p.requires_grad}
    return config | decided | dict(bf16=dict(enabled=bf16))


def engine(model, args, lr, rows, accum):
    """DeepSpeed engine with fused AdamW over what is trainable: `accum` forwards of `rows` rows each."""

    def layer(item):
        """(name, parameter) -> its layer, "lm.model.layers.7.", or "" outside the layers."""
        name, _ = item
        return (re.match(r".*?\.\d+\.", name) or [""])[0]

    # One optimizer group per layer: ZeRO-1/2 upcast the gradients of a group at a time (all: 19 GB at 3B)
    trainable = [(key, p) for key, p in model.named_parameters() if p.requires_grad]
    groups = [dict(params=[p for _, p in items]) for _, items in itertools.groupby(trainable, layer)]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    config = ds_config(args, model, rows, accum)
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
    if world() == 1 and not args.zero:
        engine.enable_backward_allreduce = False        # a copy of all gradients, to sum them over one rank
    return engine


class Run:
    def __init__(self, args, name, show, out=None):
        """show: metrics for the progress bar; out: another folder than --out (a reward model's)."""
        self.args = args
        self.name = name
        self.show = show
        self.out = out or args.out
        self.device = processes.start(args, self.out)
        self.rank = rank()
        self.world = world()
        self.engines = {}                               # name: DeepSpeed engine
        self.copies = {}                                # id of a model: the copy that decodes for it

    def engine(self, name, model, lr, length, rows, accum=1, decodes=False):
        """DeepSpeed over what is trainable in the model: `accum` passes of `rows` rows per update.

        length: tokens of the longest row; the model must have as many positions. decodes: rollouts will ask
        for its actor.
        """
        check_context(model, length)
        if decodes and self.args.zero == 3:             # before DeepSpeed shards the weights
            self.copies[id(model)] = copy.deepcopy(model).requires_grad_(False).eval()
        if self.args.compile:
            compile_blocks(model)
        self.engines[name] = engine(model, self.args, lr, rows, accum)
        return self.engines[name]

    def frozen(self, model):
        """A model that only runs forward: as it is, or at ZeRO-3 sharded over the ranks."""
        if self.args.compile:
            compile_blocks(model)
        if self.args.zero == 3:
            model = deepspeed.initialize(model=model, config=ds_config(self.args, model, 1))[0]
        model.eval()
        return model

    @torch.no_grad()
    def actor(self, model):
        """The module that rollouts decode with: the model itself, or at ZeRO-3 a copy, brought up to date.

        A sharded model would gather all layers again for each token. The copy costs the weights once more
        per GPU, and lets the ranks stop at different lengths.
        """
        actor = self.copies.get(id(model), model)
        if actor is not model:
            for own, trained in zip(actor.parameters(), model.parameters(), strict=True):
                with gathered([trained]):               # one weight at a time
                    own.copy_(trained)
        return actor

    def set_lr(self, engine, lr):
        for group in engine.optimizer.param_groups:
            group["lr"] = lr

    def resume(self):
        """Load the last checkpoint where --resume asks for it -> what `keep` was given then, or {}."""
        processes.seed(self.args)                                 # again: nothing before the loop may matter
        self.checkpoints = Checkpoints(self.args, self.out, self.engines)
        self.first, state = self.checkpoints.load()
        return state

    def steps(self, total):
        """The numbers of the steps that are left. After each: a checkpoint, if it is time or on a signal."""
        monitored = next(iter(self.engines.values()))
        self.metrics = Metrics(self.out, total, self.name, self.show, monitored, self.first)
        for step in range(self.first, total):
            self.step = step
            self.seconds = {}
            self.kept = {}
            yield step
            self.checkpoints.save(step, self.kept)

    def batch(self, n, size, step):
        """Numbers of this rank's rows in batch `step`, a function of the step alone: `size` of n rows.

        Shuffled epochs are laid end to end: each row comes once per epoch, none is dropped.
        """
        size = size * self.world                        # of all ranks
        positions = range(step * size + self.rank, (step + 1) * size, self.world)
        epochs = {i // n for i in positions}
        shuffled = {e: np.random.default_rng([self.args.seed, e]).permutation(n) for e in epochs}
        return [int(shuffled[i // n][i % n]) for i in positions]

    @contextlib.contextmanager
    def phase(self, name):
        """A `with` block whose seconds are logged."""
        synchronize()
        begin = time.perf_counter()
        yield
        synchronize()
        self.seconds["sec_" + name] = time.perf_counter() - begin

    def log(self, **metrics):
        """Write numbers and the seconds of the phases -> the row, means over the ranks."""
        return self.metrics.log(self.step, **self.seconds, **metrics)

    def keep(self, **state):
        """What the next checkpoint must hold beside weights, optimizer and random states."""
        self.kept = state

    sum = staticmethod(all_sum)                         # of a tensor over all ranks
    save_adapter = staticmethod(save_adapter)           # to a folder, and what must be known of it
    end = staticmethod(processes.finish)                # the last call of a stage

    def save_model(self, model, tok, adapter=None):
        """Write OUT/model, a transformers folder, with the adapter merged."""
        save_model(model, tok, os.path.join(self.out, "model"), adapter)

    def write(self, name, value):
        write_json(os.path.join(self.out, name), value)

    def write_lines(self, name, rows):
        """Write OUT/name as JSON lines, those of rank 0."""
        path = os.path.join(self.out, name)
        if self.rank == 0:
            with writing(path), open(path, "w") as f:
                f.writelines(json.dumps(row) + "\n" for row in rows)

    def show_batch(self, tok, ids, attn, mask, steps):
        """--dry-run, after one step: its peak memory, and its first row as text, what is trained in [[ ]]."""
        real = attn[0].bool()
        trained = F.pad(mask[0], (len(real) - mask.shape[1], 0))[real].tolist()
        tokens = zip(trained, ids[0][real].tolist(), strict=True)
        text = ""
        for is_trained, part in itertools.groupby(tokens, key=lambda token: token[0]):
            words = tok.decode([token for _, token in part])
            text += f"[[{words}]]" if is_trained else words
        self.say(f"peak memory of one step: {peak_bytes() / 2**20:,.0f} MB")
        self.say(f"{steps} steps. The first of {len(ids)} rows of the first batch, [[trained tokens]]:")
        self.say(text)

    def say(self, line):
        if self.rank == 0:
            print(line)
