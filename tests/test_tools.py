import argparse
import contextlib
import http.server
import importlib
import io
import json
import os
import subprocess
import sys
import threading
from unittest import mock

import numpy as np
import pytest
import torch
from helpers import HERE, PROMPT, RL, close, path, quirky_model, quirky_tokenizer, refused, run, world

import common
import ppo_baseline
import train_gvm
from data import toy


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
    row = json.loads(straight[0])
    assert row["policy"] == "sft" and row["reward"] == toy.gold_reward(row["prompt"], row["response"])
    both = train_gvm.Labelled([path("toy/gvm_heldout.jsonl"), path("label_a.jsonl")]).by_policy
    assert [len(both[name]) for name in ("sft", "sft-T1.4", "sft-T1.8")] == [16, 16, 16]
    pairs = [json.loads(line) for line in open(path("label_a_pairs.jsonl"))]
    better = [toy.gold_reward(p["prompt"], p["chosen"]) > toy.gold_reward(p["prompt"], p["rejected"])
              for p in pairs]
    assert pairs and all(better)


def test_label_with_a_reward_model():
    """A sequence-classification checkpoint scores a batch as it scores the rows one by one."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    from tools import label

    tok = quirky_tokenizer("llama")
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tok), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, num_labels=1, initializer_range=0.3)
    rm = LlamaForSequenceClassification(config).eval()
    rm.save_pretrained(path("rm_hf"))
    tok.save_pretrained(path("rm_hf"))
    prompts = [PROMPT, "review the wine .", PROMPT]
    responses = ["the soup was great . the staff was kind .", "", "no ."]
    tok = common.load_tokenizer(path("rm_hf"))
    want = []
    ended = [True, True, False]                         # the last was cut: no eos
    for prompt, response, end in zip(prompts, responses, ended, strict=True):
        ids = common.encode_prompt(tok, prompt) + common.encode_response(tok, response)
        want.append(rm(torch.tensor([ids if end else ids[:-1]])).logits.item())
    close(label.score_with(path("rm_hf"))(prompts, responses, ended), want, 1e-5)
    # A language model would score with a random head
    refused(lambda: label.score_with(quirky_model("llama")), "not a reward model")


@pytest.fixture
def bench_main(monkeypatch, tmp_path):
    """tools/bench.py at a tiny size, in a folder and a world of its own -> (argv) -> JSON, page."""
    from tools import bench

    monkeypatch.chdir(tmp_path)
    for name in common.LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    size = ("--shape", "tiny", "--prompt", "16", "--new", "8", "--batch-size", "4", "--rounds", "1")

    def main(*argv):
        with contextlib.redirect_stdout(io.StringIO()):
            bench.main([*size, "--to", "b.json", *argv])
        with open("b.json") as data, open("b.md") as page:
            return json.load(data), page.read()

    return main


def test_bench_steps(bench_main):
    """The benchmark drives both stages, in turns."""
    data, page = bench_main("--methods", "ppo", "lora")
    part, = data["runs"].values()
    ppo, lora = part["steps"]["ppo"], part["steps"]["lora"]
    for method in ppo, lora:
        phases = sum(method[f"sec_{phase}"] for phase in ("generate", "score", "train"))
        assert 0 < phases < method["sec_step"] and method["rounds"] == [method["sec_step"]]
        assert 2**28 < method["planned"] == sum(method["plan"].values())    # with Python's libraries
    assert lora["plan"]["optimizer"] < ppo["plan"]["optimizer"]
    assert f"| {lora['sec_step'] / ppo['sec_step']:.3f} | {lora['peak'] / ppo['peak']:.3f} |" in page


def test_bench_steps_of_a_stage_that_ends(bench_main):
    with pytest.raises(SystemExit, match="dvpo ended: see out/bench/turns/dvpo.log"):
        bench_main("--methods", "dvpo", "--batch-size", "3")
    with open("out/bench/turns/dvpo.log") as f:
        assert "--batch-size 3: must be a multiple of 4" in f.read()


def test_bench_replaces_its_own_part_alone(bench_main):
    old = dict(machine="another", steps={"124M": dict(predicted=1.5)})
    page = "# Cost\n\nof old\n\n## 124M\n\n| a |\n\n\n| b |\n\n## 8B\n\nplanned\n"
    common.write_json("b.json", old)
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


def test_card(monkeypatch):
    """What --card measures on a CUDA machine, at a tiny shape on a CPU: every part, and its report."""
    from tools import bench, card

    world()
    monkeypatch.chdir(HERE)
    for name in common.LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    made = f"--init-from {path('sft/model')} --gvm {path('gvm/model')} --max-steps 2 --save-every 1 "
    made += "--batch-size 16 --mini-batch-size 16 --max-new-tokens 8"
    few = dict(FIRST={}, THEN=dict(dvpo=f"{card.DVPO} {made}"), RESUMED=["dvpo"], STEPS=2,
               FOLDER=path("card_toy"), LIMIT=float("inf"))
    args = argparse.Namespace(shape="tiny", prompt=16, new=8, batch_size=4, rounds=1, methods=["lora", "ppo"])
    side_by_side = bench.side_by_side

    def without_room(args, methods):
        return side_by_side(args, methods) if methods == ["lora"] else sys.exit("error: ppo ended")

    monkeypatch.setattr(bench, "side_by_side", without_room)
    found = bench.about("python tools/bench.py --card")
    with mock.patch.multiple(card, **few), contextlib.redirect_stdout(io.StringIO()):
        lines = "\n".join(card.measure(args, found))
    assert found["toy"] == dict(dvpo=dict(ended=True, steps=2, ratio_off=0.0, resumed=True))
    assert "| dvpo | True | 2 | 0.0 | True |" in lines
    for rollout in found["rollouts"]:
        share = rollout["read"] / found["bandwidth"] / rollout["static"] * rollout["new"]
        assert f"| {share:.2f} |" in lines
    assert [rollout["rows"] for rollout in found["rollouts"]] == [8, 64]
    assert all("aten::" in longest and longest in lines for longest in found["kernels"].values())
    assert {*found["steps"]} == {"lora"} and "\n\n### Steps\n\n|  | generate s |" in lines
    assert lines.endswith("error: ppo ended") and "No time" not in lines
    with mock.patch.multiple(card, **few | dict(THEN={}, RESUMED=[], LIMIT=0)):
        assert "No time was left for: kernels." in card.measure(args, found)


def test_sample():
    world()
    from tools import sample

    prompts, answers = path("toy/prompts_heldout.jsonl"), path("answers.json")
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        sample.main(["--policy", path("sft/model"), "--prompts", prompts, "--to", answers])
    with open(answers) as f:
        out = json.load(f)
    assert len(out) == 30 and set(out[0]) == {"instruction", "output", "generator", "ended"}
    gold = [toy.gold_reward(row["instruction"], row["output"]) for row in out]
    assert np.mean(gold) > -0.5                         # answers, not noise
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
    common.write_json(path("show.json"), shown)
    common.write_json(path("show_true.json"), dict(shown, true_q=[0.0, 0.5, -1.0]))
    runs = "--run", "DVPO", path("curve_0"), path("curve_1"), "--run", "PPO", path("curve_0")
    heat = "--heatmap", path("show_true.json"), path("show.json")
    with contextlib.redirect_stdout(io.StringIO()):
        plot.main([*runs, "--to", path("plots/curves.png")])
        plot.main([*heat, "--to", path("plots/heatmap.png")])
    for name in "curves", "heatmap":
        with open(path(f"plots/{name}.png"), "rb") as f:
            assert f.read(8) == b"\x89PNG\r\n\x1a\n"


def completion(text, **usage):
    """What a chat API returns; some do not say what was used."""
    reply = dict(choices=[dict(message=dict(content=text))])
    return json.dumps(reply | (dict(usage=usage) if usage else {})).encode()


def verdict(number, body):
    """(status, bytes) of call `number`: the first four fail, each in another way; then an answer's score is
    its length, but for the judges that are called otherwise."""
    user = body["messages"][1]["content"]
    failures = {1: (500, b"{}"), 2: (429, b"{}"), 3: (200, b"cut short"),
                4: (200, completion("I would rather not.", prompt_tokens=7, completion_tokens=5))}
    if body["model"] == "no-such":
        return 401, b"who are you"
    if body["model"] == "picky" and "question 3" in user:
        return 400, b"too long"
    if number in failures:
        return failures[number]
    score = min(5, len(user.split("<response>: ")[1].split()))
    said = f"Score: {score} Evaluation evidence: its length"
    return 200, completion(said, prompt_tokens=100, completion_tokens=10)


class Api(http.server.BaseHTTPRequestHandler):
    """A chat API on loopback."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(dict(body, auth=self.headers["Authorization"], path=self.path))
        code, out = verdict(len(self.server.asked), body)
        self.send_response(code)
        self.send_header("Content-Length", str(len(out) + 9 * (out == b"cut short")))
        self.end_headers()
        self.wfile.write(out)

    def log_message(self, *_):
        pass


