import pytest
from datasets import Dataset

from dlm.data.encode import encode_rows
from dlm.data.rows import features
from dlm.errors import DataError
from dlm.tokenizer import as_messages, encode_prompt, encode_text


def dataset(*pairs):
    prompts = [[{"role": "user", "content": p}] if p else [] for p, _ in pairs]
    return Dataset.from_dict({"prompt": prompts, "answer": [a for _, a in pairs]}, features=features())


def test_the_boundary_is_exactly_what_inference_uses(tokenizer):
    encoded, report = encode_rows(dataset(("Count from 3 to 5.", "3 4 5")), tokenizer, 64)
    row = encoded[0]
    prompt = encode_prompt(tokenizer, as_messages("Count from 3 to 5."))
    assert row["input_ids"][: row["prompt_length"]] == prompt
    assert row["input_ids"][row["prompt_length"] :] == [
        *encode_text(tokenizer, "3 4 5"),
        tokenizer.eos_token_id,
    ]
    assert tokenizer.decode(row["input_ids"]) == (
        "<|im_start|>user\nCount from 3 to 5.<|im_end|>\n<|im_start|>assistant\n3 4 5<|im_end|>"
    )
    assert report.kept == 1


def test_dropped_and_truncated_rows_are_counted(tokenizer):
    long = "cat dog " * 60
    rows = dataset(("a", "b"), ("a", "  "), (long, "b"), ("a", long), ("c", ""))
    encoded, report = encode_rows(rows, tokenizer, 48)
    assert report.as_dict() == {
        "read": 5, "kept": 2, "dropped_empty": 2, "dropped_long_prompt": 1, "truncated": 1,
    }  # fmt: skip
    assert max(encoded["length"]) == 48
    assert "2 dropped (empty answer)" in str(report)
    with pytest.raises(DataError, match="none of the 1 rows"):
        encode_rows(dataset(("a", "")), tokenizer, 48)


def test_plain_text_loses_nothing(tokenizer):
    text = "The dog is happy. " * 30
    encoded, report = encode_rows(dataset(("", text)), tokenizer, 40)
    ids = [i for row in encoded["input_ids"] for i in row]
    assert ids == [*encode_text(tokenizer, text), tokenizer.eos_token_id]
    assert set(encoded["prompt_length"]) == {0}
    assert report.truncated == 0


def test_special_tokens_in_a_message_are_text(tokenizer):
    plain = encode_prompt(tokenizer, as_messages("hello"))
    tricky = encode_prompt(tokenizer, as_messages("hello <|mask|><|im_end|>"))
    assert tokenizer.mask_token_id not in tricky
    assert tricky.count(tokenizer.eos_token_id) == plain.count(tokenizer.eos_token_id) == 1
    assert "hello <|mask|><|im_end|>" in tokenizer.decode(tricky)
    assert tokenizer.mask_token_id not in encode_text(tokenizer, "a <|mask|> b")


def test_control_tokens_that_are_not_in_the_special_map_are_text_too(tokenizer):
    import copy

    from tokenizers import AddedToken

    other = copy.deepcopy(tokenizer)
    other.add_tokens([AddedToken("<|tool|>", special=True)])
    control = other.convert_tokens_to_ids("<|tool|>")
    assert control not in encode_prompt(other, as_messages("use <|tool|> now"))


def test_the_cache_knows_which_token_ends_an_answer(tokenizer):
    import copy

    other = copy.deepcopy(tokenizer)
    other.eos_token = "<|im_start|>"
    rows = dataset(("Count", "1 2 3"))
    first, _ = encode_rows(rows, tokenizer, 32)
    second, _ = encode_rows(rows, other, 32)
    assert first[0]["input_ids"][-1] == tokenizer.eos_token_id
    assert second[0]["input_ids"][-1] == other.eos_token_id != tokenizer.eos_token_id
