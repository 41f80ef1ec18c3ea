"""Rows: reading, checking and showing the data files, and the reward functions that a user names.

Every line is checked before training starts. A broken one ends the run with file and line number.
Open this file to allow another key or format, or to see why a row is refused or left out.
"""
import collections
import decimal
import functools
import gzip
import json
import numbers
import os
import re
import runpy
import sys
import traceback
import zlib

import torch

from runtime.metrics import Progress
from runtime.processes import die, say


def read_rows(path, *kinds, tok=None):
    """The rows of a .jsonl or .jsonl.gz file: a list of dicts. A broken line ends the run.

    kinds: sets of keys. The first line decides which one the file has, and every row must have its keys.
    tok: its chat template must take every order of roles that occurs.
    """
    if not os.path.isfile(path):
        made_by = f"python {os.path.dirname(path)}.py" if path.startswith("data/") else "a flag, see --help"
        made_by = "make smollm2" if path.startswith("data/smollm2/") else made_by
        die(f"{path}: no such file; make or name one with: {made_by}")
    rows = []
    rendered = set()                                    # orders of roles
    left_out = collections.Counter()
    try:
        with gzip.open(path) if path.endswith(".gz") else open(path, "rb") as file:
            for number, line in enumerate(Progress(file, desc=path, delay=2, leave=False), 1):  # noqa: B007
                if line.strip():
                    row, keys, reason = check_row(line, kinds)
                    kinds = [keys]
                    if tok and "prompt" in keys:
                        check_template(tok, row, rendered)
                    if reason:
                        left_out[reason] += 1
                    else:
                        rows.append(row)
    except ValueError as e:
        die(f"{path}:{number}: {e}")
    except (OSError, EOFError, zlib.error) as e:
        die(f"{path}: cannot be read ({e}); is it complete, and gzip if its name ends in .gz?")
    if left_out:
        counts = ", ".join(f"{n} with {reason}" for reason, n in left_out.items())
        say(f"{path}: left out {counts}")
    if not rows:
        die(f"{path}: {'no row is left' if left_out else 'the file is empty'}")
    return rows


