"""Configurations that say the same otherwise, or more: rotary positions, biases, tied heads, shared heads."""

import json
import re
from functools import partial

import pytest
import torch

from dlm import load_model
from dlm.commands.inspect import describe
from dlm.errors import CheckpointError, ConfigError
from dlm.families.dit import DiTConfig
from tests.dlm.families import plain
from tests.dlm.families.layouts import HEADS, KV, LAYERS, LAYOUTS, D, Layout, V, noise, qwen2_shapes
from tests.dlm.families.test_public import difference, some_rows

ROTARY = ("dream", "a2d", "a2d-bd3lm", "sdar", "fast-dllm-v2", "diffullama")
YARN = {"factor": 4.0, "original_max_position_embeddings": 64}


def read(layout, folder, base, **changes):
    """Model of a layout with other fields; None for a field that is left out, "null" for one that is null."""
    layout.public = {name: x for name, x in {**layout.public, **changes}.items() if x is not None}
    layout.public = {name: None if x == "null" else x for name, x in layout.public.items()}
    return load_model(layout.write(folder, base), device="cpu", dtype="float32")[0]


@torch.no_grad()
def worst(model, layout):
    """Greatest difference of logits over three rows."""
    return max(difference(model, model(row[None]).logits[0], layout.forward(row)) for row in some_rows(model))


def spelled(theta, scaling, form):
    """Rotary positions in a form of config.json: of transformers 4, of 5, and as 5 writes a class of 4."""
    older = {"rope_theta": theta, "rope_scaling": {"type": scaling["rope_type"], **scaling}}
    newer = {"rope_scaling": None, "rope_parameters": {"rope_theta": theta, **scaling}}
    nested = {"full_attention": newer["rope_parameters"]}
    return {
        "older": older,
        "newer": {**newer, "rope_theta": None},
        "nested": {**newer, "rope_theta": None, "rope_parameters": nested},
        "mixed": {**newer, "rope_theta": 77.0},
    }[form]


@pytest.mark.parametrize("name", [*ROTARY, "llada", "llada-moe"])
@pytest.mark.parametrize("form", ["newer", "mixed"])
def test_the_base_of_rotary_positions_is_read_in_either_spelling(tmp_path, base, name, form):
    layout = LAYOUTS[name]()
    theta = layout.public["rope_theta"]
    model = read(layout, tmp_path, base, **spelled(theta, {"rope_type": "default"}, form))
    assert worst(model, layout) < 1e-4


@pytest.mark.parametrize("name", ROTARY)
@pytest.mark.parametrize("form", ["older", "newer", "nested", "mixed"])
def test_yarn_is_read_in_either_spelling(tmp_path, base, name, form, monkeypatch):
    monkeypatch.setattr(plain, "rotate", partial(plain.yarn, factor=4.0, original=64))
    layout = LAYOUTS[name]()
    fields = spelled(layout.public["rope_theta"], {"rope_type": "yarn", **YARN}, form)
    assert worst(read(layout, tmp_path, base, **fields), layout) < 1e-4


@pytest.mark.parametrize("name", ["dream", "sdar"])
def test_linear_scaling_of_positions_is_read(tmp_path, base, name, monkeypatch):
    monkeypatch.setattr(plain, "rotate", partial(plain.linear_scaling, factor=4.0))
    layout = LAYOUTS[name]()
    fields = spelled(layout.public["rope_theta"], {"rope_type": "linear", "factor": 4.0}, "newer")
    assert worst(read(layout, tmp_path, base, **fields), layout) < 1e-4


@pytest.mark.parametrize(
    ("name", "kind"), [("llada-moe", "yarn"), ("llada", "yarn"), ("dream", "dynamic"), ("sdar", "longrope")]
)
def test_rotary_positions_that_are_not_computed_are_refused(tmp_path, base, name, kind):
    layout = LAYOUTS[name]()
    fields = spelled(layout.public["rope_theta"], {"rope_type": kind, **YARN}, "newer")
    with pytest.raises(CheckpointError, match=f"config.json says rope_type = '{kind}'; known: 'default'"):
        read(layout, tmp_path, base, **fields)


A2D_TOKENS = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "mask_token": "<|mask|>"}


def a2d(model_type, *, seed, tied, theta, biases=()):
    """A2D on Llama or Qwen2, with biases at these parts."""
    shapes = qwen2_shapes(bias=False, tied=tied)
    stems = [plain.HF[part].format(i=i) for i in range(LAYERS) for part in biases]
    shapes |= {stem + ".bias": shapes[stem + ".weight"][:1] for stem in stems}
    state = noise(shapes, seed=seed)
    public = {
        "attention_bias": "o" in biases, "hidden_act": "silu", "hidden_size": D, "intermediate_size": 48,
        "max_position_embeddings": 256, "mlp_bias": "up" in biases, "model_type": model_type,
        "num_attention_heads": HEADS, "num_hidden_layers": LAYERS, "num_key_value_heads": KV,
        "rms_norm_eps": 1e-6, "rope_theta": theta, "tie_word_embeddings": tied, "vocab_size": V,
    }  # fmt: skip

    def forward(ids):
        x = plain.llama_like(
            state, state["model.embed_tokens.weight"][ids], plain.HF, layers=LAYERS, q_heads=HEADS, kv_heads=KV,
            theta=theta, eps=1e-6, sees=plain.all_see(len(ids)),
        )  # fmt: skip
        return x @ state["model.embed_tokens.weight" if tied else "lm_head.weight"].T

    return Layout("a2d", public, state, forward, None, ("<|endoftext|>", "<|im_end|>"), A2D_TOKENS)


