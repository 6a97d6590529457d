"""The canvas lies on the host and the model elsewhere: nothing mixes, and the host waits once in a step."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from benchmarks.models import Ending
from decoding import Decoder, Sampler
from decoding.presets import PRESETS
from decoding.request import Request
from decoding.step import denoise
from dlm.attention import ALL
from dlm.errors import ConfigError
from dlm.graphs import BucketedModel
from dlm.model import MaskedDiffusionModel
from dlm.spec import ModelSpec
from eval.bench import Problem
from tests.decoding.rig import canvas_of, plan_of
from tests.elsewhere import AWAY, Elsewhere
from tests.fakes import FakeTokenizer

VOCAB, EOS, MASK = 30, 0, 22


class Backbone:
    """One layer of attention, all weights being the identity."""

    def __init__(self):
        self.config = SimpleNamespace(_attn_implementation="sdpa")

    def __call__(self, inputs_embeds, layout=None, **given):
        x = inputs_embeds[:, None]  # [B, 1, L, D], one head
        out = F.scaled_dot_product_attention(x, x, x).transpose(1, 2) if layout is None else None
        out = layout.attend(0, x, x, x, None) if out is None else out
        return SimpleNamespace(last_hidden_state=inputs_embeds + out.flatten(2))


class FarModel:
    """The model's own glue, `hidden` to `partial_hidden`, around weights on another device."""

    hidden, packed_hidden = MaskedDiffusionModel.hidden, MaskedDiffusionModel.packed_hidden
    partial_hidden, new_memory = MaskedDiffusionModel.partial_hidden, MaskedDiffusionModel.new_memory
    capabilities, sight = frozenset({"packed", "partial", "attention", "shadows"}), ALL
    _shadowed_hidden = MaskedDiffusionModel._shadowed_hidden
    _embed, _recorded = MaskedDiffusionModel._embed, MaskedDiffusionModel._recorded
    _finished, _finished_packed = MaskedDiffusionModel._finished, MaskedDiffusionModel._finished_packed
    _hidden_in_layout, layers = MaskedDiffusionModel._hidden_in_layout, ("the only one",)

    def __init__(self, device=AWAY):
        generator = torch.Generator().manual_seed(0)
        self.table = torch.randn(VOCAB, 16, generator=generator).to(device)
        self.shut = torch.where(torch.arange(VOCAB) == MASK, -torch.inf, 0.0).to(device)
        self.backbone, self.mask_shift, self.calls = Backbone(), None, 0
        self.device, self.dtype = torch.device(device), torch.float32
        self.config = SimpleNamespace(
            mask_token_id=MASK, eos_token_id=EOS, shift=True, generation=None, causal_context=False
        )
        self.spec = ModelSpec.of(self)

    def get_input_embeddings(self):
        def embedding(ids):
            self.calls += 1
            return self.table[ids]

        return embedding

    def logits(self, hidden):
        return hidden @ self.table.T + self.shut


def texts(device, **how):
    model = FarModel(device)
    outs = Sampler(model, FakeTokenizer()).generate(["abc", "defghij", "k"], **how)
    return [out.token_ids for out in outs], model.calls


def in_both(**how):
    expected, _ = texts("cpu", **how)
    with Elsewhere() as mode:
        got, calls = texts(AWAY, **how)
    assert got == expected
    return mode.waits, calls


@pytest.mark.parametrize("name", PRESETS)
def test_every_decoder_waits_once_for_each_model_call(name):
    waits, calls = in_both(decoder=name, window=40, steps=10)
    assert set(+waits) == {"a copy to the host"}
    assert 0 < waits["a copy to the host"] <= calls


@pytest.mark.parametrize("name", ["conv", "categorical", "llada-conv", "threshold"])
def test_conflicts_and_shadows_come_with_the_scores(name):
    paces = {"window": 40, "steps": 10}, {"max_tokens": 20}
    for how, more in itertools.product(paces, ({}, {"verify": 0.9}, {"verify": 0.9, "verify_all": True})):
        waits, calls = in_both(decoder=Decoder.named(name, conflict=0.07, **more), **how)
        assert set(+waits) == {"a copy to the host"}
        assert 0 < waits["a copy to the host"] <= calls


@pytest.mark.parametrize(
    "how",
    [
        {"decoder": Decoder.named("conv", guidance=1.0, repetition_penalty=1.3), "max_tokens": 20},
        {"decoder": Decoder.named("top-k").without(5, 6, 99), "max_tokens": 20},
        {"max_tokens": 20, "forced": {3: "ab"}},
        {"max_tokens": 20, "batch_size": 2},
        {"window": 40, "steps": 10, "canvas": "growing"},
        *({"max_tokens": 20, "reuse": scope} for scope in ("prompt", "prefix", "dual")),
    ],
)
def test_whatever_is_asked_for_nothing_mixes(how):
    in_both(**how)


def test_gaps_of_open_length_are_compared_on_both_sides():
    outs = []
    for device in ("cpu", AWAY):
        with Elsewhere():
            outs.append(Sampler(FarModel(device), FakeTokenizer()).infill(["ab<mask:2-3>cd<mask:1-2>"]))
    assert outs[0][0].text == outs[1][0].text
    assert outs[0][0].score == pytest.approx(outs[1][0].score, abs=1e-5)


def test_models_with_few_shapes_and_the_benchmarks_run_there():
    with Elsewhere():
        Sampler(BucketedModel(FarModel(), graphs=False), FakeTokenizer()).generate(["abc", "d"], max_tokens=9)
        prompts = torch.randint(5, 20, (2, 6)).to(AWAY)
        problem = Problem(Ending(FarModel(), 12), prompts, MASK, 1, 30, 8, 20)
        tokens, _ = problem.ours(
            "ours", Request(decoder=Decoder.named("conv", kernel_size=9), window=30, steps=8)
        ).write(0)
    assert tokens > 0


def test_the_second_device_notices_what_cuda_would():
    with Elsewhere() as mode:
        far, near = torch.ones(3, device=AWAY), torch.ones(3)
        with pytest.raises(RuntimeError, match="two devices"):
            far + near
        with pytest.raises(RuntimeError, match="indexed from the device"):
            near[far.long()]
        far[far > 0]
        assert mode.waits["a mask as an index"] == 1
        assert bool((far.cpu() == 1).all())


def test_a_canvas_elsewhere_is_refused():
    with Elsewhere():
        plan = plan_of("conv", 3, eos=EOS, mask=MASK)
        canvas = canvas_of(torch.full((1, 5), MASK), plan)
        canvas.ids = canvas.ids.to(AWAY)
        with pytest.raises(ConfigError, match="lies on the host"):
            next(denoise(FarModel(), canvas, plan))
