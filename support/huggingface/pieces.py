"""Pipelines of `tokenizers` that transformers 5 builds itself, rather than read them from a file.

From a SentencePiece tokenizer.model it builds them always; from a tokenizer.json, where the files
name a class of tokenizers that has one way to cut texts, whatever tokenizer.json says of it.
"""

import json
import re
from pathlib import Path

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from support.command import UserError

# The special tokens of such a class, unless the settings name others; None: no padding's either.
DEFAULTS = {
    "LlamaTokenizer": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "GPT2Tokenizer": {
        **dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"),
        "pad_token": None,
    },
}
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4  # SentencePiece's kinds of a piece
UNIGRAM, BPE = 1, 2  # and of a model


def rebuild(backend: Tokenizer, kind: str, settings: dict, config: Path) -> Tokenizer:
    """The pipeline of the class `kind` on the vocabulary of a tokenizer.json."""
    model = json.loads(backend.to_str())["model"]
    if model["type"] != "BPE":
        what = f"tokenizer_class {kind} with a {model['type']} tokenizer.json"
        raise UserError(f"{config}: {what} is not supported; use a tokenizer.json of BPE")
    vocab, merges = model["vocab"], [tuple(merge) for merge in model["merges"]]
    if kind == "LlamaTokenizer":
        new = llama_pipeline(vocab, merges, settings)
    else:
        new = Tokenizer(models.BPE(vocab, merges))
        space = bool(settings.get("add_prefix_space"))
        new.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=space)
        new.decoder = decoders.ByteLevel()
    if backend.post_processor is not None:
        new.post_processor = backend.post_processor
    return new


def llama_pipeline(vocab: dict[str, int], merges: list, settings: dict) -> Tokenizer:
    """Spaces as ▁, one more of them before a text that has none there, bytes for unknown letters.

    With `legacy`, a part between two special tokens gets that space too.
    """
    new = Tokenizer(models.BPE(vocab, merges, fuse_unk=True, byte_fallback=True))
    space = settings.get("add_prefix_space") is not False
    scheme = ("always" if settings.get("legacy") else "first") if space else "never"
    new.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if space:
        steps.append(decoders.Strip(content=" ", left=1))
    new.decoder = decoders.Sequence(steps)
    return new


# ------------------------------------------------------------------------------- tokenizer.model


def read_proto(file: Path):
    """What a tokenizer.model holds. Raises `UserError` if it cannot be read, or not here."""
    try:
        from sentencepiece import sentencepiece_model_pb2 as layout
    except ImportError as error:
        # The package sentencepiece comes without the package that its own files are read with.
        package = "protobuf" if (error.name or "").startswith("google") else "sentencepiece"
        raise UserError(f"{file} needs the package {package}; pip install it") from None
    from google.protobuf.message import DecodeError

    proto = layout.ModelProto()
    try:
        proto.ParseFromString(file.read_bytes())
        if not proto.pieces:
            raise ValueError("no pieces")
    except (OSError, DecodeError, ValueError) as error:
        what = f"is damaged, or not of SentencePiece ({error})"
        raise UserError(f"{file} {what}; fetch it again, or a tokenizer.json") from None
    if proto.trainer_spec.model_type not in (UNIGRAM, BPE):
        raise UserError(f"{file} is neither BPE nor unigram; use a tokenizer.json instead")
    return proto


def control_tokens(proto, with_user_defined: bool) -> list[AddedToken]:
    """The pieces that stand for no text, and those of a user, which SentencePiece keeps whole."""
    kinds = (CONTROL, USER_DEFINED) if with_user_defined else (CONTROL,)
    return [
        AddedToken(piece.piece, normalized=False, special=piece.type == CONTROL)
        for piece in proto.pieces
        if piece.type in kinds
    ]


def own_names(proto) -> dict[str, str]:
    """The special tokens that a tokenizer.model names itself."""
    spec = proto.trainer_spec
    names = {"bos_token": (spec.bos_id, spec.bos_piece), "eos_token": (spec.eos_id, spec.eos_piece)}
    names["unk_token"] = (spec.unk_id, spec.unk_piece)
    return {name: piece for name, (index, piece) in names.items() if index >= 0}


