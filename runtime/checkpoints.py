"""Checkpoints: folders that are complete or not there, and what a run needs to continue bit for bit.

save_model writes a transformers folder, save_adapter a GVM or reward model, Checkpoints what --resume reads.
Open this file to save another format. What a stage itself must remember goes into Checkpoints.save.
"""
import contextlib
import functools
import hashlib
import json
import os
import pathlib
import re
import shutil
import signal
import sys
import zlib

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from runtime.processes import all_max, barrier, die, finish, gathered, lock, new_folder, rank, say, world

# Flags that --resume may change; with another value of any other flag it would not be the same run.
MAY_CHANGE = {
    "max_steps", "epochs", "rm_max_steps", "rm_epochs", "save_every",
    "lr", "critic_lr", "rm_lr", "lr_decay", "warmup_steps", "kl_coef", "kl_target", "kl_stop", "clip",
    "mini_batch_size", "grad_accum", "static_cache", "gradient_checkpointing", "ds_config",
    "heldout", "pairs_heldout", "prompts", "gold", "true_q", "min_gap"}
NOT_OF_THE_RUN = {"out", "resume", "dry_run", "local_rank", "world_size", "rm_asked"}


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


def fingerprints(model, tok):
    """What an adapter of this model needs: hashes of the trunk and of the tokenizer."""
    return dict(trunk=model.fingerprint, tokenizer=tokenizer_fingerprint(tok))


def save_adapter(model, name, tok, folder, **meta):
    """Write adapter and head `name` to adapter.safetensors, what loading needs and `meta` to adapter.json."""
    must_be_finite(model, f"the weights for {folder}")
    own = model.adapter_parameters(name)
    with new_folder(folder) as tmp, gathered(own.values()):
        if rank() == 0:
            weights = {k: p.detach().cpu().contiguous() for k, p in own.items()}
            save_file(weights, os.path.join(tmp, "adapter.safetensors"))
            about = dict(name=name, **model.adapters[name], **fingerprints(model, tok), **meta)
            about["sees_token"] = model.heads[name].sees_token
            about["token_scale"] = model.heads[name].token_scale
            pathlib.Path(tmp, "adapter.json").write_text(json.dumps(about, indent=1))


def load_adapter(model, tok, folder, made_by):
    """Put a saved adapter and its head, frozen, on `model` -> its meta data. Refuses one of another trunk."""
    try:
        with open(os.path.join(folder, "adapter.json")) as f:
            meta = json.load(f)
        own = load_file(os.path.join(folder, "adapter.safetensors"))
    except (OSError, ValueError, SafetensorError) as e:
        die(f"{folder}: no adapter there ({e}); train it with: {made_by}")
    for what, fingerprint in fingerprints(model, tok).items():
        if meta.get(what) != fingerprint:
            die(f"{folder}: trained on another {what} than that of --init-from; train it on this: {made_by}")
    tied = model.lm.get_input_embeddings().weight is model.lm.get_output_embeddings().weight
    sees_token = meta.get("sees_token", False)
    if sees_token and "token_scale" not in meta and not tied:
        die(f"{folder}: its head reads the input embedding, as older versions did; train it again: {made_by}")
    model.add_adapter(meta["name"], meta["r"], meta["alpha"])
    model.add_head(meta["name"], sees_token, meta.get("token_scale", 1.0 if sees_token else None))
    for key, p in model.adapter_parameters(meta["name"]).items():
        p.requires_grad_(False).copy_(own[key])
    return meta


