"""Generates text from a KV cache of fewer channels, and counts the bytes.

    python infer.py                     a demonstration on the embedded teaching model
    python infer.py --prompt "..." --model FOLDER_OR_HUB_NAME --factors FILE
    python infer.py --ask --prompt-file TEXT ...     reads a text once, answers questions about it

The prompt is read once with the exact model (`prefill`), then every new token attends to the
cache (`decode`). In a conversation each question extends it. Nothing else here is particular to
CSKV: a cache is a list of one `LayerCache` a layer, and the model takes whichever it is given.
"""

import support.interrupt  # isort: skip # noqa: F401

import argparse
import io
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from beyond.segments import FastCache, SmallWindowCache
from beyond.shared import shared_cache
from cskv import BiBranchCache, Factors
from model import LayerCache, Transformer, full_cache
from support.command import DTYPES, Arguments, UserError, number, run_command, use_device
from support.factors_file import load_factors
from support.huggingface import checkpoint
from support.huggingface.conversation import Conversation
from support.huggingface.tokenizer import Tokenizer, load_tokenizer
from support.interrupt import Postponed
from support.processes import say
from support.text import UTF_8, check_finite, read_file, readable

KINDS = {"cskv": FastCache, "cskv-plain": BiBranchCache}
TEACHER = Path(__file__).resolve().parent / "weights" / "teacher"  # embedded, for retrieval only
HINT = """The embedded model only finds numbers in its prompt, as `python infer.py` shows.
For English: python weights/get_smollm2.py, then --model weights/SmolLM2-135M-Instruct"""


def make_sampler(temperature: float, top_p: float, seed: int) -> Callable[[Tensor], int]:
    """A function from logits [vocab] to a token id. Temperature 0 is greedy.

    Otherwise nucleus sampling (Holtzman et al., 2019): from the smallest set of tokens whose
    probability reaches `top_p`. Raises `UserError` for logits that are not finite.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(logits: Tensor) -> int:
        # Both at once: on a GPU each `.tolist()` waits for it.
        finite, likeliest = torch.stack([logits.isfinite().all(), logits.argmax()]).tolist()
        check_finite(finite)
        if temperature == 0:
            return likeliest
        logits = logits.double().cpu()
        p, ids = ((logits - logits.max()) / temperature).softmax(-1).sort(descending=True)
        before = p.cumsum(0) - p
        p[before >= top_p] = 0
        return int(ids[torch.multinomial(p, 1, generator=generator)])

    return draw


@torch.inference_mode()  # a call of PyTorch takes less time than with `no_grad`
def generate(
    model: Transformer,
    prompt: list[int],
    cache: list[LayerCache],
    max_new_tokens: int,
    sample: Callable[[Tensor], int],
    seconds: list[float] | None = None,
) -> Iterator[int]:
    """Yields new token ids, one by one, up to `max_new_tokens` or the model's end-of-text token.
    The time of each step of the model, the prefill first, is added to `seconds`. In inference
    mode, and only in it can `cache` be used after this."""
    device = model.lm_head.weight.device
    tokens = torch.tensor([prompt], device=device)  # [1, T]: prefill, then [1, 1]: decode
    for _ in range(max_new_tokens):
        began = time.perf_counter()
        token = sample(model(tokens, cache, logits_to_keep=1)[0, -1])
        if seconds is not None:
            seconds.append(time.perf_counter() - began)
        if token in model.config.eos_token_ids:
            return
        yield token
        tokens = torch.full((1, 1), token, device=device)  # made there, not copied to it


def nominal_ratio(model: Transformer, factors: Factors) -> float:
    """The paper's compression ratio: 1 - density * bits / 16, nothing but latents counted."""
    kept = sum(pair.bits_a_token for pair in factors.stored)
    return 1 - kept / (2 * 16 * model.config.d_kv * len(factors.layers))


def held_bytes(cache: list[LayerCache]) -> int:
    """Bytes of the tensors that a cache really holds, unused room included."""
    return sum(layer.nbytes() for layer in cache)


def full_bytes(model: Transformer, tokens: int) -> int:
    """Bytes of a full cache in 16 bits, which measured ratios compare with."""
    return 2 * 2 * model.config.num_hidden_layers * model.config.d_kv * tokens


@dataclass(frozen=True)
class Source:
    """A model and a cache to answer from."""

    model: Transformer
    tokenizer: Tokenizer
    cache: list[LayerCache]
    sample: Callable[[Tensor], int]
    nominal_ratio: float

    def answer(self, tokens: list[int], most: int, write: Callable, interrupt=None) -> dict:
        """Up to `most` tokens after `tokens`, of which the cache may hold the first ones. Streams
        the text through `write`, measures bytes and seconds, ends early after an `interrupt`."""
        new = []
        seconds = []
        written = ""
        prompt = tokens[self.cache[0].length :]
        for token in generate(self.model, prompt, self.cache, most, self.sample, seconds):
            new.append(token)
            if interrupt and interrupt.asked:
                break
            settled = self.tokenizer.settled(new)
            if len(settled) > len(written):
                write(settled[len(written) :])
                written = settled
        text = self.tokenizer.decode(new)
        write(text[len(written) :])
        held = held_bytes(self.cache)
        full = full_bytes(self.model, self.cache[0].length)
        return {
            "text": text,
            "tokens": new,
            "prompt_tokens": len(tokens),
            "cache_bytes": held,
            "full_cache_bytes": full,
            "measured_ratio": 1 - held / full,
            "nominal_ratio": self.nominal_ratio,
            "prefill_seconds": sum(seconds[:1]),
            "decode_seconds_per_token": sum(seconds[1:]) / max(1, len(seconds) - 1),
        }