@pytest.mark.parametrize(
    ("tied", "biases"), [(False, ""), (True, "qkvo"), (False, ["q", "k", "v", "o", "gate", "up", "down"])]
)
def test_a2d_on_llama(tmp_path, base, tied, biases, monkeypatch):
    settings = {"factor": 8.0, "original": 64, "low": 1.0, "high": 4.0}
    monkeypatch.setattr(plain, "rotate", partial(plain.llama3, **settings))
    layout = a2d("a2d-llama", seed=21, tied=tied, theta=500000.0, biases=biases)
    scaling = {
        "rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64,
        "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    }  # fmt: skip
    assert worst(read(layout, tmp_path, base, rope_scaling=scaling), layout) < 1e-4


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_a2d_on_qwen2(tmp_path, base, tied, scaled, monkeypatch):
    layout = a2d("a2d-qwen2", seed=22, tied=tied, theta=1000000.0, biases="qkv")
    layout.public.pop("attention_bias")
    if scaled:
        monkeypatch.setattr(plain, "rotate", partial(plain.yarn, factor=4.0, original=64))
    fields = {"rope_scaling": {"rope_type": "yarn", **YARN}} if scaled else {}
    assert worst(read(layout, tmp_path, base, **fields), layout) < 1e-4


# ---- LLaDA ------------------------------------------------------------------------------------------


def test_llada_with_a_tied_head(tmp_path, base):
    layout = LAYOUTS["llada"]()
    head, embedding = "model.transformer.ff_out.weight", "model.transformer.wte.weight"
    layout.state[head] = layout.state[embedding]  # for the forward pass
    layout.state = {name: x for name, x in layout.state.items() if name != head}
    for i, tying in enumerate((True, None)):  # the published code ties where nothing is said
        model = read(layout, tmp_path / str(i), base, weight_tying=tying)
        assert model.lm_head.weight is model.backbone.embed_tokens.weight
        assert worst(model, layout) < 1e-4


@pytest.mark.parametrize("shared", ["null", None])
def test_llada_without_shared_key_value_heads_and_with_a_ratio(tmp_path, base, shared):
    layout = LAYOUTS["llada"](kv_heads=HEADS, inner=2 * D)
    model = read(layout, tmp_path, base, n_kv_heads=shared, mlp_hidden_size="null", mlp_ratio=2)
    assert worst(model, layout) < 1e-4


@pytest.mark.parametrize("name", ["llada", "llada-moe"])
def test_a_norm_without_its_epsilon_has_the_published_one(tmp_path, base, name):
    layout = LAYOUTS[name]()
    for part, x in layout.state.items():
        if "wte" in part or "embed_tokens" in part:
            x *= 0.01  # so small that the epsilon counts
    assert worst(read(layout, tmp_path, base, rms_norm_eps=None), layout) < 1e-4


@pytest.mark.parametrize("name", ["dream", "sdar", "a2d", "fast-dllm-v2", "diffullama", "llada-moe"])
def test_key_value_heads_that_are_null_are_as_many_as_heads(tmp_path, base, name):
    layout = LAYOUTS[name]()
    folder = layout.write(tmp_path, base)
    public = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**public, "num_key_value_heads": None}))
    size = D // HEADS if "head_dim" not in public else public["head_dim"]
    with pytest.raises(
        CheckpointError, match=rf"k_proj.\w+: \({KV * size}, ?\d*\) in place of \({HEADS * size},"
    ):
        load_model(folder, device="cpu")


# ---- refused ----------------------------------------------------------------------------------------

