"""The toy: restaurant reviews whose true reward, and true value of every token, are known exactly.

    prompt    review the soup and the staff .
    response  well , the soup was not awful . the staff was very friendly .

Gold reward: for each of the two requested nouns, +1/2 if the response has exactly one well-formed clause
about it and that clause is positive ("not" flips the meaning), else -1/2. So it is in [-1, 1].

The offline data come from behaviour policies that differ in how often they choose a kind word and how often
they make mistakes. Each is a Markov chain over a few thousand states, and the text so far determines the
state. So Q(s, a), the expected gold reward after the token a, is the solution of a linear system: `true_q`.

    python data/toy.py                      writes data/toy/ in a few seconds

    model/                                  word-level tokenizer and an untrained two-layer GPT-2
    sft.jsonl, sft_heldout.jsonl            {prompt, response}                      sft.py
    gvm.jsonl, gvm_heldout.jsonl            {prompt, response, reward, policy}      train_gvm.py
    pairs.jsonl, pairs_heldout.jsonl        {prompt, chosen, rejected, ...}         ppo_baseline.py
    prompts.jsonl, prompts_heldout.jsonl    {prompt}                                dvpo.py, ppo_baseline.py
"""
import argparse
import functools
import itertools
import json
import os
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

NOUNS = "soup staff room pasta wine music".split()
POSITIVE = "great lovely friendly warm fresh superb kind tasty fair bright calm neat pretty rich".split()
NEGATIVE = "awful rude bland cold slow stale dirty dull sour grim loud shabby greasy sad".split()
INTENSIFIERS = "very so rather".split()
OPENERS = "well honestly overall".split()
WORDS = NOUNS + POSITIVE + NEGATIVE + INTENSIFIERS + OPENERS + "review the and was not , .".split()
EOS, STUTTER = "<eos>", "<stutter>"


class Policy(NamedTuple):
    """How a behaviour policy writes: the probability of each choice and of each kind of mistake."""
    kind: float                                         # says something positive about the noun
    wrong: float = 0.01                                 # reviews a noun that was not requested
    stop: float = 0.02                                  # ends before both nouns are reviewed
    stutter: float = 0.002                              # says the same word twice; the clause is lost
    slip: float = 0.003                                 # a random word in place of the right one
    more: float = 0.05                                  # adds a clause after the second one
    negate: float = 0.3                                 # uses "not" where it can
    intensify: float = 0.2
    opener: float = 0.4


POLICIES = {
    "expert": Policy(kind=0.99, wrong=0.005, stop=0.005, more=0.02),
    "good": Policy(kind=0.94, stop=0.02),
    "average": Policy(kind=0.84, stop=0.04),
    "clumsy": Policy(kind=0.22, wrong=0.12, stop=0.10, stutter=0.02, slip=0.02, more=0.1),
    "poor": Policy(kind=0.03, wrong=0.03, stop=0.08, stutter=0.01, slip=0.01),
}
SFT_MIX = {"expert": 0.15, "good": 0.1, "average": 0.45, "clumsy": 0.15, "poor": 0.15}

# The grammar. A clause is "the NOUN was [not] [very|so|rather] ADJECTIVE ."

class State(NamedTuple):
    """What matters of the text so far."""
    clauses: int = 0                                    # full stops so far, counted up to 3
    credit: tuple = (0, 0)      # of each requested noun: 0 no clause, 1 a positive, -1 a negative, 2 several
    at: str = "start"           # start opener clause the noun was not very adjective broken
    noun: int = -1              # of the clause under way: 0 or 1 a requested noun, 2 another one
    negated: bool = False
    positive: bool = False


def advance(state, word, nouns):
    """The state after one more word. Any word may follow any other; a broken clause is lost."""
    if word == ".":
        credit = list(state.credit)
        if state.at == "adjective" and state.noun < 2:
            credit[state.noun] = 2 if credit[state.noun] else (1 if state.positive else -1)
        return State(min(state.clauses + 1, 3), tuple(credit), "clause")
    at = state.at
    if at == "start" and word in OPENERS:
        return state._replace(at="opener")
    if at == "opener" and word == ",":
        return state._replace(at="clause")
    if at in ("start", "clause") and word == "the":
        return state._replace(at="the")
    if at == "the" and word in NOUNS:
        return state._replace(at="noun", noun=nouns.index(word) if word in nouns else 2)
    if at == "noun" and word == "was":
        return state._replace(at="was")
    if at == "was" and word == "not":
        return state._replace(at="not", negated=True)
    if at in ("was", "not") and word in INTENSIFIERS:
        return state._replace(at="very")
    if at in ("was", "not", "very") and word in POSITIVE + NEGATIVE:
        return state._replace(at="adjective", positive=(word in POSITIVE) != state.negated)
    return State(state.clauses, state.credit, "broken")


