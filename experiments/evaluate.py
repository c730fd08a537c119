"""Measures what a cache costs in quality.

    python -m experiments.evaluate longeval --model weights/teacher --caches full,streaming,cskv
    python -m experiments.evaluate perplexity --model M --text heldout.txt --calibrate other.txt
    python -m experiments.evaluate longbench --model M --calibrate TEXT --data FOLDER
    torchrun --nproc-per-node 2 -m experiments.evaluate ...       shares the cases out

What is measured, and the two protocols of `--question`: experiments/README.md, "How to read the
numbers". One forward pass would measure nothing: prefill is exact for nearly every cache here.
"""

import support.interrupt  # isort: skip # noqa: F401

import argparse
import functools
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from cskv import CALIBRATED, INITIALIZATIONS, Factors, Statistics, init_factors
from experiments import figures
from experiments.caches import Row, add_cache_options, make_rows
from experiments.measuring import Case, measure
from experiments.notes import all_that_counts, delete_notes, own_notes
from experiments.tables import compare_with_full, table, write_json
from experiments.tasks import longbench, lveval
from experiments.tasks.longeval import PUBLISHED, RetrievalCase, make_cases, read_cases, samples
from experiments.tasks.prompts import read_prompt
from experiments.tasks.records import prompt_ids, read_records
from experiments.tasks.scores import is_correct
from infer import generate, make_sampler
from model import LayerCache, Transformer
from support.command import (
    DTYPES,
    Arguments,
    UserError,
    check_files,
    comma_list,
    number,
    run_command,
    user_values,
)
from support.factors_file import load_factors
from support.huggingface.checkpoint import load_model
from support.huggingface.tokenizer import Tokenizer, load_tokenizer
from support.processes import calibrate_together, place, processes
from support.text import WIDER_CACHES, check_finite, passages, read_documents, sample_tokens

PROTOCOLS = ("prefill", "decode")
# Tokens of an answer: LongEval's limit, and enough to continue "The pass key is".
ANSWER_TOKENS = {"longeval": 100, "passkey": 10}
# Tokens to make room for: those of a number. A wordier answer to LongEval makes the buffers grow.
ANSWER_ROOM = {"longeval": 8, "passkey": 10}

BENCHMARKS = {"longbench": longbench, "lveval": lveval}

# ---------------------------------------------------------------------------------- perplexity


@dataclass(frozen=True)
class Passages(Case):
    """A batch of passages; the score of each is its mean negative log likelihood."""

    following: Tensor  # [B, steps], the tokens to predict

    @torch.no_grad()
    def score(self, model: Transformer, logits: Tensor, cache: list[LayerCache]) -> list[float]:
        following = self.following.to(logits.device)
        losses = []
        for t in range(following.shape[1]):
            if t > 0:
                logits = model(following[:, t - 1 : t], cache)
            losses.append(F.cross_entropy(logits[:, -1].float(), following[:, t], reduction="none"))
        nll = torch.stack(losses, dim=1).mean(1)
        check_finite(bool(nll.isfinite().all()), WIDER_CACHES)
        return nll.tolist()


def perplexity_cases(
    model: Transformer,
    tokenizer: Tokenizer,
    texts: list[Path],
    contexts: list[int],
    steps: int,
    count: int,
    batch: int,
) -> list[Passages]:
    """`count` passages of each text and for each context, `batch` of them a case: so many tokens of
    context, then `steps`."""
    limit = model.config.context_length
    if max(contexts) + steps > limit:
        raise UserError(f"{max(contexts) + steps} tokens do not fit into {limit} of context")
    names = [text.stem for text in texts]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two texts for {name}; give each once, and each file its own name")
    cases = []
    for text in texts:
        ids = tokenizer.encode("\n\n".join(read_documents(text)))
        for context in contexts:
            columns = {"text": text.stem, "context": context}
            length = context + steps
            for some in passages(ids, count, length).split(batch):
                case = Passages(columns, some[:, :context], length - 1, some[:, context:])
                cases.append(case)
    return cases


