import pytest

from dlm.repetition import repetition, stutter


def test_repetition_is_the_share_of_ngrams_seen_before():
    assert repetition("a b c d a b c d") == pytest.approx(1 / 5)  # 5 grams of 4, the last one is the first
    assert repetition("a a a a a a") == pytest.approx(2 / 3)
    assert repetition("a b a b", n=2) == pytest.approx(1 / 3)
    assert repetition("a b c") == 0
    assert repetition("") == 0


def test_stutter_is_the_share_of_words_equal_to_the_one_before():
    assert stutter("the the cat sat sat sat") == pytest.approx(3 / 5)
    assert stutter("a b a b") == 0
    assert stutter("one") == stutter("") == 0
