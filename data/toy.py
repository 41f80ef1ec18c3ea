"""The toy: restaurant reviews whose true reward, and true value of every token, are known exactly.

    prompt    review the soup and the staff .
    response  well , the soup was not awful . the staff was very friendly .

Gold reward: for each of the two requested nouns, +1/2 if the response holds exactly one well-formed clause
about it and that clause is positive ("not" flips the meaning), else -1/2; so it lies in [-1, 1].

The offline data come from behaviour policies that differ in how often they choose a kind word and how often
they blunder (wrong noun, early stop, stutter, a word out of place). Each is a Markov chain over a few
thousand states that the text so far determines, so Q(s, a), the expected gold reward once the policy goes on
from there, is the solution of one linear system: `true_q` is exact. No benchmark of real text has this.

    python data/toy.py                      writes data/toy/, a few seconds

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

NOUNS = "soup staff room pasta wine music".split()
POSITIVE = "great lovely friendly warm fresh superb kind tasty fair bright calm neat pretty rich".split()
NEGATIVE = "awful rude bland cold slow stale dirty dull sour grim loud shabby greasy sad".split()
INTENSIFIERS = "very so rather".split()
OPENERS = "well honestly overall".split()
WORDS = NOUNS + POSITIVE + NEGATIVE + INTENSIFIERS + OPENERS + "review the and was not , .".split()
EOS, STUTTER = "<eos>", "<stutter>"


class Policy(NamedTuple):
    """How a behaviour policy writes: the probability of each choice and of each kind of blunder."""
    kind: float                                         # says something positive about the noun
    wrong: float = 0.01                                 # answers a noun nobody asked for
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

# ----------------------------------------------------------------------------------------------------
# The grammar: what the text so far amounts to. A clause is "the NOUN was [not] [very|so|rather] ADJECTIVE ."


class State(NamedTuple):
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
    nouns = [w for w in prompt.split() if w in NOUNS]
    if len(nouns) != 2:
        raise ValueError(f"not a prompt of the toy: {prompt!r}")
    return nouns


def read(prompt, text):
    """State after the words of `text` (up to <eos>), and whether it has ended."""
    nouns, state = requested(prompt), State()
    for word in text.split():
        if word == EOS:
            return state, True
        state = advance(state, word, nouns)
    return state, False


def gold_reward(prompt, response):
    """The true reward of a response, in [-1, 1]. Any text is allowed."""
    return reward_of(read(prompt, response)[0])


# ----------------------------------------------------------------------------------------------------
# The behaviour policies: one distribution over the next word for each state


def next_words(state, policy, nouns):
    """{word: probability} of what `policy` (a Policy) says next; sums to 1."""
    p, out = policy, {}

    def say(words, weight):
        for word in words:
            out[word] = out.get(word, 0.0) + weight / len(words)

    say(WORDS, p.slip)                                  # blunders first ...
    free = 1 - p.slip
    if state.at in ("the", "noun", "was", "not", "very", "adjective"):
        say([STUTTER], p.stutter)
        free -= p.stutter

    at, opener = state.at, p.opener if state.at == "start" else 0.0         # ... then the intended word
    if at in ("start", "clause"):
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
    nouns, state, words = requested(prompt), State(), []
    while True:
        choices = next_words(state, POLICIES[policy], nouns)
        word = str(rng.choice(list(choices), p=list(choices.values())))
        if word == EOS:
            return " ".join(words)
        words.append(words[-1] if word == STUTTER else word)
        state = advance(state, words[-1], nouns)


@functools.lru_cache(None)
def values(policy):
    """{state: expected gold reward from there on under the named policy}, exact.

    V = P V + p(eos) reward, over every state that some text can reach, so that prefixes the policy would
    never write have a value too. Which two nouns are asked for does not matter: one table serves all prompts.
    """
    nouns, index, queue = NOUNS[:2], {State(): 0}, [State()]
    for state in queue:                                 # breadth first; the queue grows as we go
        for after in (advance(state, word, nouns) for word in WORDS):
            if after not in index:
                index[after] = len(index)
                queue.append(after)
    P, r = np.zeros((len(index), len(index))), np.zeros(len(index))
    for state, i in index.items():
        for word, q in next_words(state, POLICIES[policy], nouns).items():
            if word == EOS:
                r[i] += q * reward_of(state)
            else:                                       # STUTTER, no word of the grammar, breaks the clause
                P[i, index[advance(state, word, nouns)]] += q
    V = np.linalg.solve(np.eye(len(index)) - P, r)
    return {state: float(V[i]) for state, i in index.items()}


def true_q(prompt, prefix, policy):
    """Q(s, a): expected gold reward when `policy` (a name) goes on after `prefix`, whose last word is a.

    An empty prefix gives V(s_0); a prefix that ends in <eos> gives its gold reward.
    """
    state, ended = read(prompt, prefix)
    return reward_of(state) if ended else values(policy)[state]


# ----------------------------------------------------------------------------------------------------
# The files


def tokenizer():
    """One token a word. Chat template: <bos> <user> prompt <assistant> response <eos>."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

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
    from transformers import GPT2Config

    return GPT2Config(vocab_size=len(tok), n_positions=256, n_embd=64, n_layer=2, n_head=4,
                      initializer_range=0.1, activation_function="gelu_pytorch_tanh", resid_pdrop=0.0,
                      embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=tok.bos_token_id,
                      eos_token_id=tok.eos_token_id, pad_token_id=tok.pad_token_id)


