"""Rows: reading and checking the data files and the reward functions that a user names.

Every line of a file is checked before training starts. A broken one ends the run with file and line number.
Open this file to allow another key or format, or to see why a row is refused or left out.
"""
import collections
import gzip
import importlib.util
import json
import os
import sys
import traceback
import zlib

import numpy as np

from runtime.metrics import Progress
from runtime.processes import die, rank, world


class Rows:
    """A .jsonl or .jsonl.gz file as a sequence of dicts. Lines are kept as bytes and parsed on access.

    kinds: sets of keys. The first line decides which one the file has, and every row must have its keys.
    on_row(row, keys): called once for every row that is kept.
    """

    def __init__(self, path, *kinds, on_row=None):
        if not os.path.isfile(path):
            makers = [f"make it with: python {m}.py" for m in ("data/toy", "data/ultrafeedback") if m + "/" in path]
            die(f"{path}: no such file; {(makers or ['name one with a flag, see --help'])[0]}")
        self.lines, left_out = [], collections.Counter()
        try:
            with gzip.open(path) if path.endswith(".gz") else open(path, "rb") as file:
                lines = Progress(file, desc=os.path.basename(path), delay=2, leave=False)
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        row, keys, reason = check_row(line, kinds)
                        kinds = [keys]
                        if reason:
                            left_out[reason] += 1
                            continue
                        self.lines.append(line)
                        if on_row:
                            on_row(row, keys)
        except ValueError as e:
            die(f"{path}:{number}: {e}")
        except (OSError, EOFError, zlib.error) as e:
            die(f"{path}: cannot be read ({e}); is it complete, and gzip if its name ends in .gz?")
        if left_out and rank() == 0:
            counts = ", ".join(f"{n} with {reason}" for reason, n in left_out.items())
            print(f"{path}: left out {counts}", file=sys.stderr)
        if not self.lines:
            die(f"{path}: {'no row is left' if left_out else 'the file is empty'}")

    def __len__(self):
        return len(self.lines)

    def __getitem__(self, i):
        return json.loads(self.lines[i])


def check_row(line, kinds):
    """-> the row, which keys of `kinds` it has, the reason to leave it out or None. ValueError: it is broken."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"not JSON ({e}); write one object per line, in UTF-8") from e
    if not isinstance(row, dict):
        raise ValueError("not an object {...}")
    keys = next((keys for keys in kinds if set(keys) <= set(row)), None)
    if keys is None:
        raise ValueError("needs the keys " + ", or ".join(" ".join(keys) for keys in kinds))
    prompt = prompt_text(row["prompt"]) if "prompt" in keys else "-"
    prompt.encode()                                     # fails on half a character
    for key in ("response", "chosen", "rejected", "policy", "chosen_policy", "rejected_policy"):
        if key in keys or (key.endswith("policy") and row.get(key) is not None):
            if not isinstance(row[key], str):
                raise ValueError(f"{key} must be a string, not {str(row[key])[:40]!r}")
            row[key].encode()
    if "reward" in keys:
        reward, most = row["reward"], np.finfo(np.float32).max
        if type(reward) not in (int, float) or not -most <= reward <= most:
            raise ValueError(f"the reward must be a finite number, in float32 too, not {str(reward)[:40]!r}")
    if not prompt.strip():
        return row, keys, "an empty prompt"
    equal = "chosen" in keys and row["chosen"] == row["rejected"]
    return row, keys, "two equal answers" if equal else None


def prompt_text(prompt):
    """All text of a prompt, which is a string or a list of {role, content}."""
    if isinstance(prompt, str):
        return prompt
    if not isinstance(prompt, list):
        raise ValueError(f"prompt must be a string or a list of {{role, content}}, not {str(prompt)[:40]!r}")
    roles = [m.get("role") if isinstance(m, dict) and isinstance(m.get("content"), str) else None for m in prompt]
    if not set(roles) <= {"system", "user", "assistant"}:
        raise ValueError("messages must be {role, content}: the role system, user or assistant, content a string")
    if "user" not in roles:
        raise ValueError("messages need a turn of the user")
    return "".join(m["content"] for m in prompt)


def batch_indices(n, size, step, seed):
    """This rank's row numbers of batch `step`, a function of the step alone; `size` counts all ranks.

    Shuffled epochs are laid end to end: no row is dropped or repeated.
    """
    positions = range(step * size + rank(), (step + 1) * size, world())
    epochs = {i // n for i in positions}
    shuffled = {epoch: np.random.default_rng([seed, epoch]).permutation(n) for epoch in epochs}
    return [int(shuffled[i // n][i % n]) for i in positions]


def load_function(spec):
    """`FILE.py:function` -> the function, or None for an empty spec. An exception in it ends the run in one line.

    KeyError is passed on: by it a function says that it knows no answer.
    """
    if not spec:
        return None
    path, _, name = spec.rpartition(":")
    if not os.path.isfile(path):
        die(f"{spec}: no such file; give FILE.py:function")
    module_spec = importlib.util.spec_from_file_location(os.path.basename(path)[:-3], path)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    if not hasattr(module, name):
        die(f"{spec}: {path} has no function {name!r}")

    def call(*values):
        try:
            return getattr(module, name)(*values)
        except KeyError:
            raise
        except Exception as e:
            line = traceback.extract_tb(e.__traceback__)[-1].lineno
            die(f"{spec}: {type(e).__name__} in line {line}: {str(e)[:200]}; fix it, or name another function, or "
                "none with ''", all_ranks=True)

    return call
