"""The chat template of a checkpoint: which one it is, and the prompt that it makes of messages.

Templates are written for transformers, so they get what its version 5 gives them: its variables,
filters and tags. A template is a program that came with a download: it runs in jinja's sandbox, and
whatever it raises is one line that says so.
"""

import json
from datetime import datetime
from pathlib import Path

import jinja2
from jinja2 import ext, nodes, sandbox

from support.command import UserError

MEND = "try --no-chat"


def find_template(folder: Path, settings: dict) -> tuple[object, str]:
    """The template as it stands in a checkpoint's files, None without one, and where it stands. It
    may be any JSON value, or have bytes that are no letters: only who chats needs a good one."""
    by_name = folder / "additional_chat_templates"
    for file in (by_name / "default.jinja", folder / "chat_template.jinja"):
        if file.is_file():
            return file.read_text(encoding="utf-8", errors="surrogateescape"), str(file)
    if any(by_name.glob("*.jinja")):  # transformers then reads none of tokenizer_config.json either
        return {}, str(by_name)
    return settings.get("chat_template"), str(folder / "tokenizer_config.json")


def render(template: object, messages: list[dict], special: dict[str, str], source: str) -> str:
    """Messages as one prompt that ends where the answer begins.

    `special` has the texts of the special tokens by name. Raises `UserError` if what stands in the
    `source` is no template, for whatever it raises, and for messages that are none.
    """
    try:
        if isinstance(template, list):  # the older spelling of several templates by name
            template = {item["name"]: item["template"] for item in template}
        if isinstance(template, dict):
            template = template["default"]
        template.encode()  # fails for bytes that are no letters, too
    except (TypeError, KeyError, AttributeError, UnicodeEncodeError):
        problem = "the chat template is neither UTF-8 text nor several, one of the name `default`"
        raise UserError(f"{source}: {problem}; {MEND}") from None
    if not messages or any(set(message) != {"role", "content"} for message in messages):
        raise UserError("a chat is made of messages, each of a role and a content; give one")
    try:
        compiled = make_environment().from_string(template)
        return compiled.render(
            special, messages=messages, tools=None, documents=None, add_generation_prompt=True
        )
    except Exception as error:  # a program of others: a wrong type, a division by zero, anything
        reason = " ".join(str(error).split())
        if type(error) is not jinja2.TemplateError or not reason:  # else the template's words
            reason = f"{type(error).__name__}: {reason}"
        raise UserError(f"{source}: the chat template fails: {reason}; {MEND}") from None


class Generation(ext.Extension):
    """{% generation %}...{% endgeneration %} marks an answer in training; here, its text."""

    tags = {"generation"}  # noqa: RUF012 (as jinja declares it)

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("text"), [], [], body).set_lineno(line)

    def text(self, caller):
        return caller()


def to_json(value: object, ensure_ascii: bool = False, **options) -> str:
    """The filter `tojson`: jinja's would escape HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def make_environment() -> jinja2.Environment:
    """jinja's sandbox, with what templates for transformers expect of it."""
    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment
