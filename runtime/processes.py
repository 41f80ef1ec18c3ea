"""Processes: how a run starts and ends, sums over ranks, and files that are whole.

Open this file when a launch hangs or fails, or when you need one more collective operation.
"""
import atexit
import contextlib
import fcntl
import functools
import json
import os
import re
import shutil
import signal
import socket
import sys

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch.distributed.nn.functional import all_reduce
from tqdm import tqdm

CUDA = torch.cuda.is_available()
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("DS_ACCELERATOR", "cuda" if CUDA else "cpu")      # which deepspeed reads on import

import deepspeed

deepspeed.utils.logger.setLevel("WARNING")
LOCAL = "out/", "data/"                                 # never asked for at the hub
LAUNCHER_VARIABLES = "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"


def die(message, code=2, all_ranks=False):
    """End the run with one line on stderr, what is wrong and how to fix it: the one way to end with an error.

    code: 2 for wrong input, 1 for a run that failed; all_ranks: print where rank 0 may not see the error.
    """
    if all_ranks or rank() == 0:
        tqdm.write(f"error: {message}", file=sys.stderr)        # below any progress bar
    raise SystemExit(code)


def say(line):
    """Print a line on stderr, on rank 0."""
    if rank() == 0:
        try:
            print(line, file=sys.stderr, flush=True)
        except BrokenPipeError:
            # Its reader has gone, as a launcher may: a SIGTERM ends a stage after its step, with a checkpoint
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            os.kill(os.getpid(), signal.SIGTERM)


def report_error(before, kind, error, trace):
    """sys.excepthook, over the one `before`: what memory cannot hold ends a run in one line."""
    if not re.search("out of memory|can't allocate memory", str(error)):
        return before(kind, error, trace)
    print("error: out of memory; try fewer rows per pass (higher --grad-accum; in RL a lower "
          "--mini-batch-size, too), --lora (dvpo.py), --zero 3, --offload or --gradient-checkpointing; "
          "--dry-run prints the peak of a step", file=sys.stderr, flush=True)


def missing_model(path, error):
    """The error message for a model that cannot be loaded: where it would come from."""
    if os.path.isdir(path):
        return f"{path}: not a transformers folder with safetensors weights ({str(error).splitlines()[0]})"
    if path.startswith(LOCAL):
        stages = dict(sft="sft.py", dvpo="dvpo.py", ppo="ppo_baseline.py")
        run = re.match(r"out/([^/]+)/(sft|dvpo|ppo)/", path)
        made_by = f"{stages[run[2]]} --model {run[1]}" if run else "data/toy.py"
        made_by = "data/smollm2.py" if path.startswith("data/smollm2/") else made_by
        return f"{path}: no model there; make it with: python {made_by}"
    return (f"{path}: neither a local folder nor reachable on the Hugging Face hub; use `hf auth login` and "
            "accept its licence there, or give --model a local folder")


def start(args, out):
    """Join the process group, seed every rank, make the folder `out` and lock it -> the device."""
    if "RANK" not in os.environ:                        # plain python: a world of one, on a free port
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        os.environ |= dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1",
                           MASTER_PORT=str(port))
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if CUDA else torch.device("cpu")
    if CUDA:
        torch.cuda.set_device(device)
        torch.backends.cuda.enable_cudnn_sdp(False)     # slow where shapes change
    if not dist.is_initialized():
        # Gloo serves in place of this operation, which needs a compiler
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        try:
            deepspeed.init_distributed("nccl" if CUDA else "gloo", verbose=False)
        except dist.DistNetworkError as e:
            reason = str(e)[:80]
            die(f"the processes cannot meet ({reason}); choose another --master_port", all_ranks=True)
        sys.excepthook = functools.partial(report_error, sys.excepthook)
    seed(args)
    with writing(f"--out {out}", "name another folder", code=2):
        os.makedirs(out, exist_ok=True)
        lock(out)
        write_json(f"{out}/run.json", vars(args) | dict(world_size=world(), device=str(device)))
        must_be_shared(out)
    return device


