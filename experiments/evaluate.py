"""Measures what a cache costs in quality.

    python -m experiments.evaluate longeval --model weights/teacher --lines 25,50,100 --cases 100 \
        --caches full,streaming,h2o,asvd,cskv,kivi-2,kivi-4 --ratios 0.5,0.8
    python -m experiments.evaluate perplexity --model M --text heldout.txt \
        --calibrate calibration.txt --inits svd,asvd,optimal --ratios 0.5,0.8
    python -m experiments.evaluate longbench --model M --calibrate TEXT --data FOLDER
    torchrun --nproc-per-node 2 -m experiments.evaluate ...       shares the cases out

Perplexity is measured in decode mode: the first `--context` tokens of a passage are prefilled, then
the next `--steps` are predicted while they go through the cache one by one, and only these count.
(The first of them still comes from the prefill. A single forward pass over the text would measure
nothing: prefill is exact for nearly every cache here.)

Retrieval (`longeval`, `passkey`) has two protocols. In the paper's, `--question prefill`, the whole
prompt is prefilled, so that the first digit is read with exact keys and values. In the harder one,
`--question decode`, the context is prefilled and the question fed to the cache token by token: the
context was compressed before anyone knew what would be asked.

With `--json FILE` a run that was interrupted goes on where it stopped (experiments/measuring.py).
"""

import argparse
import hashlib
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments import longbench, longeval, lveval
from experiments.caches import add_arguments, choices
from experiments.longeval import is_correct, make_cases
from experiments.measuring import Case, Text, forget, measure, table, with_score, write_json
from infer import generate, make_sampler
from model import LayerCache, Transformer
from support.checkpoint import find_checkpoint, load_model
from support.command import (
    DTYPES,
    Arguments,
    UserError,
    check_device,
    check_writable,
    comma_list,
    number,
    one_of,
    run_command,
    user_values,
)
from support.factors_file import fingerprint
from support.processes import place, processes
from support.text import read_documents, sample_tokens
from support.tokenizer import Tokenizer, load_tokenizer

# Tokens of an answer: LongEval's limit, and enough to continue "The pass key is".
ANSWER_TOKENS = {"longeval": 100, "passkey": 10}
# Tokens to make room for: those of a number. A wordier answer to LongEval makes the buffers grow.
ANSWER_ROOM = {"longeval": 8, "passkey": 10}

PROTOCOLS = ("prefill", "decode")

# LongEval asks LongChat, whose checkpoint brings no template, in Vicuna's (FastChat, vicuna_v1.1).
VICUNA = (
    "{{ bos_token }}A chat between a curious user and an artificial intelligence assistant. The "
    "assistant gives helpful, detailed, and polite answers to the user's questions. "
    "USER: {{ messages[0]['content'] }} ASSISTANT:"
)

# ---------------------------------------------------------------------------------- perplexity


@torch.no_grad()
def decode_nll(
    model: Transformer, logits: Tensor, tokens: Tensor, cache: list[LayerCache]
) -> Tensor:
    """Negative log likelihood [B, n] of `tokens` [B, n], fed to the cache one by one; `logits`
    [B, 1, vocab] are those of the token before them."""
    losses = []
    for t in range(tokens.shape[1]):
        losses.append(F.cross_entropy(logits[:, -1].float(), tokens[:, t], reduction="none"))
        if t + 1 < tokens.shape[1]:
            logits = model(tokens[:, t : t + 1], cache)
    return torch.stack(losses, dim=1)


