"""transformers' own classes read our folders once the model is registered."""

import subprocess
import sys

CODE = """
from transformers import AutoConfig, AutoModel, AutoTokenizer
import torch
import dlm
AutoModel.from_pretrained({folder!r})
from dlm import MaskedDiffusionModel, load_model

folder = {folder!r}
model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
ours, other = load_model(folder, "cpu", "float32")
assert type(model) is MaskedDiffusionModel, type(model)
assert AutoConfig.from_pretrained(folder).model_type == "masked_diffusion"
assert tokenizer.get_vocab() == other.get_vocab()
assert tokenizer.chat_template == other.chat_template
ids = torch.tensor([tokenizer("Count to ten.").input_ids + [tokenizer.mask_token_id] * 3])
assert torch.equal(model.logits(model.hidden(ids)), ours.logits(ours.hidden(ids)))
"""


def test_automodel_and_autotokenizer_read_our_folders(model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    subprocess.run([sys.executable, "-c", CODE.format(folder=str(tmp_path))], check=True)
