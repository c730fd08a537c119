"""Pipelines of `tokenizers` that transformers 5 builds itself, rather than read them from a file.

From a SentencePiece tokenizer.model it builds them always; from a tokenizer.json, where the files
name a class of tokenizers that has one way to cut texts, whatever tokenizer.json says of it.
"""

import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from support.command import UserError

LLAMA, GPT2, END = "LlamaTokenizer", "GPT2Tokenizer", "<|endoftext|>"
# The special tokens of such a class, unless the settings name others.
DEFAULTS = {
    LLAMA: {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    GPT2: {"bos_token": END, "eos_token": END, "unk_token": END},
}
BPE = 2  # of SentencePiece's kinds of a model
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # and of its kinds of a piece


def rebuild(backend: Tokenizer, kind: str, settings: dict, config: Path) -> Tokenizer:
    """The pipeline of the class `kind` on the vocabulary of a tokenizer.json."""
    model = json.loads(backend.to_str())["model"]
    if model["type"] != "BPE":
        problem = f"tokenizer_class {kind} with a {model['type']} tokenizer.json"
        raise UserError(f"{config}: {problem} is not supported; use a tokenizer.json of BPE")
    vocab, merges = model["vocab"], [tuple(merge) for merge in model["merges"]]
    if kind == LLAMA:
        new = llama_pipeline(vocab, merges, prefix_scheme(settings))
    else:
        new = Tokenizer(models.BPE(vocab, merges))
        space = bool(settings.get("add_prefix_space"))
        new.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=space)
        new.decoder = decoders.ByteLevel()
    if backend.post_processor is not None:
        new.post_processor = backend.post_processor
    return new


def prefix_scheme(settings: dict) -> str:
    """Where LlamaTokenizer puts a space before a text that has none there: with `legacy`, also
    before the parts between special tokens."""
    if settings.get("add_prefix_space") is False:
        return "never"
    return "always" if settings.get("legacy") else "first"


def llama_pipeline(vocab: dict[str, int], merges: list[tuple[str, str]], scheme: str) -> Tokenizer:
    """Spaces as ▁, one more of them by the `scheme`, bytes for unknown letters."""
    new = Tokenizer(models.BPE(vocab, merges, fuse_unk=True, byte_fallback=True))
    new.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if scheme != "never":
        steps.append(decoders.Strip(content=" ", left=1))
    new.decoder = decoders.Sequence(steps)
    return new


def read_proto(file: Path):
    """The message that a tokenizer.model holds. Raises `UserError` if it cannot be read."""
    try:
        from google.protobuf.message import DecodeError
        from sentencepiece.sentencepiece_model_pb2 import ModelProto
    except ImportError:
        packages = "sentencepiece protobuf"
        mend = f"pip install {packages}, or put a tokenizer.json beside it"
        raise UserError(f"{file} needs the packages {packages}; {mend}") from None
    try:
        return ModelProto.FromString(file.read_bytes())
    except (OSError, DecodeError) as error:
        problem = f"is damaged, or not of SentencePiece ({error})"
        raise UserError(f"{file} {problem}; fetch it again, or a tokenizer.json") from None


def from_proto(file: Path, proto, kind: str, settings: dict) -> Tokenizer:
    """The pipeline of LlamaTokenizer, or else of SentencePiece.

    Two pieces merge if that gives a third one: LlamaTokenizer's in the order of ids, the others in
    that of scores, which is the same for a model that SentencePiece trained. With `legacy`, these
    get a space before every part between two special tokens, even one that begins with a space.
    Raises `UserError` for a model that no Llama or Mistral has.
    """
    trainer, spec = proto.trainer_spec, proto.normalizer_spec
    problems = {"is not a BPE model": trainer.model_type != BPE}
    if kind != LLAMA:
        special = [trainer.bos_piece, trainer.eos_piece, trainer.unk_piece]
        problems |= {
            "has no pieces for single bytes": not trainer.byte_fallback,
            "has pieces that a user defined": any(p.type == USER_DEFINED for p in proto.pieces),
            "has other special tokens": special != list(DEFAULTS[LLAMA].values()),
            "changes letters before it splits them": bool(spec.precompiled_charsmap),
            "drops spaces that follow another": spec.remove_extra_whitespaces,
            "puts no space before a text": not spec.add_dummy_prefix,
        }
    for problem, present in problems.items():
        if present:
            mend = "put the tokenizer.json of its model beside it"
            raise UserError(f"{file} {problem}, unlike those of Llama and Mistral; {mend}")
    vocab = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    if kind == LLAMA:
        return llama_pipeline(vocab, merges_of(list(vocab)), prefix_scheme(settings))
    normal = [piece for piece in proto.pieces if piece.type == NORMAL]
    normal.sort(key=lambda piece: -piece.score)  # of equal scores, the first piece first
    merges = merges_of([piece.piece for piece in normal])
    if settings.get("legacy") is False:
        return llama_pipeline(vocab, merges, "first")
    new = llama_pipeline(vocab, merges, "always")
    # Metaspace adds no ▁ where there is one.
    steps = [normalizers.Replace(" ", "▁"), normalizers.Replace(Regex(r"\A▁"), "▁▁")]
    new.normalizer = normalizers.Sequence(steps)
    return new


def merges_of(ranked: list[str]) -> list[tuple[str, str]]:
    """All pairs of pieces that give a third one, in the order in which these are `ranked`."""
    known = set(ranked)
    pairs = [(word[:n], word[n:]) for word in ranked for n in range(1, len(word))]
    return [(left, right) for left, right in pairs if left in known and right in known]


def surround(backend: Tokenizer, named: dict[str, str], settings: dict) -> None:
    """Puts the begin and end token around a text, where the settings ask for them."""
    single = ["$A"]
    if settings.get("add_bos_token") and "bos_token" in named:
        single.insert(0, named["bos_token"])
    if settings.get("add_eos_token") and "eos_token" in named:
        single.append(named["eos_token"])
    special = [(text, backend.token_to_id(text)) for text in single if text != "$A"]
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
