"""One evaluation: its variants are answered, merged and measured one after the other, each in its folder."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from decoding.request import Request
from dlm.checkpoint import stored_spec
from dlm.data.records import read_records
from dlm.errors import ConfigError
from dlm.lock import alone_in, check_writable
from dlm.origin import autoregressive_origin, fingerprint
from eval.config import NUCLEUS, EvalConfig
from eval.metrics import Instruments
from eval.run import Card, Results, answer_all, finish, merge, open_run
from eval.systems import Autoregressive, Endpoint, Local, System, check_traced
from eval.tasks import Question, fitting, load_questions, with_references
from eval.variants import Variant

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Contestant:
    """A system and how it is told apart."""

    card: Card
    make: Callable[[], System]


def evaluate(config: EvalConfig) -> list[Results]:
    """Run everything that the settings ask for; see `evaluated`."""
    return evaluated(config)[0]


def evaluated(config: EvalConfig) -> tuple[list[Results], list[str]]:
    """Run everything that the settings ask for; under `accelerate launch`, with the other processes.

    Returns:
        The runs, and what is missing, in words; both empty in all processes but the first.

    Raises:
        ConfigError: for settings that cannot work, and when another process is at work on one of the runs.
    """
    from accelerate import PartialState

    check_writable(config.output)
    state = PartialState(cpu=config.device == "cpu")
    questions = load_questions(config.task, config.data, 0 if config.references else config.limit)
    if config.references:  # of any question, also one beyond the limit
        rows = read_records(Path(config.references))
        questions = with_references(questions, rows, config.references, needed=True)[: config.limit or None]
    _check_variants(config)
    loaded = _Loaded(config)
    if config.model and config.window:
        questions = fitting(questions, loaded.sampler.fits, config.window)
    contestants = list(_contestants(config, loaded))
    instruments = loaded.instruments(questions) if state.is_main_process else Instruments()
    folders = [contestant.card.folder(config.output) for contestant in contestants]
    with ExitStack() as alone:
        for folder in dict.fromkeys(folders) if state.is_main_process else ():
            alone.enter_context(alone_in(folder))
        lacks = [_lack_of(c, questions, config, len(contestants) == 1) for c in contestants]
        if not state.is_main_process:
            return [], []
        for folder, contestant, lack in zip(folders, contestants, lacks, strict=True):
            if not lack:
                finish(folder, contestant.card, questions, merge(folder, questions), instruments)
    results = [Results.load(folder) for folder, lack in zip(folders, lacks, strict=True) if not lack]
    return results, [lack for lack in lacks if lack]


def _lack_of(contestant: Contestant, questions: list[Question], config: EvalConfig, alone: bool) -> str:
    """Have one contestant answer; returns what is missing in the end, in words.

    Args:
        contestant: who answers.
        questions: of the task.
        config: of the evaluation.
        alone: whether it is the only one, so that its errors are those of the evaluation.
    """
    from accelerate import PartialState

    state, card = PartialState(), contestant.card
    folder, lack = card.folder(config.output), ""
    if state.is_main_process:
        open_run(folder, card)
        merge(folder, questions)
    state.wait_for_everyone()
    try:
        answer_all(folder, card, questions, contestant.make(), (state.process_index, state.num_processes))
    except ConfigError as error:
        if alone:
            raise
        logger.warning("%s is left out: %s", card.name, error)
        lack = f"{card.name} ({error})"
    state.wait_for_everyone()
    if not state.is_main_process or lack:
        return lack
    answers = merge(folder, questions)
    wanted = [(question.id, turn) for question in questions for turn in range(len(question.turns))]
    missing = [key for key in wanted if key not in answers]
    return f"{card.name}: {len(missing)} of {len(wanted)} answers" if missing else ""


def _check_variants(config: EvalConfig) -> None:
    """Refuse an evaluation none of whose variants the model can do, before its weights are read."""
    from dlm.checkpoint import stored_spec

    spec = stored_spec(config.model) if config.model else None
    if spec is None:
        return
    failures = []
    variants = config.variants()
    for variant in variants:
        try:
            plan = variant.request(eos_fill=config.eos_fill).resolve(spec)
            if config.trace:
                check_traced(plan)
        except ConfigError as error:
            failures.append(error)
    if len(failures) == len(variants):
        raise failures[0]


class _Loaded:
    """The model under test and the instruments, each loaded when it is first wanted.

    Args:
        config: of the evaluation.
    """

    def __init__(self, config: EvalConfig) -> None:
        self.config = config
        self._sampler: Any = None

    @property
    def sampler(self) -> Any:
        if self._sampler is None:
            from decoding.sampler import Sampler
            from dlm.checkpoint import load_model

            config = self.config
            self._sampler = Sampler(*load_model(config.model, config.device, config.dtype, prepacked=True))
        return self._sampler

    @property
    def place(self) -> tuple[str, Any]:
        """Device and type of weights."""
        from dlm.checkpoint import place

        return place(self.config.device, self.config.dtype)

    def causal(self) -> tuple[Any, Any]:
        """The autoregressive system, and its tokenizer."""
        from dlm.backbone import load_causal_lm

        device, dtype = self.place
        model, tokenizer = load_causal_lm(self.config.autoregressive, dtype)
        return model.to(device).eval(), tokenizer

    def instruments(self, questions: list[Question]) -> Instruments:
        """Instruments that measure the answers."""
        out = Instruments(log_prior=self._log_prior())
        if self.config.nelbo_draws:
            out.nelbo = self.nelbo(questions)
        from eval.fluency import Reader

        path = self.config.reader
        if path == "base":
            path = autoregressive_origin(self.config.model)
        if path:
            out.reader = Reader(path, *self.place)
            out.marks |= dict.fromkeys(("nll", "inlier"), fingerprint(path))
            out.band = self._band(out.reader, questions)
        elif self.config.reader:
            logger.warning(
                "no reader: the records of %s name no autoregressive model that is still there, so nll and "
                "inlier rate are not measured; --reader names one",
                self.config.where,
            )
        if self.config.encoder:
            from eval.relevance import Encoder

            out.encoder = Encoder(self.config.encoder, self.place[0])
            out.marks["relevance"] = fingerprint(self.config.encoder)
        return out

    def _band(self, reader: Any, questions: list[Question]) -> Any:
        """Usual perplexities: of the rows named, or of the references; None without either."""
        from eval.fluency import Band

        if self.config.usual:
            from dlm.data.rows import load_rows

            rows = load_rows(self.config.usual)
            rows = rows.select(range(max(len(rows) - self.config.usual_rows, 0), len(rows)))
            talks, texts = list(rows["prompt"]), list(rows["answer"])
            if not all(talks):
                raise ConfigError(f"usual: the rows of {self.config.usual} must be questions with answers")
        else:
            referenced = [q for q in questions if q.reference]
            talks = [q.opening for q in referenced]
            texts = [q.reference[0] for q in referenced]
        return Band.of(reader.read(talks, texts, "usual perplexities")) if len(texts) > 1 else None

    def _log_prior(self) -> Callable[[str], float] | None:
        """Mean log prior of a text's tokens, where the checkpoint has its counts with it."""
        if not self.config.model:
            return None
        from dlm.prior import TokenPrior
        from dlm.tokenizer import encode_text

        prior = TokenPrior.load(self.config.model)
        if prior is None:
            return None
        table, tokenizer = prior.log_prior(), self.sampler.tokenizer

        def mean(text: str) -> float:
            ids = encode_text(tokenizer, text) if text.strip() else []
            return float(table[ids].mean()) if ids else float("nan")

        return mean

    def nelbo(self, questions: list[Question]) -> dict[str, float]:
        """Nats per token of the references under the model, by the question's id."""
        from dlm.tokenizer import encode_prompt, encode_text
        from eval.nelbo import nelbo

        tokenizer, referenced = self.sampler.tokenizer, [q for q in questions if q.reference]
        rows = []
        for q in referenced:
            prompt = encode_prompt(tokenizer, q.opening)
            rows.append((prompt, [*encode_text(tokenizer, q.reference[0]), tokenizer.eos_token_id]))
        limit = self.sampler.spec.positions
        fitting = [i for i, (prompt, answer) in enumerate(rows) if len(prompt) + len(answer) <= limit]
        if len(fitting) < len(rows):
            counts = len(rows) - len(fitting), len(rows)
            logger.warning("%d of %d references are longer than the model's positions", *counts)
        referenced, rows = [referenced[i] for i in fitting], [rows[i] for i in fitting]
        nats = nelbo(self.sampler.model, rows, self.config.nelbo_draws, self.config.batch_size)
        return {q.id: x / len(answer) for q, x, (_, answer) in zip(referenced, nats, rows, strict=True)}