@pytest.fixture
def api(monkeypatch):
    """-> the calls that it was asked."""
    from tools import judge

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Api)
    server.asked = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(judge, "WAIT", 0.01)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-test")
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{server.server_port}/v1")
    yield server.asked
    server.shutdown()


def run_judge(*argv):
    """tools/judge.py on the answers a.json and b.json -> its result."""
    from tools import judge

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return judge.main([path("a.json"), path("b.json"), *argv])


def write_answers(**answers):
    """NAME.json for each, one answer per question, and one that only this file has."""
    for name, outputs in answers.items():
        questions = [f"question {i}" for i in range(len(outputs))] + ["only in " + name]
        rows = [dict(instruction=question, output=output, generator=name)
                for question, output in zip(questions, [*outputs, "x"], strict=True)]
        common.write_json(path(f"{name}.json"), rows)


SIX_WINS_THREE_LOSSES_A_TIE = dict(a=["one two three"] * 6 + ["one"] * 4, b=["one two"] * 9 + ["one"])


@pytest.mark.parametrize("text, score", [
    ("Score: 4", 4), ("**Score:** 4", 4), ("Total score: 3.5/5", 3.5), ("Score: {2}", 2), ("score:\n0", 0),
    ("Score: 10", None), ("Score: -1", None), ("Score: \u22121", None), ("a 4", None), ("Scores: 4", None)])
