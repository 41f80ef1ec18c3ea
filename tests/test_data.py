import contextlib
import gzip
import io
import json
import math
import os

import numpy as np
from helpers import GVM, PROMPT, RL, j, path, quirky_tokenizer, refused, run, world

import common
import dvpo
import train_gvm
from data import toy, ultrafeedback


def test_gold_reward_and_true_q():
    for response, gold in [("the soup was great . the staff was kind .", 1),
                           ("the soup was not great . the staff was not rude .", 0),
                           ("well , the staff was so warm . the soup was fresh .", 1),
                           ("the soup was great . the soup was great . the staff was kind .", 0),
                           ("the soup was great . the staff was kind", 0), ("", -1),
                           ("soup staff great .", -1), ("the wine was great . the the staff was kind .", -1)]:
        assert toy.gold_reward(PROMPT, response) == gold, response
    assert toy.true_q(PROMPT, "the soup was great . the staff was rude . <eos>", "expert") == 0
    rng = np.random.default_rng(0)
    for policy in toy.POLICIES:  # exact value against a Monte-Carlo mean, 4 standard errors
        draws = [toy.gold_reward(PROMPT, toy.sample(PROMPT, policy, rng)) for _ in range(800)]
        assert abs(np.mean(draws) -
                   toy.true_q(PROMPT, "", policy)) < 4 * np.std(draws) / math.sqrt(len(draws)), policy
    # one step of Bellman by hand: V(state) is the mean of Q over what the policy says next
    for prefix in ("", "the soup was", "the soup was not"):
        state = toy.read(PROMPT, prefix)[0]
        mean = sum(p * toy.true_q(PROMPT, f"{prefix} {prefix.split()[-1] if w == toy.STUTTER else w}", "good")
                   for w, p in toy.next_words(state, toy.POLICIES["good"], ["soup", "staff"]).items())
        assert abs(mean - toy.true_q(PROMPT, prefix, "good")) < 1e-9


def test_ultrafeedback():
    """Raw rows with every oddity: N/A ratings, a wrong score, one completion, no text, a prompt twice."""
    def rated(*r):
        return {str(i): {"Rating": x} for i, x in enumerate(r)}

    def completion(model, text, *r):
        return {
            "model": model, "response": text, "overall_score": 10, "fine-grained_score": 3.0,
            "annotations": rated(*r)
        }

    assert ultrafeedback.rating(completion("m", "x", "5", "4", "N/A", "3")) == 0.5 and ultrafeedback.rating(
        completion("m", "x", "N/A")) == 0.0
    rows = [{
        "source": "s", "instruction": f"question {i}", "models": ["a", "b"], "completions": [
            completion("a", "good", "5", "5"),
            completion("b", "bad", "1", "N/A"),
            completion("c", " ", "5")
        ]
    } for i in range(400)]
    rows += [
        rows[0],
        dict(rows[0], instruction="lonely", completions=rows[0]["completions"][:1]),
        dict(rows[0], instruction="none", completions=[])
    ]
    os.makedirs(path("uf"), exist_ok=True)
    with open(path("uf/raw.jsonl"), "w") as f:
        f.writelines(json.dumps(r) + "\n" for r in rows)
    with contextlib.redirect_stderr(io.StringIO()):
        count, dropped = ultrafeedback.make([path("uf/raw.jsonl")], path("uf"))
        first = {n: open(path("uf", n + ".jsonl")).read() for n in count}
        ultrafeedback.make([path("uf/raw.jsonl")], path("uf"))
    assert first == {n: open(path("uf", n + ".jsonl")).read() for n in count}  # the same again
    assert dropped == {
        "empty completions": 401, "repeated prompts": 1, "prompts with fewer than two completions": 2
    }
    total = {n: count[n] + count[n + "_heldout"] for n in ("sft", "gvm", "pairs", "prompts")}
    assert total["sft"] + total["pairs"] + total["prompts"] == 400 and total["gvm"] == 2 * total["pairs"]
    assert abs(total["sft"] - 120) < 40 and abs(total["pairs"] - 200) < 40  # 30 / 50 / 20
    assert json.loads(first["pairs"].splitlines()[0]) | {"prompt": 0} == {
        "prompt": 0, "chosen": "good", "rejected": "bad", "chosen_policy": "a", "rejected_policy": "b"
    }
    assert {json.loads(line)["reward"] for line in first["gvm"].splitlines()} == {1.0, -1.0}

    def said(text):
        return [dict(role="user", content="q"), dict(role="assistant", content=text)]

    with open(path("uf/binarized.jsonl"), "w") as f:
        f.writelines(
            json.dumps(
                dict(prompt=f"question {i}", chosen=said("good"), rejected=said("bad" if i else "good"),
                     score_chosen=8.0)) + "\n" for i in range(100))
    with contextlib.redirect_stderr(io.StringIO()):
        plain, dropped = ultrafeedback.make([path("uf/binarized.jsonl")], path("uf2"), binarized=True)
    assert dropped == {"empty or equal pairs": 1, "prompts with fewer than two completions": 1} and sum(
        plain[n] + plain[n + "_heldout"] for n in ("sft", "pairs", "prompts")) == 99
    assert json.loads(open(path("uf2/pairs.jsonl")).readline()) | {"prompt": 0} == {
        "prompt": 0, "chosen": "good", "rejected": "bad"
    }
    data = train_gvm.Labelled([path("uf/pairs.jsonl")])  # pairs are two rows each
    assert len(data) == 2 * count["pairs"] and data[0]["reward"] == 1.0 and data[1] == dict(
        prompt=data[0]["prompt"], response="bad", reward=-1.0, policy="b")
    tau = data.tau("b", data[0]["prompt"], 2, np.random.default_rng(0))
    assert len(tau) == 2 and all(r["policy"] == "b" and r["prompt"] != data[0]["prompt"] for r in tau)


