"""A small Llama with random weights and a byte-level BPE tokenizer of your own text: a start without the hub.

    python tools/scratch_model.py --data FILE.jsonl[.gz] [FILE ...] --out out/scratch
    python sft.py --model out/scratch --data FILE.jsonl ...             then trains it, from nothing

The tokenizer learns from the fields prompt, response, chosen and rejected of every row. Chat template: <bos>
<user> prompt <assistant> response <eos>.
"""
import argparse
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import common

SPECIAL = ["<pad>", "<bos>", "<eos>", "<user>", "<assistant>"]
TEMPLATE = (
    "<bos>{% for m in messages %}"
    "{% if m.role == 'user' %}<user>{{ m.content }}{% else %}<assistant>{{ m.content }}<eos>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}")


def texts(paths):
    """Every text in the rows of the files; messages give theirs one by one."""
    for path in paths:
        for row in common.Progress(common.read_rows(path, []), desc=os.path.basename(path)):
            for key in ("prompt", "response", "chosen", "rejected"):
                value = row.get(key, "")
                yield from [value] if isinstance(value, str) else [m["content"] for m in value]


def tokenizer(paths, vocab, context):
    core = Tokenizer(models.BPE())
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab, special_tokens=SPECIAL, initial_alphabet=alphabet,
                                  show_progress=False)
    core.train_from_iterator(texts(paths), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>",
        additional_special_tokens=SPECIAL[3:], chat_template=TEMPLATE, model_max_length=context,
        clean_up_tokenization_spaces=False)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=common.Help)
    p.add_argument("--data", nargs="+", required=True, help="JSON lines to learn the vocabulary from")
    p.add_argument("--out", default="out/scratch", help="transformers folder to write")
    p.add_argument("--vocab", type=int, default=8192, help="tokens in the vocabulary, at most")
    p.add_argument("--layers", type=int, default=4, help="blocks")
    p.add_argument("--width", type=int, default=256, help="hidden size")
    p.add_argument("--heads", type=int, default=4, help="attention heads")
    p.add_argument("--context", type=int, default=1024, help="positions; prompt + response + tau must fit")
    p.add_argument("--seed", type=int, default=0, help="seed of the weights")
    args = p.parse_args(argv)
    if args.width % (2 * args.heads):
        common.die(f"--width {args.width}: must be a multiple of twice --heads {args.heads}")
    common.check_writable(os.path.join(args.out, "config.json"))
    tok = tokenizer(args.data, args.vocab, args.context)
    torch.manual_seed(args.seed)
    config = LlamaConfig(
        vocab_size=len(tok), max_position_embeddings=args.context, hidden_size=args.width,
        intermediate_size=8 * args.width // 3, num_hidden_layers=args.layers,
        num_attention_heads=args.heads, tie_word_embeddings=True, bos_token_id=tok.bos_token_id,
        eos_token_id=tok.eos_token_id, pad_token_id=tok.pad_token_id)
    model = LlamaForCausalLM(config)
    model.save_pretrained(args.out)
    tok.save_pretrained(args.out)
    print(f"{args.out}: {model.num_parameters():,} parameters, {len(tok):,} tokens")


if __name__ == "__main__":
    main()