# ---------------------------------------------------------------------- questions with answers


@dataclass(frozen=True)
class Question(Case):
    """A prompt [1, T] whose answer is generated, and judged from 0 to 1."""

    question: list[int]  # tokens that are decoded one by one before the answer
    max_new_tokens: int
    tokenizer: Tokenizer
    judge: Callable[[str], float]  # of the answer's text

    def score(self, model: Transformer, logits: Tensor, cache: list[LayerCache]) -> list[float]:
        answer = self.answer(model, logits, cache)
        return [float(self.judge(self.tokenizer.decode(answer)))]

    @torch.no_grad()
    def answer(self, model: Transformer, logits: Tensor, cache: list[LayerCache]) -> list[int]:
        """Greedily; `logits` [1, 1, vocab] are those before the question."""
        greedy = make_sampler(0.0, 1.0, 0)
        if self.question:
            return list(generate(model, self.question, cache, self.max_new_tokens, greedy))
        first = greedy(logits[0, -1])
        if first in model.config.eos_token_ids:
            return []
        return [first, *generate(model, [first], cache, self.max_new_tokens - 1, greedy)]


def check_room(model: Transformer, prompt: int, answer: int) -> None:
    limit = model.config.context_length
    if prompt + answer > limit:
        problem = f"a prompt of {prompt} tokens leaves no room in a context of {limit}"
        raise UserError(f"{problem}; shorten it with --lines, or choose other --sets")


def split_prompt(
    tokenizer: Tokenizer, case: RetrievalCase, question: str, chat: bool | None = None
) -> tuple[list[int], list[int]]:
    """A case's tokens as (prefilled, decoded), the same ones in both protocols; in the chat
    template of a model that has one, unless `chat` is False."""
    ids = tokenizer.encode_prompt(case.prompt, chat)
    if question == "prefill":
        return ids, []
    # The context ends where the tokens begin to depend on what is asked.
    context = tokenizer.encode_prompt(case.context, chat)
    same = [one == other for one, other in zip(ids, context, strict=False)]
    end = max(1, [*same, False].index(False))  # there is no prefill of nothing
    return ids[:end], ids[end:]


def retrieval_cases(
    model: Transformer,
    tokenizer: Tokenizer,
    task: str,
    protocols: list[str],
    lines: list[int],
    count: int,
    data: Path | None = None,
) -> list[Question]:
    """`count` LongEval or passkey cases of every length, of LongEval's own in a folder `data` the
    first ones. A passkey prompt is a text to continue, so it goes into no chat template."""
    passkey = task == "passkey"
    chat = False if passkey else None
    room = ANSWER_ROOM[task]
    questions = []
    for protocol, n in product(protocols, lines):
        cases = read_cases(data, n)[:count] if data else make_cases(task, n, count, seed=0)
        columns = {"question": protocol, "lines": n}
        for case in cases:
            ids, rest = split_prompt(tokenizer, case, protocol, chat)
            length = len(ids) + len(rest)
            check_room(model, length, room)
            new = min(ANSWER_TOKENS[task], model.config.context_length - length)
            judge = functools.partial(is_correct, answer=case.answer, first=passkey)
            prompt = torch.tensor([ids])
            questions.append(Question(columns, prompt, length + room, rest, new, tokenizer, judge))
    return questions


def benchmark_cases(
    args: argparse.Namespace, model: Transformer, tokenizer: Tokenizer
) -> list[Question]:
    """The first records of each set; a case's score is its task's, from 0 to 1."""
    module = BENCHMARKS[args.what]
    questions = []
    for name in args.sets or module.TASKS:
        task = module.TASKS[name]
        new = task.max_new_tokens
        # Room for the answer, and for what the seam and a chat template may add.
        most = max(2, min(module.MAX_LENGTH, model.config.context_length - new - 64))
        for record in read_records(task, args.data)[: args.cases]:
            ids = prompt_ids(task, record, tokenizer, most)
            check_room(model, len(ids), new)
            columns = {"set": name, "bucket": task.bucket(record)}
            judge = functools.partial(task.score, record=record)
            length = len(ids) + new
            prompt = torch.tensor([ids])
            questions.append(Question(columns, prompt, length, [], new, tokenizer, judge))
    return questions


