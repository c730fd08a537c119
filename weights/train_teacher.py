"""Makes the teaching model: a tiny Llama, trained from nothing to answer LongEval's questions.

    python -m weights.train_teacher --work runs/teacher --out weights/teacher

Run again after an interruption, it goes on from the last checkpoint and ends with the same bits:
batch number i is drawn from a generator seeded with i, so a checkpoint needs no random state.

Given the task whole, such a model stalls: it learns to complete numbers from their own first
digits and never looks a key up. Hence a curriculum (few lines and bare questions first), a loss on
the answers only, with most weight on an answer's first digit, and many questions a record.

Sources:
    [1] Olsson et al., "In-context Learning and Induction Heads", 2022: the circuit that must form
    [2] Jordan et al., "Muon", 2024: the optimizer of the hidden matrices, torch.optim.Muon
"""

import argparse
import json
import math
import random
import re
import sys
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from string import ascii_lowercase

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from experiments.tasks import retrieval
from experiments.tasks.retrieval import QUESTION
from model import Config, Transformer
from support.command import Arguments, UserError, number, replacing, run_command

EOS = "<|endoftext|>"

ALL_WORDS = retrieval.ADJECTIVES + retrieval.NOUNS

# Questions in other words, so that the model does not hang on LongEval's.
BARE = "\nline {key}?"
WORDINGS = (
    BARE,
    "\nWhat is the number in line {key}?",
    "\nTell me the number of line {key}.",
    "\nI need the <REGISTER_CONTENT> of line {key}. What is it?",
    "\nNow the record is over. What is the <REGISTER_CONTENT> in line {key}?",
    "\nWhich number does line {key} contain?",
    "\nRetrieve the numerical value of line {key}.",
    "\nIn line {key}, what is the number?",
    "\nNow tell me about line {key}. What number is in it?",
    "\nThe <REGISTER_CONTENT> in line {key} is",
)
SPEECH = re.findall(r"[A-Za-z]+", retrieval.PREAMBLE + retrieval.PASSKEY_FILLER + "".join(WORDINGS))


# ----------------------------------------------------------------------------------- tokenizer


def build_tokenizer() -> Tokenizer:
    """Any text without loss, LongEval's in about 23 tokens a line, as large models' tokenizers.

    Text becomes bytes (256 characters that stand for them), then the fewest pieces that spell it:
    a unigram model in which all pieces have the same score. The pieces are the words of the
    prompts, and for all other words, keys above all, every pair of small letters; a letter after a
    space or a hyphen is a pair too. Every digit is a piece of its own. No key is, whole: what the
    model learns of one word serves for all words.
    """
    fixed = [retrieval.PREAMBLE, QUESTION, retrieval.PASSKEY_PREAMBLE, retrieval.PASSKEY_LINE]
    fixed += [retrieval.PASSKEY_FILLER, retrieval.PASSKEY_QUESTION, retrieval.LINE, *WORDINGS]
    texts = [re.sub(r"\{\w+\}", "", text) for text in fixed]
    words = {word for text in texts for word in re.findall(r" ?[A-Za-z]{2,}| I", text)}
    words |= {a + b for a in f"{ascii_lowercase} -" for b in ascii_lowercase}
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces += sorted(to_bytes.pre_tokenize_str(word)[0][0] for word in words)
    tokenizer = Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], unk_id=0))
    tokenizer.pre_tokenizer = to_bytes
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(EOS, normalized=False)])
    return tokenizer


# ---------------------------------------------------------------------------------- curriculum


@dataclass(frozen=True)
class Level:
    lines: int  # the longest record
    bare: float  # probability of records that are keys and numbers only, nothing in between
    worded: float  # probability of a question that is more than the bare key
    preamble: float  # probability of the text before the record
    spelled: float  # share of batches whose keys are made-up words
    passkey: float  # share of batches that hide one number in filler text
    rate: float  # factor on the learning rates: long records are few in a batch, and it is noisier


