"""`model.compile`: a layer is compiled whole, and once for all layers and lengths."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from dlm.adapter import add_adapter
from dlm.backbone import ScratchConfig, from_scratch
from dlm.data.rules import make_examples
from dlm.model import IGNORE
from dlm.tokenizer import train_tokenizer

LAYERS, LENGTHS = 3, (40, 56, 40)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([e.instruction for e in make_examples(100)], 300)


@pytest.mark.parametrize(
    ("block_size", "causal"),
    [(0, False), (8, False), (8, True)],
    ids=["full", "blocks", "blocks, causal context"],
)
def test_training_compiles_each_layer_whole_and_once(tokenizer, block_size, causal):
    torch.manual_seed(0)
    shape = ScratchConfig(
        hidden_size=32, num_hidden_layers=LAYERS, num_attention_heads=2, intermediate_size=64
    )
    model = from_scratch(shape, tokenizer)
    model.config.block_size, model.config.causal_context = block_size or None, causal
    adapted = add_adapter(model, "random", r=4, alpha=4, folded=True).train()

    def gradients():
        adapted.zero_grad()
        for length in LENGTHS:
            torch.manual_seed(length)
            ids = torch.randint(5, len(tokenizer), (3, length))
            masked = torch.rand(ids.shape) < 0.5
            masked[:, :9] = False
            valid = torch.ones_like(masked)
            valid[0, -5:] = False
            out = adapted(
                input_ids=ids.masked_fill(masked, tokenizer.mask_token_id), attention_mask=valid,
                targets=torch.where(masked & valid, ids, IGNORE), clean_ids=ids if block_size else None,
            )  # fmt: skip
            out.token_logp.sum().backward()
        return [p.grad.clone() for p in adapted.parameters() if p.requires_grad]

    plain = gradients()
    graphs = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    for layer in model.layers:
        layer.compile(backend=graphs, dynamic=True, fullgraph=True)
    torch.testing.assert_close(gradients(), plain, rtol=1e-4, atol=1e-5)
    assert graphs.frame_count <= 4  # more of them for the first layer, whose input needs no gradient
    torch._dynamo.reset()
