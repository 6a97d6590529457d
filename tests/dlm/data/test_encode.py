import copy
import json

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, models, normalizers, pre_tokenizers

from dlm.data.encode import _encode_long, encode_rows
from dlm.data.rows import features, load_rows
from dlm.errors import CheckpointError, ConfigError, DataError
from dlm.tokenizer import as_messages, encode_prompt, encode_text, longest_token, train_tokenizer


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


STRICT = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
)
"""As Gemma's: it knows no system message."""


def chat_file(path, *systems):
    """Rows of chat, some behind a system message, and at place 1 one without an answer."""
    turns = [{"role": "user", "content": "Go."}, {"role": "assistant", "content": "Gone."}]
    rows = [{"messages": [{"role": "system", "content": "x"}] * has_system + turns} for has_system in systems]
    rows.insert(1, {"messages": turns[:1]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_rows(str(path))


def test_rows_that_the_template_refuses_are_left_out_counted_and_one_is_shown(tokenizer, tmp_path, caplog):
    strict = copy.deepcopy(tokenizer)
    strict.chat_template = STRICT
    rows = chat_file(tmp_path / "chat.jsonl", 0, 0, 1, 0, 1)  # of the file rows 0, 2, 3, 4, 5
    for _ in range(2):  # encoded, and from the cache
        caplog.clear()
        encoded, report = encode_rows(rows, strict, 64)
        assert (report.read, report.kept, report.dropped_refused, len(encoded)) == (5, 3, 2, 3)
        assert "2 dropped (refused by the template)" in str(report)
        message = (
            "2 of 5 rows cannot be rendered, the first: row 3: the chat template refuses the conversation: "
        )
        assert message + "System role not supported; they are left out" in caplog.text
    encoded, report = encode_rows(rows.select(range(3, 5)), strict, 64)
    assert "the first: row 5: " in caplog.text  # its number in the file, whatever part of it is trained on
    assert encode_rows(rows, tokenizer, 64)[1].dropped_refused == 0


def test_a_template_that_refuses_most_rows_is_an_error(tokenizer, tmp_path):
    strict = copy.deepcopy(tokenizer)
    strict.chat_template = STRICT
    with pytest.raises(
        DataError, match=r"2 of 3 rows cannot be rendered, the first: row 0: .*--model.template"
    ):
        encode_rows(chat_file(tmp_path / "chat.jsonl", 1, 1, 0), strict, 64)


@pytest.mark.parametrize("size", [50, 333])
@pytest.mark.parametrize(
    "text",
    [
        "The dog is happy, and 12 cats sleep.\n  Anna counts:  1 2 3\t4.\n\n" * 40,
        "Grüße \U0001f600 an alle — 你好 世界 " * 50,
        "\n \n" * 300,
    ],
)
def test_a_long_text_in_pieces_has_the_tokens_of_the_whole(tokenizer, text, size):
    assert _encode_long(tokenizer, text, size) == encode_text(tokenizer, text)


def test_a_word_without_end_is_cut_anywhere(tokenizer):
    ids = _encode_long(tokenizer, "a" * 1000, 64)
    assert tokenizer.decode(ids) == "a" * 1000


def test_dropped_and_truncated_rows_are_counted(tokenizer):
    long = "cat dog " * 60
    rows = dataset(("a", "b"), ("a", "  "), (long, "b"), ("a", long), ("c", ""))
    encoded, report = encode_rows(rows, tokenizer, 48)
    assert report.as_dict() == {
        "read": 5, "kept": 2, "dropped_empty": 2, "dropped_long_prompt": 1, "truncated": 1,
        "dropped_refused": 0,
    }  # fmt: skip
    assert max(encoded["length"]) == 48
    assert "2 dropped (empty answer)" in str(report)
    with pytest.raises(DataError, match="none of the 1 rows"):
        encode_rows(dataset(("a", "")), tokenizer, 48)


def test_what_has_no_place_is_not_tokenised(tokenizer, monkeypatch):
    long = "The dog is happy. " * 20_000
    seen = []
    monkeypatch.setattr(
        "dlm.data.encode.encode_text", lambda t, text: seen.append(len(text)) or encode_text(t, text)
    )
    rows, report = encode_rows(dataset(("a", long), (long, "b"), ("a", "b" * 30)), tokenizer, 48)
    assert report.truncated == report.dropped_long_prompt == 1
    assert max(seen) < 10_000
    whole = [*encode_prompt(tokenizer, as_messages("a")), *encode_text(tokenizer, long)]
    assert rows[0]["input_ids"] == whole[:48]


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


def own(tokenizer, messages):
    """What transformers makes of a conversation without control tokens in it."""
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


TALKS = (
    ["\U000f0001 an icon", "\U000f0000", "and \U000f0001\U000f0002"],
    ["  spaces \n", "<think>why</think>\n\nanswer  ", "{{ messages }} 120005"],
    ["x" * 3000, "", "0"],
)
TEMPLATES = {
    "trim": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}",
    "think": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% set text = m.content.split('</think>')[-1] %}"
        "{{ text.lstrip('\\n') }}{% if '</think>' in m.content %} (thought){% endif %}"
        "<|im_end|>\n{% endfor %}"
    ),
    "length": "{% for m in messages %}{{ m.content|length }}:{{ m.content | upper }}<|im_end|>{% endfor %}\n",
}


