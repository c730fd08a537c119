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
from tqdm import tqdm

from beyond.segments import FastCache, SmallWindowCache
from beyond.shared import shared_cache
from cskv import BiBranchCache, Factors
from model import LayerCache, Transformer, full_cache
from support.command import DTYPES, Arguments, UserError, number, run_command, use_device
from support.factors_file import load_factors
from support.huggingface.checkpoint import (
    find_checkpoint,
    generation_settings,
    load_model,
    read_config,
)
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

    def greedy(logits: Tensor) -> int:
        # Both answers at once: on a GPU each `.tolist()` waits for it.
        finite, token = torch.stack([logits.isfinite().all(), logits.argmax()]).tolist()
        check_finite(finite)
        return token

    def sample(logits: Tensor) -> int:
        logits = logits.double().cpu()
        check_finite(bool(logits.isfinite().all()))
        p, ids = ((logits - logits.max()) / temperature).softmax(-1).sort(descending=True)
        before = p.cumsum(0) - p
        p[before >= top_p] = 0
        return int(ids[torch.multinomial(p, 1, generator=generator)])

    return sample if temperature else greedy


@torch.no_grad()
def generate(
    model: Transformer,
    prompt: list[int],
    cache: list[LayerCache],
    max_new_tokens: int,
    sample: Callable[[Tensor], int],
    seconds: list[float] | None = None,
) -> Iterator[int]:
    """Yields new token ids, one by one, up to `max_new_tokens` or the model's end-of-text token.
    The time of each step of the model, the prefill first, is added to `seconds`."""
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
    kept = sum(pair.rank * pair.bits for pair in factors.stored)
    return 1 - kept / (2 * 16 * model.config.d_kv * len(factors.layers))


def held_bytes(cache: list[LayerCache]) -> int:
    """Bytes of the tensors that a cache really holds, unused room included."""
    return sum(layer.nbytes() for layer in cache)


def full_bytes(model: Transformer, tokens: int) -> int:
    """Bytes of a full cache in 16 bits, which measured ratios compare with."""
    return 2 * 2 * model.config.num_hidden_layers * model.config.d_kv * tokens


stream = partial(print, end="", flush=True)


def silent(text: str) -> None:
    pass


def answer(
    model: Transformer,
    tokenizer: Tokenizer,
    prompt: list[int],
    cache: list[LayerCache],
    max_new_tokens: int,
    sample: Callable[[Tensor], int],
    write: Callable[[str], None],
    interrupt: Postponed | None = None,
) -> dict:
    """Generates from `cache`, streams the text through `write`, and measures bytes and seconds.
    It ends early after an `interrupt`."""
    tokens, seconds = [], []
    written = ""
    for token in generate(model, prompt, cache, max_new_tokens, sample, seconds):
        tokens.append(token)
        if interrupt and interrupt.asked:
            break
        settled = tokenizer.settled(tokens)
        if len(settled) > len(written):
            write(settled[len(written) :])
            written = settled
    text = tokenizer.decode(tokens)
    if text.startswith(written):
        write(text[len(written) :])
    else:  # for a decoder of another kind: once more, and right
        write(f"\n{text}")
    steps = seconds[1:]
    full = full_bytes(model, cache[0].length)
    return {
        "text": text,
        "tokens": tokens,
        "prompt_tokens": len(prompt),
        "cache_bytes": held_bytes(cache),
        "full_cache_bytes": full,
        "measured_ratio": 1 - held_bytes(cache) / full,
        "prefill_seconds": sum(seconds[:1]),
        "decode_seconds_per_token": sum(steps) / max(1, len(steps)),
    }


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
    width = 8 + max(map(len, results))
    lines = [" " * 25 + "".join(f"{name:>{width}}" for name in results)]
    for label, show in rows.items():
        line = f"{label:25}"
        for name, result in results.items():
            cell = "" if name == "full" and "ratio" in label else show(result)
            line += f"{cell:>{width}}"
        lines.append(line)
    return "\n".join(lines)


def as_object(results: dict[str, dict]) -> dict:
    """What --json prints: the last cache's result, and beside it that of the full one."""
    shown = dict(list(results.values())[-1])
    if len(results) > 1:
        shown["full"] = results["full"]
    return shown


def shorten(case: str) -> str:
    """What matters of a LongEval case: how it begins, the line that is asked for, the question."""
    first, *lines, question = case.strip().splitlines()
    key = question.split(" in line ")[1].split("?")[0]
    asked = next(line for line in lines if line.startswith(f"line {key}:"))
    return f"{first[:76]} [...]\n[...]\n{asked}\n[...]\n{question}\n"


