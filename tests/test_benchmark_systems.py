"""Systems side by side: figures are those of their runs, and of earlier ones as they were given."""

import pytest

from benchmarks.systems import Point, draw
from eval.answers import Answer, AnswerFile
from eval.metrics import Instruments
from eval.run import Card, finish, open_run
from eval.tasks import Question


class Even:
    """A reader and an encoder in one: what they say is given."""

    def read(self, talks, texts, label):
        return [1.0 + 0.1 * i for i in range(len(texts))]

    def relevance(self, answers, references):
        return [0.1 * i for i in range(len(answers))]


@pytest.fixture
def folder(tmp_path):
    questions = [Question(str(i), (f"{i}?",), ("It is.",)) for i in range(8)]
    card = Card("alpaca_eval", "q.json", "tiny", "runs/tiny", "abc", "conv", "conv", {})
    place = card.folder(tmp_path)
    open_run(place, card)
    said = {}
    for i, question in enumerate(questions):
        text = "a b c d a b c d e" if i == 0 else "It is so."
        said[question.id, 0] = Answer(question.id, 0, text, 4, "length" if i == 1 else "stop", 2 + i, 4)
    AnswerFile(place / "answers.jsonl").write(said.values())
    finish(place, card, questions, said, Instruments(reader=Even(), encoder=Even()))
    return place


def test_a_point_has_the_figures_of_its_run(folder):
    point = Point.of(f"mine={folder}")
    assert (point.name, point.calls) == ("mine", pytest.approx(5.5))
    assert point.relevance == pytest.approx(0.35)
    assert point.around == pytest.approx(2.3646 * 0.24495 / 8**0.5, rel=1e-3)  # Student's t, seven degrees
    assert point.repeated == pytest.approx(100 / 6 / 8)  # one of six 4-grams of one answer of eight
    assert point.row.startswith("| mine | 0.350 ± 0.205 | 2.1 % | 6 | 87.5 % | 4 | 1.35 ± ")


def test_earlier_figures_stand_beside_and_all_are_drawn(folder):
    earlier = Point.earlier("the base=0.723,0.026,63.7,8.8")
    assert earlier.row == "| the base | 0.723 ± 0.026 | 8.8 % | 64 |  |  |  |"
    (legend,) = draw([Point.of(f"mine={folder}"), earlier]).legends
    labels = [text.get_text() for text in legend.get_texts()]
    assert labels == ["mine (2.1 % repeated)", "the base (8.8 % repeated)"]
