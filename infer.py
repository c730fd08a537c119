"""Generates text from a KV cache of fewer channels, and counts the bytes.

    python infer.py                     a demonstration on the embedded teaching model
    python infer.py --prompt "..." --model FOLDER_OR_HUB_NAME --factors FILE

The prompt is read once with the exact model (`prefill`), then every new token attends to the
cache (`decode`). Nothing else here is particular to CSKV: a cache is a list of one `LayerCache` a
layer, and the model takes whichever it is given.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

import cskv
from model import (
    DTYPES,
    Arguments,
    LayerCache,
    Tokenizer,
    Transformer,
    UserError,
    check_device,
    full_cache,
    load_model,
    load_tokenizer,
    number,
    run_command,
)

TEACHER = (
    Path(__file__).resolve().parent / "weights" / "teacher"
)  # the embedded model, for retrieval only


def make_sampler(temperature: float, top_p: float, seed: int) -> Callable[[Tensor], int]:
    """A function from logits [vocab] to a token id. Temperature 0 is greedy.

    Otherwise nucleus sampling (Holtzman et al., 2019): from the smallest set of tokens whose
    probability reaches `top_p`.
    """
    generator = torch.Generator().manual_seed(seed)

    def sample(logits: Tensor) -> int:
        if temperature == 0:
            return int(logits.argmax())
        logits = logits.double().cpu()
        p, ids = ((logits - logits.max()) / temperature).softmax(-1).sort(descending=True)
        p[p.cumsum(0) - p >= top_p] = 0  # what lies before a token has reached top_p: drop it
        return int(ids[torch.multinomial(p, 1, generator=generator)])

    return sample


@torch.no_grad()
def generate(
    model: Transformer,
    prompt: list[int],
    cache: list[LayerCache],
    max_new_tokens: int,
    sample: Callable[[Tensor], int],
) -> Iterator[int]:
    """Yields new token ids, one by one, up to `max_new_tokens` or the model's end-of-text token."""
    device = model.lm_head.weight.device
    tokens = torch.tensor([prompt], device=device)  # [1, T]: prefill, then [1, 1]: decode
    for _ in range(max_new_tokens):
        token = sample(model(tokens, cache, logits_to_keep=1)[0, -1])
        if token in model.config.eos_token_ids:
            return
        yield token
        tokens = torch.tensor([[token]], device=device)


def answer(
    model: Transformer,
    tokenizer: Tokenizer,
    prompt: list[int],
    cache: list[LayerCache],
    max_new_tokens: int,
    sample: Callable[[Tensor], int],
    write: Callable[[str], None] = lambda text: None,
) -> dict:
    """Generates from `cache`, streaming text through `write`, and measures bytes and seconds.

    `honest_ratio` compares the bytes of the tensors that the cache holds at the end with those of a
    full cache of the same length in 16 bits, 2 * layers * d_kv * 2 bytes a token.
    """
    tokens, times, written = [], [time.perf_counter()], ""
    for token in generate(model, prompt, cache, max_new_tokens, sample):
        times.append(time.perf_counter())
        tokens.append(token)
        text = tokenizer.decode(tokens)
        if not text.endswith("\ufffd"):  # else a character whose last bytes are to come
            write(text[len(written) :])
            written = text
    times.append(time.perf_counter())
    write(tokenizer.decode(tokens)[len(written) :])
    config = model.config
    steps = cache[0].length - len(prompt)  # every new token but the last went through decode
    cache_bytes = sum(layer.nbytes() for layer in cache)
    full_bytes = 2 * config.num_hidden_layers * config.d_kv * 2 * cache[0].length
    return {
        "text": tokenizer.decode(tokens),
        "tokens": tokens,
        "prompt_tokens": len(prompt),
        "cache_bytes": cache_bytes,
        "full_cache_bytes": full_bytes,
        "honest_ratio": 1 - cache_bytes / full_bytes,
        "prefill_seconds": times[1] - times[0],
        "decode_seconds_per_token": (times[1 + steps] - times[1]) / steps if steps else 0.0,
    }


def report(results: dict[str, dict]) -> str:
    """A small table of bytes and seconds, a column for each cache."""
    rows = {
        "cache, MB": lambda r: f"{r['cache_bytes'] / 1e6:.2f}",
        "a full 16-bit cache, MB": lambda r: f"{r['full_cache_bytes'] / 1e6:.2f}",
        "honest ratio": lambda r: f"{r['honest_ratio']:.1%}",
        "nominal ratio": lambda r: f"{r['nominal_ratio']:.1%}",
        "prefill, s": lambda r: f"{r['prefill_seconds']:.2f}",
        "decode, ms a token": lambda r: f"{1e3 * r['decode_seconds_per_token']:.1f}",
    }
    lines = [f"{'':25}" + "".join(f"{name:>10}" for name in results)]
    for label, value in rows.items():
        lines.append(f"{label:25}" + "".join(f"{value(r):>10}" for r in results.values()))
    return "\n".join(lines)


