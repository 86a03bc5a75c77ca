"""Shapes of the commands' documents; the text below a field is its description."""

from __future__ import annotations

import typing
from typing import Any, NotRequired, Required, TypedDict

from adaptive_lora.allocation.site import AdapterSite


class SiteShape(TypedDict):
    """Adapter of one linear layer."""

    name: str
    """Full module name."""
    layer: int
    role: str
    tower: str
    """Tower of a base with several; empty for others."""
    in_features: int
    out_features: int
    rank: int
    alpha: float
    scale: float
    """Factor of the update B·A."""
    step_size: float
    """Factor x rank, which Adam's first update grows with."""
    lr_multiplier: float
    parameters: int
    packable: NotRequired[bool]
    """False for a layer whose weight is not stored in 4 bit; absent for others."""
    frozen_a: NotRequired[bool]
    """True where A is not trained, and `parameters` counts B alone (LoRA-FA); absent for others."""
    saved_rank: NotRequired[int]
    """Rank of the saved adapter, where it also holds what `init` took out of the weight; absent for others."""
    experts: NotRequired[int]
    """Number of routed experts that the site stacks; absent for a linear layer, as is the next."""
    active: NotRequired[int]
    """Number of experts that a token runs through."""


class CertificateShape(TypedDict):
    """Predicted gain of the ranks, and its bounds."""

    metric: str
    captured: float
    bound: float
    optimal: bool
    best: float
    uniform: float
    idle_parameters: int
    replicates: int
    headroom_lower: float | None
    threshold: float | None
    gap: float
    headroom: float
    abstained: bool
    everything: float | None
    """Gain of all components, whatever their cost."""
    covering_rank: int | None
    """Least uniform rank that covers every component with a gain."""
    reason: str
    """Reason why the ranks gain no more than uniform's; empty where they do."""


class MemoryShape(TypedDict):
    """Estimated memory of the training, in bytes, and the settings that it holds for."""

    weights: int
    adapters: int
    activations: int
    head: int
    work: int
    low: int
    expected: int
    high: int
    micro_batch: int
    """Number of examples per forward pass."""
    gradient_checkpointing: bool


class GpuNeedShape(TypedDict):
    """Number of GPUs of one size for one trial, bytes and settings of each; null: it does not fit."""

    base: typing.Literal["bf16", "nf4"]
    fsdp: bool
    """False: each GPU holds the whole base."""
    gpu_gib: int
    gpus: int | None
    expected: int | None
    high: int | None
    micro_batch: int | None
    gradient_checkpointing: bool | None


class EmittedShape(TypedDict):
    """The plan in the form of a tool."""

    form: str
    text: str
    caveats: list[str]
    """Properties of the plan that the form cannot represent, in sentences."""


class PlanShape(TypedDict):
    """A plan with its totals: of ranks per site, or of a tuner's tensors."""

    method: str
    budget: int | None
    """Maximum number of trainable parameters; null: none was given."""
    trainable_parameters: int
    total_parameters: int
    reduction_vs_full: float
    """1 - trainable / total."""
    equals_uniform_rank: float
    note: str | None
    not_adaptable: dict[str, str]
    """Name of each linear layer without a site -> reason."""
    memory: MemoryShape
    gpus: list[GpuNeedShape]
    engine: list[str]
    scaling: NotRequired[str]
    trained_rank: NotRequired[int | None]
    scaling_in_training: NotRequired[str]
    dora: NotRequired[bool]
    lora_plus: NotRequired[float]
    base: NotRequired[str]
    init: NotRequired[str]
    """Initial weights of A and B; absent for random A and zero B."""
    invocation: NotRequired[str]
    """Text from whose last occurrence on the adapter acts (aLoRA); absent for others."""
    left_out: NotRequired[list[str]]
    certificate: NotRequired[CertificateShape | None]
    sites: NotRequired[list[SiteShape]]
    """Adapters; absent for tuners without ranks."""
    family: NotRequired[str]
    """Name of the tuner; absent for plans of ranks, as are the keys below."""
    settings: NotRequired[dict[str, Any]]
    positions: NotRequired[int]
    notes: NotRequired[list[str]]
    tensors: NotRequired[Any]
    kept: NotRequired[Any]
    emitted: NotRequired[EmittedShape]
    """The plan in the form of `--emit`."""


class SeenShape(TypedDict):
    """Components above the noise edge from some of the calibration examples."""

    examples: int
    components: int
    rank: int
    """Least uniform rank that covers them all."""


class VisibleShape(TypedDict):
    """Components that a profile could see above the noise edge."""

    components: dict[str, int]
    """Site name -> number of components."""
    whole: SeenShape
    halves: list[SeenShape]
    settled: int | None
    """Number of examples from which on the covering rank stayed the same; null: still changing."""


