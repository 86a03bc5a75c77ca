"""An adapter on any data, beside its base: per example, and the paired difference."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from typing import Any

import numpy as np
from markupsafe import Markup
from peft import PeftModel

from adaptive_lora import serving
from adaptive_lora.analysis.comparison.wording import interval_clause, plain, signed
from adaptive_lora.analysis.stats import Interval, mean_interval
from adaptive_lora.config import RetainedSource, StudyConfig, study_from
from adaptive_lora.config.types import Precision
from adaptive_lora.errors import ConfigError, ModelError
from adaptive_lora.models.base import BaseModel, BaseReference, load_base
from adaptive_lora.models.device import OwnRuntime, start_runtime
from adaptive_lora.models.errors import model_errors
from adaptive_lora.models.heads import start_head
from adaptive_lora.models.tasks.catalogue import TASKS
from adaptive_lora.results import EvalResult, RetainedScores
from adaptive_lora.runner.guest import unchanged_process
from adaptive_lora.runner.loaded import access, is_address, opened
from adaptive_lora.runner.retained import RetainedData, read_source
from adaptive_lora.serving.tokens import position_limit

_SETTINGS = (
    "template", "prompt_column", "input_column", "response_column", "image_column", "audio_column", "data_subset",
    "data_revision", "data_split", "max_examples", "on_bad_row", "max_tokens", "loss_on", "eval_batch_size",
    "precision", "split_seed", "trust_remote_code", "tracking_uri",
)  # fmt: skip
"""Study settings that affect an evaluation."""
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations of PEFT that change the base's own weights, so that without its adapter it is another model."""
_OWN_TASKS = ("causal", "seq2seq")


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Losses on the same examples with and without an adapter.

    A loss is in `unit`: nats per supervised token, unless the task has another one.
    """

    source: str
    """Name of the data."""
    digest: str
    """Digest of the texts, token ids and loss masks, 16 hexadecimal digits."""
    scores: RetainedScores
    """Scores of each example: `before` without the adapter, `after` with it."""
    reading: tuple[str, ...]
    """How the data were read, as lines: rows, columns used and not used, rows left out and cut."""
    confidence: float = 0.95
    """Confidence of `interval`."""

    @property
    def unit(self) -> str:
        """Unit of the losses."""
        return self.scores.after.unit

    @property
    def mean(self) -> float:
        """Loss with the adapter."""
        return self.scores.after.loss

    @property
    def base_mean(self) -> float:
        """Loss of the base without the adapter."""
        return self.scores.before.loss

    @property
    def difference(self) -> float:
        """Loss with the adapter minus that without; positive is worse: forgotten, on data of another kind."""
        return self.mean - self.base_mean

    @cached_property
    def interval(self) -> Interval:
        """Interval of the difference for this adapter and other examples of the same kind.

        Of the ratio of sums, by each example's linearised share. It says nothing about other seeds of the training.
        """
        before, after = self.scores.before, self.scores.after
        token_E = after.tokens_E.astype(np.float64)
        share_E = (after.nll_E - before.nll_E - self.difference * token_E) / token_E.mean()
        return mean_interval(self.difference + share_E, confidence=self.confidence, over="example")

    @property
    def examples(self) -> tuple[Mapping[str, Any], ...]:
        """One dictionary per example, for `pandas.DataFrame`: id, tokens, loss, base_loss and difference per token."""
        before, after = self.scores.before, self.scores.after
        rows = zip(after.example_ids, after.tokens_E, after.nll_E, before.nll_E, strict=True)
        return tuple(
            {
                "id": name,
                "tokens": int(tokens),
                "loss": float(mine / tokens),
                "base_loss": float(base / tokens),
                "difference": float((mine - base) / tokens),
            }
            for name, tokens, mine, base in rows
        )

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values without the examples."""
        return {
            "source": self.source,
            "digest": self.digest,
            "examples": len(self.scores.after.example_ids),
            "unit": self.unit,
            "loss": self.mean,
            "base_loss": self.base_mean,
            "difference": self.difference,
            "low": self.interval.low,
            "high": self.interval.high,
            "confidence": self.confidence,
            "interval_method": self.interval.method,
            "note": self.interval.note,
        }

    @property
    def _rows(self) -> dict[str, str]:
        clause = interval_clause(self.interval, self.confidence)
        return {
            "without adapter": plain(self.base_mean),
            "with adapter": plain(self.mean),
            "difference": f"{signed(self.difference)} ({clause}, over examples)",
        }

    @property
    def _title(self) -> str:
        return f"{self.source}: {len(self.scores.after.example_ids):,} examples, {self.unit}"

    def __str__(self) -> str:
        """Return both losses and their difference as text."""
        return "\n".join([self._title, *(f"{name:<16} {text}" for name, text in self._rows.items())])

    def __repr__(self) -> str:
        """Return the difference; the examples would be pages."""
        return f"<{type(self).__name__}: {self.source}, difference {signed(self.difference)} {self.unit}>"

    def _repr_html_(self) -> str:
        """Return both losses and their difference for a notebook."""
        row = Markup("<tr><th>{}</th><td>{}</td></tr>")
        rows = Markup().join(row.format(name, text) for name, text in self._rows.items())
        return str(Markup("<table><caption>{}</caption>{}</table>").format(self._title, rows))