def encode_prompt(
    tokenizer: Tokenizer, text: str, chat: bool | None, model: Transformer
) -> list[int]:
    """The prompt's ids, within the chat template if there is one (`chat` None) or if asked for.

    Raises `UserError` for an empty prompt and for one that leaves no room in the model's context.
    """
    if not text.strip():
        raise UserError('the prompt is empty; give some text: --prompt "..."')
    if chat or (chat is None and tokenizer.template):
        prompt = tokenizer.encode(
            tokenizer.chat([{"role": "user", "content": text}]), special=False
        )
    else:
        prompt = tokenizer.encode(text)
    limit, vocabulary = model.config.context_length, model.config.vocab_size
    if len(prompt) >= limit:
        raise UserError(
            f"the prompt has {len(prompt)} tokens, the model's context {limit}; shorten it"
        )
    if max(prompt) >= vocabulary:
        raise UserError(f"token {max(prompt)} is not in the model's {vocabulary}; wrong tokenizer?")
    return prompt


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def shorten(text: str) -> str:
    """What matters of a LongEval case: how it begins, the line that is asked for, the question."""
    first, *lines, last = text.strip().splitlines()
    key = last.split(" in line ")[1].split("?")[0]
    asked = next(line for line in lines if line.startswith(f"line {key}:"))
    return f"{first[:76]} [...]\n[...]\n{asked}\n[...]\n{last}\n"


def run(args: argparse.Namespace) -> None:
    """The command line, with arguments already parsed."""
    check_device(args.device)
    path, text, factors_file, compare = args.model, args.prompt, args.factors, args.compare
    most, hint = args.max_new_tokens, None
    if Path(path).resolve() == TEACHER:
        factors_file = factors_file or TEACHER / "cskv-80.safetensors"
        hint = (
            "The embedded model only finds numbers in its prompt, as `python infer.py` shows. For "
            "English:\npython weights/get_smollm2.py, then --model weights/SmolLM2-135M-Instruct"
        )
        if text is None:
            text = (TEACHER / "prompt.txt").read_text(encoding="utf-8")
            hint, compare, most = shorten(text), True, min(most, 8)  # a number and its end
    if text is None:
        raise UserError('no prompt; give one: --prompt "..."')
    caches = ["full", "cskv"] if compare else [args.cache]
    if "cskv" in caches and factors_file is None:
        raise UserError(
            "the cskv cache needs --factors FILE, made by train.py; or use --cache full"
        )
    model, tokenizer = load_model(path, args.device, DTYPES[args.dtype]), load_tokenizer(path)
    prompt = encode_prompt(tokenizer, text, args.chat, model)
    factors, bits = None, (16, 16)
    if "cskv" in caches:
        factors = cskv.load_factors(factors_file, model)
        k_bits = args.k_bits or args.bits or factors.k_bits
        v_bits = args.v_bits or args.bits or factors.v_bits
        bits = k_bits, v_bits
    if hint:
        note(hint)
    new_tokens = min(most, model.config.context_length - len(prompt))
    if new_tokens < most:
        note(f"only {new_tokens} new tokens fit into the context")
    expected = len(prompt) + new_tokens - 1  # the last new token is never fed back

    results = {}
    for name in caches:
        if name == "full":
            cache, nominal = full_cache(model, expected), 0.0
        else:
            clamped = factors.clamped_zero_point
            cache = cskv.bi_branch_cache(model, factors, args.window, expected, *bits, clamped)
            nominal = cskv.nominal_ratio(model, factors, *bits)
        sample = make_sampler(args.temperature, args.top_p, args.seed)
        stream = [] if args.json else [lambda text: print(text, end="", flush=True)]
        if compare and not args.json:
            print(f"--- {name} cache, {len(prompt)} tokens of prompt")
        result = answer(model, tokenizer, prompt, cache, new_tokens, sample, *stream)
        results[name] = {**result, "nominal_ratio": nominal}
        if not args.json:
            print("\n" if compare else "")
    if args.json:
        last = results[caches[-1]]
        print(json.dumps({**last, "full": results["full"]} if compare else last))
    else:
        print(report(results), file=sys.stdout if compare else sys.stderr)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Arguments(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--prompt", help="what to answer or to continue (default, without --model: a LongEval case)"
    )
    parser.add_argument(
        "--model",
        default=TEACHER,
        help="checkpoint folder or hub name (default: the embedded model)",
    )
    parser.add_argument("--factors", help="factors file for this model, made by train.py")
    parser.add_argument("--cache", choices=["cskv", "full"], default="cskv", help="default: cskv")
    parser.add_argument(
        "--compare", action="store_true", help="answer from the full cache as well, side by side"
    )
    parser.add_argument(
        "--window",
        type=number(int, 1),
        default=32,
        help="newest tokens kept in full precision: costs memory, helps a little (default: 32)",
    )
    bits = {"type": int, "choices": [2, 3, 4, 8, 16, 32]}
    parser.add_argument(
        "--bits", **bits, help="bits of a stored latent (default: those the factors were made for)"
    )
    parser.add_argument("--k-bits", **bits, help="bits for keys alone")
    parser.add_argument("--v-bits", **bits, help="bits for values alone")
    parser.add_argument("--max-new-tokens", type=number(int, 1), default=128, help="default: 128")
    parser.add_argument(
        "--temperature", type=number(float, 0, 100), default=0.0, help="0, the default, is greedy"
    )
    parser.add_argument(
        "--top-p",
        type=number(float, 1e-6, 1),
        default=1.0,
        help="nucleus of the sampling (default: 1)",
    )
    parser.add_argument(
        "--seed", type=number(int, 0), default=0, help="of the sampling (default: 0)"
    )
    parser.add_argument(
        "--chat",
        action=argparse.BooleanOptionalAction,
        help="wrap the prompt in the model's chat template (default: if it has one)",
    )
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="default: float32")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object instead of streaming text"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(lambda: run(parse_arguments()))