# ---------------------------------------------------------------------------- the command line


def cases_of(args: argparse.Namespace, model: Transformer, tokenizer: Tokenizer) -> list[Case]:
    if args.what == "perplexity":
        sizes = {"count": args.passages, "batch": args.batch, "steps": args.steps}
        return perplexity_cases(model, tokenizer, args.text, args.context, **sizes)
    if args.what in BENCHMARKS:
        return benchmark_cases(args, model, tokenizer)
    drawn = {"count": args.cases, "data": args.data}
    return retrieval_cases(model, tokenizer, args.what, args.question, args.lines, **drawn)


def rows_of(args: argparse.Namespace, model: Transformer, tokenizer: Tokenizer) -> list[Row]:
    """The caches to compare, with factors from files, or made here."""
    limit = model.config.context_length
    if args.equal and args.equal > limit:
        raise UserError(f"--equal {args.equal} exceeds the context of {limit}")

    @functools.cache
    def statistics() -> list[Statistics]:
        length = min(args.seq_len, limit)
        if args.calibrate:
            texts = sample_tokens(args.calibrate, tokenizer, args.samples, length, 0, args.sinks)
        elif args.what in ANSWER_TOKENS:
            count = min(args.samples, 64)
            texts = samples(tokenizer, length, args.what, [max(args.lines)], count, seed=0)
        else:
            raise UserError("cskv and asvd need factors, made from text; give --calibrate TEXT")
        return calibrate_together(model, texts, args.sinks)

    @functools.cache
    def make_factors(init: str, rank: int) -> Factors:
        ranks = [rank] * len(model.model.layers)
        seen = statistics() if init in CALIBRATED else None
        return init_factors(init, model, ranks, ranks, seen)

    with user_values():
        return make_rows(
            model,
            args.caches,
            args.ratios,
            make_factors,
            files=[(file.stem, load_factors(file, model)) for file in args.factors],
            inits=args.inits or ([] if args.factors else ["attention"]),
            bits=args.bits,
            window=args.window,
            sinks=args.sinks,
            dtype=DTYPES[args.cache_dtype],
            equal=args.equal,
        )


def run(args: argparse.Namespace) -> None:
    """The command line, with arguments already parsed."""
    with processes(args.device) as device:
        written = {"--json": args.json, "the notes of --json": own_notes(args.json)}
        written["--picture"] = args.picture
        read = {"--calibrate": args.calibrate, "--data": args.data}
        read |= {str(file): file for file in (*args.text, *args.factors)}
        if args.data:  # the sets of a benchmark may lie one folder below
            read |= {str(file): file for file in args.data.glob("*/*.jsonl")}
        check_files(written, read, args.model)
        if args.picture:
            figures.pyplot()  # if it is missing, that is known before the work and not after
        model = load_model(args.model, device, DTYPES[args.dtype])
        tokenizer = load_tokenizer(args.model, model.config.vocab_size)
        if args.vicuna or args.no_chat:
            tokenizer.template = read_prompt("vicuna") if args.vicuna else None
        cases = cases_of(args, model, tokenizer)
        caches = rows_of(args, model, tokenizer)
        plan = all_that_counts(vars(args), model, args.model) if args.json else None
        rows = measure(model, caches, cases, args.json, plan)
        if args.what == "perplexity" and args.caches[0] == "full":
            compare_with_full(rows)
        if place()[0] == 0:
            print(table(rows))
            write_json(args.json, rows)
            if args.picture:  # all files of a cache on one line
                files = {file.stem: "" for file in args.factors}
                drawn = [
                    row | {"factors": files.get(row["factors"], row["factors"])} for row in rows
                ]
                figures.scores(drawn, args.picture, "measured_ratio", "measured ratio")
            delete_notes(args.json)