def answer_each(
    sources: dict, prompts: dict, most: int, as_json: bool, interrupt=None, **more: str
) -> dict:
    """The results of all sources by name, each for its prompt. Prints the texts as they come, or as
    one JSON object `more`, the last result, and within it that of the full cache."""
    output = io.StringIO() if as_json else sys.stdout
    write = partial(print, end="", flush=True, file=output)
    results = {}
    for name, source in sources.items():
        prompt = prompts[name]
        if len(sources) > 1:
            write(f"--- {name} cache, {len(prompt)} tokens of prompt\n")
        room = source.model.config.context_length - len(prompt)
        results[name] = source.answer(prompt, min(most, room), write, interrupt)
        write("\n\n" if len(sources) > 1 else "\n")
    if as_json:
        *others, last = results.values()
        more |= last
        if others:
            more["full"] = others[0]
        print(json.dumps(more), flush=True)
    return results


def report(results: dict[str, dict]) -> str:
    """A small table of bytes and seconds, a column for each cache. A full cache has no ratio."""
    rows = {
        "cache, MB": lambda r: f"{r['cache_bytes'] / 1e6:.2f}",
        "a full 16-bit cache, MB": lambda r: f"{r['full_cache_bytes'] / 1e6:.2f}",
        "measured ratio": lambda r: f"{r['measured_ratio']:.1%}",
        "nominal ratio": lambda r: f"{r['nominal_ratio']:.1%}",
        "prefill, s": lambda r: f"{r['prefill_seconds']:.2f}",
        "decode, ms a token": lambda r: f"{1e3 * r['decode_seconds_per_token']:.1f}",
    }
    lines = [" " * 25 + "".join([f"{name:>12}" for name in results])]
    for label, show in rows.items():
        line = f"{label:25}"
        for name, result in results.items():
            cell = "" if name == "full" and "ratio" in label else show(result)
            line += f"{cell:>12}"
        lines.append(line)
    return "\n".join(lines)


def shorten(case: str) -> str:
    """What matters of a LongEval case: how it begins, the line that is asked for, the question."""
    lines = case.strip().splitlines()
    key = lines[-1].split(" in line ")[1].split("?")[0]
    shown = [line for line in lines if key in line]
    return "\n[...]\n".join([f"{lines[0][:76]} [...]", *shown])


def questions() -> Iterator[str]:
    """The lines of standard input that are not empty."""
    sys.stdin.reconfigure(encoding=UTF_8)
    with readable("a question"):
        yield from filter(None, map(str.strip, sys.stdin))


@torch.inference_mode()
def converse(sources: dict, text: Conversation, most: int, as_json: bool) -> None:
    """Reads the text into each cache, then answers questions until they or the context end."""
    talks = {}
    for name, source in sources.items():
        talks[name] = copy(text)
        if text.tokens:  # none if the first question changes all of a short text
            say(f"reading {len(text.tokens)} tokens, {name} cache")
            device = source.model.lm_head.weight.device
            source.model(torch.tensor([text.tokens], device=device), source.cache, 1)
    for question in questions():
        prompts = {}
        for name, talk in talks.items():
            talk.ask(question)
            prompts[name] = talk.tokens
            limit = sources[name].model.config.context_length
            if len(talk.tokens) >= limit:
                say(f"the context of {limit} tokens is full; ask in a new conversation")
                return
        with Postponed() as interrupt:
            results = answer_each(sources, prompts, most, as_json, interrupt, question=question)
        for name, result in results.items():
            talks[name].add_answer(result["tokens"], result["text"])
            held, full = result["cache_bytes"] / 1e6, result["full_cache_bytes"] / 1e6
            length = sources[name].cache[0].length
            say(f"{length} tokens, {held:.2f} MB; a full 16-bit cache: {full:.2f} MB")


# --------------------------------------------------------------------------------- command line


