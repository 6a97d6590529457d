"""LoRA adapters: what is trained, what is saved, what comes back."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dlm import load_model
from dlm.adapter import _TOLERANCE, MaskShift, add_adapter, base_of, merged
from dlm.backbone import from_scratch
from dlm.errors import CheckpointError
from tests.conftest import TINY


@pytest.fixture
def base(tokenizer, tmp_path):
    model = from_scratch(TINY, tokenizer)
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def adapted(base, scale=0.3):
    """A base with an adapter whose every trained number has been moved."""
    model, tokenizer = load_model(base, device="cpu")
    model = add_adapter(model, str(base), r=4, alpha=8)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += scale * torch.randn_like(parameter)
    return model, tokenizer


def noisy(model):
    ids = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(1))
    ids[:, 3:6] = model.config.mask_token_id
    return ids


def test_a_new_adapter_changes_nothing(base):
    plain, _ = load_model(base, device="cpu")
    model = add_adapter(load_model(base, device="cpu")[0], str(base), r=4, alpha=8)
    ids = noisy(plain)
    torch.testing.assert_close(model.eval()(ids).logits, plain(ids).logits)


def test_only_low_rank_updates_norms_and_the_mask_row_are_trained(base):
    model, _ = adapted(base)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in n or "norm" in n or "mask_shift" in n for n in trained)
    layers, linear = TINY.num_hidden_layers, 7
    assert sum("lora_A" in n for n in trained) == layers * linear
    assert sum("norm" in n for n in trained) == 2 * layers + 1
    assert sum("mask_shift" in n for n in trained) == 1


def test_the_update_is_the_product_of_two_thin_matrices(base):
    plain, _ = load_model(base, device="cpu")
    model, _ = adapted(base)
    name = "backbone.layers.0.mlp.up_proj"
    layer = model.get_submodule(f"base_model.model.{name}")
    update = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * (8 / 4)
    whole = merged(model)
    expected = plain.get_submodule(name).weight + update
    torch.testing.assert_close(whole.get_submodule(name).weight, expected)
    rows = whole.get_input_embeddings().weight - plain.get_input_embeddings().weight
    assert rows.abs().sum(1).nonzero()[:, 0].tolist() == [plain.config.mask_token_id]


def test_merging_gives_the_same_model(base):
    model, _ = adapted(base)
    ids = noisy(model)
    expected = model.eval()(ids).logits.detach()
    assert (expected - load_model(base, device="cpu")[0](ids).logits).nan_to_num().abs().max() > 0.1
    whole = merged(model)
    assert whole.mask_shift is None
    torch.testing.assert_close(whole(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_a_saved_adapter_loads_with_its_base_and_stays_small(base, tmp_path):
    model, tokenizer = adapted(base)
    ids = noisy(model)
    expected = model.eval()(ids).logits.detach()
    folder = tmp_path / "adapter"
    model.config.training = {"note": "mine"}
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    stored = load_file(folder / "adapter_model.safetensors")
    assert not any("embed_tokens" in name or "base_layer" in name for name in stored)
    again, _ = load_model(folder, device="cpu")
    assert all(p.requires_grad for p in again.parameters())  # it can be trained on, all of it
    torch.testing.assert_close(again(ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert again.config.training == {"note": "mine"}


def test_an_adapter_may_stand_on_an_adapter(base, tmp_path):
    first, tokenizer = adapted(base)
    first.save_pretrained(tmp_path / "one")
    tokenizer.save_pretrained(tmp_path / "one")
    second, _ = adapted(tmp_path / "one", scale=0.2)
    ids = noisy(second)
    expected = second.eval()(ids).logits.detach()
    second.save_pretrained(tmp_path / "two")
    tokenizer.save_pretrained(tmp_path / "two")
    again, _ = load_model(tmp_path / "two", device="cpu")
    torch.testing.assert_close(again(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_an_adapter_without_its_base_says_which_one_is_missing(base, tmp_path):
    model, tokenizer = adapted(base)
    folder = tmp_path / "adapter"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    shutil.move(base, tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"an adapter of .*base, which cannot be loaded"):
        load_model(folder, device="cpu")
    file = Path(folder) / "adapter_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({**settings, "base_model_name_or_path": None}))
    with pytest.raises(CheckpointError, match="does not name the model"):
        load_model(folder, device="cpu")


def test_the_mask_shift_touches_masks_only():
    shift = MaskShift(3)
    with torch.no_grad():
        shift.weight.copy_(torch.tensor([1.0, 2.0, 3.0]))
    out = shift(torch.tensor([[True, False]]))
    assert out.tolist() == [[[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]]]


def test_equal_seeds_give_equal_first_weights(base):
    def first(seed):
        model = add_adapter(load_model(base, device="cpu")[0], str(base), r=4, alpha=8, seed=seed)
        return model.get_submodule("base_model.model.backbone.layers.0.mlp.up_proj").lora_A["default"].weight

    torch.rand(3)
    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))


def test_a_name_is_never_taken_for_a_folder_that_is_called_so(base, tmp_path, monkeypatch):
    (tmp_path / "default-sft").mkdir()
    shutil.copytree(base, tmp_path / "default")
    monkeypatch.chdir(tmp_path)
    for name in ("default", "default-sft"):
        model = add_adapter(load_model(base, device="cpu")[0], name, r=4, alpha=8)
        model.save_pretrained(tmp_path / "adapter")
        assert base_of(tmp_path / "adapter") == name


def test_a_base_that_is_named_without_a_path_is_found_beside_the_adapter(base, tmp_path):
    model, _ = adapted(base)
    model.peft_config["default"].base_model_name_or_path = "base"
    model.save_pretrained(tmp_path / "adapter")
    assert base_of(tmp_path / "adapter") == str(base)


def test_a_folder_without_a_checkpoint_is_not_the_base(base, tmp_path):
    adapted(base)[0].save_pretrained(tmp_path / "runs" / "adapter")
    (tmp_path / "runs" / "base").mkdir()
    shutil.move(base, tmp_path / "elsewhere")
    assert base_of(tmp_path / "runs" / "adapter") == str(base), "so that the error names what was lost"
    shutil.move(tmp_path / "elsewhere", tmp_path / "runs" / "base" / "x")
    shutil.copytree(tmp_path / "runs" / "base" / "x", tmp_path / "runs" / "base", dirs_exist_ok=True)
    assert base_of(tmp_path / "runs" / "adapter") == str(tmp_path / "runs" / "base")


def test_adapter_and_base_may_move_together(base, tmp_path):
    model, tokenizer = adapted(base)
    model.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    shutil.copytree(tmp_path, tmp_path.parent / f"{tmp_path.name}-moved")
    shutil.rmtree(base)
    ids = noisy(model)
    again, _ = load_model(tmp_path.parent / f"{tmp_path.name}-moved" / "adapter", device="cpu")
    torch.testing.assert_close(again(ids).logits, model.eval()(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_folded_adapter_is_the_same_function_with_the_same_gradients(model, dtype):
    found = []
    for folded in (False, True):
        adapted = add_adapter(copy.deepcopy(model), "base", r=4, alpha=8, folded=folded)
        generator = torch.Generator().manual_seed(0)
        for name, weight in adapted.named_parameters():
            if "lora_" in name:
                weight.data.normal_(std=0.1, generator=generator)
        ids = torch.randint(5, 90, (3, 20), generator=torch.Generator().manual_seed(1))
        with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
            out = adapted(input_ids=ids, targets=ids).token_logp
        out.mean().backward()
        found.append([out, *(p.grad for p in adapted.parameters() if p.requires_grad)])
    tolerance = {"rtol": 1e-3, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.02}
    for plain, folded in zip(*found, strict=True):
        torch.testing.assert_close(folded, plain, **tolerance)


def saved(base, folder):
    model, tokenizer = adapted(base)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kept", [0, 1, -1])
def test_an_adapter_that_lacks_weights_is_refused(base, tmp_path, kept):
    folder = saved(base, tmp_path / "adapter")
    file = folder / "adapter_model.safetensors"
    weights = load_file(file)
    names = sorted(weights)
    some = names[:kept]
    save_file({name: weights[name] for name in some}, file, {"format": "pt"})
    with pytest.raises(
        CheckpointError, match=rf"lacks {len(names) - len(some)} of its weights, the first is "
    ):
        load_model(folder, device="cpu")


def test_an_adapter_with_weights_too_many_is_refused(base, tmp_path):
    folder = saved(base, tmp_path / "adapter")
    file = folder / "adapter_model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if ".layers.1." in name)
    extra = {name.replace(".layers.1.", ".layers.7."): weights[name].clone()}
    save_file({**weights, **extra}, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"has no place for 1 of its weights.*layers\.7"):
        load_model(folder, device="cpu")


def test_another_base_of_the_same_shapes_is_refused(base, tokenizer, tmp_path):
    folder = saved(base, tmp_path / "adapter")
    from_scratch(TINY, tokenizer, seed=99).save_pretrained(base)
    with pytest.raises(CheckpointError, match="is not the model that it was trained on"):
        load_model(folder, device="cpu")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_attention_heads", 4),
        ("rms_norm_eps", 1e-5),
        ("hidden_act", "gelu"),
        ("rope_parameters", {"rope_theta": 5e5, "rope_type": "default"}),
        ("rope_parameters", {"rope_theta": 1e4, "rope_type": "linear", "factor": 2.0}),
    ],
)
def test_a_base_with_these_weights_and_another_configuration_is_refused(base, tmp_path, field, value):
    """Its tensors have the same names, shapes and values, and it computes something else."""
    folder = saved(base, tmp_path / "adapter")
    before, _ = load_model(base, device="cpu")
    file = base / "config.json"
    settings = json.loads(file.read_text())
    change = {field: value} | ({"num_key_value_heads": 4, "head_dim": 8} if "heads" in field else {})
    file.write_text(json.dumps({**settings, "backbone": {**settings["backbone"], **change}}))
    after, _ = load_model(base, device="cpu")
    ids = noisy(before)
    assert not torch.allclose(before(ids).logits.nan_to_num(), after(ids).logits.nan_to_num())
    name = "head_dim" if "heads" in field else field
    with pytest.raises(CheckpointError, match=rf"is not the model that it was trained on: its {name}"):
        load_model(folder, device="cpu")


@pytest.mark.parametrize("change", [{"rms_norm_eps": 9.999999974752427e-07}, {"use_cache": True, "note": 1}])
def test_a_configuration_that_computes_the_same_is_known_again(base, tmp_path, change):
    """As a GGUF file rounds it, and with fields that nothing reads."""
    folder = saved(base, tmp_path / "adapter")
    file = base / "config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({**settings, "backbone": {**settings["backbone"], **change}}))
    load_model(folder, device="cpu")


def test_an_adapter_trained_on_blocks_is_block_causal_and_its_base_is_not(base, tmp_path):
    model, tokenizer = adapted(base)
    ids = noisy(model)
    full = model.eval()(ids).logits.detach()
    model.config.block_size, model.config.block_lead, model.config.causal_context = 4, False, True
    model.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    expected = model.eval()(ids).logits.detach()
    again, _ = load_model(tmp_path / "adapter", device="cpu")
    assert (again.config.block_size, again.config.block_lead, again.config.causal_context) == (4, False, True)
    assert again.spec.visibility.block_size == 4
    torch.testing.assert_close(again(ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert (full - expected).nan_to_num().abs().max() > 0.01
    assert load_model(base, device="cpu")[0].config.block_size is None


@pytest.mark.parametrize("shift", [True, False])
def test_a_base_that_is_shifted_otherwise_is_refused(base, tmp_path, shift):
    folder = saved(base, tmp_path / "adapter")
    file = base / "config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({**settings, "shift": shift}))
    if shift == settings["shift"]:
        load_model(folder, device="cpu")
        return
    with pytest.raises(CheckpointError, match="its shift is True, and was False"):
        load_model(folder, device="cpu")


@pytest.mark.parametrize(("noise", "known"), [(0.0, True), (0.02, False)])
def test_a_base_is_known_again_when_it_is_rounded(base, tmp_path, noise, known):
    folder = saved(base, tmp_path / "adapter")
    model, _ = load_model(base, device="cpu")
    with torch.no_grad():
        weight = model.get_submodule("backbone.layers.0.mlp.up_proj").weight
        weight += noise * weight.std() * torch.randn_like(weight)
    model.bfloat16().save_pretrained(base)
    if known:
        load_model(folder, device="cpu")
        return
    with pytest.raises(
        CheckpointError, match=r"1 of \d+ weights differ, the first is .*layers.0.mlp.up_proj"
    ):
        load_model(folder, device="cpu")


def test_rounding_to_bfloat16_is_within_the_tolerance_and_comes_near_it():
    values = torch.linspace(1, 2, 100_001)
    share = ((values.bfloat16().float() - values) / values).abs().max()
    assert 0.98 * 2**-8 < share < _TOLERANCE < 1.03 * 2**-8


@pytest.mark.parametrize(("noise", "known"), [(0.1, True), (1.4, False)])
def test_a_base_with_a_name_may_be_rounded_to_four_bits_but_is_no_other_model(
    base, tmp_path, monkeypatch, caplog, noise, known
):
    folder = saved(base, tmp_path / "adapter")
    monkeypatch.setattr("dlm.adapter.NAMES", (str(base),))
    model, _ = load_model(base, device="cpu")
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight += noise * weight.std(correction=0) * torch.randn_like(weight)
    model.save_pretrained(base)
    if known:
        load_model(folder, device="cpu")
        assert "weights differ" in caplog.text
        return
    with pytest.raises(CheckpointError, match=r"\d+ of \d+ weights differ"):
        load_model(folder, device="cpu")


def test_an_adapter_on_an_adapter_knows_both(base, tmp_path):
    one = saved(base, tmp_path / "one")
    two = saved(one, tmp_path / "two")
    load_model(two, device="cpu")
    model, _ = adapted(base, scale=0.5)
    model.save_pretrained(one)
    with pytest.raises(CheckpointError, match=r"two: its base .*one is not the model"):
        load_model(two, device="cpu")


def test_a_damaged_record_of_the_base_is_named(base, tmp_path):
    folder = saved(base, tmp_path / "adapter")
    (folder / "base.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"base\.json: damaged"):
        load_model(folder, device="cpu")
    (folder / "base.json").unlink()
    load_model(folder, device="cpu")  # as older versions wrote it
