"""Padding to recorded shapes; the recording itself needs a GPU."""

import torch
import torch._dynamo.testing

from decoding.canvas import Row, make_canvas
from decoding.step import denoise
from dlm.graphs import STEP, BucketedModel, bucket
from tests.decoding.rig import plan_of
from tests.dlm.test_attention import MASK, tiny


def test_shapes_are_few():
    assert bucket(1, 1, 999) == (1, STEP)
    assert bucket(3, STEP, 999) == (4, STEP)
    assert bucket(8, STEP + 1, 999) == (8, 2 * STEP)
    assert bucket(8, STEP + 1, STEP + 5) == (8, STEP + 5)  # no position beyond those of the model
    assert len({bucket(b, n, 999) for b in range(1, 33) for n in range(1, 513)}) == 6 * 8


def test_padding_and_earlier_calls_leave_no_trace():
    model = tiny(shift=True)
    graphed = BucketedModel(model)
    for rows, length in ((2, 30), (1, 7), (3, 64), (2, 70), (1, 5)):
        ids = torch.randint(0, 60, (rows, length))
        mask = torch.arange(length) < torch.randint(3, length + 1, (rows, 1))
        with torch.no_grad():
            torch.testing.assert_close(graphed.hidden(ids), model.hidden(ids))
            torch.testing.assert_close(graphed.hidden(ids, mask)[mask], model.hidden(ids, mask)[mask])
    assert set(graphed.recorded) == {(2, STEP), (1, STEP), (4, STEP), (2, 2 * STEP)}
    assert graphed.config is model.config
    assert not hasattr(graphed, "packed_hidden")


def test_texts_are_those_of_the_model():
    model = tiny()
    plan = plan_of("conv", 8, mask=MASK, fit=40)
    rows = [Row([7] * (3 + i) + [MASK] * (length - 3 - i), 3 + i) for i, length in enumerate((40, 31, 22))]
    texts = []
    for each in (model, BucketedModel(model)):
        canvas = make_canvas(rows, range(3), plan)
        with torch.inference_mode():
            for _ in denoise(each, canvas, plan):
                pass
        texts.append(canvas.ids)
    assert torch.equal(*texts)


def test_a_compiled_model_is_compiled_once_for_a_shape():
    model = tiny()
    plain = tiny()
    counted = torch._dynamo.testing.CompileCounter()
    model.backbone.compile(backend=counted, dynamic=False)
    bucketed = BucketedModel(model, graphs=False)
    with torch.no_grad():
        for length in (9, 30, 64, 5, 41):
            ids = torch.randint(0, 60, (2, length))
            torch.testing.assert_close(bucketed.hidden(ids), plain.hidden(ids))
        first = counted.frame_count
        bucketed.hidden(torch.randint(0, 60, (2, 65)))
    assert first >= 1
    assert counted.frame_count <= 2 * first