# --------------------------------------------------------------------------------- conversation


@dataclass(frozen=True)
class Talk:
    """A conversation, and the cache that holds it."""

    conversation: Conversation
    cache: list[LayerCache]
    nominal_ratio: float
    sample: Callable[[Tensor], int]


@torch.no_grad()
def read(model: Transformer, name: str, talk: Talk) -> None:
    """Prefills the cache with the text, and shows on standard error how many layers are done."""
    tokens = talk.conversation.tokens
    label = f"reading {len(tokens)} tokens, {name} cache"
    with tqdm(total=len(talk.cache), desc=label, unit="layer") as bar:

        def step(*_: object) -> None:
            bar.update()

        hooks = [layer.register_forward_hook(step) for layer in model.model.layers]
        try:
            model(torch.tensor([tokens], device=model.lm_head.weight.device), talk.cache, 1)
        finally:
            for hook in hooks:
                hook.remove()


def questions() -> Iterator[str]:
    """The lines of standard input that are not empty."""
    sys.stdin.reconfigure(encoding=UTF_8)
    with readable("a question"):
        for line in sys.stdin:
            if line.strip():
                yield line.strip()


def converse(
    model: Transformer, tokenizer: Tokenizer, talks: dict[str, Talk], most: int, as_json: bool
) -> None:
    """Reads the text into each cache, then answers questions until they or the context end."""
    for name, talk in talks.items():
        if talk.conversation.tokens:  # none if the first question changes all of a short text
            read(model, name, talk)
    limit = model.config.context_length
    for question in questions():
        results = {}
        for name, talk in talks.items():
            conversation, cache = talk.conversation, talk.cache
            conversation.ask(question)
            length = len(conversation.tokens)
            if length >= limit:
                say(f"the context of {limit} tokens is full; ask in a new conversation")
                return
            if len(talks) > 1 and not as_json:
                print(f"--- {name} cache")
            with Postponed() as interrupt:
                result = answer(
                    model,
                    tokenizer,
                    conversation.tokens[cache[0].length :],
                    cache,
                    min(most, limit - length),
                    talk.sample,
                    silent if as_json else stream,
                    interrupt,
                )
            conversation.add_answer(result["tokens"], result["text"])
            result |= {"prompt_tokens": length, "nominal_ratio": talk.nominal_ratio}
            results[name] = result
            if not as_json:
                print(flush=True)
            held, full = result["cache_bytes"] / 1e6, result["full_cache_bytes"] / 1e6
            say(f"{cache[0].length} tokens, {held:.2f} MB; a full 16-bit cache: {full:.2f} MB")
        if as_json:
            print(json.dumps({"question": question, **as_object(results)}), flush=True)


# --------------------------------------------------------------------------------- command line


