"""A checkpoint's tokenizer: text to token ids and back, and the chat template."""

import json
import re
import time
from pathlib import Path

from support.checkpoint import find_checkpoint, read_json
from support.command import UserError


class Tokenizer:
    """Text to token ids and back, and an instruct model's chat template."""

    def __init__(self, backend, settings: dict, template: str | None):
        backend.no_truncation()  # settings that some files carry over from training
        backend.no_padding()
        self.backend = backend  # a tokenizers.Tokenizer
        self.settings = settings  # tokenizer_config.json
        self.template = template  # jinja source, None for a model that does not chat

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids; `special` adds what the model wants around a text, such as <s>.

        Raises `UserError` for text that is not valid Unicode.
        """
        check_unicode(text)
        return self.backend.encode(text, add_special_tokens=special).ids

    def decode(self, ids: list[int]) -> str:
        return self.backend.decode(ids, skip_special_tokens=True)

    def encode_prompt(self, text: str, chat: bool | None = None) -> list[int]:
        """Token ids of a prompt: within the chat template if there is one (`chat` None) or if
        asked for, where it is what a user says; else as it is."""
        if chat or (chat is None and self.template is not None):
            message = {"role": "user", "content": text}
            return self.encode(self.chat([message]), special=False)
        return self.encode(text)

    def chat(self, messages: list[dict[str, str]]) -> str:
        """Messages {"role", "content"} as one prompt that ends where the answer begins.

        It holds its special tokens already: encode it with special=False. Raises `UserError` for a
        model without a template and for messages that the template refuses.
        """
        if self.template is None:
            raise UserError("this model has no chat template; give the prompt as it is (--no-chat)")
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment  # templates come with downloads

        def fail(message: str) -> None:
            raise TemplateError(message)

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.filters["tojson"] = json.dumps  # jinja's own escapes HTML
        environment.globals |= {"raise_exception": fail, "strftime_now": time.strftime}
        names = ("bos_token", "eos_token", "unk_token", "pad_token")
        special = {name: token_text(self.settings.get(name)) for name in names}
        try:
            template = environment.from_string(self.template)
            return template.render(messages=messages, add_generation_prompt=True, **special)
        except TemplateError as error:
            raise UserError(f"the chat template fails: {error}; try --no-chat") from None


class SentencePieceTokenizer(Tokenizer):
    """The tokenizer of a checkpoint with a tokenizer.model only, read by the sentencepiece package.

    Special tokens are recognized in a text, where SentencePiece by itself takes them for letters.
    Each part between them starts like a text of its own, as chat models were trained.
    """

    def __init__(self, processor, settings: dict, template: str | None):
        self.processor, self.settings, self.template = processor, settings, template
        ids = range(processor.get_piece_size())
        special = [i for i in ids if processor.is_control(i) or processor.is_unknown(i)]
        self.special = {processor.id_to_piece(i): i for i in special}
        self.pattern = re.compile("(" + "|".join(map(re.escape, self.special)) + ")")
        self.start = []
        if settings.get("add_bos_token", True):
            bos = token_text(settings.get("bos_token")) or "<s>"
            if bos not in self.special:
                raise UserError(f"bos_token {bos!r} is not a special token of tokenizer.model")
            self.start = [self.special[bos]]

    def encode(self, text: str, special: bool = True) -> list[int]:
        check_unicode(text)
        ids = list(self.start) if special else []
        for part in self.pattern.split(text):
            ids += [self.special[part]] if part in self.special else self.processor.encode(part)
        return ids

    def decode(self, ids: list[int]) -> str:
        size = self.processor.get_piece_size()  # of a model with more tokens, these have no text
        return self.processor.decode([i for i in ids if i < size])


def check_unicode(text: str) -> None:
    if any("\ud800" <= c <= "\udfff" for c in text):  # how Python spells what is no UTF-8
        raise UserError("the text is not valid UTF-8; check where it was cut")


def token_text(token: str | dict | None) -> str:
    """A special token's text; configs write it plain or as {"content": ...}."""
    return token["content"] if isinstance(token, dict) else token or ""


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a checkpoint: its tokenizer.json, or else its SentencePiece tokenizer.model.

    Raises `UserError` if it is missing or damaged, or if a package to read it is missing.
    """
    folder = find_checkpoint(path)
    settings = {}
    if (folder / "tokenizer_config.json").is_file():
        settings = read_json(folder / "tokenizer_config.json")
    template = settings.get("chat_template")
    if isinstance(template, list):  # several, by name
        template = {t["name"]: t["template"] for t in template}.get("default")
    if (file := folder / "chat_template.jinja").is_file():
        template = file.read_text(encoding="utf-8")
    if (file := folder / "tokenizer.json").is_file():
        import tokenizers

        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises plain Exception
            raise UserError(f"{file} is damaged ({error}); fetch it again") from None
        return Tokenizer(backend, settings, template)
    if (file := folder / "tokenizer.model").is_file():
        return SentencePieceTokenizer(read_sentencepiece(file), settings, template)
    raise UserError(f"{folder} has neither tokenizer.json nor tokenizer.model; fetch it again")


def read_sentencepiece(file: Path):
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError:
        raise UserError(f"{file} needs the package sentencepiece; pip install it") from None
    try:
        processor = SentencePieceProcessor(model_proto=file.read_bytes())
        if not processor.get_piece_size():
            raise ValueError("no pieces")
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{file} is damaged ({error}); fetch it again") from None
    return processor
