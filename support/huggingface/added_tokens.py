"""Tokens that the files beside a vocabulary declare: by id, by name, or just as special.

Newer files say all of it in tokenizer_config.json; what the older ones say counts only
where that has no added_tokens_decoder. As transformers 5 reads the same files.
"""

from pathlib import Path

from tokenizers import AddedToken, Tokenizer

from support.command import UserError
from support.huggingface.checkpoint import read_json

CONFIG = "tokenizer_config.json"
NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token")
NAMES += ("mask_token",)
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
EXTRA = "extra_special_tokens"
OLDER_EXTRA = "additional_special_tokens"
BY_ID = "added_tokens_decoder"


def add_declared(backend: Tokenizer, folder: Path, settings: dict, in_file: dict) -> dict:
    """Adds all tokens, by their ids, then by `NAMES`. Returns the special ones by name.

    `settings` are those of tokenizer_config.json, `in_file` the added tokens by id of a
    tokenizer.json. Raises `UserError` if a token gets another id than it says (transformers
    then takes that), and any error of Python for what is no token.
    """
    older = {}
    if BY_ID not in settings:
        older = read_json(folder / "special_tokens_map.json", needed=False)
    unknown = set(older) - {*NAMES, OLDER_EXTRA}
    if unknown:
        raise ValueError(f"special_tokens_map.json has {unknown}; move it to {CONFIG}")
    named = named_tokens(settings | older)
    extra = further_tokens(settings)
    further = read_list(extra)
    if BY_ID in settings:
        by_id = {int(i): read_token(token) for i, token in settings[BY_ID].items()}
    else:
        by_id = dict(in_file)
        special = {token.content for token in [*named.values(), *further]}
        for text, i in read_json(folder / "added_tokens.json", needed=False).items():
            known = text in special
            by_id.setdefault(i, AddedToken(text, normalized=not known, special=known))
    if extra is None:
        further = read_list(older.get(OLDER_EXTRA))

    tokens = [by_id[i] for i in sorted(by_id)]
    known = {token.content for token in tokens}
    known |= {token.content for token in backend.get_added_tokens_decoder().values()}
    for token in [*named.values(), *further]:
        if token.content not in known:
            tokens.append(token)
    texts = {name: token.content for name, token in named.items()}
    for token in tokens:
        token.special = token.special or token.content in texts.values()
    backend.add_tokens(tokens)
    for i, token in by_id.items():
        given = backend.token_to_id(token.content)
        if given != i:
            problem = f"{token.content!r} says its id is {i}, but it would get {given}"
            mend = "use the files of one checkpoint, best its tokenizer.json"
            raise UserError(f"{folder}: the added token {problem}; {mend}")
    return texts


def named_tokens(settings: dict) -> dict[str, AddedToken]:
    """The special tokens by name: of `NAMES`, then of some models only (prefix_token)."""
    names = list(NAMES)
    for name, token in settings.items():
        typed = isinstance(token, dict) and "__type" in token
        if (typed or isinstance(token, str)) and name.endswith("_token"):
            names.append(name)
    given = [name for name in names if settings.get(name) is not None]
    return {name: read_token(settings[name]) for name in given}


def further_tokens(settings: dict) -> object:
    """What is declared as further special tokens: an empty list too, but no empty object."""
    tokens = settings.get(EXTRA)
    if not tokens:
        tokens = settings.get(OLDER_EXTRA, tokens)
    return None if tokens == {} else tokens


def read_list(tokens: object) -> list[AddedToken]:
    if tokens and not isinstance(tokens, list):
        raise TypeError(f"{EXTRA} is no list of tokens")
    return [read_token(token) for token in tokens or []]


def read_token(token: object) -> AddedToken:
    """A token as the files write it: a text, or {"content": text} with flags."""
    if isinstance(token, str):
        return AddedToken(token, special=True)
    if not isinstance(token, dict) or not isinstance(token.get("content"), str):
        raise TypeError(f"{token!r:.80} is neither a text nor an object with `content`")
    flags = {name: token[name] for name in FLAGS if name in token}
    return AddedToken(token["content"], **flags)
