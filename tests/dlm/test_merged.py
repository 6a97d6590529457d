"""Merged copies of adapters in the cache: the same weights to the bit, used only while they are right."""

import pytest
import torch

from dlm import load_model, merged
from dlm.adapter import add_adapter
from dlm.formats import AdapterFormat
from dlm.pretrained import names
from dlm.pretrained.store import MANIFEST


@pytest.fixture
def adapter(model, tokenizer, tmp_path, monkeypatch):
    """An adapter that comes with the package, on an adapter that does, on a base."""
    monkeypatch.setenv("DLM_CACHE", str(tmp_path / "cache"))
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    where = tmp_path / "base"
    for number, name in enumerate(("first", "second")):
        monkeypatch.setitem(
            names.ADAPTERS, name, str(tmp_path / name)
        )  # absolute, so the package's is not used
        base, _ = load_model(str(where), "cpu", "float32")
        adapted = add_adapter(base, str(where), r=2, alpha=8, seed=number)
        with torch.no_grad():
            for weight in (p for p in adapted.parameters() if p.requires_grad):
                weight += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(number))
        adapted.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        where = tmp_path / name
    return tmp_path / "second"


def copies(adapter):
    return sorted(path.name for path in (adapter.parent / "cache").iterdir() if path.is_dir())


def merges(monkeypatch):
    """Counts how often adapters are merged from now on."""
    count, merge = [], AdapterFormat._merge
    monkeypatch.setattr(AdapterFormat, "_merge", lambda self, *a: count.append(a[0]) or merge(self, *a))
    return count


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_copy_has_the_weights_and_buffers_of_the_merge(adapter, dtype, monkeypatch):
    expected, _ = AdapterFormat()._merge(str(adapter), getattr(torch, dtype))
    first, _ = load_model("second", "cpu", dtype)
    assert f"merged-second-{dtype}" in copies(adapter)
    count = merges(monkeypatch)
    again, tokenizer = load_model("second", "cpu", dtype)
    assert count == []
    for found in (first, again):
        assert dict(found.named_parameters()).keys() == dict(expected.named_parameters()).keys()
        for kind in ("named_parameters", "named_buffers"):
            for name, value in getattr(expected, kind)():
                other = dict(getattr(found, kind)())[name]
                assert other.dtype == value.dtype
                assert torch.equal(other, value), name
    assert again.config.to_diff_dict() == {
        **first.config.to_diff_dict(),
        "dtype": again.config.to_diff_dict()["dtype"],
    }
    assert not any("cache" in str(value) for value in again.config.to_dict().values())
    assert len(tokenizer) == again.config.num_tokens


def test_frequencies_of_positions_are_not_rounded(adapter):
    low, _ = load_model("second", "cpu", "bfloat16")
    high, _ = load_model("second", "cpu", "float32")
    assert torch.equal(low.backbone.rotary_emb.inv_freq, high.backbone.rotary_emb.inv_freq)


@pytest.mark.parametrize("damage", ["bytes", "size", "missing", "manifest", "adapter", "inner", "base"])
def test_a_corrupt_or_stale_copy_is_noticed_and_made_anew(adapter, damage, monkeypatch):
    expected, _ = load_model("second", "cpu", "float32")
    copy = adapter.parent / "cache" / "merged-second-float32"
    weights, (place, name) = copy / "model.safetensors", (copy / MANIFEST, "adapter_model.safetensors")
    if damage == "bytes":
        data = bytearray(weights.read_bytes())
        data[-40] ^= 0xFF
        weights.write_bytes(data)
    elif damage == "size":
        weights.write_bytes(weights.read_bytes()[:-4])
    elif damage == "missing":
        weights.unlink()
    elif damage == "manifest":
        place.write_text("[]")
    else:
        folder = {"adapter": adapter, "inner": adapter.parent / "first", "base": adapter.parent / "base"}[
            damage
        ]
        file = folder / (name if damage != "base" else "model.safetensors")
        data = bytearray(file.read_bytes())
        data[-37 if damage != "base" else len(data) // 2] ^= (
            0x01  # the base's last weights are in the adapters
        )
        file.write_bytes(data)
    count = merges(monkeypatch)
    found, _ = load_model("second", "cpu", "float32")
    assert count, "the copy was used"
    same = all(torch.equal(a, b) for a, b in zip(found.parameters(), expected.parameters(), strict=True))
    assert same == (damage in ("bytes", "size", "missing", "manifest"))
    del count[:]
    load_model("second", "cpu", "float32")
    assert count == [], "and it is right again"


def test_a_cache_that_cannot_be_written_costs_time_only(adapter, monkeypatch):
    (adapter.parent / "file").write_text("")
    monkeypatch.setenv("DLM_CACHE", str(adapter.parent / "file"))
    load_model("second", "cpu", "float32")


def test_a_save_that_is_ended_halfway_leaves_nothing(adapter, tmp_path):
    def killed(folder):
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError("no space left")

    merged.keep(str(adapter), "float32", killed)
    assert not any("second" in name for name in copies(adapter))
    assert merged.find(str(adapter), "float32") is None


def test_adapters_of_users_are_not_kept(adapter):
    load_model(str(adapter.parent / "base"), "cpu", "float32")
    assert not merged.is_cached(str(adapter.parent / "base"))