LEVELS = (
    Level(4, bare=1.0, worded=0.0, preamble=0.0, spelled=0.0, passkey=0.0, rate=1.0),
    Level(5, bare=0.5, worded=0.0, preamble=0.0, spelled=0.0, passkey=0.0, rate=1.0),
    Level(8, bare=0.1, worded=0.5, preamble=0.1, spelled=0.3, passkey=0.0, rate=1.0),
    Level(12, bare=0.0, worded=0.9, preamble=0.5, spelled=0.5, passkey=0.05, rate=1.0),
    Level(25, bare=0.0, worded=0.9, preamble=0.9, spelled=0.6, passkey=0.05, rate=1.0),
    Level(50, bare=0.0, worded=0.9, preamble=0.95, spelled=0.6, passkey=0.05, rate=1.0),
    Level(100, bare=0.0, worded=0.9, preamble=0.95, spelled=0.55, passkey=0.15, rate=0.8),
    Level(200, bare=0.0, worded=0.9, preamble=0.95, spelled=0.55, passkey=0.15, rate=0.6),
    Level(350, bare=0.0, worded=0.9, preamble=0.95, spelled=0.55, passkey=0.15, rate=0.5),
    Level(500, bare=0.0, worded=0.9, preamble=0.95, spelled=0.55, passkey=0.15, rate=0.5),
)
SLOWNESS = 30  # batches that the running share looks back on
QUESTIONS = 48  # questions a record, at most: a long record is worth many
FIRST_DIGIT, LATER_DIGIT, END, SPACE = 3.0, 1.0, 0.3, 0.1  # weights in the loss


@dataclass
class Batch:
    tokens: Tensor  # [B, T], padded at the end, where causal attention never looks
    weight: Tensor  # [B, T] of each token as a target; 0 outside the answers
    answer: Tensor  # [B, T] number of the answer that a token belongs to


