"""A small Llama with random weights, and a byte-level BPE tokenizer trained on your text. Needs no hub.

    python tools/scratch_model.py --data FILE.jsonl[.gz] [FILE ...] --out out/scratch
    python sft.py --model out/scratch --data FILE.jsonl ...             trains the model

The tokenizer is trained on the fields prompt, response, chosen and rejected of every row. Its chat template
is <bos> <user> prompt <assistant> response <eos>.
"""
import argparse
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import torch
from transformers import GPT2Tokenizer, LlamaConfig, LlamaForCausalLM

import common

TEMPLATE = (
    "<bos>{% for m in messages %}"
    "{% if m.role == 'user' %}<user>{{ m.content }}{% else %}<assistant>{{ m.content }}<eos>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}")


def texts(paths):
    """Every text in the rows of the files, messages one by one."""
    for path in paths:
        for row in common.Progress(common.read_rows(path, []), desc=os.path.basename(path)):
            for key in ("prompt", "response", "chosen", "rejected"):
                value = row.get(key, "")
                yield from [value] if isinstance(value, str) else [m["content"] for m in value]


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=common.Help)
    p.add_argument("--data", nargs="+", required=True, help="JSON lines to train the tokenizer on")
    p.add_argument("--out", default="out/scratch", help="transformers folder to write")
    p.add_argument("--vocab", type=int, default=8192, help="tokens in the vocabulary, at most")
    p.add_argument("--layers", type=int, default=4, help="transformer blocks")
    p.add_argument("--width", type=int, default=256, help="hidden size")
    p.add_argument("--heads", type=int, default=4, help="attention heads")
    p.add_argument("--context", type=int, default=1024, help="positions; tau, prompt and response must fit")
    p.add_argument("--seed", type=int, default=0, help="seed of the weights")
    args = p.parse_args(argv)
    if args.width % (2 * args.heads):
        common.die(f"--width {args.width}: must be a multiple of twice --heads {args.heads}")
    common.check_writable(os.path.join(args.out, "config.json"))
    untrained = GPT2Tokenizer(bos_token="<bos>", eos_token="<eos>", unk_token=None, chat_template=TEMPLATE,
                              extra_special_tokens=["<user>", "<assistant>"])
    tok = untrained.train_new_from_iterator(texts(args.data), args.vocab, show_progress=False)
    torch.manual_seed(args.seed)
    config = LlamaConfig(
        vocab_size=len(tok), max_position_embeddings=args.context, hidden_size=args.width,
        intermediate_size=8 * args.width // 3, num_hidden_layers=args.layers,
        num_attention_heads=args.heads, tie_word_embeddings=True, bos_token_id=tok.bos_token_id,
        eos_token_id=tok.eos_token_id)
    model = LlamaForCausalLM(config)
    model.save_pretrained(args.out)
    tok.save_pretrained(args.out)
    print(f"{args.out}: {model.num_parameters():,} parameters, {len(tok):,} tokens")


if __name__ == "__main__":
    main()