REFUSED = [
    ("llada", {"rope": None}, "rope = False; known: True"),
    ("llada", {"block_type": None}, "block_type = 'sequential'; known: 'llama'"),
    ("llada", {"layer_norm_type": None}, "layer_norm_type = 'default'; known: 'rms'"),
    ("llada", {"layer_norm_with_affine": False}, "layer_norm_with_affine = False; known: True"),
    ("llada", {"d_model": "32"}, "d_model = '32'; it is a whole number from 1"),
    ("llada", {"n_layers": -1}, "n_layers = -1; it is a whole number from 1"),
    ("llada", {"n_heads": 0}, "n_heads = 0; it is a whole number from 1"),
    ("llada", {"n_heads": 3}, "3 heads, which do not divide the width 32"),
    ("llada", {"n_heads": None}, "does not say n_heads"),
    ("llada", {"mlp_ratio": "4"}, "mlp_ratio = '4'; it is a positive number"),
    ("llada", {"rms_norm_eps": -1.0}, "rms_norm_eps = -1.0; it is a positive number"),
    ("llada", {"quantization_config": {"quant_method": "awq"}}, r"quantised \(awq\).*--dtype int8 or --dtype nf4"),
    ("llada-moe", {"norm_topk_prob": True}, "norm_topk_prob = True; known: False, None"),
    ("llada-moe", {"moe_router_score_function": "sigmoid"}, "moe_router_score_function = 'sigmoid'"),
    ("llada-moe", {"routed_scaling_factor": 2.5}, "routed_scaling_factor = 2.5; known: 1, None"),
    ("llada-moe", {"qk_layernorm": None}, "qk_layernorm = None; known: True"),
    ("llada-moe", {"moe_layer_freq": 1}, "moe_layer_freq = 1; it is a list"),
    ("llada-moe", {"rope_theta": None}, "does not say rope_theta"),
    ("llada-moe", {"hidden_size": None}, "does not say hidden_size"),
    ("dream", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5; known: 1, None"),
    ("dream", {"rope_theta": "1e6"}, "rope_theta = '1e6'; it is a positive number"),
    ("dream", {"rope_parameters": 3}, "rope_parameters = 3; it is a dictionary"),
    ("sdar", {"num_key_value_heads": 3}, "3 key/value heads, which do not divide 4 heads"),
    ("sdar", {"block_size": -4}, "block_size = -4; it is a whole number from 1"),
    ("sdar", {"block_length": True}, "block_length = True; it is a whole number from 1"),
    ("a2d-bd3lm", {"block_size": 0}, "block_size = 0; it is a whole number from 1"),
    ("bd3lm", {"block_size": 0}, "block_size = 0; it is a whole number from 1"),
    ("bd3lm", {"block_size": None}, "does not say block_size"),
    ("fast-dllm-v2", {"bd_size": "x"}, "bd_size = 'x'; it is a whole number from 1"),
    ("mdlm", {"n_heads": 3}, "3 heads, which do not divide the width 32"),
    ("mdlm", {"vocab_size": None}, "does not say vocab_size"),
    ("diffugpt", {"n_head": 2.5}, "n_head = 2.5; it is a whole number from 1"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "fields", "message"), REFUSED)
def test_what_is_not_read_is_refused_by_name(tmp_path, base, name, fields, message):
    layout = LAYOUTS[name]()
    with pytest.raises(CheckpointError, match=message):
        read(layout, tmp_path, base, **fields)
    with pytest.raises(CheckpointError, match=message):
        describe(str(tmp_path))


@pytest.mark.parametrize(("mask", "message"), [
    (V, f"the mask token is number {V}, and the embedding has {V} rows"),
    (-1, "mask_token_id = -1; it is a whole number from 0"),
    ("x", "mask_token_id = 'x'; it is a whole number from 0"),
])  # fmt: skip
def test_a_mask_is_a_row_of_the_embedding(tmp_path, base, mask, message):
    layout = LAYOUTS["llada"]()
    layout.specials += tuple(f"<x{i}>" for i in range(2 * V))
    folder = layout.write(tmp_path, base)
    public = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**public, "mask_token_id": mask}))
    with pytest.raises(CheckpointError, match=message):
        load_model(folder, device="cpu")


def test_heads_of_a_dit_share_its_width():
    with pytest.raises(ConfigError, match="5 heads of an even size cannot share a width of 768"):
        DiTConfig(num_attention_heads=5)


@pytest.mark.parametrize("name", LAYOUTS)
def test_how_its_authors_call_a_model_changes_nothing(tmp_path, base, name):
    layout = LAYOUTS[name]()
    called = {
        "return_dict": False,
        "output_attentions": True,
        "output_hidden_states": True,
        "use_cache": True,
    }
    assert worst(read(layout, tmp_path, base, **called), layout) < 1e-4


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "neither the tokenizer nor config.json names an end token"),
        ("null", "neither the tokenizer nor config.json names an end token"),
        ([9999, 3], "the end token is number 9999, and the tokenizer has"),
        ("</s>", "config.json says eos_token_id = '</s>'; it is a whole number from 0"),
    ],
)
def test_an_end_token_that_is_none_is_told(tmp_path, base, given, message):
    layout = LAYOUTS["llada"]()
    del layout.tokenizer["eos_token"]
    with pytest.raises(CheckpointError, match=re.escape(message)):
        read(layout, tmp_path, base, eos_token_id=given)
    layout = LAYOUTS["llada"]()
    del layout.tokenizer["eos_token"]
    assert read(layout, tmp_path, base, eos_token_id=[5, 3]).spec.eos_token_id == 5
