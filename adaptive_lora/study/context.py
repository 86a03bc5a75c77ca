"""The context of all trials of a study: its base and data, loaded once."""

from __future__ import annotations

import dataclasses
import gc
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

from adaptive_lora.allocation.plan import BaseStorage
from adaptive_lora.config import StudyConfig, TrialSpec, digest
from adaptive_lora.config.renamed import earlier_settings
from adaptive_lora.data.summary import DataSummary
from adaptive_lora.errors import DataError
from adaptive_lora.methods.adapters.dropout import switch_off_dropout
from adaptive_lora.models.base import BaseModel, load_base, require_quantiser
from adaptive_lora.models.device import Runtime, start_runtime
from adaptive_lora.models.errors import model_errors
from adaptive_lora.models.tasks import task_named
from adaptive_lora.models.tasks.prepared import SPLITS, PreparedSplits, prepare_set
from adaptive_lora.results import EvalResult
from adaptive_lora.serving import NF4
from adaptive_lora.study.base_context import BaseContext

_TEXT_LIMIT, _TEXTS_LIMIT = 2_000, 5_000_000
"""Maximum number of characters kept of one example's text, and of all examples."""
OWN = "own"
"""Name of a study's own data in `profiled_on`."""


class StudyContext(BaseContext):
    """The context of a study, which loads base and data once for all trials."""

    def __init__(self, config: StudyConfig) -> None:
        """Read the data, load the base, and check all settings before anything is written.

        Raises:
            AdaptiveLoraError: data, model or precision cannot be used.
        """
        kind = task_named(config)
        with _without_collector():
            self.data = kind.read(config.data)
        limited = config.train.max_memory is not None
        runtime = start_runtime(config.train.precision, sparing=limited)
        record = kind.record(self.data)
        wanted = {spec.base for spec in config.specs}
        if BaseStorage.NF4 in wanted:
            require_quantiser()
        alone = wanted == {BaseStorage.NF4}  # the weights as saved may not fit the device
        base = _load(config, runtime, record, NF4 if alone else None)
        super().__init__(kind(config, runtime, base))
        self.task.require_usable()
        self._other: OtherBaseContext | None = None
        with _without_collector():
            prepared = prepare_set(self.task, self.data)
        self.data, self._splits, self.data_summary = prepared.data, prepared.folds, prepared.summary
        self._base_scores: dict[int, EvalResult] = {}
        self._borrowed: dict[tuple[str, ...], OtherTasksContext] = {}
        for spec in config.specs:  # ranks and budgets that cannot be met fail before any training
            self.profiled_on(spec.profiled_on)
            if spec.options.metric is None:
                plan = self.plan(spec, seed=0, fold=0)
                self.memory(plan, fold=0)

    @cached_property
    def fingerprint(self) -> Mapping[str, str]:
        """Part of a trial's identity besides its configuration: digests of base and data, and precision."""
        return {
            "base": self.base.reference.content_hash,
            "data": self.data.digest,
            "tokens": self.tokens_digest,
            "precision": self.runtime.precision,
            **({"left_out": digest(reasons)} if (reasons := self.data.reasons) else {}),
            # Left out for causal tasks, so that trials from before there were tasks keep their identity.
            **({} if self.task.name == "causal" else {"task": self.task.name}),
        }

    @cached_property
    def tokens_digest(self) -> str:
        """Digest of the token ids and loss masks of all splits.

        All folds split the same examples, so that the first fold has all of them.
        """
        return self.splits(0).digest

    def signature(self, trial: TrialSpec) -> str:
        """Return a trial's identity on this base, this data and the data of its profile."""
        tasks = trial.method.profiled_on
        where = self.profiled_on(tasks)
        borrowed = {"profiled_on": where.digest} if isinstance(where, OtherTasksContext) else {}
        return trial.signature({**self.fingerprint, **borrowed})

    def profiled_on(self, tasks: tuple[str, ...]) -> BaseContext:
        """Return this context, or one with the training splits of the given tasks.

        Raises:
            DataError: a task's data cannot be read.
        """
        if not tasks or tasks == (OWN,):
            return self
        if tasks not in self._borrowed:
            self._borrowed[tasks] = OtherTasksContext(self, tasks)
        return self._borrowed[tasks]

    def on_base(self, kind: str) -> StudyContext:
        """Return the context with the base stored in this way; the unused base is moved off a GPU.

        The second base is loaded on first use.

        Raises:
            ConfigError: bitsandbytes is missing.
        """
        own = kind == self.base_kind
        resting = self._other if own else self
        if resting is not None:
            resting.base.model.to("cpu")  # type: ignore[arg-type]
        if not own and self._other is None:
            self._other = OtherBaseContext(self, kind)
        chosen: StudyContext | None = self if own else self._other
        assert chosen is not None
        chosen.base.model.to(self.runtime.device)  # type: ignore[arg-type]
        return chosen

    @cached_property
    def study_id(self) -> str:
        """Name of the study, and a digest of the settings that its trials share.

        Methods, seeds and learning rates do not enter, so that a study can be extended by some.
        """
        shared = {**self.config.identity(), **self.fingerprint}
        return f"{self.config.study}-{digest(shared)[:10]}"

    @cached_property
    def study_key(self) -> str:
        """Return a digest of the study's settings by names, equal for equal commands.

        Two study ids with one study key mean that base or data changed under the same name.
        """
        return self._study_key(self.config.identity())

    def earlier_study_keys(self) -> list[str]:
        """Return the study keys of version 0.1 for studies of this name and these settings."""
        return [self._study_key(identity) for identity in earlier_settings(self.config.identity())]

    def _study_key(self, identity: Mapping[str, Any]) -> str:
        sections = (self.config.model, self.config.data)
        named = {key: _place(value) for s in sections for key, value in vars(s).items()}
        del named["on_bad_row"]  # version 0.1 did not have this setting
        contents = {"base", "data", "tokens", "left_out"}
        rest = {key: value for key, value in self.fingerprint.items() if key not in contents}
        return digest({**identity, **named, **rest, "study": self.config.study})

    def splits(self, fold: int) -> PreparedSplits:
        """Return the prepared splits of a fold."""
        return self._splits[fold]

    def data_lines(self) -> list[str]:
        """Return the lines of the data summary printed at the start of a run, including other tasks' data."""
        summaries = [self.data_summary, *(s for b in self._borrowed.values() for s in b.summaries)]
        return [line for summary in summaries for line in summary.lines()]

    def score(self, model: object, examples: Sequence[Any]) -> EvalResult:
        """Score a model on examples by all scores of the task."""
        return self.task.score(model, examples)  # type: ignore[arg-type]

    def base_scores(self, fold: int) -> EvalResult:
        """Return the base scores: those of the base without adapter on the fold's test split.

        A head missing in the checkpoint has the initial weights of the first seed.
        """
        if fold not in self._base_scores:
            self.on_base(self.base_kind)
            self.start_head(0)
            with model_errors(f"{self.architecture.kind} does not run on this data", self.base.model):
                self._base_scores[fold] = self.score(self.base.model, self.splits(fold).test)
        return self._base_scores[fold]

    def test_texts(self) -> dict[str, str]:
        """Return id -> text of the test examples, for readers without the data."""
        tested = {item.id for f in range(self.config.data.folds) for item in self.splits(f).test}
        texts: dict[str, str] = {}
        room = _TEXTS_LIMIT
        for example in (*self.data.examples, *(self.data.test or ())):
            if example.id in tested and room > 0:
                texts[example.id] = example.shown[:_TEXT_LIMIT]
                room -= len(texts[example.id])
        return texts

    def settings(self) -> dict[str, Any]:
        """Return the settings to record, without the tracking URI, which may have a password."""
        return {key: value for key, value in self.config.flat().items() if key != "tracking_uri"}