def reward_of(state):
    return sum(0.5 if c == 1 else -0.5 for c in state.credit)


def requested(prompt):
    """The two nouns that a prompt (a string, or messages of which the last counts) asks for."""
    prompt = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    nouns = tuple(w for w in prompt.split() if w in NOUNS)
    if len(nouns) != 2:
        raise ValueError(f"not a prompt of the toy: {prompt!r}")
    return nouns


def read(prompt, text):
    """State after the words of `text` (up to <eos>), and whether it has ended."""
    nouns = requested(prompt)
    state = State()
    for word in text.split():
        if word == EOS:
            return state, True
        state = advance(state, word, nouns)
    return state, False


def gold_reward(prompt, response):
    """The true reward of a response, in [-1, 1]. Any text is allowed."""
    return reward_of(read(prompt, response)[0])


# The behaviour policies: one distribution over the next word for each state

@functools.cache
def next_words(state, p, nouns):
    """{word: probability} of what the Policy p says next; sums to 1."""
    at = state.at
    out = {}

    def say(words, weight):
        for word in words:
            out[word] = out.get(word, 0.0) + weight / len(words)

    say(WORDS, p.slip)                                  # mistakes first, then the intended word
    free = 1 - p.slip
    if at in ("the", "noun", "was", "not", "very", "adjective"):
        say([STUTTER], p.stutter)
        free -= p.stutter
    if at in ("start", "clause"):
        opener = p.opener if at == "start" else 0.0
        end = p.stop if state.clauses < 2 else 1 - p.more if state.clauses < 3 else 1.0
        say(OPENERS, free * opener)
        say([EOS], free * (1 - opener) * end)
        say(["the"], free * (1 - opener) * (1 - end))
    elif at == "opener":
        say([","], free)
    elif at == "the":
        say([n for n in NOUNS if n not in nouns], free * p.wrong)
        say([nouns[state.clauses]] if state.clauses < 2 else nouns, free * (1 - p.wrong))
    elif at == "noun":
        say(["was"], free)
    elif at in ("was", "not", "very"):
        negate = p.negate if at == "was" else 0.0
        intensify = p.intensify if at != "very" else 0.0
        kind, unkind = (NEGATIVE, POSITIVE) if state.negated else (POSITIVE, NEGATIVE)
        say(["not"], free * negate)
        say(INTENSIFIERS, free * (1 - negate) * intensify)
        say(kind, free * (1 - negate) * (1 - intensify) * p.kind)
        say(unkind, free * (1 - negate) * (1 - intensify) * (1 - p.kind))
    else:                                               # adjective, broken: close the clause
        say(["."], free)
    return {word: q for word, q in out.items() if q > 0}


def sample(prompt, policy, rng):
    """One response of a behaviour policy (by name), as text without <eos>."""
    nouns = requested(prompt)
    state = State()
    words = []
    while True:
        choices = next_words(state, POLICIES[policy], nouns)
        word = str(rng.choice(list(choices), p=list(choices.values())))
        if word == EOS:
            return " ".join(words)
        words.append(words[-1] if word == STUTTER else word)
        state = advance(state, words[-1], nouns)


@functools.cache
def values(policy):
    """{state: expected gold reward from there on under the named policy}, exact.

    V = P V + p(eos) reward, over every state that some text can reach, also where the policy would not write
    that text. The values do not depend on which two nouns are requested: one table serves all prompts.
    """
    nouns = tuple(NOUNS[:2])
    index = {State(): 0}
    queue = [State()]
    for state in queue:                                 # breadth first; the queue grows as we go
        for after in (advance(state, word, nouns) for word in WORDS):
            if after not in index:
                index[after] = len(index)
                queue.append(after)
    P = np.zeros((len(index), len(index)))
    r = np.zeros(len(index))
    for state, i in index.items():
        for word, q in next_words(state, POLICIES[policy], nouns).items():
            if word == EOS:
                r[i] += q * reward_of(state)
            else:                                       # STUTTER is not in the grammar: it breaks the clause
                P[i, index[advance(state, word, nouns)]] += q
    V = np.linalg.solve(np.eye(len(index)) - P, r)
    return {state: float(V[i]) for state, i in index.items()}


def true_q(prompt, prefix, policy):
    """Q(s, a): expected gold reward when the named policy continues `prefix`, whose last word is a.

    An empty prefix gives V(s_0); a prefix that ends in <eos> gives its gold reward.
    """
    state, ended = read(prompt, prefix)
    return reward_of(state) if ended else values(policy)[state]


# The files

def tokenizer():
    """One token a word. Chat template: <bos> <user> prompt <assistant> response <eos>."""
    special = ["<pad>", "<bos>", EOS, "<unk>", "<user>", "<assistant>"]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(special + WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token=EOS, unk_token="<unk>",
        additional_special_tokens=["<user>", "<assistant>"], model_max_length=256,
        chat_template="<bos>{% for m in messages %}{% if m.role == 'user' %} <user> {{ m.content }}"
        "{% else %} <assistant> {{ m.content }} <eos>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %} <assistant>{% endif %}")


