"""Checkpoints: folders that are complete or not there, and what a run needs to continue bit for bit.

save_model writes a transformers folder, save_adapter a GVM or reward model, Checkpoints what --resume reads.
Open this file to save another format. What a stage itself must remember goes into Run.keep.
"""
import functools
import hashlib
import json
import os
import pathlib
import re
import shutil
import signal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from runtime.processes import all_max, barrier, die, finish, gathered, new_folder, rank, say, world

# Flags that --resume may change; with another value of any other flag it would not be the same run.
MAY_CHANGE = {
    "max_steps", "epochs", "rm_max_steps", "rm_epochs", "save_every",
    "lr", "critic_lr", "rm_lr", "lr_decay", "warmup_steps", "kl_coef", "kl_target", "kl_stop", "clip",
    "mini_batch_size", "grad_accum", "static_cache", "gradient_checkpointing", "compile", "ds_config",
    "heldout", "pairs_heldout", "prompts", "gold", "true_q", "min_gap"}
NOT_OF_THE_RUN = {"out", "resume", "dry_run", "local_rank", "rm_asked"}
KEPT = 2                                                # checkpoints of a run


def must_be_finite(model, what):
    """End the run where a trained weight is not finite: a gradient was not, though the loss was."""
    bad = 0
    for p in model.parameters():
        if p.requires_grad:
            if hasattr(p, "ds_tensor"):                         # ZeRO-3: this rank's shard, unpadded
                p = p.ds_tensor[:max(0, p.ds_numel - rank() * p.ds_tensor.numel())]
            bad = bad or int(not p.isfinite().all())
    if all_max(bad):
        die(f"{what} are not finite and were not saved; lower --lr, then use --resume", code=1)


def save_model(model, tok, folder, adapter=None):
    """Write a plain transformers folder, with the adapter merged into the weights."""
    must_be_finite(model, f"the weights for {folder}")
    ids = model.end_ids(tok).tolist()                           # what training took for the end of an answer
    model.lm.generation_config.eos_token_id = ids if len(ids) > 1 else ids[0]
    with new_folder(folder) as tmp:
        state = model.merged_state_dict(adapter, keep=rank() == 0)
        if rank() == 0:
            model.lm.save_pretrained(tmp, state_dict=state)
            tok.save_pretrained(tmp)


def trunk_fingerprint(lm):
    """A hash of the weights that an adapter needs under it, the same in fp32 and bf16."""
    digest = hashlib.sha256()
    for key, w in sorted(lm.state_dict().items()):
        values = w.detach().flatten()[:64].bfloat16().float().cpu().numpy()
        digest.update(f"{key}{tuple(w.shape)}".encode() + values.tobytes())
    return digest.hexdigest()[:16]


@functools.lru_cache(4)
def tokenizer_fingerprint(tok):
    """A hash of what turns text into ids: the vocabulary, bos, eos and the chat template."""
    words = [sorted(tok.get_vocab().items()), tok.bos_token, tok.eos_token, tok.chat_template]
    return hashlib.sha256(json.dumps(words).encode()).hexdigest()[:16]


def save_adapter(model, name, tok, folder, **meta):
    """Write adapter and head `name` to adapter.safetensors, what loading needs and `meta` to adapter.json."""
    must_be_finite(model, f"the weights for {folder}")
    head = model.heads[name]
    about = dict(name=name, **model.adapters[name], trunk=model.fingerprint,
                 tokenizer=tokenizer_fingerprint(tok), **meta, sees_token=head.sees_token,
                 token_scale=head.token_scale)
    own = model.adapter_parameters(name)
    with new_folder(folder) as tmp, gathered(own.values()):
        if rank() == 0:
            weights = {key: p.detach().cpu().contiguous() for key, p in own.items()}
            save_file(weights, os.path.join(tmp, "adapter.safetensors"))
            pathlib.Path(tmp, "adapter.json").write_text(json.dumps(about, indent=1))


def load_adapter(model, tok, folder, made_by, asked=None):
    """Put a saved adapter and its head, frozen, on `model` -> its meta data.

    Refuses one of another trunk or tokenizer, and one that was trained with other flags than `asked`, a dict.
    """
    try:
        meta = json.loads(pathlib.Path(folder, "adapter.json").read_text())
        own = load_file(os.path.join(folder, "adapter.safetensors"))
        head = meta["sees_token"], meta["token_scale"]
    except (OSError, ValueError, KeyError, SafetensorError) as e:
        die(f"{folder}: no adapter there ({e!r}); train it with: {made_by}")
    for what, fingerprint in ("trunk", model.fingerprint), ("tokenizer", tokenizer_fingerprint(tok)):
        if meta.get(what) != fingerprint:
            die(f"{folder}: trained on another {what} than that of --init-from; train it on this: {made_by}")
    for key, value in (asked or {}).items():
        if meta.get(key, value) != value:
            flag = f"--{key.replace('_', '-')} {value}"
            die(f"{flag}: {folder} was trained with {meta[key]}; name another folder, or first {made_by}")
    model.add_adapter(meta["name"], meta["r"], meta["alpha"])
    model.add_head(meta["name"], *head)
    for key, p in model.adapter_parameters(meta["name"]).items():
        p.requires_grad_(False).copy_(own[key])
    return meta


