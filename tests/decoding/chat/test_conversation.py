import json

import pytest

from decoding import Decoder
from decoding.chat.conversation import Conversation
from decoding.request import Request
from dlm.errors import ConfigError


class Scripted:
    """A source that says what it was asked; it fails where the script says so."""

    def __init__(self, room=100, fails=()):
        self.room, self.fails, self.asked = room, set(fails), []

    def stream(self, messages, request, seed=0):
        self.asked.append(([message["content"] for message in messages], request.decoder, seed))
        yield "so"
        if len(self.asked) in self.fails:
            raise RuntimeError("the model is gone")
        yield f"answer {len(self.asked)}"

    def fitted(self, messages, request):
        return list(messages)[-self.room :]

    def check(self, request):
        request.check_decoder()

    def count(self, text):
        return len(text.split())

    def decoder(self, request):
        return Decoder.named(request.decoder or "llada", **(request.options or {}))


def contents(talk):
    return [message["content"] for message in talk.messages]


def test_a_question_and_its_answer_are_kept_together():
    talk = Conversation(Scripted(), system="Be short.", seed=7)
    assert list(talk.ask("one")) == ["so", "answer 1"]
    assert list(talk.ask("two")) == ["so", "answer 2"]
    assert contents(talk) == ["one", "answer 1", "two", "answer 2"]
    assert talk.source.asked[1] == (["Be short.", "one", "answer 1", "two"], None, 7)


@pytest.mark.parametrize("how", ["error", "closed"])
def test_an_answer_that_ends_early_leaves_the_messages_as_they_were_and_can_be_asked_again(how):
    talk = Conversation(Scripted(fails=[2] if how == "error" else []))
    list(talk.ask("one"))
    answer = talk.ask("two")
    if how == "error":
        with pytest.raises(RuntimeError, match="gone"):
            list(answer)
    else:
        next(answer)
        answer.close()
    assert contents(talk) == ["one", "answer 1"]
    list(talk.retry())
    assert contents(talk) == ["one", "answer 1", "two", "answer 3"]


def test_a_retry_replaces_the_answer_under_another_seed():
    talk = Conversation(Scripted(), seed=3)
    with pytest.raises(ConfigError, match="nothing has been asked"):
        talk.retry()
    for text in ("one", "two"):
        list(talk.ask(text))
    list(talk.retry())
    list(talk.retry())
    assert contents(talk) == ["one", "answer 1", "two", "answer 4"]
    assert talk.source.asked[-1] == (["one", "answer 1", "two"], None, 5)
    list(talk.ask("three"))
    assert talk.source.asked[-1][2] == 3
    talk.clear()
    assert talk.messages == []
    with pytest.raises(ConfigError, match="nothing has been asked"):
        talk.retry()


def test_messages_that_have_no_room_are_counted_and_kept():
    talk = Conversation(Scripted(room=3))
    for text in ("one", "two", "three"):
        list(talk.ask(text))
    assert talk.forgotten == 2
    assert talk.source.asked[-1][0] == ["two", "answer 2", "three"]
    assert len(talk.messages) == 6


def test_a_decoder_that_cannot_be_leaves_the_old_one():
    talk = Conversation(Scripted(), Request(max_tokens=9))
    talk.decode_with("conv", {"kernel_size": 9})
    with pytest.raises(ConfigError, match="Did you mean 'conv'"):
        talk.decode_with("cnov", None)
    assert talk.request == Request(decoder="conv", options={"kernel_size": 9}, max_tokens=9)
    list(talk.ask("one"))
    assert talk.source.asked[0][1] == "conv"


def test_a_saved_conversation_is_read_as_training_rows(tmp_path):
    from dlm.data.rows import load_rows

    talk, file = Conversation(Scripted(), system="Be short."), tmp_path / "talk.jsonl"
    assert talk.save(file) == 0
    list(talk.ask("one"))
    talk.clear()
    list(talk.ask("zwölf \N{SLIGHTLY SMILING FACE}"))
    list(talk.ask("three"))
    assert talk.save(file) == 2
    first, second = [json.loads(line)["messages"] for line in file.read_text("utf-8").splitlines()]
    assert [message["role"] for message in first] == ["system", "user", "assistant"]
    assert [m["content"] for m in second[1:]] == [m["content"] for m in talk.messages]
    assert [path.name for path in tmp_path.iterdir()] == ["talk.jsonl"]
    assert len(load_rows(str(file))) >= 2
