"""Tasks whose tokens depend on each other, and the area under accuracy over tokens per call."""

import itertools
import math
import random

import pytest

from eval.parallel import PARALLEL_TASKS, Point, accuracy_under_parallelism, examples, solves
from eval.tasks import load_questions


@pytest.mark.parametrize("task", PARALLEL_TASKS)
def test_references_are_right_and_neighbours_of_them_are_not(task):
    rng = random.Random(3)
    for name, instruction, answer in examples(140, seed=1):
        if name != task:
            continue
        assert solves(task, instruction, answer, answer)
        assert solves(task, instruction, answer, f"  {answer}\n")
        words = answer.split()
        place = rng.randrange(len(words) - 1)
        twice = [*words[: place + 1], words[place], *words[place + 1 :]]  # a word is repeated
        missing = words[:place] + words[place + 1 :]
        assert not solves(task, instruction, answer, " ".join(twice))
        if task != "sentence" or words[place] in instruction.split("words ")[1].strip(".").split(", "):
            assert not solves(task, instruction, answer, " ".join(missing))
        assert not solves(task, instruction, answer, "")


def test_other_right_answers_count():
    square = "A B C D B A D C C D A B D C B A"
    assert solves("latin", "", "", square)
    assert not solves("latin", "", "", square.replace("A B C D", "A B D C", 1))
    assert solves("latin", "", "", square.replace(" ", "")), "letters may stand together"
    assert solves("latin", "", "", square.replace(" ", ", ")), "and be parted otherwise"
    assert not solves("latin", "", "", square + "\nA B C D")
    assert not solves("latin", "", "", f"Here it is:\n{square}")
    asked = "Write these words in another order: river stone cloud"
    assert solves("shuffle", asked, "stone river cloud", "cloud stone river")
    assert not solves("shuffle", asked, "stone river cloud", "river stone cloud")
    told = "Write one sentence with the words bread, cloud, stone."
    assert solves("sentence", told, "", "A cloud saw bread on a stone!")
    assert not solves("sentence", told, "", "A cloud saw bread. It was a stone.")
    assert not solves("sentence", told, "", "A cloud saw saw bread on a stone.")


def test_questions_are_the_same_each_time():
    questions = load_questions("parallel", limit=14)
    assert [q.category for q in questions[:7]] == list(PARALLEL_TASKS)
    assert questions == load_questions("parallel", limit=14)


def test_the_area_is_that_of_the_formula_by_hand():
    points = [Point(2.0, 78.0), Point(1.0, 80.0), Point(4.0, 74.0)]  # 74 is more than five points below
    expected = 80 + 0.5 * (78 * math.exp(-3 * (1 - 78 / 80)) + 80)
    assert accuracy_under_parallelism(points) == pytest.approx(expected)
    low = accuracy_under_parallelism(points, best=90.0)
    weight = [math.exp(-3 * (1 - y / 90)) for y in (80, 78)]
    assert low == pytest.approx(80 + 0.5 * (80 * weight[0] + 78 * weight[1]))
    assert accuracy_under_parallelism([Point(3.0, 50.0)]) == 150
    assert accuracy_under_parallelism([Point(1.0, 0.0), Point(2.0, 0.0)]) == 0
    with pytest.raises(ValueError, match="no points"):
        accuracy_under_parallelism([])


def test_equal_paces_count_in_any_order():
    points = [Point(1.0, 80.0), Point(1.0, 40.0), Point(2.0, 79.0)]
    areas = {accuracy_under_parallelism(list(order)) for order in itertools.permutations(points)}
    assert len(areas) == 1
