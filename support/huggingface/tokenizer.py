"""A checkpoint's tokenizer: text to token ids and back, as transformers 5 reads the same files.

`tokenizers` does the work, for a tokenizer.json and for a SentencePiece tokenizer.model alike. Here
stands which of the files beside them change it, and what of that we refuse.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import tokenizers

from support.command import UserError, first_line
from support.huggingface.added_tokens import CONFIG, EXTRA, add_declared, further_tokens
from support.huggingface.chat import find_template, render
from support.huggingface.checkpoint import find_checkpoint, read_json
from support.huggingface.pieces import DEFAULTS, GPT2, LLAMA, from_model, rebuild, surround

GENERAL = ("", "TokenizersBackend", "PreTrainedTokenizer", "PythonBackend")  # do as the files say
CLEAN_UP = "clean_up_tokenization_spaces"  # in the decoded text; not done for a BPE
UNSUPPORTED = ("fix_mistral_regex", "fast_tokenizer_files", "model_specific_special_tokens")
UNSUPPORTED += (f"{CLEAN_UP}_for_bpe_even_though_it_will_corrupt_output",)


@contextmanager
def library(problem: str, mend: str) -> Iterator[None]:
    """A failure of the tokenizers library, an Exception or a panic of its Rust code, in a line."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, UserError):
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
    vocabulary: int | None = None  # tokens that the model has; None: not known

    def __post_init__(self):
        self.backend.no_truncation()  # settings that some files carry over from training
        self.backend.no_padding()

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids; `special` adds what the model wants around a text, such as <s>. Raises
        `UserError` for text that is not valid Unicode, and for a token beyond the model's."""
        with library("the tokenizer cannot read the text", "mend its files or give other text"):
            ids = self.backend.encode(text, add_special_tokens=special).ids
        if self.vocabulary is not None and max(ids, default=0) >= self.vocabulary:
            problem = f"token {max(ids)} is not in the model's {self.vocabulary}"
            raise UserError(f"{problem}: its tokenizer is another model's; fetch both again")
        return ids

    def decode(self, ids: list[int]) -> str:
        """The text of token ids, without special tokens."""
        return self.backend.decode(ids, skip_special_tokens=True)

    def settled(self, ids: list[int]) -> str:
        """What of the text of `ids` no further token changes. The newest may be half a letter; of
        byte tokens in a row all become replacement characters when one does not fit."""
        n = len(ids)
        while n and self.is_byte(ids[n - 1]):
            n -= 1
        if n == len(ids):
            n -= 1
        return self.decode(ids[:n]).rstrip("\ufffd")

    def is_byte(self, token: int) -> bool:
        """Whether a token is one of the 256 bytes of a SentencePiece vocabulary."""
        piece = self.backend.id_to_token(token) or ""
        return len(piece) == 6 and piece.startswith("<0x")

    def encode_prompt(self, text: str, chat: bool | None = None) -> list[int]:
        """Token ids of a prompt: within the chat template if `chat`, or if that is None and there
        is one; else as it is. Raises `UserError` if there are none."""
        if chat or (chat is None and self.template is not None):
            message = {"role": "user", "content": text}
            ids = self.encode(self.chat([message]), special=False)
        else:
            ids = self.encode(text)
        if not ids:  # a tokenizer may drop letters, a template write none
            problem = "the tokenizer makes no token of the prompt"
            raise UserError(f"{problem}; give other text, or --no-chat")
        return ids

    def chat(self, messages: list[dict[str, str]]) -> str:
        """Messages {"role", "content"} as one prompt that ends where the answer begins. It holds
        its special tokens already: encode it with special=False."""
        if self.template is None:
            raise UserError("this model has no chat template; give the prompt as it is (--no-chat)")
        return render(self.template, messages, self.special, self.source)


def load_tokenizer(path: str | Path, vocabulary: int | None = None) -> Tokenizer:
    """The tokenizer of a checkpoint, for a model of `vocabulary` tokens: its tokenizer.json, or
    else its SentencePiece tokenizer.model. Raises `UserError` if it is missing or damaged, and for
    settings that would give other token ids than in transformers."""
    folder = find_checkpoint(path)
    config, file, model = [folder / name for name in (CONFIG, "tokenizer.json", "tokenizer.model")]
    settings = read_json(config, needed=False)
    kind = pipeline_of(folder, settings)
    in_file = {}
    if file.is_file():
        with library(f"{file} is damaged", "fetch it again"):
            backend = tokenizers.Tokenizer.from_file(str(file))
        in_file = backend.get_added_tokens_decoder()
    elif not model.is_file():
        raise UserError(f"{folder} has neither tokenizer.json nor tokenizer.model; fetch it again")
    elif kind != LLAMA:
        mend = "put the tokenizer.json of its model beside it"
        raise UserError(f"{model} is read for a Llama with {LLAMA} only; {mend}")
    else:
        mend = "pip install sentencepiece protobuf, or put its model's tokenizer.json beside it"
        with library(f"{model} cannot be read", mend):
            backend = from_model(model, settings)
        if further_tokens(settings) is None:
            settings[EXTRA] = ["<s>", "</s>"]
    refused = UNSUPPORTED
    if not isinstance(backend.model, tokenizers.models.BPE):
        refused += (CLEAN_UP,)
        if kind:
            raise UserError(f"{file} is not a BPE, but {kind} is; use a tokenizer.json of BPE")
    for name in refused:
        if settings.get(name):
            raise UserError(f"{config}: {name} is not supported; take it out there")
    if kind and file.is_file():
        backend = rebuild(backend, kind, settings)
    with library(f"{config}, or a file beside it, declares no tokens", "correct it there"):
        defaults = DEFAULTS.get(kind, {})
        special = add_declared(backend, folder, defaults | settings, in_file)
    if not file.is_file():
        surround(backend, special, settings)
    backend.encode_special_tokens = bool(settings.get("split_special_tokens"))
    template, source = find_template(folder, settings)
    return Tokenizer(backend, special, template, source, vocabulary)


def pipeline_of(folder: Path, settings: dict) -> str:
    """The class of `DEFAULTS` whose pipeline transformers builds, "" for that of the files."""
    config = read_json(folder / "config.json", needed=False)
    file = folder / "tokenizer.json"
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
