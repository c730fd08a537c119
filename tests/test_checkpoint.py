"""Checkpoints that are not ours: the logits of transformers, or one line that says what is wrong.

Each case changes a good tiny checkpoint in one way. `...` in place of a value takes an entry out.
"""

import json
import math
import random
import re
import shutil
import warnings
from collections import OrderedDict
from contextlib import suppress

import pytest
import torch
from safetensors.torch import load_file, save_file

from support.command import UserError
from support.huggingface.checkpoint import find_checkpoint, load_model, read_config, read_json
from tests import helpers
from tests.helpers import save_checkpoint, tiny_model, tiny_tokens

torch.set_grad_enabled(False)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """kind -> a folder that transformers wrote, with random weights."""
    transformers = pytest.importorskip("transformers")
    root, torch_state = tmp_path_factory.mktemp("saved"), torch.get_rng_state()

    def save(kind):
        if not (root / kind).is_dir():
            config = getattr(transformers, f"{kind}Config")(
                vocab_size=61,
                hidden_size=32,
                intermediate_size=40,
                num_hidden_layers=2,
                num_attention_heads=8,
                num_key_value_heads=8,
                max_position_embeddings=256,
            )
            if kind == "Mistral":
                config.sliding_window = 6
            torch.manual_seed(1)
            model = getattr(transformers, f"{kind}ForCausalLM")(config)
            for name, parameter in model.named_parameters():
                parameter.normal_(1.0 if "norm" in name else 0.0, 0.4)
            model.save_pretrained(root / kind)
        return root / kind

    yield save
    torch.set_rng_state(torch_state)


@pytest.fixture
def llama(saved, tmp_path):
    """A copy of the Llama that transformers wrote."""
    return shutil.copytree(saved("Llama"), tmp_path / "llama")


@pytest.fixture
def tiny(tmp_path):
    """A Llama that the tests wrote, for what needs no transformers."""
    return save_checkpoint(tiny_model(), tmp_path)


def edit(folder, changes):
    file = folder / "config.json"
    entries = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({k: v for k, v in entries.items() if v is not ...}))


def assert_as_transformers(folder):
    """Our logits are theirs, all at once, from the same folder."""
    transformers = pytest.importorskip("transformers")
    model = load_model(folder)
    tokens = tiny_tokens(model, 1, 40)
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

FULL, SLIDING = "full_attention", "sliding_attention"
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
LLAMA3 = {**helpers.LLAMA3, "rope_theta": 500.0}


def without(entries, *names):
    return {name: value for name, value in entries.items() if name not in names}


TRAINED = "original_max_position_embeddings"
BY_HAND = {"type": "linear", "factor": 4.0}
THETA = {"rope_theta": 50.0}
MEANT = {  # changes to a good config, for each model that takes them
    "Llama": [
        {"sliding_window": 6},  # left over
        {"sliding_window": 6, "use_sliding_window": False},
        {"layer_types": [FULL] * 2, "sliding_window": 6},
        {"layer_types": ["attention"] * 2},  # the older word
        {"num_key_value_heads": ...},
        {"num_key_value_heads": None, "head_dim": None},
        {name: ... for name in ("head_dim", "rms_norm_eps", "hidden_act", "mlp_bias")},
        {"max_position_embeddings": ...},
        {"rms_norm_eps": 0.5},
        {"rms_norm_eps": 0.0},
        {"hidden_act": "swish"},
        {"pretraining_tp": 2, "attention_dropout": 0.5, "use_cache": False, "torch_dtype": "half"},
        {"architectures": ["LlamaForSequenceClassification"]},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}},
        {"rope_parameters": ..., "rope_theta": 50},
        {"rope_parameters": without(LINEAR, "rope_theta"), **THETA},
        {"rope_parameters": LINEAR | THETA, **THETA},
        {"rope_parameters": LINEAR | {"rope_theta": 7.0}, **THETA},  # inside counts
        {"rope_parameters": ..., "rope_theta": 0.5},
        {"rope_parameters": ...},
        {"rope_parameters": ..., "rope_scaling": {"type": "linear", "factor": 4}},
        {"rope_parameters": {"rope_type": "default"}, "rope_scaling": BY_HAND},
        {"rope_parameters": {"rope_type": "default", **THETA}, "rope_scaling": LLAMA3 | THETA},
        {"rope_parameters": LINEAR, "rope_scaling": BY_HAND},
        {"rope_parameters": LINEAR, "rope_scaling": {**LINEAR, "factor": 2.0}},  # the older counts
        {"rope_parameters": LINEAR | {"rope_theta": 7.0}, "rope_scaling": BY_HAND},
        {"rope_parameters": LINEAR, "rope_scaling": None},
        {"rope_parameters": LINEAR, "rope_scaling": {}},
        {"rope_parameters": LINEAR, "rope_scaling": False},
        {"rope_parameters": {**LINEAR, "type": "linear"}},
        {"rope_parameters": {**LINEAR, "type": "default"}},
        {"rope_parameters": ..., "rope_scaling": {"factor": 4.0}},  # but no type
        {"partial_rotary_factor": 1.0, "rope_parameters": {**LINEAR, "partial_rotary_factor": 1}},
        {"rope_parameters": LLAMA3},
        {"rope_parameters": LLAMA3, TRAINED: 200},  # beside counts
        {"rope_parameters": without(LLAMA3, TRAINED)},
    ],
    "Mistral": [
        {},
        {"sliding_window": 1},
        {"use_sliding_window": False},
        {"sliding_window": None},
        {"sliding_window": ...},
        {"layer_types": [FULL] * 2},
        {"layer_types": [SLIDING] * 2},
        {"layer_types": None},
        {"attention_bias": True, "mlp_bias": True},  # it has none
        {"attention_bias": None},
        {"num_key_value_heads": ...},
        {"rms_norm_eps": ...},
        {"rope_parameters": without(LLAMA3, TRAINED), TRAINED: 80},
    ],
}


