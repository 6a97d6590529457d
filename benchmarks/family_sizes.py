"""Memory of public models' weights by calculation: `python -m benchmarks.family_sizes`.

The sizes below are those of the published config.json files, or of the model that one was adapted from. Each
model is built without memory, and its weights are counted: linear layers of the backbone in 8 or 4 bits, with
their scales, and the rest in bfloat16 (`dlm.quantization.calculated_bytes`). A tied head counts once.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.initialization import no_init_weights

from dlm.config import MaskedDiffusionConfig
from dlm.families import family_named
from dlm.model import MaskedDiffusionModel
from dlm.quantization import calculated_bytes

_NAMES = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
)


def decoder(*sizes: int, vocab: int, tied: bool = False, **more: Any) -> dict[str, Any]:
    """A config.json of transformers' kind: width, layers, heads, key/value heads, inner width."""
    shape: dict[str, Any] = dict(zip(_NAMES, sizes, strict=True))
    return {**shape, "vocab_size": vocab, "tie_word_embeddings": tied, **more}


DIT = {
    "hidden_dim": 768,
    "n_blocks": 12,
    "n_heads": 12,
    "cond_dim": 128,
    "model_length": 1024,
    "vocab_size": 50258,
}
QWEN_7B = decoder(3584, 28, 28, 4, 18944, vocab=152064)
QWEN3_06B = decoder(1024, 28, 16, 8, 3072, vocab=151936, tied=True, head_dim=128, model_type="a2d-qwen3")
LLADA = {
    "d_model": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 32, "mlp_hidden_size": 12288,
    "vocab_size": 126464, "block_type": "llama", "layer_norm_type": "rms", "activation_type": "silu",
    "rope": True, "weight_tying": False,
}  # fmt: skip
EXPERTS = decoder(
    2048, 16, 16, 16, 8192, vocab=157184, num_experts=64, num_experts_per_tok=8,
    expert_intermediate_size=1024, qk_layernorm=True, rope_theta=50000,
)  # fmt: skip

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "LLaDA-8B": ("llada", LLADA),
    "LLaDA-MoE-7B-A1B": ("llada-moe", EXPERTS),
    "Dream, DiffuCoder, DreamOn 7B": ("dream", QWEN_7B),
    "mdlm-owt": ("mdlm", DIT),
    "bd3lm-owt": ("bd3lm", {**DIT, "block_size": 16}),
    "A2D Qwen3-0.6B": ("a2d", QWEN3_06B),
    "A2D Qwen2.5-Coder-0.5B": (
        "a2d", decoder(896, 24, 14, 2, 4864, vocab=151936, tied=True, model_type="a2d-qwen2"),
    ),
    "ModernBERT-base": ("bert-chat", decoder(768, 22, 12, 12, 1152, vocab=50368, tied=True)),
    "ModernBERT-large": ("bert-chat", decoder(1024, 28, 16, 16, 2624, vocab=50368, tied=True)),
    "DiffuGPT small": ("diffugpt", {"n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50258}),
    "DiffuGPT medium": ("diffugpt", {"n_embd": 1024, "n_layer": 24, "n_head": 16, "vocab_size": 50258}),
    "DiffuLLaMA 7B": ("diffullama", decoder(4096, 32, 32, 32, 11008, vocab=32001)),
    "SDAR-1.7B": ("sdar", decoder(2048, 28, 16, 8, 6144, vocab=151936, tied=True, head_dim=128)),
    "SDAR-4B": ("sdar", decoder(2560, 36, 32, 8, 9728, vocab=151936, tied=True, head_dim=128)),
    "SDAR-8B": ("sdar", decoder(4096, 36, 32, 8, 12288, vocab=151936, head_dim=128)),
    "Fast-dLLM v2 1.5B": ("fast-dllm-v2", decoder(1536, 28, 12, 2, 8960, vocab=151936, tied=True)),
    "Fast-dLLM v2 7B": ("fast-dllm-v2", QWEN_7B),
}  # fmt: skip
"""Models by name: family, and the sizes of config.json."""


def empty(family: str, public: dict[str, Any]) -> MaskedDiffusionModel:
    """A model of these sizes on the meta device."""
    of = family_named(family)
    backbone = of.backbone(public)
    config = MaskedDiffusionConfig(
        backbone=backbone,
        vocab_size=backbone["vocab_size"],
        tie_word_embeddings=bool(backbone.get("tie_word_embeddings", False)),
        head_bias=bool(of.extra(public, of.ids[0]).get("head_bias", False)),
    )
    with torch.device("meta"), no_init_weights():
        model = MaskedDiffusionModel(config)
        model.tie_weights()
    return model


def row(family: str, public: dict[str, Any]) -> str:
    """Parameters and memory of a model, as cells of a table."""
    model = empty(family, public)
    sizes = (calculated_bytes(model, dtype, torch.bfloat16) / 1e9 for dtype in ("bfloat16", "int8", "nf4"))
    count = sum(x.numel() for x in model.parameters())
    return f"| {count / 1e9:.2f} B |" + "".join(f" {size:.2f} GB |" for size in sizes)


def main() -> None:
    """Print the table."""
    print("| model | parameters | bfloat16 | int8 | nf4 |\n|---|---|---|---|---|")
    for name, (family, public) in MODELS.items():
        print(f"| {name} {row(family, public)}")


if __name__ == "__main__":
    main()
