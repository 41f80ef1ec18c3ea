import contextlib
import gzip
import io
import json
import math
import os

import numpy as np
import pytest
from helpers import GVM, PROMPT, RL, j, path, quirky_tokenizer, refused, run, world

import common
import dvpo
import train_gvm
from data import smollm2, toy, ultrafeedback


@pytest.mark.parametrize("response, gold", [
    ("the soup was great . the staff was kind .", 1),
    ("the soup was not great . the staff was not rude .", 0),
    ("well , the staff was so warm . the soup was fresh .", 1),
    ("the soup was great . the soup was great . the staff was kind .", 0),
    ("the soup was great . the staff was kind", 0),
    ("", -1),
    ("soup staff great .", -1),
    ("the wine was great . the the staff was kind .", -1)])
def test_gold_reward(response, gold):
    assert toy.gold_reward(PROMPT, response) == gold


@pytest.mark.parametrize("policy", toy.POLICIES)
def test_true_q_against_monte_carlo(policy):
    """Within four standard errors of the mean of 800 samples."""
    rng = np.random.default_rng(0)
    draws = [toy.gold_reward(PROMPT, toy.sample(PROMPT, policy, rng)) for _ in range(800)]
    error = abs(np.mean(draws) - toy.true_q(PROMPT, "", policy))
    assert error < 4 * np.std(draws) / math.sqrt(len(draws))


@pytest.mark.parametrize("prefix", ["", "the soup was", "the soup was not"])
def test_true_q_by_hand(prefix):
    """One step of Bellman: V(state) is the mean of Q over what the policy says next."""
    state, mean = toy.read(PROMPT, prefix)[0], 0.0
    for word, p in toy.next_words(state, toy.POLICIES["good"], ("soup", "staff")).items():
        said = prefix.split()[-1] if word == toy.STUTTER else word
        mean += p * toy.true_q(PROMPT, f"{prefix} {said}", "good")
    assert abs(mean - toy.true_q(PROMPT, prefix, "good")) < 1e-9


def test_true_q_of_a_whole_response():
    """It is the reward."""
    assert toy.true_q(PROMPT, "the soup was great . the staff was rude . <eos>", "expert") == 0


def ultrafeedback_completion(model, text, *ratings):
    return {"model": model, "response": text, "overall_score": 10, "fine-grained_score": 3.0,
            "annotations": {str(i): {"Rating": rating} for i, rating in enumerate(ratings)}}


def write_lines(name, rows):
    os.makedirs(os.path.dirname(path(name)), exist_ok=True)
    with open(path(name), "w") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)
    return path(name)


def make_ultrafeedback(raw, to):
    """-> ({file: its rows}, {reason: how many were dropped})."""
    with contextlib.redirect_stdout(io.StringIO()):
        return ultrafeedback.make([raw], path(to))


def test_ultrafeedback_rating():
    assert ultrafeedback.rating(ultrafeedback_completion("m", "x", "5", "4", "N/A", "3")) == 0.5
    assert ultrafeedback.rating(ultrafeedback_completion("m", "x", "1", "N/A")) == -1
    assert ultrafeedback.rating(ultrafeedback_completion("m", "x", "N/A")) is None


def test_ultrafeedback():
    """Raw rows with N/A ratings, a wrong score, a single completion, no text, and no completion."""
    completions = [ultrafeedback_completion("a", "good", "5", "5"),
                   ultrafeedback_completion("b", "bad", "1", "N/A"), ultrafeedback_completion("c", " ", "5")]
    rows = [{"source": "s", "instruction": f"question {i}", "models": ["a", "b"], "completions": completions}
            for i in range(400)]
    equal = [dict(rows[0], instruction=f"equal {i}", completions=completions[:1] * 2) for i in range(20)]
    odd = [dict(rows[0], instruction="lonely", completions=completions[:1]),
           dict(rows[0], instruction="none", completions=[])]
    raw = write_lines("uf/raw.jsonl", rows + odd)
    files, dropped = make_ultrafeedback(raw, "uf")
    assert make_ultrafeedback(raw, "uf") == (files, dropped)        # the same again
    assert dropped == {"completions without a rating or a text": 400,
                       "prompts that came before, or with fewer than two completions": 2}
    names = "sft", "gvm", "pairs", "prompts"
    total = {name: len(files[name]) + len(files[name + "_heldout"]) for name in names}
    assert total["sft"] + total["pairs"] + total["prompts"] == 400 and total["gvm"] == 2 * total["pairs"]
    assert abs(total["sft"] - 120) < 40 and abs(total["pairs"] - 200) < 40      # 30 / 50 / 20
    heldout = sum(len(files[name + "_heldout"]) for name in ("sft", "pairs", "prompts"))
    assert 0 < heldout < 25                                                     # 2 %
    pair = dict(files["pairs"][0])
    del pair["prompt"]
    assert pair == {"chosen": "good", "rejected": "bad", "chosen_policy": "a", "rejected_policy": "b"}
    assert {row["reward"] for row in files["gvm"]} == {1.0, -1.0}
    of_equal, _ = make_ultrafeedback(write_lines("uf_equal/raw.jsonl", equal), "uf_equal")
    assert of_equal["gvm"] and not of_equal["pairs"]
    broken = write_lines("uf_broken/raw.jsonl", [dict(rows[0], completions=["text"])])
    refused(lambda: ultrafeedback.make([broken], path("uf_broken")), "not a row of UltraFeedback")
    data = train_gvm.Labelled([path("uf/pairs.jsonl")])             # pairs are two rows each
    worse = dict(prompt=data[0]["prompt"], response="bad", reward=-1.0, policy="b")
    assert len(data) == 2 * len(files["pairs"]) and data[0]["reward"] == 1.0 and data[1] == worse
    tau = data.tau("b", data[0]["prompt"], 2, np.random.default_rng(0))
    assert len(tau) == 2
    assert all(row["policy"] == "b" and row["prompt"] != data[0]["prompt"] for row in tau)