def model_config(tok):
    return GPT2Config(vocab_size=len(tok), n_positions=256, n_embd=64, n_layer=2, n_head=4,
                      initializer_range=0.1, activation_function="gelu_pytorch_tanh", resid_pdrop=0.0,
                      embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=tok.bos_token_id,
                      eos_token_id=tok.eos_token_id, pad_token_id=tok.pad_token_id)


def write_jsonl(path, rows):
    with open(path + ".part", "w") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)
    os.replace(path + ".part", path)                    # complete, or not there
    print(f"{path}: {len(rows):,} rows")


def pair_up(rows, rng):
    """Labelled rows -> pairs {prompt, chosen, rejected, ...}, shuffled: each row against one other."""
    by_prompt = {}
    for row in rows:
        by_prompt.setdefault(json.dumps(row["prompt"]), []).append(row)
    pairs = []
    for group in by_prompt.values():
        for a, b in zip(group, rng.permutation(np.array(group, dtype=object)), strict=True):
            if a["reward"] == b["reward"]:
                continue
            rejected, chosen = sorted((a, b), key=lambda row: row["reward"])
            pair = dict(prompt=a["prompt"], chosen=chosen["response"], rejected=rejected["response"])
            for side, row in ("chosen", chosen), ("rejected", rejected):
                about = [key for key in ("policy", "ended", "ids") if key in row]
                pair |= {f"{side}_{key}": row[key] for key in about}
            if "tokenizer" in a:                        # as in rows from tools/label.py
                pair["tokenizer"] = a["tokenizer"]
            pairs.append(pair)
    rng.shuffle(pairs)
    return pairs


def untrained_model(tok):
    model = GPT2LMHeadModel(model_config(tok))
    # Positions start as sinusoids (arXiv 1706.03762), for which a shift is a rotation: a tau shifts the
    # prompt to many places, and random positions would have to be learned one by one.
    d = model.config.n_embd
    angle = torch.arange(256)[:, None] / 10_000**(torch.arange(0, d, 2) / d)
    model.transformer.wpe.weight.data = 0.3 * torch.stack([angle.sin(), angle.cos()], -1).flatten(1)
    return model


def draw(policy, prompts, rng):
    """Endless labelled responses of one policy, to the prompts in turn."""
    for prompt in itertools.cycle(str(p) for p in rng.permutation(prompts)):
        text = sample(prompt, policy, rng)
        yield dict(prompt=prompt, response=text, reward=gold_reward(prompt, text), policy=policy)


def demonstrations(n, prompts, rng):
    """Rows for SFT, most of them at the end of a conversation: behind a tau the GVM's trunk reads one."""
    rows = []
    for policy, share in SFT_MIX.items():
        drawn = draw(policy, prompts, rng)
        for row in itertools.islice(drawn, round(share * n)):
            turns = []
            for before in itertools.islice(drawn, int(rng.choice([0, 1, 1, 2, 2]))):
                turns.append(dict(role="user", content=before["prompt"]))
                turns.append(dict(role="assistant", content=before["response"]))
            prompt = [*turns, dict(role="user", content=row["prompt"])] if turns else row["prompt"]
            rows.append(dict(prompt=prompt, response=row["response"]))
    rng.shuffle(rows)
    return rows


def make(out, seed=0, sft_rows=4000, rows_per_policy=5000, heldout_rows_per_policy=150):
    """Write model and data into the folder `out`; the same arguments give the same files, byte for byte."""
    torch.manual_seed(seed)
    tok = tokenizer()
    for part in tok, untrained_model(tok):
        part.save_pretrained(os.path.join(out, "model"))
    rng = np.random.default_rng(seed)
    prompts = [f"review the {a} and the {b} ." for a, b in itertools.permutations(NOUNS, 2)]
    rng.shuffle(prompts)
    parts = ("", sft_rows, rows_per_policy), ("_heldout", sft_rows // 10, heldout_rows_per_policy)
    for part, n_sft, n in parts:
        sft = demonstrations(n_sft, prompts, rng)
        rows = [r for policy in POLICIES for r in itertools.islice(draw(policy, prompts, rng), n)]
        rng.shuffle(rows)
        pairs = pair_up(rows, rng)                      # the reward model sees the same rows as the GVM
        asked = [dict(prompt=prompt) for prompt in prompts]
        for name, data in dict(sft=sft, gvm=rows, pairs=pairs, prompts=asked).items():
            write_jsonl(os.path.join(out, f"{name}{part}.jsonl"), data)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", default="data/toy", help="folder to write (default: %(default)s)")
    make(p.parse_args(argv).out)


if __name__ == "__main__":
    main()
