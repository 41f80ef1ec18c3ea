import argparse
import contextlib
import importlib
import io
import json
import os
import pathlib
import re
import subprocess
import sys
import textwrap
from unittest import mock

import numpy as np
import pytest
import torch
from helpers import HERE, PROMPT, path, refused, world

import common
import train_gvm
from data import toy
from runtime import processes


def test_label_goes_on_where_it_stopped():
    world()
    from tools import label

    def rows(to, n):
        argv = ["--policy", path("sft/model"), "--prompts", path("toy/prompts.jsonl"), "--to", to]
        with contextlib.redirect_stderr(io.StringIO()):
            label.main([*argv, "--n", str(n), "--batch-size", "16"])
        return open(to).read().splitlines()

    straight = rows(path("label_a.jsonl"), 48)
    rows(path("label_b.jsonl"), 32)
    with open(path("label_b.jsonl"), "a") as f:
        f.write('{"prompt": "cut sh')                   # killed in the middle of a line
    assert rows(path("label_b.jsonl"), 48) == straight and len(straight) == 48
    with open(path("one.py"), "w") as f:
        f.write("def reward(prompt, response):\n    return 0.125\n")
    argv = ["--policy", path("sft/model"), "--prompts", path("toy/prompts.jsonl")]
    argv += ["--to", path("label_b.jsonl"), "--batch-size", "16", "--reward", path("one.py:reward")]
    refused(lambda: label.main(argv), "label_b.jsonl", "another reward")
    row = json.loads(straight[0])
    assert row["policy"] == "sft" and row["reward"] == toy.gold_reward(row["prompt"], row["response"])
    both = train_gvm.Labelled([path("toy/gvm_heldout.jsonl"), path("label_a.jsonl")]).by_policy
    assert [len(both[name]) for name in ("sft", "sft-T1.4", "sft-T1.8")] == [16, 16, 16]
    pairs = [json.loads(line) for line in open(path("label_a_pairs.jsonl"))]
    better = [toy.gold_reward(p["prompt"], p["chosen"]) > toy.gold_reward(p["prompt"], p["rejected"])
              for p in pairs]
    assert pairs and all(better)