def _contestants(config: EvalConfig, loaded: _Loaded) -> Iterator[Contestant]:
    """Every variant of the system under test."""
    common = {
        "data": Path(config.data).name,
        "source": str(Path(config.data).resolve()) if config.data else "",
        "task": config.task,
        "system": config.system,
        "model": config.where,
    }
    if config.model:
        mark = fingerprint(config.model)
        for variant in config.variants():
            yield _local(config, loaded, variant, mark, common)
        return
    limit = config.max_tokens or 256
    settings = {"seed": config.seed, "max_tokens": limit}
    if config.endpoint:
        mark = f"{config.endpoint} {config.endpoint_model}"
        card = Card(**common, fingerprint=mark, label="", decoder="", settings=settings)
        yield Contestant(
            card,
            lambda: Endpoint(config.endpoint, config.endpoint_model, limit, config.seed, config.batch_size),
        )
        return
    label = "autoregressive" if config.top_p == NUCLEUS else f"autoregressive,p={config.top_p:g}"
    rule = {"top_p": config.top_p}
    if config.frequency_penalty:
        label += f",frequency_penalty={config.frequency_penalty:g}"
        rule["frequency_penalty"] = config.frequency_penalty
    card = Card(
        **common, fingerprint=fingerprint(config.where), label=label, decoder="",
        settings={**settings, **rule, "dtype": str(loaded.place[1])},
    )  # fmt: skip
    yield Contestant(card, lambda: Autoregressive(*loaded.causal(), limit, **rule, seed=config.seed))


def _local(
    config: EvalConfig, loaded: _Loaded, variant: Variant, mark: str, common: dict[str, str]
) -> Contestant:
    request, spec = variant.request(eos_fill=config.eos_fill), stored_spec(config.model)
    filled = (request if spec is None else request.as_published(spec)).eos_fill is not False
    fixed = {"seed": config.seed, "eos_fill": filled} | ({"trace": True} if config.trace else {})
    settings = {**variant.recorded, **variant.pace, **fixed, "dtype": config.dtype}
    card = Card(
        **common, fingerprint=mark, label=variant.label, decoder=variant.decoder, settings=settings,
        stands_for="" if variant.decoder else _checkpoint_decoder(config.model, request),
    )  # fmt: skip
    return Contestant(
        card, lambda: Local(loaded.sampler, config.batch_size, request, config.seed, config.trace)
    )


def _checkpoint_decoder(model: str, request: Request) -> str:
    """The decoder of a checkpoint's own, as a request names it: "entropy-bound(kernel_size=9)"."""
    spec = stored_spec(model)
    if spec is None:
        return ""
    decoder, options = request.decoder_for(spec), spec.defaults.options
    return decoder.name + (f"({','.join(f'{k}={v}' for k, v in options.items())})" if options else "")
