"""What a user gets without options is what the authors of a model use; training can begin from it."""

import pytest
import torch

from decoding import Request, Sampler
from decoding.pace import OwnPace, Rate, Steps
from dlm import load_model
from dlm.commands.inspect import describe
from dlm.convert import convert
from dlm.data.config import DataConfig
from dlm.spec import ModelSpec
from eval.config import EvalConfig
from finetune.config import ModelConfig, TrainConfig
from finetune.sft import train
from tests.dlm.families.layouts import LAYOUTS

DEFAULTS = {  # decoder, answer, steps, temperature, top-p; sources in docs/families/
    "llada": ("llada", 128, 128, 0.0, 1.0),
    "llada-moe": ("llada", 128, 128, 0.0, 1.0),
    "dream": ("dream", 512, 512, 0.2, 0.95),
    "a2d": ("llada", 128, 128, 0.0, 1.0),
    "bert-chat": ("llada", 128, 128, 0.0, 1.0),
    "diffugpt": ("categorical", 256, 64, 0.95, 0.9),
    "diffullama": ("categorical", 256, 64, 0.9, 0.9),
}

BLOCKS = {  # decoder, pace, positions per block, whether the first of a block goes alone
    "sdar": ("threshold", OwnPace(), 4, False),
    "fast-dllm-v2": ("block-threshold", OwnPace(), 32, True),
    "bd3lm": ("categorical", Rate(1.0), 4, False),
    "a2d-bd3lm": ("llada", Steps(128), 32, False),
}


@pytest.fixture(params=LAYOUTS)
def case(request, tmp_path, base):
    layout = LAYOUTS[request.param]()
    folder = layout.write(tmp_path / "public", base)
    return layout, folder, *load_model(folder, device="cpu", dtype="float32")


def test_defaults_are_the_authors(case):
    layout, _, model, _ = case
    plan = Request().resolve(model)
    assert not plan.end_tokens.fill
    if layout.family in BLOCKS:
        decoder, pace, size, lead = BLOCKS[layout.family]
        window = plan.decoder.window
        assert (plan.decoder.name, plan.pace, window.size, window.lead) == (decoder, pace, size, lead)
        return
    if layout.family == "mdlm":
        assert (plan.decoder.name, plan.positions, plan.pace.steps) == ("categorical", 1024, 128)
        return
    name, length, steps, temperature, top_p = DEFAULTS[layout.family]
    rule = plan.decoder.tokens
    assert (plan.decoder.name, plan.tokens, plan.pace.steps) == (name, length, steps)
    assert (rule.temperature, rule.top_p) == (temperature, top_p)
    assert plan.margin is None
    half = Request(max_tokens=length // 2).resolve(model)
    assert (half.tokens, half.pace.steps) == (length // 2, steps // 2)
    if layout.family == "bert-chat":
        assert Request(decoder="conv").resolve(model).stop == ("[/Answer]",)


def test_the_evaluation_decodes_as_the_authors_do_too(case):
    _, folder, model, _ = case
    config = EvalConfig(task="rules", model=str(folder), max_tokens=64)
    (variant,) = config.variants()
    assert variant.request(eos_fill=config.eos_fill).resolve(model) == Request(max_tokens=64).resolve(model)
    filled = EvalConfig(task="rules", model=str(folder), eos_fill=True)
    assert filled.variants()[0].request(eos_fill=True).resolve(model).end_tokens.fill


@pytest.mark.parametrize(
    ("name", "remembered", "temperature"),
    [
        ("DiffuCoder-7B-Base", None, 0.2),
        ("DiffuCoder-7B-Instruct", "apple/DiffuCoder-7B-Base", 0.3),
        ("DiffuCoder-7B-cpGRPO", None, 0.4),
        ("mine", "apple/DiffuCoder-7B-cpGRPO", 0.4),
        ("my-diffucoder", None, 0.3),
    ],
)
def test_diffucoder_has_its_authors_settings(tmp_path, base, name, remembered, temperature):
    layout = LAYOUTS["dream"]()
    layout.specials += ("<|dlm_pad|>",)
    layout.public["_name_or_path"] = remembered
    folder = layout.write(tmp_path / name, base)
    model, tokenizer = load_model(folder, device="cpu", dtype="float32")
    assert describe(str(folder))["published as"] == "diffucoder"
    plan = Request().resolve(model)
    assert (plan.decoder.name, plan.tokens, plan.pace.steps) == ("dream", 256, 256)
    assert (plan.decoder.tokens.temperature, plan.decoder.tokens.top_p) == (temperature, 0.95)
    assert tokenizer.convert_tokens_to_ids("<|dlm_pad|>") in model.spec.end_token_ids
    again, _ = load_model(convert(folder, tmp_path / "ours"), device="cpu", dtype="float32")
    assert again.spec == model.spec


def test_other_decoders_have_their_own_canvas(case):
    _, _, model, tokenizer = case
    plan = Request(decoder="conv").resolve(model)
    assert plan.margin is not None or plan.pace.bounded
    assert plan.end_tokens.fill
    out = Sampler(model, tokenizer).generate("Two fruits", decoder="conv", max_tokens=12, rate=3.0)
    assert len(out.token_ids) <= 12
    gap = Sampler(model, tokenizer).infill("one <mask:2> three", decoder="conv")
    assert gap.text.startswith("one")


def test_a_canvas_behind_the_prompt_is_whole_from_the_start():
    spec = ModelSpec(mask_token_id=5, eos_token_id=0, positions=300)
    plan = Request(max_tokens=40, canvas="full", steps=10, decoder="llada").resolve(spec)
    assert (plan.tokens, plan.positions, plan.margin, plan.pace) == (40, 300, None, Steps(10, spec.schedule))
    assert Request(max_tokens=40, canvas="full", decoder="llada").resolve(spec).pace.rate == 2.0


def run_of(folder, target):
    return TrainConfig(
        output_dir=str(target),
        model=ModelConfig(init=str(folder), template="model"),
        data=DataConfig(source="rules", window=64, limit=40, validation_rows=8),
        max_steps=2, per_device_train_batch_size=4, learning_rate=1e-3, logging_steps=1, eval_steps=0,
        save_steps=2, precision="fp32", report_to="none", trainer={"disable_tqdm": True},
    )  # fmt: skip


@pytest.mark.parametrize(
    "name", ["mdlm", "bert-chat", "diffugpt", "sdar", "fast-dllm-v2", "bd3lm", "a2d-bd3lm"]
)
def test_training_begins_from_a_public_checkpoint(tmp_path, base, name):
    layout = LAYOUTS[name]()
    folder = layout.write(tmp_path / "public", base)
    train(run_of(folder, tmp_path / "run"))
    before, _ = load_model(folder, device="cpu", dtype="float32")
    after, _ = load_model(tmp_path / "run", device="cpu", dtype="float32")
    assert after.spec.mask_token_id == before.spec.mask_token_id
    moved = [n for n, p in after.named_parameters() if not torch.equal(p, before.get_parameter(n))]
    assert len(moved) > 10
