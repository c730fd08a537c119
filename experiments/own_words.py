"""Text to calibrate on that spreads over more than one kind: half of it the model writes itself.

    python -m experiments.own_words --model M --data TEXT --out F.jsonl

Factors fitted to one kind of text lose most on another. But a model carries a sample of all that it
was trained on: what it writes, token by token from its own distribution, after a first token drawn
at random (Liu et al., "LLM-QAT: Data-Free Quantization Aware Training for Large Language Models",
2023, section 2.1). It need not make sense. The file has as many pieces of TEXT as texts of its own.
"""

import support.interrupt  # isort: skip # noqa: F401

import argparse
import json
import math
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
    user_values,
)
from support.huggingface.checkpoint import load_model
from support.huggingface.tokenizer import load_tokenizer
from support.text import check_finite, sample_tokens


@torch.no_grad()
def write_texts(model: Transformer, count: int, length: int, generator: torch.Generator) -> Tensor:
    """`count` texts of the model's own, [count, length] token ids, without an end of text."""
    config = model.config
    tokens = torch.randint(config.vocab_size, (count, 1), generator=generator)
    cache = full_cache(model, length)
    for _ in tqdm(range(length - 1), "writing", unit="token", leave=False):
        logits = model(tokens[:, -1:], cache)[:, -1].float()  # [count, vocab]
        check_finite(bool(logits.isfinite().all()))
        logits[:, list(config.eos_token_ids)] = -math.inf
        new = torch.multinomial(logits.softmax(-1), 1, generator=generator)
        tokens = torch.cat([tokens, new], 1)
    return tokens


def run(args: argparse.Namespace) -> None:
    """The command line, with arguments already parsed."""
    check_files({"--out": args.out}, {"--data": args.data}, args.model)
    if args.out.suffix != ".jsonl":
        raise UserError(f"--out {args.out} must end in .jsonl, the kind of file that is written")
    with user_values():
        model = load_model(args.model)
        tokenizer = load_tokenizer(args.model, model.config.vocab_size)
        limit = model.config.context_length
        if args.seq_len > limit:
            raise UserError(f"--seq-len {args.seq_len} exceeds the context of {limit}")
        others = sample_tokens(args.data, tokenizer, args.samples, args.seq_len, seed=0)
        generator = torch.Generator().manual_seed(0)
        own = write_texts(model, args.samples, args.seq_len, generator)
    texts = [tokenizer.decode(ids.flatten().tolist()) for ids in (*own, *others)]
    with replacing(args.out) as temporary:
        temporary.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    print(f"{args.out}: {len(own)} texts of the model's own, {len(others)} pieces of {args.data}")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Arguments(description=__doc__)
    add = parser.add_argument
    add("--model", required=True, help="let this checkpoint write")
    add("--data", type=Path, required=True, help="take the other half from this text")
    add("--samples", type=number(int, 1), default=32, help="write so many, take as many (32)")
    add("--seq-len", type=number(int, 2), default=1024, help="write so many tokens each (1024)")
    add("--out", type=Path, required=True, help="write this file, .jsonl")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(lambda: run(parse_arguments()))
