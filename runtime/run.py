"""A run: all that a stage has around its algorithm, in one object.

    run = common.Run(args, "dvpo", show=("gold", "kl"))     joins the processes; locks and makes --out
    policy = run.engine("policy", model, lr, rows)          DeepSpeed
    state = run.resume()                                    what `keep` was given; {} in a new run
    for step in run.steps(args.max_steps):                  a progress bar, checkpoints, clean ends
        with run.phase("generate"):                         its seconds are logged as sec_generate
            ...
        run.log(kl=kl)                                      one line of metrics.jsonl, a mean over ranks
        run.keep(kl_coef=kl_coef)                           what --resume must restore

The loop stays in the stage. Open this file to change what surrounds it.
"""
import json
import os

from runtime.checkpoints import Checkpoints, save_model
from runtime.engines import actor, engine, frozen, refresh
from runtime.memory import check_context, memory_plan
from runtime.metrics import Metrics, clock
from runtime.processes import all_sum, finish, rank, seed, start, world, write_json, writing
from runtime.rows import batch_indices, show_batch


class Run:
    def __init__(self, args, name, show, out=None):
        """show: metrics for the progress bar; out: another folder than --out (a reward model's)."""
        self.args = args
        self.name = name
        self.show = show
        self.out = out or args.out
        self.device = start(args)
        self.rank = rank()
        self.world = world()
        self.engines = {}                               # name: DeepSpeed engine
        self.actors = {}                                # id of a model: the copy that decodes for it
        with writing(self.out, "name another folder", code=2):
            os.makedirs(self.out, exist_ok=True)

    def plan_memory(self, models, rows, length, sampled=0, decode=(0, 0)):
        """Print what the run will hold, and end it where memory or positions are too few.

        models {role: LM}, the policy first; a backward pass over rows x length tokens, of which `sampled` per
        row have logits; decode: rows and length of the rollout.
        """
        policy = next(iter(models.values()))
        check_context(policy, decode[1], "--max-prompt-length and --max-new-tokens")
        check_context(policy, length, "--max-length")
        memory_plan(models, self.args, rows, length, sampled, decode)

    def engine(self, name, model, lr, rows, accum=1, decodes=False):
        """DeepSpeed over what is trainable in the model: `accum` passes of `rows` rows per update.

        decodes: rollouts will ask for its actor.
        """
        if decodes:
            self.actors[id(model)] = actor(model, self.args)
        self.engines[name] = engine(model, self.args, lr, rows, accum)
        return self.engines[name]

    def frozen(self, model):
        """A model that only runs forward: as it is, or at ZeRO-3 sharded over the ranks."""
        return frozen(model, self.args)

    def actor(self, model):
        """The module that rollouts decode with: the model, or at ZeRO-3 a copy that is brought up to date."""
        refresh(self.actors[id(model)], model)
        return self.actors[id(model)]

    def set_lr(self, engine, lr):
        """The learning rate of the next update."""
        for group in engine.optimizer.param_groups:
            group["lr"] = lr

    def resume(self):
        """Load the last checkpoint where --resume asks for it -> what `keep` was given then, or {}."""
        seed(self.args)                                 # again: nothing before the loop may matter
        self.checkpoints = Checkpoints(self.args, self.out, **self.engines)
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
            self.checkpoints.save(step, **self.kept)

    def batch(self, n, size, step):
        """Numbers of this rank's rows in batch `step`: `size` of n rows, in shuffled epochs."""
        return batch_indices(n, size * self.world, step, self.args.seed)

    def phase(self, name):
        """A `with` block whose seconds are logged."""
        return clock(self.seconds, name)

    def log(self, **metrics):
        """Write numbers and the seconds of the phases -> the row, means over the ranks."""
        return self.metrics.log(self.step, **self.seconds, **metrics)

    def keep(self, **state):
        """What the next checkpoint must hold beside weights, optimizer and random states."""
        self.kept = state

    def sum(self, x):
        """The sum of a tensor over all ranks."""
        return all_sum(x)

    def saves_model(self):
        """Whether the model is written after this step, too, and not only at the end."""
        return (self.step + 1) % self.args.save_every == 0

    def save_model(self, model, tok, adapter=None):
        """Write OUT/model, a transformers folder, with the adapter merged."""
        save_model(model, tok, os.path.join(self.out, "model"), adapter)

    def write(self, name, value):
        """Write OUT/name as JSON."""
        write_json(os.path.join(self.out, name), value)

    def write_lines(self, name, rows):
        """Write OUT/name as JSON lines, those of rank 0."""
        path = os.path.join(self.out, name)
        if self.rank == 0:
            with writing(path), open(path, "w") as f:
                f.writelines(json.dumps(row) + "\n" for row in rows)

    def show_batch(self, tok, ids, attn, mask, steps):
        """--dry-run: print the number of steps and the first row of a batch."""
        show_batch(tok, ids, attn, mask, steps)

    @staticmethod
    def end():
        """End the process with all ranks together: after main(), where a stage is a program."""
        finish()

    def say(self, line):
        """Print on rank 0."""
        if self.rank == 0:
            print(line)
