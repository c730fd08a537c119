"""Questions about one text: which tokens the cache is fed, and the command that holds a talk."""

import json
import os
import re
import signal
import sys

import jinja2
import pytest
from tokenizers.processors import TemplateProcessing

import infer
from infer import TEACHER
from support.command import UserError
from support.huggingface.conversation import Conversation
from support.huggingface.pieces import llama_pipeline
from support.huggingface.tokenizer import Tokenizer, load_tokenizer
from support.interrupt import Postponed
from tests.helpers import call

TEXT = "line one: 17\nline two: 42"


def template(user, assistant, begin="", end=""):
    """In jinja's language; `end` is where the next answer begins."""
    turns = "{% for m in messages %}{% if m.role == 'user' %}" + user + "{% else %}" + assistant
    prompt = "{% if add_generation_prompt %}" + end + "{% endif %}"
    return begin + turns + "{% endif %}{% endfor %}" + prompt


BOS, EOS, CONTENT = "{{ bos_token }}", "{{ eos_token }}", "{{ m.content }}"
TEMPLATES = {  # what the models' own ones write
    "chatml": template(
        f"<|im_start|>user\n{CONTENT}<|im_end|>\n",
        f"<|im_start|>assistant\n{CONTENT}<|im_end|>\n",
        end="<|im_start|>assistant\n",
    ),
    "llama-2": template(
        BOS + "[INST] {{ m.content | trim }} [/INST]", " {{ m.content | trim }} " + EOS
    ),
    "llama-3": template(
        "<h>user</h>\n\n{{ m.content | trim }}<eot>",
        "<h>assistant</h>\n\n{{ m.content | trim }}<eot>",
        begin=BOS,
        end="<h>assistant</h>\n\n",
    ),
    "mistral": template(f"[INST] {CONTENT} [/INST]", CONTENT + EOS, begin=BOS),
}
FORGETFUL = {
    "only the last message": "{{ messages[-1]['content'] }}",
    "the number of messages first": template(CONTENT, CONTENT, begin="{{ messages | length }}"),
    "no answers": template(CONTENT, ""),
}


@pytest.fixture(scope="module")
def teacher():
    """The teacher's tokenizer, which here begins a text with a token, as most do."""
    tokenizer = load_tokenizer(TEACHER)
    first = tokenizer.backend.id_to_token(1)
    tokenizer.backend.post_processor = TemplateProcessing(f"{first} $A", None, [(first, 1)])
    return tokenizer


def chat_tokenizer(teacher, template):
    return Tokenizer(teacher.backend, {"bos_token": "<s>", "eos_token": "</s>"}, template)


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_cache_is_fed_what_the_template_writes(teacher, name):
    """All tokens together are those of the template's text, rendered at once by jinja alone."""
    talk = Conversation(chat_tokenizer(teacher, TEMPLATES[name]), TEXT)
    template = jinja2.Template(TEMPLATES[name])
    special = {"bos_token": "<s>", "eos_token": "</s>", "add_generation_prompt": True}
    messages, first = [], f"{TEXT}\n\nWhat is two?"
    for question, answer in (("What is two?", "42"), ("And one?", "17"), ("Thanks!", "Good bye")):
        before = list(talk.tokens)
        talk.ask(question)
        assert talk.tokens[: len(before)] == before  # nothing that the cache holds is changed
        messages.append({"role": "user", "content": question if messages else first})
        rendered = template.render(special, messages=messages)
        ours = teacher.backend.decode(talk.tokens, skip_special_tokens=False)
        # An answer is kept as it was generated: spaces around it are the model's.
        assert "".join(ours.split()) == "".join(rendered.split())
        talk.add_answer(teacher.encode(answer, special=False), answer)
        messages.append({"role": "assistant", "content": answer})


@pytest.mark.parametrize("name", FORGETFUL)
def test_templates_that_change_what_they_wrote_are_refused(teacher, name):
    tokenizer = chat_tokenizer(teacher, FORGETFUL[name])
    with pytest.raises(UserError, match=r"changes what it has written.*use --no-chat"):
        Conversation(tokenizer, TEXT)
    Conversation(tokenizer, TEXT, chat=False).ask("What is two?")


BYTES = {f"<0x{i:02X}>": i for i in range(256)} | {"▁": 256}


@pytest.mark.parametrize("prefix", [False, True])
def test_without_a_template_it_is_one_running_text(teacher, prefix):
    """Also where a tokenizer puts a space before a text, as that of Llama 2 does. An answer is
    kept as it was generated, whatever tokens its text may have."""
    tokenizer = Tokenizer(llama_pipeline(BYTES, [], {}), {}, None) if prefix else teacher
    talk = Conversation(tokenizer, TEXT)
    talk.ask("What is two?")
    talk.add_answer(tokenizer.encode(" 17", special=False), " 42")
    talk.ask("And one?")
    whole = tokenizer.encode(f"{TEXT}\n\nWhat is two? 17\n\nAnd one?")
    decode = tokenizer.backend.decode_batch
    ours, expected = decode([talk.tokens, whole], skip_special_tokens=False)
    assert ours == expected


# -------------------------------------------------------------------------------- the command


@pytest.fixture
def talk(everything, capsys, monkeypatch, tmp_path):
    """Holds a conversation in this process, if not with the teacher then with a tiny model: exit
    code, output and errors."""

    def run(text, questions, *more, teacher=False):
        (tmp_path / "text.txt").write_bytes(text)
        (tmp_path / "questions.txt").write_bytes(questions)
        if not teacher:
            more = ["--model", everything / "model", "--factors", everything / "f", *more]
        with open(tmp_path / "questions.txt", encoding="utf-8") as stdin:
            monkeypatch.setattr(sys, "stdin", stdin)
            more = ["--prompt-file", tmp_path / "text.txt", *more]
            return call(infer, capsys, "--ask", "--max-new-tokens", 8 if teacher else 4, *more)

    return run