class Checkpoints:
    """OUT/checkpoint/step_N: DeepSpeed's files of each engine, random states, the stage's state, check sums.

    first, state = checkpoints.load()          the step to continue with and what `save` was given, or 0, {}
    checkpoints.save(step, name=value, ...)    after each step; writes every --save-every, and on a signal
    """

    def __init__(self, args, out, keep=2, **engines):
        self.args, self.folder, self.keep, self.engines = args, os.path.join(out, "checkpoint"), keep, engines
        self.stop = self.skipped = 0
        if os.path.isdir(out):
            lock(out)
        signal.signal(signal.SIGTERM, self.on_signal)
        signal.signal(signal.SIGINT, self.on_signal)

    def on_signal(self, number, _):
        """End after the current step, with a checkpoint and exit code 0; a second Ctrl-C ends at once."""
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)
        self.stop = 1

    def steps(self):
        """Steps of the checkpoints that are there, the last one first."""
        names = os.listdir(self.folder) if os.path.isdir(self.folder) else []
        return sorted((int(name[5:]) for name in names if re.fullmatch(r"step_\d+", name)), reverse=True)

    def load(self):
        path = self.last_whole() if self.args.resume else None
        if path is None:
            if rank() == 0 and self.steps():                    # an older run's, which --resume must not find
                shutil.rmtree(self.folder + ".old", ignore_errors=True)
                os.rename(self.folder, self.folder + ".old")
            barrier()
            return 0, {}
        with open(os.path.join(path, "run.json")) as f:
            before = json.load(f)
        if before["world_size"] != world():
            die(f"--resume: {path} was written by {before['world_size']} processes; start as many")
        changed = self.changed_flags(before, path)
        for name, engine in self.engines.items():
            engine.load_checkpoint(path, tag=name, load_module_strict=False, load_lr_scheduler_states=False)
        mine = torch.load(os.path.join(path, f"rank_{rank()}.pt"), weights_only=True)
        self.skipped = sum(engine.skipped_steps for engine in self.engines.values())
        torch.set_rng_state(mine["random"])
        if "random_cuda" in mine:
            torch.cuda.set_rng_state(mine["random_cuda"])
        # A flag that was changed, --kl-coef, counts for more than the state of that name
        state = {key: value for key, value in mine["state"].items() if key not in changed}
        return int(path.rpartition("_")[2]), state

    def changed_flags(self, before, path):
        """The flags that are not those of the checkpoint: said in one line, or refused."""
        now, changed = json.loads(json.dumps(vars(self.args))), {}      # lists for tuples, as in the file
        for key, value in before.items():
            if key in now and now[key] != value and key not in NOT_OF_THE_RUN:
                changed[key] = f"--{key.replace('_', '-')} {value} -> {now[key]}"
        wrong = [change for key, change in changed.items() if key not in MAY_CHANGE]
        if wrong:
            die(f"--resume: {', '.join(wrong)}: not as {path} has it; leave it as it was, or start a new run")
        if changed and rank() == 0:
            print(f"--resume with {', '.join(changed.values())}", file=sys.stderr)
        return changed

    def last_whole(self):
        """Folder of the last checkpoint whose files are what was written; damaged ones are moved aside."""
        steps = self.steps()
        for path in [os.path.join(self.folder, f"step_{step}") for step in steps]:
            damaged = int(rank() == 0)
            if damaged:
                with contextlib.suppress(OSError, ValueError), open(os.path.join(path, "files.json")) as f:
                    damaged = int(json.load(f) != check_sums(path))
            if not all_max(damaged):
                return path
            if rank() == 0:
                print(f"{path}: cut short or damaged; using the one before it", file=sys.stderr)
                os.rename(path, path + ".damaged")
            barrier()
        if steps:
            die(f"{self.folder}: all checkpoints are damaged; start a new run without --resume")
        if rank() == 0:
            print(f"{self.folder}: no checkpoint to resume from; starting a new run", file=sys.stderr)

    def save(self, step, **state):
        """`step` has just been done, counted from 0."""
        skipped = sum(engine.skipped_steps for engine in self.engines.values())
        if skipped > self.skipped and rank() == 0:              # which DeepSpeed does not say
            say(f"warning: step {step}: gradient not finite, update skipped; lower --lr")
        self.skipped, self.stop = skipped, all_max(self.stop)
        if not self.stop and (step + 1) % self.args.save_every:
            return
        for name, engine in self.engines.items():
            must_be_finite(engine.module, f"weights of the {name} after step {step}")
        with new_folder(os.path.join(self.folder, f"step_{step + 1}")) as tmp:
            for name, engine in self.engines.items():
                engine.save_checkpoint(tmp, tag=name, save_latest=False, exclude_frozen_parameters=True)
            cuda = dict(random_cuda=torch.cuda.get_rng_state()) if torch.cuda.is_available() else {}
            mine = dict(cuda, random=torch.get_rng_state(), state=state)
            torch.save(mine, os.path.join(tmp, f"rank_{rank()}.pt"))
            barrier()
            if rank() == 0:
                flags = json.dumps(vars(self.args) | dict(world_size=world()), indent=1)
                pathlib.Path(tmp, "run.json").write_text(flags)
                pathlib.Path(tmp, "files.json").write_text(json.dumps(check_sums(tmp), indent=1))
        if rank() == 0:
            for old in self.steps()[self.keep:]:
                shutil.rmtree(os.path.join(self.folder, f"step_{old}"))
        if self.stop:
            if rank() == 0:
                say(f"\nstopped after step {step}; continue with --resume")
            finish()


def check_sums(folder):
    """{file: [bytes, CRC-32]} of every file in a folder but files.json itself."""
    paths = [p for p in pathlib.Path(folder).rglob("*") if p.is_file() and p.name != "files.json"]
    return {str(p.relative_to(folder)): [p.stat().st_size, zlib.crc32(np.memmap(p, mode="r"))] for p in paths}
