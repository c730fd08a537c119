"""A conversation about a text, as tokens: what a cache is to be fed before each answer.

A cache holds tokens and cannot take them back. So each rendering of the conversation has to begin
with the one before and the answer to it; only what comes after that is fed.
"""

import os
import re
from copy import copy

from support.command import UserError
from support.huggingface.tokenizer import Tokenizer

SEPARATOR = "\n\n"  # between the text and a question, and between an answer and the next one
PROBES = ("", "A", "a", "1", "(", "'", "é", "中")  # what questions may begin with


class Conversation:
    """A text, questions about it and their answers, as the `tokens` that a cache is to hold.

    With the chat template (`chat`, or if that is None and there is one) the first message is the
    text and the first question, and each further question is a message of its own. Without it all
    that is one running text:

        text, empty line, question, answer, empty line, question, answer ...
    """

    def __init__(self, tokenizer: Tokenizer, text: str, chat: bool | None = None):
        self.tokenizer = tokenizer
        self.in_template = tokenizer.template is not None if chat is None else chat
        self.beginning = text.rstrip() + SEPARATOR
        self.messages: list[dict[str, str]] = []
        self.rendered = ""  # the messages so far, up to where the next answer begins
        # What is read before the first question: the tokens that are the same for all questions.
        starts = []
        for probe in PROBES:
            message = {"role": "user", "content": self.beginning + probe}
            starts.append(self.encode(self.render([message])))
        self.tokens: list[int] = os.path.commonprefix(starts)  # noqa: RUF071 (no paths)
        if self.in_template:  # no conversation can be held with some: known before a text is read
            trial = copy(self)
            for _ in range(3):
                trial.ask("A")
                trial.add_answer([], "Yes.")

    def render(self, messages: list[dict[str, str]]) -> str:
        if self.in_template:
            return self.tokenizer.chat(messages)
        return "".join([message["content"] for message in messages])

    def encode(self, rendered: str) -> list[int]:
        return self.tokenizer.encode(rendered, special=not self.in_template)

    def ask(self, question: str) -> None:
        """Adds a question to `tokens`. Raises `UserError`, and adds nothing, for a question of
        which the tokenizer makes no token, or which changes the tokens of the text before it."""
        content = question
        if not self.messages:
            content = self.beginning + question
        elif not self.in_template:
            content = SEPARATOR + question
        messages = [*self.messages, {"role": "user", "content": content}]
        rendered = self.render(messages)
        ids = self.encode(rendered)
        begin = self.tokens
        if self.messages:
            end = self.end_of_answer(rendered)
            begin = self.encode(rendered[:end])
        new = ids[len(begin) :]
        if ids[: len(begin)] != begin:
            if not self.messages:
                problem = "the question changes the tokens of the text before it"
                raise UserError(f"{problem}; begin it with another letter")
            new = self.tokenizer.encode(rendered[end:], special=False)
        if not new:
            raise UserError("the tokenizer makes no token of the question; ask in other words")
        self.messages = messages
        self.rendered = rendered
        self.tokens = self.tokens + new

    def add_answer(self, tokens: list[int], text: str) -> None:
        """Adds an answer to `tokens`, as it was generated: `text` may have others, encoded."""
        self.messages = [*self.messages, {"role": "assistant", "content": text}]
        self.tokens = self.tokens + tokens

    def end_of_answer(self, rendered: str) -> int:
        """Where in `rendered` stands what follows the last answer. A template may write spaces
        around an answer, or take them away, as the models that it is for do. Raises `UserError`
        for templates that change more of what they wrote."""
        answer = self.messages[-1]["content"]
        if rendered.startswith(self.rendered):
            for text in (answer, answer.strip()):
                found = re.compile(r"\s*?" + re.escape(text)).match(rendered, len(self.rendered))
                if found:
                    return found.end()
        problem = "the chat template changes what it has written when the conversation goes on"
        raise UserError(f"{self.tokenizer.source}: {problem}; use --no-chat")
