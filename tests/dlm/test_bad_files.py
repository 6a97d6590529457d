"""Weight files that are not what they say: refused by loading, inspecting and converting alike."""

import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from dlm import load_model
from dlm.commands.inspect import describe
from dlm.convert import convert
from dlm.errors import CheckpointError, ConfigError
from dlm.weights import INDEX, SINGLE, header
from tests.dlm.families.layouts import LAYOUTS


@pytest.fixture
def folder(tmp_path, base):
    """A public checkpoint in two files."""
    folder = LAYOUTS["llada"]().write(tmp_path / "public", base)
    weights = load_file(folder / SINGLE)
    (folder / SINGLE).unlink()
    names = sorted(weights)
    places = {}
    for number, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), 1):
        file = f"model-{number:05}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, folder / file, {"format": "pt"})
        places |= dict.fromkeys(part, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def first_file(folder):
    return sorted(folder.glob("*.safetensors"))[0]


def rewrite(file, change):
    """Change the header of a file, its bytes staying as they are."""
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    entries = json.loads(data[8 : 8 + length])
    names = sorted((entries[name]["data_offsets"], name) for name in entries if name != "__metadata__")
    change(entries, [name for _, name in names])
    new = json.dumps(entries).encode()
    file.write_bytes(struct.pack("<Q", len(new)) + new + data[8 + length :])


def shifted(entries, names):
    entries[names[1]]["data_offsets"] = [x + 4 for x in entries[names[1]]["data_offsets"]]


def negative(entries, names):
    begin, end = entries[names[0]]["data_offsets"]
    entries[names[0]]["data_offsets"] = [begin - 8, end - 8]


def short(entries, names):
    entries[names[0]]["data_offsets"][1] -= 4


def overlapping(entries, names):
    entries[names[1]]["data_offsets"] = list(entries[names[0]]["data_offsets"])
    entries[names[1]]["shape"] = list(entries[names[0]]["shape"])


def narrower(entries, names):
    entries[names[0]]["dtype"] = "BF16"


def unknown(entries, names):
    entries[names[0]]["dtype"] = "F4"


def odd_shape(entries, names):
    entries[names[0]]["shape"] = [-1, 2.5]


def in_halves(entries, names):
    entries[names[0]]["data_offsets"] = [float(x) for x in entries[names[0]]["data_offsets"]]


def without_end(entries, names):
    entries[names[0]]["data_offsets"].pop()


def backwards(entries, names):
    entries[names[0]]["data_offsets"].reverse()


def odd_remarks(entries, names):
    entries["__metadata__"] = [1]


def one_less(entries, names):
    del entries[names[-1]]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (shifted, "damaged (.* begins at byte"), (negative, "damaged (.* is said to lie from byte -8 to"),
        (in_halves, "damaged (.* is said to lie from byte 0.0 to"), (without_end, "not a safetensors header"),
        (backwards, "damaged (.* is said to lie from byte"), (one_less, "bytes behind the last tensor"),
        (odd_remarks, "not a safetensors header"),
        (short, "damaged (.* bytes; .* need"), (overlapping, "damaged (.* begins at byte"),
        (narrower, "damaged (.* of BF16 need"), (unknown, "is stored as F4, which is not read; types: F64,"),
        (odd_shape, "has the shape"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("use", ["load", "inspect", "convert"])
def test_a_header_that_does_not_go_with_its_bytes_is_refused(folder, tmp_path, change, says, use):
    rewrite(first_file(folder), change)
    says = says.replace("damaged (", r"damaged \(")
    with pytest.raises(CheckpointError, match=says):
        uses(folder, tmp_path)[use]()


def uses(folder, tmp_path):
    return {
        "load": lambda: load_model(folder, device="cpu"),
        "inspect": lambda: describe(str(folder)),
        "convert": lambda: convert(folder, tmp_path / "converted"),
    }


def test_a_sound_file_of_any_type_is_read(tmp_path):
    tensors = {
        "a": torch.arange(3),
        "empty": torch.zeros(0, 4),
        "b": torch.ones(2, 2).bfloat16(),
        "c": torch.tensor(1.0),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    read = {name: each[...] for name, each in header(tmp_path / "x.safetensors").items()}
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("use", ["load", "inspect", "convert"])
def test_wrong_shapes_and_surplus_are_refused_alike(folder, tmp_path, use):
    file = first_file(folder)
    weights = load_file(file)
    name = next(iter(weights))
    save_file(weights | {name: weights[name][:-1].clone()}, file)
    with pytest.raises(CheckpointError, match="of another shape, the first is"):
        uses(folder, tmp_path)[use]()
    save_file(weights | {"model.extra.weight": torch.zeros(3)}, file)
    with pytest.raises(CheckpointError, match="no place for 1 weights"):
        uses(folder, tmp_path)[use]()


@pytest.mark.parametrize("use", ["load", "inspect", "convert"])
def test_a_weight_in_two_files_is_refused(folder, tmp_path, use):
    first, second = sorted(folder.glob("*.safetensors"))
    name, twice = next(iter(load_file(first).items()))
    save_file(load_file(second) | {name: torch.zeros_like(twice)}, second)
    with pytest.raises(CheckpointError, match=f"{second}: holds {name}, which {first.name} also holds"):
        uses(folder, tmp_path)[use]()


@pytest.mark.parametrize("use", ["load", "inspect", "convert"])
def test_an_index_does_not_lead_out_of_its_folder(folder, tmp_path, use):
    first_file(folder).rename(tmp_path / "elsewhere.safetensors")
    index = json.loads((folder / INDEX).read_text())
    places = index["weight_map"]
    places = {n: x.replace("model-00001-of-00002", "../elsewhere") for n, x in places.items()}
    (folder / INDEX).write_text(json.dumps(index | {"weight_map": places}))
    with pytest.raises(CheckpointError, match=r"is no name of a file: '\.\./elsewhere.safetensors'"):
        uses(folder, tmp_path)[use]()


@pytest.mark.parametrize("use", ["load", "inspect", "convert"])
def test_an_index_that_is_missing_or_names_no_files_is_refused(folder, tmp_path, use):
    index = folder / INDEX
    kept = json.loads(index.read_text())
    index.write_text(json.dumps(kept | {"weight_map": kept["weight_map"] | {"a": 3}}))
    with pytest.raises(CheckpointError, match="the place of a is no name of a file"):
        uses(folder, tmp_path)[use]()
    index.unlink()
    with pytest.raises(CheckpointError, match=f"{INDEX} is missing"):
        uses(folder, tmp_path)[use]()


@pytest.mark.parametrize("field", [{"d_model": "32"}, {"n_heads": 0}, {"mask_token_id": "x"}])
@pytest.mark.parametrize("use", ["load", "inspect", "convert"])
def test_a_wrong_field_is_named_alike(folder, tmp_path, field, use):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | field))
    with pytest.raises(CheckpointError, match=f"{folder}.*{next(iter(field))}"):
        uses(folder, tmp_path)[use]()


OURS = {
    "a width of text": (
        {"backbone": {"hidden_size": "x"}},
        "says hidden_size = 'x'; it is a whole",
    ),
    "no layers": (
        {"backbone": {"num_hidden_layers": -1}},
        "says num_hidden_layers = -1; it is a whole number",
    ),
    "a block of none": ({"block_size": 0}, "says block_size = 0; it is a whole number"),
    "a block of text": (
        {"block_size": "x"},
        "says block_size = 'x'; it is a whole number",
    ),
    "a mask of text": ({"mask_token_id": "x"}, "says mask_token_id = 'x'; it is a whole number from 0"),
    "a mask beyond": ({"mask_token_id": 448}, "says mask_token_id = 448; it is less than vocab_size = 448"),
    "a list": ({"public": [3]}, r"config.json says public = \[3\]; it is a dictionary"),
    "a schedule of text": ({"schedule": "cosine"}, "says schedule = 'cosine'; it is a dictionary"),
    "a default of text": ({"generation": "conv"}, "says generation = 'conv'; it is a dictionary"),
    "an origin": (
        {"public": {"family": "lada"}},
        "unknown family of public checkpoints 'lada'",
    ),
    "other tokens": ({"num_tokens": 7}, "tokenizer and model do not belong together"),
    "another width": ({"backbone": {"hidden_size": 64}}, r"another shape, .* in place of \(448, 64\)"),
    "no tokenizer": ("tokenizer.json", "the tokenizer is missing or damaged"),
    "no weights": ("*.safetensors*", f"holds no weights .no {SINGLE} in it"),
    "surplus": ({"x": torch.zeros(2)}, "has no place for 1 weights, the first is x"),
}


@pytest.mark.parametrize("fault", OURS)
@pytest.mark.parametrize("use", ["load", "inspect", "convert"])
def test_our_own_layout_is_held_to_the_same(folder, tmp_path, fault, use):
    ours = convert(folder, tmp_path / "ours")
    change, says = OURS[fault]
    if isinstance(change, str):
        for file in ours.glob(change):
            file.unlink()
    elif isinstance(next(iter(change.values())), torch.Tensor):
        save_file(load_file(first_file(ours)) | change, first_file(ours))
    else:
        config = json.loads((ours / "config.json").read_text())
        backbone = config["backbone"] | change.get("backbone", {})
        (ours / "config.json").write_text(json.dumps({**config, **change, "backbone": backbone}))
    with pytest.raises(CheckpointError, match=f"{ours}.*{says}") as caught:
        uses(ours, tmp_path)[use]()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("use", ["load", "inspect", "convert"])
def test_whole_numbers_are_no_weights(folder, tmp_path, use):
    file = first_file(folder)
    weights = load_file(file)
    name = next(name for name in weights if name.endswith("q_proj.weight"))
    save_file(weights | {name: weights[name].to(torch.int8)}, file)
    with pytest.raises(CheckpointError, match="q_proj.weight is stored as I8, whole numbers"):
        uses(folder, tmp_path)[use]()


def as_bin(folder):
    weights = {}
    for file in sorted(folder.glob("*.safetensors")):
        weights |= load_file(file)
        file.unlink()
    (folder / INDEX).unlink()
    return weights


def test_bin_files_are_read_whole_and_not_converted(folder, tmp_path):
    row = torch.arange(12)[None]
    before = load_model(folder, device="cpu", dtype="float32")[0](row).logits
    weights = as_bin(folder)
    torch.save(weights, folder / "pytorch_model.bin")
    after = load_model(folder, device="cpu", dtype="float32")[0](row).logits
    torch.testing.assert_close(after, before)
    assert describe(str(folder))["parameters"] == "in .bin files, whose headers are not read"
    with pytest.raises(CheckpointError, match="holds .bin files"):
        convert(folder, tmp_path / "converted")
    stem = next(name for name in weights if name.endswith("q_proj.weight")).removesuffix("weight")
    torch.save(weights | {stem + "bias": torch.zeros(4)}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"holds 1 weights too many, the first is .*bias"):
        load_model(folder, device="cpu")


def test_an_adapter_is_not_converted(folder, tmp_path):
    ours = convert(folder, tmp_path / "ours")
    for file in ours.glob("*.safetensors*"):
        file.unlink()
    (ours / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="an adapter, not a model: dlm export --merge true"):
        convert(ours, tmp_path / "back")


@pytest.mark.parametrize(
    ("device_map", "says"),
    [
        ({"backbone": "cpu", "lm_head": "disk"}, 'weights are not left on "disk"'),
        ({"backbone": "cpu", "lm_head": "meta"}, 'weights are not left on "meta"'),
        ("disk", 'weights are not left on "disk"'),
        ("spread", "unknown device 'spread'; choices: cpu, cuda:0 .*, and in place of a map auto, balanced"),
        ({"": "auto"}, "unknown device 'auto'"),
    ],
)
def test_maps_of_what_is_no_device_are_refused(folder, device_map, says):
    with pytest.raises(ConfigError, match=says):
        load_model(folder, device_map=device_map)


def test_maps_of_devices_that_are_not_there_are_refused(folder, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for device_map in ({"": 0}, "cuda:1", {"backbone": "cuda:0", "lm_head": "cpu"}):
        with pytest.raises(ConfigError, match="device cuda:.: there is no GPU"):
            load_model(folder, device_map=device_map)


def test_what_does_not_fit_on_the_devices_is_not_called_damaged(folder, monkeypatch):
    monkeypatch.setattr("transformers.integrations.accelerate.get_max_memory", lambda _=None: {"cpu": 90_000})
    with pytest.raises(ConfigError, match="does not fit on the devices of device_map 'auto'"):
        load_model(folder, dtype="float32", device_map="auto")


def test_no_single_file_and_no_index_is_said_so(folder):
    for file in [*folder.glob("*.safetensors"), folder / INDEX]:
        file.unlink()
    with pytest.raises(CheckpointError, match=f"holds no weights .no {SINGLE} in it"):
        load_model(folder, device="cpu")
