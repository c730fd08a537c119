"""Text files to samples, and texts of a model's own."""

import re

import pytest
import torch

from experiments import english, own_words
from support import text
from support.command import UserError
from support.huggingface.tokenizer import load_tokenizer
from tests.helpers import call, tiny_model

LINE = b'{"text": "t5 \xc3\xa9"}\n'
MARK = b"\xef\xbb\xbf"  # UTF-8's byte order mark
READ = {
    "mark.jsonl": (MARK + LINE + LINE, ["t5 é", "t5 é"]),
    "mark.txt": (MARK + b"t5\xc3\xa9", ["t5é"]),
    "only-mark.txt": (MARK, [""]),
    "only-mark.jsonl": (MARK, []),
    "windows.jsonl": ((MARK + LINE + b"\n" + LINE).replace(b"\n", b"\r\n"), ["t5 é", "t5 é"]),
    "windows.txt": (b"one\r\ntwo\r\n", ["one\ntwo\n"]),
    "escaped.jsonl": (b'{"text": "a\\u0000\\n\\ud83d\\ude42", "id": 1}', ["a\0\n🙂"]),
}


@pytest.mark.parametrize("name", READ)
def test_files_as_editors_write_them(tmp_path, name):
    data, documents = READ[name]
    (tmp_path / name).write_bytes(data)
    assert list(text.read_documents(tmp_path / name)) == documents
    assert list(text.read_documents(tmp_path)) == documents


NO_LINE = [b"[" * 100_000, b"[1]", b"5", b"null", b'"text"', b'{"body": "x"}', b'{"text": ["x"]}']
NO_LINE += [LINE[:-3], b'{"text": "a\0"}', MARK + LINE, b"9" * 5000, b'{"text": "\\ud83d"}']
REFUSED = {
    "latin.jsonl": (LINE + b'{"text": "\xe9"}', "no UTF-8 text"),
    "utf16.txt": ("one".encode("utf-16"), "no UTF-8 text"),
    "utf16-le.txt": ("one".encode("utf-16-le"), "has NUL bytes, so it is no UTF-8 text; save it"),
    "table.parquet": (b"PAR1", "is not a .txt or .jsonl file, nor a folder of them; convert it"),
}
for i, line in enumerate(NO_LINE):
    said = 'line 2: not a JSON object with a "text" of letters; mend'
    REFUSED[f"{i}.jsonl"] = (LINE + line, said)


@pytest.mark.parametrize("name", REFUSED)
def test_files_that_hold_no_text_are_named_in_a_line(tmp_path, name):
    data, said = REFUSED[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError) as error:
        list(text.read_documents(tmp_path / name))
    assert said in str(error.value) and name in str(error.value)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("document", ["", " \n", "t5"])
def test_documents_without_a_token_to_predict_are_named(everything, tmp_path, document):
    tokenizer = load_tokenizer(everything / "model")
    file = tmp_path / "a.txt"
    file.write_text(document)
    with pytest.raises(UserError, match=r"a\.txt holds no text of 2 tokens or more"):
        text.sample_tokens(file, tokenizer, 4, 8, 0)
    file.write_text("t5 t6")
    assert text.sample_tokens(file, tokenizer, 4, 8, 0)[0].tolist() == [[5, 6]]


def test_a_prompt_that_yields_no_token_is_named(everything):
    tokenizer = load_tokenizer(everything / "model")
    tokenizer.template = "{{ '' }}"
    assert tokenizer.encode_prompt("t5", chat=False) == [5]
    for prompt, chat in (("t5", None), ("t5", True), ("", False)):
        with pytest.raises(UserError, match="no token of the prompt; give other text, or --no-ch"):
            tokenizer.encode_prompt(prompt, chat)


