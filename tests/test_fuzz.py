"""Random rows, texts, roles and tokenizers: what is read, and what is trained of it.

A file is read, or refused with exit code 2 in one line. What the tokens say is what the text said,
and the mask is True on the responses and nowhere else. A failure names the seed of its case.
"""
import contextlib
import io
import itertools
import json
import os
import types

import numpy as np
import pytest
from helpers import CHATML_TEMPLATE, path, quirky_tokenizer

import common
import train_gvm
from data import toy
from runtime.rows import check_row

KINDS = [["prompt", "response", "reward"], ["prompt", "chosen", "rejected"], ["prompt", "response"],
         ["prompt"]]
OPTIONAL = dict(policy="p", system="s", reward=1, ended=False, ids=[7, 2], chosen_ended=False,
                rejected_ids=[7, 2], chosen_policy="p")
ROLES = "system", "user", "assistant"
PIECES = ["the soup", "was", " ", "  ", "\n", "\n\n", "\t", "\r\n", "\0", "é", "ß", "日本語",
          "🙂", "\U0001f469\u200d\U0001f467", "e\u0301", "\u2028", "\u00a0", "\u200b", "\ufeff", "\u202e",
          "{{ x }}", "{% if %}", "### User:\n", "[INST]", "'", '"', "\\", "<", "|>", "<|", "s>",
          "0", "-1", "nan"]


def pick(rng, options):
    return options[rng.integers(len(options))]


def random_text(rng, pieces, most=8):
    return "".join(pick(rng, pieces) for _ in range(rng.integers(most + 1)))


def random_messages(rng, text):
    """At least one of them the user's."""
    roles = [pick(rng, ROLES) for _ in range(rng.integers(4))] + ["user"]
    rng.shuffle(roles)
    return [dict(role=str(role), content=text()) for role in roles]


# Files


def random_value(rng, depth=0):
    """Any JSON value."""
    kind = rng.integers(12 if depth < 2 else 9)
    if kind >= 9:
        inside = [random_value(rng, depth + 1) for _ in range(rng.integers(3))]
        return inside if kind < 11 else dict(zip(("role", "content"), inside, strict=False))
    huge = 10 ** int(rng.integers(30, 4000))
    text = random_text(rng, PIECES)
    return [None, True, 0, -3.5, huge, float("nan"), float("inf"), "DEEP", text][kind]


def random_line(rng):
    """A row of one of the kinds: half of them whole, half with something wrong. -> bytes"""
    def text():
        half_a_character = "\ud800" if rng.random() < 0.03 else ""
        return random_text(rng, PIECES) + half_a_character

    row = dict.fromkeys(pick(rng, KINDS))
    for key in row:
        row[key] = text()
    row["prompt"] = random_messages(rng, text) if rng.random() < 0.3 else "ask " + text()
    if "reward" in row:
        row["reward"] = float(rng.normal())
    row |= {key: value for key, value in OPTIONAL.items() if rng.random() < 0.2}
    if rng.random() < 0.5:
        return json.dumps(row).encode()
    if rng.random() < 0.7:
        row[pick(rng, [*row, "reward", "ended", "ids", "policy"])] = random_value(rng)
    if rng.random() < 0.2:
        del row[pick(rng, list(row))]
    if rng.random() < 0.2 and isinstance(row.get("prompt"), list) and row["prompt"]:
        row["prompt"][0] = random_value(rng)
    try:
        line = json.dumps(row, ensure_ascii=bool(rng.random() < 0.5)).encode()
    except UnicodeEncodeError:                          # half a character
        line = json.dumps(row).encode()
    if rng.random() < 0.2:
        at = rng.integers(len(line))
        garbage = pick(rng, [b"", b"\xff", b"\0", b"}", b"\xef\xbb\xbf", line])
        line = line[:at] + garbage + line[at + 1:]
    depth = int(rng.integers(1500))                     # Python gives up at about 1,000
    return line.replace(b"\n", b" ").replace(b'"DEEP"', b"[" * depth + b"]" * depth)


