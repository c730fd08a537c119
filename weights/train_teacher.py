"""Makes the teaching model: a tiny Llama, trained from nothing to answer LongEval's questions.

    python -m weights.train_teacher --work runs/teacher --out weights/teacher

Run again after an interruption, it goes on from the last checkpoint and ends with the same bits:
batch number i is drawn from a generator seeded with i, so a checkpoint needs no random state.

Trained on the whole task at once, such a model completes numbers from their first digits and never
looks a key up. Hence a curriculum (few lines and bare questions first), a loss on the answers only,
with most weight on an answer's first digit, and many questions a record.

Sources:
    [1] Olsson et al., "In-context Learning and Induction Heads", 2022: the circuit that must form
    [2] Jordan et al., "Muon", 2024: the optimizer of the hidden matrices, torch.optim.Muon
"""

import support.interrupt  # isort: skip # noqa: F401

import argparse
import json
import math
import random
import re
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from string import ascii_lowercase

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from tqdm import tqdm

from experiments.tasks import longeval
from experiments.tasks.longeval import PREAMBLE, QUESTION
from model import Config, Transformer
from support.command import Arguments, make_folder, replacing, run_command
from support.resume import load_state, save_state

EOS = "<|endoftext|>"
ALL_WORDS = longeval.ADJECTIVES + longeval.NOUNS

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
SPEECH = re.findall(r"[A-Za-z]+", PREAMBLE + longeval.PASSKEY_FILLER + "".join(WORDINGS))


def build_tokenizer() -> Tokenizer:
    """Any text without loss, LongEval's in about 23 tokens a line, as with large models.

    Text becomes the fewest pieces that spell it: a unigram model in which all have the same score.
    The pieces are the bytes, the words of the prompts, and pairs of small letters, or of a space or
    a hyphen and a letter. So no key is one piece: what is learned of one word serves for all.
    """
    texts = [PREAMBLE, QUESTION, longeval.PASSKEY_PREAMBLE, longeval.PASSKEY_LINE]
    texts += [longeval.PASSKEY_FILLER, longeval.PASSKEY_QUESTION, longeval.LINE, *WORDINGS]
    text = re.sub(r"\{\w+\}", "", "\n".join(texts))
    words = {a + b for a in f"{ascii_lowercase} -" for b in ascii_lowercase}
    words.update(re.findall(r" ?[A-Za-z]{2,}| I", text))
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces += sorted(to_bytes.pre_tokenize_str(word)[0][0] for word in words)
    tokenizer = Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], unk_id=0))
    tokenizer.pre_tokenizer = to_bytes
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(EOS, normalized=False)])
    return tokenizer


@dataclass(frozen=True)
class Level:
    lines: int  # the longest record
    bare: float = 0.0  # probability of records that are keys and numbers only, nothing in between
    worded: float = 0.9  # probability of a question that is more than the bare key
    preamble: float = 0.95  # probability of the text before the record
    spelled: float = 0.55  # share of batches whose keys are made-up words
    passkey: float = 0.15  # share of batches that hide one number in filler text
    rate: float = 1.0  # factor on the learning rates: long records are few in a batch, and noisier