def run(args: argparse.Namespace) -> None:
    """The command line, with arguments already parsed."""
    use_device(args.device)
    text, file, compare, most = args.prompt, args.factors, args.compare, args.max_new_tokens
    if args.prompt_file is not None:
        if text is not None:
            raise UserError("--prompt and --prompt-file are both given; leave one of them out")
        if args.ask and args.prompt_file == "-":
            raise UserError("--ask reads questions from standard input; give the text as a file")
        text = read_file(args.prompt_file)
    if args.ask and text is None:
        raise UserError("--ask needs a text to ask about; give --prompt-file FILE")
    hint = ""
    if os.path.realpath(args.model) == str(TEACHER):
        file = file or TEACHER / "cskv-80.safetensors"
        hint = HINT
        if text is None:
            text = (TEACHER / "prompt.txt").read_text(encoding="utf-8")
            hint = shorten(text)
            compare = True
            most = min(most, 8)  # a number and its end
    if text is None:
        raise UserError('no prompt; give some text: --prompt "..."')
    if not text.strip():
        raise UserError('the prompt is empty; give some text: --prompt "..."')
    caches = [args.cache]
    if compare:
        caches = ["full", "cskv" if args.cache == "full" else args.cache]
    if args.window_bits == 8 and caches[-1] != "cskv":
        raise UserError(f"--window-bits 8 is not for the {caches[-1]} cache; use --cache cskv")
    if caches != ["full"] and file is None:
        message = f"the {caches[-1]} cache needs --factors FILE, made by train.py"
        raise UserError(f"{message}; or use --cache full")
    folder = find_checkpoint(args.model)
    config = read_config(folder)
    tokenizer = load_tokenizer(folder, config.vocab_size)
    prompt = tokenizer.encode_prompt(text, args.chat)
    limit = config.context_length
    if len(prompt) >= limit:  # known before the weights are read
        problem = f"the prompt has {len(prompt)} tokens, the model's context {limit}"
        raise UserError(f"{problem}; shorten it")
    model = load_model(folder, args.device, DTYPES[args.dtype])
    ignored = generation_settings(folder)
    if ignored:
        say(f"not honoured, of generation_config.json: {', '.join(ignored)}")
    if caches != ["full"]:
        factors = load_factors(file, model)
        factors = factors.in_bits(args.k_bits or args.bits, args.v_bits or args.bits)

    def make(name: str, expected: int = 0) -> tuple[list[LayerCache], float]:
        """An empty cache, and its nominal ratio."""
        if name == "full":
            return full_cache(model, expected), 0.0
        window_bits = args.window_bits or factors.info.get("window_bits")
        kind = KINDS[name]
        if name == "cskv" and window_bits in (8, "8"):
            kind = SmallWindowCache
        cache = shared_cache(model, factors, args.window, expected, kind, args.sinks)
        return cache, nominal_ratio(model, factors)

    if args.ask:
        conversation = Conversation(tokenizer, text, args.chat)
        talks = {}
        for name in caches:
            sample = make_sampler(args.temperature, args.top_p, args.seed)
            talks[name] = Talk(copy(conversation), *make(name), sample)
        converse(model, tokenizer, talks, most, args.json)
        return
    if hint:
        say(hint)
    new_tokens = min(most, limit - len(prompt))
    if new_tokens < most:
        say(f"only {new_tokens} new tokens fit into the context")
    expected = len(prompt) + new_tokens - 1  # the last new token is never fed back

    results = {}
    for name in caches:
        cache, nominal = make(name, expected)
        if compare and not args.json:
            print(f"--- {name} cache, {len(prompt)} tokens of prompt")
        sample = make_sampler(args.temperature, args.top_p, args.seed)
        write = silent if args.json else stream
        result = answer(model, tokenizer, prompt, cache, new_tokens, sample, write)
        results[name] = {**result, "nominal_ratio": nominal}
        if not args.json:
            print("\n" if compare else "")
    if args.json:
        print(json.dumps(as_object(results)))
    else:
        print(report(results), file=sys.stdout if compare else sys.stderr)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Arguments(description=__doc__)
    add = parser.add_argument
    count = number(int, 1)
    widths = (2, 3, 4, 8, 16, 32)
    add("--prompt", help="text to answer or to continue (without --model: a LongEval case)")
    add("--prompt-file", help="a UTF-8 file of that text instead; - for standard input")
    ask = "then answer questions from standard input about the text, one a line, until it ends"
    add("--ask", action="store_true", help=ask)
    add("--model", default=TEACHER, help="checkpoint folder or hub name (the embedded model)")
    add("--factors", help="factors file for this model, made by train.py")
    kinds = "cskv: fast, old keys share positions, which costs SmolLM2 up to 0.7%% of perplexity "
    kinds += "(experiments/README.md); cskv-plain: the paper's, exact positions, slow"
    add("--cache", choices=[*KINDS, "full"], default="cskv", help=kinds)
    add("--compare", action="store_true", help="answer from the full cache as well, side by side")
    window = "newest tokens kept in full precision: costs memory, helps a little (32)"
    add("--window", type=count, default=32, help=window)
    window_bits = "keep these, and the sinks, in 8 or 16 bits (those the factors were made for)"
    add("--window-bits", type=int, choices=(8, 16), help=window_bits)
    add("--sinks", type=number(int, 0), default=4, help="first tokens likewise (4; the paper: 0)")
    bits = "bits of a stored latent (those the factors were made for)"
    add("--bits", type=int, choices=widths, help=bits)
    add("--k-bits", type=int, choices=widths, help="bits for keys alone")
    add("--v-bits", type=int, choices=widths, help="bits for values alone")
    add("--max-new-tokens", type=count, default=128, help="end the answer there (128)")
    add("--temperature", type=number(float, 0, 100), default=0.0, help="sample, if above 0 (0)")
    nucleus = "sample from the likeliest tokens of this probability in all (1)"
    add("--top-p", type=number(float, 1e-6, 1), default=1.0, help=nucleus)
    add("--seed", type=number(int, 0), default=0, help="another seed samples another text (0)")
    add("--chat", action=argparse.BooleanOptionalAction, help="use the chat template (if any)")
    add("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")
    add("--dtype", choices=DTYPES, default="float32", help="precision of the model (float32)")
    add("--json", action="store_true", help="print one JSON object instead of streaming text")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(lambda: run(parse_arguments()))
