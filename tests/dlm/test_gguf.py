"""A `.gguf` file, written here tensor by tensor as llama.cpp's converter does, becomes a diffusion model."""

import json

import gguf
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dlm import load_model
from dlm.backbone import from_causal_lm
from dlm.errors import CheckpointError

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
def file(tmp_path, tokenizer):
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


def test_a_gguf_file_gives_the_weights_it_holds(file):
    path, causal = file
    model, tokenizer = from_causal_lm(str(path))
    x = torch.randint(3, 90, (1, 9))
    length = x.shape[1]
    with torch.no_grad():
        expected = causal(x).logits
        mask = torch.full((length, length), float("-inf")).triu(1)[None, None]
        states = model.backbone(input_ids=x, attention_mask=mask, use_cache=False, is_causal=False)
        got = model.logits(states.last_hidden_state)
    keep = [i for i in range(expected.shape[-1]) if i != tokenizer.mask_token_id]
    assert torch.allclose(got[..., keep], expected[..., keep], atol=1e-4)
    assert tokenizer.decode(tokenizer("Count from 9 to 50.")["input_ids"]) == "Count from 9 to 50."


def test_what_came_from_gguf_is_saved_and_loaded_like_any_other(file, tmp_path):
    model, tokenizer = load_model(file[0], device="cpu")
    model.save_pretrained(tmp_path / "out")
    tokenizer.save_pretrained(tmp_path / "out")
    again, _ = load_model(tmp_path / "out", device="cpu")
    x = torch.randint(3, 90, (1, 9))
    with torch.no_grad():
        assert torch.equal(again(input_ids=x).logits, model.eval()(input_ids=x).logits)


def test_a_truncated_gguf_file_gives_one_clear_error(file):
    path, _ = file
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(CheckpointError, match=r"tiny\.gguf: cannot be read as a causal language model"):
        load_model(path, device="cpu")