def test_any_jsonl():
    """Compressed, with messages and a line separator in the text; read in any order."""
    lines = []
    for i in range(300):
        prompt = [dict(role="user", content="ü" * i + "x")]
        lines.append(json.dumps(dict(prompt=prompt, response="a\u2028b", reward=i)))
    with gzip.open(path("rows.jsonl.gz"), "wt") as f:
        f.write("\n".join(lines))
    rows = common.read_rows(path("rows.jsonl.gz"), ["prompt"])
    assert len(rows) == 300 and [rows[i]["reward"] for i in (299, 0, 150)] == [299, 0, 150]


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
    rows, out = path("odd.jsonl"), path("odd")
    for lines in odd, odd[:2], odd[:2] * 3:
        with open(rows, "wb") as f:
            f.write(b"\xef\xbb\xbf" + b"\r\n\r\n".join(lines) + b"\r\n")
        with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()):
            train_gvm.main([*GVM[:2], "--data", rows, "--heldout", rows, "--out", out, "--max-steps", "2",
                            "--batch-size", "4", "--true-q", ""])
        assert ("left out 1 with an empty prompt" in err.getvalue()) == (lines is odd)
    with open(rows, "wb") as f:                         # one prompt, longer than the context
        f.write(odd[1])
    rl = ("--gvm", path("gvm/model"), *RL[:2], "--data", rows, "--heldout", rows, "--out", out)
    run(dvpo, *rl, "--max-steps", "1", "--batch-size", "4", "--mini-batch-size", "2", "--gold", "")
    refused(lambda: dvpo.main(list(rl)), "gold_reward: ValueError in line", "''")


def test_text_never_becomes_a_control_token():
    """What a user writes is text, even where it looks like the end of a turn."""
    for tok in (toy.tokenizer(), quirky_tokenizer("llama"), quirky_tokenizer("mistral")):
        names = {token.content for token in tok.added_tokens_decoder.values() if token.special}
        for name in (names | {tok.eos_token, tok.bos_token}) - {None, tok.unk_token}:
            special = tok.convert_tokens_to_ids(name)
            with_it, without = (common.encode_prompt(tok, f"the soup {x} was cold") for x in (name, "and"))
            assert with_it.count(special) == without.count(special), (name, with_it)
            response = common.encode_response(tok, f"{name} cold {name}")
            assert response.count(special) == (special == tok.eos_token_id)


def test_smollm2_prompts():
    """Many topics; no held-out one in training; three personas per prompt; the same seed, the same bytes."""
    texts = []
    for folder in path("smol_a"), path("smol_b"):
        os.makedirs(folder)
        with contextlib.redirect_stdout(io.StringIO()):
            smollm2.make_prompts(folder, 0)
        texts.append({})
        for name in os.listdir(folder):
            with open(os.path.join(folder, name)) as f:
                texts[-1][name] = f.read()
    assert texts[0] == texts[1]
    rows = {name: [json.loads(line) for line in text.splitlines()] for name, text in texts[0].items()}
    train, heldout = (json.dumps(rows[f"prompts{part}.jsonl"]) for part in ("", "_heldout"))
    topics = [topic.strip() for topic in smollm2.TOPICS.split(",")]
    in_train = {topic for topic in topics if f" {topic}" in train}
    in_heldout = {topic for topic in topics if f" {topic}" in heldout}
    assert len(rows["prompts.jsonl"]) >= 400 and len(in_train) >= 100 and len(in_heldout) == 20
    assert not in_train & in_heldout
    for part in "", "_heldout":
        asked, played = rows[f"prompts{part}.jsonl"], rows[f"personas{part}.jsonl"]
        assert len(played) == 3 * len(asked) and {row["policy"] for row in played} == set(smollm2.PERSONAS)
        assert {row["prompt"] for row in played} == {row["prompt"] for row in asked}
        assert all(row["system"] == smollm2.PERSONAS[row["policy"]] for row in played)
