import contextlib
import glob
import io
import itertools
import json
import math
import os
import shutil
import subprocess
import sys

import numpy as np
import torch

import common
import dvpo
import ppo_baseline
import sft
import train_gvm
from data import toy, ultrafeedback
from helpers import *

SFT_ROW, GVM_ROW, PAIR, ASK = j(prompt="a", response="b"), j(prompt="a", response="b", reward=1,
                                                             policy="p"), j(prompt="a", chosen="b",
                                                                            rejected="c"), j(prompt="a")

BROKEN = [  # (stage, lines of --data, what the one line says)
    (sft, [], "empty"),
    (sft, [b"", b"  "], "empty"),
    (sft, [SFT_ROW, b"{cut sh"], ":2: not JSON"),
    (sft, [b"prompt,response"], ":1: not JSON"),
    (sft, [SFT_ROW, b'{"prompt": "caf\xe9", "response": "b"}'], ":2: not JSON"),
    (sft, ['{"prompt": "a", "response": "b"}\n{"prompt": "a", "response": "b"}'.encode("utf-16")],
     "not JSON"),
    (sft, [SFT_ROW, b'{"prompt": "a\x00", "response": "b"}'], ":2: not JSON"),
    (sft, [b"\0" * 100], "not JSON"),
    (sft, [b"[" * 100000], ":1: not JSON"),
    (sft, [SFT_ROW, b'["a", "b"]'], ":2: not an object"),
    (sft, [SFT_ROW, b"", ASK], ":3: needs the keys"),
    (sft, [j(prompt=3, response="b")], "prompt must be a string"),
    (sft, [j(prompt="a", response=None)], "response must be a string"),
    (sft, [j(prompt="a", response=["b"])], "response must be a string"),
    (sft, [j(prompt=" ", response="b")], "1 with an empty prompt", "no row is left"),
    (sft, [j(prompt=[], response="b")], "need a turn of the user"),
    (sft, [j(prompt=[dict(role="system", content="a")], response="b")], "need a turn of the user"),
    (sft, [j(prompt=[dict(role="robot", content="a")], response="b")], "the role system, user or assistant"),
    (sft, [j(prompt=[dict(role="user", content=None)], response="b")], "content a string"),
    (sft, [j(prompt=["a"], response="b")], "messages must be"),
    (sft, [b'{"prompt": "\\ud800", "response": "b"}'], "half a character"),
    (train_gvm, [GVM_ROW, GVM_ROW[:-20] + b"}"], ":2: not JSON"),
    (train_gvm, [j(prompt="a", response="b", reward="good")], "'good'"),
    (train_gvm, [j(prompt="a", response="b", reward=True)], "'True'"),
    (train_gvm, [b'{"prompt": "a", "response": "b", "reward": NaN}'], "'nan'"),
    (train_gvm, [b'{"prompt": "a", "response": "b", "reward": -Infinity}'], "'-inf'"),
    (train_gvm, [b'{"prompt": "a", "response": "b", "reward": 1e999}'], "'inf'"),
    (train_gvm, [j(prompt="a", response="b", reward=10**400)], "finite number"),
    (train_gvm, [j(prompt="a", response="b", reward=None)], "'None'"),
    (train_gvm, [j(prompt="a", response="b", reward=1, policy=7)], "policy must be a string"),
    (train_gvm, [GVM_ROW, SFT_ROW], ":2: needs the keys prompt response reward"),
    (train_gvm, [PAIR, GVM_ROW], ":2: needs the keys prompt chosen rejected"),
    (train_gvm, [SFT_ROW], "or prompt chosen rejected"),
    (train_gvm, [j(prompt="a", chosen="b", rejected="b")], "1 with two equal answers", "no row is left"),
    (train_gvm, [j(prompt="a", chosen="b", rejected=1)], "rejected must be a string"),
    (dvpo, [SFT_ROW[:5]], "not JSON"),
    (dvpo, [j(question="a")], "needs the keys prompt"),
    (ppo_baseline, [b"null"], "not an object"),
]


def test_broken_input_is_one_line():
    """Every case ends before a model is loaded, with exit code 2 and one line that names file and line."""
    world()
    for stage, lines, *words in BROKEN:
        with open(path("bad.jsonl"), "wb") as f:
            f.write(b"\n".join(lines))
        refused(
            lambda: stage.main([
                *(RL[:2] if stage in (dvpo, ppo_baseline) else GVM[:2]), "--data",
                path("bad.jsonl"), "--out",
                path("x")
            ]), "bad.jsonl", *words)
    import gzip

    whole = gzip.compress(b"\n".join([SFT_ROW] * 1000))
    for name, data in ("cut.jsonl.gz", whole[:-20]), ("flipped.jsonl.gz",
                                                      whole[:30] + b"xxxx" + whole[34:]), ("text.jsonl.gz",
                                                                                           SFT_ROW):
        with open(path(name), "wb") as f:
            f.write(data)
        refused(lambda: sft.main(["--data", path(name), "--out", path("x")]), name, "cannot be read")
    refused(lambda: sft.main(["--data", path("toy"), "--out", path("x")]), "no such file")