class Checkpoints:
    """OUT/checkpoint/step_N: DeepSpeed's files of each engine, random states, the stage's state.

    first, state = checkpoints.load()      the step to continue with and what `save` was given, or 0, {}
    checkpoints.save(step, state)          after each step; writes every --save-every, and on a signal
    """

    def __init__(self, args, out, engines):
        self.args = args
        self.flags = vars(args) | dict(world_size=world())      # what --resume compares
        self.folder = os.path.join(out, "checkpoint")
        self.engines = engines
        self.stop = 0
        self.skipped = 0                                # updates, by DeepSpeed
        signal.signal(signal.SIGTERM, self.on_signal)
        signal.signal(signal.SIGINT, self.on_signal)

    def on_signal(self, number, _):
        """End after the current step, with a checkpoint and exit code 0; a second Ctrl-C ends at once."""
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
        self.stop = 1

    def path(self, step):
        return os.path.join(self.folder, f"step_{step}")

    def steps(self):
        """Steps of the checkpoints that are there, the last one first."""
        names = os.listdir(self.folder) if os.path.isdir(self.folder) else []
        return sorted((int(name[5:]) for name in names if re.fullmatch(r"step_\d+", name)), reverse=True)

    def load(self):
        # Without --resume rank 0 alone looks, as it moves the folder
        step = max(self.steps(), default=0) if self.args.resume or rank() == 0 else 0
        if not self.args.resume or step == 0:
            if self.args.resume:
                say(f"{self.folder}: no checkpoint to resume from; starting a new run")
            if rank() == 0 and step:                    # an older run's, which --resume must not find
                shutil.rmtree(self.folder + ".old", ignore_errors=True)
                os.rename(self.folder, self.folder + ".old")
            barrier()
            return 0, {}
        path = self.path(step)
        try:
            changed = self.changed_flags(path)
            for name, engine in self.engines.items():
                engine.load_checkpoint(
                    path, tag=name, load_module_strict=False, load_lr_scheduler_states=False)
            mine = torch.load(os.path.join(path, f"rank_{rank()}.pt"), weights_only=True)
        except torch.OutOfMemoryError:
            raise
        except Exception as e:                          # of many types, for a file that is cut short
            die(f"{path}: cannot be read ({repr(e)[:120]}); if it is damaged, remove it: --resume goes on "
                "from the one before", all_ranks=True)
        self.skipped = sum(engine.skipped_steps for engine in self.engines.values())
        torch.set_rng_state(mine["random"])
        if "random_cuda" in mine:
            torch.cuda.set_rng_state(mine["random_cuda"])
        # A flag that was changed, --kl-coef, counts for more than the state of that name
        return step, {key: value for key, value in mine["state"].items() if key not in changed}

    def changed_flags(self, path):
        """The flags that are not those of the checkpoint: said in one line, or refused."""
        before = json.loads(pathlib.Path(path, "run.json").read_text())
        now = json.loads(json.dumps(self.flags))        # lists for tuples, as in the file
        changed = {}
        for key, value in before.items():
            is_other = now[key] != value if key in now else value       # a flag that is no more
            if key not in NOT_OF_THE_RUN and is_other:
                changed[key] = f"--{key.replace('_', '-')} {value} -> {now.get(key)}"
        if "world_size" in changed:
            die(f"--resume: {path} was written by {before['world_size']} processes; start as many")
        wrong = [changed[key] for key in changed if key not in MAY_CHANGE]
        if wrong:
            flags = ", ".join(wrong)
            die(f"--resume: {flags}: not as {path} has it; leave it as it was, or start a new run")
        if changed:
            say(f"--resume with {', '.join(changed.values())}")
        return changed

    def save(self, step, state):
        """`step` has just been done, counted from 0."""
        skipped = sum(engine.skipped_steps for engine in self.engines.values())
        if skipped > self.skipped:                      # which DeepSpeed does not say
            say(f"warning: step {step}: gradient not finite, update skipped; lower --lr")
        self.skipped = skipped
        self.stop = all_max(self.stop)
        if not self.stop and (step + 1) % self.args.save_every:
            return
        for name, engine in self.engines.items():
            must_be_finite(engine.module, f"weights of the {name} after step {step}")
        with new_folder(self.path(step + 1)) as tmp:
            for name, engine in self.engines.items():
                engine.save_checkpoint(tmp, tag=name, save_latest=False, exclude_frozen_parameters=True)
            mine = dict(random=torch.get_rng_state(), state=state)
            if torch.cuda.is_available():
                mine["random_cuda"] = torch.cuda.get_rng_state()
            torch.save(mine, os.path.join(tmp, f"rank_{rank()}.pt"))
            barrier()
            if rank() == 0:
                pathlib.Path(tmp, "run.json").write_text(json.dumps(self.flags, indent=1))
        if rank() == 0:
            for old in self.steps()[KEPT:]:
                shutil.rmtree(self.path(old))
        if self.stop:
            say(f"\nstopped after step {step}; continue with --resume")
            finish()
