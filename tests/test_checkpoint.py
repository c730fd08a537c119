"""Checkpoints that are not ours: the logits of transformers, or one line that says what is wrong.

Each case changes a good tiny checkpoint in one way. `...` in place of a value takes an entry out.
"""

import json
import math
import random
import warnings
from contextlib import suppress

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from model import Rope
from support.command import UserError
from support.huggingface.checkpoint import find_checkpoint, load_model, read_config, read_json
from tests import helpers
from tests.helpers import save_checkpoint, tiny_model, tiny_tokens

torch.set_grad_enabled(False)


@pytest.fixture
def tiny(tmp_path):
    """A Llama that the tests wrote, for what needs no transformers."""
    return save_checkpoint(tiny_model(), tmp_path)


def without(entries, *names):
    return {name: value for name, value in entries.items() if name not in names}


def edit(folder, changes):
    file = folder / "config.json"
    removed = [name for name, value in changes.items() if value is ...]
    entries = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps(without(entries, *removed)))


def assert_as_transformers(folder):
    """Our logits are theirs, all at once, from the same folder."""
    transformers = pytest.importorskip("transformers")
    model = load_model(folder)
    tokens = tiny_tokens(model, 2, 40)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.testing.assert_close(model(tokens), loaded(tokens).logits, atol=2e-4, rtol=1e-4)


def refusal(read, path):
    """The one line that `read` raises."""
    with pytest.raises(UserError) as caught:
        read(path)
    message = str(caught.value)
    assert "\n" not in message and str(path) in message and len(message) < 500 + len(str(path))
    return message


# ------------------------------------------------------------------------ what a config means

TRAINED = "original_max_position_embeddings"
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
LLAMA3 = {**helpers.LLAMA3, "rope_theta": 500.0}
FULL, SLIDING = "full_attention", "sliding_attention"
MEANT = {  # changes to a good config, for each model that takes them
    "Llama": [
        {"sliding_window": 6, "num_key_value_heads": ..., "rms_norm_eps": 0.5},  # none: left over
        {"sliding_window": 6, "use_sliding_window": False, "rms_norm_eps": 0.0},
        {"layer_types": [FULL] * 2, "sliding_window": 6, "hidden_act": "swish"},
        {"layer_types": ["attention"] * 2, "num_key_value_heads": None, "head_dim": None},
        {name: ... for name in ("head_dim", "rms_norm_eps", "hidden_act", "mlp_bias")},
        {"pretraining_tp": 2, "attention_dropout": 0.5, "use_cache": False, "torch_dtype": "half"},
        {"max_position_embeddings": ..., "architectures": ["LlamaForSequenceClassification"]},
    ],
    "Mistral": [
        {"sliding_window": 1, "num_key_value_heads": ...},
        {"use_sliding_window": False, "rms_norm_eps": ...},
        {"sliding_window": None, "attention_bias": True, "mlp_bias": True},  # it has none
        {"sliding_window": ..., "attention_bias": None},
        {"layer_types": [FULL] * 2},
        {"layer_types": [SLIDING] * 2},
        {"layer_types": None, "rope_parameters": without(LLAMA3, TRAINED), TRAINED: 80},
    ],
}


@pytest.mark.parametrize(("kind", "changes"), [(k, c) for k in MEANT for c in MEANT[k]], ids=str)
def test_a_config_means_what_it_means_in_transformers(tmp_path, kind, changes):
    sizes = {"hidden_size": 32, "head_dim": 4, "num_attention_heads": 8, "num_key_value_heads": 8}
    entries = {"model_type": kind.lower(), "sliding_window": 6 if kind == "Mistral" else None}
    folder = save_checkpoint(tiny_model(**sizes), tmp_path, **entries)
    edit(folder, changes)
    assert_as_transformers(folder)


