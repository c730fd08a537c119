"""Tokenizers and chat templates: as transformers reads the same files, or one line."""

import json
import re
import sys
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from support.command import UserError
from support.huggingface.tokenizer import CLEAN_UP, load_tokenizer

TEXT = Path(__file__).parent.parent.joinpath("LICENSE").read_text(encoding="utf-8")
LLAMA = {"tokenizer_class": "LlamaTokenizer"}
GPT2 = {"tokenizer_class": "GPT2Tokenizer"}
MISTRAL = {"config": {"model_type": "mistral"}}


# ------------------------------------------------------------------------ the files of checkpoints


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory):
    """A SentencePiece BPE with Llama's settings, trained here; and its folder."""
    spm = pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("sentencepiece")
    (folder / "text.txt").write_text(TEXT)
    spm.SentencePieceTrainer.train(
        input=str(folder / "text.txt"),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        minloglevel=2,
        vocab_size=600,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
    )
    return spm.SentencePieceProcessor(model_file=str(folder / "tokenizer.model")), folder


def words():
    """Words as tokens; unlike a BPE, its decoded text may be cleaned up."""
    known = ("<unk>", "the", "dog", "it", "'s", ",", "user", "<s>", "</s>")
    vocab = {word: i for i, word in enumerate(known)}
    backend = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return backend


def llama_like():
    """A tokenizer.json as Llama 2 has it, which LlamaTokenizer reads otherwise than it says."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *"▁thedogus"]
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("d", "o"), ("do", "g"), ("▁", "dog")]
    vocab = {piece: i for i, piece in enumerate(pieces + ["".join(pair) for pair in merges])}
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    backend.normalizer = normalizers.Sequence(steps)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    backend.add_special_tokens(["<unk>", "<s>", "</s>", "<|user|>"])
    return backend


def byte_level():
    """A tokenizer.json of bytes, as GPT-2 and Llama 3 have it, which splits digits."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("1", "2")]
    vocab = {piece: i for i, piece in enumerate(letters + ["".join(pair) for pair in merges])}
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges))
    steps = [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>"])
    return backend


JSON = {"words": words, "llama": llama_like, "bytes": byte_level}


@pytest.fixture
def save(tmp_path, request):
    """Writes a checkpoint's files but its weights: a vocabulary and what lies beside it."""

    def write(kind, settings=None, config=None, **files):
        if kind == "model":
            source = request.getfixturevalue("sentencepiece_model")[1] / "tokenizer.model"
            (tmp_path / "tokenizer.model").write_bytes(source.read_bytes())
        else:
            JSON[kind]().save(str(tmp_path / "tokenizer.json"))
        files = {"tokenizer_config": settings, "config": config or {"model_type": "llama"}, **files}
        for name, value in files.items():
            if value is not None:
                (tmp_path / f"{name}.json").write_text(json.dumps(value))
        return tmp_path

    return write


def change_model(file, change):
    """Changes one thing in a tokenizer.model."""
    layout = pytest.importorskip("sentencepiece.sentencepiece_model_pb2")
    proto = layout.ModelProto.FromString(file.read_bytes())
    change(proto)
    file.write_bytes(proto.SerializeToString())


def reference(folder):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("google.protobuf")
    transformers.logging.set_verbosity_error()
    return transformers.AutoTokenizer.from_pretrained(folder)


def assert_as_transformers(folder, texts):
    ours, theirs = load_tokenizer(folder), reference(folder)
    for text in texts:
        ids = ours.encode(text)
        assert ids == theirs(text)["input_ids"], text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
        inner = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text, special=False) == inner
    assert ours.special == theirs.special_tokens_map


# --------------------------------------------------------------------------------- tokenizer.model