def evaluate(
    model: PeftModel | str | PathLike[str], data: str | PathLike[str], *, tokenizer: Any = None, **options: Any
) -> Evaluation:
    """Score an adapter on data, and its base without it, by the test loss of a study.

    Args:
        model: folder of a saved adapter, `models:/NAME@ALIAS`, `models:/NAME/VERSION` or `runs:/ID/PATH`, all loaded as
            for serving; or a PEFT model of a causal or sequence-to-sequence base, which is left as it is.
        data: file, folder, hub data set or `embedded`, all rows of it, as in `--retain-data SOURCE[:option=value,...]`.
        tokenizer: tokenizer of a PEFT model; a saved adapter has its own.
        **options: settings of `adaptive-lora evaluate`: columns, `template`, `max_examples`, `on_bad_row`, `max_tokens`
            (512), `loss_on`, `eval_batch_size`, `precision`, `trust_remote_code`, `tracking_uri`.

    Raises:
        ConfigError: an unknown option, a value out of limits, or no tokenizer.
        AdapterError: there is no adapter, or its base is not the one that it was trained on.
        DataError: the data cannot be read or used, or have other classes.
        ModelError: the model has no adapter or does not run on the data.
    """
    unknown = sorted(set(options) - set(_SETTINGS))
    if unknown:
        raise ConfigError(f"evaluate has no option {', '.join(unknown)}; required any of {', '.join(_SETTINGS)}.")
    given = {name: value for name, value in options.items() if value is not None}
    if not isinstance(data, str | PathLike):
        raise ConfigError(f"data: required a file, folder, hub data set or embedded; got a {type(data).__name__}.")
    config, source = study_from(given), RetainedSource.parse(str(data))
    if isinstance(model, str | PathLike):
        if tokenizer is not None:
            raise ConfigError("tokenizer: a saved adapter has that of its base; give one with a PEFT model alone.")
        if "tracking_uri" in given and not is_address(str(model)):
            raise ConfigError(f"tracking_uri applies to addresses in a tracking store; {model} is a folder.")
        with access(str(model), config.tracking, "adaptive_lora.evaluate"):
            return evaluate_saved(config, str(model), source)
    with unchanged_process():
        return _evaluate_own(config, model, tokenizer, source)


def evaluate_saved(config: StudyConfig, adapter: str, source: RetainedSource) -> Evaluation:
    """Score a saved adapter and its base on one source; see `evaluate`."""
    model, record, config = load_saved(adapter, config)
    runtime = start_runtime(config.train.precision)
    kept = {name: record["task"][name] for name in ("name", "labels", "language") if name in record["task"]}
    base = load_base(config.model, runtime.base_dtype, kept, record.get("quantisation"))
    task = TASKS[kept["name"]](config, runtime, base)
    found = read_source(task, source, kept.get("labels", ()))
    base.model.to(runtime.device)  # type: ignore[arg-type]
    start_head(base.model, base.missing_keys, seed=0)
    with model_errors(f"the base of {adapter} does not run on {found.name}", base.model):
        before = task.losses(base.model, found.examples)
    model.to(runtime.device)
    with model_errors(f"adapter {adapter} does not run on {found.name}", model):
        return _evaluated(found, before, task.losses(model, found.examples))