def passages(ids: list[int], count: int, length: int) -> Tensor:
    """`count` passages of `length` tokens, spread evenly over a text, as [count, length]."""
    if len(ids) < count * length:
        raise UserError(f"the text has {len(ids)} tokens, {count} passages of {length} need more")
    starts = [i * (len(ids) - length) // max(1, count - 1) for i in range(count)]
    return torch.tensor([ids[s : s + length] for s in starts])


def perplexity_cases(
    args: argparse.Namespace, model: Transformer, tokenizer: Tokenizer
) -> list[Case]:
    """A case is a batch of passages; the score of each, its mean negative log likelihood."""
    length = args.context + args.steps
    if length > model.config.context_length:
        raise UserError(f"{length} tokens do not fit into {model.config.context_length} of context")
    text = "\n\n".join(read_documents(args.text))
    tokens = passages(tokenizer.encode(text), args.passages, length).to(args.device)

    def text_of(batch: Tensor) -> Text:
        prompt, rest = batch.split([args.context, args.steps], dim=1)

        def score(logits: Tensor, cache: list[LayerCache]) -> list[float]:
            return decode_nll(model, logits, rest, cache).mean(1).tolist()

        return Text(prompt, length - 1, score)  # the last token is not fed to the cache

    return [({}, lambda batch=batch: text_of(batch)) for batch in tokens.split(args.batch)]


# ----------------------------------------------------------------------------------- retrieval


@torch.no_grad()
def greedy_answer(
    model: Transformer, logits: Tensor, question: list[int], cache: list[LayerCache], most: int
) -> list[int]:
    """Up to `most` tokens, after the tokens of `question` went through the cache one by one.
    `logits` [1, 1, vocab] are those of the token before the question."""
    for token in question:
        logits = model(torch.tensor([[token]], device=logits.device), cache)
    first = int(logits[0, -1].argmax())
    if first in model.config.eos_token_ids:
        return []
    return [first, *generate(model, [first], cache, most - 1, make_sampler(0.0, 1.0, 0))]


def split_prompt(
    tokenizer: Tokenizer, case: longeval.Case, question: str, chat: bool = True
) -> tuple[list[int], list[int]]:
    """A case's tokens as (prefilled, decoded), the same ones in both protocols; in the chat
    template of a model that has one, unless `chat` is False."""

    within = None if chat else False  # the template, if there is one
    ids, context = (tokenizer.encode_prompt(text, within) for text in (case.prompt, case.context))
    if question == "prefill":
        return ids, []
    # The context ends where the tokens begin to depend on what is asked.
    pairs = enumerate(zip(ids, context, strict=False))
    end = next((i for i, (ours, other) in pairs if ours != other), len(context))
    return ids[:end], ids[end:]


def retrieval_cases(
    args: argparse.Namespace, model: Transformer, tokenizer: Tokenizer
) -> list[Case]:
    """LongEval or passkey cases of every length; the score is 1 for a right answer, else 0.

    A passkey prompt is a text to continue, so it goes into no chat template. Raises `UserError` for
    a case that leaves no room for a number in the model's context.
    """
    passkey, limit = args.what == "passkey", model.config.context_length
    room = ANSWER_ROOM[args.what]

    def text_of(case: longeval.Case, protocol: str) -> Text:
        prompt, question = split_prompt(tokenizer, case, protocol, chat=not passkey)
        length = len(prompt) + len(question)
        if length + room > limit:
            raise UserError(
                f"a case of {length} tokens leaves no room in a context of {limit}; shorten it "
                "with --lines"
            )
        most = min(ANSWER_TOKENS[args.what], limit - length)

        def score(logits: Tensor, cache: list[LayerCache]) -> list[float]:
            output = tokenizer.decode(greedy_answer(model, logits, question, cache, most))
            return [float(is_correct(output, case.answer, first=passkey))]

        return Text(torch.tensor([prompt], device=args.device), length + room, score)

    texts = [
        ({"question": protocol, "lines": lines}, text_of(case, protocol))
        for protocol in args.question
        for lines in args.lines
        for case in make_cases(args.what, lines, args.cases, args.seed, args.spelled)
    ]
    return [(columns, lambda text=text: text) for columns, text in texts]


# --------------------------------------------------------------------- LongBench-E and LV-Eval


def benchmark_cases(
    args: argparse.Namespace, model: Transformer, tokenizer: Tokenizer
) -> list[Case]:
    """LongBench-E or LV-Eval records; a case's score is its task's, from 0 to 1."""
    benchmark, limit = BENCHMARKS[args.what], model.config.context_length
    chat = tokenizer.template is not None

    def text_of(task: longbench.Task, record: dict) -> Text:
        # Room for the answer, and for what the seam and a chat template may add.
        room = limit - task.max_new_tokens - 64
        most = max(2, min(args.max_length or benchmark.MAX_LENGTH, room))
        prompt = longbench.prompt_ids(task, record, tokenizer, most, chat)
        length = len(prompt) + task.max_new_tokens
        if length > limit:
            raise UserError(
                f"{task.name}: a prompt of {len(prompt)} tokens and an answer of "
                f"{task.max_new_tokens} do not fit into a context of {limit}; choose other "
                "--sets, or a lower --max-length"
            )

        def score(logits: Tensor, cache: list[LayerCache]) -> list[float]:
            output = greedy_answer(model, logits, [], cache, task.max_new_tokens)
            return [task.score(tokenizer.decode(output), record)]

        return Text(torch.tensor([prompt], device=args.device), length, score)

    return [
        (
            {"set": task.name, "bucket": task.bucket(record)},
            lambda task=task, record=record: text_of(task, record),
        )
        for task in benchmark.select(list(dict.fromkeys(args.sets or benchmark.TASKS)))
        for record in longbench.read_records(task, args.data)[: args.cases]
    ]


BENCHMARKS = {"longbench": longbench, "lveval": lveval}
CASES = {
    "perplexity": perplexity_cases,
    "longeval": retrieval_cases,
    "passkey": retrieval_cases,
    "longbench": benchmark_cases,
    "lveval": benchmark_cases,
}

# -------------------------------------------------------------------------------- command line


def contents(path: Path) -> str:
    """A digest of a file, or of all files in a folder."""
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            digest.update(file.read_bytes())
    return digest.hexdigest()


SMALL = (".json", ".jinja", ".model")  # a checkpoint's files that are not its weights


def flags(args: argparse.Namespace, model: Transformer) -> dict:
    """The arguments that must be the same to go on with noted cases; files by their contents."""

    def shown(value: object) -> object:
        if isinstance(value, list):
            return [shown(item) for item in value]
        return contents(value) if isinstance(value, Path) else str(value)

    named = {name: shown(v) for name, v in vars(args).items() if name not in ("json", "device")}
    folder = find_checkpoint(args.model)
    small = [contents(file) for file in sorted(folder.iterdir()) if file.suffix in SMALL]
    return {**named, "model": [fingerprint(model), small]}


def calibration_samples(
    args: argparse.Namespace, model: Transformer, tokenizer: Tokenizer
) -> list[Tensor]:
    """Samples [1, T] of `--calibrate`; without it, retrieval takes cases of another seed."""
    length = min(args.seq_len, model.config.context_length)
    if args.calibrate:
        return sample_tokens(args.calibrate, tokenizer, args.samples, length, args.seed)
    if CASES[args.what] is not retrieval_cases:
        raise UserError("factors for cskv and asvd are made from text; give --calibrate TEXT")
    lines, count = max(args.lines), min(args.samples, 64)
    cases = make_cases(args.what, lines, count, args.seed + 10**9, args.spelled)
    return [torch.tensor([tokenizer.encode(case.text)[:length]]) for case in cases]


def run(args: argparse.Namespace) -> None:
    """The command line, with arguments already parsed."""
    with processes(args.device) as args.device:
        evaluate(args)


def evaluate(args: argparse.Namespace) -> None:
    """Measures as the arguments say, and prints and writes the table."""
    check_device(args.device)
    check_writable(args.json)
    model = load_model(args.model, args.device, DTYPES[args.dtype])
    tokenizer = load_tokenizer(args.model)
    if args.vicuna:
        tokenizer.template = VICUNA
    cases = CASES[args.what](args, model, tokenizer)
    with user_values():
        rows = choices(args, model, lambda: calibration_samples(args, model, tokenizer))
    rows = measure(model, rows, cases, args.json, flags(args, model) if args.json else None)
    rows = with_score(args.what, rows)
    if place()[0] == 0:
        print(table(rows))
        write_json(args.json, rows)
        if args.json:
            forget(args.json)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    shared = p = Arguments(add_help=False)
    p.add_argument("--model", required=True, help="checkpoint folder or hub name")
    add_arguments(p)
    p.add_argument(
        "--calibrate",
        type=Path,
        help="text to make factors from (default, for retrieval: cases of another seed)",
    )
    p.add_argument("--samples", type=number(int, 1), default=256, help="calibration samples")
    p.add_argument("--seq-len", type=number(int, 2), default=1024, help="tokens of a sample")
    p.add_argument("--seed", type=number(int, 0), default=0, help="of the samples and the cases")
    p.add_argument("--device", default="cpu")
    p.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="to compute in (default: float32)"
    )
    p.add_argument(
        "--vicuna", action="store_true", help="ask in Vicuna's chat template, as LongChat wants it"
    )
    p.add_argument("--json", type=Path, help="write the rows to this file; resume from beside it")

    parser = Arguments(description=__doc__.splitlines()[0])
    what = parser.add_subparsers(dest="what", required=True, parser_class=Arguments)
    p = what.add_parser(
        "perplexity", parents=[shared], help="of held-out text, decoded token by token"
    )
    p.add_argument("--text", type=Path, required=True, help="held-out .txt or .jsonl")
    p.add_argument("--context", type=number(int, 1), default=1024, help="tokens prefilled")
    p.add_argument("--steps", type=number(int, 1), default=256, help="tokens measured, one by one")
    p.add_argument("--passages", type=number(int, 1), default=16, help="of the held-out text")
    p.add_argument("--batch", type=number(int, 1), default=8, help="passages at a time")
    for task, unit in (("longeval", "lines of a record"), ("passkey", "repetitions of the filler")):
        p = what.add_parser(task, parents=[shared], help=f"retrieval, {task} cases from a seed")
        p.add_argument(
            "--lines", type=comma_list(number(int, 1)), default=[50], help=f"{unit}: 10,30,100"
        )
        p.add_argument("--cases", type=number(int, 1), default=50, help="of each length")
        p.add_argument(
            "--question",
            type=comma_list(one_of(PROTOCOLS, "protocol")),
            default=["prefill"],
            help="prefill (default), decode, or prefill,decode: the protocols, see above",
        )
        p.add_argument("--spelled", action="store_true", help="keys of made-up words")
    for task, module in BENCHMARKS.items():
        p = what.add_parser(task, parents=[shared], help=module.__doc__.splitlines()[0])
        p.add_argument("--data", type=Path, help="folder of .jsonl files (default: from the hub)")
        p.add_argument(
            "--sets", type=lambda text: text.split(","), help=f"of {', '.join(module.TASKS)}"
        )
        p.add_argument("--cases", type=number(int, 1), help="of each set (default: all)")
        p.add_argument(
            "--max-length",
            type=number(int, 2),
            help=f"tokens of a prompt, its middle cut out (default: {module.MAX_LENGTH})",
        )
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(lambda: run(parse_arguments()))
