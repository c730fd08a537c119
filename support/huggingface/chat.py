"""The chat template of a checkpoint, and the prompt that it makes of messages.

Templates are written for transformers, and get the variables, filters and tags of its
version 5. A template is a program that came with a download: it runs in jinja's sandbox,
and whatever it raises is one line that says so.
"""

import json
import re
from datetime import datetime
from pathlib import Path

import jinja2
from jinja2 import sandbox

from support.command import UserError

# Marks an answer in training. To jinja it is as `with`, a block with its own variables.
GENERATION = re.compile(r"({%[-+]?\s*(?:end)?)generation(\s*[-+]?%})")


def find_template(folder: Path, settings: dict) -> tuple[object, str]:
    """What stands in a checkpoint's files as a template, None without one, and where. It may
    be anything: only who chats needs a good one."""
    for name in ("additional_chat_templates/default.jinja", "chat_template.jinja"):
        file = folder / name
        if file.is_file():
            return file.read_text(encoding="utf-8", errors="surrogateescape"), str(file)
    return settings.get("chat_template"), str(folder / "tokenizer_config.json")


def render(template: object, messages: list[dict], special: dict, source: str) -> str:
    """Messages as one prompt that ends where the answer begins; `special` has the special
    tokens by name. Raises `UserError`, which names the `source`, for whatever the template
    raises."""
    try:
        if isinstance(template, list):  # the older spelling of several by name
            template = {item["name"]: item["template"] for item in template}
        if isinstance(template, dict):
            template = template["default"]
        template.encode()  # fails for bytes that are no letters, too
        compiled = make_environment().from_string(GENERATION.sub(r"\1with\2", template))
        given = {"messages": messages, "tools": None, "documents": None}
        return compiled.render(special, add_generation_prompt=True, **given)
    except Exception as error:  # a wrong type, a division by zero, anything
        reason = " ".join(str(error).split())
        if type(error) is not jinja2.TemplateError or not reason:  # else its own words
            reason = f"{type(error).__name__}: {reason}"
        problem = f"the chat template fails: {reason}"
        raise UserError(f"{source}: {problem}; try --no-chat") from None


def to_json(value: object, ensure_ascii: bool = False, **options) -> str:
    """The filter `tojson`: jinja's would escape HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def make_environment() -> jinja2.Environment:
    """jinja's sandbox, with what templates for transformers expect of it."""
    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    return environment
