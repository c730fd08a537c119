"""A checkpoint's tokenizer: text to token ids and back, as transformers 5 reads the same files.

`tokenizers` does the work, for a tokenizer.json and for a SentencePiece tokenizer.model alike. Here
stands which of the files beside them change it, and what of that we refuse.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import tokenizers
from tokenizers import AddedToken

from support.command import UserError, first_line
from support.huggingface import pieces
from support.huggingface.added_tokens import CONFIG, Declared, read_settings
from support.huggingface.chat import find_template, render
from support.huggingface.checkpoint import find_checkpoint
from support.huggingface.pieces import CONTROL, DEFAULTS, GPT2, LLAMA, USER_DEFINED

GENERAL = ("", "TokenizersBackend", "PreTrainedTokenizer", "PythonBackend")  # do as the files say
CLEAN_UP = "clean_up_tokenization_spaces"
CLEAN_UP_BPE = f"{CLEAN_UP}_for_bpe_even_though_it_will_corrupt_output"
CONTRACTIONS = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")
UNSUPPORTED = ("fix_mistral_regex", "fast_tokenizer_files", CLEAN_UP_BPE)


@contextmanager
def library(problem: str, mend: str) -> Iterator[None]:
    """A failure of the tokenizers library, an Exception or a panic of its Rust code, in a line."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise UserError(f"{problem} ({first_line(error)}); {mend}") from None


@dataclass(eq=False)
class Tokenizer:
    """Text to token ids and back, and an instruct model's chat template."""

    backend: tokenizers.Tokenizer
    special: dict[str, str]  # texts by name, such as bos_token
    template: object  # jinja source, None for a model that does not chat
    source: str = "this model"  # where the template stands
    clean_up: bool = False  # no spaces before punctuation in decoded text
    vocabulary: int | None = None  # tokens that the model has; None: not known

    def __post_init__(self):
        self.backend.no_truncation()  # settings that some files carry over from training
        self.backend.no_padding()

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids; `special` adds what the model wants around a text, such as <s>. Raises
        `UserError` for text that is not valid Unicode, and for a token beyond the model's."""
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UserError("the text is not valid UTF-8; check where it was cut") from None
        with library("the tokenizer cannot read the text", "mend its files or give other text"):
            ids = self.backend.encode(text, add_special_tokens=special).ids
        if self.vocabulary is not None and max(ids, default=0) >= self.vocabulary:
            problem = f"token {max(ids)} is not in the model's {self.vocabulary}"
            raise UserError(f"{problem}: its tokenizer is another model's; fetch both again")
        return ids

    def decode(self, ids: list[int]) -> str:
        """The text of token ids, without special tokens."""
        text = self.backend.decode(ids, skip_special_tokens=True)
        if self.clean_up:
            for written in CONTRACTIONS:
                text = text.replace(written, written.strip())
        return text

    def settled(self, ids: list[int]) -> str:
        """What of the text of `ids` no further token changes.

        The newest token may be half a letter, and cleaning up may take the space before it away. Of
        byte tokens in a row all become replacement characters when one does not fit.
        """
        n = len(ids)
        while n and self.is_byte(ids[n - 1]):
            n -= 1
        if n == len(ids):
            n -= 1
        whole = self.decode(ids)
        text = os.path.commonprefix([self.decode(ids[:n]), whole])  # noqa: RUF071 (no paths)
        text = text.rstrip("\ufffd")
        if self.clean_up:
            text = text[: max(0, text.rfind(" "))]
        return text

    def is_byte(self, token: int) -> bool:
        """Whether a token is one of the 256 bytes of a SentencePiece vocabulary."""
        piece = self.backend.id_to_token(token) or ""
        return len(piece) == 6 and piece.startswith("<0x")

    def encode_prompt(self, text: str, chat: bool | None = None) -> list[int]:
        """Token ids of a prompt: within the chat template if `chat`, or if that is None and there
        is one; else as it is. Raises `UserError` if there are none: a tokenizer may drop letters, a
        template write none."""
        if chat or (chat is None and self.template is not None):
            message = {"role": "user", "content": text}
            ids = self.encode(self.chat([message]), special=False)
        else:
            ids = self.encode(text)
        if not ids:
            mend = "give other text, or --no-chat"
            raise UserError(f"the tokenizer makes no token of the prompt; {mend}")
        return ids

    def chat(self, messages: list[dict[str, str]]) -> str:
        """Messages {"role", "content"} as one prompt that ends where the answer begins. It holds
        its special tokens already: encode it with special=False. Raises `UserError` for a model
        without a template and for messages that the template refuses."""
        if self.template is None:
            raise UserError("this model has no chat template; give the prompt as it is (--no-chat)")
        return render(self.template, messages, self.special, self.source)


def load_tokenizer(path: str | Path, vocabulary: int | None = None) -> Tokenizer:
    """The tokenizer of a checkpoint, for a model of `vocabulary` tokens: its tokenizer.json, or
    else its SentencePiece tokenizer.model.

    Raises `UserError` if it is missing or damaged, if a package to read it is missing, and for
    settings that would give other token ids than in transformers.
    """
    folder = find_checkpoint(path)
    settings = read_settings(folder / CONFIG)
    kind = pipeline_of(folder, settings)
    if (folder / "tokenizer.json").is_file():
        backend, special = open_json(folder / "tokenizer.json", kind, settings)
    elif (folder / "tokenizer.model").is_file():
        backend, special = open_model(folder / "tokenizer.model", kind, settings)
    else:
        raise UserError(f"{folder} has neither tokenizer.json nor tokenizer.model; fetch it again")
    backend.encode_special_tokens = bool(settings.get("split_special_tokens"))
    bpe = type(backend.model).__name__ == "BPE"  # whose text is not cleaned up
    for name in UNSUPPORTED:
        if settings.get(name):
            raise UserError(f"{folder / CONFIG}: {name} is not supported; take it out there")
    template, source = find_template(folder, settings)
    clean_up = bool(settings.get(CLEAN_UP)) and not bpe
    return Tokenizer(backend, special, template, source, clean_up, vocabulary)


def pipeline_of(folder: Path, settings: dict) -> str:
    """The class of `DEFAULTS` whose pipeline transformers builds, "" for that of the files. Raises
    `UserError` for other classes that bring one."""
    config, file = read_settings(folder / "config.json"), folder / "tokenizer.json"
    name = settings.get("tokenizer_class") or config.get("tokenizer_class") or ""
    kind = str(name).removesuffix("Fast")
    if config.get("model_type") == "mistral" or kind in GENERAL:
        return ""
    if kind == LLAMA and file.is_file() and b'"ByteLevel"' in file.read_bytes():
        return ""  # Llama 3 names the class of Llama 2
    if kind == LLAMA or (kind == GPT2 and file.is_file()):
        return kind
    mend = "if a tokenizer.json says all about it, name PreTrainedTokenizerFast there"
    raise UserError(f"{folder / CONFIG}: tokenizer_class {name} is not supported; {mend}")


def open_json(file: Path, kind: str, settings: dict) -> tuple[tokenizers.Tokenizer, dict]:
    with library(f"{file} is damaged", "fetch it again"):
        backend = tokenizers.Tokenizer.from_file(str(file))
    in_file = backend.get_added_tokens_decoder()
    declared = Declared(file.parent, settings, in_file)
    if kind:
        backend = pieces.rebuild(backend, kind, settings, file.parent / CONFIG)
    return backend, declared.add_to(backend, DEFAULTS.get(kind, {}))


def open_model(file: Path, kind: str, settings: dict) -> tuple[tokenizers.Tokenizer, dict]:
    proto = pieces.read_proto(file)
    backend = pieces.from_proto(file, proto, kind, settings)
    control = [
        AddedToken(piece.piece, normalized=False, special=piece.type == CONTROL)
        for piece in proto.pieces
        if piece.type in (CONTROL, USER_DEFINED)  # these SentencePiece keeps whole
    ]
    declared = Declared(file.parent, settings, control=control, raw=not kind)
    special = declared.add_to(backend, DEFAULTS[LLAMA])
    if not any((file.parent / name).is_file() for name in (CONFIG, "config.json")):
        # Nobody asks for <s> in a folder without any settings, but the models are trained with it.
        settings = {"add_bos_token": True}
    pieces.surround(backend, special, settings)
    return backend, special