def shared_options() -> Arguments:
    """The options of all sub-commands."""
    parser = Arguments(add_help=False)
    add_cache_options(parser)
    add = parser.add_argument
    inits = comma_list(str, INITIALIZATIONS)
    count = number(int, 1)
    add("--model", required=True, help="measure this checkpoint, a folder or a hub name")
    add("--inits", type=inits, help="make such factors (without --factors: attention)")
    help = "take --ratios as bytes: each cache gets the size that holds so much less than a full "
    add("--equal", type=count, metavar="TOKENS", help=help + "one, after so many tokens")
    add("--calibrate", type=Path, help="fit factors to this text (LongEval has cases for it)")
    add("--samples", type=count, default=256, help="calibrate on so many texts (default: 256)")
    add("--seq-len", type=number(int, 2), default=1024, help="cut them to so many tokens (1024)")
    add("--vicuna", action="store_true", help="ask in Vicuna's chat template, as LongChat wants it")
    add("--no-chat", action="store_true", help="ask without the model's chat template")
    add("--cache-dtype", choices=DTYPES, default="bfloat16", help="hold such numbers (bfloat16)")
    add("--device", default="cpu", help="compute on cpu or cuda")
    add("--dtype", choices=DTYPES, default="float32", help="compute in it (default: float32)")
    add("--json", type=Path, help="write the rows to this file, and resume a run that was stopped")
    return parser


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    shared = shared_options()
    parser = Arguments(description=__doc__)
    parser.set_defaults(text=(), data=None, picture=None)
    commands = parser.add_subparsers(dest="what", required=True, parser_class=Arguments)
    count = number(int, 1)

    add = commands.add_parser("perplexity", parents=[shared], help="of text").add_argument
    help = "predict these held-out .txt or .jsonl files"
    add("--text", type=Path, nargs="+", required=True, help=help)
    add("--picture", type=Path, help="draw perplexity against measured bytes, a PNG")
    contexts = comma_list(count)
    add("--context", type=contexts, default="1024", help="prefill so many tokens: 1000,4000 (1024)")
    add("--steps", type=count, default=256, help="decode so many one by one (default: 256)")
    add("--passages", type=count, default=16, help="measure on so many (default: 16)")
    add("--batch", type=count, default=8, help="read so many at a time, as memory allows (8)")

    protocols = comma_list(str, PROTOCOLS)
    for name, unit in (("longeval", "lines in a record"), ("passkey", "repetitions of filler")):
        add = commands.add_parser(name, parents=[shared], help="retrieval").add_argument
        add("--lines", type=comma_list(count), help=f"ask with so many {unit}: 25,50 (default: 50)")
        add("--cases", type=count, default=50, help="ask so often at each length (default: 50)")
        add(
            "--question",
            type=protocols,
            default="prefill",
            help="prefill it, decode it, or prefill,decode",
        )
        if name == "longeval":
            add("--data", type=Path, help="read LongEval's own cases in this folder")

    for name, module in BENCHMARKS.items():
        add = commands.add_parser(name, parents=[shared], help="a benchmark").add_argument
        sets = comma_list(str, module.TASKS)
        add("--sets", type=sets, help=f"ask these of {', '.join(module.TASKS)}")
        add("--data", type=Path, help="read the benchmark in this folder, not from the hub")
        add("--cases", type=count, help="ask the first so many of each set (default: all)")

    args = parser.parse_args(argv)
    if args.what in ANSWER_TOKENS and args.lines is None:
        args.lines = PUBLISHED if args.data else [50]
    return args


if __name__ == "__main__":
    run_command(lambda: run(parse_arguments()))