def write_jsonl(path, rows):
    with open(path, "w") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)
    print(f"{path}: {len(rows):,} rows")


def pair_up(rows, rng):
    """Labelled rows -> pairs {prompt, chosen, rejected, ...}, shuffled: each row against one other."""
    by_prompt, pairs = {}, []
    for row in rows:
        by_prompt.setdefault(json.dumps(row["prompt"]), []).append(row)
    for group in by_prompt.values():
        for a, b in zip(group, rng.permutation(np.array(group, dtype=object)), strict=False):
            if a["reward"] != b["reward"]:
                win, lose = (a, b) if a["reward"] > b["reward"] else (b, a)
                pair = dict(prompt=a["prompt"], chosen=win["response"], rejected=lose["response"])
                for side, row in ("chosen", win), ("rejected", lose):
                    more = [key for key in ("policy", "ended", "ids") if key in row]
                    pair |= {f"{side}_{key}": row[key] for key in more}     # tools/label.py writes all
                    pair |= {"tokenizer": row["tokenizer"]} if "tokenizer" in row else {}
                pairs.append(pair)
    rng.shuffle(pairs)
    return pairs


def make(out, seed=0, sft_rows=4000, rows_per_policy=5000, heldout_rows_per_policy=150):
    """Write the whole world into the folder `out`; the same arguments give the same files, byte for byte."""
    import torch
    from transformers import GPT2LMHeadModel
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()

    os.makedirs(out, exist_ok=True)
    tok = tokenizer()
    tok.save_pretrained(os.path.join(out, "model"))
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(model_config(tok))
    # Positions start as sinusoids (arXiv 1706.03762), in which an offset is a rotation: a tau shifts the
    # prompt to many places, and from random positions each would have to be learned by itself.
    d = model.config.n_embd
    angle = torch.arange(256)[:, None] / 10_000**(torch.arange(0, d, 2) / d)
    model.transformer.wpe.weight.data = 0.3 * torch.stack([angle.sin(), angle.cos()], -1).flatten(1)
    model.save_pretrained(os.path.join(out, "model"))
    rng = np.random.default_rng(seed)
    prompts = [f"review the {a} and the {b} ." for a, b in itertools.permutations(NOUNS, 2)]
    rng.shuffle(prompts)
    parts = ("", sft_rows, rows_per_policy), ("_heldout", sft_rows // 10, heldout_rows_per_policy)
    for part, n_sft, n in parts:

        def draw(policy):
            """Labelled responses of one policy, the prompts in turn, without end."""
            for prompt in itertools.cycle(str(p) for p in rng.permutation(prompts)):
                text = sample(prompt, policy, rng)
                yield dict(prompt=prompt, response=text, reward=gold_reward(prompt, text), policy=policy)

        # Demonstrations come from everyone, and most of them stand at the end of a longer conversation with
        # the same author, as chat data do: the SFT model, trunk of the GVM, knows its way about behind a tau.
        sft = []
        for policy, share in SFT_MIX.items():
            turns = draw(policy)
            for row in itertools.islice(turns, round(share * n_sft)):
                said = []
                for r in itertools.islice(turns, int(rng.choice([0, 1, 1, 2, 2]))):
                    said.append(dict(role="user", content=r["prompt"]))
                    said.append(dict(role="assistant", content=r["response"]))
                prompt = [*said, dict(role="user", content=row["prompt"])] if said else row["prompt"]
                sft.append(dict(prompt=prompt, response=row["response"]))
        rng.shuffle(sft)
        rows = [r for policy in POLICIES for r in itertools.islice(draw(policy), n)]
        rng.shuffle(rows)
        pairs = pair_up(rows, rng)                      # the reward model sees the same rows as the GVM
        write_jsonl(os.path.join(out, f"sft{part}.jsonl"), sft)
        write_jsonl(os.path.join(out, f"gvm{part}.jsonl"), rows)
        write_jsonl(os.path.join(out, f"pairs{part}.jsonl"), pairs)
        write_jsonl(os.path.join(out, f"prompts{part}.jsonl"), [{"prompt": p} for p in prompts])


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="data/toy", help="folder to write (default: data/toy)")
    parser.add_argument("--seed", type=int, default=0, help="seed of every draw (default: 0)")
    args = parser.parse_args(argv)
    make(args.out, args.seed)
    for name in POLICIES:
        print(f"{name:>8}: true mean reward {true_q('review the soup and the staff .', '', name):+.3f}")


if __name__ == "__main__":
    main()
