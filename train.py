"""From a checkpoint and text to a factors file: calibrate and factorize.

    python train.py --model FOLDER_OR_HUB_NAME --data TEXT --k-ratio 0.8 --v-ratio 0.8 --out FILE

The frozen model reads the text once; from what its layers saw, A and B of every layer follow in
closed form (cskv.py, `init_factors`). The model itself is never changed.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import cskv
from model import (
    DTYPES,
    Arguments,
    Tokenizer,
    UserError,
    check_device,
    check_folder,
    load_model,
    load_tokenizer,
    number,
    run_command,
)


def read_documents(path: Path) -> Iterator[str]:
    """Yields the documents of a .txt file (one), a .jsonl file (the field `text` of each line), or
    a folder of both, in the order of the names. Raises `UserError` naming file and line."""
    if path.is_dir():
        files = sorted(f for f in path.iterdir() if f.suffix in (".txt", ".jsonl"))
        if not files:
            raise UserError(f"{path} has no .txt or .jsonl files; give text to calibrate on")
        for file in files:
            yield from read_documents(file)
        return
    if path.suffix not in (".txt", ".jsonl"):
        raise UserError(f"{path} is not a .txt or .jsonl file, nor a folder of them")
    try:
        with path.open(encoding="utf-8") as lines:
            if path.suffix == ".txt":
                yield lines.read()
                return
            for i, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    text = json.loads(line)["text"]
                except (ValueError, KeyError, TypeError):
                    text = None
                if not isinstance(text, str):
                    raise UserError(f'{path}, line {i}: not a JSON object with a string "text"')
                yield text
    except FileNotFoundError:
        raise UserError(f"no file {path}; give text to calibrate on") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as UTF-8 text ({error})") from None


def sample_tokens(
    path: Path, tokenizer: Tokenizer, samples: int, length: int, seed: int
) -> list[Tensor]:
    """Up to `samples` tensors [1, T] with 2 <= T <= `length`, drawn without repetition.

    A sample is a whole document, or a piece of one that is longer: never two documents in one.
    """
    pieces = []
    for text in read_documents(path):
        ids = torch.tensor([tokenizer.encode(text)])  # [1, tokens]
        pieces += [piece for piece in ids.split(length, dim=1) if piece.shape[1] > 1]
    if not pieces:
        raise UserError(f"{path} holds no text; give some to calibrate on")
    order = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(seed))
    return [pieces[i] for i in order[:samples].tolist()]


def run(args: argparse.Namespace) -> None:
    """The command line, with arguments already parsed."""
    check_device(args.device)
    check_folder(args.out)
    model = load_model(args.model, args.device, DTYPES[args.dtype])
    config = model.config
    layers = config.num_hidden_layers
    ranks = {
        name: [rank if rank is not None else cskv.rank_for(ratio, config.d_kv)] * layers
        for name, rank, ratio in (
            ("k", args.k_rank, args.k_ratio),
            ("v", args.v_rank, args.v_ratio),
        )
    }
    statistics = None
    if args.init in ("asvd", "optimal"):
        if args.data is None:
            raise UserError(f"--init {args.init} calibrates on text; give some with --data")
        length = min(args.seq_len, int(config.context_length))
        samples = sample_tokens(
            args.data, load_tokenizer(args.model), args.samples, length, args.seed
        )
        tokens = sum(sample.shape[1] for sample in samples)
        print(f"calibrating on {len(samples)} samples, {tokens} tokens", file=sys.stderr)
        statistics = cskv.collect_statistics(model, tqdm(samples, unit="sample"))
    factors = cskv.init_factors(args.init, model, ranks["k"], ranks["v"], statistics, args.seed)
    if statistics:
        factors.info["data"] = args.data.name
    cskv.save_factors(args.out, factors, model, DTYPES[args.save_dtype])
    print(
        f"{args.out}: {args.init}, ranks {ranks['k'][0]} (keys) and {ranks['v'][0]} (values) of "
        f"{config.d_kv} in {layers} layers, {args.out.stat().st_size / 1e6:.2f} MB",
        file=sys.stderr,
    )


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Arguments(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="checkpoint folder or hub name")
    parser.add_argument(
        "--data", type=Path, help=".txt, .jsonl (field `text`), or a folder of them"
    )
    parser.add_argument("--out", type=Path, required=True, help="factors file to write")
    parser.add_argument(
        "--init",
        choices=cskv.INITIALIZATIONS,
        default="optimal",
        help="random: a control; svd: of the weights alone; asvd: the paper's; optimal (default): "
        "the closed-form minimum of the paper's loss",
    )
    parser.add_argument(
        "--k-ratio", type=float, default=0.8, help="share of key channels removed (default: 0.8)"
    )
    parser.add_argument(
        "--v-ratio", type=float, default=0.8, help="share of value channels removed (default: 0.8)"
    )
    parser.add_argument(
        "--k-rank", type=number(int, 1), help="key channels kept, instead of a ratio"
    )
    parser.add_argument("--v-rank", type=number(int, 1), help="value channels kept, likewise")
    parser.add_argument(
        "--samples", type=number(int, 1), default=256, help="calibration samples (default: 256)"
    )
    parser.add_argument(
        "--seq-len",
        type=number(int, 2),
        default=1024,
        help="tokens a sample at most (default: 1024)",
    )
    parser.add_argument(
        "--seed", type=number(int, 0), default=0, help="of the choice of samples, of random factors"
    )
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="of the frozen model (default: float32)"
    )
    parser.add_argument(
        "--save-dtype", choices=DTYPES, default="float16", help="of the file (default: float16)"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(lambda: run(parse_arguments()))