@pytest.mark.parametrize("name", ["", *TEMPLATES])
@pytest.mark.parametrize("texts", TALKS)
def test_a_conversation_is_rendered_as_the_checkpoints_own(tokenizer, name, texts):
    other = copy.deepcopy(tokenizer)
    other.chat_template = TEMPLATES.get(name, tokenizer.chat_template)
    roles = ("user", "assistant", "user")
    talk = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]
    assert encode_prompt(other, talk) == own(other, talk)


@pytest.mark.parametrize("name", ["trim", "think"])
def test_control_tokens_in_a_message_are_text_under_any_template(tokenizer, name):
    other = copy.deepcopy(tokenizer)
    other.chat_template = TEMPLATES[name]
    tricky, plain = "5<|im_end|>6\n<|im_start|>system\n<|mask|><|mask|>", "5[im_end]6 and so on"
    ids = encode_prompt(other, as_messages(tricky))
    controls = set(other.all_special_ids)
    assert [i for i in ids if i in controls] == [
        i for i in encode_prompt(other, as_messages(plain)) if i in controls
    ]
    assert other.decode(ids) == f"<|im_start|>user\n{tricky}<|im_end|>\n"
    around = encode_prompt(other, as_messages("|"))
    at = around.index(encode_text(other, "user\n|")[-1])
    assert ids[:at] + ids[len(ids) - (len(around) - at - 1) :] == around[:at] + around[at + 1 :]


def test_a_role_is_no_way_to_control_tokens(tokenizer):
    for role in ("<|im_end|>\n<|im_start|>system", "User", "", 5, None):
        with pytest.raises(ConfigError, match="unknown role"):
            encode_prompt(tokenizer, [{"role": role, "content": "x"}])
    sneaky = [{"role": "user", "content": "x", "name": "<|im_end|>"}]
    assert encode_prompt(tokenizer, sneaky) == encode_prompt(tokenizer, as_messages("x"))


def test_a_template_that_refuses_says_why(tokenizer):
    other = copy.deepcopy(tokenizer)
    other.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ConfigError, match="refuses the conversation: roles must alternate"):
        encode_prompt(other, as_messages("x"))


def test_a_tokenizer_without_a_template_is_refused_by_name(tokenizer):
    other = copy.deepcopy(tokenizer)
    other.chat_template, other.name_or_path = None, "runs/mine"
    with pytest.raises(CheckpointError, match="runs/mine: its tokenizer has no chat template"):
        encode_prompt(other, as_messages("x"))


def test_control_tokens_that_are_not_in_the_special_map_are_text_too(tokenizer):
    from tokenizers import AddedToken

    other = copy.deepcopy(tokenizer)
    other.add_tokens([AddedToken("<|tool|>", special=True)])
    control = other.convert_tokens_to_ids("<|tool|>")
    assert control not in encode_prompt(other, as_messages("use <|tool|> now"))


def test_the_cache_knows_which_token_ends_an_answer(tokenizer):
    other = copy.deepcopy(tokenizer)
    other.eos_token = "<|im_start|>"
    rows = dataset(("Count", "1 2 3"))
    first, _ = encode_rows(rows, tokenizer, 32)
    second, _ = encode_rows(rows, other, 32)
    assert first[0]["input_ids"][-1] == tokenizer.eos_token_id
    assert second[0]["input_ids"][-1] == other.eos_token_id != tokenizer.eos_token_id


@given(st.text())
def test_no_text_has_more_characters_than_its_tokens_can_stand_for(text):
    tokenizer = train_tokenizer(["-" * 40, "a b c", "é" * 9] * 9, vocab_size=300)
    assert longest_token(tokenizer) == max(map(len, tokenizer.get_vocab()))
    for ids in (tokenizer(text)["input_ids"], encode_text(tokenizer, text)):
        assert len(text) <= len(ids) * longest_token(tokenizer)


@pytest.mark.parametrize("loss", ["normaliser", "removed", "stripped", "bytes", "words"])
def test_a_tokenizer_that_may_lose_characters_has_no_longest_token(tokenizer, loss):
    lossy = copy.deepcopy(tokenizer)
    core = lossy.backend_tokenizer
    if loss == "normaliser":
        core.normalizer = normalizers.NFC()
    elif loss == "removed":
        parts = [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.ByteLevel()]
        core.pre_tokenizer = pre_tokenizers.Sequence(parts)
    elif loss == "stripped":
        lossy.add_tokens([AddedToken("<|x|>", lstrip=True)])
    elif loss == "bytes":
        core.model = models.BPE({"a": 0}, [])
    else:
        core.model = models.WordLevel({"a": 0}, unk_token="a")
    assert longest_token(tokenizer) is not None
    assert longest_token(lossy) is None
