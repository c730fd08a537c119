"""Questions about one text: which tokens the cache is fed, and the command that holds a talk."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import jinja2
import pytest

import infer
from support.command import UserError
from support.huggingface.conversation import Conversation
from support.huggingface.tokenizer import Tokenizer, load_tokenizer
from support.interrupt import Postponed
from tests.helpers import call

ROOT = Path(__file__).parent.parent
TEACHER = ROOT / "weights" / "teacher"

# As the models' files write them; {bos} and {eos} are special tokens.
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEMPLATES = {
    "chatml": CHATML,
    "llama-2": (
        "{% for m in messages %}{% if m['role'] == 'user' %}"
        "{{ bos_token + '[INST] ' + m['content'].strip() + ' [/INST]' }}"
        "{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    "llama-3": (
        "{{ bos_token }}{% for m in messages %}"
        "{{ '<h>' + m['role'] + '</h>\n\n' + m['content'] | trim + '<eot>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<h>assistant</h>\n\n' }}{% endif %}"
    ),
    "mistral": (
        "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
        "{{ '[INST] ' + m['content'] + ' [/INST]' }}"
        "{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
    ),
    "zephyr": (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
    ),
}
FORGETFUL = {
    "only the last message": "{{ messages[-1]['content'] }}",
    "the number of messages first": "{{ messages | length }}{% for m in messages %}"
    "{{ m['content'] }}{% endfor %}",
    "no answers": "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}"
    "{% endif %}{% endfor %}",
}
TEXT = "line one: 17\nline two: 42"


@pytest.fixture(scope="module")
def teacher():
    return load_tokenizer(TEACHER)


def chat_tokenizer(teacher, template):
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    return Tokenizer(teacher.backend, special, template)


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_cache_is_fed_what_the_template_writes(teacher, name):
    """All tokens together are those of the template's text, rendered at once by jinja alone."""
    tokenizer = chat_tokenizer(teacher, TEMPLATES[name])
    talk = Conversation(tokenizer, TEXT)
    messages, first = [], f"{TEXT}\n\nWhat is two?"
    for question, answer in (("What is two?", "42"), ("And one?", "17"), ("Thanks!", "Good bye")):
        before = list(talk.tokens)
        talk.ask(question)
        assert talk.tokens[: len(before)] == before  # nothing that the cache holds is changed
        messages.append({"role": "user", "content": question if messages else first})
        rendered = jinja2.Template(TEMPLATES[name]).render(
            messages=messages, add_generation_prompt=True, bos_token="<s>", eos_token="</s>"
        )
        ours = teacher.backend.decode(talk.tokens, skip_special_tokens=False)
        # An answer is kept as it was generated: spaces around it are the model's.
        assert "".join(ours.split()) == "".join(rendered.split())
        answered = teacher.encode(answer, special=False)
        talk.add_answer(answered, answer)
        messages.append({"role": "assistant", "content": answer})


@pytest.mark.parametrize("name", FORGETFUL)
def test_templates_that_change_what_they_wrote_are_refused(teacher, name):
    tokenizer = chat_tokenizer(teacher, FORGETFUL[name])
    with pytest.raises(UserError, match=r"changes what it has written.*use --no-chat"):
        Conversation(tokenizer, TEXT)
    Conversation(tokenizer, TEXT, chat=False).ask("What is two?")


def test_without_a_template_it_is_one_running_text(teacher):
    talk = Conversation(teacher, TEXT)
    talk.ask("What is two?")
    talk.add_answer(teacher.encode(" 42", special=False), " 42")
    talk.ask("And one?")
    expected = teacher.encode(f"{TEXT}\n\nWhat is two? 42\n\nAnd one?")
    decode = teacher.backend.decode
    assert decode(talk.tokens, skip_special_tokens=False) == decode(
        expected, skip_special_tokens=False
    )


# -------------------------------------------------------------------------------- the command


def record(count=10):
    """The demonstration's record without its question, and questions about some of its lines."""
    *lines, _ = (TEACHER / "prompt.txt").read_text(encoding="utf-8").rstrip().splitlines()
    text = "\n".join(lines).rstrip()
    found = re.findall(r"^line ([\w-]+): REGISTER_CONTENT is <(\d+)>$", text, re.M)
    step = len(found) // count
    asked = found[::step][:count]
    form = "Now the record is over. Tell me what is the <REGISTER_CONTENT> in line {}? "
    form += "I need the number."
    return text, [form.format(key) for key, _ in asked], [number for _, number in asked]