def test_any_jsonl():

    lines = [
        json.dumps(dict(prompt=[dict(role="user", content="ü" * i + "x")], response="a\u2028b", reward=i))
        for i in range(300)
    ]
    with gzip.open(path("rows.jsonl.gz"), "wt") as f:
        f.write("\n".join(lines))
    rows = common.read_rows(path("rows.jsonl.gz"), ["prompt"])
    assert len(rows) == 300 and [rows[i]["reward"] for i in (299, 0, 150)] == [299, 0, 150]  # any order


def test_odd_input_is_handled_as_documented():
    """One row, duplicates, CRLF, BOM, blank and long lines, control tokens: it trains and reports."""
    world()
    odd = [
        j(prompt="review the soup .", response="the soup was great .", reward=1, policy="p"),
        j(prompt="x" * 1_000_000, response="the soup was cold .", reward=-1, policy="p"),
        j(prompt="review the soup .", response="", reward=0, policy=None),
        j(prompt=" ", response="b", reward=1),
        j(prompt="a\u0000", response="the <eos> <pad> soup", reward=0.5)
    ]
    for lines in odd, odd[:1], odd[:1] * 3:
        with open(path("odd.jsonl"), "wb") as f:
            f.write(b"\xef\xbb\xbf" + b"\r\n\r\n".join(lines) + b"\r\n")
        with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()):
            train_gvm.main([
                *GVM[:2], "--data",
                path("odd.jsonl"), "--heldout",
                path("odd.jsonl"), "--out",
                path("odd"), "--max-steps", "2", "--batch-size", "4", "--true-q", ""
            ])
        assert ("left out 1 with an empty prompt" in err.getvalue()) == (lines is odd)
    with open(path("odd.jsonl"),
              "wb") as f:  # one prompt, longer than the context, for more rollouts than that
        f.write(odd[1])
    run(dvpo, "--gvm",
        path("gvm/model"), *RL[:2], "--data", path("odd.jsonl"), "--heldout", path("odd.jsonl"), "--out",
        path("odd"), "--max-steps", "1", "--batch-size", "4", "--mini-batch-size", "2", "--reward", "")
    refused(
        lambda: dvpo.main([
            "--gvm",
            path("gvm/model"), *RL[:2], "--data",
            path("odd.jsonl"), "--heldout",
            path("odd.jsonl"), "--out",
            path("odd")
        ]), "gold_reward: ValueError in line", "''")


def test_text_never_becomes_a_control_token():
    """What a user writes is text, even where it looks like the end of a turn."""
    for tok in (toy.tokenizer(), quirky_tokenizer("llama"), quirky_tokenizer("mistral")):
        for name in {
                tok.eos_token, tok.bos_token, *(t.content
                                                for t in tok.added_tokens_decoder.values() if t.special)
        } - {None, tok.unk_token}:
            special = tok.convert_tokens_to_ids(name)
            with_it, without = (common.encode_prompt(tok, f"the soup {x} was cold") for x in (name, "and"))
            assert with_it.count(special) == without.count(special), (name, with_it)
            assert common.encode_response(
                tok, f"{name} cold {name}").count(special) == (special == tok.eos_token_id)
