"""The inputs of importance profiles: other tasks' data, batches drawn for a seed, and the trained probe."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from adaptive_lora.allocation import MethodSpec, allocate
from adaptive_lora.config import ProfileConfig, digest
from adaptive_lora.data import ExampleSet
from adaptive_lora.data.sequences import Joined, Rows
from adaptive_lora.data.summary import DataSummary
from adaptive_lora.errors import AllocationError, DataError
from adaptive_lora.methods.adapters import attach, detach
from adaptive_lora.methods.importance import ImportanceProfile, TrainedProbe
from adaptive_lora.methods.importance.capture import frozen
from adaptive_lora.methods.importance.contract import PassLimits
from adaptive_lora.methods.importance.gradient import floats_of
from adaptive_lora.methods.importance.profile import measured, profile_of, shares_a_pass
from adaptive_lora.models.base import gradient_checkpointing
from adaptive_lora.models.errors import model_errors
from adaptive_lora.models.tasks import Task
from adaptive_lora.models.tasks.prepared import SPLITS, PreparedSplits, prepare_set
from adaptive_lora.seeding import rng_for, torch_stream
from adaptive_lora.training import Trainer, TrainInputs
from adaptive_lora.training.memory import choose, load_of
from adaptive_lora.training.memory.estimate import estimate

if TYPE_CHECKING:
    from adaptive_lora.runner.context import StudyContext

OWN = "own"
"""Name of a study's own data in `profiled_on`."""


@dataclasses.dataclass(frozen=True, slots=True)
class TaskData:
    """Splits that profiles with `profiled_on` are measured on."""

    folds: Sequence[PreparedSplits]
    """Splits of each fold; of several tasks each has the same number of examples, in turn."""
    digest: str
    """Digest of the data, token ids and loss masks of all tasks."""
    summaries: Sequence[DataSummary]
    """Summaries of the data that are not the study's own."""


def read_tasks(task: Task, tasks: Sequence[str], own: ExampleSet, own_folds: Sequence[PreparedSplits]) -> TaskData:
    """Read other tasks' data with the study's settings for columns, template and splits.

    Of several tasks, each gives as many examples as the smallest one, from the beginning of its splits.

    Args:
        task: task of the study, which prepares the examples.
        tasks: data sources, or `own`.
        own: data of the study.
        own_folds: splits of the study.

    Raises:
        DataError: a task's data cannot be read, or have other classes.
    """
    each: list[Sequence[PreparedSplits]] = []
    digests, summaries, left_out = [], [], Counter[str]()
    for source in tasks:
        data, folds = own, own_folds
        if source != OWN:
            data = task.read(dataclasses.replace(task.config.data, data=source))
            if data.labels != own.labels:
                raise DataError(
                    f"profiled_on={source}: required the classes of the study's own data "
                    f"({', '.join(own.labels)}); got {', '.join(data.labels)}."
                )
            prepared = prepare_set(task, data)
            data, folds = prepared.data, prepared.folds
            summaries.append(prepared.summary)
            left_out += data.reasons
        digests.append(data.digest)
        each.append(folds)
    joined = [_in_turn(splits) for splits in zip(*each, strict=True)]
    shared = {"tasks": digests, "tokens": joined[0].digest}
    return TaskData(joined, digest({**shared, **({"left_out": left_out} if left_out else {})}), summaries)


def _in_turn(splits: Sequence[PreparedSplits]) -> PreparedSplits:
    """Return the splits of several tasks as one, with the tasks' examples interleaved."""
    return PreparedSplits(**{name: _interleaved([getattr(each, name) for each in splits]) for name in SPLITS})


def _interleaved(parts: Sequence[Sequence[Any]]) -> Sequence[Any]:
    """Return the first items of each part, then the second ones, and so on to the end of the shortest part."""
    starts = list(accumulate(map(len, parts), initial=0))[:-1]
    return Rows(Joined(*parts), [start + at for at in range(min(map(len, parts))) for start in starts])


def drawn(examples: Sequence[Any], settings: ProfileConfig, *, seed: int, purpose: str, fold: int) -> list[list[Any]]:
    """Return the batches of examples that a seed draws for a purpose."""
    size = settings.profile_batch_size
    order = rng_for(seed, purpose, fold).permutation(len(examples))[: settings.profile_batches * size]
    return [[examples[index] for index in order[start : start + size]] for start in range(0, len(order), size)]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """Data that a profile is measured on."""

    tasks: tuple[str, ...]
    """Tasks of `profiled_on`; empty: the study's own."""
    seed: int
    fold: int
    experts: bool
    """Mark of profiles of routed experts too."""

    def serves(self, spec: MethodSpec) -> bool:
        """Return whether a method follows a profile on these tasks."""
        return (_other(spec.profiled_on), spec.experts) == (self.tasks, self.experts)


def _other(tasks: tuple[str, ...]) -> tuple[str, ...]:
    return () if tasks == (OWN,) else tasks


class ProfileCache:
    """The profiles of a study, each measured once; gradient metrics of one seed and fold share a pass."""

    def __init__(self, context: StudyContext) -> None:
        """Start empty."""
        self._context = context
        self._found: dict[Calibration, dict[str, ImportanceProfile]] = {}

    def get(self, metrics: Sequence[str], data: Calibration) -> Mapping[str, ImportanceProfile]:
        """Return the profiles of these metrics; what is missing is measured.

        Raises:
            AllocationError: a measurement has no information on where ranks should go.
        """
        data = dataclasses.replace(data, tasks=_other(data.tasks))
        found = self._found.setdefault(data, {})
        if missing := [metric for metric in metrics if metric not in found]:
            self._measure(metrics, missing, data)
        return {metric: found[metric] for metric in metrics}

    def _measure(self, asked: Sequence[str], metrics: list[str], data: Calibration) -> None:
        """Measure metrics, and with a gradient metric the others that methods of the study follow."""
        context, found = self._context, self._found[data]
        task = context.profile_task(seed=data.seed, fold=data.fold, tasks=data.tasks, experts=data.experts)
        if any(shares_a_pass(metric, task) for metric in metrics):
            followed = {spec.options.metric for spec in context.config.specs if data.serves(spec)} - {None}
            further = sorted(followed.difference(found, metrics))
            metrics = [*metrics, *(metric for metric in further if shares_a_pass(metric, task))]
        with model_errors(f"{metrics[0]} cannot be measured on {context.architecture.kind}", context.base.model):
            results = measured(task, metrics)
        processes = context.runtime.processes  # their GPUs may round differently; ranks follow one of them
        for metric, result in results.items():
            try:
                profile = profile_of(task, metric, result, seed=data.seed)
            except AllocationError:  # of a metric that another method follows: raised where that one asks
                if metric in asked:
                    raise
                continue
            found[metric] = processes.share(profile) if processes.together else profile


_PROBED_RANK = 8
"""Rank of the uniform adapters whose training step bounds the memory of a profile."""
_LEAST_SHARE = 8
"""Most passes over the calibration data that a shortage of memory may cost."""


def pass_limits(context: StudyContext, longest: int) -> PassLimits:
    """Return limits by which a profile takes no more memory than a training step of uniform LoRA.

    A pass has the examples of a micro-batch, or fewer, so that the sums of all sites fit beside its activations. Where
    they do not, not even with one example at a time, sites are measured in up to eight groups.

    Args:
        context: context of the study; its batch size and memory limit bound the memory.
        longest: number of tokens of the longest example.
    """
    base, config = context.base, context.config.train
    uniform = MethodSpec.build("uniform", {"rank": min(_PROBED_RANK, *(site.max_rank for site in context.sites))})
    load = load_of(
        base.model,
        (*context.sites, *context.architecture.experts),
        allocate(uniform, context.sites, alpha=config.alpha, scaling=config.scaling),
        precision=context.runtime.precision,
        longest=longest,
        fused=config.batching != "padded",
        packed=context.task.packs(base.model),
        head=base.head,
    )
    step = choose(load, config)
    most = config.max_memory or step.estimate.high
    sums = 4 * sum(map(floats_of, context.sites))
    rows = step.micro_batch
    calibration = context.config.profile.profile_batches * context.config.profile.profile_batch_size

    def room(examples: int) -> int:
        return int(most) - estimate(load, examples=examples, checkpointing=False).high

    while 1 < rows < calibration and room(rows) < sums:
        rows //= 2
    return PassLimits(
        backward_tokens=rows * longest,
        forward_tokens=rows * longest if config.max_memory else None,
        room=max(room(rows), sums // _LEAST_SHARE) // 4,
    )


@contextmanager
def trained_probe(context: StudyContext, splits: PreparedSplits, *, seed: int, fold: int) -> Iterator[TrainedProbe]:
    """Train adapters of one rank on every site for a short while; remove them at the end of the block.

    Uses the study's settings and the middle one of its learning rates.
    """
    model, settings, probe = context.base.model, context.config.train, context.config.profile
    config = dataclasses.replace(settings, epochs=min(settings.epochs, probe.probe_epochs), patience=0)
    uniform = MethodSpec.build("uniform", {"rank": min(probe.probe_rank, *(site.max_rank for site in context.sites))})
    plan = allocate(uniform, context.sites, alpha=settings.alpha, scaling=settings.scaling)
    rates = sorted(context.config.lr)
    inputs = TrainInputs(
        examples=splits.train,
        collate=context.task.collate,
        validate=lambda adapted: context.losses(adapted, splits.validation).loss,
        loss=context.loss,
        running=context.task.running,
    )
    with frozen(model), torch_stream(seed, "probe", fold):
        adapted = attach(model, plan, seed=seed, dropout=settings.dropout, head=context.base.head)
        try:
            adapted.to(context.runtime.device)
            with gradient_checkpointing(model, config.gradient_checkpointing):
                lr = rates[len(rates) // 2]
                result = Trainer(adapted, inputs, config, context.runtime, lr=lr, seed=seed).run()
            yield TrainedProbe(model=adapted, tokens=result.tokens)
        finally:
            detach(adapted)