def check_row(line, kinds):
    """-> the row, its keys out of `kinds`, the reason to leave it out or None. ValueError: it is broken."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"not JSON ({e}); write one object per line, in UTF-8") from e
    if not isinstance(row, dict):
        raise ValueError("not an object {...}")
    keys = next((keys for keys in kinds if set(keys) <= set(row)), None)
    if keys is None:
        raise ValueError("needs the keys " + ", or ".join(" ".join(keys) for keys in kinds))

    def must_be(what, key, value, holds):
        if not holds:
            raise ValueError(f"{key} must be {what}, not {str(value)[:40]!r}")

    prompt = prompt_text(row["prompt"]) if "prompt" in keys else "-"
    answers = [key for key in ("response", "chosen", "rejected") if key in keys]
    names = ("policy", "chosen_policy", "rejected_policy", "system")
    texts = {key: row[key] for key in names if row.get(key) is not None}
    texts |= dict(prompt=prompt) | {key: row[key] for key in answers}
    for key, text in texts.items():
        must_be("a string", key, text, isinstance(text, str))
        text.encode()                                   # fails on half a character
    for side in ("", "chosen_", "rejected_"):
        ended = row.get(side + "ended", True)
        must_be("true or false", side + "ended", ended, isinstance(ended, bool))
        ids = row.get(side + "ids", [0])
        are_ids = isinstance(ids, list) and ids and all(type(i) is int and i >= 0 for i in ids)
        must_be("a list of token ids", side + "ids", ids, are_ids)
    if "reward" in keys:
        reward = row["reward"]
        must_be("a finite number", "the reward", reward, as_number(reward) is not None)

    if not prompt.strip():
        return row, keys, "an empty prompt"
    for key in answers:
        ended = row.get("ended" if key == "response" else key + "_ended", True)
        if not row[key].strip() and not ended:
            return row, keys, "an empty answer that was cut"
    return row, keys, "two equal answers" if "chosen" in keys and row["chosen"] == row["rejected"] else None


def check_template(tok, row, rendered):
    """Render the first prompt of each order of roles; `rendered`: those that were. ValueError: refused."""
    messages = as_messages(behind_system(row))
    roles = ", ".join(message["role"] for message in messages)
    if tok.chat_template and roles not in rendered:
        rendered.add(roles)
        try:
            tok.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        except Exception as e:                          # what a template raises is its own affair
            raise ValueError(f"the chat template refuses the roles {roles} ({str(e)[:80]}); "
                             "rewrite the row, or use another tokenizer") from e


def as_messages(prompt):
    """A prompt, text or a list of {role, content}, as such a list."""
    return [dict(role="user", content=prompt)] if isinstance(prompt, str) else prompt


def behind_system(row):
    """The prompt of a row, its system message in front where it has one."""
    if not row.get("system"):
        return row["prompt"]
    return [dict(role="system", content=row["system"]), *as_messages(row["prompt"])]


def as_number(x):
    """x, of numpy, torch or decimal too, as a float that float32 can hold; None: it is none, as True, "1"."""
    x = x.item() if getattr(x, "shape", None) == () else x
    is_number = isinstance(x, numbers.Real | decimal.Decimal) and not isinstance(x, bool)
    return float(x) if is_number and x == x and abs(x) <= torch.finfo(torch.float32).max else None


def prompt_text(prompt):
    """All text of a prompt: a string as it is, a list of {role, content} joined."""
    if not isinstance(prompt, list):
        return prompt
    for message in prompt:
        is_message = isinstance(message, dict) and isinstance(message.get("content"), str)
        if not is_message or message.get("role") not in ("system", "user", "assistant"):
            raise ValueError("messages must be {role, content}: the role system, user or assistant, and text")
    if "user" not in [message["role"] for message in prompt]:
        raise ValueError("messages need a turn of the user")
    return "".join(message["content"] for message in prompt)


def one_side(pair, side):
    """The chosen or the rejected answer of a pair, as a row {prompt, response[, policy, ended, ids, ...]}."""
    about = {key.removeprefix(side + "_"): x for key, x in pair.items() if key.startswith(side + "_")}
    kept = {key: pair[key] for key in ("prompt", "tokenizer") if key in pair}
    return dict(about, **kept, response=pair[side])


def check_lengths(rows, encode, max_length, flag="--max-length", n=1000):
    """Say how many of the first n rows are cut: encode(row) -> ids."""
    some = Progress(rows[:n], desc="lengths", delay=2, leave=False)
    lengths = [len(encode(row)) for row in some]
    cut = sum(length > max_length for length in lengths)
    if cut:
        say(f"{flag} {max_length} cuts {cut} of the first {len(lengths)} rows; the longest has "
            f"{max(lengths)} tokens")


@functools.lru_cache(4)
def control_tokens(tok):
    names = {t.content for t in tok.added_tokens_decoder.values() if t.special} | set(tok.all_special_tokens)
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))) or "(?!)")


def only_text(tok, text):
    """User text in which no string is a control token: `<|eot_id|>` becomes `< |eot_id|>`."""
    return control_tokens(tok).sub(lambda match: match[0][:1] + " " + match[0][1:], text)


def load_function(spec, unknown=()):
    """`FILE.py:function` -> the function, checked at every call to return a finite number; "" -> None.

    What it raises ends the run in one line, but for `unknown`, exceptions that the caller handles.
    The file may import modules that stand beside it.
    """
    if not spec:
        return None
    path, _, name = spec.rpartition(":")
    if not os.path.isfile(path):
        die(f"{spec}: no such file; give FILE.py:function")
    sys.path.append(os.path.dirname(os.path.abspath(path)))
    try:
        function = runpy.run_path(path).get(name)
    except Exception as e:
        die(f"{spec}: {path} cannot be run: {type(e).__name__}: {str(e)[:200]}")
    if not callable(function):
        die(f"{spec}: {path} has no function {name!r}")

    def call(*values):
        try:
            returned = function(*values)
            number = as_number(returned)
            if number is not None:
                return number
            error = f"returned {str(returned)[:40]!r}, which is no finite number,"
        except unknown:
            raise
        except Exception as e:
            line = traceback.extract_tb(e.__traceback__)[-1].lineno
            error = f"{type(e).__name__} in line {line}: {str(e)[:200]},"
        prompt = str(values[0])[:80]
        die(f"{spec}: {error} for the prompt {prompt!r}; fix it, or give '' for none", all_ranks=True)

    return call
