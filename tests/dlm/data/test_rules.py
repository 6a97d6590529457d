import pytest

from dlm.data.rules import RULE_TASKS, SPLITS, Example, is_right, make_examples, rule_rows


def test_examples_are_seeded_and_their_own_answers_are_right():
    examples = make_examples(400, seed=1)
    assert examples == make_examples(400, seed=1)
    assert examples != make_examples(400, seed=2)
    assert {e.task for e in examples} == set(RULE_TASKS)
    assert all(is_right(e, e.answer) for e in examples)
    assert max(len(e.answer.split()) for e in examples) >= 40
    assert len(rule_rows(8)) == 8


@pytest.mark.parametrize(
    ("task", "instruction", "good", "bad"),
    [
        (
            "count", "Anna counts from 2 to 4.", ["Anna counts: 2 3 4"],
            ["2 3 4", "Ben counts: 2 3 4", "Anna counts: 2 3", "Anna counts: 2 3 4 5",
             "Anna counts: 2 4 3", ""],
        ),
        (
            "spell", "Spell bread and sugar.", ["Spell: b r e a d, s u g a r"],
            ["b r e a d, s u g a r", "Spell: b r e a d", "Spell: s u g a r, b r e a d",
             "Spell: bread, sugar"],
        ),
        (
            "climb", "Ben climbs from 7 to 12 in steps of 1 or 2.",
            ["Ben climbs: 7 8 10 12", "Ben climbs: 7 9 10 11 12"],
            ["7 8 10 12", "Anna climbs: 7 8 10 12", "Ben climbs: 7 8 10", "Ben climbs: 8 10 12",
             "Ben climbs: 7 7 8 10 12", "Ben climbs: 7 10 12", "Ben climbs: 7 9 11 13",
             "Ben climbs: 7 8 x 12",
             "Ben climbs:", ""],
        ),
        (
            "meet", "Tell how Anna meets the cat.",
            ["First Anna feeds the cat at home. Then Anna draws the cat outside. "
             "Later Anna finds the cat by the river. Finally Anna calls the cat near the old bridge."],
            ["First Anna feeds the cat at home.",
             "First Ben feeds the cat at home. Then Anna draws the cat outside. "
             "Later Anna finds the cat by the river. Finally Anna calls the cat near the old bridge.",
             "First Anna feeds the cat at home. Then Anna draws the dog outside. "
             "Later Anna finds the cat by the river. Finally Anna calls the cat near the old bridge.",
             "First Anna feeds the cat at home. Later Anna draws the cat outside. "
             "Then Anna finds the cat by the river. Finally Anna calls the cat near the old bridge.",
             "First Anna feeds the cat at home. Then Anna draws the the cat outside. "
             "Later Anna finds the cat by the river. Finally Anna calls the cat near the old bridge.", ""],
        ),
    ],
)  # fmt: skip
def test_answers_are_checked(task, instruction, good, bad):
    for answer in good:
        assert is_right(Example(task, instruction, ""), answer), answer
    for answer in bad:
        assert not is_right(Example(task, instruction, ""), answer), answer


def test_no_instruction_is_in_two_splits():
    seen = {split: {e.instruction for e in make_examples(2000, 3, split)} for split in SPLITS}
    assert not seen["train"] & seen["test"]
    assert not seen["train"] & seen["validation"]
    assert not seen["validation"] & seen["test"]
    for split in SPLITS:
        by_task = {
            task: {e.instruction for e in make_examples(2000, 3, split) if e.task == task}
            for task in RULE_TASKS
        }
        assert min(map(len, by_task.values())) >= 4, by_task
    with pytest.raises(ValueError, match="'tset'. Did you mean 'test'"):
        make_examples(3, split="tset")
