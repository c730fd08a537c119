"""Tokens that the files beside a vocabulary declare: with their ids, by name, or just as special.

Newer files say all of it in tokenizer_config.json; what the older ones say counts only where that
has no added_tokens_decoder. All of it as transformers 5 reads the same files.
"""

from pathlib import Path

from tokenizers import AddedToken, Tokenizer

from support.command import UserError
from support.huggingface.checkpoint import read_json

CONFIG = "tokenizer_config.json"
NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
SWITCHES = ("add_bos_token", "add_eos_token", "add_prefix_space", "legacy", "split_special_tokens")
EXTRA, OLDER_EXTRA = "extra_special_tokens", "additional_special_tokens"
BY_NAME = "model_specific_special_tokens"
BY_ID = "added_tokens_decoder"


class Declared:
    """`by_id` are added tokens by the id they say they have, `named` special tokens by a name such
    as bos_token (None where the files say that there is none), `extra` further special tokens.

    `in_file` are a tokenizer.json's added tokens by id; `control` the list of a tokenizer.model's,
    which stand in for `extra` where that is not declared. With `raw`, those `by_id` are
    found in the text as it is, not normalized. Raises `UserError` for what is no token.
    """

    def __init__(self, folder: Path, settings: dict, in_file=None, control=None, raw=False):
        file = folder / CONFIG
        settings = dict(settings)
        if OLDER_EXTRA in settings and not settings.get(EXTRA):
            settings[EXTRA] = settings.pop(OLDER_EXTRA)
        by_name = model_specific(settings, file)
        if BY_ID not in settings:
            read_special_map(folder / "special_tokens_map.json", settings)
        named = {name: settings[name] for name in NAMES if name in settings}
        self.named: dict[str, AddedToken | None] = {}
        for name, token in (named | by_name).items():
            self.named[name] = None if token is None else read_token(token, file)
        self.extra = read_list(settings.get(EXTRA), file)
        if BY_ID in settings:
            tokens = settings[BY_ID]
            if not isinstance(tokens, dict) or not all(index.isdecimal() for index in tokens):
                raise wrong(file, f"{BY_ID} is no object of tokens by their ids")
            self.by_id = {
                int(index): read_token(token, file, raw) for index, token in tokens.items()
            }
        else:
            special = {*self.texts().values(), *(token.content for token in self.extra)}
            self.by_id = read_added(folder / "added_tokens.json", special, raw) | (in_file or {})
        if EXTRA not in settings:
            older = read_list(settings.get(OLDER_EXTRA), file)
            self.extra = older if control is None else control

    def texts(self) -> dict[str, str]:
        """The special tokens by their names."""
        return {name: token.content for name, token in self.named.items() if token is not None}

    def add_to(self, backend: Tokenizer, defaults: dict[str, str]) -> dict[str, str]:
        """Adds all tokens, in the order of their ids, then of `NAMES`, and by `defaults` those of a
        name that the files do not mention. Returns the special ones by name.

        Raises `UserError` if a token gets another id than it says: the vocabulary is not the one it
        was added to. (transformers then takes the other id.)
        """
        for name, text in defaults.items():
            self.named.setdefault(name, AddedToken(text, special=True))
        tokens = [self.by_id[index] for index in sorted(self.by_id)]
        present = [*backend.get_added_tokens_decoder().values(), *tokens]
        known = {token.content for token in present}
        named = sorted(self.named, key=lambda name: NAMES.index(name) if name in NAMES else 99)
        for token in [self.named[name] for name in named] + self.extra:
            if token is not None and token.content not in known:
                tokens.append(token)
        special = self.texts()
        for token in tokens:
            token.special = token.special or token.content in special.values()
        backend.add_tokens(tokens)
        for index, token in self.by_id.items():
            if (given := backend.token_to_id(token.content)) != index:
                problem = f"{token.content!r} says its id is {index}, but it would get {given}"
                mend = "use the files of one checkpoint, best its tokenizer.json"
                raise UserError(f"the added token {problem}; {mend}")
        return special


def wrong(file: Path, problem: str) -> UserError:
    return UserError(f"{file}: {problem}; correct it there")


def model_specific(settings: dict, file: Path) -> dict:
    """Special tokens of names that only some models have, such as image_token.

    transformers 5 writes BY_NAME itself, and forgets it where other settings give such names.
    """
    named = {}
    for name, token in settings.items():
        is_token = isinstance(token, str) or (isinstance(token, dict) and "__type" in token)
        if is_token and name.endswith("_token") and name not in NAMES:
            named[name] = token
    if isinstance(settings.get(EXTRA), dict):
        named |= settings.pop(EXTRA)
    named = named or settings.get(BY_NAME) or {}
    if not isinstance(named, dict):
        raise wrong(file, f"{BY_NAME} is no object of tokens by name")
    return named


def read_special_map(file: Path, settings: dict) -> None:
    """What an older special_tokens_map.json says goes over the settings."""
    for name, token in read_settings(file).items():
        if name not in (*NAMES, OLDER_EXTRA):
            raise UserError(f"{file}: {name} is not supported; move it to {CONFIG}")
        settings[name] = token
        if name in NAMES and token is not None:
            settings[name] = read_token(token, file)


def read_added(file: Path, special: set[str], raw: bool) -> dict[int, AddedToken]:
    """The tokens of an added_tokens.json, which has their ids by their texts."""
    by_id = {}
    for text, index in read_settings(file).items():
        if type(index) is not int:
            raise wrong(file, f"{text!r} has the id {index!r}")
        known = text in special
        token = {"content": text, "normalized": not known, "special": known}
        by_id[index] = read_token(token, file, raw)
    return by_id


def read_list(tokens: object, file: Path) -> list[AddedToken]:
    if not isinstance(tokens, list | None):
        raise wrong(file, f"{EXTRA} is no list or object of tokens")
    return [read_token(token, file) for token in tokens or []]


def read_token(token: object, file: Path, raw: bool = False) -> AddedToken:
    """A token as the files write it: a text, or {"content": text} with flags."""
    if isinstance(token, AddedToken):
        return token
    entry = {"content": token, "special": True} if isinstance(token, str) else token
    try:
        if not isinstance(entry["content"], str):
            raise TypeError
        flags = {name: entry[name] for name in FLAGS if name in entry}
        if raw:
            flags["normalized"] = False
        return AddedToken(entry["content"], **flags)
    except (TypeError, KeyError, UnicodeEncodeError):
        problem = f"the token {token!r} is neither a text nor an object with a `content` and flags"
        raise wrong(file, problem) from None


def read_settings(file: Path) -> dict:
    """A JSON object from a file, an empty one if there is no file. Raises `UserError`."""
    settings = read_json(file) if file.is_file() else {}
    for name in SWITCHES:
        if not isinstance(settings.get(name), bool | None):
            raise wrong(file, f"{name} is {settings[name]!r}, neither true nor false")
    return settings