@pytest.mark.parametrize(("kind", "changes"), [(k, c) for k in MEANT for c in MEANT[k]], ids=str)
def test_a_config_means_what_it_means_in_transformers(tmp_path, saved, kind, changes):
    folder = shutil.copytree(saved(kind), tmp_path / "model")
    edit(folder, changes)
    assert_as_transformers(folder)


def test_the_window_of_each_kind_of_model(tmp_path):
    """Also the default that is longer than any text here."""
    folder = save_checkpoint(tiny_model(num_key_value_heads=4), tmp_path)
    for changes, window, positions in (
        ({"sliding_window": 8}, None, 600),
        ({"max_position_embeddings": ...}, None, 2048),
        ({"model_type": "mistral"}, 8, 2048),
        ({"sliding_window": ...}, 4096, 131072),
        ({"layer_types": [SLIDING] * 2}, 4096, 131072),
        ({"layer_types": [FULL] * 2}, None, 131072),
        ({"layer_types": None}, 4096, 131072),
        ({"sliding_window": None}, None, 131072),
    ):
        edit(folder, changes)
        config = read_config(folder)
        assert config.sliding_window == window
        if changes.get("model_type") != "mistral":
            assert config.max_position_embeddings == positions


# ---------------------------------------------------------------- what a config cannot mean here