SHAPES = [
    ("Llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 12}),
    ("Llama", {"tie_word_embeddings": True, "rope_scaling": LLAMA3}),
    ("Mistral", {"sliding_window": 7}),
]


@pytest.mark.parametrize(("kind", "changes"), SHAPES, ids=str)
def test_checkpoints_that_transformers_wrote(tmp_path, kind, changes):
    """In shards, with grouped queries."""
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48}
    heads = {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = getattr(transformers, f"{kind}Config")(**sizes, **heads, **changes)
    theirs = getattr(transformers, f"{kind}ForCausalLM")(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in theirs.parameters():
        parameter.normal_(0, 0.3, generator=generator)
    theirs.save_pretrained(tmp_path, max_shard_size="20kB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert_as_transformers(tmp_path)


BY_HAND = {"type": "linear", "factor": 4}
ROPES = [..., None, {}, {"factor": 4.0}, BY_HAND, LINEAR, without(LINEAR, "rope_theta")]
ROPES += [{"rope_type": "default"}, {"rope_type": "default", "rope_theta": 50.0}, LLAMA3]
ROPES += [{**LINEAR, "type": "linear"}, {**LINEAR, "type": "default"}, without(LLAMA3, TRAINED)]
ROPES += [{**LINEAR, "rope_theta": 7.0, "factor": 0.5, "partial_rotary_factor": 1}]
DRAWN = {
    "rope_parameters": ROPES,
    "rope_scaling": [*ROPES, False],
    "rope_theta": [..., 50, 0.5],
    TRAINED: [..., 200],
    "partial_rotary_factor": [..., 1.0],
    "max_position_embeddings": [..., 80],
}


def test_every_way_to_write_rope_as_in_transformers(tiny):
    """Frequencies to the last bit, of entries in one dict, in the other, and beside them."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    draw = random.Random(0)
    for _ in range(150):
        changes = {name: draw.choice(values) for name, values in DRAWN.items()}
        edit(tiny, changes)
        theirs = LlamaRotaryEmbedding(transformers.LlamaConfig.from_pretrained(tiny))
        assert theirs.attention_scaling == 1
        assert torch.equal(Rope(read_config(tiny)).frequencies, theirs.inv_freq), changes


def test_defaults_that_are_longer_than_any_text_here(tiny):
    edit(tiny, {"num_key_value_heads": 4, "max_position_embeddings": ..., "sliding_window": ...})
    for changes, window, positions in (
        ({}, None, 2048),
        ({"model_type": "mistral"}, 4096, 131072),
        ({"layer_types": [SLIDING] * 2}, 4096, 131072),
    ):
        edit(tiny, changes)
        config = read_config(tiny)
        assert (config.sliding_window, config.max_position_embeddings) == (window, positions)


# ---------------------------------------------------------------- what a config cannot mean here

POOL = [None, "61", 2.0, math.nan, math.inf, 0, -4, 10**40, True, [2], [2, "3"], [{"id": 2}]]
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
SIZES += ("num_attention_heads",)
DEFAULTS = ("num_key_value_heads", "head_dim", "max_position_embeddings")
IN_ROPE = ("factor", "low_freq_factor", "high_freq_factor", TRAINED)
FLAGS = ("tie_word_embeddings", "attention_bias", "mlp_bias")
TAKEN = dict.fromkeys(SIZES, ()) | dict.fromkeys(DEFAULTS, (None,))  # what may be meant
TAKEN |= dict.fromkeys((*IN_ROPE, "rms_norm_eps", "rope_theta"), (2.0,))
TAKEN |= dict.fromkeys(FLAGS, (True,))
TAKEN |= {"sliding_window": (None, 10**40), "eos_token_id": (None, 0, -4, 10**40, [2])}


def test_values_that_an_entry_cannot_have(tiny):
    good = (tiny / "config.json").read_text()
    for entry, taken in TAKEN.items():
        for value in POOL:
            (tiny / "config.json").write_text(good)
            changes = {entry: value}
            if entry in IN_ROPE:
                changes = {"rope_parameters": LLAMA3 | changes}
            edit(tiny, changes)
            if repr(value) in map(repr, taken):
                read_config(tiny)
            else:
                assert f"{entry} is {value!r:.80}" in refusal(read_config, tiny)


MISTRAL = {"model_type": "mistral"}
REFUSED = [  # changes to a Llama's config.json, and words of the refusal
    ({**MISTRAL, "layer_types": [FULL, SLIDING]}, "layer_types"),
    ({**MISTRAL, "layer_types": [SLIDING] * 2, "sliding_window": None}, "layer_types"),
    ({"layer_types": [SLIDING] * 2, "sliding_window": 8}, "layer_types"),
    ({"head_dim": 2**23}, "4 query heads on 2 key/value heads of dimension 8388608"),
    ({"num_attention_heads": 48, "head_dim": ...}, "head_dim is 0"),
    ({"num_attention_heads": 0, "head_dim": None}, "num_attention_heads is 0"),
    ({"num_attention_heads": 10}, "10 query heads"),
    ({"head_dim": 7}, "of dimension 7"),
    ({**MISTRAL, "num_key_value_heads": ...}, "4 query heads on 8"),
    ({**MISTRAL, "num_key_value_heads": None}, "4 query heads on 8"),
    ({"rope_theta": 1e-3}, "rope_theta is 0.001, not a number from 0.1"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": None}}, "rope_theta is None"),
    ({"rope_parameters": {"rope_type": "linear"}}, "factor is None"),
    ({"rope_parameters": {**LLAMA3, "low_freq_factor": 4.0}}, "not below the high_freq_factor 4.0"),
    ({"rope_parameters": {FULL: LINEAR}}, "RoPE that differs between layers"),
    ({"rope_parameters": [LINEAR]}, "RoPE scaling [{"),
    ({"rope_scaling": {"type": ["linear"], "factor": 2.0}}, "['linear']"),
    ({"rope_scaling": {**LINEAR, "partial_rotary_factor": 0.25}}, "partial_rotary_factor of 0.25"),
]
for kind in (None, "dynamic", "yarn", "longrope", "su", "mrope", "proportional"):
    REFUSED.append(
        ({"rope_scaling": {"rope_type": kind, "factor": 2.0}}, f"scaling {kind!r} is not")
    )
for entry, values in {
    "model_type": ["mamba", None, ["llama"]],
    "hidden_act": [None, "gelu", ["silu"]],
    "layer_types": [[FULL], FULL, [{}, []]],
    "attention_chunk_size": [8],
    "is_causal": [False],
    "quantization_config": [{}, {"bits": 4}],
    "per_layer_config": [{"1": {"rms_norm_eps": 0.1}}],
    "transformers_weights": ["other.safetensors"],
    "configuration_files": [["config.4.json"]],
    "partial_rotary_factor": [0.5],
}.items():
    REFUSED += [({entry: value}, entry) for value in values]


@pytest.mark.parametrize(("changes", "words"), REFUSED)
def test_what_a_config_cannot_mean_is_refused(tiny, changes, words):
    edit(tiny, changes)
    assert words in refusal(read_config, tiny)


ENDS = [  # of config.json, of generation_config.json (... where there is none), what ends a text
    (..., ..., ()),
    (2, ..., (2,)),
    ([2, 5], ..., (2, 5)),
    (2, 5, (5,)),  # only the second file counts
    (2, None, ()),
]


@pytest.mark.parametrize(("first", "second", "expected"), ENDS)
def test_ends_of_a_text(tiny, first, second, expected):
    edit(tiny, {"eos_token_id": first})
    if second is not ...:
        entries = json.dumps({"eos_token_id": second})
        (tiny / "generation_config.json").write_text(entries)
    assert read_config(tiny).eos_token_ids == expected


NO_JSON = [b'{"a": ' + b"[" * 200_000, b'{"a": 1' + b"0" * 5000 + b"}", b'{"a": 1} {"b": 2}']
NO_JSON += ['{"a": "é"}'.encode("latin-1"), '{"a": 1}'.encode("utf-16"), b"", b"NaN"]


@pytest.mark.parametrize("data", NO_JSON, ids=range(len(NO_JSON)))
def test_what_is_no_json_is_one_line(tmp_path, data):
    file = tmp_path / "config.json"
    file.write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(file) == {"a": 1}
    file.write_bytes(data)
    assert "cannot be read as JSON" in refusal(read_json, file)


# -------------------------------------------------------------------------------------- weights

EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
BIN = "pytorch_model.bin"


def unchanged(weights):
    return weights


def own_output(weights):
    return {**weights, OUTPUT: weights[EMBEDDING].flip(0)}


def parameters(weights):
    return {name: torch.nn.Parameter(weight) for name, weight in weights.items()}


def save_old(weights, file):
    """In the format of .bin until PyTorch 1.5, which cannot be mapped into memory."""
    torch.save(weights, file, _use_new_zipfile_serialization=False)


def rewrite(folder, change, write=None):
    """Replaces the weights of a folder by what `change` makes of them."""
    file = folder / "model.safetensors"
    weights = change(load_file(file))
    file.unlink()
    if write is None:
        contiguous = {name: weight.contiguous() for name, weight in weights.items()}
        save_file(contiguous, file, {"format": "pt"})
    else:
        write(weights, folder / BIN)


TIED = [  # what the file of a tied config holds, and whether one matrix is the other
    (lambda w: without(w, OUTPUT), True),
    (lambda w: {**without(w, EMBEDDING), OUTPUT: w[EMBEDDING]}, True),
    (lambda w: {**w, OUTPUT: w[EMBEDDING].clone()}, True),
    (own_output, False),
    (lambda w: {**w, OUTPUT: w[EMBEDDING].index_fill(0, torch.tensor([60]), 0.5)}, False),
    (lambda w: {**w, OUTPUT: w[EMBEDDING].half()}, False),
]


@pytest.mark.parametrize(("change", "shared"), TIED)
def test_the_file_says_what_is_tied(tiny, change, shared):
    edit(tiny, {"tie_word_embeddings": True})
    rewrite(tiny, change)
    assert_as_transformers(tiny)
    model = load_model(tiny)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == shared
    assert model.config.tie_word_embeddings == shared


def test_matrices_that_are_missing_or_do_not_fit(tiny):
    edit(tiny, {"tie_word_embeddings": ...})  # then it is not tied
    rewrite(tiny, own_output)
    assert_as_transformers(tiny)
    rewrite(tiny, lambda w: without(w, OUTPUT))
    assert "weight lm_head.weight is missing (1 in all)" in refusal(load_model, tiny)
    edit(tiny, {"tie_word_embeddings": True})
    rewrite(tiny, lambda w: {**w, OUTPUT: torch.ones(9, 24)})
    assert "'lm_head.weight' has shape (9, 24)" in refusal(load_model, tiny)
    rewrite(tiny, lambda w: without(w, EMBEDDING, OUTPUT))
    assert "is missing (2 in all)" in refusal(load_model, tiny)


def save_shards(weights, file):
    """One shard of each age, and their index."""
    weight_map = {name: "ab"[i % 2] + ".bin" for i, name in enumerate(weights)}
    for shard, write in (("a.bin", torch.save), ("b.bin", save_old)):
        part = {name: weights[name] for name in weights if weight_map[name] == shard}
        write(part, file.with_name(shard))
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    file.with_name(f"{BIN}.index.json").write_text(index)


WRITES = {torch.save: [True], save_old: [False], save_shards: [True, False]}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("change", [unchanged, parameters])
def test_bin_files_of_any_age(tiny, monkeypatch, change, write):
    """Mapped where it can be: or the file is in memory a second time while it is read."""
    rewrite(tiny, change, write)
    assert_as_transformers(tiny)
    asked, load = [], torch.load

    def watched(file, mmap, weights_only, **others):
        asked.append(mmap)
        assert weights_only
        return load(file, mmap=mmap, weights_only=True, **others)

    monkeypatch.setattr(torch, "load", watched)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            model = load_model(tiny, dtype=torch.bfloat16)
        assert all(p.is_leaf and not p.requires_grad for p in model.parameters())
    assert asked == WRITES[write] * 2


@pytest.mark.parametrize("write", [save_old, torch.save])
def test_a_damaged_bin_is_one_line(tmp_path, write):
    """Cut anywhere, to nothing too. What is flipped in a weight cannot be seen, in the pickle it is
    no traceback."""
    folder = save_checkpoint(tiny_model(num_hidden_layers=1), tmp_path)
    rewrite(folder, unchanged, write)
    data, draw = bytearray((folder / BIN).read_bytes()), random.Random(0)
    for length in {0, 1, 3, 5, 20, len(data) - 1, *range(0, len(data), 1 + len(data) // 30)}:
        (folder / BIN).write_bytes(data[:length])
        assert f"{BIN} is damaged" in refusal(load_model, folder), length
    flips = [(draw.randrange(1500), draw.randrange(256)) for _ in range(50)]
    for place, value in [(1, 5), *flips]:  # the first one: of another protocol, which is warned of
        flipped = data.copy()
        flipped[place] = value
        (folder / BIN).write_bytes(flipped)
        with suppress(UserError), warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            load_model(folder)
        assert not said


BIAS = "model.layers.0.self_attn.q_proj.bias"
UNFIT = [  # what a .bin holds instead of weights, and words of the refusal
    (lambda w: {"state_dict": w, "epoch": 3}, "'state_dict' is no weight"),
    (lambda w: {**w, "epoch": 3}, "'epoch' is no weight"),
    (lambda w: {**w, EMBEDDING: 3}, "'model.embed_tokens.weight' is no weight"),
    (lambda w: {**w, 3: torch.ones(2)}, "3 is no weight"),
    (lambda w: tuple(w.values()), "is damaged, or holds more than weights"),
    (lambda w: w[EMBEDDING], "is damaged, or holds more than weights"),
    (lambda w: {}, "is missing"),
    (lambda w: {f"module.{k}": v for k, v in w.items()}, "'module.lm_head"),
    (lambda w: {k.removeprefix("model."): v for k, v in w.items()}, "'embed_tokens.weight' is no"),
    (lambda w: {**without(w, OUTPUT), "score.weight": torch.ones(2, 24)}, "'score.weight' is no"),
    (lambda w: {**w, BIAS: torch.ones(24)}, "q_proj.bias"),
    (lambda w: {**w, EMBEDDING: w[EMBEDDING].to(torch.int8)}, "torch.int8"),
    (lambda w: {**w, EMBEDDING: w[EMBEDDING].to(torch.complex64)}, "complex64"),
    (lambda w: {**w, EMBEDDING: w[EMBEDDING].to("meta")}, "on meta"),
    (lambda w: {**w, OUTPUT: w[OUTPUT][:9]}, "'lm_head.weight' has shape (9, 24)"),
    (lambda w: {**w, EMBEDDING: w[EMBEDDING].to_sparse()}, "torch.sparse_coo"),
]


@pytest.mark.parametrize(("change", "words"), UNFIT)
def test_what_is_no_weights_of_this_model_is_refused(tiny, change, words):
    rewrite(tiny, change, torch.save)
    assert words in refusal(load_model, tiny)


def test_an_adapter_beside_the_weights_is_refused(tiny):
    """transformers, with peft, applies it to them."""
    (tiny / "adapter_config.json").write_text("{}")
    assert "merge it into the weights, or move it away" in refusal(load_model, tiny)


NO_MAP = [{}, None, [], ["a.safetensors"], "a.safetensors", 3]
NO_FILE = [7, None, 1.5, True, ["model.safetensors"], {"file": "a"}, ".", "/etc/hostname"]
NO_FILE += ["../other/model.safetensors", "shards/model.safetensors"]
NOT_THERE = ["none.bin", "a\x00b", "x" * 300, "\ud800.bin", "folder", "\n", "", "..", "a\\b"]
INDICES = [(value, r"index\.json has no weight_map of files beside it") for value in NO_MAP]
INDICES += [({OUTPUT: name}, INDICES[0][1]) for name in NO_FILE]
INDICES += [({OUTPUT: name}, "is missing|is damaged") for name in NOT_THERE]


@pytest.mark.parametrize("kind", ["model.safetensors", BIN])
@pytest.mark.parametrize(("weight_map", "words"), INDICES, ids=range(len(INDICES)))
def test_an_index_names_files_beside_it(tiny, kind, weight_map, words):
    (tiny / "model.safetensors").unlink()
    (tiny / "folder").mkdir()
    (tiny / f"{kind}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError, match=words):
        load_model(tiny)


# --------------------------------------------------------------------- names of folders and the hub


@pytest.mark.parametrize("there", [False, True])
def test_a_hub_name_is_fetched(tiny, monkeypatch, there):
    """Safetensors first; the .bin files only where there are no others. Frequencies of RoPE in
    these, as in LongChat's, do not count: the config gives them. What looks like a hub name, but
    is in a folder that is here, is only looked for among what the hub gave before."""
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    rewrite(tiny, lambda w: w | frequencies, torch.save)
    monkeypatch.chdir(tiny)
    said = r"the hub did not give that repository: cannot reach it$"
    if there:
        (tiny / "org").mkdir()
        said = r"correct the path, or start in another folder$"
    asked = []

    def fetch(name, allow_patterns, local_files_only):
        asked.append((name, allow_patterns[-1], local_files_only))
        if len(asked) > 2:
            raise OSError("cannot reach it\nand more")
        return str(tiny)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    tokens = tiny_tokens(tiny_model(), 1, 5)
    assert torch.equal(load_model("org/name")(tokens), tiny_model()(tokens))
    patterns = ("model*.safetensors", "pytorch_model*.bin")
    assert asked == [("org/name", pattern, there) for pattern in patterns]
    with pytest.raises(UserError, match=said):
        load_model("org/name")
    (tiny / "org" / "name").mkdir(parents=True)
    assert str(find_checkpoint("org/name")) == "org/name"


@pytest.mark.parametrize("path", ["./name", "../name", "/name", "org/", "name", "a/b/c"])
def test_no_hub_is_asked_for_what_is_a_path(monkeypatch, path):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    with pytest.raises(UserError, match=r"give one, or a hub name such as org/name$"):
        find_checkpoint(path)
