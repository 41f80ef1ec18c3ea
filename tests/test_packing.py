"""Packed rows of train_gvm.py: every row of a sequence is trained, and is tau of the rows after it."""
import argparse
import math
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import TMP, close, tiny_gpt2, tiny_llama

import common
import train_gvm
from data import toy

ARGS = argparse.Namespace(max_length=200, tau_length=99, batch_norm=False, gamma=0.9, td_lambda=0.7)
TEXTS = "the soup was great .", "the staff was not rude . the soup was cold .", "well , the wine was fair ."
NOUNS = ("soup", "staff"), ("staff", "soup"), ("wine", "room")
PROMPTS = [f"review the {first} and the {second} ." for first, second in NOUNS]
ROWS = [dict(prompt=p, response=r, reward=reward, policy="good")
        for p, r, reward in zip(PROMPTS, TEXTS, (0.5, -1.0, 0.25), strict=True)]


def sequences(tok):
    """A packed row, one behind a shorter tau, one by itself."""
    return [common.pack(tok, ROWS[k], ROWS[:k], ARGS.max_length, ARGS.tau_length) for k in (2, 0, 1)]


@pytest.mark.parametrize("tiny", [tiny_gpt2, tiny_llama])
def test_packed_rows_equal_rows_one_by_one(tiny):
    """Values, targets and loss, against each row read by itself behind the same tau."""
    tok, model = toy.tokenizer(), tiny()
    model.add_head("gvm", sees_token=True)
    torch.nn.init.normal_(model.heads["gvm"].weight, std=0.1)
    ids, attn, mask, states, score = train_gvm.training_frame(sequences(tok), "cpu")
    with torch.no_grad():
        q = model(ids, attn, mask.shape[1], head="gvm")
    targets = train_gvm.td_targets(q, score, ARGS.gamma, ARGS.td_lambda)
    found_q, found_targets, loss = [], [], 0.0
    for packed in (3, 1, 2):
        for k in range(packed):
            prompt = []
            for row in ROWS[:k]:
                pair = common.encode_prompt(tok, row["prompt"]), common.encode_response(tok, row["response"])
                prompt = common.append_to_prefix(tok, prompt, pair[0]) + pair[1]
            prompt = common.append_to_prefix(tok, prompt, common.encode_prompt(tok, ROWS[k]["prompt"]))
            response = common.encode_response(tok, ROWS[k]["response"])
            with torch.no_grad():
                whole = torch.tensor([prompt + response])
                h = model.lm.base_model(whole).last_hidden_state[0]
                embedding = model.lm.get_output_embeddings().weight
                token = embedding[whole[0, 1:]] / embedding.pow(2).mean().sqrt()
                x = torch.cat([h[1:], h[:-1] * token], -1)          # at the second token and after
                v = model.heads["gvm"](x)[len(prompt) - 2:, 0].tolist()
            G = [0.0] * len(response) + [ROWS[k]["reward"]]         # the recursion of eq. (1), in floats
            for t in reversed(range(len(response))):
                G[t] = ARGS.gamma * (0.3 * v[t + 1] + 0.7 * G[t + 1])
            found_q += v
            found_targets += G
            loss += sum((a - b) ** 2 for a, b in zip(v, G, strict=True))
    close(q[states], found_q, 1e-5)
    close(targets[states], found_targets, 1e-5)
    close(train_gvm.gvm_loss(q, score, states, ARGS), loss, 1e-4)


def test_targets_do_not_leak_between_rows():
    tok = toy.tokenizer()
    _, _, mask, _, score = train_gvm.training_frame(sequences(tok)[:1], "cpu")
    q = torch.linspace(-1, 1, score.numel())[None]
    before = train_gvm.td_targets(q, score, 1.0, 0.95)
    begins = (F.pad(mask, (0, 1)) & ~F.pad(mask, (1, 0))).nonzero()[:, 1].tolist()     # of V(s_0), three rows
    assert len(begins) == 3
    changed_q, changed = q.clone(), score.clone()
    changed_q[:, begins[2]:] += 5
    changed[0, changed[0].isfinite().nonzero()[-1]] = 9.0
    after = train_gvm.td_targets(changed_q, changed, 1.0, 0.95)
    ends = score[0].isfinite().nonzero()[:, 0].tolist()
    close(after[:, :ends[1] + 1], before[:, :ends[1] + 1])
    assert (after[:, begins[2]:] != before[:, begins[2]:]).all()


def test_what_is_trained():
    """Responses and their last prompt tokens. A row without a policy is alone; a tau needs room."""
    tok = toy.tokenizer()
    n = [len(common.encode_response(tok, row["response"])) for row in ROWS]
    _, _, mask, _, score = train_gvm.training_frame(sequences(tok), "cpu")
    assert mask.sum(1).tolist() == [sum(n), n[0], n[0] + n[1]]
    assert score[0][score[0].isfinite()].tolist() == [0.5, -1.0, 0.25]
    assert math.isnan(score[1, -1]) and score[1][score[1].isfinite()].tolist() == [0.5]
    file, rng = os.path.join(TMP, "packing.jsonl"), np.random.default_rng(0)
    toy.write_jsonl(file, [*ROWS, dict(ROWS[0], policy=None)])
    data = train_gvm.Labelled([file])
    assert data.tau(None, "x", 2, rng) == [] and len(data.tau("good", "x", 2, rng)) == 2
    assert all(row["prompt"] != PROMPTS[0] for row in data.tau("good", PROMPTS[0], 2, rng))
    room = len(common.encode_prompt(tok, PROMPTS[2])) + 1
    ids, spans = common.pack(tok, ROWS[2], ROWS[:2], 2 * room, 99)
    assert spans == [(ROWS[2], len(ids) - n[2], len(ids))]