def ask(file, questions, *more):
    command = [sys.executable, "infer.py", "--ask", "--prompt-file", file, *map(str, more)]
    text = "\n".join(questions) + "\n"
    return subprocess.run(command, cwd=ROOT, input=text, capture_output=True, text=True)


@pytest.mark.slow
def test_ten_questions_through_a_pipe(tmp_path):
    """With the 80% factors as many right as when each is asked alone."""
    text, questions, numbers = record()
    file = tmp_path / "record.txt"
    file.write_text(text, encoding="utf-8")
    done = ask(file, ["", *questions, "  "], "--compare", "--json", "--max-new-tokens", 8)
    assert done.returncode == 0, done.stderr
    together = [json.loads(line) for line in done.stdout.splitlines()]
    assert [result["question"] for result in together] == questions
    alone = []
    for question in questions:
        done = ask(file, [question], "--json", "--max-new-tokens", 8)
        alone.append(json.loads(done.stdout))
    right = [n in r["text"] for n, r in zip(numbers, together, strict=True)]
    right_alone = [n in r["text"] for n, r in zip(numbers, alone, strict=True)]
    assert all(n in r["full"]["text"] for n, r in zip(numbers, together, strict=True))
    assert sum(right) >= sum(right_alone) and sum(right_alone) >= 5
    lengths = [result["prompt_tokens"] for result in together]
    assert lengths == sorted(lengths) and together[0]["tokens"] == alone[0]["tokens"]


@pytest.fixture
def talk(everything, capsys, monkeypatch, tmp_path):
    """Holds a conversation in this process: exit code, output and errors."""

    def run(text, questions, *more):
        (tmp_path / "text.txt").write_bytes(text)
        (tmp_path / "questions.txt").write_bytes(questions)
        files = ["--model", everything / "model", "--factors", everything / "f"]
        with open(tmp_path / "questions.txt", encoding="utf-8") as stdin:
            monkeypatch.setattr(sys, "stdin", stdin)
            more = ["--prompt-file", tmp_path / "text.txt", *more]
            return call(infer, capsys, *files, "--ask", "--max-new-tokens", 4, *more)

    return run


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
        assert re.fullmatch(r"the context of (\d+) tokens is full; ask in a new conversation", last)
        limit = int(last.split()[3])
        assert all(json.loads(line)["prompt_tokens"] < limit for line in out.splitlines())


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
    assert code == 0
    assert [len(json.loads(line)["tokens"]) for line in out.splitlines()] == [2, 4]


@pytest.mark.parametrize(
    ("text", "more", "message"),
    [
        (None, ["--ask"], "the prompt is empty"),
        (None, ["--ask", "--prompt-file", "-"], "questions from standard input; give the text as"),
        (b"t1", ["--prompt", "t1"], "not allowed with argument --prompt"),
        (b"", [], "the prompt is empty"),
        (b"\xff\xfe", [], "is no UTF-8 text"),
        (b"t1 " * 300_000, [], r"the prompt has \d+ tokens, the model's context \d+; shorten it"),
    ],
)
def test_mistakes(refused, everything, tmp_path, text, more, message):
    if text is not None:
        (tmp_path / "text.txt").write_bytes(text)
        more = [*more, "--prompt-file", tmp_path / "text.txt"]
    files = ["--model", everything / "model", "--factors", everything / "f"]
    assert re.search(message, refused(infer, *files, *more))


def test_files_that_are_none(refused, everything, tmp_path):
    for name in (tmp_path, tmp_path / "missing.txt"):
        assert "cannot be" in refused(infer, "--model", everything / "model", "--prompt-file", name)


def test_a_prompt_that_begins_with_a_dash(refused):
    assert "is given as --prompt=-5" in refused(infer, "--prompt", "-x")


def test_a_prompt_from_standard_input(everything):
    command = [sys.executable, "infer.py", "--model", everything / "model", "--cache", "full"]
    command += ["--json", "--max-new-tokens", "3"]
    piped = subprocess.run(
        [*command, "--prompt-file", "-"],
        cwd=ROOT,
        input=b"\xef\xbb\xbft1 t2 t3",
        capture_output=True,
    )
    given = subprocess.run([*command, "--prompt", "t1 t2 t3"], cwd=ROOT, capture_output=True)
    ours, expected = json.loads(piped.stdout), json.loads(given.stdout)
    assert ours["tokens"] == expected["tokens"] and ours["prompt_tokens"] == 3