@pytest.mark.slow
def test_ten_questions_about_one_text(talk):
    """About lines of the demonstration's record, with the 80% factors: as many right as when each
    is asked alone."""
    *lines, _ = (TEACHER / "prompt.txt").read_text(encoding="utf-8").rstrip().splitlines()
    text = "\n".join(lines)
    found = re.findall(r"^line ([\w-]+): REGISTER_CONTENT is <(\d+)>$", text, re.M)
    keys, numbers = zip(*found[:: len(found) // 10][:10], strict=True)
    form = "Now the record is over. Tell me what is the <REGISTER_CONTENT> in line {}? "
    questions = [form.format(key) + "I need the number." for key in keys]

    def ask(questions, *more):
        lines = "\n".join(questions) + "\n"
        code, out, _ = talk(text.encode(), lines.encode(), "--json", *more, teacher=True)
        assert code == 0
        return [json.loads(line) for line in out.splitlines()]

    def right(results):
        return [n in result["text"] for n, result in zip(numbers, results, strict=True)]

    together = ask(["", *questions, "  "], "--compare")
    alone = [ask([question])[0] for question in questions]
    assert [result["question"] for result in together] == questions
    assert all(right([result["full"] for result in together]))
    assert sum(right(together)) >= sum(right(alone)) >= 5
    lengths = [result["prompt_tokens"] for result in together]
    assert lengths == sorted(lengths) and together[0]["tokens"] == alone[0]["tokens"]


def test_each_answer_is_followed_by_its_bytes(talk):
    code, out, err = talk(b"\xef\xbb\xbft1 t2 t3", b"t4 t5\n\nt6\n", "--compare")
    assert code == 0 and out.count("--- full cache, ") == out.count("--- cskv cache, ") == 2
    said = re.findall(r"^(\d+) tokens, ([\d.]+) MB; a full 16-bit cache: ([\d.]+) MB$", err, re.M)
    assert [int(tokens) for tokens, *_ in said] == [8, 8, 13, 13]
    assert "reading 3 tokens, full cache" in err and "reading 3 tokens, cskv cache" in err


def test_a_full_context_ends_the_conversation(talk):
    for question in (b"t1\n" * 150, b"t1 " * 600 + b"\n"):
        code, out, err = talk(b"t1 t2", question, "--json")
        assert code == 0 and "Traceback" not in err
        last = err.splitlines()[-1]
        found = re.fullmatch(
            r"the context of (\d+) tokens is full; ask in a new conversation", last
        )
        lengths = [json.loads(line)["prompt_tokens"] for line in out.splitlines()]
        assert all(length < int(found[1]) for length in lengths)


def test_ctrl_c_is_postponed_once():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), Postponed() as interrupt:
        assert not interrupt.asked
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupt.asked
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before


def test_ctrl_c_ends_an_answer_only(talk, monkeypatch):
    """The second token of the first answer is the last one; the second question is answered."""
    make = infer.make_sampler

    def interrupted(*args):
        sample, calls = make(*args), []

        def run(logits):
            calls.append(1)
            if len(calls) == 2:
                os.kill(os.getpid(), signal.SIGINT)
            return sample(logits)

        return run

    monkeypatch.setattr(infer, "make_sampler", interrupted)
    code, out, _ = talk(b"t1 t2 t3", b"t4\nt5\n", "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [row["question"] for row in rows] == ["t4", "t5"]
    assert [len(row["tokens"]) for row in rows] == [2, 4]


MISTAKES = [  # what the file holds (None where there is none), flags, words of the refusal
    (None, ["--ask"], "the prompt is empty"),
    (None, ["--ask", "--prompt-file", "-"], "questions from standard input; give the text as"),
    (None, ["--prompt-file", "."], "cannot be"),
    (None, ["--prompt-file", "missing.txt"], "cannot be"),
    (None, ["--prompt", "-x"], "is given as --prompt=-5"),
    (b"t1", ["--prompt", "t1"], "not allowed with argument --prompt"),
    (b"", [], "the prompt is empty"),
    (b"\xff\xfe", [], "is no UTF-8 text"),
    (b"t1 " * 3000, [], r"the prompt has \d+ tokens, the model's context \d+; shorten it"),
]


@pytest.mark.parametrize(("text", "more", "message"), MISTAKES)
def test_mistakes(refused, everything, tmp_path, text, more, message):
    if text is not None:
        (tmp_path / "text.txt").write_bytes(text)
        more = [*more, "--prompt-file", tmp_path / "text.txt"]
    files = ["--model", everything / "model", "--factors", everything / "f"]
    assert re.search(message, refused(infer, *files, *more))


def test_a_prompt_from_standard_input(everything, tmp_path, capsys):
    (tmp_path / "text.txt").write_bytes(b"\xef\xbb\xbft1 t2 t3")
    args = ["--model", everything / "model", "--cache", "full", "--json", "--max-new-tokens", 3]
    terminal = os.dup(0)
    with open(tmp_path / "text.txt") as piped:
        os.dup2(piped.fileno(), 0)
    try:
        _, ours, _ = call(infer, capsys, *args, "--prompt-file", "-")
    finally:
        os.dup2(terminal, 0)
        os.close(terminal)
    _, expected, _ = call(infer, capsys, *args, "--prompt", "t1 t2 t3")
    assert json.loads(ours)["tokens"] == json.loads(expected)["tokens"]
    assert json.loads(ours)["prompt_tokens"] == 3