def test_a_sentencepiece_model_equals_sentencepiece(sentencepiece_model, save):
    """But for a text that begins with a space, to which transformers adds none."""
    theirs, _ = sentencepiece_model
    ours = load_tokenizer(save("model", LLAMA | {"add_bos_token": True}))
    letters = st.text("abcdetonrsi  \n\t019.,<>_-éß漢🙂")
    some_words = st.lists(st.sampled_from(TEXT.split()), min_size=10).map(" ".join)

    @settings(max_examples=150, deadline=None, derandomize=True)
    @given(letters | st.text() | some_words | st.sampled_from(TEXT.split("\n")))
    def check(text):
        # NUL ends SentencePiece's input; the others are spellings of its own symbols.
        if text[:1] in ("", " ") or any(s in text for s in ("\0", "▁", "<s>", "</s>", "<unk>")):
            return
        ids = theirs.encode(text)
        assert ours.encode(text, special=False) == ids
        assert ours.encode(text) == [1, *ids]
        assert ours.decode(ids) == theirs.decode(ids)

    check()
    assert ours.encode("the key</s>")[-1] == 2  # Vicuna writes </s> between the turns


def test_merges_go_by_ids_as_in_transformers(save):
    """Not by scores, as in SentencePiece; here these differ."""
    folder = save("model", LLAMA)

    def turn_scores_round(proto):
        for piece in proto.pieces:
            piece.score = -piece.score

    change_model(folder / "tokenizer.model", turn_scores_round)
    assert_as_transformers(folder, [*CHAT, *TEXT.splitlines()[:9]])


UNLIKE = [
    lambda proto: setattr(proto.trainer_spec, "model_type", 1),  # Unigram
    lambda proto: setattr(proto.pieces[1], "piece", "[BOS]"),
    lambda proto: setattr(proto.pieces[400], "type", 3),  # a control symbol
    lambda proto: setattr(proto.pieces[400], "type", 4),  # one of a user's
]


def test_a_model_that_no_llama_has_is_refused(save):
    said = r"\.model is read for a Llama with LlamaTokenizer only; put the tokenizer\.json of its"
    for named, config in ((LLAMA, "mistral"), ({}, "llama"), ({"tokenizer_class": FAST}, "llama")):
        with pytest.raises(UserError, match=said):
            load_tokenizer(save("model", named, {"model_type": config}))
    file = save("model", LLAMA) / "tokenizer.model"
    data = file.read_bytes()
    for change in UNLIKE:
        file.write_bytes(data)
        change_model(file, change)
        with pytest.raises(UserError, match=r"\.model cannot be read \(no BPE with <s> and </s> "):
            load_tokenizer(file.parent)
    for size in (0, 1, 3000):
        file.write_bytes(data[:size])
        with pytest.raises(
            UserError, match=r"cannot be read \(.*\); .* put its model's tokenizer\.j"
        ):
            load_tokenizer(file.parent)


@pytest.mark.parametrize("package", ["sentencepiece", "google"])
def test_a_package_that_is_missing_is_named(save, monkeypatch, package):
    folder = save("model", LLAMA)
    for name in list(sys.modules):
        if name.startswith(("sentencepiece", "google")):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"{package}.*\); pip install sentencepiece protobuf, or"):
        load_tokenizer(folder)


# ------------------------------------------------------------ the same files, read by transformers


def token(content, **flags):
    names = ("lstrip", "rstrip", "normalized", "single_word", "special")
    return {"content": content, **{name: flags.get(name, False) for name in names}}