BIG = 10**12
BAD = {  # entries of a Llama's config.json, and values that the message must show
    "vocab_size": ["61", math.inf, 10**40],
    "hidden_size": [24.0, BIG],
    "num_key_value_heads": [True],
    "intermediate_size": [None],
    "num_hidden_layers": [[2] * 999, 0, BIG],
    "max_position_embeddings": [math.nan, 0],
    "rms_norm_eps": [-1e-5, math.nan, math.inf, "1e-5", None, True],
    "tie_word_embeddings": ["false", 1, None],
    "attention_bias": ["false"],
    "mlp_bias": [0],
    "rope_theta": [0, -1e4, math.nan, math.inf, 10**400, 1e-320, 1e-3, "10000", True, None],
    "eos_token_id": ["</s>", ["</s>"], [2, "3"], 2.0, True, [2, False], [[2]], {"id": 2}, [None]],
    "sliding_window": ["eight"],
}
BAD_IN_ROPE = {  # numbers of RoPE's scaling
    "linear": {"factor": [None, "4", 0.5, 0, -2, True, math.nan, math.inf, [4.0], ...]},
    "llama3": {
        "factor": ["8", ...],
        "low_freq_factor": [4.0, 9.0, 0, ...],
        "high_freq_factor": [None, ...],
        "original_max_position_embeddings": [None, -40],
    },
}
REFUSED = [  # changes to a Llama's config.json, and words of the refusal
    ({"model_type": "mistral", "layer_types": [FULL, SLIDING]}, "layer_types"),
    ({"layer_types": [SLIDING] * 2, "sliding_window": 8}, "layer_types"),
    (
        {"model_type": "mistral", "layer_types": [SLIDING] * 2, "sliding_window": None},
        "layer_types",
    ),
    ({"layer_types": [FULL]}, "layer_types"),
    ({"layer_types": FULL}, "layer_types"),
    ({"layer_types": [{}, []]}, "layer_types"),
    ({"attention_chunk_size": 8}, "attention_chunk_size"),
    ({"is_causal": False}, "is_causal"),
    ({"per_layer_config": {"1": {"rms_norm_eps": 0.1}}}, "per_layer_config"),
    ({"transformers_weights": "other.safetensors"}, "transformers_weights"),
    ({"configuration_files": ["config.4.json"]}, "configuration_files"),
    ({"quantization_config": {}}, "quantized"),
    ({"hidden_act": None}, "hidden_act None"),
    ({"hidden_act": ["silu"]}, "hidden_act"),
    ({"model_type": ["llama"]}, "model_type"),
    ({"head_dim": 2**23}, "query heads of dimension"),
    ({"num_attention_heads": 48, "head_dim": ...}, "head_dim is 0"),
    ({"num_attention_heads": 10}, "10 query heads"),
    ({"head_dim": 7}, "of dimension 7"),
    ({"model_type": "mistral", "num_key_value_heads": ...}, "4 query heads on 8"),
    ({"model_type": "mistral", "num_key_value_heads": None}, "4 query heads on 8"),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": None}}, "rope_theta is None"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor of 0.5"),
    ({"rope_scaling": {**LINEAR, "partial_rotary_factor": 0.25}}, "partial_rotary_factor of 0.25"),
    ({"rope_parameters": {FULL: LINEAR}}, "RoPE that differs between layers"),
    ({"rope_parameters": []}, "RoPE scaling []"),
    ({"rope_scaling": {"rope_type": None, "factor": 2.0}}, "RoPE scaling None"),
    ({"rope_scaling": {"type": ["linear"], "factor": 2.0}}, "['linear']"),
]
for entry, values in BAD.items():
    REFUSED += [({entry: value}, f"{entry} is {value!r:.80}") for value in values]
for window in (-4, 0, False, True, 8.0):
    changes = {"model_type": "mistral", "sliding_window": window}
    REFUSED.append((changes, f"sliding_window is {window}"))
for kind in ("dynamic", "yarn", "longrope", "su", "mrope", "proportional"):
    REFUSED.append(({"rope_scaling": {"rope_type": kind, "factor": 2.0}}, kind))
for kind, entries in BAD_IN_ROPE.items():
    for entry, values in entries.items():
        for value in values:
            rope = {**LLAMA3, "rope_type": kind, entry: value}
            rope = {k: v for k, v in rope.items() if v is not ...}
            changes = {"rope_theta": ..., "rope_parameters": rope}
            REFUSED.append((changes, f"{entry} is {rope.get(entry)!r}"))


@pytest.mark.parametrize(("changes", "words"), REFUSED)
def test_what_a_config_cannot_mean_is_refused(tiny, changes, words):
    edit(tiny, changes)
    message = refusal(read_config, tiny)
    assert words in message and str(tiny / "config.json") in message


ENDS = [  # of config.json, of generation_config.json (... where there is none), what ends a text
    (..., ..., ()),
    (None, ..., ()),
    (2, ..., (2,)),
    ([2, 5], ..., (2, 5)),
    (2, 5, (5,)),  # only the second file counts
    (2, None, ()),
    ([-1, 5000], ..., (-1, 5000)),  # never met
]


@pytest.mark.parametrize(("first", "second", "expected"), ENDS)
def test_ends_of_a_text(tiny, first, second, expected):
    edit(tiny, {"eos_token_id": first})
    if second is not ...:
        (tiny / "generation_config.json").write_text(json.dumps({"eos_token_id": second}))
    assert read_config(tiny).eos_token_ids == expected


@pytest.mark.parametrize("end", ["</s>", 2.0, [True], "2"])
def test_ends_that_are_no_tokens_are_found_in_the_second_file(tiny, end):
    file = tiny / "generation_config.json"
    file.write_text(json.dumps({"eos_token_id": end}))
    assert f"{file} has a bad value: eos_token_id is" in refusal(read_config, tiny)


def test_a_byte_order_mark_is_no_harm(tiny):
    expected, file = read_config(tiny), tiny / "config.json"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert read_config(tiny) == expected