LEVELS = (
    Level(4, bare=1.0, worded=0.0, preamble=0.0, spelled=0.0, passkey=0.0),
    Level(5, bare=0.5, worded=0.0, preamble=0.0, spelled=0.0, passkey=0.0),
    Level(8, bare=0.1, worded=0.5, preamble=0.1, spelled=0.3, passkey=0.0),
    Level(12, preamble=0.5, spelled=0.5, passkey=0.05),
    Level(25, preamble=0.9, spelled=0.6, passkey=0.05),
    Level(50, spelled=0.6, passkey=0.05),
    Level(100, rate=0.8),
    Level(200, rate=0.6),
    Level(350, rate=0.5),
    Level(500, rate=0.5),
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
    row = []
    for i, part in enumerate(tokenizer.encode_batch(texts)):
        if i % 2 == 0:
            row += [(token, 0.0, 0) for token in part.ids]
            continue
        tokens = [*part.ids, tokenizer.token_to_id(EOS)]
        digits = len(texts[i].lstrip())
        weights = [SPACE] * (len(texts[i]) - digits) + [FIRST_DIGIT]
        weights += [LATER_DIGIT] * (digits - 1) + [END]
        row += [(t, w, i // 2) for t, w in zip(tokens, weights, strict=True)]
    return row


def pack(rows: list[list[tuple[int, float, int]]]) -> Batch:
    """Rows of `weigh` as one batch, in which each answer has a number of its own."""
    length = max(map(len, rows))
    most = max([row[-1][2] for row in rows]) + 1  # answers of a row
    table = torch.tensor([row + [(0, 0.0, 0)] * (length - len(row)) for row in rows])  # [B, T, 3]
    answer = table[..., 2].long() + most * torch.arange(len(rows))[:, None]
    return Batch(table[..., 0].long(), table[..., 1], answer)


def make_word(rng: random.Random) -> str:
    """A word that is in no list: letters drawn, up to 16 of them, or halves of two listed words."""
    if rng.random() < 0.5:
        first, second = rng.choice(ALL_WORDS), rng.choice(ALL_WORDS)
        return first[: rng.randint(2, len(first))] + second[rng.randrange(len(second) - 1) :]
    return longeval.spell(rng) + (longeval.spell(rng) if rng.random() < 0.5 else "")


def draw_record(rng: random.Random, lines: int, spelled: bool) -> dict[str, int]:
    """`lines` keys and their numbers; `spelled` keys are of made-up words, so few in some records
    that most keys share each word with others, and only both words together tell them apart."""
    if not spelled:
        return longeval.draw_record(rng, lines)
    least = math.isqrt(2 * lines) + 1
    words = [make_word(rng) for _ in range(2 * rng.randint(least, max(least, 2 * lines)))]
    record: dict[str, int] = {}
    while len(record) < lines:
        key = f"{rng.choice(words[::2])}-{rng.choice(words[1::2])}"
        record[key] = rng.randint(1, longeval.LARGEST)
    return record


def draw_wording(rng: random.Random) -> str:
    """A question that names a line, in any words: what stands around the key shall not matter."""
    words = []
    before = rng.randint(0, 8)
    after = rng.choice((0, 0, 1, 2, 3, 4, 5))
    for _ in range(before + after):
        words.append(rng.choice(SPEECH) if rng.random() < 0.7 else make_word(rng))
    asked = " ".join([*words[:before], "line {key}", *words[before:]])
    return f"\n{asked[0].upper()}{asked[1:]}{rng.choice(('?', '.', ':', ''))}"


def draw_text(rng: random.Random, level: Level, kind: str, lines: int) -> list[str]:
    """One training sequence: prompt, answer, further question, answer, ..."""
    if kind == "passkey":
        case = longeval.passkey_case(rng, lines)
        return [case.prompt, f" {case.answer}"]
    record = draw_record(rng, lines, kind == "spelled")
    bare = rng.random() < level.bare
    if bare:  # the classic induction task [1]: what followed this key?
        record = {key: rng.randint(10_000, 99_999) for key in record}
        text = "".join([f"line {key}{number}\n" for key, number in record.items()])
    else:
        text = longeval.format_record(record)
        if rng.random() < level.preamble:
            text = PREAMBLE + text
    parts = []
    for key in rng.sample(list(record), min(lines, QUESTIONS)):
        question, space = BARE, " "
        if bare:
            question, space = "line {key}", ""
        elif rng.random() < level.worded:
            wordings = (QUESTION, rng.choice(WORDINGS), draw_wording(rng))
            question = rng.choices(wordings, (0.45, 0.2, 0.35))[0]
        parts += [question.format(key=key), f"{space}{record[key]}"]
    return [text + parts[0], *parts[1:]]


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


def predict(model: Transformer, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits [N, vocab] and targets [N] where the loss has weight, N tokens in all."""
    x = model.model.embed_tokens(batch.tokens)  # [B, T, hidden]
    for layer in model.model.layers:
        x = layer(x, model.rope, None)
    wanted = batch.weight[:, 1:] > 0  # [B, T - 1]
    logits = model.lm_head(model.model.norm(x[:, :-1][wanted]))  # only where needed
    return logits, batch.tokens[:, 1:][wanted]


def count_right(logits: Tensor, targets: Tensor, batch: Batch) -> tuple[int, int]:
    """Numbers whose every token is the likeliest after the right ones before it, so that greedy
    decoding writes them, and numbers asked for."""
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
        self.plan = plan
        self.tokenizer = build_tokenizer()
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
        hidden, rest = [], []
        for name, weight in self.model.named_parameters():
            if weight.dim() == 2:
                std = 1.0 if "embed" in name else weight.shape[1] ** -0.5
                torch.nn.init.normal_(weight, std=std)
            kind = hidden if "layers" in name and weight.dim() == 2 else rest
            kind.append(weight)
        self.optimizers = [
            torch.optim.Muon(hidden, lr=plan.muon_lr, weight_decay=0.0),
            torch.optim.AdamW(rest, lr=plan.adam_lr, betas=(0.9, 0.98), weight_decay=0.0),
        ]
        self.step = self.level = 0
        self.last = plan.levels - 1
        self.entered = 0  # the level's first step
        self.running = 0.0  # share of right numbers, of the last batches that have records
        self.curve = []  # a row a step

    def rate(self) -> float:
        """Factor on the learning rates: a ramp up, the level's, down to zero at the last level."""
        rate = LEVELS[self.level].rate
        if self.level == self.last:
            return rate * max(0.0, 1 - (self.step - self.entered) / self.plan.final)
        return rate * min(1.0, (self.step + 1) / self.plan.warmup)

    def done(self) -> bool:
        return self.level == self.last and self.step - self.entered >= self.plan.final

    def train_step(self) -> dict[str, object]:
        """One step. Returns its row of the learning curve."""
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
        row = {"step": self.step, "level": self.level, "lines": level.lines, "kind": kind}
        shares = {"loss": loss.item(), "right": right / asked, "running": self.running}
        row |= {name: round(value, 4) for name, value in shares.items()}
        self.curve.append(row)
        self.step += 1
        learned = self.running >= plan.advance or self.step - self.entered >= plan.patience
        if learned and self.level < self.last:
            self.level += 1
            self.entered = self.step
            self.running = 0.5  # so that no level is left within a few batches
        return row

    def save(self, folder: Path) -> None:
        """Writes checkpoint.pt, to go on from exactly, and curve.jsonl, to be drawn."""
        state = {
            "plan": asdict(self.plan),
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "place": (self.level, self.entered, self.running),
            "curve": self.curve,
        }
        save_state(folder / "checkpoint.pt", state)
        write(folder / "curve.jsonl", "".join([json.dumps(row) + "\n" for row in self.curve]))

    def load(self, folder: Path) -> None:
        """What `save` wrote. Raises `UserError` if it is damaged, or of another plan."""
        names = ("model", "optimizers", "place", "curve")
        state = load_state(folder / "checkpoint.pt", asdict(self.plan), names)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.level, self.entered, self.running = state["place"]
        self.curve = state["curve"]
        self.step = len(self.curve)


def write(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def export(trainer: Trainer, folder: Path) -> None:
    """The plain Hugging Face layout, weights rounded to 16 bits."""
    made = asdict(trainer.model.config)
    end = made.pop("eos_token_ids")[0]
    del made["sliding_window"]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "torch_dtype": "float16",
        "bos_token_id": None,
        "eos_token_id": end,
        **made,
    }
    tokenizer = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOS,
        "model_max_length": made["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
    }
    write(folder / "config.json", json.dumps(config, indent=2) + "\n")
    write(folder / "tokenizer_config.json", json.dumps(tokenizer, indent=2) + "\n")
    write(folder / "tokenizer.json", trainer.tokenizer.to_str(pretty=True))
    weights = {name: w.half().contiguous() for name, w in trainer.model.state_dict().items()}
    with replacing(folder / "model.safetensors") as temporary:
        save_file(weights, temporary, {"format": "pt"})


def train(plan: Plan, work: Path, out: Path, minutes: float = 3.0) -> None:
    """Trains to the end, from the last checkpoint in `work` if there is one, with `minutes` between
    checkpoints; exports to `out`."""
    make_folder(work)
    make_folder(out)
    trainer = Trainer(plan)
    if (work / "checkpoint.pt").exists():
        trainer.load(work)
        print(f"going on from step {trainer.step}", file=sys.stderr)
    saved = time.monotonic()
    with tqdm(initial=trainer.step, unit="step") as bar:
        while not trainer.done():
            bar.set_postfix(trainer.train_step(), refresh=False)
            bar.update()
            if time.monotonic() - saved > minutes * 60:
                trainer.save(work)
                saved = time.monotonic()
    trainer.save(work)
    export(trainer, out)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = Arguments(description="Makes the teaching model, from nothing.")
    add = parser.add_argument
    work = "folder for the checkpoint, to go on from, and for the learning curve"
    add("--work", type=Path, default=Path("runs/teacher"), help=work)
    add("--out", type=Path, default=Path("weights/teacher"), help="folder to write the model to")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)  # more threads round differently
    train(Plan(), args.work, args.out)


if __name__ == "__main__":
    run_command(lambda: run(parse_arguments()))
