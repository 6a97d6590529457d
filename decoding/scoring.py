"""Scores of positions, the tokens drawn there, and whatever else a reveal rule asks the model for in a step.

What was found of a row is kept until the row changes, so that it is computed once. The LM head sees only the
positions that a rule asks for, and with drafts a few beside them.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping
from dataclasses import replace

import torch
from torch.nn.functional import max_pool1d

from decoding.canvas import Canvas, Rows, resized
from decoding.denoiser import (
    CachedPositions,
    Denoiser,
    StateCache,
    StateQuery,
    blocks_up_to,
    can,
    last_block,
)
from decoding.drafts import Guess
from decoding.request import Plan
from decoding.reveal.base import TOKEN_NOISE, Evidence, StepView
from dlm.errors import ConfigError
from dlm.noise import cell_noise
from dlm.shadows import Shadows
from dlm.spec import ModelSpec

_LOGIT_ROWS = 1024
"""Positions whose logits [cells, V] are held at once."""

MOST_RANKS = 4
"""Likeliest tokens of a position that drafts are made of, at most."""

FARTHEST = 3
"""Masks beside those that a rule asks for whose scores are found too, for drafts, at most."""

Work = Generator[list[StateQuery], list[torch.Tensor], None]
"""Work that stops where it needs hidden states, and goes on with them: [N, D] for each of its queries."""


def guided(logits: torch.Tensor, unconditional: torch.Tensor, guidance: float) -> torch.Tensor:
    """Classifier-free guidance: log p + g · (log p - log p without the prompt), [N, V] float32, unnormalised.

    g = 0 is the model itself; larger values favour what the prompt makes likelier (arXiv 2207.12598).
    """
    with_prompt, without_prompt = logits.float().log_softmax(1), unconditional.float().log_softmax(1)
    mixed = with_prompt + guidance * (with_prompt - without_prompt)
    return torch.where(with_prompt > -math.inf, mixed, -math.inf)


class Scorer:
    """Asks the model about the rows of a canvas, and keeps what it said.

    Args:
        model: computes the logits; hidden states come from whoever does the work.
        canvas: the rows.
        plan: how they are decoded.
    """

    def __init__(self, model: Denoiser, canvas: Canvas, plan: Plan) -> None:
        self.model, self.canvas, self.plan = model, canvas, plan
        self.rule, self.tokens = plan.decoder.reveal, plan.decoder.tokens
        self.entries, self.verified = CachedPositions(canvas), CachedPositions(canvas)
        self.token = torch.zeros_like(canvas.ids)  # [B, L] to be written, where there is an entry
        self.probability = torch.zeros(canvas.ids.shape)  # [B, L] of that token
        self.score = torch.zeros(canvas.ids.shape)  # [B, L]
        self.observed = {name: torch.zeros_like(x) for name, x in canvas.rule_state.items() if x.dim() > 1}
        self.observes: list[str] = []  # those of them that the rule finds in a call, in its order
        self.alternatives = torch.zeros_like(canvas.alternatives)  # [B, L, k, 2]
        self.leave_one_out = torch.zeros(canvas.ids.shape)  # [B, L] where `verified`
        self.ranks = min(plan.drafts, MOST_RANKS)
        self.likeliest = canvas.alternatives.new_zeros(*canvas.ids.shape, self.ranks, 2)
        """[B, L, ranks, 2] the likeliest tokens and their log-probabilities, for drafts."""
        self.conflicts = ConflictCache(canvas) if "attention" in self.rule.requires else None
        blocks = ModelSpec.of(model).visibility.block_size if can(model, "partial") else None
        self.states = [
            StateCache(canvas, plan.mask_id, blocks, unconditional=unconditional, reuse=plan.reuse)
            for unconditional in ((False, True) if plan.decoder.guidance else (False,))
        ]
        self.penalises = self.tokens.penalises

    def follow(self, canvas: Canvas, rows: torch.Tensor | None = None) -> None:
        """Go on with another canvas: `rows` of the old one, or the old one with more rows behind it."""
        self.canvas = canvas
        for cache in (self.entries, self.verified, self.conflicts, *self.states):
            if cache is not None:
                cache.follow(canvas, rows)
        for name in ("token", "probability", "score", "alternatives", "leave_one_out", "likeliest"):
            values = getattr(self, name)
            values = values if rows is None else values[rows]
            setattr(self, name, resized(values, *canvas.ids.shape))
        for name, values in self.observed.items():
            self.observed[name] = resized(values if rows is None else values[rows], *canvas.ids.shape)

    def copy(self, rows: torch.Tensor, copies: torch.Tensor) -> None:
        """Keep the hidden states of the rows [b] for their copies [b] too; the scores are of other noise."""
        for cache in self.states:
            cache.copy(rows, copies)

    # ---- what a rule asks for ------------------------------------------------------------------------

    def compute(self, rows: torch.Tensor, evidence: Evidence, guess: Guess | None = None) -> Work:
        """Find what has not been found yet of the rows [b], in one call of the model.

        Conflicts are found for all of a row at once. The results come back from the model's device in one
        piece: the one time in a step that the host waits for it. With a `guess` also what the next drafts
        are made of is found: the scores of masks beside those that are asked for.
        """
        where, verified, dependence = evidence.scored, evidence.verified, evidence.dependence
        width = where.shape[1]
        missing = where & ~self.entries.at(rows, width)
        incomplete = missing.any(1)
        if verified is not None:
            verified = verified & ~self.verified.at(rows, width)
            incomplete = incomplete | verified.any(1)
        if not bool(incomplete.any()):
            return
        where = missing if dependence is None else where
        if not bool(incomplete.all()):
            rows, where = rows[incomplete], where[incomplete]
            verified = None if verified is None else verified[incomplete]
        needed = where
        if guess is not None and len(rows) <= self.plan.drafts:
            where = where | self._beside(rows, where)
        record = shadows = None
        if dependence is not None:
            record = dependence.record(where & self.canvas.masked[rows, :width])
        if verified is not None and bool(verified.any()):
            shadows = Shadows(*verified.nonzero().unbind(1))
        extras = {False: (record, shadows), True: (None, None)}  # by whether the prompt is left out
        states = yield [
            StateQuery(cache, rows, where, *extras[cache.unconditional], guess) for cache in self.states
        ]
        results = [self._scored(rows, where, states)]
        if dependence is not None and record is not None:
            results.append(dependence.conflicts(record))
        if shadows is not None:
            results.append(self._likelihood(shadows.states, self.canvas.ids[rows, :width][verified]))
        columns, *further = _on_host(results)
        self._store(rows, where, needed, columns)
        if record is not None and self.conflicts is not None:
            self.conflicts.put(rows, record.positions, further[0] > 0)
        if verified is not None and shadows is not None:
            row, position = verified.nonzero().unbind(1)
            self.leave_one_out[rows[row], position] = further[-1].float()
            self.verified.add(rows, verified)

    def _beside(self, rows: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        """[b, W] bool, masks of the rows [b] near `where` [b, W], in blocks that are computed anyway."""
        reach = min(self.plan.drafts, FARTHEST)
        near = max_pool1d(where[:, None].float(), 2 * reach + 1, stride=1, padding=reach)[:, 0] > 0
        near &= self.canvas.masked[rows, : where.shape[1]]
        size = self.states[0].block_size
        if size is not None:
            block = torch.arange(where.shape[1]) // size
            near &= blocks_up_to(last_block(where, block), where, block)
        return near

    def with_scores(self, rows: Rows, view: StepView, evidence: Evidence) -> StepView:
        """The view of the rows [b], with what was asked for."""
        where = evidence.scored
        cells = (rows, slice(where.shape[1]))
        token = torch.where(where, self.token[cells], self.plan.mask_id)
        confidence = torch.where(where, self.probability[cells], 0)
        if evidence.constant is None:
            score = torch.where(where, self.score[cells], 0)
        else:
            score = torch.full(where.shape, evidence.constant)
        observed = {
            name: torch.where(where.view(*where.shape, *[1] * (x.dim() - 2)), x[cells], 0)
            for name, x in self.observed.items()
        }
        view = replace(view, score=score, token=token, confidence=confidence, observed=observed)
        if "shadows" not in self.rule.requires:
            return view
        has_value = self.verified.at(rows, where.shape[1])
        leave_one_out = torch.where(has_value, self.leave_one_out[cells], torch.inf)
        return replace(view, leave_one_out=leave_one_out)

    # ---- from states to numbers ----------------------------------------------------------------------

    def draw(
        self, rows: torch.Tensor, where: torch.Tensor, noise: torch.Tensor, states: list[torch.Tensor]
    ) -> torch.Tensor:
        """[N, draws] int64 tokens at `where` [b, W] of the rows [b], with the noise [N, draws].

        Nothing is kept. `states` are those of the positions, one for each cache.
        """
        owner, position = where.nonzero().unbind(1)
        pieces = [x.split(_LOGIT_ROWS) for x in (rows[owner], position, noise, *states)]
        drawn = []
        for row, place, uniform, *hidden in zip(*pieces, strict=True):
            logits = self._logits(row, place, *hidden)
            columns = [x.to(logits.device, non_blocking=True) for x in uniform.T]
            drawn.append(torch.stack([self.tokens.choose(logits, x).token for x in columns], 1).cpu())
        return torch.cat(drawn)

    def _scored(self, rows: torch.Tensor, where: torch.Tensor, states: list[torch.Tensor]) -> torch.Tensor:
        """[N, C] what `_columns` says of the positions `where` [b, W], of which there are the states."""
        canvas = self.canvas
        noise = cell_noise(canvas.key[rows], canvas.revision[rows], where.shape[1], TOKEN_NOISE)
        owner, position = where.nonzero().unbind(1)
        cells = [x.split(_LOGIT_ROWS) for x in (rows[owner], position, noise[where], *states)]
        pieces = [
            self._columns(self._logits(row, place, *hidden), row, place, uniform)
            for row, place, uniform, *hidden in zip(*cells, strict=True)
        ]
        return torch.cat(pieces)

    def _likelihood(self, states: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """[S] the model's probability of the tokens [S], of which shadows have the states [S, D]."""
        logp = []
        for x, y in zip(states.split(_LOGIT_ROWS), ids.split(_LOGIT_ROWS), strict=True):
            likely = self.model.logits(x).float().log_softmax(1)
            tokens = y[:, None].to(likely.device, non_blocking=True)  # the head may lie elsewhere
            logp.append(likely.gather(1, tokens)[:, 0])
        return torch.cat(logp).exp()

    def _store(
        self, rows: torch.Tensor, where: torch.Tensor, needed: torch.Tensor, columns: torch.Tensor
    ) -> None:
        """Keep what was computed at `where` [b, W]; rows for which the model returned NaN fail.

        That is, where it was `needed` [b, W]; elsewhere it counts as not found.
        """
        bad = columns[:, :2].isnan().any(1) | columns[:, 2].isnan()
        if bool(bad.any()):  # these rows fail, the others go on
            broken = torch.zeros_like(where)
            broken[where] = bad
            failed = rows[(broken & needed).any(1)]
            self.canvas.failed[failed] = self.canvas.step[failed]
            columns, where = columns[~bad | needed[where]], where & ~(broken & ~needed)
        shown, ranks = self.plan.top_logprobs, self.ranks
        size = columns.shape[1] - 2 * (shown + ranks)  # behind it, log-probabilities may be -inf
        token, probability, score, seen = columns[:, :size].nan_to_num().tensor_split([1, 2, 3], dim=1)
        row, position = where.nonzero().unbind(1)
        cells = rows[row], position
        self.token[cells], self.probability[cells] = token[:, 0].long(), probability[:, 0].float()
        self.score[cells] = score[:, 0].float()
        for name in self.observes:
            shape = self.observed[name].shape[2:]
            values, seen = seen.tensor_split([shape.numel()], dim=1)
            self.observed[name][cells] = values.reshape(-1, *shape).to(self.observed[name].dtype)
        noted = columns[:, size:].view(len(row), -1, 2)
        self.alternatives[cells], self.likeliest[cells] = noted[:, :shown], noted[:, shown:]
        self.entries.add(rows, where)

    def _columns(
        self, logits: torch.Tensor, row: torch.Tensor, position: torch.Tensor, noise: torch.Tensor
    ) -> torch.Tensor:
        """The token drawn at some positions, its probability, the rule's score, and what else it observes.

        Args:
            logits: [N, V].
            row: [N] int64, rows of the canvas.
            position: [N] int64, positions in them.
            noise: [N] uniform numbers.

        Returns:
            [N, 3 + S + 2k] float64, S numbers being observed, at the end the likeliest tokens (see
            `TokenRule.likeliest`): those that are noted, and those that drafts are made of.
        """
        choice = self.tokens.choose(logits, noise.to(logits.device, non_blocking=True))
        tensors = {name: x for name, x in self.canvas.rule_state.items() if x.dim() > 1}
        state = {name: x[row, position].to(logits.device, non_blocking=True) for name, x in tensors.items()}
        score = self.rule.score(logits, choice, state, self.tokens)
        observed = self.rule.observe(logits, state, self.tokens) if state else {}
        self._check_rule(score, observed)
        self.observes = list(observed)
        columns = [x.double()[:, None] for x in (choice.token, choice.probability, score)]
        columns += [x.double().flatten(1) if x.dim() > 1 else x.double()[:, None] for x in observed.values()]
        noted = [
            self.tokens.likeliest(logits, k).flatten(1) for k in (self.plan.top_logprobs, self.ranks) if k
        ]
        columns += noted  # apart, since equal logits are ordered anew for every k
        return torch.cat(columns, dim=1)

    def _check_rule(self, score: torch.Tensor, observed: Mapping[str, torch.Tensor]) -> None:
        """Refuse what a rule must not return of N positions."""
        name = type(self.rule).__name__
        if score.dim() != 1:
            raise ConfigError(
                f"{name}.score must return a number for each position, got {tuple(score.shape)}"
            )
        for key in observed:
            if key not in self.observed:
                raise ConfigError(f"{name}.observe returned {key!r}, of which initial_state has no positions")

    def _logits(
        self,
        row: torch.Tensor,
        position: torch.Tensor,
        states: torch.Tensor,
        *unconditional_states: torch.Tensor,
    ) -> torch.Tensor:
        """[N, V] logits at the positions [N] of the rows [N], of which `states` [N, D] are the hidden states.

        For guidance there are also the states `unconditional_states` without the prompt.
        """
        logits = self.model.logits(states)
        if bool(self.canvas.ends_from.any()):
            shut = position < self.canvas.ends_from[row]  # too early for an end token
            for end_id in self.plan.end_tokens.end_ids:
                logits[:, end_id].masked_fill_(shut.to(logits.device, non_blocking=True), -math.inf)
        return self._changed(logits, row, *unconditional_states)

    def _changed(
        self, logits: torch.Tensor, row: torch.Tensor, *unconditional_states: torch.Tensor
    ) -> torch.Tensor:
        """[N, V] the model's logits with guidance, bias and penalties; arguments as of `_logits`."""
        for unconditional in unconditional_states:
            logits = guided(logits, self.model.logits(unconditional), self.plan.decoder.guidance)
        if self.tokens.logit_bias:
            logits = self.tokens.biased(logits)
        if self.penalises:
            rows, owner = row.unique(return_inverse=True)
            owner = owner.to(logits.device, non_blocking=True)
            logits = self.tokens.penalised(logits, *(x[owner] for x in self._present(rows, logits)))
        return logits

    def _present(self, rows: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens that each row holds [b, V] bool, and how often it has written each [b, V].

        End tokens count for neither: templates hold them too.
        """
        canvas = self.canvas
        held = canvas.valid[rows] & ~canvas.masked[rows]
        ids = canvas.ids[rows].to(logits.device, non_blocking=True)
        counts = torch.zeros(2, len(rows), logits.shape[1], device=logits.device)
        for count, where in zip(counts, (held, held & canvas.initial[rows]), strict=True):
            count.scatter_add_(1, ids, where.float().to(logits.device, non_blocking=True))
        for end_id in self.plan.end_tokens.end_ids:
            counts[:, :, end_id] = 0
        return counts[0] > 0, counts[1]


class DraftScorer(Scorer):
    """Answers for drafts: from what another scorer has found of the rows, whatever they are now.

    That is what the next steps would do if the model said again what it said last; it is not asked.

    Args:
        scorer: the other one.
        canvas: copies [c] of its rows.
        source: [c] int64, the rows that they are of.
        rank: [c] int64, which of the likeliest tokens of its positions a row is given: 0 the likeliest.
    """

    def __init__(self, scorer: Scorer, canvas: Canvas, source: torch.Tensor, rank: torch.Tensor) -> None:
        super().__init__(scorer.model, canvas, replace(scorer.plan, drafts=0, top_logprobs=0))
        tokens, logp = scorer.likeliest[source, :, rank].unbind(-1)
        self.token, self.probability, self.score = tokens.long(), logp.exp().float(), scorer.score[source]
        self.observed = {name: x[source] for name, x in scorer.observed.items()}
        self.has_score = scorer.entries.cached[source]
        self.sufficient = torch.ones(len(source), dtype=torch.bool)
        """[c] bool, False for rows that were asked for more than there is."""

    def compute(self, rows: torch.Tensor, evidence: Evidence, guess: Guess | None = None) -> Work:
        """Note which rows [b] are asked for more than there is; never waits for the model."""
        del guess
        self.sufficient[rows] &= ~(evidence.scored & ~self.has_score[rows, : evidence.scored.shape[1]]).any(1)
        yield from ()


class ConflictCache:
    """Conflicts of the rows of a canvas; what is stored of a row counts while its scores do."""

    def __init__(self, canvas: Canvas) -> None:
        self.place = torch.full_like(canvas.ids, -1)  # [B, L] number among the row's positions; -1 for none
        self.conflicts = torch.zeros(len(canvas.ids), 0, 0, dtype=torch.bool)  # [B, K, K] by those numbers

    def put(self, rows: torch.Tensor, positions: torch.Tensor, conflicts: torch.Tensor) -> None:
        """Store conflicts [b, K, K] between positions [b, K] of the rows [b]; positions of -1 are none."""
        size, old = positions.shape[1], self.conflicts
        if old.shape[1] < size:
            self.conflicts = old.new_zeros(len(old), size, size)
            self.conflicts[:, : old.shape[1], : old.shape[1]] = old
        self.conflicts[rows, :size, :size] = conflicts
        row, number = (positions >= 0).nonzero().unbind(1)
        self.place[rows] = -1
        self.place[rows[row], positions[row, number]] = number

    def at(self, rows: Rows, position: torch.Tensor, width: int) -> torch.Tensor:
        """[b, width] bool, positions in conflict with the one at `position` [b, 1] of the rows [b]."""
        place, conflicts = self.place[rows, :width], self.conflicts[rows]
        if not conflicts.shape[1]:
            return torch.zeros_like(place, dtype=torch.bool)
        one = place.gather(1, position)
        row = conflicts.gather(1, one.clamp(min=0)[..., None].expand(-1, -1, conflicts.shape[2]))[:, 0]
        return row.gather(1, place.clamp(min=0)) & (place >= 0) & (one >= 0)

    def follow(self, canvas: Canvas, rows: torch.Tensor | None = None) -> None:
        """Go on with another canvas: `rows` of the old one, or the old one with more rows behind it."""
        if rows is not None:
            self.place, self.conflicts = self.place[rows], self.conflicts[rows]
        size, width = canvas.ids.shape
        self.place = resized(self.place, size, width, -1)
        self.conflicts = resized(self.conflicts, size, self.conflicts.shape[1])


def _on_host(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """The tensors on the host as float64, in one copy."""
    flat = torch.cat([x.double().flatten() for x in tensors]).cpu()
    parts = flat.split([x.numel() for x in tensors])
    return [part.view(x.shape) for part, x in zip(parts, tensors, strict=True)]