NO_JSON = [b'{"a": ' + b"[" * 200_000, b'{"a": ' * 200_000, b'{"a": 1' + b"0" * 5000 + b"}"]
NO_JSON += ['{"a": "é"}'.encode("latin-1"), '{"a": 1}'.encode("utf-16"), b'{"a": 1} {"b": 2}']
NO_JSON += [b"", b"NaN"]


@pytest.mark.parametrize("data", NO_JSON, ids=range(len(NO_JSON)))
def test_what_is_no_json_is_one_line(tmp_path, data):
    file = tmp_path / "config.json"
    file.write_bytes(data)
    assert "cannot be read as JSON" in refusal(read_json, file)


# -------------------------------------------------------------------------------------- weights

EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
BIN = "pytorch_model.bin"


def own_output(weights):
    return {**weights, OUTPUT: weights[EMBEDDING].flip(0)}


def rewrite(folder, change, write=None):
    """Replaces the weights of a folder by what `change` makes of them."""
    file = folder / "model.safetensors"
    weights = change(load_file(file))
    file.unlink()
    if write is None:
        save_file({k: v.contiguous() for k, v in weights.items()}, file, {"format": "pt"})
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
def test_the_file_says_what_is_tied(llama, change, shared):
    edit(llama, {"tie_word_embeddings": True})
    rewrite(llama, change)
    assert_as_transformers(llama)
    model = load_model(llama)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == shared
    assert model.config.tie_word_embeddings == shared


def test_a_config_without_the_entry_is_not_tied(llama):
    edit(llama, {"tie_word_embeddings": ...})
    rewrite(llama, own_output)
    assert_as_transformers(llama)
    rewrite(llama, lambda w: without(w, OUTPUT))
    assert "weight lm_head.weight is missing" in refusal(load_model, llama)


def test_a_tied_config_without_either_is_refused(tmp_path):
    folder = save_checkpoint(tiny_model(tie_word_embeddings=True), tmp_path)
    rewrite(folder, lambda w: without(w, EMBEDDING))
    assert "is missing (2 in all)" in refusal(load_model, folder)


def save_old(weights, file):
    torch.save(weights, file, _use_new_zipfile_serialization=False)


def save_parameters(weights, file):
    torch.save(OrderedDict((k, torch.nn.Parameter(v)) for k, v in weights.items()), file)


def save_old_parameters(weights, file):
    save_old({k: torch.nn.Parameter(v) for k, v in weights.items()}, file)