FAST = "PreTrainedTokenizerFast"
TAGS = {"<|user|>": 600, "<|end|>": 601}
TYPED = token("<|end|>", lstrip=True) | {"__type": "AddedToken"}
DECODER = {"added_tokens_decoder": {str(i): token(t, special=True) for t, i in TAGS.items()}}
STRIPPED = {
    "600": token("<|user|>", rstrip=True, special=True),
    "601": token("<|end|>", lstrip=True, special=False),
    "602": token("dog", single_word=True),
}
CHAT = ("<|user|> the dog  <|end|>\nthe dogs<|end|>", " the dog", "<s>the</s> dog 's user, it")
CHAT += ("the  dog , ", "Grüße 漢 1234", "", "  ")
BOTH = {"add_bos_token": True, "add_eos_token": True}
OLD_MAP = {"special_tokens_map": {"pad_token": token("<|user|>", lstrip=True)}}
IGNORED = {"special_tokens_map": {"eos_token": "dog"}, "added_tokens": {"it": 602}}
TWO = {"additional_special_tokens": ["<|user|>"]}
MORE = {"special_tokens_map": {"additional_special_tokens": list(TAGS)}}
WORDS = {"additional_special_tokens": ["dog"], "eos_token": token("<e>")}
IN_LLAMA = {"added_tokens": {"<|end|>": 275}}
DECLARED = [  # a vocabulary, the settings, the files beside them
    ("model", {"added_tokens_decoder": STRIPPED}, {}),
    ("model", DECODER, IGNORED),
    ("model", DECODER | {"bos_token": "</s>", "legacy": False, **BOTH}, {}),
    ("model", {"eos_token": "<|end|>"}, {"added_tokens": TAGS, **OLD_MAP}),
    ("model", {"add_bos_token": False, "add_eos_token": True}, MORE),
    ("model", {"additional_special_tokens": list(TAGS), "legacy": True, **BOTH}, {}),
    ("model", {"extra_special_tokens": list(TAGS), "add_prefix_space": False}, {}),
    ("model", {"extra_special_tokens": {}, "add_bos_token": True, "bos_token": None}, {}),
    ("model", {"extra_special_tokens": [], "add_bos_token": True, "bos_token": None}, {}),
    ("model", {"image_token": "<|user|>", "pad_token": "<|end|>"}, {}),
    ("model", {"bos_token": "<bos>", "eos_token": TYPED, **BOTH, **TWO}, {}),
    ("model", None, {"config": {"model_type": "llama"} | LLAMA}),  # the class stands there
    ("words", {"add_bos_token": True, "bos_token": "<s>"}, {"special_tokens_map": WORDS}),
    ("words", {"additional_special_tokens": ["<|user|>", "dog"], "image_token": TYPED}, {}),
    ("words", {"split_special_tokens": True, "eos_token": "dog"}, {}),
    ("llama", {}, {}),
    ("llama", {}, IN_LLAMA),
    ("llama", {"extra_special_tokens": {}, "additional_special_tokens": []}, MORE),
    ("llama", {"eos_token": "<|end|>"}, IN_LLAMA),
    ("llama", LLAMA, {}),
    ("llama", LLAMA, MISTRAL),
    ("llama", LLAMA | {"add_bos_token": False, "add_eos_token": True, CLEAN_UP: True}, {}),
    ("llama", LLAMA | {"add_prefix_space": False}, {}),
    ("llama", {"tokenizer_class": "LlamaTokenizerFast", "legacy": True}, {}),
    ("llama", {"tokenizer_class": FAST}, {}),
    ("bytes", LLAMA, {}),
    ("bytes", GPT2, {}),
    ("bytes", GPT2 | {"add_prefix_space": True}, {}),
]


@pytest.mark.parametrize(("kind", "settings", "files"), DECLARED)
def test_settings_beside_the_vocabulary_as_in_transformers(save, kind, settings, files):
    if kind == "model" and settings is not None:
        settings = LLAMA | settings
    assert_as_transformers(save(kind, settings, **files), CHAT)


