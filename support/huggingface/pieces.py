"""Pipelines of `tokenizers` that transformers 5 builds itself: always for a SentencePiece
tokenizer.model; for a tokenizer.json where the files name a class of tokenizers that cuts
texts in one way, whatever tokenizer.json says of it."""

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

LLAMA, GPT2, END = "LlamaTokenizer", "GPT2Tokenizer", "<|endoftext|>"
# The special tokens of such a class, unless the settings name others.
DEFAULTS = {
    LLAMA: {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    GPT2: {"bos_token": END, "eos_token": END, "unk_token": END},
}
BPE = 2  # of SentencePiece's kinds of a model
CONTROL, USER_DEFINED = 3, 4  # of its kinds of a piece


def rebuild(backend: Tokenizer, kind: str, settings: dict) -> Tokenizer:
    """The pipeline of the class `kind` on the vocabulary of a tokenizer.json of BPE."""
    model = json.loads(backend.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    if kind == LLAMA:
        new = llama_pipeline(model["vocab"], merges, settings)
    else:
        new = Tokenizer(models.BPE(model["vocab"], merges))
        space = bool(settings.get("add_prefix_space"))
        new.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=space)
        new.decoder = decoders.ByteLevel()
    if backend.post_processor is not None:
        new.post_processor = backend.post_processor
    return new


def llama_pipeline(
    vocab: dict[str, int], merges: list[tuple[str, str]], settings: dict
) -> Tokenizer:
    """Spaces as ▁, one more before a text that has none there (with `legacy` also before
    the parts between special tokens), bytes for unknown letters."""
    scheme = "always" if settings.get("legacy") else "first"
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if settings.get("add_prefix_space") is False:
        scheme = "never"
    else:
        steps.append(decoders.Strip(content=" ", left=1))
    new = Tokenizer(models.BPE(vocab, merges, fuse_unk=True, byte_fallback=True))
    new.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=scheme, split=False)
    new.decoder = decoders.Sequence(steps)
    return new


def from_model(file: Path, settings: dict) -> Tokenizer:
    """LlamaTokenizer's pipeline for a tokenizer.model. Two pieces merge if that gives a
    third one, in the order of their ids. Raises any error for a file unlike Llama's."""
    from sentencepiece.sentencepiece_model_pb2 import ModelProto  # and protobuf with it

    proto = ModelProto.FromString(file.read_bytes())
    whole = {piece.piece for piece in proto.pieces if piece.type in (CONTROL, USER_DEFINED)}
    if proto.trainer_spec.model_type != BPE or whole != {"<s>", "</s>"}:
        raise ValueError("no BPE with <s> and </s> as its only symbols, as Llama's is")
    vocab = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    pairs = [(word[:n], word[n:]) for word in vocab for n in range(1, len(word))]
    merges = [(left, right) for left, right in pairs if left in vocab and right in vocab]
    return llama_pipeline(vocab, merges, settings)


def surround(backend: Tokenizer, named: dict[str, str], settings: dict) -> None:
    """Puts the begin and end token around a text, where the settings ask for them."""
    single = ["$A"]
    if settings.get("add_bos_token") and "bos_token" in named:
        single.insert(0, named["bos_token"])
    if settings.get("add_eos_token") and "eos_token" in named:
        single.append(named["eos_token"])
    special = [(text, backend.token_to_id(text)) for text in single if text != "$A"]
    backend.post_processor = processors.TemplateProcessing(single, special_tokens=special)