@contextlib.contextmanager
def writing(what, remedy="make room there", code=1):
    """Around all that writes: what the disk refuses ends the run in one line. code: as of die()."""
    try:
        yield
    except OSError as e:
        die(f"{what}: cannot be written ({e.strerror or e}); {remedy}", code, all_ranks=True)


def check_writable(path):
    """Make the folder of a file that will be written at the end, and see now whether it can be."""
    with writing(path, "name another file", code=2):
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        there = os.path.exists(path)
        open(path, "a").close()
        if not there:
            os.remove(path)


LOCKED = {}                                             # path: its file descriptor, until the process ends


def lock(path):
    """Refuse a folder or file that another run is writing to. The lock ends with its process."""
    path = os.path.realpath(path)
    if path in LOCKED or (dist.is_initialized() and rank() > 0):
        return
    LOCKED[path] = os.open(path, os.O_RDONLY)
    with contextlib.suppress(OSError):                  # there are file systems without locks
        try:
            fcntl.flock(LOCKED[path], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(LOCKED.pop(path))
            die(f"{path}: another run is writing there; wait for its end, or write to another place")


def must_be_shared(folder):
    """Every rank writes its part of a checkpoint: one host's own folder would hold a part, and seem whole."""
    mark = os.path.join(folder, "shared.tmp")
    if rank() == 0:
        open(mark, "w").close()
    barrier()
    missing = all_max(int(not os.path.exists(mark)))    # which comes after all ranks have looked
    if rank() == 0:
        os.remove(mark)
    if missing:
        die(f"--out {folder}: each host has its own; name a folder on a file system that all hosts share")


def seed(args):
    """Seed every rank differently; called again before the loop, so that the set-up does not matter."""
    torch.manual_seed(args.seed * 1000 + rank())


def finish(code=0):
    """End the process with all ranks together; does not return."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    # Python's own shutdown is skipped but for atexit's functions (wandb's, say): gloo's threads still run,
    # and one that frees a tensor during the shutdown aborts the process (pytorch issue 190489)
    atexit._run_exitfuncs()
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def rank():
    return int(os.environ.get("RANK", 0))               # also before the process group is there


def world():
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier():
    if world() > 1:
        dist.barrier()


def all_sum(x):
    """Sum of a tensor over all ranks, with a gradient: every rank's loss depends on every rank's input."""
    return all_reduce(x) if world() > 1 else x


def all_max(n):
    """Maximum of a Python int over all ranks."""
    n = torch.tensor(n, device="cuda" if CUDA and world() > 1 else "cpu")
    if world() > 1:
        dist.all_reduce(n, dist.ReduceOp.MAX)
    return int(n)


def gathered(params):
    """Context with whole weights on every rank; outside it ZeRO-3 shards them. All ranks must enter."""
    params = [p for p in params if hasattr(p, "ds_id")]
    return deepspeed.zero.GatheredParameters(params) if params else contextlib.nullcontext()


def write_json(path, value):
    """Write a JSON file on rank 0: complete, or not at all."""
    if rank() == 0:
        with writing(path):
            with open(path + ".tmp", "w") as f:
                json.dump(value, f, indent=1)
            os.replace(path + ".tmp", path)


@contextlib.contextmanager
def new_folder(path):
    """A folder for all ranks to write in, which replaces `path` only once it is complete."""
    tmp = path + ".tmp"
    old = path + ".old"
    try:
        if rank() == 0:
            for leftover in tmp, old:
                shutil.rmtree(leftover, ignore_errors=True)
            os.makedirs(tmp)
        barrier()
        yield tmp
        barrier()
        if rank() == 0:
            if os.path.exists(path):                    # two renames: never half a folder
                os.rename(path, old)
            os.rename(tmp, path)
            shutil.rmtree(old, ignore_errors=True)
        barrier()
    except (OSError, RuntimeError, SafetensorError) as e:
        if isinstance(e, RuntimeError) and "inline_container" not in str(e):        # torch.save's error
            raise
        shutil.rmtree(tmp, ignore_errors=True)
        die(f"{path} cannot be written ({str(e)[:150]!r}); make room, then --resume", code=1, all_ranks=True)
