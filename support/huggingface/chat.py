"""The chat template of a checkpoint: which one it is, and the prompt that it makes of messages.

Templates are written for transformers, so they get what its version 5 gives them: its variables,
filters, tags and limits. A template is a program that came with a download: it runs in jinja's
sandbox, and whatever it raises is one line that says so.
"""

import json
from datetime import datetime
from pathlib import Path

from support.command import UserError

# Names of a model's reasoning that templates read; transformers fills the first two from any.
REASONING = ("reasoning_content", "thinking", "reasoning")
MEND = "try --no-chat"


def find_template(folder: Path, settings: dict) -> tuple[object, str]:
    """The template as it stands in a checkpoint's files, None without one, and where it stands.

    Any JSON value, or bytes that are no text: only who chats needs a good one (`choose_template`).
    """
    files = {path.stem: path for path in sorted(folder.glob("additional_chat_templates/*.jinja"))}
    if (folder / "chat_template.jinja").is_file():
        files.setdefault("default", folder / "chat_template.jinja")
    if not files:
        return settings.get("chat_template"), str(folder / "tokenizer_config.json")
    path = files.get("default")
    if path is None:  # transformers then reads none of tokenizer_config.json either
        return {}, str(folder / "additional_chat_templates")
    try:
        return path.read_text(encoding="utf-8"), str(path)
    except (OSError, UnicodeDecodeError):
        return b"", str(path)


def choose_template(template: object, source: str) -> str:
    """The one template for a chat. Raises `UserError` if what the files hold is none."""
    if isinstance(template, bytes):
        raise UserError(f"{source} cannot be read as UTF-8 text; save it so, or {MEND}")
    if isinstance(template, list):  # the older spelling of several templates by name
        try:
            template = {str(item["name"]): item["template"] for item in template}
        except (TypeError, KeyError):
            what = "holds something else than objects with `name` and `template`"
            raise UserError(f"{source}: the list chat_template {what}; {MEND}") from None
    if isinstance(template, dict):
        if "default" not in template:
            raise UserError(f"{source}: no chat template has the name `default`; {MEND}")
        template = template["default"]
    if not isinstance(template, str):
        kind = type(template).__name__
        raise UserError(f"{source}: the chat template is of type {kind}, not text; {MEND}")
    return template


def render(template: str, messages: list[dict], special: dict[str, str], source: str) -> str:
    """Messages as one prompt that ends where the answer begins.

    `special` has the texts of the special tokens by name. Raises `UserError` for whatever the
    template raises, and for messages that are none.
    """
    if not messages or not all(isinstance(message, dict) for message in messages):
        raise UserError("a chat needs one message at least, each with a role and a content")
    known = {"messages": [plain_message(message) for message in messages]}
    known |= {"tools": None, "documents": None, "add_generation_prompt": True}
    if twice := sorted(known.keys() & special.keys()):
        raise UserError(f"{source}: a special token has the name {twice[0]!r}; {MEND}")
    try:
        return make_environment().from_string(template).render(**special, **known)
    except Exception as error:  # a program of others: a wrong type, a division by zero, anything
        reason = " ".join(str(error).split())
        if type(error).__name__ != "TemplateError" or not reason:  # else its own words
            reason = f"{type(error).__name__}: {reason}"
        raise UserError(f"{source}: the chat template fails: {reason}; {MEND}") from None


def plain_message(message: dict) -> dict:
    """A message as transformers shows it to a template: no None, reasoning by its two names."""
    message = {key: value for key, value in message.items() if value is not None}
    reasoning = next((message[name] for name in REASONING if name in message), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}


def make_environment():
    """jinja's sandbox, with what templates for transformers expect of it."""
    import jinja2
    from jinja2 import ext, nodes, sandbox, utils

    class Generation(ext.Extension):
        """{% generation %}...{% endgeneration %} marks an answer in training; here, its text."""

        tags = {"generation"}  # noqa: RUF012 (as jinja declares it)

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("text"), [], [], body).set_lineno(line)

        def text(self, caller):
            return caller()

    class Namespace(utils.Namespace):
        """jinja's, but without names that begin with an underscore, which transformers refuses."""

        def __init__(*args, **values):  # a template may call a value `self`
            for name in dict(*args[1:], **values):
                check_name(name)
            utils.Namespace.__init__(*args, **values)

        def __setitem__(self, name, value):
            check_name(name)
            super().__setitem__(name, value)

    def check_name(name: object) -> None:
        if str(name).startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace with the name {name!r}")

    def fail(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(  # jinja's own escapes HTML
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = fail
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    environment.globals["namespace"] = Namespace
    return environment