def fill_in(args: argparse.Namespace) -> str:
    """Checks what needs no model, and adds what the embedded model brings along: its factors and,
    without a prompt, a demonstration. Returns what to say about it."""
    if args.ask and args.prompt_file == "-":
        raise UserError("--ask reads questions from standard input; give the text as a file")
    if args.prompt_file is not None:
        args.prompt = read_file(args.prompt_file)
    hint = ""
    if os.path.realpath(args.model) == str(TEACHER):
        args.factors = args.factors or TEACHER / "cskv-80.safetensors"
        hint = HINT
        if args.prompt is None and not args.ask:
            args.prompt = (TEACHER / "prompt.txt").read_text(encoding="utf-8")
            args.compare = True
            args.max_new_tokens = min(args.max_new_tokens, 8)  # a number and its end
            hint = shorten(args.prompt)
    if args.prompt is None or not args.prompt.strip():
        raise UserError('the prompt is empty; give some text: --prompt "..."')
    if args.cache != "full" and args.factors is None:
        problem = f"the {args.cache} cache needs --factors FILE, made by train.py"
        raise UserError(f"{problem}; or use --cache full")
    return hint


def run(args: argparse.Namespace) -> None:
    """The command line, with arguments already parsed."""
    use_device(args.device)
    hint = fill_in(args)
    folder = checkpoint.find_checkpoint(args.model)
    config = checkpoint.read_config(folder)
    tokenizer = load_tokenizer(folder, config.vocab_size)
    prompt = tokenizer.encode_prompt(args.prompt, args.chat)
    most = args.max_new_tokens
    limit = config.context_length
    room = limit - len(prompt)
    if room <= 0:  # known before the weights are read
        problem = f"the prompt has {len(prompt)} tokens, the model's context {limit}"
        raise UserError(f"{problem}; shorten it")
    model = checkpoint.load_model(folder, args.device, DTYPES[args.dtype])
    ignored = checkpoint.generation_settings(folder)
    if ignored:
        say(f"not honoured, of generation_config.json: {', '.join(ignored)}")
    # The last new token is never fed back. Nobody knows how long a conversation will be.
    expected = 0 if args.ask else len(prompt) + min(most, room) - 1
    sample = partial(make_sampler, args.temperature, args.top_p, args.seed)
    sources = {}
    if args.compare or args.cache == "full":
        cache = full_cache(model, expected)
        sources["full"] = Source(model, tokenizer, cache, sample(), nominal_ratio=0.0)
    if args.cache != "full":
        factors = load_factors(args.factors, model)
        factors = factors.in_bits(args.k_bits or args.bits, args.v_bits or args.bits)
        kind = KINDS[args.cache]
        if kind is FastCache and factors.info.get("window_bits") == "8":
            kind = SmallWindowCache
        cache = shared_cache(model, factors, args.window, expected, kind, args.sinks)
        ratio = nominal_ratio(model, factors)
        sources[args.cache] = Source(model, tokenizer, cache, sample(), ratio)

    if args.ask:
        converse(sources, Conversation(tokenizer, args.prompt, args.chat), most, args.json)
        return
    if hint:
        say(hint)
    if room < most:
        say(f"only {room} new tokens fit into the context")
    results = answer_each(sources, dict.fromkeys(sources, prompt), most, args.json)
    if not args.json:
        print(report(results), file=sys.stdout if args.compare else sys.stderr)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Arguments(description=__doc__)
    add = parser.add_argument
    count = number(int, 1)
    widths = (2, 3, 4, 8, 16, 32)
    text = parser.add_mutually_exclusive_group().add_argument
    text("--prompt", help="text to answer or to continue (without --model: a LongEval case)")
    text("--prompt-file", help="a UTF-8 file of that text instead; - for standard input")
    add("--ask", action="store_true", help="then answer questions, a line each of standard input")
    add("--model", default=TEACHER, help="checkpoint folder or hub name (the embedded model)")
    add("--factors", help="factors file for this model, made by train.py")
    kinds = "cskv: fast, old keys share positions; cskv-plain: the paper's, slow"
    add("--cache", choices=[*KINDS, "full"], default="cskv", help=kinds)
    add("--compare", action="store_true", help="answer from the full cache as well, side by side")
    add("--window", type=count, default=32, help="newest tokens kept in full precision (32)")
    add("--sinks", type=number(int, 0), default=4, help="first tokens likewise (4; the paper: 0)")
    add("--bits", type=int, choices=widths, help="bits of a latent (as the factors were made for)")
    add("--k-bits", type=int, choices=widths, help="bits for keys alone")
    add("--v-bits", type=int, choices=widths, help="bits for values alone")
    add("--max-new-tokens", type=count, default=128, help="end the answer there (128)")
    add("--temperature", type=number(float, 0, 100), default=0.0, help="sample, if above 0 (0)")
    likeliest = "sample from the likeliest tokens of this probability in all (1)"
    add("--top-p", type=number(float, 1e-6, 1), default=1.0, help=likeliest)
    add("--seed", type=number(int, 0), default=0, help="another seed samples another text (0)")
    add("--chat", action=argparse.BooleanOptionalAction, help="use the chat template (if any)")
    add("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")
    add("--dtype", choices=DTYPES, default="float32", help="precision of the model (float32)")
    add("--json", action="store_true", help="print one JSON object instead of streaming text")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(lambda: run(parse_arguments()))
