"""Wrong data, flags and folders end in one line on stderr that says what to fix, with exit code 2."""
import gzip
import os
import shutil
import socket
import sys

import pytest
from helpers import GVM, RL, j, path, refused, script, world

import common
import dvpo
import ppo_baseline
import sft
import train_gvm
from runtime import processes
from tools import label

SFT_ROW = j(prompt="a", response="b")
GVM_ROW = j(prompt="a", response="b", reward=1, policy="p")
PAIR = j(prompt="a", chosen="b", rejected="c")
ASK = j(prompt="a")
BROKEN = [                                              # (stage, lines of --data, what the one line says)
    (sft, [], "empty"),
    (sft, [b"", b"  "], "empty"),
    (sft, [SFT_ROW, b"{cut sh"], ":2: not JSON"),
    (sft, [b"prompt,response"], ":1: not JSON"),
    (sft, [SFT_ROW, b'{"prompt": "caf\xe9", "response": "b"}'], ":2: not JSON"),
    (sft, [(SFT_ROW + b"\n" + SFT_ROW).decode().encode("utf-16")], "not JSON"),
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
    (sft, [j(prompt=[dict(role="user", content=None)], response="b")], "and text"),
    (sft, [j(prompt=["a"], response="b")], "messages must be"),
    (sft, [b'{"prompt": "\\ud800", "response": "b"}'], "surrogates not allowed"),
    (train_gvm, [GVM_ROW, GVM_ROW[:-20] + b"}"], ":2: not JSON"),
    (train_gvm, [j(prompt="a", response="b", reward="good")], "'good'"),
    (train_gvm, [j(prompt="a", response="b", reward=True)], "'True'"),
    (train_gvm, [b'{"prompt": "a", "response": "b", "reward": NaN}'], "'nan'"),
    (train_gvm, [b'{"prompt": "a", "response": "b", "reward": -Infinity}'], "'-inf'"),
    (train_gvm, [b'{"prompt": "a", "response": "b", "reward": 1e999}'], "'inf'"),
    (train_gvm, [j(prompt="a", response="b", reward=10**400)], "finite number"),
    (train_gvm, [GVM_ROW, j(prompt="a", response="b", reward=1e308)], ":2: the reward must be a finite"),
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


@pytest.mark.parametrize("case", BROKEN)
def test_broken_rows(case):
    """Every case ends before a model is loaded, in one line that names file and line."""
    world()
    stage, lines, *words = case
    with open(path("bad.jsonl"), "wb") as f:
        f.write(b"\n".join(lines))
    init = RL[:2] if stage in (dvpo, ppo_baseline) else GVM[:2]
    refused(lambda: stage.main([*init, "--data", path("bad.jsonl"), "--out", path("x")]), "bad.jsonl", *words)


@pytest.mark.parametrize("damage", ["cut", "flipped", "text"])
def test_broken_gzip(damage):
    whole = gzip.compress(b"\n".join([SFT_ROW] * 1000))
    data = dict(cut=whole[:-20], flipped=whole[:30] + b"xxxx" + whole[34:], text=SFT_ROW)[damage]
    name = path(damage + ".jsonl.gz")
    with open(name, "wb") as f:
        f.write(data)
    world()
    init = ["--init-from", path("toy/model")]
    refused(lambda: sft.main([*init, "--data", name, "--out", path("x")]), name, "cannot be read")


FLAGS = [
    ("--lr -1", "--lr"),
    ("--lr nan", "--lr"),
    ("--batch-size 0", "--batch-size 0"),
    ("--batch-size 48", "a multiple"),
    ("--batch-size 7", "--batch-size"),
    ("--mini-batch-size 0", "--mini-batch-size 0"),
    ("--max-steps 0", "--max-steps"),
    ("--temperature 0", "--temperature"),
    ("--kl-target -1", "--kl-target"),
    ("--max-new-tokens 0", "--max-new-tokens"),
    ("--max-new-tokens 100000", "positions"),
    ("--max-new-tokens 200", "256"),
    ("--save-every 0", "--save-every"),
    ("--ppo-epochs 0", "--ppo-epochs"),
    ("--offload --zero 0", "--offload"),
    ("--compile --gradient-checkpointing", "--compile"),
    ("--compile --zero 3", "--compile"),
    ("--gold nothing.py:f", "nothing.py"),
    ("--gold data/toy.py:nothing", "no function 'nothing'"),
    ("--init-from TMP/no_weights", "no_weights"),
    ("--init-from TMP/cut_weights", "cut_weights"),
    ("--init-from TMP/cut_config", "cut_config"),
    ("--gvm TMP/cut_gvm", "cut_gvm"),
    ("--gvm TMP/bare_gvm", "bare_gvm"),
    ("--gvm TMP/sft/model", "no adapter there"),
    ("--gvm TMP/none/gvm/model", "train_gvm.py"),
    ("--init-from TMP/toy/model", "trained on another trunk"),
    ("--ds-config TMP/ds_broken.json", "ds_broken.json"),
    ("--ds-config TMP/ds_batch.json", "train_batch_size"),
    ("--ds-config TMP/ds_stage.json", "ds_stage.json: stage"),
    ("--ds-config TMP/ds_fp16.json", "fp16"),
    ("--out TMP/a_file", "a_file"),
    ("--out /proc/nothing", "/proc/nothing"),
]


@pytest.fixture(scope="module")
def broken_folders():
    world()
    for name in ("no_weights", "cut_weights", "cut_config", "cut_gvm", "bare_gvm"):
        shutil.copytree(path("gvm/model" if "gvm" in name else "sft/model"), path(name))
    os.remove(path("no_weights/model.safetensors"))
    for name in ("cut_weights/model.safetensors", "cut_config/config.json", "cut_gvm/adapter.safetensors"):
        with open(path(name), "r+b") as f:
            f.truncate(os.path.getsize(path(name)) // 2)
    processes.write_json(path("bare_gvm/adapter.json"), dict(name="gvm"))
    files = {"ds_broken.json": "{", "ds_batch.json": '{"train_batch_size": 7}', "a_file": "",
             "ds_stage.json": '{"zero_optimization": {"stage": 2}}', "ds_fp16.json": '{"fp16": {}}'}
    for name, text in files.items():
        with open(path(name), "w") as f:
            f.write(text)


@pytest.mark.parametrize(("flags", "word"), FLAGS)
def test_broken_flags(broken_folders, flags, word):
    flags = flags.replace("TMP", path()).split()
    refused(lambda: dvpo.main(["--gvm", path("gvm/model"), *RL, "--out", path("x"), *flags]), word)


ANSWERS = ["None", "'0.5'", "True", "float('nan')", "1e308", "[0.5]"]


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("program", [dvpo, ppo_baseline, label])
def test_what_a_reward_function_returns(program, answer):
    """One line names the function, what it returned, and for which prompt."""
    world()
    with open(path("odd_reward.py"), "w") as f:
        f.write(f"def reward(prompt, response):\n    return {answer}\n")
    gvm = ["--gvm", path("gvm/model")] if program is dvpo else []
    argv = [*gvm, *RL, "--out", path("x")]
    if program is label:
        argv = ["--policy", path("sft/model"), "--prompts", path("toy/prompts.jsonl"), "--to", path("labels")]
    returned = str(eval(answer))
    flag = "--gold" if program is dvpo else "--reward"
    refused(lambda: program.main([*argv, flag, path("odd_reward.py:reward")]),
            "odd_reward.py:reward: returned", returned, "review", "finite number")


def test_reward_of_numpy_is_a_number():
    with open(path("numpy_reward.py"), "w") as f:
        f.write("import numpy as np\ndef reward(prompt, response):\n    return np.float32(0.5)\n")
    assert common.load_function(path("numpy_reward.py:reward"))("a", "b") == 0.5


MISSING = [("nothing.jsonl", "nothing.jsonl"), ("data/toy/nothing.jsonl", "data/toy.py"), ("TMP", "no such")]


@pytest.mark.parametrize(("name", "word"), MISSING)
def test_missing_data(name, word):
    world()
    name = name.replace("TMP", path())
    init = ["--init-from", path("toy/model")]
    refused(lambda: sft.main([*init, "--data", name, "--out", path("x")]), "error: ", word)


def one_line(done, *words):
    lines = done.stderr.splitlines()
    assert done.returncode == 2 and len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    assert all(word in lines[0] for word in words), lines


def test_missing_model():
    world()
    data = ("--data", path("toy/prompts.jsonl"), "--heldout", path("toy/prompts.jsonl"), "--out", path("x"))
    one_line(script(sys.executable, "dvpo.py", "--init-from", path("none/sft/model"), *data), "sft")
    refused(lambda: dvpo.main(["--model", "llama3-3b", *data]), "python sft.py --model llama3-3b")


def test_no_hub():
    world()
    data = ("--data", path("toy/sft.jsonl"), "--heldout", path("toy/sft_small.jsonl"), "--out", path("x"))
    offline = dict(HF_HUB_OFFLINE="1", HF_HOME=path("no_hub"))
    done = script(sys.executable, "sft.py", "--model", "llama3-3b", *data, env=offline)
    one_line(done, "meta-llama/Llama-3.2-3B", "licence")


def test_port_is_taken():
    world()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        env = dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        done = script(sys.executable, "dvpo.py", "--gvm", path("gvm/model"), *RL, "--out", path("x"), env=env)
    one_line(done, "--master_port")