def test_judge_reads_a_score(text, score):
    from tools import judge

    assert judge.read_score(text) == score


def test_judge(api):
    write_answers(**SIX_WINS_THREE_LOSSES_A_TIE)
    got = run_judge("--to", path("v.jsonl"), "--at-once", "1")
    assert (got["wins"], got["ties"], got["losses"], got["questions"]) == (6, 1, 3, 10)
    assert (got["unanswered"], got["only_in_one"]) == (0, 2)
    close(got["win_rate"], 0.65)
    assert got["interval"][0] < 0.65 < got["interval"][1]
    # 19 calls, as the tie's answers are one text; three failed without a bill; a fourth was billed
    assert len(api) == 19 + 4 and got["tokens_in"] == 19 * 100 + 7 and got["tokens_out"] == 19 * 10 + 5
    first = api[0]
    assert first["auth"] == "Bearer sk-test" and first["path"] == "/v1/chat/completions"
    assert first["model"] == "gpt-4o-2024-08-06"
    assert "additive 5-point" in first["messages"][0]["content"]
    judged = {call["messages"][1]["content"].split("<response>: ")[1] for call in api[4:]}
    assert judged == {"one", "one two", "one two three"}
    with open(path("v.jsonl")) as f:
        lines = f.read()
    with open(path("v.jsonl"), "w") as f:
        f.write(lines[:-30])                            # killed while it wrote the last verdict
    again = run_judge("--to", path("v.jsonl"))
    assert again["win_rate"] == got["win_rate"] and len(api) == 19 + 4 + 1     # nothing is paid twice
    assert run_judge("--to", path("v.jsonl")) == again and len(api) == 19 + 4 + 1


def test_judge_that_fails(api, monkeypatch):
    from tools import judge

    write_answers(**SIX_WINS_THREE_LOSSES_A_TIE)
    files = [path("a.json"), path("b.json")]
    got = run_judge("--to", path("w4.jsonl"), "--judge", "picky")
    assert got["questions"] == 9 and got["unanswered"] == 1         # a refused question is left out
    refused(lambda: judge.main([*files, "--to", path("u.jsonl"), "--judge", "no-such"]), "401")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:1/v1")
    refused(lambda: judge.main([*files, "--to", path("u2.jsonl")]), "gave up")
    monkeypatch.delenv("OPENAI_API_KEY")
    refused(lambda: judge.main([*files, "--to", path("u3.jsonl")]), "OPENAI_API_KEY")
    refused(lambda: judge.main([path("a.json"), path("nothing.json")]), "nothing.json")


def test_judge_by_reward():
    """A function and a reward model as judges."""
    world()
    good, bad = "the soup was great . the staff was kind .", "the soup was awful . the staff was kind ."
    for name, answer in ("a", good), ("b", bad):
        common.write_json(path(f"{name}.json"), [dict(instruction=PROMPT, output=answer, generator=name)])
    assert run_judge("--to", path("v2.jsonl"), "--reward", "data/toy.py:gold_reward")["wins"] == 1
    pairs = ("--pairs", path("toy/pairs_small.jsonl"), "--pairs-heldout", path("toy/pairs_small.jsonl"))
    run(ppo_baseline, *RL, *pairs, "--rm", path("judge_rm/model"), "--rm-max-steps", 3, "--max-steps", 1,
        "--out", path("judge_ppo"))
    got = run_judge("--to", path("v3.jsonl"), "--rm", path("judge_rm/model"), "--init-from",
                    path("sft/model"))
    rm = common.load_model(path("sft/model"), trainable=False).eval()
    tok = common.load_tokenizer(path("sft/model"))
    common.load_adapter(rm, tok, path("judge_rm/model"), "")
    prompts = [common.encode_prompt(tok, PROMPT)] * 2
    responses = [common.encode_response(tok, text) for text in (good, bad)]
    with torch.no_grad():
        want = ppo_baseline.scores(rm, *common.frame(prompts, responses, "cpu"))
    assert got["wins"] == int(want[0] > want[1]) and got["losses"] == int(want[0] < want[1])
