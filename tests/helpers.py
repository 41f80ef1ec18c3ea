"""What several test files share: the little world, the stages as functions, two ranks."""
import contextlib
import fcntl
import glob
import importlib
import io
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from unittest import mock

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import common
import dvpo
import ppo_baseline
import sft
import train_gvm
from data import toy
from runtime import processes

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

SHARED = os.environ.setdefault("DVPO_TEST_FOLDER", tempfile.mkdtemp(prefix="dvpo_test_"))    # of all workers
TMP = tempfile.mkdtemp(dir=SHARED)                      # of this one
PROMPT = "review the soup and the staff ."


def close(a, b, tol=1e-6):
    a, b = (torch.as_tensor(x, dtype=torch.float64).detach() for x in (a, b))
    assert a.shape == b.shape and (a - b).abs().max() <= tol, (a, b)


def tiny_gpt2(seed=0):
    torch.manual_seed(seed)
    from transformers import GPT2LMHeadModel

    return common.LM(GPT2LMHeadModel(toy.model_config(toy.tokenizer()))).eval()


def tiny_llama(seed=0):
    torch.manual_seed(seed)
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(vocab_size=len(toy.tokenizer()), hidden_size=32, intermediate_size=64,
                         num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                         max_position_embeddings=256, initializer_range=0.3, bos_token_id=1, eos_token_id=2,
                         pad_token_id=0)
    return common.LM(LlamaForCausalLM(config)).eval()


def example_frame(tok, pad_left=0):
    prompts = [common.encode_prompt(tok, p) for p in (PROMPT, "review the wine .")]
    said = "the soup was great . the staff was rude .", "the wine was cold ."
    responses = [common.encode_response(tok, text) for text in said]
    ids, attn, mask = common.frame(prompts, responses)
    pad, sides = torch.nn.functional.pad, (pad_left, 0)
    return prompts, responses, pad(ids, sides, value=tok.pad_token_id), pad(attn, sides), mask


def mask_and_first(mask):
    return torch.nn.functional.pad(mask, (1, 0), value=True)


class Args:
    temperature, max_new_tokens, batch_size, max_prompt_length, static_cache = 1.0, 24, 8, 64, False


EVALUATE = common.evaluate.__wrapped__                  # now, as some tests put a mock in its place


@contextlib.contextmanager
def few_answers(n=32):
    """Inside, a stage measures itself on n answers at its end, not on 256."""
    with mock.patch.object(EVALUATE, "__defaults__", (None, n, None)):
        yield


def run(module, *argv):
    """A stage's main(argv) without its output; returns the metrics it wrote."""
    argv = [str(a) for a in argv]
    steps = int(argv[argv.index("--max-steps") + 1]) if "--max-steps" in argv else 1000
    with contextlib.ExitStack() as inside:
        if steps < 9:                                   # nobody looks at what so short a run has learned
            inside.enter_context(few_answers())
        inside.enter_context(contextlib.redirect_stdout(io.StringIO()))
        inside.enter_context(contextlib.redirect_stderr(io.StringIO()))
        module.main(argv)
    out = argv[argv.index("--out") + 1]
    with open(os.path.join(out, "metrics.jsonl")) as f:
        return [json.loads(line) for line in f]


def path(*parts):
    return os.path.join(TMP, *parts)


