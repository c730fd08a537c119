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

Under torchrun each process has a copy of the model and takes every n-th case. With `--json FILE`,
every case is noted in a file beside it as soon as it is done, and the same command goes on where it
stopped, with as many processes as one likes.
"""

import argparse
import hashlib
import json
import math
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from statistics import fmean

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import cskv
from experiments import longbench, lveval
from experiments.caches import Choice, add_arguments, choices, full_bytes, held_bytes
from experiments.longeval import Case, is_correct, make_cases
from infer import generate, make_sampler
from model import (
    DTYPES,
    Arguments,
    LayerCache,
    Tokenizer,
    Transformer,
    UserError,
    check_device,
    check_folder,
    load_model,
    load_tokenizer,
    number,
    numbers,
    replacing,
    run_command,
)
from train import place, processes, read_documents, sample_tokens, say

ANSWER_TOKENS = 100  # LongEval's limit
ANSWER_ROOM = 8  # tokens that a number takes; a wordier answer makes the buffers grow

# A case: the columns of the rows that it counts in, and a function that runs it. This gets
# `make(expected)`, which gives an empty cache for a final length, and returns the scores, one for
# each sequence of its batch, and the cache as it is in the end.
Make = Callable[[int], list[LayerCache]]
Run = Callable[[Make], tuple[list[float], list[LayerCache]]]

# ---------------------------------------------------------------------------------- measuring


def measure(
    model: Transformer,
    rows: list[Choice],
    cases: list[tuple[dict, Run]],
    notes: Path | None = None,
    arguments: dict | None = None,
) -> list[dict]:
    """Runs every case on every cache: a row {columns, "scores", "cases", "honest_ratio", ...} for
    each cache and each group of cases with the same columns.

    Processes share the cases out, and all return all rows. With `notes`, finished cases are kept in
    files of that name until `forget` removes them, and are not run again. Raises `UserError` if the
    notes are those of other `arguments`, and what a cache or a case raises.
    """
    for row in rows:
        row.make(0)  # a cache that refuses this model does so now, not after hours
    rank, count = place()
    done = read_notes(notes, arguments) if notes else {}
    if count > 1:
        # On the CPU, and patient: one process may have finished hours before another.
        group = dist.new_group(backend="gloo", timeout=timedelta(days=7))
        dist.barrier(group)  # before anyone writes notes, all have read the same
    file = start_notes(notes, rank, arguments) if notes else None

    todo = [(r, c) for r in range(len(rows)) for c in range(len(cases)) if (r, c) not in done]
    bar = tqdm(todo[rank::count], unit="case", leave=False, disable=rank > 0)
    failure = None
    try:
        for r, c in bar:
            bar.set_description(rows[r].label)
            done[r, c] = run_case(rows[r], cases[c][1])
            if file:
                write_note(file, {"row": r, "case": c, **done[r, c]})
    except UserError as error:
        failure = error
    if count > 1:
        parts = [None] * count
        dist.all_gather_object(parts, (done, failure), group)
        done = {key: result for part, _ in parts for key, result in part.items()}
        failure = next((error for _, error in parts if error), None)
    if failure:
        raise failure

    groups: dict[tuple, list[int]] = {}
    for c, (columns, _) in enumerate(cases):
        groups.setdefault(tuple(columns.items()), []).append(c)
    return [
        {**row.columns, **dict(columns), **summary(model, [done[r, c] for c in members])}
        for columns, members in groups.items()
        for r, row in enumerate(rows)
    ]


def run_case(row: Choice, run: Run) -> dict:
    """What notes keep of a case. `tokens` are those of all its sequences, as `bytes` are."""
    start = time.perf_counter()
    scores, cache = run(row.make)
    return {
        "scores": scores,
        "tokens": len(scores) * cache[0].length,
        "bytes": held_bytes(cache),
        "seconds": time.perf_counter() - start,
    }


def summary(model: Transformer, results: list[dict]) -> dict:
    """Finished cases together: `tokens` is the mean length, `seconds` the sum."""
    scores = [score for result in results for score in result["scores"]]
    tokens, held, seconds = (
        sum(r[name] for r in results) for name in ("tokens", "bytes", "seconds")
    )
    return {
        "cases": len(scores),
        "tokens": tokens / len(scores),
        "honest_ratio": 1 - held / full_bytes(model, tokens),
        "seconds": seconds,
        "scores": scores,
    }


# -------------------------------------------------------------------------------------- notes
# A file for each process, JSON lines: the arguments, then a line for each finished case. A run that
# is killed leaves half a line at the most: that case does not count as finished.


def note_files(notes: Path) -> list[Path]:
    return sorted(f for f in notes.parent.iterdir() if f.name.startswith(f"{notes.name}.cases-"))


def read_notes(notes: Path, arguments: dict | None) -> dict[tuple[int, int], dict]:
    """The finished cases of an earlier run, by row and case. Raises `UserError` for a run with
    other arguments, naming one, and for a damaged file."""
    arguments = json.loads(json.dumps(arguments or {}))  # as they come back from a file
    done, other = {}, None
    for file in note_files(notes):
        try:
            lines = file.read_text().splitlines(keepends=True)
            theirs, *results = [json.loads(line) for line in lines if line.endswith("\n")] or [None]
            if theirs is not None and theirs != arguments:
                both = {**theirs, **arguments}
                other = next(name for name in both if theirs.get(name, 0) != arguments.get(name, 0))
            done |= {(result.pop("row"), result.pop("case")): result for result in results}
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise UserError(f"{file} is damaged ({error}); delete it to start again") from None
        if other:
            flag = "command" if other == "what" else "--" + other.replace("_", "-")
            raise UserError(
                f"{file} has cases of a run with another {flag}; delete it to start again, or name "
                "another --json"
            )
    if done:
        say(f"{len(done)} cases are done already")
    return done


def start_notes(notes: Path, rank: int, arguments: dict | None) -> Path:
    """The notes of this process, with the arguments in them and without half a line at the end."""
    file = notes.with_name(f"{notes.name}.cases-{rank}")
    try:
        with file.open("a+b") as lines:
            lines.seek(0)
            end = lines.read().rfind(b"\n") + 1
            lines.truncate(end)
    except OSError as error:
        raise UserError(f"{file} cannot be written ({error}); choose another place") from None
    if not end:
        write_note(file, arguments or {})
    return file


def write_note(file: Path, note: dict) -> None:
    try:
        with file.open("a") as lines:
            lines.write(json.dumps(note) + "\n")
    except OSError as error:
        raise UserError(f"{file} cannot be written ({error}); choose another place") from None


def forget(notes: Path) -> None:
    for file in note_files(notes):
        file.unlink()


def contents(path: Path) -> str:
    """A digest of a file, or of all files in a folder."""
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            digest.update(file.read_bytes())
    return digest.hexdigest()


def flags(args: argparse.Namespace, model: Transformer) -> dict:
    """The arguments that must be the same to go on with noted cases; files by their contents."""

    def shown(value: object) -> object:
        if isinstance(value, list):
            return [shown(item) for item in value]
        return contents(value) if isinstance(value, Path) else str(value)

    named = {name: shown(v) for name, v in vars(args).items() if name not in ("json", "device")}
    return {**named, "model": cskv.fingerprint(model)}


# -------------------------------------------------------------------------------------- cases


@torch.no_grad()
def decode_nll(model: Transformer, tokens: Tensor, context: int, cache: list[LayerCache]) -> Tensor:
    """Negative log likelihood [B, T - context] of the tokens [B, T] after the first `context`."""
    losses, logits = [], model(tokens[:, :context], cache, logits_to_keep=1)  # [B, 1, vocab]
    for t in range(context, tokens.shape[1]):
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


def perplexity_cases(args: argparse.Namespace, model: Transformer, tokenizer: Tokenizer) -> list:
    """A case is a batch of passages; the score of each, its mean negative log likelihood."""
    length = args.context + args.steps
    if length > model.config.context_length:
        raise UserError(f"{length} tokens do not fit into {model.config.context_length} of context")
    text = "\n\n".join(read_documents(args.text))
    tokens = passages(tokenizer.encode(text), args.passages, length).to(args.device)

    def run_of(batch: Tensor) -> Run:
        def run(make: Make) -> tuple[list[float], list[LayerCache]]:
            cache = make(length - 1)
            return decode_nll(model, batch, args.context, cache).mean(1).tolist(), cache

        return run

    return [({}, run_of(batch)) for batch in tokens.split(args.batch)]


def greedy_answer(
    model: Transformer, context: list[int], prompt: list[int], cache: list[LayerCache], most: int
) -> list[int]:
    """Up to `most` tokens. The context is prefilled and the prompt then decoded token by token;
    without a context, the prompt is prefilled."""
    if context:
        device = model.lm_head.weight.device
        with torch.no_grad():
            model(torch.tensor([context], device=device), cache, logits_to_keep=1)
            for token in prompt[:-1]:
                model(torch.tensor([[token]], device=device), cache)
        prompt = prompt[-1:]
    return list(generate(model, prompt, cache, most, make_sampler(0.0, 1.0, 0)))


def split_prompt(tokenizer: Tokenizer, case: Case, question: str) -> tuple[list[int], list[int]]:
    """A case's (context, prompt) for `greedy_answer`: the same tokens in both protocols, and in the
    chat template of a model that has one."""

    def encode(text: str) -> list[int]:
        if tokenizer.template is None:
            return tokenizer.encode(text)
        text = tokenizer.chat([{"role": "user", "content": text}])
        return tokenizer.encode(text, special=False)

    ids, context = encode(case.prompt), encode(case.context)
    if question == "prefill":
        return [], ids
    # The context ends where the tokens begin to depend on what is asked.
    pairs = enumerate(zip(ids, context, strict=False))
    end = next((i for i, (ours, other) in pairs if ours != other), len(context))
    return ids[:end], ids[end:]


def retrieval_cases(args: argparse.Namespace, model: Transformer, tokenizer: Tokenizer) -> list:
    """LongEval or passkey cases of every length; the score is 1 for a right answer, else 0.

    Raises `UserError` for a case that leaves no room for a number in the model's context.
    """
    limit = model.config.context_length

    def run_of(case: Case) -> Run:
        context, prompt = split_prompt(tokenizer, case, args.question)
        length = len(context) + len(prompt)
        if length + ANSWER_ROOM > limit:
            raise UserError(
                f"a case of {length} tokens leaves no room in a context of {limit}; shorten it "
                "with --lines"
            )

        def run(make: Make) -> tuple[list[float], list[LayerCache]]:
            cache = make(length + ANSWER_ROOM)
            most = min(ANSWER_TOKENS, limit - length)
            output = tokenizer.decode(greedy_answer(model, context, prompt, cache, most))
            return [float(is_correct(output, case.answer))], cache

        return run

    return [
        ({"lines": lines}, run_of(case))
        for lines in args.lines
        for case in make_cases(args.what, lines, args.cases, args.seed, args.spelled)
    ]


def benchmark_cases(args: argparse.Namespace, model: Transformer, tokenizer: Tokenizer) -> list:
    """LongBench-E or LV-Eval records; a case's score is its task's, from 0 to 1."""
    benchmark, limit = BENCHMARKS[args.what], model.config.context_length
    chat = tokenizer.template is not None

    def run_of(task: longbench.Task, record: dict) -> Run:
        def run(make: Make) -> tuple[list[float], list[LayerCache]]:
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
            cache = make(length)
            output = greedy_answer(model, [], prompt, cache, task.max_new_tokens)
            return [task.score(tokenizer.decode(output), record)], cache

        return run

    return [
        ({"set": task.name, "bucket": task.bucket(record)}, run_of(task, record))
        for task in benchmark.select(args.sets or list(benchmark.TASKS))
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

# -------------------------------------------------------------------------------------- tables


def wilson(right: float, cases: int, z: float = 1.96) -> tuple[float, float]:
    """The 95% interval of a share, by Wilson (1927): honest near 0 and 1, where it matters here."""
    p, n = right / cases, cases
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return max(0.0, middle - half), min(1.0, middle + half)


def with_score(what: str, rows: list[dict]) -> list[dict]:
    """The rows of `measure` with, for their `scores`, what the benchmark `what` shows of them."""
    if what in BENCHMARKS:
        return benchmark_rows(rows)
    shown = []
    for row in rows:
        scores = row["scores"]
        if what == "perplexity":
            score = {"perplexity": math.exp(fmean(scores))}
        else:
            score = {"accuracy": fmean(scores), "interval": wilson(sum(scores), len(scores))}
        shown.append({**{name: row[name] for name in row if name != "scores"}, **score})
    return shown


def benchmark_rows(rows: list[dict]) -> list[dict]:
    """For each cache the means that `longbench.summarize` makes, in percent: a row for each set and
    bucket, for each set, and over the sets."""
    caches: dict[tuple, list[dict]] = {}
    for row in rows:
        caches.setdefault(tuple((name, row[name]) for name in Choice.COLUMNS), []).append(row)
    shown = []
    for columns, own in caches.items():
        scores = [
            {"set": row["set"], "bucket": row["bucket"], "score": score}
            for row in own
            for score in row["scores"]
        ]
        for mean in longbench.summarize(scores):
            counted = [
                row
                for row in own
                if mean["set"] in (row["set"], "average")
                and mean["bucket"] in (row["bucket"], longbench.ALL)
            ]
            tokens = [row["tokens"] * row["cases"] for row in counted]
            removed = [row["honest_ratio"] * t for row, t in zip(counted, tokens, strict=True)]
            total = {
                "tokens": sum(tokens) / mean["cases"],
                "honest_ratio": sum(removed) / sum(tokens),
                "seconds": sum(row["seconds"] for row in counted),
            }
            shown.append({**dict(columns), **mean, **total})
    return shown


COLUMNS = {
    "cache": str,
    "factors": str,
    "bits": str,
    "ratio": "{:.0%}".format,
    "set": str,
    "bucket": str,
    "lines": str,
    "cases": str,
    "tokens": "{:.0f}".format,
    "accuracy": "{:.3f}".format,
    "interval": lambda pair: "[{:.2f}, {:.2f}]".format(*pair),
    "score": "{:.2f}".format,
    "perplexity": "{:.2f}".format,
    "nominal_ratio": "{:.1%}".format,
    "honest_ratio": "{:.1%}".format,
    "seconds": "{:.0f}".format,
}


def table(rows: list[dict], columns: dict[str, Callable] = COLUMNS) -> str:
    """Rows as a Markdown table; `columns` maps a row's key to what writes its value."""
    columns = {key: write for key, write in columns.items() if key in rows[0]}
    lines = ["| " + " | ".join(columns).replace("_", " ") + " |", "|" + " --- |" * len(columns)]
    for row in rows:
        lines.append("| " + " | ".join(write(row[key]) for key, write in columns.items()) + " |")
    return "\n".join(lines)


def write_json(path: Path | None, rows: list[dict]) -> None:
    if path is not None:
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(rows, indent=1) + "\n")


# -------------------------------------------------------------------------------- command line


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
    check_folder(args.json)
    model = load_model(args.model, args.device, DTYPES[args.dtype])
    tokenizer = load_tokenizer(args.model)
    cases = CASES[args.what](args, model, tokenizer)
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
    p.add_argument("--dtype", choices=DTYPES, default="bfloat16")
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
        p.add_argument("--lines", type=numbers(int, 1), default=[50], help=f"{unit}: 10,30,100")
        p.add_argument("--cases", type=number(int, 1), default=50, help="of each length")
        p.add_argument(
            "--question", choices=("prefill", "decode"), default="prefill", help="the protocol"
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