class OtherBaseContext(StudyContext):
    """A study's context with another storage of the base, for studies of both LoRA and QLoRA."""

    def __init__(self, home: StudyContext, kind: str) -> None:
        """Load the base a second time.

        Raises:
            ConfigError: bitsandbytes is missing.
        """
        quantisation = None if kind == BaseStorage.FULL else NF4
        base = _load(home.config, home.runtime, home.base.task, quantisation)
        BaseContext.__init__(self, type(home.task)(home.config, home.runtime, base))
        self.data, self._home = home.data, home
        self._base_scores, self._borrowed = {}, {}

    def splits(self, fold: int) -> PreparedSplits:
        """Return the splits of the study."""
        return self._home.splits(fold)

    def on_base(self, kind: str) -> StudyContext:
        """Return the study's context with the base stored in this way."""
        return self._home.on_base(kind)


class OtherTasksContext(BaseContext):
    """A study's context with the training splits of other tasks, for transferred profiles.

    Every task has the same number of examples, that of the smallest one, from the beginning of its
    training split and interleaved.
    """

    def __init__(self, home: StudyContext, tasks: tuple[str, ...]) -> None:
        """Read the tasks' data with the study's settings for columns, template and splits.

        Raises:
            DataError: a task's data cannot be read.
        """
        super().__init__(home.task)
        self._home = home
        self.summaries: list[DataSummary] = []
        """Summaries of the other tasks' data."""
        self._folds: list[list[PreparedSplits]] = []
        digests, left_out = [], Counter[str]()
        for task in tasks:
            data, folds = home.data, [home.splits(n) for n in range(home.config.data.folds)]
            if task != OWN:
                data = home.task.read(dataclasses.replace(home.config.data, data=task))
                if data.labels != home.data.labels:
                    raise DataError(
                        f"profiled_on={task}: required the classes of the study's own data "
                        f"({', '.join(home.data.labels)}); got {', '.join(data.labels)}."
                    )
                prepared = prepare_set(home.task, data)
                data, folds = prepared.data, prepared.folds
                self.summaries.append(prepared.summary)
                left_out += data.reasons
            digests.append(data.digest)
            self._folds.append(folds)
        self._splits: dict[int, PreparedSplits] = {}
        shared = {"tasks": digests, "tokens": self.splits(0).digest}
        self.digest = digest({**shared, **({"left_out": left_out} if left_out else {})})
        """Digest of the data, token ids and loss masks of all tasks."""

    def splits(self, fold: int) -> PreparedSplits:
        """Return the tasks' splits, each task with the same number of examples, interleaved."""
        if fold not in self._splits:
            splits = [folds[fold] for folds in self._folds]
            taken = {
                name: tuple(chain.from_iterable(zip(*(getattr(p, name) for p in splits), strict=False)))
                for name in SPLITS
            }
            self._splits[fold] = PreparedSplits(**taken)
        return self._splits[fold]


def _load(
    config: StudyConfig, runtime: Runtime, task: Mapping[str, Any], quantisation: Mapping[str, Any] | None
) -> BaseModel:
    """Load a study's base for a task, with or without its own dropout."""
    base = load_base(config.model, runtime.base_dtype, task, quantisation)
    if not config.train.base_dropout:
        switch_off_dropout(base.model)
    return base


@contextmanager
def _without_collector() -> Iterator[None]:
    """Switch Python's cyclic garbage collector off inside the block, for building a data set.

    A data set has no cycles, and repeated collections cost more per example the more examples exist.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _place(value: object) -> object:
    """Return a setting, as an absolute path if it is an existing path, because relative paths depend on the folder."""
    exists = isinstance(value, str) and Path(value).exists()
    return str(Path(str(value)).resolve()) if exists else value
