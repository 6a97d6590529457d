"""Noise in blocks: the pass over noisy and clean rows, and the bound that it gives."""

import itertools

import pytest
import torch

from dlm.attention import Sight
from dlm.errors import ConfigError
from dlm.model import IGNORE
from dlm.noising import Blocks, add_eval_noise, add_noise
from dlm.objective import weighted_loss
from dlm.schedule import Cosine


def batch_of(ids, start, width=None):
    """A batch of rows of equal length with prompts of `start` tokens."""
    place = torch.arange(ids.shape[1])
    real = (place < (width or ids.shape[1])).expand(ids.shape)
    return {
        "input_ids": ids, "attention_mask": real, "maskable": real & (place >= start),
        "loss_mask": real & (place >= start), "row": torch.arange(len(ids)),
    }  # fmt: skip


@pytest.fixture(
    params=[(False, True, False), (True, True, False), (True, False, False), (True, True, True)],
    ids=["no shift", "lead", "no lead", "causal context"],
)
def blocked(request, model):
    model.config.block_size = 4
    model.config.shift, model.config.block_lead, model.config.causal_context = request.param
    return model


@torch.no_grad()
@pytest.mark.parametrize("first", [0, 6])
def test_all_blocks_at_once_are_each_behind_its_clean_past(blocked, tokenizer, first):
    torch.manual_seed(0)
    mask, size, real = tokenizer.mask_token_id, 4, 12
    clean = torch.randint(5, len(tokenizer), (2, 14))
    noisy = clean.masked_fill(torch.rand(clean.shape) < 0.5, mask)
    valid = torch.ones_like(clean, dtype=torch.bool)
    valid[1, real:] = False
    together = blocked.hidden_beside(noisy, clean, valid, first)
    for row, length in ((0, 14), (1, real)):
        for begin in range(first // size * size, length, size):
            alone = clean[row : row + 1, :length].clone()
            alone[:, begin : begin + size] = noisy[row, begin : min(begin + size, length)]
            if blocked.config.causal_context and mask not in alone[0, begin : begin + size]:
                continue  # nothing is predicted there; alone it would be finished
            expected = blocked.hidden(alone)[0, begin : begin + size]
            got = together[row, begin : min(begin + size, length)]
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_local_layers_see_no_further_beside_clean_rows(model):
    from dlm.attention import BesideClean

    torch.manual_seed(0)
    sight = Sight(reach=2, block_size=4)
    positions = torch.cat([torch.arange(8), torch.arange(4)])
    layout = BesideClean.of(sight, positions, 8, torch.ones(1, 12, dtype=torch.bool))
    q, k, v = torch.randn(3, 1, 1, 12, 8)
    out = layout.attend(0, q, k, v, None, sight)[0, :, 0]
    seen = [(False, 4), (False, 5), (False, 6), (True, 2), (True, 3)]  # by the noisy position 4
    index = [place + (8 if clean else 0) for clean, place in seen]
    weights = (q[0, 0, 4] @ k[0, 0, index].T / 8**0.5).softmax(0)
    torch.testing.assert_close(out[4], weights @ v[0, 0, index])


def nelbo_of_blocks(model, ids, start, mask):
    """The bound of one row by enumeration: every block behind its clean past, orders equally likely."""
    size, n = model.config.block_size, len(ids)
    total = 0.0
    for begin in range(start // size * size, n, size):
        cells = [i for i in range(begin, min(begin + size, n)) if i >= start]
        row = ids[: min(begin + size, n)]
        if model.spec.leads and cells[0] == begin:
            total -= logp(model, row, cells, begin, ids, mask)
            cells = cells[1:]
        for count in range(1, len(cells) + 1):
            sets = list(itertools.combinations(cells, count))
            nats = [-sum(logp(model, row, list(masked), i, ids, mask) for i in masked) for masked in sets]
            total += sum(nats) / len(nats) / count
    return total


@torch.no_grad()
def logp(model, row, masked, position, ids, mask):
    noisy = row.clone()
    noisy[masked] = mask
    logits = model(input_ids=noisy[None]).logits[0, position].double()
    return float(logits.log_softmax(-1)[ids[position]])


def losses(model, make, batch, count):
    """Mean loss of the rows, over draws of `make`."""
    totals = []
    for draw in range(count):
        noised = make(draw)
        cells = noised["targets"] != IGNORE
        with torch.no_grad():
            out = model(
                input_ids=noised["noisy_ids"], attention_mask=batch["attention_mask"],
                targets=noised["targets"], clean_ids=batch["input_ids"],
            )  # fmt: skip
        totals.append(float(weighted_loss(out.token_logp, noised["weight"][cells], len(batch["row"]))))
    values = torch.tensor(totals, dtype=torch.float64)
    return float(values.mean()), float(values.std() / len(values) ** 0.5)


@pytest.mark.parametrize("schedule", [None, Cosine()])
def test_the_loss_in_blocks_is_the_bound_of_the_enumeration(blocked, tokenizer, schedule):
    torch.manual_seed(0)
    mask, start = tokenizer.mask_token_id, 3
    ids = torch.randint(5, len(tokenizer), (11,))
    exact = nelbo_of_blocks(blocked, ids, start, mask)
    batch = batch_of(ids.expand(256, -1), start)
    blocks = Blocks.of(blocked.spec)
    slots = torch.arange(256)

    mean, error = losses(
        blocked, lambda step: add_noise(batch, slots, 256, 0, step, mask, schedule, blocks), batch, 60
    )
    assert error < 0.01 * exact
    assert mean == pytest.approx(exact, abs=4 * error + 2e-3 * exact)  # the schedule ends a little early

    mean, error = losses(blocked, lambda draw: add_eval_noise(batch, draw, 12, mask, blocks), batch, 12)
    assert mean == pytest.approx(exact, rel=0.01)


def test_the_measured_bound_is_the_sum_over_blocks(blocked, tokenizer):
    from eval.nelbo import bounds

    torch.manual_seed(0)
    ids = torch.randint(5, len(tokenizer), (11,))
    exact = nelbo_of_blocks(blocked, ids, 3, tokenizer.mask_token_id)
    (bound,) = bounds(blocked, [(ids[:3].tolist(), ids[3:].tolist())], draws=16)  # all sets of 4
    assert bound.nats == pytest.approx(exact, rel=1e-5)
    assert bound.error == 0


def test_blocks_have_levels_of_their_own_and_leads_are_never_masked(tokenizer):
    mask = tokenizer.mask_token_id
    batch = batch_of(torch.full((64, 40), 7), 10)
    noised = add_noise(batch, torch.arange(64), 64, 0, 0, mask, None, Blocks(8, lead=True))
    assert noised["t"].shape == (64, 40)
    assert (noised["t"][:, 16:24] == noised["t"][:, 16:17]).all()
    assert not torch.equal(noised["t"][:, 16], noised["t"][:, 24])
    for block in (16, 24, 32):  # stratified in each block
        assert noised["t"][:, block].double().mean() == pytest.approx(0.5, abs=1 / 64)
    leads = torch.zeros(40, dtype=torch.bool)
    leads[[16, 24, 32]] = True
    assert (noised["noisy_ids"][:, leads] != mask).all()
    assert (noised["targets"][:, leads] == 7).all()
    assert (noised["weight"][:, leads] == 1).all()
    others = (noised["targets"] != IGNORE) & ~leads
    assert (noised["noisy_ids"][others] == mask).all()


def test_models_without_blocks_have_no_clean_past(model):
    ids = torch.ones(1, 4, dtype=torch.int64)
    with pytest.raises(ConfigError, match="every position of this model sees its whole row"):
        model(input_ids=ids, clean_ids=ids)
