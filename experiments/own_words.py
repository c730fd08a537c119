"""Text to calibrate on that spreads over more than one kind: half of it the model writes itself.

    python -m experiments.own_words --model M --data TEXT --out F.jsonl

Factors fitted to one kind of text lose most on another. But a model carries a sample of all that it
was trained on: what it writes, token by token from its own distribution (Liu et al., "LLM-QAT:
Data-Free Quantization Aware Training for Large Language Models", 2023, section 2.1). It need not
make sense. Half of its texts begin with a token drawn at random, as there, and half with one of
`BEGINNINGS`: programs, letters, tables, other languages. The file has as many pieces of TEXT as
texts of its own. Many short texts side by side are written sooner than few long ones; `--join 4`
makes long ones of them, for a cache that is to be long.
"""

import support.interrupt  # isort: skip # noqa: F401

import argparse
import json
import math
import random
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from model import Transformer, full_cache
from support.command import (
    Arguments,
    UserError,
    check_files,
    number,
    replacing,
    run_command,
    use_device,
    user_values,
)
from support.huggingface.checkpoint import load_model
from support.huggingface.tokenizer import Tokenizer, load_tokenizer
from support.text import check_finite, sample_tokens

# Of many kinds, so that a model goes on in many.
BEGINNINGS = (
    "#include <stdio.h>\n\n/* ",
    "import os\nimport sys\n\n\nclass ",
    "Dear Anna,\n\nthank you for your letter. ",
    "#ifndef _LIST_H\n#define _LIST_H 1\n\n/* ",
    "| Year | Country | Population |\n| --- | --- | --- |\n|",
    "package main\n\nimport (",
    '"Where have you been?" she asked.\n\n"',
    "from __future__ import annotations\n\nimport math\n\n\ndef ",
    "Il était une fois ",
    "public class Account {\n    private ",
    "Question: A train leaves at 9:40 and arrives at 12:15. ",
    "import torch\nfrom torch import nn\n\n\nclass Block(nn.Module):\n    ",
    "function render(items) {\n  const ",
    "Chapter 1\n\nIt was late in the evening when ",
    "SELECT name, count(*) FROM ",
    "Abstract. We study ",
    "#!/bin/sh\nset -e\n",
    "Die Stadt liegt ",
    '{"id": 1, "name": "',
    "Terms and Conditions\n\n1. The Licensee shall ",
    "template <typename T>\nclass Vector {\n public:\n  ",
    "User: How do I ",
    "import unittest\n\n\nclass TestParser(unittest.TestCase):\n    def ",
    "<!DOCTYPE html>\n<html>\n<head>",
    "LONDON (Reuters) - ",
    'def main():\n    """',
    "2024-03-01 08:15:02 INFO  server started on port ",
    "El presidente ",
    "use std::collections::HashMap;\n\npub fn ",
    "\\begin{theorem}\nLet $x$ be ",
    "Ingredients:\n- 200 g flour\n- ",
    "static int read_line(struct buffer *b)\n{\n    ",
    "The Battle of ",
    "name,age,city\n",
    "From: Peter\nTo: the team\nSubject: ",
    "/**\n * Returns the ",
    "JULIET. O ",
    "[section]\nkey = ",
    "Patient history: a 54-year-old ",
    ">>> import numpy as np\n>>> x = np.",
)


@torch.no_grad()
def write_texts(model: Transformer, begun: list[list[int]], length: int, generator) -> Tensor:
    """Texts of the model's own that begin with these tokens, [texts, length] token ids, without an
    end of text; `generator` draws them."""
    first = [text[0] for text in begun]
    tokens = torch.tensor(first, device=model.lm_head.weight.device)[:, None]
    cache = full_cache(model, length)
    for t in tqdm(range(1, length), "writing", unit="token", leave=False):
        logits = model(tokens[:, -1:], cache)[:, -1].float()  # [texts, vocab]
        check_finite(bool(logits.isfinite().all()))
        logits[:, list(model.config.eos_token_ids)] = -math.inf
        new = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        for row, text in zip(new, begun, strict=True):
            if t < len(text):
                row[0] = text[t]
        tokens = torch.cat([tokens, new], 1)
    return tokens


def begin_some(begun: list[list[int]], tokenizer: Tokenizer) -> None:
    """Gives every second text one of `BEGINNINGS` in the place of its own."""
    for n in range(1, len(begun), 2):
        begun[n] = tokenizer.encode(BEGINNINGS[n // 2 % len(BEGINNINGS)]) or begun[n]


def joined(texts: list[str], count: int) -> list[str]:
    """Of every `count` texts one, with blank lines between."""
    return ["\n\n".join(texts[n : n + count]) for n in range(0, len(texts), count)]


def run(args: argparse.Namespace) -> None:
    check_files({"--out": args.out}, {"--data": args.data}, args.model)
    if args.out.suffix != ".jsonl":
        raise UserError(f"--out {args.out} must end in .jsonl, the kind of file that is written")
    with user_values():
        use_device(args.device)
        model = load_model(args.model, args.device)
        tokenizer = load_tokenizer(args.model, model.config.vocab_size)
        if args.seq_len > model.config.context_length:
            limit = model.config.context_length
            raise UserError(f"--seq-len {args.seq_len} exceeds the context of {limit}")
        others = sample_tokens(args.data, tokenizer, args.samples, args.seq_len, seed=0)
        generator = torch.Generator(args.device).manual_seed(0)
        drawn = {"size": (args.samples, 1), "generator": generator, "device": args.device}
        begun = torch.randint(model.config.vocab_size, **drawn).tolist()
        if not args.no_beginnings:
            begin_some(begun, tokenizer)
        own = write_texts(model, begun, args.seq_len, generator)
    own = [tokenizer.decode(ids.tolist()) for ids in own]
    others = [tokenizer.decode(ids[0].tolist()) for ids in others]
    if args.join > 1:
        random.Random(0).shuffle(own)  # so that not all have the same kinds in the same order
    texts = joined(own, args.join) + joined(others, args.join)
    with replacing(args.out) as temporary:
        temporary.write_text("".join([json.dumps({"text": text}) + "\n" for text in texts]))
    print(f"{args.out}: {len(own)} texts of the model's own, {len(others)} pieces of {args.data}")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Arguments(description=__doc__)
    add = parser.add_argument
    add("--model", required=True, help="let this checkpoint write")
    add("--data", type=Path, required=True, help="take the other half from this text")
    add("--samples", type=number(int, 1), default=32, help="write so many, take as many (32)")
    add("--seq-len", type=number(int, 2), default=1024, help="write so many tokens each (1024)")
    add("--join", type=number(int, 1), default=1, help="make one text of so many (1)")
    add("--no-beginnings", action="store_true", help="begin all texts with a token at random")
    add("--device", default="cpu", help="compute on cpu (default), cuda, cuda:1, ...")
    add("--out", type=Path, required=True, help="write this file, .jsonl")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(lambda: run(parse_arguments()))