BY_ID = "added_tokens_decoder"
NO_TOKENS = "declares no tokens ("
NEITHER = "is neither a text nor an object with `content`"
UNKNOWN = "is not supported; take it out there"
WRONG = [  # settings, the files beside them, words of the refusal
    ({}, {"added_tokens": {"<|user|>": 700}}, "'<|user|>' says its id is 700"),
    ({}, {"added_tokens": ["x"]}, "a list, not a JSON object"),
    ({BY_ID: {"300": token("<|user|>")}}, {}, "says its id is 300, but it would get 600"),
    ({BY_ID: {"600": {}}}, {}, NEITHER),
    ({BY_ID: {"600": token("x", lstrip=1)}}, {}, NO_TOKENS),
    ({BY_ID: {"a": token("x")}}, {}, NO_TOKENS),
    ({BY_ID: None}, {}, NO_TOKENS),
    ({"extra_special_tokens": {"v": "x"}}, {}, "extra_special_tokens is no list"),
    ({"extra_special_tokens": [3]}, {}, f"(3 {NEITHER}"),
    ({"bos_token": {"content": None}}, {}, NEITHER),
    ({}, {"special_tokens_map": {"eos_token": 3}}, f"(3 {NEITHER}"),
    ({}, {"special_tokens_map": {"image_token": "x"}}, "move it to tokenizer_con"),
    ({"eos_token": "\ud800"}, {}, NO_TOKENS),
    ({"tokenizer_class": 5}, {}, "tokenizer_class 5 is not supported"),
    (GPT2, {}, "tokenizer_class GPT2Tokenizer is not supported"),
    ({"fix_mistral_regex": True}, {}, UNKNOWN),
    ({"fast_tokenizer_files": ["tokenizer.4.0.0.json"]}, {}, UNKNOWN),
    ({f"{CLEAN_UP}_for_bpe_even_though_it_will_corrupt_output": True}, {}, UNKNOWN),
    ({"model_specific_special_tokens": {"v": "<|user|>"}}, {}, UNKNOWN),
]


@pytest.mark.parametrize(("settings", "files", "said"), WRONG)
def test_wrong_settings_of_a_tokenizer_are_named_in_a_line(save, settings, files, said):
    folder = save("model", LLAMA | settings, **files)
    with pytest.raises(UserError, match=re.escape(said)) as error:
        load_tokenizer(folder)
    assert str(folder) in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_what_is_for_a_bpe_or_for_others_only(save):
    with pytest.raises(UserError, match=r"tokenizer\.json is not a BPE, but LlamaTokenizer is"):
        load_tokenizer(save("words", LLAMA))
    with pytest.raises(UserError, match=f"config.json: {CLEAN_UP} {UNKNOWN}"):
        load_tokenizer(save("words", {CLEAN_UP: True}))


def test_truncation_and_padding_in_the_file_do_not_count(save):
    """Some files carry those of their training."""
    folder = save("words", {})
    backend = words()
    backend.enable_truncation(3)
    backend.enable_padding(length=9)
    backend.save(str(folder / "tokenizer.json"))
    assert load_tokenizer(folder).encode("the dog it user") == [1, 2, 3, 6]