@pytest.mark.parametrize("seed", range(4))
def test_a_file_is_read_or_refused_in_one_line(seed):
    """And whatever is read can be packed, framed and scored."""
    tok = toy.tokenizer()
    file = path("fuzz.jsonl")
    readers = [lambda: train_gvm.Labelled([file]), lambda: common.read_rows(file, KINDS[2]),
               lambda: common.read_rows(file, KINDS[3]),
               lambda: common.read_pairs([file], tok, 64)]
    read = refused = 0
    for case in range(150):
        rng = np.random.default_rng([seed, case])
        lines = [random_line(rng) for _ in range(rng.integers(1, 4))]
        for line in lines:
            with contextlib.suppress(ValueError):
                check_row(line, KINDS)
        with open(file, "wb") as f:
            f.write(b"\n".join(lines))
        for reader in readers:
            with contextlib.redirect_stderr(io.StringIO()) as said:
                try:
                    rows = reader()
                except SystemExit as e:
                    rows = None
                    assert e.code == 2, (seed, case)
            errors = [line for line in said.getvalue().splitlines() if "left out" not in line]
            if rows is None:
                refused += 1
                assert len(errors) == 1 and errors[0].startswith("error: "), (seed, case, errors)
                continue
            read += 1
            assert not errors and rows, (seed, case, errors)
            if reader in readers[:2]:                   # of which the answers were checked
                packed = [common.pack(tok, row, rows[:2], 64, 9) for row in rows]
                common.packed_frame(packed)
            if isinstance(rows, train_gvm.Labelled):
                rows.penalise(0.5)
                score = train_gvm.training_frame(packed, "cpu")[-1]
                answers = sum(len(spans) for _, spans in packed)
                assert score.isfinite().sum() == answers, (seed, case)
    assert min(read, refused) > 50, (read, refused)


def test_what_random_rows_found():
    """A pair with a reward of its own is a pair; an answer of nothing, cut, is left out."""
    pair = dict(prompt="a", chosen="b", rejected="c", reward=7)
    toy.write_jsonl(path("fuzz.jsonl"), [pair, dict(pair, rejected=" ", rejected_ended=False)])
    with contextlib.redirect_stderr(io.StringIO()) as said:
        rows = train_gvm.Labelled([path("fuzz.jsonl")])
    assert [(row["response"], row["reward"]) for row in rows] == [("b", 1.0), ("c", -1.0)]
    assert "left out 1 with an empty answer that was cut" in said.getvalue()


# Templates


def plain_bos_is_eos():
    """GPT-2's: no template, one token for bos and eos, which nothing adds."""
    tok = quirky_tokenizer("qwen3")
    tok.chat_template = None
    tok.bos_token = tok.eos_token = "<|endoftext|>"
    return tok


TOKENIZERS = dict(
    llama=lambda: quirky_tokenizer("llama"), mistral=lambda: quirky_tokenizer("mistral"),
    smollm2=lambda: quirky_tokenizer("smollm2"), qwen3=lambda: quirky_tokenizer("qwen3"),
    gpt2=plain_bos_is_eos, toy=toy.tokenizer)


def control_tokens(tok):
    return [token.content for token in tok.added_tokens_decoder.values() if token.special]


def as_text(tok, text):
    """What a user wrote, with a space in each string that would be a control token."""
    for name in control_tokens(tok):
        text = text.replace(name, name[0] + " " + name[1:])
    return text


def written(kind, tok, prompt):
    """The prompt in its template, without the bos that opens a text."""
    messages = [dict(role="user", content=prompt)] if isinstance(prompt, str) else prompt
    text = ""
    for role, said in ((m["role"], as_text(tok, m["content"])) for m in messages):
        if tok.chat_template == CHATML_TEMPLATE:
            text += f"<|im_start|>{role}\n{said}<|im_end|>\n"
        elif kind == "mistral":
            text += f"[INST] {said} [/INST]" if role == "user" else said + "</s>"
        elif kind == "toy":
            text += f" <user> {said}" if role == "user" else f" <assistant> {said} <eos>"
        else:
            text += f"### {role.capitalize()}:\n{said}\n\n"
    chatml, plain = "<|im_start|>assistant\n", "### Assistant:\n"
    ends = dict(mistral="", toy=" <assistant> ", llama=plain, gpt2=plain)
    return text + ends.get(kind, chatml)


