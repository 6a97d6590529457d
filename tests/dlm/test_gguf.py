"""A `.gguf` file becomes a diffusion model."""

import pytest
import torch

from dlm import load_model
from dlm.backbone import from_causal_lm
from dlm.errors import CheckpointError


def test_a_gguf_file_gives_the_weights_it_holds(gguf_file):
    path, causal = gguf_file
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


def test_what_came_from_gguf_is_saved_and_loaded_like_any_other(gguf_file, tmp_path):
    model, tokenizer = load_model(gguf_file[0], device="cpu")
    model.save_pretrained(tmp_path / "out")
    tokenizer.save_pretrained(tmp_path / "out")
    again, _ = load_model(tmp_path / "out", device="cpu")
    x = torch.randint(3, 90, (1, 9))
    with torch.no_grad():
        assert torch.equal(again(input_ids=x).logits, model.eval()(input_ids=x).logits)


def test_a_truncated_gguf_file_gives_one_clear_error(gguf_file):
    path, _ = gguf_file
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(CheckpointError, match=r"tiny\.gguf: cannot be read as a causal language model"):
        load_model(path, device="cpu")


def test_control_tokens_are_those_that_the_file_names():
    """transformers 5.17 gives SmolLM2's file another end token than its configuration has."""
    from types import SimpleNamespace

    from dlm.causal import _settle_marks

    words = {1: "<|im_start|>", 2: "<|im_end|>"}
    tokenizer = SimpleNamespace(
        bos_token_id=1, eos_token="<|im_start|>", eos_token_id=1, pad_token_id=None,
        convert_ids_to_tokens=words.get,
    )  # fmt: skip
    _settle_marks(tokenizer, SimpleNamespace(bos_token_id=1, eos_token_id=2, pad_token_id=2))
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|im_end|>")
    assert not hasattr(tokenizer, "bos_token")