def test_a_tokenizer_that_is_damaged_or_missing_is_named(save):
    folder = save("words", {})
    file = folder / "tokenizer.json"
    for text in ("{", "\ufeff{}", '{"a": ' + "[" * 200_000):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=r"tokenizer\.json is damaged"):
            load_tokenizer(folder)
    file.unlink()
    with pytest.raises(UserError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        load_tokenizer(folder)


# ------------------------------------------------------------------------------- chat templates

MARKED = "{% generation %}{{ m.content }}{% set a = 1 %}{% endgeneration %}{{ a }}"
TEMPLATES = [
    "{% if tools is none and documents is none %}none{% endif %}{{ tools | tojson }}",
    "{% for m in messages %}" + MARKED + "{% endfor %}",
    " a {%- generation -%} \n b \n  {%endgeneration%}\n c",
    "{% for m in [1, 2, 3] %}{% if m == 2 %}{% break %}{% endif %}{{ m }}{% endfor %}",
    "{{ messages | tojson }} {{ {'b': 1, 'a': '<é'} | tojson(indent=2) }}",
    "{{ {'b': 1, 'a': '<é'} | tojson(sort_keys=true) }}",
    "{{ [1, 'é'] | tojson(ensure_ascii=true, separators=(',', ':')) }}",
    "{{ bos_token }}|{{ eos_token }}|{{ image_token }}|{{ pad_token }}",
    "{{ pad_token is defined }} {{ cls_token is none }} {{ enable_thinking }}",
    "{{ strftime_now('%Y') | length }}",
    "  {% if add_generation_prompt %}\n  a\n  {% endif %}\n\n  b",
    "",
]


@pytest.mark.parametrize("template", TEMPLATES)
def test_chat_templates_as_in_transformers(template, save):
    named = {"image_token": "<i>", "bos_token": "<s>"}
    folder = save("words", {"chat_template": template, **named})
    first = {"role": "user", "content": "<é> 'a' & 漢"}
    messages = [first, {"role": "assistant", "content": "b"}]
    options = {"tokenize": False, "add_generation_prompt": True}
    expected = reference(folder).apply_chat_template(messages, **options)
    assert load_tokenizer(folder).chat(messages) == expected


FILES = ("chat_template.jinja", "additional_chat_templates/default.jinja")
FILES += ("additional_chat_templates/rag.jinja", "chat_template.json")
CHOICES = [  # what tokenizer_config.json says, and which of the files are there
    ("one", []),
    ([{"name": "rag", "template": 1}, {"name": "default", "template": "two"}], []),
    ({"rag": "one", "default": "two"}, []),
    ("one", FILES[:1]),
    ("one", [FILES[0], FILES[2]]),
    ("one", FILES[:2]),
    ("one", FILES[1:3]),
    ("one", FILES[3:]),  # a processor's
]


@pytest.mark.parametrize(("setting", "files"), CHOICES)
def test_the_chat_template_that_transformers_takes(save, setting, files):
    folder = save("words", {"chat_template": setting})
    (folder / "additional_chat_templates").mkdir()
    for file in files:
        (folder / file).write_bytes(b"{# \xc3\xa9 #}\r\nthis is " + file.encode())
    messages = [{"role": "user", "content": "x"}]
    expected = reference(folder).apply_chat_template(messages, tokenize=False)
    assert load_tokenizer(folder).chat(messages) == expected


BROKEN = [  # what stands there as a template, and words of the refusal
    ("{% for i in range(10**9) %}{% endfor %}", "OverflowError"),
    ("{{ 'x' * 10**15 }}", "MemoryError"),
    ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "RecursionError"),
    ("{{ ''.__class__.__mro__ }}", "SecurityError"),
    ("{% if %}", "TemplateSyntaxError"),
    ("{{ raise_exception('only\nfor tools') }}", "only for tools; try"),
    (5, "AttributeError"),
    (["x"], "TypeError"),
    ([{"name": "default"}], "KeyError: 'template'"),
    ([{"name": "rag", "template": "x"}], "KeyError: 'default'"),
]


@pytest.mark.parametrize(("template", "said"), BROKEN, ids=range(len(BROKEN)))
def test_what_a_chat_template_raises_is_one_line(save, template, said):
    """And the model works without it."""
    folder = save("words", {"chat_template": template})
    tokenizer = load_tokenizer(folder)
    with pytest.raises(UserError, match=re.escape(said)) as error:
        tokenizer.encode_prompt("the dog")
    file = folder / "tokenizer_config.json"
    assert f"{file}: the chat template fails: " in str(error.value)
    assert str(error.value).endswith("try --no-chat") and "\n" not in str(error.value)
    assert tokenizer.encode_prompt("the dog", chat=False) == [1, 2]


def test_a_template_file_that_is_not_utf8_and_no_template(save):
    folder = save("words", {"chat_template": None})
    assert load_tokenizer(folder).encode_prompt("the dog") == [1, 2]
    (folder / "chat_template.jinja").write_bytes(b"{# \xe9 #}x")
    with pytest.raises(UserError, match=r"template\.jinja: the chat template fails: UnicodeEnc"):
        load_tokenizer(folder).encode_prompt("the dog")
    assert load_tokenizer(folder).encode_prompt("the dog", chat=False) == [1, 2]