def weigh(tokenizer: Tokenizer, texts: list[str]) -> list[tuple[int, float, int]]:
    """Prompt, answer, prompt, answer, ... as tokens, their weights and the answers they are in."""
    eos, row = tokenizer.token_to_id(EOS), []
    for i, part in enumerate(tokenizer.encode_batch(texts)):
        if i % 2 == 0:
            row += [(token, 0.0, 0) for token in part.ids]
            continue
        digits = len(texts[i].lstrip())
        weights = [SPACE] * (len(texts[i]) - digits) + [FIRST_DIGIT]
        weights += [LATER_DIGIT] * (digits - 1) + [END]
        row += [(t, w, i // 2) for t, w in zip([*part.ids, eos], weights, strict=True)]
    return row


def pack(rows: list[list[tuple[int, float, int]]]) -> Batch:
    """Rows of `weigh` as one batch, in which each answer has a number of its own."""
    length, most = max(map(len, rows)), max(answer for row in rows for *_, answer in row) + 1
    table = torch.tensor([row + [(0, 0.0, 0)] * (length - len(row)) for row in rows])  # [B, T, 3]
    answer = table[..., 2].long() + most * torch.arange(len(rows))[:, None]
    return Batch(table[..., 0].long(), table[..., 1], answer)


def make_word(rng: random.Random) -> str:
    """A word that is in no list: letters drawn, up to 16 of them, or halves of two listed words."""
    if rng.random() < 0.5:
        first, second = rng.choice(ALL_WORDS), rng.choice(ALL_WORDS)
        return first[: rng.randint(2, len(first))] + second[rng.randrange(len(second) - 1) :]
    return retrieval.spell(rng) + (retrieval.spell(rng) if rng.random() < 0.5 else "")


def draw_record(rng: random.Random, lines: int, spelled: bool) -> dict[str, int]:
    """`lines` keys and their numbers; `spelled` ones are of made-up words.

    Few words make many keys, in some records down to the square root: then most keys share each
    word with others, and only both words together tell them apart.
    """
    if not spelled:
        return retrieval.draw_record(rng, lines)
    least = math.isqrt(2 * lines) + 1
    words = [make_word(rng) for _ in range(2 * rng.randint(least, max(least, 2 * lines)))]
    record: dict[str, int] = {}
    while len(record) < lines:
        key = f"{rng.choice(words[::2])}-{rng.choice(words[1::2])}"
        record[key] = rng.randint(1, retrieval.LARGEST)
    return record


def draw_wording(rng: random.Random) -> str:
    """A question that names a line, in any words: what stands around the key shall not matter."""
    before, after = (
        [rng.choice(SPEECH) if rng.random() < 0.7 else make_word(rng) for _ in range(count)]
        for count in (rng.randint(0, 8), rng.choice((0, 0, 1, 2, 3, 4, 5)))
    )
    asked = " ".join([*before, "line {key}", *after])
    return f"\n{asked[0].upper()}{asked[1:]}{rng.choice(('?', '.', ':', ''))}"


def draw_text(rng: random.Random, level: Level, kind: str, lines: int) -> list[str]:
    """One training sequence: prompt, answer, further question, answer, ..."""
    if kind == "passkey":
        case = retrieval.passkey_case(rng, lines)
        return [case.prompt, f" {case.answer}"]
    record = draw_record(rng, lines, kind == "spelled")
    if rng.random() < level.bare:  # the classic induction task [1]: what followed this key?
        record = {key: rng.randint(10_000, 99_999) for key in record}
        text = "".join(f"line {key}{number}\n" for key, number in record.items())
        parts = []
        for key in rng.sample(list(record), lines):
            parts += [text + f"line {key}", f"{record[key]}"]
            text = ""
        return parts
    text = retrieval.format_record(record)
    if rng.random() < level.preamble:
        text = retrieval.PREAMBLE + text
    parts = []
    for key in rng.sample(list(record), min(lines, QUESTIONS)):
        wording = BARE
        if rng.random() < level.worded:
            wordings = (QUESTION, rng.choice(WORDINGS), draw_wording(rng))
            wording = rng.choices(wordings, (0.45, 0.2, 0.35))[0]
        parts += [text + wording.format(key=key), f" {record[key]}"]
        text = ""
    return parts


def draw_batch(
    seed: int, step: int, level: Level, tokenizer: Tokenizer, size: int
) -> tuple[str, Batch]:
    """Batch number `step`, about `size` tokens of one kind and length; and which kind it is."""
    rng = random.Random(f"{seed} {step}")
    kinds = (level.spelled, level.passkey, 1 - level.spelled - level.passkey)
    kind = rng.choices(("spelled", "passkey", "words"), kinds)[0]
    lines = level.lines if rng.random() < 0.5 else rng.randint(2, level.lines)
    if kind == "passkey":  # one answer a text: short texts give more answers for the same tokens
        lines = round(2 * (level.lines / 2) ** rng.random())
    rows = [weigh(tokenizer, draw_text(rng, level, kind, lines))]
    while sum(map(len, rows)) + len(rows[0]) <= size:
        rows.append(weigh(tokenizer, draw_text(rng, level, kind, lines)))
    return kind, pack(rows)


# ------------------------------------------------------------------------------------ training


def predict(model: Transformer, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits [N, vocab] and targets [N] where the loss has weight, N tokens in all."""
    x = model.model.embed_tokens(batch.tokens)  # [B, T, hidden]
    model.rope.reach(x.shape[1], x.device)
    for layer in model.model.layers:
        x = layer(x, model.rope, None)
    wanted = batch.weight[:, 1:] > 0  # [B, T - 1]
    logits = model.lm_head(model.model.norm(x[:, :-1][wanted]))  # only where needed
    return logits, batch.tokens[:, 1:][wanted]


def count_right(logits: Tensor, targets: Tensor, batch: Batch) -> tuple[int, int]:
    """Numbers that greedy decoding gets right to the end, and numbers asked for.

    If every digit is right given the right ones before it, greedy decoding writes the number.
    """
    answer = batch.answer[:, 1:][batch.weight[:, 1:] > 0]  # [N]
    right = torch.zeros(int(answer.max()) + 1)
    exact = (logits.argmax(-1) == targets).float()  # [N]
    right.scatter_reduce_(0, answer, exact, "amin", include_self=False)
    return int(right.sum()), len(answer.unique())


@dataclass(frozen=True)
class Plan:
    """Everything that decides the result. A checkpoint belongs to one plan."""

    seed: int = 0
    layers: int = 4
    hidden: int = 128
    mlp: int = 256
    heads: int = 2  # of 64 key (and value) channels in all
    context: int = 14336
    tokens: int = 8192  # a step
    muon_lr: float = 0.01  # hidden matrices
    adam_lr: float = 0.002  # embeddings, norms, output
    warmup: int = 50  # steps
    advance: float = 0.9  # share of right numbers that opens the next level
    patience: int = 500  # steps after which it opens in any case
    final: int = 700  # steps at the last level, while the learning rates fall to zero
    levels: int = len(LEVELS)  # of the curriculum


class Trainer:
    """Model, optimizers and place in the curriculum: what a checkpoint holds."""

    def __init__(self, plan: Plan):
        self.plan, self.tokenizer = plan, build_tokenizer()
        config = Config(
            vocab_size=self.tokenizer.get_vocab_size(),
            hidden_size=plan.hidden,
            intermediate_size=plan.mlp,
            num_hidden_layers=plan.layers,
            num_attention_heads=plan.heads,
            num_key_value_heads=plan.heads,
            head_dim=64 // plan.heads,
            rms_norm_eps=1e-5,
            rope_theta=1e6,  # slow rotations, so that most channels can match keys far away
            rope_scaling=None,
            max_position_embeddings=plan.context,
            tie_word_embeddings=False,
            attention_bias=False,
            mlp_bias=False,
            sliding_window=None,
            eos_token_ids=(self.tokenizer.token_to_id(EOS),),
        )
        torch.manual_seed(plan.seed)
        self.model = Transformer(config)
        for name, weight in self.model.named_parameters():
            if weight.dim() == 2:
                torch.nn.init.normal_(
                    weight, std=1.0 if "embed" in name else weight.shape[1] ** -0.5
                )
        hidden = [p for n, p in self.model.named_parameters() if "layers" in n and p.dim() == 2]
        rest = [p for n, p in self.model.named_parameters() if "layers" not in n or p.dim() != 2]
        self.optimizers = [
            torch.optim.Muon(hidden, lr=plan.muon_lr, weight_decay=0.0),
            torch.optim.AdamW(rest, lr=plan.adam_lr, betas=(0.9, 0.98), weight_decay=0.0),
        ]
        self.step = self.level = self.entered = 0  # `entered`: the level's first step
        self.running = 0.0  # share of right numbers, of the last batches that have records

    def rate(self) -> float:
        """Factor on the learning rates: a ramp up, the level's, down to zero at the last level."""
        rate = LEVELS[self.level].rate
        if self.level == self.plan.levels - 1:
            return rate * max(0.0, 1 - (self.step - self.entered) / self.plan.final)
        return rate * min(1.0, (self.step + 1) / self.plan.warmup)

    def done(self) -> bool:
        return self.level == self.plan.levels - 1 and self.step - self.entered >= self.plan.final

    def train_step(self) -> dict[str, object]:
        """One step. Returns its line of the learning curve."""
        plan, level = self.plan, LEVELS[self.level]
        kind, batch = draw_batch(plan.seed, self.step, level, self.tokenizer, plan.tokens)
        logits, targets = predict(self.model, batch)
        weight = batch.weight[:, 1:][batch.weight[:, 1:] > 0]  # [N]
        loss = (F.cross_entropy(logits, targets, reduction="none") * weight).sum() / weight.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer, lr in zip(self.optimizers, (plan.muon_lr, plan.adam_lr), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = lr * self.rate()
            optimizer.step()
            optimizer.zero_grad()
        right, asked = count_right(logits, targets, batch)
        if kind != "passkey":
            self.running += (right / asked - self.running) / SLOWNESS
        row = {
            "step": self.step,
            "level": self.level,
            "lines": level.lines,
            "kind": kind,
            "loss": round(loss.item(), 4),
            "right": round(right / asked, 4),
            "running": round(self.running, 4),
        }
        self.step += 1
        learned = self.running >= plan.advance or self.step - self.entered >= plan.patience
        if learned and self.level < plan.levels - 1:
            self.level, self.entered = self.level + 1, self.step
            self.running = 0.5  # so that no level is left within a few batches
        return row

    def save(self, path: Path) -> None:
        state = {
            "plan": asdict(self.plan),
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "place": (self.step, self.level, self.entered, self.running),
        }
        with replacing(path) as temporary:
            torch.save(state, temporary)

    def load(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        if state["plan"] != asdict(self.plan):
            raise UserError(
                f"{path} belongs to another plan, {state['plan']}; choose another --work"
            )
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.level, self.entered, self.running = state["place"]


def export(trainer: Trainer, folder: Path) -> None:
    """The plain Hugging Face layout, weights rounded to 16 bits."""
    folder.mkdir(parents=True, exist_ok=True)
    c = trainer.model.config
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "torch_dtype": "float16",
        "bos_token_id": None,
        "eos_token_id": c.eos_token_ids[0],
        **{k: v for k, v in asdict(c).items() if k not in ("eos_token_ids", "sliding_window")},
    }
    tokenizer = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOS,
        "model_max_length": c.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
    }
    weights = {n: w.detach().half().contiguous() for n, w in trainer.model.state_dict().items()}
    for name, content in (("config.json", config), ("tokenizer_config.json", tokenizer)):
        with replacing(folder / name) as temporary:
            temporary.write_text(json.dumps(content, indent=2) + "\n")
    with replacing(folder / "tokenizer.json") as temporary:
        trainer.tokenizer.save(str(temporary))
    with replacing(folder / "model.safetensors") as temporary:
        save_file(weights, temporary, {"format": "pt"})


def train(plan: Plan, work: Path, out: Path, minutes: float) -> None:
    """Trains to the end, from the last checkpoint in `work` if there is one; exports to `out`."""
    work.mkdir(parents=True, exist_ok=True)
    checkpoint, curve = work / "checkpoint.pt", work / "curve.jsonl"
    trainer, rows = Trainer(plan), []
    if checkpoint.exists():
        trainer.load(checkpoint)
        # Steps after the checkpoint are done again: drop their rows, the last of them half-written.
        rows = curve.read_text().splitlines()[: trainer.step]
        print(f"going on from step {trainer.step}", file=sys.stderr)
    with replacing(curve) as temporary:
        temporary.write_text("".join(f"{row}\n" for row in rows))
    start = saved = time.monotonic()
    first = trainer.step
    with curve.open("a", buffering=1) as log:  # line by line: complete up to any checkpoint
        while not trainer.done():
            row = trainer.train_step()
            log.write(json.dumps(row) + "\n")
            now = time.monotonic()
            if trainer.step % 20 == 0:
                pace = (now - start) / (trainer.step - first)
                words = " ".join(f"{name} {value}" for name, value in row.items())
                print(f"{words} | {pace:.2f} s a step", file=sys.stderr)
            if now - saved > minutes * 60:
                trainer.save(checkpoint)
                saved = now
    trainer.save(checkpoint)
    export(trainer, out)


# -------------------------------------------------------------------------------- command line


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Arguments(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("runs/teacher"), help="for checkpoints")
    parser.add_argument("--out", type=Path, default=Path("weights/teacher"))
    parser.add_argument(
        "--minutes", type=number(float, 0), default=3.0, help="between checkpoints (default: 3)"
    )
    parser.add_argument(
        "--threads",
        type=number(int, 1),
        default=1,
        help="for the same bits on the same machine, keep it (default: 1)",
    )
    plan = parser.add_argument_group("the plan; another one needs another --work")
    for field in fields(Plan):
        name = f"--{field.name.replace('_', '-')}"
        plan.add_argument(name, type=number(field.type, 0), default=field.default)
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    plan = Plan(**{field.name: getattr(args, field.name) for field in fields(Plan)})
    if not 1 <= plan.levels <= len(LEVELS):
        raise UserError(f"--levels {plan.levels} is not in 1 .. {len(LEVELS)}")
    if plan.heads < 1 or 64 % plan.heads:
        raise UserError(f"--heads {plan.heads} does not divide 64 channels")
    train(plan, args.work, args.out, args.minutes)


if __name__ == "__main__":
    run_command(lambda: run(parse_arguments()))