def _evaluate_own(config: StudyConfig, model: Any, tokenizer: Any, source: RetainedSource) -> Evaluation:
    """Score a PEFT model with its adapter and without it, by the model's own code."""
    if not isinstance(model, PeftModel):
        raise ModelError(
            "required a PEFT model, such as peft.get_peft_model returns, or the place of a saved adapter; got a "
            f"{type(model).__name__}."
        )
    if tokenizer is None:
        raise ConfigError("evaluate of a PEFT model needs tokenizer=, that of its base; none was given.")
    if not callable(tokenizer):
        raise ConfigError(f"tokenizer: required a loaded one, as AutoTokenizer gives; got {tokenizer!r:.80}.")
    for name in model.active_adapters:
        initial = str(getattr(model.peft_config[name], "init_lora_weights", "")).lower()
        if initial.startswith(_CHANGE_THE_BASE):
            raise ModelError(
                f"adapter {name} was initialised by {initial}, which changes the base's weights: without it the model "
                "is not its base any more. Save it as an ordinary LoRA adapter (PEFT: path_initial_model_for_weight_"
                "conversion), load it on the base, and give that."
            )
    base: Any = model.get_base_model()
    name = _task_of(base)
    config = study_from({**config.flat(), "batching": "padded", "task": name, "precision": "fp32"})
    device = next(model.parameters()).device
    task = TASKS[name](
        config,
        OwnRuntime(device),  # type: ignore[arg-type]
        BaseModel(
            model=base,
            tokenizer=tokenizer,
            reference=BaseReference(source="object", name=type(base).__name__, revision=None, content_hash=""),
            max_positions=position_limit(base.config),
            task={"name": name},
        ),
    )
    found = read_source(task, source)
    with _in_evaluation(model), model_errors(f"{type(base).__name__} does not run on {found.name}", model):
        after = task.losses(model, found.examples)
        with model.disable_adapter():
            before = task.losses(model, found.examples)
    return _evaluated(found, before, after)


def _task_of(base: Any) -> str:
    kind = type(base).__name__
    encodes = bool(getattr(base.config, "is_encoder_decoder", False))
    if kind.endswith(("ForCausalLM", "LMHeadModel")):
        return "causal"
    if encodes and kind.endswith("ForConditionalGeneration"):
        return "seq2seq"
    raise ModelError(
        f"a PEFT model of {kind} cannot be evaluated: required a base of one of the tasks {', '.join(_OWN_TASKS)}. "
        "Adapters that a study saved can, for every task: give their folder."
    )


@contextmanager
def _in_evaluation(model: Any) -> Iterator[None]:
    """Restore the training mode of every module after the block."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _evaluated(found: RetainedData, before: EvalResult, after: EvalResult) -> Evaluation:
    for name, result in (("without", before), ("with", after)):
        if not np.isfinite(result.nll_E).all():
            raise ModelError(
                f"the loss {name} the adapter is not finite on {found.name}; check the weights or use fp32."
            )
    return Evaluation(
        source=found.name,
        digest=found.digest,
        scores=RetainedScores(source=found.name, before=before, after=after),
        reading=tuple(found.summary.lines()),
    )


def load_saved(adapter: str, config: StudyConfig) -> tuple[Any, Mapping[str, Any], StudyConfig]:
    """Load an adapter on its base as in serving.

    Returns:
        The adapted model, the adapter's record, and the settings with the base, task and precision of the record.

    Raises:
        AdapterError: there is no adapter, or its base is not the one that it was trained on.
    """
    model, _, record = opened(adapter, config.tracking, trust_remote_code=config.model.trust_remote_code)
    base = record["base"]
    where = os.environ.get(serving.BASE_VARIABLE) or base["name"]
    changes: dict[str, object] = {"model": where, "revision": base["revision"]}
    changes["task"] = record["task"]["name"]
    changes["trust_remote_code"] = bool(base.get("trust_remote_code"))  # otherwise it would not have loaded
    if config.train.precision == "auto":  # as in training, so that scores are reproduced
        changes["precision"] = Precision.of_dtype(record["dtype"])
    return model, record, study_from({**config.flat(), **changes})
