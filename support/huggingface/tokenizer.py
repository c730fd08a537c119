"""A checkpoint's tokenizer: text to token ids and back, as transformers 5 reads the same files.

`tokenizers` does the work, for a tokenizer.json and for a SentencePiece tokenizer.model alike. Here
stands what the files around them change in it, and what of that we refuse.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import tokenizers

from support.command import UserError, first_line
from support.huggingface import pieces
from support.huggingface.added_tokens import CONFIG, Declared, check_mark, is_unicode, read_settings
from support.huggingface.chat import choose_template, find_template, render
from support.huggingface.checkpoint import find_checkpoint

CLEAN_UP = "clean_up_tokenization_spaces"
CLEAN_UP_BPE = f"{CLEAN_UP}_for_bpe_even_though_it_will_corrupt_output"
CONTRACTIONS = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")


@contextmanager
def library(what: str, mend: str) -> Iterator[None]:
    """A failure of the tokenizers library, plain Exception or a panic of its Rust code, as a
    `UserError` that says `what` and the `mend`."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise UserError(f"{what} ({first_line(error)}); {mend}") from None


class Tokenizer:
    """Text to token ids and back, and an instruct model's chat template."""

    def __init__(
        self,
        backend,
        special: dict[str, str],
        template: object,
        source: str = "this model",
        clean_up: bool = False,
        vocabulary: int | None = None,
    ):
        backend.no_truncation()  # settings that some files carry over from training
        backend.no_padding()
        self.backend = backend  # a tokenizers.Tokenizer
        self.special = special  # texts by name, such as bos_token
        self.template = template  # jinja source, None for a model that does not chat
        self.source = source  # where the template stands
        self.clean_up = clean_up  # no spaces before punctuation in decoded text
        self.vocabulary = vocabulary  # tokens that the model has; None: not known

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids; `special` adds what the model wants around a text, such as <s>.

        Raises `UserError` for text that is not valid Unicode, and for a token that the model has
        not.
        """
        if not is_unicode(text):
            raise UserError("the text is not valid UTF-8; check where it was cut")
        with library("the tokenizer cannot read the text", "mend its files or give other text"):
            ids = self.backend.encode(text, add_special_tokens=special).ids
        if self.vocabulary is not None and max(ids, default=0) >= self.vocabulary:
            what = f"token {max(ids)} is not in the model's {self.vocabulary}"
            raise UserError(f"{what}: its tokenizer is another model's; fetch both again")
        return ids

    def decode(self, ids: list[int]) -> str:
        text = self.backend.decode(ids, skip_special_tokens=True)
        for written in CONTRACTIONS if self.clean_up else ():
            text = text.replace(written, written.strip())
        return text

    def encode_prompt(self, text: str, chat: bool | None = None) -> list[int]:
        """Token ids of a prompt: within the chat template if there is one (`chat` None) or if
        asked for, where it is what a user says; else as it is. Raises `UserError` if there are
        none: a tokenizer may drop letters, a template may write nothing."""
        if chat or (chat is None and self.template is not None):
            message = {"role": "user", "content": text}
            ids = self.encode(self.chat([message]), special=False)
        else:
            ids = self.encode(text)
        if not ids:
            raise UserError(
                "the tokenizer makes no token of the prompt; give other text, or --no-chat"
            )
        return ids

    def chat(self, messages: list[dict[str, str]]) -> str:
        """Messages {"role", "content"} as one prompt that ends where the answer begins.

        It holds its special tokens already: encode it with special=False. Raises `UserError` for a
        model without a template and for messages that the template refuses.
        """
        if self.template is None:
            raise UserError("this model has no chat template; give the prompt as it is (--no-chat)")
        template = choose_template(self.template, self.source)
        return render(template, messages, self.special, self.source)


# ------------------------------------------------------------------------------------- the files


def load_tokenizer(path: str | Path, vocabulary: int | None = None) -> Tokenizer:
    """The tokenizer of a checkpoint: its tokenizer.json, or else its SentencePiece tokenizer.model.
    `vocabulary` is the number of tokens that the model has.

    Raises `UserError` if it is missing or damaged, if a package to read it is missing, and for
    settings that would give other token ids than in transformers.
    """
    folder = find_checkpoint(path)
    settings = read_settings(folder / CONFIG)
    kind = pipeline_of(folder, settings)
    if (file := folder / "tokenizer.json").is_file():
        backend, declared = open_json(file, kind, settings)
    elif (file := folder / "tokenizer.model").is_file():
        backend, declared = open_model(file, kind, settings)
    else:
        raise UserError(f"{folder} has neither tokenizer.json nor tokenizer.model; fetch it again")
    backend.encode_special_tokens = bool(settings.get("split_special_tokens"))
    named = {name: str(token) for name, token in declared.named.items() if token is not None}
    bpe = type(backend.model).__name__ == "BPE"  # whose text cleaning up would corrupt
    clean_up = settings.get(CLEAN_UP) and (not bpe or settings.get(CLEAN_UP_BPE))
    template, source = find_template(folder, settings)
    return Tokenizer(backend, named, template, source, bool(clean_up), vocabulary)


def open_json(file: Path, kind: str, settings: dict) -> tuple[tokenizers.Tokenizer, Declared]:
    check_mark(file)
    with library(f"{file} is damaged", "fetch it again"):
        backend = tokenizers.Tokenizer.from_file(str(file))
    declared = Declared(file.parent, settings, in_file=backend.get_added_tokens_decoder())
    padding = backend.padding
    if kind:
        backend = pieces.rebuild(backend, kind, settings, file.parent / CONFIG)
        declared.fill(pieces.DEFAULTS[kind])
    if padding:
        declared.fill({"pad_token": padding["pad_token"]})
    declared.add_to(backend)
    return backend, declared


def open_model(file: Path, kind: str, settings: dict) -> tuple[tokenizers.Tokenizer, Declared]:
    proto = pieces.read_proto(file)
    control = pieces.control_tokens(proto, with_user_defined=bool(kind))
    declared = Declared(file.parent, settings, control=control)
    try:
        if kind:
            backend = pieces.llama_from_proto(proto, settings)
        else:
            legacy = bool(settings.get("legacy", True))
            backend = pieces.plain_from_proto(proto, declared.texts(), legacy)
    except Exception as error:  # the library raises plain Exception
        raise UserError(f"{file} is damaged ({error}); fetch it again") from None
    declared.fill(pieces.DEFAULTS[kind] if kind else pieces.own_names(proto))
    if not kind and proto.normalizer_spec.add_dummy_prefix:
        declared.match_raw_text()
    if not any((file.parent / name).is_file() for name in (CONFIG, "config.json")):
        # Nobody asks for <s> in a folder without any settings, but models of SentencePiece are
        # trained with it; and nobody names the unknown piece a special token, which has no text.
        settings = {"add_bos_token": True}
        declared.named["unk_token"] = None
        pieces.show_unknown(backend, proto)
    bos = declared.named.get("bos_token")
    known = {*declared.texts().values(), *backend.get_vocab(with_added_tokens=False)}
    if bos is not None and str(bos) not in known:
        what = f"bos_token {str(bos)!r} is in neither {file.name} nor the added tokens"
        raise UserError(f"{file.parent / CONFIG}: {what}; correct it there")
    declared.add_to(backend)
    pieces.surround(backend, declared.named, settings)
    return backend, declared


def pipeline_of(folder: Path, settings: dict) -> str:
    """The class of `pieces.DEFAULTS` whose pipeline transformers builds, "" for the files' own.

    Raises `UserError` for other classes that bring one.
    """
    config = read_settings(folder / "config.json")
    if settings.get("fix_mistral_regex"):
        raise UserError(f"{folder / CONFIG}: fix_mistral_regex is not supported; set it to false")
    kind = settings.get("tokenizer_class") or config.get("tokenizer_class") or ""
    if not isinstance(kind, str):
        what = f"tokenizer_class is {kind!r}, which is no name"
        raise UserError(f"{folder / CONFIG}: {what}; correct it there")
    kind, file = kind.removesuffix("Fast"), folder / "tokenizer.json"
    if config.get("model_type") == "mistral" or kind in ("", "TokenizersBackend"):
        return ""
    if kind in ("PreTrainedTokenizer", "PythonBackend"):
        return ""
    if kind == "LlamaTokenizer" and file.is_file() and b'"ByteLevel"' in file.read_bytes():
        return ""  # Llama 3 names the class of Llama 2
    if kind == "LlamaTokenizer" or (kind == "GPT2Tokenizer" and file.is_file()):
        return kind
    what = f"tokenizer_class {kind} is not supported"
    mend = f"if {file.name} says all about it, name PreTrainedTokenizerFast there"
    if not file.is_file():
        mend = "use a checkpoint with a tokenizer.json, or of the class LlamaTokenizer"
    raise UserError(f"{folder / CONFIG}: {what}; {mend}")
