"""ReMDM-loop's share of masks, against the chain of one position."""

import math

import pytest
import torch

from decoding import Decoder
from decoding.reveal import Remask
from decoding.step import denoise
from decoding.tokens import TokenRule
from decoding.window import Full
from tests.decoding.rig import canvas_of, plan_of

P = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05, 0.0, 0.0])
"""The model's distribution at every position; then the mask, and an end that never comes."""
MASK, EOS, LENGTH, STEPS = 5, 6, 2_000, 100


class Constant:
    """A model that says the same everywhere, so that positions do not depend on each other."""

    def __init__(self):
        from types import SimpleNamespace

        self.config = SimpleNamespace(mask_token_id=MASK, eos_token_id=EOS, generation=None)
        self.device = torch.device("cpu")

    def hidden(self, input_ids, attention_mask=None):
        return torch.zeros(*input_ids.shape, 1)

    def logits(self, hidden):
        return P.log().expand(*hidden.shape[:-1], -1)


def shares(rule, top_k):
    """Share of masks before each step, and the time of it."""
    decoder = Decoder(Full(), rule, TokenRule(top_k=top_k))
    plan = plan_of(decoder, STEPS, eos=EOS, mask=MASK, eos_fill=False)
    canvas = canvas_of(torch.tensor([[0] + [MASK] * LENGTH]), plan)
    out = [1.0]
    with torch.no_grad():
        for _ in denoise(Constant(), canvas, plan):
            out.append(float(canvas.masked.double().sum()) / LENGTH)
    return out


@pytest.mark.parametrize("top_k", [0, 2])
@pytest.mark.parametrize(("alpha_on", "eta"), [(0.9, 0.04), (0.7, 0.2)])
def test_the_share_of_masks_is_that_of_the_chain_and_settles_where_the_docstring_says(top_k, alpha_on, eta):
    """A mask is written with probability r·q, r = η·α_on/(1-α_on); a token is masked again with η.

    So E[m'] = m(1 - rq) + (1 - m)η, whose fixed point is η/(η + rq) = (1-α_on)/((1-α_on) + α_on·q).
    """
    rule = Remask(alpha_on=alpha_on, eta=eta)
    q = float(P.sort(descending=True).values[: top_k or None].sum())
    measured, back = shares(rule, top_k), eta * alpha_on / (1 - alpha_on) * q
    settled = (1 - alpha_on) / ((1 - alpha_on) + alpha_on * q)
    assert settled == pytest.approx(eta / (eta + back))
    assert (settled > 1 - alpha_on + 0.01) == (q < 0.99)
    loop = [k for k in range(STEPS - 1) if rule.t_off < 1 - k / STEPS <= rule.t_on]
    assert len(loop) > 40
    for k in loop:
        m, following = measured[k], measured[k + 1]
        variance = (m * back * (1 - back) + (1 - m) * eta * (1 - eta)) / LENGTH
        assert abs(following - (m * (1 - back) + (1 - m) * eta)) <= 4.5 * math.sqrt(variance) + 1e-9, k
    late = measured[loop[len(loop) // 2] : loop[-1]]
    independent = len(late) * min(1.0, eta + back)  # steps after which the chain has forgotten
    deviation = math.sqrt(settled * (1 - settled) / LENGTH / max(1.0, independent / 2))
    transient = (1 - eta - back) ** (len(loop) // 2)
    assert abs(sum(late) / len(late) - settled) <= 4.5 * deviation + transient
    assert measured[-1] == 0