def test_label_with_a_reward_model():
    """The reward function of docs/data.md, on a sequence-classification checkpoint made here."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    tok = toy.tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tok), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, num_labels=1, initializer_range=0.3)
    model = LlamaForSequenceClassification(config).eval()
    model.save_pretrained(path("rm_hf"))
    tok.save_pretrained(path("rm_hf"))
    page = pathlib.Path(HERE, "docs/data.md").read_text()
    code, = re.findall(r"^    import functools\n.*?logits\.item\(\)\n", page, re.M | re.S)
    with open(path("published.py"), "w") as f:
        f.write(textwrap.dedent(code).replace("FOLDER_OR_ID", path("rm_hf")))
    reward = common.load_function(path("published.py:reward"))
    said = "the soup was great ."
    text = f"<bos> <user> {PROMPT} <assistant> {said} <eos>"
    want = model(tok(text, add_special_tokens=False, return_tensors="pt")["input_ids"]).logits.item()
    assert reward(PROMPT, said) == reward([dict(role="user", content=PROMPT)], said) == want


@pytest.fixture
def bench_main(monkeypatch, tmp_path):
    """tools/bench.py at a tiny size, in a folder and a world of its own -> (argv) -> JSON, page."""
    from tools import bench

    monkeypatch.chdir(tmp_path)
    for name in processes.LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    size = ("--shape", "tiny", "--prompt", "16", "--new", "8", "--batch-size", "4", "--rounds", "1")

    def main(*argv):
        with contextlib.redirect_stdout(io.StringIO()):
            bench.main([*size, "--to", "b.json", *argv])
        with open("b.json") as data, open("b.md") as page:
            return json.load(data), page.read()

    return main


def test_bench_steps(bench_main):
    """The benchmark drives both stages."""
    data, page = bench_main("--methods", "ppo", "lora")
    part, = data["runs"].values()
    ppo, lora = part["steps"]["ppo"], part["steps"]["lora"]
    for method in ppo, lora:
        phases = sum(method[f"sec_{phase}"] for phase in ("generate", "score", "train"))
        assert 0 < phases < method["sec_step"] and method["rounds"] == [method["sec_step"]]
        assert method["peak"] > 2**27
    for method in "ppo", "lora":                        # each with its own flags
        with open(f"out/bench/{method}/run.json") as f:
            assert json.load(f).get("lora", False) == (method == "lora")
    assert f"| {lora['sec_step'] / ppo['sec_step']:.3f} | {lora['peak'] / ppo['peak']:.3f} |" in page


def test_bench_steps_of_a_stage_that_ends(bench_main):
    with pytest.raises(SystemExit, match="dvpo ended: see out/bench/dvpo.log"):
        bench_main("--methods", "dvpo", "--batch-size", "3")
    with open("out/bench/dvpo.log") as f:
        assert "--batch-size 3: must be a multiple of 4" in f.read()


def test_bench_replaces_its_own_part_alone(bench_main):
    old = dict(machine="another", steps={"124M": dict(predicted=1.5)})
    page = "# Cost\n\nof old\n\n## 124M\n\n| a |\n\n\n| b |\n\n## 8B\n\nplanned\n"
    processes.write_json("b.json", old)
    with open("b.md", "w") as f:
        f.write(page)
    first, _ = bench_main("--decode")
    data, after = bench_main("--decode")
    assert data | old == data and {*data} == {*old, "runs"}
    title, = data["runs"]
    assert data["runs"][title] != first["runs"][title] and after.count(f"## {title}\n") == 1
    assert after.startswith(f"{page}\n## {title}\n\n`python tools/bench.py --shape tiny")
    rollout, = data["runs"][title]["rollouts"]
    assert f"| {rollout['generate'] / rollout['ours']:.2f} |" in after


def test_bytes_per_token():
    """3B: tied weights once; keys and values of 8 heads of 128 in 28 layers, per row and position.
    8B: all but the embedding."""
    from transformers import AutoModelForCausalLM

    from tools import bench

    cache = 8 * 100 * 2 * 8 * 128
    for shape, numbers in dict([("llama3-3b", 3_212_749_824 + 28 * cache),
                                ("llama3-8b", 8_030_261_248 - 128_256 * 4096 + 32 * cache)]).items():
        with torch.device("meta"):
            lm = AutoModelForCausalLM.from_config(bench.SHAPES[shape], dtype=torch.bfloat16)
        assert bench.bytes_per_token(lm, 8, 100) == 2 * numbers


def test_card_commands():
    """The runs on the toy: twenty, with flags that the stages take; what one needs, an earlier one made."""
    from tools import card

    for name, command in (card.FIRST | card.THEN).items():
        script, *flags = command.split()
        stage = importlib.import_module(script[:-3].replace("/", "."))
        args = stage.parse_args(["--model", "tiny", *flags])
        if name in card.THEN:
            made = args.gvm if script == "dvpo.py" else args.rm
            assert made in [f"{card.FOLDER}/{other}/model" for other in card.FIRST], name
            assert args.max_steps == card.STEPS == 2 * args.save_every, name
    assert len(card.FIRST | card.THEN) == 20 and {*card.RESUMED} <= {*card.THEN}


@pytest.fixture
def card(monkeypatch):
    """tools/card.py in a world of its own, where no run of the toy is started."""
    from tools import card

    world()
    monkeypatch.chdir(HERE)
    for name in processes.LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    few = dict(FIRST={}, THEN={}, RESUMED=[], FOLDER=path("card_toy"), LIMIT=float("inf"))
    with mock.patch.multiple(card, **few), contextlib.redirect_stdout(io.StringIO()):
        yield card


def test_card_toy(card):
    """A run of the toy that ends, keeps its ratio, and comes out bit for bit when it is resumed."""
    made = f"--init-from {path('sft/model')} --gvm {path('gvm/model')} --max-steps 2 --save-every 1 "
    made += "--batch-size 16 --mini-batch-size 16 --max-new-tokens 8"
    few = dict(THEN=dict(dvpo=f"{card.DVPO} {made}"), RESUMED=["dvpo"], STEPS=2)
    with mock.patch.multiple(card, **few):
        found, lines = card.toy()
    assert found == dict(dvpo=dict(ended=True, steps=2, ratio_off=0.0, resumed=True))
    assert "| dvpo | True | 2 | 0.0 | True |" in lines


def test_card(card, monkeypatch):
    """What --card measures on a CUDA machine, at a tiny shape on a CPU: every other part, and the report."""
    from tools import bench

    args = argparse.Namespace(shape="tiny", prompt=16, new=8, batch_size=4, rounds=1, methods=["lora", "ppo"])
    steps_of = bench.steps_of

    def without_room(args, method):
        return steps_of(args, method) if method == "lora" else sys.exit("error: ppo ended")

    monkeypatch.setattr(bench, "steps_of", without_room)
    found = bench.about("python tools/bench.py --card")
    lines = "\n".join(card.measure(args, found))
    for rollout in found["rollouts"]:
        share = rollout["read"] / found["bandwidth"] / rollout["static"] * rollout["new"]
        assert f"| {share:.2f} |" in lines
    assert [rollout["rows"] for rollout in found["rollouts"]] == [8, 64]
    assert all("aten::" in longest and longest in lines for longest in found["kernels"].values())
    assert {*found["steps"]} == {"lora"} and "\n\n### Steps\n\n|  | generate s |" in lines
    assert lines.endswith("error: ppo ended") and "No time" not in lines
    with mock.patch.multiple(card, LIMIT=0):
        assert card.steps(args, begin=float("-inf"))[1][-2:] == [
            "No time was left for: lora.", "No time was left for: ppo."]
        assert "No time was left for: kernels." in card.measure(args, found)


def test_sample():
    world()
    from tools import sample

    prompts, answers = path("toy/prompts_heldout.jsonl"), path("answers.json")
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(io.StringIO()):
        sample.main(["--policy", path("sft/model"), "--prompts", prompts, "--to", answers, "--reward",
                     "data/toy.py:gold_reward"])
    with open(answers) as f:
        out = json.load(f)
    assert len(out) == 30 and set(out[0]) == {"instruction", "output", "generator", "ended"}
    gold = [toy.gold_reward(row["instruction"], row["output"]) for row in out]
    assert np.mean(gold) > -0.5                         # answers, not noise
    assert said.getvalue() == f"{answers}: 30 answers, mean reward {np.mean(gold):.3f}\n"
    talk = subprocess.run([sys.executable, "tools/sample.py", "--policy", path("sft/model")], cwd=HERE,
                          input=f"{PROMPT}\n\n", capture_output=True, text=True)
    assert talk.returncode == 0 and len(talk.stdout) > 5, talk.stderr


def test_plot():
    """Curves over runs of different lengths, and a heat map of two responses, one without true values."""
    from tools import plot

    for seed, steps in enumerate((6, 8)):
        os.makedirs(path(f"curve_{seed}"))
        with open(path(f"curve_{seed}", "metrics.jsonl"), "w") as f:
            for step in range(steps):
                f.write(json.dumps(dict(step=step, seconds=2 * step, q_mean=0.1, kl=step)) + "\n")
    assert plot.column([[dict(kl=1)], [dict(kl=3), dict(kl=4)]], "kl").tolist() == [[1], [3]]
    shown = dict(prompt="a $1 b $2", tokens=["V(s_0)", "$", "$"], q=[0.1, 0.2, -0.3])
    processes.write_json(path("show.json"), shown)
    processes.write_json(path("show_true.json"), dict(shown, true_q=[0.0, 0.5, -1.0]))
    runs = "--run", "DVPO", path("curve_0"), path("curve_1"), "--run", "PPO", path("curve_0")
    heat = "--heatmap", path("show_true.json"), path("show.json")
    with contextlib.redirect_stdout(io.StringIO()):
        plot.main([*runs, "--to", path("plots/curves.png")])
        plot.main([*heat, "--to", path("plots/heatmap.png")])
    for name in "curves", "heatmap":
        with open(path(f"plots/{name}.png"), "rb") as f:
            assert f.read(8) == b"\x89PNG\r\n\x1a\n"
