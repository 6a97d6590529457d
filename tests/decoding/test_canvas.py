from dataclasses import dataclass, field

import pytest
import torch

from decoding.canvas import Canvas, Row, make_canvas, resized
from decoding.presets import Decoder
from decoding.reveal import Quota
from decoding.window import Full
from dlm.errors import ConfigError
from tests.decoding.rig import MASK, canvas_of, decode, plan_of
from tests.fakes import FakeDenoiser


def tensors(canvas):
    return {name: value for name, value in vars(canvas).items() if isinstance(value, torch.Tensor)}


def test_rows_of_different_lengths_are_padded_and_padding_is_pinned():
    plan = plan_of("llada", 4)
    canvas = make_canvas([Row([1, 2, MASK], 1), Row([1, MASK, MASK, MASK, MASK], 1)], [0, 0], plan)
    assert canvas.valid.tolist() == [[True] * 3 + [False] * 2, [True] * 5]
    assert canvas.masked.tolist() == [[False, False, True, False, False], [False] + [True] * 4]
    assert torch.equal(canvas.pinned, ~canvas.masked)
    assert (canvas.start.tolist(), canvas.end.tolist(), canvas.answer_start.tolist()) == (
        [2, 1],
        [3, 5],
        [1, 1],
    )
    assert torch.equal(canvas.initial, canvas.masked)
    assert canvas.reveal_step.eq(-1).all()
    assert canvas.confidence.isnan().all()


def test_joined_rows_are_those_that_were_joined():
    plan = plan_of("stability", 4)
    short, long = (canvas_of(torch.tensor([[1] + [MASK] * n]), plan, [n]) for n in (3, 6))
    both = Canvas.join([short, long])
    assert len(both) == 2
    for row, part in ((0, short), (1, long)):
        width = part.ids.shape[1]
        for name, value in tensors(part).items():
            got = getattr(both, name)[row]
            got = got[:width] if value.dim() > 1 else got
            assert torch.equal(got.nan_to_num(-7), value[0].nan_to_num(-7)), name
        for name, value in part.rule_state.items():
            got = both.rule_state[name][row]
            assert torch.equal(got[:width] if value.dim() > 1 else got, value[0])
    assert both.pinned[0, 4:].all()
    assert not both.valid[0, 4:].any()


def test_rows_that_are_taken_by_number_are_copies_and_by_slice_are_views():
    canvas = canvas_of(torch.tensor([[1] + [MASK] * 3] * 2), plan_of("llada", 4))
    copy, view = canvas.take(torch.tensor([1])), canvas.take(slice(0, 1))
    canvas.ids[:, 2] = 9
    assert (copy.ids[0, 2], view.ids[0, 2]) == (MASK, 9)


def test_rows_grow_to_so_many_masks_and_not_beyond_their_end():
    plan = plan_of("llada-conv", rate=1.0, grow=True, margin=2)
    canvas = canvas_of(torch.tensor([[1] + [MASK] * 99, [1, 2] + [MASK] * 98]), plan)
    begun = canvas.masked.sum(1).tolist()
    assert begun[0] == begun[1] < 99
    rows, shut = torch.tensor([0, 1]), torch.tensor([False, True])
    versions = []
    for ahead, closed in ((begun[0], ~shut & False), (begun[0] + 3, shut), (1000, shut & False)):
        canvas.grow(rows, ahead, closed)
        versions.append(canvas.version.tolist())
        if ahead == begun[0] + 3:
            assert canvas.masked.sum(1).tolist() == [begun[0] + 3, begun[1]]
    assert canvas.valid.sum(1).tolist() == [100, 100]
    assert versions == [[0, 0], [1, 0], [2, 1]], "what was computed of a row that has grown counts no more"


def test_a_row_with_more_blocks_than_steps_is_refused():
    plan = plan_of(Decoder.named("semi-ar", block_size=4), steps=3)
    with pytest.raises(ConfigError, match="3 steps are too few for 7 blocks"):
        canvas_of(torch.tensor([[5, 5] + [MASK] * 28]), plan)


def test_a_size_that_is_there_already_costs_nothing():
    x = torch.ones(2, 3)
    assert resized(x, 2, 3) is x
    assert resized(x, 3, 4, -1).tolist() == [[1, 1, 1, -1], [1, 1, 1, -1], [-1] * 4]


@dataclass(frozen=True)
class Watching(Quota):
    """A quota that notes what it sees."""

    seen: list = field(default_factory=list, compare=False, hash=False)

    def decide(self, view):
        course = view.course()
        self.seen.append((int(view.step), view.token.clone(), view.confidence.clone(), course))
        return super().decide(view)


def test_a_rule_sees_steps_confidences_and_how_far_the_row_is():
    rule = Watching(1)
    plan = plan_of(Decoder(Full(), rule, Decoder.named("llada").tokens), 6, eos_fill=False)
    canvas = decode(FakeDenoiser(eos_bias=-50.0), torch.tensor([[1] + [MASK] * 6]), plan)
    assert [step for step, *_ in rule.seen] == list(range(6))
    assert [float(course.elapsed) for *_, course in rule.seen] == pytest.approx([i / 6 for i in range(6)])
    for step, token, confidence, course in rule.seen:
        place = int((canvas.reveal_step[0] == step).nonzero())
        assert (token[0, place], confidence[0, place]) == (canvas.ids[0, place], canvas.confidence[0, place])
        assert float(course.place[0, place]) == pytest.approx((place - 1) / 6)
