"""A tiny `.gguf` file, written tensor by tensor as llama.cpp's converter does."""

import json

import gguf
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
HEADS = 2


def permuted(weight):
    """llama.cpp keeps the two halves of each rotary pair side by side."""
    half = weight.shape[0] // HEADS // 2
    return weight.reshape(HEADS, 2, half, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


@pytest.fixture
def gguf_file(tmp_path, tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=HEADS, num_key_value_heads=HEADS, max_position_embeddings=64,
        tie_word_embeddings=True, rms_norm_eps=1e-5,
    )  # fmt: skip
    causal = LlamaForCausalLM(config).eval()
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(96)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokenizer))
    core = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(core["vocab"], key=core["vocab"].get))
    writer.add_token_types([3, 3, 3] + [1] * (len(tokenizer) - 3))
    writer.add_token_merges([" ".join(m) if isinstance(m, list) else m for m in core["merges"]])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_bos_token_id(1)
    for name, value in causal.model.state_dict().items():
        weight = value.numpy()
        if name == "embed_tokens.weight":
            writer.add_tensor("token_embd.weight", weight)
        elif name == "norm.weight":
            writer.add_tensor("output_norm.weight", weight)
        else:
            _, layer, rest = name.split(".", 2)
            short = NAMES[rest.removesuffix(".weight")]
            weight = permuted(weight) if short in ("attn_q", "attn_k") else weight
            writer.add_tensor(f"blk.{layer}.{short}.weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, causal