def show_unknown(backend: Tokenizer, proto) -> None:
    """Decodes an unknown piece to what SentencePiece writes for it."""
    spec = proto.trainer_spec
    shown = decoders.Replace(spec.unk_piece, spec.unk_surface)
    backend.decoder = decoders.Sequence([shown, backend.decoder])


def llama_from_proto(proto, settings: dict) -> Tokenizer:
    """LlamaTokenizer's pipeline: two pieces merge if that gives a third one, in the order of ids.

    For a model of SentencePiece's BPE this is the order of its scores.
    """
    vocab = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    pairs = [(word[:n], word[n:]) for word in vocab for n in range(1, len(word))]
    merges = [(left, right) for left, right in pairs if left in vocab and right in vocab]
    return llama_pipeline(vocab, merges, settings)


def plain_from_proto(proto, renamed: dict[int, str], legacy: bool) -> Tokenizer:
    """The pipeline that tokenizer.model itself describes, as SentencePiece runs it.

    `renamed` has other texts for some ids: of pieces that were kept free for added tokens.
    """
    spec, trainer = proto.normalizer_spec, proto.trainer_spec
    names = [piece.piece for piece in proto.pieces]
    of_kind = lambda kind: [i for i, piece in enumerate(proto.pieces) if piece.type == kind]  # noqa: E731
    if trainer.model_type == UNIGRAM:
        scored = [(piece.piece, piece.score) for piece in proto.pieces]
        model = models.Unigram(scored, trainer.unk_id, byte_fallback=trainer.byte_fallback)
    else:
        kept = {name for i, name in enumerate(names) if i not in renamed}
        for i, name in renamed.items():
            if i < len(names) and name not in kept:
                names[i] = name
        model = models.BPE(
            {name: i for i, name in enumerate(names)},
            scored_merges(proto, {names[i]: i for i in of_kind(NORMAL)}),
            unk_token=trainer.unk_piece,
            fuse_unk=True,
            byte_fallback=trainer.byte_fallback,
            ignore_merges=bool(of_kind(USER_DEFINED)),
        )
    new = Tokenizer(model)
    steps = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(r"\A +| +\z"), ""))
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    if spec.escape_whitespaces:
        steps.append(normalizers.Replace(" ", "▁"))
    if spec.add_dummy_prefix and legacy:  # Metaspace adds no ▁ where there is one, this does
        steps.append(normalizers.Replace(Regex(r"\A▁"), "▁▁"))
    new.normalizer = normalizers.Sequence(steps)

    steps, scheme = [], "always" if legacy else "first"
    if spec.add_dummy_prefix:
        steps.append(pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=False))
    if whole := sorted((names[i] for i in of_kind(USER_DEFINED)), key=len, reverse=True):
        # Pieces that merge with nothing: each is a word of its own.
        pattern = Regex("|".join(map(re.escape, whole)))
        steps.append(pre_tokenizers.Split(pattern, behavior="isolated"))
    if steps:
        new.pre_tokenizer = pre_tokenizers.Sequence(steps)

    steps = [decoders.Replace("▁", " ")]
    if trainer.byte_fallback:
        steps.append(decoders.ByteFallback())
    if spec.add_dummy_prefix or trainer.byte_fallback:
        steps.append(decoders.Fuse())
    if spec.add_dummy_prefix:
        steps.append(decoders.Strip(content=" ", left=1))
    new.decoder = decoders.Sequence(steps)
    return new


def scored_merges(proto, ids: dict[str, int]) -> list[tuple[str, str]]:
    """All pairs of pieces that give a piece, from the best score of it down."""
    ranked = []
    for word, i in ids.items():
        for n in range(1, len(word)):
            if word[:n] in ids and word[n:] in ids:
                ranked.append((-proto.pieces[i].score, i, word[:n], word[n:]))
    return [(left, right) for _, _, left, right in sorted(ranked)]


def surround(backend: Tokenizer, named: dict, settings: dict) -> None:
    """Puts the begin and end token around a text, where the settings ask for them."""
    texts = {"$A": "$A"}
    for name, flag in (("bos_token", "add_bos_token"), ("eos_token", "add_eos_token")):
        if settings.get(flag) and named.get(name) is not None:
            texts[name] = str(named[name])
    single = [texts[name] for name in ("bos_token", "$A", "eos_token") if name in texts]
    special = {text: backend.token_to_id(text) for text in single if text != "$A"}
    backend.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=list(special.items())
    )
