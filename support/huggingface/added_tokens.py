"""Tokens that the files beside a vocabulary declare: with their ids, by name, or just as special.

Newer files say all of it in tokenizer_config.json; what the older ones say counts only where that
has no added_tokens_decoder. All of it as transformers 5 reads the same files.
"""

import codecs
from pathlib import Path

from tokenizers import AddedToken, Tokenizer

from support.command import UserError
from support.huggingface.checkpoint import read_json

CONFIG = "tokenizer_config.json"
NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
EXTRA, OLDER_EXTRA = "extra_special_tokens", "additional_special_tokens"
BY_ID = "added_tokens_decoder"
SWITCHES = ("add_bos_token", "add_eos_token", "add_prefix_space", "legacy", "split_special_tokens")
SWITCHES += ("fix_mistral_regex", "clean_up_tokenization_spaces")
SWITCHES += ("clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output",)


class Declared:
    """`by_id` are added tokens by the id they say they have, `named` special tokens by a name such
    as bos_token, `extra` further special tokens. Each is an `AddedToken`, or a text.

    `in_file` are a tokenizer.json's own added tokens; `control` those of a tokenizer.model, which
    stand in for what is not declared. Raises `UserError` for what is no token.
    """

    def __init__(
        self,
        folder: Path,
        settings: dict,
        in_file: dict[int, AddedToken] | None = None,
        control: list[AddedToken] | None = None,
    ):
        self.file = folder / CONFIG
        settings = dict(settings)
        if OLDER_EXTRA in settings and not settings.get(EXTRA):
            settings[EXTRA] = settings.pop(OLDER_EXTRA)
        own = {name: settings[name] for name in settings if is_own(name, settings[name], str)}
        own |= pop_names(settings)
        if BY_ID in settings:
            self.by_id = self.read_by_id(settings[BY_ID])
        else:
            self.read_special_map(settings, folder / "special_tokens_map.json")
            own |= pop_names(settings)
            special = [settings[name] for name in NAMES if settings.get(name)]
            special += listed(settings.get(EXTRA), self.file)
            self.by_id = read_added(folder / "added_tokens.json", {str(t) for t in special})
            self.by_id |= in_file or {}

        self.named = {
            name: None if settings[name] is None else read_token(settings[name], self.file)
            for name in NAMES
            if name in settings
        }
        for name, value in settings.items():
            if name not in own and is_own(name, value, str | AddedToken):
                self.named[name] = value
            elif isinstance(value, dict) and "__type" in value and is_own(name, value, dict):
                self.named[name] = read_token(value, self.file)
        self.named |= {name: read_token(value, self.file) for name, value in own.items()}
        if EXTRA not in settings:
            settings[EXTRA] = settings.get(OLDER_EXTRA) if control is None else control
        self.extra = [read_token(token, self.file) for token in listed(settings[EXTRA], self.file)]

    def read_by_id(self, tokens: object) -> dict[int, AddedToken]:
        by_id = {}
        try:
            for index, token in tokens.items():
                if not isinstance(token, dict):
                    raise TypeError
                by_id[int(index)] = read_token(token, self.file)
        except (AttributeError, TypeError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            what = f"{BY_ID} is not an object of tokens by their ids"
            raise UserError(f"{self.file}: {what}; correct it there") from None
        return by_id

    def read_special_map(self, settings: dict, file: Path) -> None:
        """What an older special_tokens_map.json says goes over the settings."""
        for name, value in read_settings(file).items():
            if name == EXTRA and isinstance(value, list):
                before = listed(settings.get(EXTRA), self.file)
                new = [read_token(token, file, special=True) for token in value]
                value = before + [token for token in new if token not in before]
            elif value is not None and (
                name in NAMES or (isinstance(value, dict) and name != EXTRA)
            ):
                value = read_token(value, file, special=True)
            settings[name] = value

    def texts(self) -> dict[int, str]:
        return {index: token.content for index, token in self.by_id.items()}

    def fill(self, defaults: dict[str, str | None]) -> None:
        """Names for special tokens, where the files say nothing of the name."""
        self.named = {**defaults, **self.named}

    def match_raw_text(self) -> None:
        """Finds the tokens of `by_id` in the text as it is, not as the vocabulary normalizes it."""
        for index, token in self.by_id.items():
            flags = {name: getattr(token, name) for name in FLAGS}
            self.by_id[index] = AddedToken(token.content, **{**flags, "normalized": False})

    def add_to(self, backend: Tokenizer) -> None:
        """Adds all tokens, in the order of their ids, then of `NAMES`.

        Raises `UserError` if a token gets another id than it says: the vocabulary is not the one it
        was added to. (transformers then takes the other id.)
        """
        tokens = [self.by_id[index] for index in sorted(self.by_id)]
        known = {token.content for token in backend.get_added_tokens_decoder().values()}
        known |= {token.content for token in tokens}
        order = sorted(self.named, key=lambda name: NAMES.index(name) if name in NAMES else 99)
        for token in [*(self.named[name] for name in order), *self.extra]:
            if token is not None and str(token) not in known and token not in tokens:
                tokens.append(token)
        names = {str(token) for token in self.named.values() if token}
        for i, token in enumerate(tokens):
            if isinstance(token, str):
                tokens[i] = AddedToken(token, special=True)
            elif token.content in names:
                token.special = True
        backend.add_tokens(tokens)
        for index, text in self.texts().items():
            if (got := backend.token_to_id(text)) != index:
                what = f"the added token {text!r} says its id is {index}, but it would get {got}"
                raise UserError(f"{self.file.parent}: {what}; use the files of one checkpoint")


def is_own(name: str, value: object, kind: type) -> bool:
    """Whether a setting gives a special token a name of the model's own, such as image_token."""
    return name.endswith("_token") and name not in NAMES and isinstance(value, kind)


def pop_names(settings: dict) -> dict:
    """The further special tokens, if they are given by name."""
    return settings.pop(EXTRA) if isinstance(settings.get(EXTRA), dict) else {}


def listed(tokens: object, file: Path) -> list:
    if not isinstance(tokens, list | None):
        what = f"{EXTRA} is neither a list of tokens nor an object of them by name"
        raise UserError(f"{file}: {what}; correct it there")
    return tokens or []


def read_added(file: Path, special: set[str]) -> dict[int, AddedToken]:
    """The tokens of an added_tokens.json, which has their ids by their texts."""
    by_id = {}
    for text, index in read_settings(file).items():
        if type(index) is not int or not is_unicode(text):
            raise UserError(f"{file}: {text!r} has the id {index!r}; correct it there")
        known = text in special
        by_id[index] = AddedToken(text, normalized=not known, special=known)
    return by_id


def read_token(token: object, file: Path, **flags: bool) -> AddedToken | str:
    """A token as the files write it: a text, or {"content": text} with flags."""
    if isinstance(token, AddedToken):
        return token
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str) or not is_unicode(text):
        what = f"the token {token!r} is neither a text nor an object with a `content`"
        raise UserError(f"{file}: {what}; correct it there")
    if token is text:
        return text
    flags = {**{name: token[name] for name in FLAGS if name in token}, **flags}
    for name, value in flags.items():
        if not isinstance(value, bool):
            what = f"{name} of the token {text!r} is {value!r}"
            raise UserError(f"{file}: {what}, neither true nor false; correct it there")
    return AddedToken(text, **flags)


def is_unicode(text: str) -> bool:
    return not any("\ud800" <= c <= "\udfff" for c in text)  # how Python spells what is no UTF-8


def read_settings(file: Path) -> dict:
    """A JSON object from a file, an empty one if there is no file. Raises `UserError`."""
    if not file.is_file():
        return {}
    check_mark(file)
    try:
        settings = read_json(file)
    except RecursionError:
        raise UserError(f"{file} is nested too deeply to be settings; fetch it again") from None
    for name in SWITCHES:
        if not isinstance(settings.get(name), bool | None):
            what = f"{name} is {settings[name]!r}, neither true nor false"
            raise UserError(f"{file}: {what}; correct it there")
    return settings


def check_mark(file: Path) -> None:
    with file.open("rb") as start:
        if start.read(3) == codecs.BOM_UTF8:
            raise UserError(f"{file} begins with a byte order mark; save it as UTF-8 without one")