class ProfileShape(TypedDict):
    """An importance profile, as `plan --profile` reads it."""

    metric: str
    scores: dict[str, float]
    """Site name -> score; only ratios have a meaning."""
    spectra: dict[str, list[float]] | None
    replicates: list[dict[str, list[float]]]
    tokens: int
    processed_tokens: int
    seconds: float
    seed: int
    stability: float | None
    """Spearman correlation between the scores of the two halves of the examples; null where undefined."""
    stability_note: str
    unrouted: list[str]
    """Routed experts, `NAME[index]`, that no calibration token reached."""
    sites: list[AdapterSite]
    """The sites that were measured, in module order."""
    together: list[str]
    """Metrics measured in the same passes, of which `seconds` is the time."""
    visible: NotRequired[VisibleShape | None]
    """Components above the noise; null for metrics without a noise edge."""
    others: NotRequired[list[dict[str, Any]]]
    """Profiles of the further metrics that were asked for, each with the keys above."""


class TrainShape(TypedDict):
    """The finished run of a trial."""

    study_id: str
    run_id: str
    trial: str
    trained: bool
    """False where the trial had been finished before."""
    adapter: str | None
    """Folder of `--adapter`."""
    metrics: dict[str, float | None]


EvaluateShape = TypedDict(
    "EvaluateShape", {"test/loss": Required[float], "test/examples": Required[float], "data_digest": Required[str]}
)


class PushedShape(TypedDict):
    """A commit on the hub that was read back."""

    repository: str
    branch: str
    url: str
    commit: str
    private: bool
    created: bool
    unchanged: bool
    """Mark of a push without a commit, because the branch had the same files."""
    sha256: dict[str, str]
    """Name of each file -> SHA-256 of its content."""
    replaced: list[str]
    deleted: list[str]
    kept: list[str]
    left_out: list[str]


class ExportShape(TypedDict):
    """Adapter or model that an export wrote."""

    folder: str | None
    """The new folder; null for a push."""
    form: typing.Literal["trained", "uniform", "merged"]
    rank: int | None
    """Rank that a server must allow; null for a merged model and a push."""
    pushed: PushedShape | None


class ChampionShape(TypedDict):
    """Version in the model registry."""

    name: str
    version: str


class RecordShape(TypedDict):
    """Where a study's result is; runs made elsewhere have no study, record and champion."""

    headline: str
    fairness: list[str]
    """Findings that make the comparison less than fair."""
    study_id: NotRequired[str]
    report: NotRequired[str]
    """Path of the page."""
    tracking_uri: NotRequired[str]
    champion: NotRequired[ChampionShape | None]
    no_champion: NotRequired[str]
    """Reason why there is none."""


class TeacherShape(TypedDict):
    """The study of one planted teacher."""

    data: str
    study_id: str
    recovered: dict[str, float]
    """Method -> share of what the planted ranks gain over uniform."""
    comparison: dict[str, Any]
    """As `compare` prints it."""


class IntervalShape(TypedDict):
    """Confidence interval, or the reason why there is none."""

    low: float | None
    high: float | None
    method: str
    note: str


class PlantedRowShape(TypedDict):
    """One method on one pattern."""

    pattern: str
    method: str
    trials: int
    """Number of pairs, each of one teacher and seed."""
    headroom: float
    """Gain of the planted ranks as a share of uniform's loss."""
    headroom_interval: IntervalShape
    separates: bool
    """Mark of a pattern on which methods can be told apart."""
    recovered: float | None
    """Share of that gain; null where the planted ranks gain nothing."""
    interval: IntervalShape
    verdict: str
    """Verdict against uniform."""
    trainings: float | None
    """Cost of one trial with its profile and search, in trainings."""
    lr: float | None
    """Its learning rate; null where pooled studies chose different ones."""


class PlantedShape(TypedDict):
    """One study per teacher; of several draws also their comparison together."""

    studies: list[TeacherShape]
    table: list[PlantedRowShape]
    """One row per pattern and method, of all draws together."""


class RunShape(TypedDict):
    """Trials run by a call."""

    trials_run: int


class CellShape(TypedDict):
    """Ranks of one task, trained and tested on another, compared with uniform ranks."""

    allocated_on: str
    trained_on: str
    method: str
    difference: float | None
    interval: str
    verdict: str
    trainable_parameters: float | None


class TransferShape(TypedDict):
    """One cell per pair of tasks."""

    tasks: list[str]
    method: str
    cells: list[CellShape]
    studies: dict[str, str]


class FindingShape(TypedDict):
    """Result of one check; the document is a list of these."""

    check: str
    status: typing.Literal["ok", "warn", "fail"]
    text: str


class UiShape(TypedDict):
    """Address of the user interface."""

    url: str
    started: bool
    """True where this command serves it; false for a server that is already there."""


class UpgradeShape(TypedDict):
    """The upgrade of a store."""

    tracking_uri: str
    upgraded: bool
    backup: str | None


class JournalShape(TypedDict):
    """Outcome of the delivery of one journal."""

    folder: str
    run_id: str
    metrics: int
    found: int
    left: str
    held: bool
    waiting: bool


class SyncShape(TypedDict):
    """Outcome of the delivery."""

    journals: list[JournalShape]
    left: int


class FailureShape(TypedDict):
    """An error that the user can fix."""

    type: str
    """Class of the error, such as `ConfigError`; `UsageError` for a wrong option or argument."""
    message: str
    exit_code: int


class ErrorShape(TypedDict):
    """Error that a command prints in place of its document."""

    error: FailureShape
