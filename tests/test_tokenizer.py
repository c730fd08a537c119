"""Tokenizers: tokenizer.json, the SentencePiece reader, chat templates."""

import json
import random
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.command import UserError
from support.tokenizer import load_tokenizer
from tests.helpers import save_checkpoint, tiny_model

TEXT = (
    """The key and value caches grow with every token that a language model reads and writes.
A cache of fewer channels stores the projections of its inputs, and rebuilds keys when it must.
Numbers such as 3, 14, 159, 2653 and 58979 are split into digits; tabs, dashes and "quotes" too.
Another line says that the newest tokens are kept in full precision, the others in fewer numbers.
"""
    * 3
    + "".join(
        f"line number {i}: the register content is <{i * 7919 % 50000}>\n" for i in range(200)
    )
)


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory):
    """A SentencePiece BPE with Llama's settings, trained here; and its folder."""
    spm = pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("sentencepiece")
    (folder / "text.txt").write_text(TEXT)
    spm.SentencePieceTrainer.train(
        input=str(folder / "text.txt"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=600,
        model_type="bpe",
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    return spm.SentencePieceProcessor(model_file=str(folder / "tokenizer.model")), folder


def test_sentencepiece_reader_equals_sentencepiece(sentencepiece_model):
    theirs, folder = sentencepiece_model
    ours = load_tokenizer(folder)
    letters = "abcdetonrsi  \n\t019.,<>_-éß漢🙂▁"

    @settings(max_examples=300, deadline=None, derandomize=True)
    @given(st.text(letters) | st.text() | st.sampled_from(TEXT.split("\n")))
    def check(text):
        if "\x00" in text or "▁" in text or any(s in text for s in ("<s>", "</s>", "<unk>")):
            return  # NUL ends SentencePiece's input; the others are spellings of its own symbols
        ids = theirs.encode(text)
        assert (
            ours.encode(text, special=False) == ids if not ids else [1, *ids] == ours.encode(text)
        )
        assert ours.decode(ids) == theirs.decode(ids)

    check()
    words = TEXT.split()
    for seed in range(100):
        text = " ".join(random.Random(seed).choices(words, k=20))
        assert ours.encode(text) == [1, *theirs.encode(text)]
        assert ours.decode(ours.encode(text)) == text


def test_special_tokens_in_a_prompt_are_special(sentencepiece_model):
    """The Vicuna template, which LongChat was trained with, writes </s> between the turns."""
    _, folder = sentencepiece_model
    assert load_tokenizer(folder).encode("the key</s>")[-1] == 2


@pytest.mark.parametrize("size", [0, 1, 3000])
def test_damaged_sentencepiece_model(tmp_path, sentencepiece_model, size):
    _, folder = sentencepiece_model
    data = (folder / "tokenizer.model").read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(data[:size])
    with pytest.raises(UserError, match=r"tokenizer\.model"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("kind", ["unigram", "bpe"])  # with the normalization nmt_nfkc, the default
def test_unigram_and_normalizing_models_equal_sentencepiece(tmp_path, kind):
    spm = pytest.importorskip("sentencepiece")
    (tmp_path / "text.txt").write_text(TEXT)
    spm.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=120,
        model_type=kind,
        minloglevel=2,
    )
    theirs = spm.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    ours = load_tokenizer(tmp_path)
    for text in ("the  key", "ﬁne ①", "Numbers such as 58979", "", "漢"):
        assert ours.encode(text, special=False) == theirs.encode(text)
        assert ours.decode(theirs.encode(text)) == theirs.decode(theirs.encode(text))


def test_sentencepiece_that_is_missing_is_named(tmp_path, monkeypatch):
    (tmp_path / "tokenizer.model").write_bytes(b"x")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(UserError, match="needs the package sentencepiece"):
        load_tokenizer(tmp_path)


def test_a_bos_token_that_is_no_piece_is_named(tmp_path, sentencepiece_model):
    _, folder = sentencepiece_model
    (tmp_path / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<bos>"}')
    with pytest.raises(UserError, match="bos_token '<bos>'"):
        load_tokenizer(tmp_path)


def test_chat_template(tmp_path):
    folder = save_checkpoint(tiny_model(), tmp_path)
    with pytest.raises(UserError, match="no chat template"):
        load_tokenizer(folder).chat([])
    template = (
        "{{ bos_token }}{% for m in messages %}\n"
        "{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}\n"
        "[{{ m.role }}] {{ m.content | tojson }}\n"
        "{% endfor %}\n"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    messages = [{"role": "user", "content": "a < b"}]
    expected = '<s>[user] "a < b"\n[assistant]'
    settings = {"chat_template": template, "bos_token": {"content": "<s>"}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert load_tokenizer(folder).chat(messages) == expected
    with pytest.raises(UserError, match="no tools here"):
        load_tokenizer(folder).chat([{"role": "tool", "content": ""}])
    named = [{"name": "default", "template": template}, {"name": "tool_use", "template": "no"}]
    settings["chat_template"] = named
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert load_tokenizer(folder).chat(messages) == expected
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert load_tokenizer(folder).chat(messages) == "a < b"


def test_truncation_in_the_file_does_not_cut_prompts(tmp_path):
    """Some tokenizer.json files carry the truncation and padding of their training."""
    file = save_checkpoint(tiny_model(), tmp_path) / "tokenizer.json"
    from tokenizers import Tokenizer

    backend = Tokenizer.from_file(str(file))
    backend.enable_truncation(3)
    backend.enable_padding(length=9)
    backend.save(str(file))
    assert load_tokenizer(tmp_path).encode("t1 t2 t3 t4 t5") == [1, 2, 3, 4, 5]


def test_missing_and_damaged_tokenizers_are_named(tmp_path):
    folder = save_checkpoint(tiny_model(), tmp_path)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer\.json is damaged"):
        load_tokenizer(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        load_tokenizer(folder)