def world():
    """Data, SFT model and GVM in path(): one worker builds them, in under a minute; the others wait."""
    if os.path.exists(path("gvm")):
        return
    built = os.path.join(SHARED, "world")
    with open(os.path.join(SHARED, "lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not os.path.exists(built):
            build_world()
            os.makedirs(built)
            for name in WORLD:
                shutil.move(path(name), os.path.join(built, name))
    for name in WORLD:
        os.symlink(os.path.join(built, name), path(name))


def build_world():
    with contextlib.redirect_stdout(io.StringIO()):
        toy.make(path("toy"), sft_rows=3000, rows_per_policy=1000, heldout_rows_per_policy=40)
    for name in ("sft", "gvm", "pairs"):                # a few rows, for tests that only want to see it run
        with open(path("toy", name + "_heldout.jsonl")) as full:
            rows = list(itertools.islice(full, 24))
        with open(path("toy", name + "_small.jsonl"), "w") as f:
            f.writelines(rows)
    run(sft, "--init-from", path("toy/model"), "--data", path("toy/sft.jsonl"), "--heldout",
        path("toy/sft_heldout.jsonl"), "--prompts", path("toy/prompts_heldout.jsonl"), "--out", path("sft"),
        "--max-steps", 250)
    run(train_gvm, *GVM, "--out", path("gvm"), "--max-steps", 200, "--tau-pairs", 1, "--batch-size", 48)


WORLD = "toy", "sft", "gvm"
GVM = ("--init-from", path("sft/model"), "--data", path("toy/gvm.jsonl"), "--heldout",
       path("toy/gvm_heldout.jsonl"))

RL = ("--init-from", path("sft/model"), "--data", path("toy/prompts.jsonl"), "--heldout",
      path("toy/prompts_heldout.jsonl"))


def weights(folder):
    from safetensors.torch import load_file

    files = sorted(glob.glob(os.path.join(folder, "*.safetensors")))
    return {name: w for file in files for name, w in load_file(file).items()}


MISTRAL_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}")


CHATML_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


def quirky_tokenizer(kind, **more):
    """Byte-level BPE like Llama-3's (no pad, bos from the post-processor, no eos), Mistral-Instruct's (no
    pad, no spare id, chat template), SmolLM2's (ChatML, whose <|im_start|> is the bos) or Qwen's (no bos)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    if kind == "llama":
        bos, eos, unk, template = "<|begin_of_text|>", "<|end_of_text|>", None, None
        special = [bos, eos, "<|reserved_special_token_0|>"]
    elif kind in ("smollm2", "qwen3"):
        bos, eos, unk, template = "<|im_start|>", "<|im_end|>", None, CHATML_TEMPLATE
        special = ["<|endoftext|>", bos, eos]
    else:
        bos, eos, unk, template = "<s>", "</s>", "<unk>", MISTRAL_TEMPLATE
        special = [unk, bos, eos]
    core = Tokenizer(models.BPE(unk_token=unk))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    core.train_from_iterator([" ".join(toy.WORDS)] * 9, trainer)
    if template != CHATML_TEMPLATE:
        core.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, core.token_to_id(bos))])
    bos = None if kind == "qwen3" else bos
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token=bos, eos_token=eos, unk_token=unk,
                                   chat_template=template, **more)


def quirky_model(kind):
    """A folder with that tokenizer and a two-layer model of that architecture, grouped queries and all."""
    if not os.path.exists(path(kind)):
        from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen3Config

        tok = quirky_tokenizer(kind)
        torch.manual_seed(0)
        configs = dict(llama=LlamaConfig, smollm2=LlamaConfig, mistral=MistralConfig, qwen3=Qwen3Config)
        config = configs[kind](
            vocab_size=len(tok), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048,
            bos_token_id=tok.bos_token_id, eos_token_id=tok.eos_token_id,
            tie_word_embeddings=kind != "mistral")
        model = AutoModelForCausalLM.from_config(config)
        if kind == "mistral":                           # sampling settings that must not sneak in
            model.generation_config.update(do_sample=True, top_k=1, temperature=0.1)
        if kind == "qwen3":                             # two ids end an answer
            model.generation_config.eos_token_id = [tok.eos_token_id, 0]
        model.save_pretrained(path(kind))
        tok.save_pretrained(path(kind))
    return path(kind)


def j(**row):
    return json.dumps(row).encode()


def refused(f, *words):
    """f() ends with exit code 2 and one line on stderr that holds the words."""
    with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()):
        try:
            f()
            raise AssertionError("not refused")
        except SystemExit as e:
            assert e.code == 2
    lines = [line for line in err.getvalue().replace("\r", "\n").splitlines()
             if line.strip() and "it/s]" not in line]               # bars aside
    assert len(lines) == 1 + ("left out" in lines[0]), lines
    assert all(any(word in line for line in lines) for word in words), lines


def resume_cases(zero):
    """(script, flags) of every stage, four steps with a checkpoint after two."""
    common_flags = ("--max-steps", "4", "--save-every", "2", "--zero", zero)
    rl = (*RL, "--batch-size", "16", "--mini-batch-size", "8", "--max-new-tokens", "16", *common_flags)
    gvm = (*GVM[:2], "--data", path("toy/gvm_small.jsonl"), "--heldout", path("toy/gvm_small.jsonl"),
           "--batch-size", "8", "--lora-dropout", "0.1")
    return [("sft", sft, ("--init-from", path("toy/model"), "--data", path("toy/sft_small.jsonl"),
                          "--heldout", path("toy/sft_small.jsonl"), "--prompts",
                          path("toy/prompts_heldout.jsonl"), "--batch-size", "8", *common_flags)),
            ("gvm", train_gvm, (*gvm, *common_flags)), ("dvpo", dvpo, ("--gvm", path("gvm/model"), *rl)),
            ("lora", dvpo, ("--gvm", path("gvm/model"), "--lora", *rl)),
            ("ppo", ppo_baseline, ("--rm", path("rm3", zero, "model"), "--pairs",
                                   path("toy/pairs_small.jsonl"), "--pairs-heldout",
                                   path("toy/pairs_small.jsonl"), "--rm-max-steps", "2", *rl))]


def same_run(a, b):
    """Two lists of metrics, equal bit for bit but for the clock."""
    def drop(rows):
        return [{k: v for k, v in r.items() if not k.startswith("sec") and k != "peak_bytes"} for r in rows]

    assert drop(a) == drop(b), (drop(a), drop(b))


def rewind(out, to):
    """What a run killed after step 3 leaves: its first checkpoint and three lines of metrics."""
    shutil.copytree(out, to)
    shutil.rmtree(os.path.join(to, "checkpoint", "step_4"))
    with open(os.path.join(to, "metrics.jsonl")) as f:
        lines = f.readlines()
    with open(os.path.join(to, "metrics.jsonl"), "w") as f:
        f.writelines(lines[:3])


def ends_with_1(f):
    """f() ends with exit code 1; -> what it said on stderr."""
    with contextlib.redirect_stderr(io.StringIO()) as err, contextlib.redirect_stdout(io.StringIO()):
        try:
            f()
            raise AssertionError("it went on")
        except SystemExit as e:
            assert e.code == 1
    return err.getvalue()


def script(*argv, env=None, timeout=300):
    clean = {k: v for k, v in os.environ.items() if k not in processes.LAUNCHER_VARIABLES}
    return subprocess.run(argv, cwd=HERE, env=dict(clean, **(env or {})), capture_output=True, text=True,
                          timeout=timeout)


NOTHING_STAYS_GATHERED = {                                  # what a model too big to stay gathered would meet
    "gradient_clipping": 1.0, "steps_per_print": 10**9,
    "zero_optimization": {"reduce_bucket_size": 5000, "stage3_max_live_parameters": 0,
                          "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0,
                          "stage3_param_persistence_threshold": 0}}


def zero_3():
    processes.write_json(path("ds3.json"), NOTHING_STAYS_GATHERED)
    return "--zero", "3", "--ds-config", path("ds3.json")


def two_ranks(*commands):
    """Runs (stage, flags) one after the other on two ranks -> the metrics of each. Starting takes longest."""
    done = script(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv-backend",
                  "c10d", "--rdzv-endpoint", "localhost:0", os.path.abspath(__file__),
                  json.dumps([(stage.__name__, argv) for stage, argv in commands]),
                  env=dict(OMP_NUM_THREADS="1"))
    assert done.returncode == 0 and "--compile: going on" not in done.stderr, done.stderr[-3000:]
    return [[json.loads(line) for line in open(os.path.join(argv[argv.index("--out") + 1], "metrics.jsonl"))]
            for _, argv in commands]


def one_rank(commands):
    """What two_ranks runs in each process."""
    common.CHUNK = 64                                   # several chunks of logits, not as many on each rank
    with few_answers():
        for stage, argv in commands:
            importlib.import_module(stage).main(argv)
    processes.finish()


if __name__ == "__main__":
    one_rank(json.loads(sys.argv[1]))