def test_broken_flags_and_folders_are_one_line():
    world()
    good = ("--gvm", path("gvm/model"), *RL)
    for name in ("no_weights", "cut_weights", "cut_config", "cut_gvm", "bare_gvm"):
        shutil.rmtree(path(name), ignore_errors=True)
        shutil.copytree(path("gvm/model" if "gvm" in name else "sft/model"), path(name))
    os.remove(path("no_weights/model.safetensors"))
    for name in ("cut_weights/model.safetensors", "cut_config/config.json", "cut_gvm/adapter.safetensors"):
        with open(path(name), "r+b") as f:
            f.truncate(os.path.getsize(path(name)) // 2)
    common.write_json(path("bare_gvm/adapter.json"), dict(name="gvm"))
    for name, config in ("ds_broken.json", "{"), ("ds_batch.json", '{"train_batch_size": 7}'), (
            "ds_stage.json", '{"zero_optimization": {"stage": 2}}'), ("ds_fp16.json",
                                                                      '{"fp16": {"enabled": true}}'):
        with open(path(name), "w") as f:
            f.write(config)
    with open(path("a_file"), "w"):
        pass
    for flags, *words in (("--lr", "-1"), "--lr"), (("--lr", "nan"), "--lr"), (("--batch-size", "0"), "--batch-size 0"), (("--batch-size", "48"), "a multiple"), (("--mini-batch-size", "0"), "a multiple"), \
            (("--max-steps", "0"), "--max-steps"), (("--temperature", "0"), "--temperature"), (("--kl-target", "0"), "--kl-target"), (("--max-new-tokens", "0"), "--max-new-tokens"), \
            (("--max-new-tokens", "100000"), "positions"), (("--ppo-epochs", "0"), "--ppo-epochs"), (("--offload", "--zero", "0"), "--offload"), (("--reward", "nothing.py:f"), "nothing.py"), \
            (("--reward", "data/toy.py:nothing"), "no function 'nothing'"), (("--init-from", path("no_weights")), "no_weights"), (("--init-from", path("cut_weights")), "cut_weights"), \
            (("--init-from", path("cut_config")), "cut_config"), (("--gvm", path("cut_gvm")), "cut_gvm"), (("--gvm", path("bare_gvm")), "bare_gvm"), (("--gvm", path("sft/model")), "no adapter there"), \
            (("--init-from", path("toy/model")), "trained on another model"), (("--ds-config", path("ds_broken.json")), "ds_broken.json"), (("--ds-config", path("ds_batch.json")), "train_batch_size"), \
            (("--ds-config", path("ds_stage.json")), "zero_optimization.stage"), (("--ds-config", path("ds_fp16.json")), "fp16"), (("--out", path("a_file")), "a_file"), (("--out", "/proc/nothing"), "/proc/nothing"):
        refused(lambda: dvpo.main([*good, "--out", path("x"), *flags]), *words)
    import socket

    with socket.socket() as taken:  # a launcher's port that somebody else has
        taken.bind(("127.0.0.1", 0)), taken.listen()
        done = script(
            sys.executable, "dvpo.py", *good, "--out", path("x"),
            env=dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1",
                     MASTER_PORT=str(taken.getsockname()[1])))
    assert done.returncode == 2 and len(
        done.stderr.splitlines()) == 1 and "--master_port" in done.stderr, done.stderr


def test_no_hub_is_one_line():
    world()
    done = script(sys.executable, "sft.py",
                  "--model", "llama3-3b", "--data", path("toy/sft.jsonl"), "--heldout",
                  path("toy/sft_small.jsonl"), "--out", path("x"), env=dict(HF_HUB_OFFLINE="1",
                                                                            HF_HOME=path("no_hub")))
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2 and len(
        lines) == 1 and "meta-llama/Llama-3.2-3B" in lines[0] and "licence" in lines[0], done.stderr
    refused(
        lambda: dvpo.main([
            "--model", "llama3-3b", "--data",
            path("toy/prompts.jsonl"), "--heldout",
            path("toy/prompts.jsonl"), "--out",
            path("x")
        ]), "python sft.py --model llama3-3b")


def test_missing_input_is_one_line():
    world()
    no_sft = [
        "--init-from",
        path("none/sft/model"), "--data",
        path("toy/prompts.jsonl"), "--heldout",
        path("toy/prompts.jsonl"), "--out",
        path("x")
    ]
    done = script(sys.executable, "dvpo.py", *no_sft)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and len(
        done.stderr.splitlines()) == 1 and "sft" in done.stderr, done.stderr
    for stage, argv, word in (dvpo, ["--init-from", path("sft/model"), "--gvm", path("none/gvm/model"), *RL[2:]], "train_gvm.py"), \
            (sft, ["--data", path("nothing.jsonl")], "nothing.jsonl"), (sft, ["--data", "data/toy/nothing.jsonl"], "data/toy.py"), (dvpo, ["--batch-size", "7"], "--batch-size"):
        refused(lambda: stage.main([*argv, "--out", path("x")]), "error: ", word)
