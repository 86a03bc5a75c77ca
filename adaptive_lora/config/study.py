"""The study: a grid of trials over one base and data set, and the identity of each trial."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
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
    WorkersConfig,
)
from adaptive_lora.errors import ConfigError
from adaptive_lora.options import Limits, option, type_hints

SIGNATURE_VERSION = 3
"""Version of the trial signature; raised when a code change alters results, so that old trials are not reused."""

REFERENCE_METHODS = (
    "uniform:rank=8",
    "uniform:rank=16",
    "linear_decay",
    "attention_heavy",
    "three_band",
    "empirical:rank=8",
)
"""The methods of the published study (DialoGPT-medium on Alpaca), with `empirical` measured."""


def ladder_rungs(methods: Sequence[str], ladder: Sequence[int], baseline: str | None) -> tuple[MethodSpec, ...]:
    """Return the methods of a ladder: the baseline at other ranks.

    Args:
        methods: methods of the study.
        ladder: ranks of the rungs.
        baseline: label of the study's baseline; None: its first method.

    Raises:
        ConfigError: the baseline is not `uniform` of a whole rank, has the rank of a rung, or more than all of them.
    """
    if not ladder:
        return ()
    specs = [MethodSpec.parse(text) for text in methods]
    base = next((spec for spec in specs if spec.label == baseline), specs[0])
    rank = _uniform_rank(base)
    if rank is None:
        raise ConfigError(
            f"ladder: required the baseline uniform:rank=R or uniform:budget=uniform-R, whose rank the ladder varies; "
            f"got {base.label}"
        )
    if rank in ladder:
        raise ConfigError(f"ladder: required ranks other than the baseline's, which is {rank}")
    if max(ladder) < rank:
        raise ConfigError(
            f"ladder: required a rank above the baseline's, which is {rank}, since larger ranks bound what there is to "
            f"win; got {', '.join(map(str, ladder))}"
        )
    return tuple(
        dataclasses.replace(base, options=dataclasses.replace(base.options, rank=other), budget=None)
        for other in ladder
    )


def _uniform_rank(spec: MethodSpec) -> int | None:
    """Return the rank of every site under `uniform`; None for other methods and for a budget in parameters."""
    if spec.name != "uniform":
        return None
    if spec.budget is None:
        return int(spec.options.rank)
    name, _, rank = spec.budget.partition("-")
    return int(rank) if name == "uniform" else None


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """A study: sections of shared settings, and the grid of methods, seeds, folds and learning rates."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    profile: ProfileConfig = ProfileConfig()
    tracking: TrackingConfig = TrackingConfig()
    worker: WorkersConfig = WorkersConfig()

    study: str = option(
        "study", "name of the study; its id starts with it", limits=Limits(pattern=NAME), identity=False
    )
    methods: tuple[str, ...] = option(
        REFERENCE_METHODS, "methods to compare, each NAME[:option=value,...]", identity=False
    )
    seeds: tuple[int, ...] = option(
        (0, 1, 2, 3, 4, 5),
        "seeds of initialisation, data order and dropout; one trial per seed",
        limits=SEED,
        identity=False,
    )
    until: str = option(
        "seeds",
        "end of the study; seeds: all seeds are trained; decided: seeds are added to methods that are open until each "
        "is better, worse or equivalent, or max_seeds is reached, with the error rate held over all looks",
        limits=Limits(choices=("seeds", "decided")),
        identity=False,
    )
    max_seeds: int = option(
        16, "most seeds of a study until it is decided", limits=Limits(low=2, high=20), identity=False
    )
    look_seeds: int = option(
        2, "seeds added between two looks of such a study", limits=Limits(low=1, high=18), identity=False
    )
    lr: tuple[float, ...] = option(
        (3e-4,),
        "learning rates; of several, each method's is chosen by validation loss",
        limits=Limits(above=0),
        identity=False,
    )
    engine: str = option(
        "auto",
        "serial: one trial after another; together: several trials at once on one frozen base, with "
        "the results of separate training; ray: in the processes of a Ray cluster; auto: serial",
        limits=Limits(choices=("auto", "serial", "together", "ray")),
        identity=False,
    )
    race: bool = option(
        False,
        "stop trials whose learning rate is clearly worse at about one and two thirds of the training, "
        "by one rule for all methods (successive halving); stopped trials are never compared",
        identity=False,
        switch=True,
    )
    baseline: str | None = option(
        None, "label of the method that the others are compared with; none: the first", identity=False
    )
    ladder: tuple[int, ...] = option(
        (),
        "ranks that uniform is trained at beside the budget's: those above bracket what any allocation could win",
        limits=Limits(low=1),
        identity=False,
    )
    margin: float | None = option(
        None,
        "largest difference in test loss that counts as equivalent; none: computed from margin_percent",
        unit="that of the loss",
        limits=Limits(above=0),
        identity=False,
    )
    margin_percent: float = option(
        1.0,
        "margin where none is given, as a percentage of the baseline's gain over the frozen base",
        unit="%",
        limits=Limits(above=0, high=100),
        identity=False,
    )
    max_forgetting: float | None = option(
        None,
        "most that the champion may forget of any retain_data: the upper end of the interval of its loss after "
        "training minus the frozen base's; none: not bounded, unless by max_forgetting_percent",
        unit="that of the loss",
        limits=Limits(low=0),
        identity=False,
    )
    max_forgetting_percent: float | None = option(
        None,
        "the same bound, as a percentage of the frozen base's loss on the retain_data",
        unit="%",
        limits=Limits(low=0),
        identity=False,
    )
    correction: str = option(
        "holm",
        "correction of p-values for several methods; holm: bounds the chance of any false finding; "
        "max_t: the same by Westfall-Young, more powerful; benjamini_hochberg: bounds the share of "
        "false findings, for screening",
        limits=Limits(choices=("holm", "max_t", "benjamini_hochberg")),
        identity=False,
    )

    @property
    def specs(self) -> tuple[MethodSpec, ...]:
        """The parsed methods in order, and the rungs of the ladder that are not among them."""
        methods = {spec.label: spec for spec in map(MethodSpec.parse, self.methods)}
        for rung in ladder_rungs(self.methods, self.ladder, self.baseline):
            methods.setdefault(rung.label, rung)
        return tuple(methods.values())

    def trials(self) -> Iterator[TrialSpec]:
        """Yield every trial; seed is the outer loop, so early results are already paired."""
        specs = self.specs
        for seed in self.seeds:
            for fold in range(self.data.folds):
                for spec in specs:
                    for lr in spec.lr or self.lr:
                        yield TrialSpec(config=self, method=spec, seed=seed, fold=fold, lr=lr)

    def seeds_by_look(self) -> tuple[tuple[int, ...], ...]:
        """Return the seeds that each look adds: those given, then the next free ones, `look_seeds` at a time."""
        further = [seed for seed in range(max(self.seeds) + 1, max(self.seeds) + 1 + self.max_seeds)]
        further = further[: self.max_seeds - len(self.seeds)]
        step = self.look_seeds
        return (self.seeds, *(tuple(further[at : at + step]) for at in range(0, len(further), step)))

    def seeds_at_looks(self) -> tuple[int, ...]:
        """Return the number of seeds at each look."""
        return tuple(accumulate(map(len, self.seeds_by_look())))

    def only_trial(self) -> TrialSpec:
        """Return the only trial of a configuration.

        Raises:
            ConfigError: the configuration has several trials.
        """
        first, *others = self.trials()
        if others:
            raise ConfigError(
                f"train runs one trial; {1 + len(others)} were given (methods x seeds x folds x "
                "lr). Name one method, seed and learning rate, or use `study`."
            )
        return first

    def identity(self) -> dict[str, Any]:
        """Return the settings that all trials share and that must be equal for trials to be compared."""
        return {key: value for key, value, field in _flat_values(self) if field.metadata["identity"]}

    def flat(self) -> dict[str, Any]:
        """Return option name -> value of every setting; `study_from` reads it back."""
        return {key: value for key, value, _ in _flat_values(self)}


@dataclass(frozen=True, kw_only=True, slots=True)
class TrialSpec:
    """One method, seed, fold and learning rate of a study."""

    config: StudyConfig
    method: MethodSpec
    seed: int
    fold: int
    lr: float

    @property
    def label(self) -> str:
        """Run name, such as `uniform-r8·seed3·lr0.001`, with the fold where there are several."""
        fold = f"·fold{self.fold}" if self.config.data.folds > 1 else ""
        return f"{self.method.label}·seed{self.seed}{fold}·lr{self.lr:g}"

    def signature(self, fingerprint: Mapping[str, str]) -> str:
        """Return 16 hexadecimal digits over everything that determines the trial's numbers.

        Args:
            fingerprint: content hash of the base, digests of the data and of its token ids, and the
                precision in use.
        """
        return digest(
            {
                **self.config.identity(),
                "method": self.method.to_dict(),
                "seed": self.seed,
                "fold": self.fold,
                "lr": self.lr,
                "surroundings": dict(fingerprint),
                "version": SIGNATURE_VERSION,
                # Another package's release can change a method's results.
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
