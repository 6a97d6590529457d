"""Axis 2 of a decoder, the reveal rule: which masked positions get their token in this step.

One file a rule; `base` says what a rule is asked, shown and answers.
"""

from decoding.reveal.ancestral import Ancestral, first_arrivals, reveal_probability
from decoding.reveal.base import Decision, Evidence, RevealRule, StepView
from decoding.reveal.dilated import Dilated
from decoding.reveal.editing import Editing
from decoding.reveal.entropy_bound import EntropyBound
from decoding.reveal.process_reward import ProcessReward
from decoding.reveal.quota import OwnPaced, Quota
from decoding.reveal.remask import Remask
from decoding.reveal.separated import Separated
from decoding.reveal.stability import Stability
from decoding.reveal.threshold import Threshold
from decoding.reveal.verified import Verified, WideIn

__all__ = [
    "Ancestral",
    "Decision",
    "Dilated",
    "Editing",
    "EntropyBound",
    "Evidence",
    "OwnPaced",
    "ProcessReward",
    "Quota",
    "Remask",
    "RevealRule",
    "Separated",
    "Stability",
    "StepView",
    "Threshold",
    "Verified",
    "WideIn",
    "first_arrivals",
    "reveal_probability",
]
