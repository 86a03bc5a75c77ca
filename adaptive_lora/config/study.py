"""The study: a grid of trials over one base and data set, and the identity of each trial."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from adaptive_lora.allocation import MethodSpec
from adaptive_lora.config.sections import (
    NAME,
    SEED,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    ProfileConfig,
    TrackingConfig,
    TrainConfig,
)
from adaptive_lora.errors import ConfigError
from adaptive_lora.options import Limits, option, type_hints

SIGNATURE_VERSION = 3
"""Raise it when a change of the code changes a trial's numbers: old trials are not reused then."""

REFERENCE_METHODS = (
    "uniform:rank=8",
    "uniform:rank=16",
    "linear_decay",
    "attention_heavy",
    "three_band",
    "empirical:rank=8",
)
"""The arms of the published study (DialoGPT-medium on Alpaca), with `empirical` truly measured."""


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """A whole study: sections of shared settings and the grid over them."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    profile: ProfileConfig = ProfileConfig()
    tracking: TrackingConfig = TrackingConfig()

    study: str = option("study", "name of the study, first part of its id", limits=Limits(pattern=NAME), identity=False)
    methods: tuple[str, ...] = option(REFERENCE_METHODS, "NAME[:option=value,...] per method", identity=False)
    seeds: tuple[int, ...] = option(
        (0, 1, 2, 3, 4, 5), "seeds of initialisation, order and dropout", limits=SEED, identity=False
    )
    lr: tuple[float, ...] = option(
        (3e-4,),
        "learning rates; with several, each method's is chosen on validation",
        limits=Limits(above=0),
        identity=False,
    )
    engine: str = option(
        "auto",
        "serial: one trial after another; together: several at once over one frozen base, each as "
        "if alone; auto: together on a GPU",
        limits=Limits(choices=("auto", "serial", "together")),
        identity=False,
    )
    race: bool = option(
        False,
        "stop learning rates that are clearly behind at about one and two thirds of a training, by "
        "one rule for all methods (successive halving); such trials are never compared",
        identity=False,
        switch=True,
    )
    baseline: str | None = option(
        None, "label of the method that others are compared with; none: the first", identity=False
    )
    margin: float | None = option(
        None,
        "difference in test loss that does not matter; none: by margin_percent",
        unit="that of the loss",
        limits=Limits(above=0),
        identity=False,
    )
    margin_percent: float = option(
        1.0,
        "the margin where none is stated: per cent of what the baseline gains over the frozen base",
        unit="%",
        limits=Limits(above=0, high=100),
        identity=False,
    )
    correction: str = option(
        "holm",
        "correction for several methods that decides; max_t: Westfall-Young, more powerful; "
        "benjamini_hochberg: for screening, bounds the share of false findings",
        limits=Limits(choices=("holm", "max_t", "benjamini_hochberg")),
        identity=False,
    )

    @property
    def specs(self) -> tuple[MethodSpec, ...]:
        """The parsed methods in order."""
        return tuple(MethodSpec.parse(text) for text in self.methods)

    @property
    def baseline_label(self) -> str:
        """Label of the method that the others are compared with."""
        return self.baseline or self.specs[0].label

    def trials(self) -> Iterator[TrialSpec]:
        """Yield every trial; seed is the outer loop, so early results are already paired."""
        for seed in self.seeds:
            for fold in range(self.data.folds):
                for spec in self.specs:
                    for lr in self.lr:
                        yield TrialSpec(study=self, method=spec, seed=seed, fold=fold, lr=lr)

    def only_trial(self) -> TrialSpec:
        """Return the trial of a configuration that has one.

        Raises:
            ConfigError: it has several.
        """
        first, *others = self.trials()
        if others:
            raise ConfigError(
                f"train runs one trial; {1 + len(others)} were given (methods x seeds x folds x "
                "lr). Name one method, seed and learning rate, or use `study`."
            )
        return first

    def identity(self) -> dict[str, Any]:
        """Return the settings that all trials share and that make them comparable."""
        return {key: value for key, value, field in _flat_values(self) if field.metadata["identity"]}

    def flat(self) -> dict[str, Any]:
        """Return every setting under its option's name; `study_from` reads it back."""
        return {key: value for key, value, _ in _flat_values(self)}


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialSpec:
    """One method, seed, fold and learning rate of a study."""

    study: StudyConfig
    method: MethodSpec
    seed: int
    fold: int
    lr: float

    @property
    def label(self) -> str:
        """Run name, such as `uniform-r8·seed3·lr0.001`, with the fold where there are several."""
        fold = f"·fold{self.fold}" if self.study.data.folds > 1 else ""
        return f"{self.method.label}·seed{self.seed}{fold}·lr{self.lr:g}"

    def signature(self, fingerprint: Mapping[str, str]) -> str:
        """Return 16 hexadecimal digits over everything that determines the trial's numbers.

        Args:
            fingerprint: content hash of the base, digests of the data and of its tokens, resolved
                precision.
        """
        return digest(
            {
                **self.study.identity(),
                "method": self.method.to_dict(),
                "seed": self.seed,
                "fold": self.fold,
                "lr": self.lr,
                "surroundings": dict(fingerprint),
                "version": SIGNATURE_VERSION,
                # Other packages can change a method without a word from this one.
                **({"packages": list(packages)} if (packages := self.method.packages) else {}),
            }
        )


def digest(values: Mapping[str, Any]) -> str:
    """Return 16 hexadecimal digits of SHA-256 over values as canonical JSON."""
    text = json.dumps(values, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def option_fields() -> dict[str, tuple[str | None, dataclasses.Field[Any], Any]]:
    """Return every option: name -> (section or None, dataclass field, type)."""
    found: dict[str, tuple[str | None, dataclasses.Field[Any], Any]] = {}
    for field in dataclasses.fields(StudyConfig):
        kind: Any = type(field.default)
        if dataclasses.is_dataclass(field.default):
            for inner in dataclasses.fields(field.default):
                found[inner.name] = (field.name, inner, type_hints(kind)[inner.name])
        else:
            found[field.name] = (None, field, type_hints(StudyConfig)[field.name])
    return found


def _flat_values(study: StudyConfig) -> Iterator[tuple[str, Any, dataclasses.Field[Any]]]:
    for name, (section, field, _) in option_fields().items():
        value = getattr(getattr(study, section) if section else study, name)
        yield name, list(value) if isinstance(value, tuple) else value, field
