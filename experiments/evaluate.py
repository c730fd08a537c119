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
context was compressed before anyone knew what would be asked. `--json FILE` resumes a run.
"""

import argparse
import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from experiments.caches import add_cache_options, make_rows
from experiments.measuring import Case, measure, with_score
from experiments.notes import all_that_counts, delete_notes
from experiments.tables import table, write_json
from experiments.tasks import longbench, lveval
from experiments.tasks.longeval import PUBLISHED, RetrievalCase, make_cases, read_cases, samples
from experiments.tasks.prompts import read_prompt
from experiments.tasks.records import prompt_ids, read_records
from experiments.tasks.scores import is_correct
from infer import generate, make_sampler
from model import LayerCache, Transformer
from support.calibration import CALIBRATED, calibrate, init_factors
from support.command import DTYPES, Arguments, UserError, check_files, run_command, user_values
from support.factors_file import load_factors
from support.huggingface.checkpoint import load_model
from support.huggingface.tokenizer import Tokenizer, load_tokenizer
from support.options import add_options
from support.processes import place, processes
from support.text import WIDER_CACHES, check_finite, passages, read_documents, sample_tokens

# Tokens of an answer: LongEval's limit, and enough to continue "The pass key is".
ANSWER_TOKENS = {"longeval": 100, "passkey": 10}
# Tokens to make room for: those of a number. A wordier answer to LongEval makes the buffers grow.
ANSWER_ROOM = {"longeval": 8, "passkey": 10}

BENCHMARKS = {"longbench": longbench, "lveval": lveval}

# LongEval asks LongChat, whose checkpoint brings no template, in Vicuna's (FastChat, vicuna_v1.1).
VICUNA = read_prompt("vicuna")

# ---------------------------------------------------------------------------------- perplexity


@dataclass(frozen=True)
class Passages(Case):
    """A batch of passages; the score of each is its mean negative log likelihood."""

    following: Tensor  # [B, steps], the tokens to predict

    def score(self, model: Transformer, logits: Tensor, cache: list[LayerCache]) -> list[float]:
        return decode_nll(model, logits, self.following.to(logits.device), cache).mean(1).tolist()


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
    nll = torch.stack(losses, dim=1)
    check_finite(bool(nll.isfinite().all()), WIDER_CACHES)
    return nll


def perplexity_cases(
    model: Transformer,
    tokenizer: Tokenizer,
    text: Path,
    context: int = 1024,
    steps: int = 256,
    count: int = 16,
    batch: int = 8,
) -> list[Passages]:
    """`count` passages of a text, `batch` of them a case: `context` tokens, then `steps`."""
    length = context + steps
    if length > model.config.context_length:
        raise UserError(f"{length} tokens do not fit into {model.config.context_length} of context")
    tokens = passages(tokenizer.encode("\n\n".join(read_documents(text))), count, length)
    columns = {"text": text.stem, "context": context}
    return [  # the last token is not fed to the cache
        Passages(columns, some[:, :context], length - 1, some[:, context:])
        for some in tokens.split(batch)
    ]


# ----------------------------------------------------------------------------------- retrieval


@dataclass(frozen=True)
class Question(Case):
    """A prompt [1, T] whose answer is generated, and judged from 0 to 1."""

    question: list[int]  # tokens that are decoded one by one before the answer
    max_new_tokens: int
    tokenizer: Tokenizer
    judge: Callable[[str], float]  # of the answer's text

    def score(self, model: Transformer, logits: Tensor, cache: list[LayerCache]) -> list[float]:
        answer = greedy_answer(model, logits, self.question, cache, self.max_new_tokens)
        return [float(self.judge(self.tokenizer.decode(answer)))]


@torch.no_grad()
def greedy_answer(
    model: Transformer, logits: Tensor, question: list[int], cache: list[LayerCache], most: int
) -> list[int]:
    """Up to `most` tokens, after the tokens of `question` went through the cache one by one.
    `logits` [1, 1, vocab] are those of the token before the question."""
    for token in torch.tensor(question, dtype=torch.long, device=logits.device):
        logits = model(token.view(1, 1), cache)
    greedy = make_sampler(0.0, 1.0, 0)
    first = greedy(logits[0, -1])
    if first in model.config.eos_token_ids:
        return []
    return [first, *generate(model, [first], cache, most - 1, greedy)]


def split_prompt(
    tokenizer: Tokenizer, case: RetrievalCase, question: str, chat: bool = True
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
    end = max(1, end)  # there is no prefill of nothing
    return ids[:end], ids[end:]


def retrieval_cases(
    model: Transformer,
    tokenizer: Tokenizer,
    task: str,
    protocols: list[str],
    lines: list[int],
    count: int,
    seed: int = 0,
    spelled: bool = False,
    data: Path | None = None,
) -> list[Question]:
    """`count` LongEval or passkey cases of every length; the score is 1 for a right answer, else 0.

    `data` is a folder with LongEval's own files, to take the first `count` of each length from.
    A passkey prompt is a text to continue, so it goes into no chat template. Raises `UserError` for
    a case that leaves no room for a number in the model's context.
    """
    passkey, limit, room = task == "passkey", model.config.context_length, ANSWER_ROOM[task]
    cases = []
    for protocol in protocols:
        for n in lines:
            own = read_cases(data, n)[:count] if data else make_cases(task, n, count, seed, spelled)
            for case in own:
                prompt, question = split_prompt(tokenizer, case, protocol, chat=not passkey)
                length = len(prompt) + len(question)
                if length + room > limit:
                    raise UserError(
                        f"a case of {length} tokens leaves no room in a context of {limit}; "
                        "shorten it with --lines"
                    )
                columns = {"question": protocol, "lines": n}
                most = min(ANSWER_TOKENS[task], limit - length)
                judge = partial(is_correct, answer=case.answer, first=passkey)
                own = columns, torch.tensor([prompt]), length + room, question, most
                cases.append(Question(*own, tokenizer, judge))
    return cases


# --------------------------------------------------------------------- LongBench-E and LV-Eval


def benchmark_cases(
    model: Transformer,
    tokenizer: Tokenizer,
    benchmark: str,
    names: list[str] | None = None,
    folder: Path | None = None,
    count: int | None = None,
    max_length: int | None = None,
) -> list[Question]:
    """The first `count` records of each set; a case's score is its task's, from 0 to 1."""
    module, limit = BENCHMARKS[benchmark], model.config.context_length
    cases = []
    for task in module.select(list(dict.fromkeys(names or module.TASKS))):
        # Room for the answer, and for what the seam and a chat template may add.
        room = limit - task.max_new_tokens - 64
        most = max(2, min(max_length or module.MAX_LENGTH, room))
        records = read_records(task, folder)[:count]
        for record in tqdm(records, f"reading {task.name}", leave=False, disable=place()[0] > 0):
            chat = tokenizer.template is not None
            prompt = prompt_ids(task, record, tokenizer, most, chat)
            length = len(prompt) + task.max_new_tokens
            if length > limit:
                raise UserError(
                    f"{task.name}: a prompt of {len(prompt)} tokens and an answer of "
                    f"{task.max_new_tokens} do not fit into a context of {limit}; choose other "
                    "--sets, or a lower --max-length"
                )
            columns = {"set": task.name, "bucket": task.bucket(record)}
            judge = partial(task.score, record=record)
            own = columns, torch.tensor([prompt]), length, [], task.max_new_tokens
            cases.append(Question(*own, tokenizer, judge))
    return cases


def run(args: argparse.Namespace) -> None:
    """The command line, with arguments already parsed."""
    with processes(args.device) as device:
        read = {"--text": getattr(args, "text", None), "--calibrate": args.calibrate}
        check_files({"--json": args.json}, read | {str(file): file for file in args.factors})
        model = load_model(args.model, device, DTYPES[args.dtype])
        tokenizer = load_tokenizer(args.model, model.config.vocab_size)
        limit = model.config.context_length
        if args.vicuna or args.no_chat:
            tokenizer.template = VICUNA if args.vicuna else None
        if args.what == "perplexity":
            sizes = args.context, args.steps, args.passages, args.batch
            cases = perplexity_cases(model, tokenizer, args.text, *sizes)
        elif args.what in BENCHMARKS:
            sizes = args.cases, args.max_length
            cases = benchmark_cases(model, tokenizer, args.what, args.sets, args.data, *sizes)
        else:
            drawn = args.lines, args.cases, args.seed, args.spelled, getattr(args, "data", None)
            cases = retrieval_cases(model, tokenizer, args.what, args.question, *drawn)
        if args.equal and args.equal > limit:
            raise UserError(f"--equal {args.equal} exceeds the context of {limit}")

        @functools.cache
        def statistics() -> list:
            length = min(args.seq_len, limit)
            if args.calibrate:
                text = args.calibrate, tokenizer, args.samples, length, args.seed, args.sinks
                return calibrate(model, sample_tokens(*text), args.sinks)
            if args.what not in ANSWER_TOKENS:
                raise UserError(
                    "factors for cskv and asvd are made from text; give --calibrate TEXT"
                )
            drawn = [max(args.lines)], min(args.samples, 64), args.seed, args.spelled
            return calibrate(model, samples(tokenizer, length, args.what, *drawn), args.sinks)

        @functools.cache
        def make_factors(init: str, rank: int):
            ranks = [rank] * len(model.model.layers)
            seen = statistics() if init in CALIBRATED else None
            return init_factors(init, model, ranks, ranks, seen, args.seed)

        with user_values():
            rows = make_rows(
                model,
                args.caches,
                args.ratios,
                make_factors,
                files=[(file.stem, load_factors(file, model)) for file in args.factors],
                inits=args.inits or ([] if args.factors else ["optimal"]),
                bits=args.bits,
                clamped=args.clamped_zero_point,
                window=args.window,
                sinks=args.sinks,
                dtype=DTYPES[args.cache_dtype],
                equal=args.equal,
            )
        counts = all_that_counts(vars(args), model, args.model) if args.json else None
        rows = with_score(measure(model, rows, cases, args.json, counts))
        if place()[0] == 0:
            print(table(rows))
            write_json(args.json, rows)
            delete_notes(args.json)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    shared = Arguments(add_help=False)
    add_cache_options(shared)
    add_options(shared, "model inits factors bits clamped-zero-point equal vicuna no-chat json")
    add_options(shared, "cache-dtype calibrate samples seq-len seed device dtype")
    parser = Arguments(description=__doc__.splitlines()[0])
    what = parser.add_subparsers(dest="what", required=True, parser_class=Arguments)

    def add(name: str, help: str, names: str, helps=None, **defaults) -> None:
        add_options(what.add_parser(name, parents=[shared], help=help), names, helps, **defaults)

    add("perplexity", "decoded token by token", "text context steps passages batch")
    own = {"cases": 50, "question": ["prefill"]}
    helps = {"data": "folder of LongEval's own files, `200_lines.jsonl` and so on, instead of ours"}
    helps["lines"] = "of a record (default: 50, or with --data 200,300,400,500)"
    add("longeval", "retrieval", "lines data cases question spelled", helps, **own)
    names = "lines cases question spelled"
    add("passkey", "retrieval, from filler text", names, lines=[50], **own)
    for name, module in BENCHMARKS.items():
        helps = {"sets": f"of {', '.join(module.TASKS)} (default: all)"}
        helps["max-length"] = f"of a prompt, its middle cut out (default: {module.MAX_LENGTH})"
        add(name, module.__doc__.splitlines()[0], "data sets cases max-length", helps)
    args = parser.parse_args(argv)
    if args.what == "longeval":
        args.lines = args.lines or (PUBLISHED if args.data else [50])
        if args.data and args.spelled:
            parser.error("--spelled is for our own cases; leave it or --data out")
    return args


if __name__ == "__main__":
    run_command(lambda: run(parse_arguments()))
