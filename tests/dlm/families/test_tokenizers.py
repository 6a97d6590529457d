"""Tokenizers as they are published: files of an older kind, classes of the repository, masks that are only added."""

import json

import pytest

from dlm import load_model
from dlm.tokenizer import encode_prompt
from tests.dlm.families.layouts import LAYOUTS


def older_files(folder, base, added, form):
    """vocab.json and merges.txt in place of tokenizer.json, as Dream and Fast-dLLM v2 have them."""
    core = json.loads(base.backend_tokenizer.to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(core["vocab"]))
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in core["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer.json").unlink()
    first = len(core["vocab"])
    settings |= {
        "tokenizer_class": "DreamTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_dream.X", None]},
    }
    settings.pop("added_tokens_decoder", None)
    if form == "decoder":
        entry = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
        settings["added_tokens_decoder"] = {
            str(first + i): {"content": token, **entry} for i, token in enumerate(added)
        }
    else:
        (folder / "added_tokens.json").write_text(json.dumps({t: first + i for i, t in enumerate(added)}))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize("name", ["dream", "fast-dllm-v2", "sdar", "a2d"])
@pytest.mark.parametrize("form", ["decoder", "added_tokens"])
def test_older_files_give_the_same_tokens(tmp_path, base, name, form):
    layout = LAYOUTS[name]()
    one, two = (layout.write(tmp_path / part, base) for part in ("one", "two"))
    _, expected = load_model(one, device="cpu")
    ids = range(len(base), len(expected))
    older_files(two, base, [expected.convert_ids_to_tokens(i) for i in ids], form)
    model, tokenizer = load_model(two, device="cpu")
    assert tokenizer.mask_token_id == expected.mask_token_id == model.config.mask_token_id
    assert len(tokenizer) == len(expected)
    talk = [{"role": "user", "content": "Name two fruits, please."}]
    assert encode_prompt(tokenizer, talk) == encode_prompt(expected, talk)


def test_templates_that_ask_for_thinking_are_answered(tmp_path, base):
    folder = LAYOUTS["a2d"]().write(tmp_path / "public", base)
    _, tokenizer = load_model(folder, device="cpu")
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "x"}], tokenize=False, add_generation_prompt=True
    )
    assert text.endswith("thought")


def test_mdlm_begins_where_its_training_rows_began(tmp_path, base):
    folder = LAYOUTS["mdlm"]().write(tmp_path / "public", base)
    model, tokenizer = load_model(folder, device="cpu")
    ids = encode_prompt(tokenizer, [{"role": "user", "content": "One"}])
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:]) == "One"
    assert model.config.mask_token_id == model.config.vocab_size - 1