@pytest.mark.parametrize("write", [save_old, save_parameters, save_old_parameters])
@pytest.mark.parametrize("grad", [False, True])
def test_bin_files_of_any_age(llama, write, grad):
    """The format until PyTorch 1.5 too, which cannot be mapped into memory."""
    rewrite(llama, lambda w: w, write)
    assert_as_transformers(llama)
    with torch.set_grad_enabled(grad):
        model = load_model(llama, dtype=torch.bfloat16)
    assert all(p.is_leaf and not p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(("write", "mapped"), [(torch.save, True), (save_old, False)])
def test_a_bin_is_mapped_where_it_can_be(tiny, monkeypatch, write, mapped):
    """Or the file is in memory a second time while it is read."""
    rewrite(tiny, lambda w: w, write)
    asked, load = [], torch.load

    def watched(file, mmap, weights_only, **others):
        asked.append((mmap, weights_only))
        return load(file, mmap=mmap, weights_only=weights_only, **others)

    monkeypatch.setattr(torch, "load", watched)
    load_model(tiny)
    assert asked == [(mapped, True)]


def test_a_shard_of_each_age(llama):
    weights = list(load_file(llama / "model.safetensors").items())
    (llama / "model.safetensors").unlink()
    torch.save(dict(weights[::2]), llama / "a.bin")
    save_old(dict(weights[1::2]), llama / "b.bin")
    weight_map = {name: "ab"[i % 2] + ".bin" for i, (name, _) in enumerate(weights)}
    index = {"metadata": {}, "weight_map": weight_map}
    (llama / f"{BIN}.index.json").write_text(json.dumps(index))
    assert_as_transformers(llama)


@pytest.mark.parametrize("write", [save_old, torch.save])
def test_a_truncated_bin_is_damaged(tmp_path, write):
    """Cut anywhere; to nothing, too."""
    folder = save_checkpoint(tiny_model(num_hidden_layers=1), tmp_path)
    rewrite(folder, lambda w: w, write)
    data = (folder / BIN).read_bytes()
    for length in {0, 1, 3, 5, 20, len(data) - 1, *range(0, len(data), 1 + len(data) // 30)}:
        (folder / BIN).write_bytes(data[:length])
        assert f"{BIN} is damaged" in refusal(load_model, folder), length


def test_a_flipped_byte_is_no_traceback(tmp_path):
    """In the pickle; what is flipped in a weight cannot be seen."""
    folder = save_checkpoint(tiny_model(num_hidden_layers=1), tmp_path)
    rewrite(folder, lambda w: w, save_old)
    data, draw = bytearray((folder / BIN).read_bytes()), random.Random(0)
    for _ in range(100):
        flipped = data.copy()
        flipped[draw.randrange(1500)] = draw.randrange(256)
        (folder / BIN).write_bytes(flipped)
        with suppress(UserError), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            load_model(folder)


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
UNFIT_IN = [(torch.save, *case) for case in UNFIT]
UNFIT_IN += [(save_old, *case) for case in UNFIT[:-1]]  # PyTorch's old format has nothing sparse


@pytest.mark.parametrize(("write", "change", "words"), UNFIT_IN)
def test_what_is_no_weights_of_this_model_is_refused(tiny, write, change, words):
    rewrite(tiny, change, write)
    assert words in refusal(load_model, tiny)


def test_an_adapter_beside_the_weights_is_refused(tiny):
    """transformers, with peft, applies it to them."""
    (tiny / "adapter_config.json").write_text("{}")
    assert "merge it into the weights, or move it away" in refusal(load_model, tiny)


@pytest.mark.parametrize("tied", [False, True])
def test_a_second_output_matrix_has_to_fit_too(tmp_path, tied):
    folder = save_checkpoint(tiny_model(tie_word_embeddings=tied), tmp_path)
    rewrite(folder, lambda w: {**w, OUTPUT: torch.ones(9, 24)})
    assert "'lm_head.weight' has shape (9, 24)" in refusal(load_model, folder)


# -------------------------------------------------------------------------------------- indices

NO_MAP = [{}, None, [], ["a.safetensors"], "a.safetensors", 3]
NO_FILE = [7, None, 1.5, True, ["model.safetensors"], {"file": "a"}, ".", "/etc/hostname"]
NO_FILE += ["../other/model.safetensors", "shards/model.safetensors"]
NOT_THERE = ["none.bin", "a\x00b", "x" * 300, "\ud800.bin", "folder", "\n", "", "..", "a\\b"]
INDICES = [({}, r"index\.json has no weight_map")]
INDICES += [({"weight_map": value}, r"index\.json has no weight_map") for value in NO_MAP]
for name in NO_FILE:
    words = rf"index\.json names a shard {re.escape(repr(name))}"
    INDICES.append(({"weight_map": {OUTPUT: name}}, words))
INDICES += [({"weight_map": {OUTPUT: name}}, "is missing|is damaged") for name in NOT_THERE]


@pytest.mark.parametrize("kind", ["model.safetensors", BIN])
@pytest.mark.parametrize(("index", "words"), INDICES, ids=range(len(INDICES)))
def test_an_index_names_files_beside_it(tiny, kind, index, words):
    (tiny / "model.safetensors").unlink()
    (tiny / "folder").mkdir()
    (tiny / f"{kind}.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=words):
        load_model(tiny)


# --------------------------------------------------------------------- names of folders and the hub


def test_a_cached_model_beside_a_folder_of_the_organisation(tmp_path, monkeypatch):
    """It was refused with the advice to give a name such as org/name, which it was."""
    from huggingface_hub import constants

    saved = tmp_path / "hub" / "models--org--name"
    snapshot = save_checkpoint(tiny_model(), saved / "snapshots" / ("0" * 40))
    (saved / "refs").mkdir()
    (saved / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    assert find_checkpoint("org/name") == snapshot
    (tmp_path / "org" / "name").mkdir()
    assert str(find_checkpoint("org/name")) == "org/name"


def test_a_missing_path_that_looks_like_a_hub_name_is_not_asked_for(tmp_path, monkeypatch):
    import huggingface_hub

    def fetch(name, allow_patterns, local_files_only):
        assert local_files_only
        raise OSError("not in the cache")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    with pytest.raises(UserError, match=r"correct the path, or start in another folder$"):
        find_checkpoint("org/name")


@pytest.mark.parametrize("path", ["./name", "../name", "/name", "org/", "name", "a/b/c"])
def test_no_hub_is_asked_for_what_is_a_path(monkeypatch, path):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    with pytest.raises(UserError, match=r"give one, or a hub name such as org/name$"):
        find_checkpoint(path)