@pytest.mark.slow
def test_english_is_there_and_the_two_texts_are_apart(tmp_path, capsys):
    assert call(english, capsys, "--out", tmp_path)[0] == 0
    calibration = (tmp_path / "calibration.txt").read_text(encoding="utf-8")
    heldout = (tmp_path / "heldout.txt").read_text(encoding="utf-8")
    assert len(calibration) > 300_000 and len(heldout) > 300_000
    paragraphs = {p for p in calibration.split("\n\n") if len(p) > 100}
    assert not paragraphs & set(heldout.split("\n\n"))
    first = ("import torch", "#pragma once", "Metadata-Version")
    for name, words in zip(("program", "headers", "descriptions"), first, strict=True):
        text = (tmp_path / f"{name}.txt").read_text(encoding="utf-8")
        assert len(text) > 30_000 and words in text[:600], name


# ---------------------------------------------------------------------------- a model's own words


@pytest.mark.parametrize("every, last", [(2, [0, 1, 2, 0, 1, 2]), (4, [0, 1, 2, 3, 4, 5, 6])])
def test_some_texts_are_their_first_half_twice(every, last):
    texts = [torch.arange(n)[None] for n in (3, 2, 4, 7)]
    shown = [one[0].tolist() for one in text.with_copies(texts, every)]
    assert shown == [[0, 1, 2], [0, 0], [0, 1, 2, 3], last]


def test_own_words_are_drawn_from_the_models_distribution():
    model = tiny_model(eos_token_ids=(3, 5))
    begun = [[7], [8, 9, 10], [11]]
    own = own_words.write_texts(model, begun, 12, torch.Generator().manual_seed(1))
    generator = torch.Generator().manual_seed(1)
    expected = torch.tensor([[7], [8], [11]])
    for t in range(1, 12):
        p = model(expected)[:, -1].softmax(-1)
        p[:, [3, 5]] = 0  # the text does not end
        p /= p.sum(-1, keepdim=True)
        expected = torch.cat([expected, torch.multinomial(p, 1, generator=generator)], 1)
        if t < 3:
            expected[1, t] = begun[1][t]
    assert torch.equal(own, expected)


def test_every_second_text_begins_as_one_of_many_kinds(everything):
    tokenizer = load_tokenizer(everything / "model")
    begun = [[n] for n in range(90)]
    own_words.begin_some(begun, tokenizer)
    kinds = [tokenizer.encode(text) for text in own_words.BEGINNINGS]
    assert begun[::2] == [[n] for n in range(0, 90, 2)] and len(kinds) == 40
    assert begun[1::2] == [kinds[n % 40] or [2 * n + 1] for n in range(45)]


def test_own_words_stand_beside_as_much_other_text(everything, refused, tmp_path, capsys):
    data, file, again = everything / "text.jsonl", tmp_path / "own.jsonl", tmp_path / "again.jsonl"
    args = ["--model", everything / "model", "--data", data, "--samples", 2, "--seq-len", 9]
    code, out, _ = call(own_words, capsys, *args, "--out", file)
    assert code == 0 and out.startswith(f"{file}: 2 texts of the model's own, 2 pieces of")
    texts = list(text.read_documents(file))
    others = "\n".join(text.read_documents(data))
    assert len(texts) == 4 and all(texts)
    assert [piece.strip() in others for piece in texts] == [False, False, True, True]
    assert call(own_words, capsys, *args, "--out", again)[0] == 0
    assert file.read_bytes() == again.read_bytes()
    assert call(own_words, capsys, *args, "--out", again, "--join", 2)[0] == 0
    first, second = text.read_documents(again)
    assert first in ("\n\n".join(texts[:2]), "\n\n".join(texts[1::-1]))
    assert second == "\n\n".join(texts[2:])
    for more, message in {
        ("--out", tmp_path / "own.txt"): r"error: --out .*own\.txt must end in \.jsonl",
        ("--out", file, "--seq-len", 10**6): "error: --seq-len 1000000 exceeds the context of",
        ("--out", data): "error: --out and --data are both",
        ("--out", file, "--data", tmp_path / "no.txt"): r"error: .*no\.txt",
    }.items():
        assert re.match(message, refused(own_words, *args, *more))