def random_rows(rng, tok, kind):
    """A row and those before it."""
    words = [f" {word} " for word in toy.WORDS]
    pieces = words if kind == "toy" else [*words, *PIECES, *control_tokens(tok)]

    def text():
        return random_text(rng, pieces)

    rows = []
    for _ in range(rng.integers(1, 4)):
        prompt = random_messages(rng, text) if rng.random() < 0.5 else text()
        answer = "so " + text()
        ended = bool(rng.random() < 0.7)
        rows.append(dict(prompt=prompt, response=answer, ended=ended, reward=1.0))
    return rows


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_tokens_say_what_the_text_said(kind):
    """Packed rows that are not cut, decoded: template, text, one bos, an eos where it ended."""
    tok = TOKENIZERS[kind]()
    bos = {"llama": "<|begin_of_text|>", "mistral": "<s>", "toy": "<bos>"}.get(kind, "")
    for seed in range(60):
        *before, row = random_rows(np.random.default_rng(seed), tok, kind)
        ids, spans = common.pack(tok, row, before, 9999, 9999)
        want = bos
        for r, (_, begin, end) in zip([*before, row], spans, strict=True):
            answer = as_text(tok, r["response"]) + (tok.eos_token if r["ended"] else "")
            want += written(kind, tok, r["prompt"]) + (" " if kind == "toy" else "") + answer
            if kind == "toy":
                want = want.replace("<eos>", " <eos>")
            else:
                assert tok.decode(ids[begin:end]) == answer, seed
            assert ids[begin:end].count(tok.eos_token_id) == r["ended"], seed
        found = tok.decode(ids)
        if kind == "toy":                               # of words, which one space separates
            found = found.split()
            want = want.split()
        assert found == want, seed
        assert not bos or ids.count(tok.bos_token_id) == 1, seed


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_masks_cover_exactly_the_responses(kind):
    """Cut or not: each row within its lengths, the mask on its answers, padding outside."""
    tok = TOKENIZERS[kind]()
    for seed in range(40):
        rng = np.random.default_rng(seed)
        max_length, tau_length = int(rng.integers(2, 200)), int(rng.integers(1, 20))
        groups = [random_rows(rng, tok, kind) for _ in range(3)]
        packed = [common.pack(tok, row, before, max_length, tau_length) for *before, row in groups]
        ids, attn, mask = common.packed_frame(packed)
        for b, (*before, row) in enumerate(groups):
            tokens, spans = packed[b]
            assert len(tokens) <= max_length, seed
            assert spans[-1][0] is row and spans[-1][2] == len(tokens), seed
            half, begin = max_length // 2, spans[-1][1]
            prompt = common.encode_prompt(tok, row["prompt"])
            if len(prompt) > half:                      # what opens every prompt, and its end
                every = [common.encode_prompt(tok, text) for text in "ab"]
                opening = os.path.commonprefix([*every, prompt])[:half // 2]
                prompt = opening + prompt[len(prompt) + len(opening) - half:]
            kept = len(prompt) - 1                      # behind a tau its bos may be gone
            assert begin <= half and tokens[begin - kept:begin] == prompt[1:], seed
            assert len(spans) > 1 or tokens[:begin] == prompt, seed
            answers, last_end = [], 0
            for r, begin, end in spans:
                whole = common.encode_row(tok, r)
                most = max_length - begin if r is row else tau_length
                assert tokens[begin:end] == whole[:most] and last_end < begin < end, seed
                answers += tokens[begin:end]
                last_end = end
            assert all(r in before for r, _, _ in spans[:-1]), seed
            assert ids[b][attn[b].bool()].tolist() == tokens, seed
            assert ids[b, -mask.shape[1]:][mask[b]].tolist() == answers, seed
            assert attn[b, -mask.shape[1] - 1] == 1, seed               # the last prompt token


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_tau_fits(kind):
    """At least one pair, no more than asked for, within its room; bos in front alone."""
    tok = TOKENIZERS[kind]()
    for seed in range(60):
        rng = np.random.default_rng(seed)
        rows = list(itertools.chain(*(random_rows(rng, tok, kind) for _ in range(3))))
        prompts = [common.encode_prompt(tok, row["prompt"]) for row in rows]
        answers = [common.encode_row(tok, row) for row in rows]
        tau_length = int(rng.integers(1, 20))
        room, pairs = tau_length + int(rng.integers(1, 150)), int(rng.integers(1, 4))
        ids, shown = common.draw_tau(tok, (prompts, answers), pairs, room, tau_length, rng)
        assert 1 <= shown <= pairs and 0 < len(ids) <= room, seed
        assert kind in ("smollm2", "gpt2") or tok.bos_token_id not in ids[1:], seed


def test_every_id_that_ends_an_answer():
    """The tokenizer's eos beside none, one or many of the generation configuration."""
    tok = toy.tokenizer()
    for seed in range(50):
        rng = np.random.default_rng(seed)
        named = [int(i) for i in rng.integers(0, 50, rng.integers(0, 5))]
        for given in (named, None, named[0] if named else None):
            config = types.SimpleNamespace(eos_token_id=given)
            lm = types.SimpleNamespace(generation_config=config, device="cpu")
            listed = given if isinstance(given, list) else [given]
            found = common.LM.end_ids(types.SimpleNamespace(lm=lm), tok).tolist()
            assert found == sorted({2, *listed} - {None}), (seed, given)


def test_a_template_that_refuses_its_roles():
    """Mistral's wants user and assistant in turn: one line, not a traceback."""
    tok = quirky_tokenizer("mistral")
    tok.chat_template = "{{ raise_exception('Conversation roles must alternate') }}"
    with contextlib.redirect_stderr(io.StringIO()) as said, pytest.raises(SystemExit) as e:
        common.encode_prompt(tok, [dict(role=role, content="x") for role in ("system", "user")])
    assert e.value.code == 2 and len(said.getvalue().splitlines()) == 1
    assert "system, user" in said.getvalue() and "must alternate" in said.getvalue()
