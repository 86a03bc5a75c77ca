"""The sections of a study's settings. The dataclass fields are the only source of defaults."""

from __future__ import annotations

from dataclasses import dataclass

from adaptive_lora.allocation.scaling import DEFAULT_ALPHA, Scaling
from adaptive_lora.config.types import MemorySize, Precision
from adaptive_lora.options import Limits, option
from adaptive_lora.serving.tasks import TASKS

NAME = r"(?!\.+$)[\w.\-]{1,200}"
"""Regular expression of names that become part of paths, tags and registry entries."""
SEED = Limits(low=0, high=2**32 - 1)
EXPERIMENT = Limits(
    pattern=r"(?!.*(^|/)\.\.(/|$))[^\x00-\x1f\x7f-\x9f]{1,500}", says="1 to 500 characters without '..'"
)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The frozen base model. A trial's identity includes its content hash, not these names."""

    model: str = option("embedded", "base model: 'embedded', a local folder, a GGUF file or a hub id", identity=False)
    revision: str | None = option(None, "hub revision (branch, tag or commit)", identity=False)
    trust_remote_code: bool = option(
        False,
        "run the Python code in the base's repository; read it first (its content enters the identity)",
        identity=False,
    )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Examples, prompt template and splits.

    A trial's identity includes the digest of the rendered examples, not file names and columns.
    """

    data: str = option(
        "embedded",
        "source of the data: 'embedded', a JSON/JSONL/CSV/TSV/Parquet file, a hub data set id, or "
        "planted:option=value,... for texts of a planted teacher",
        identity=False,
    )
    task: str = option(
        "auto",
        "task to train for; auto: by the base's model class and the data's columns",
        limits=Limits(choices=("auto", *TASKS)),
        identity=False,  # the resolved task enters it
    )
    test_data: str | None = option(
        None,
        "file of the test split; rows of data whose prompt is also in it are removed from the other splits",
        identity=False,
    )
    data_subset: str | None = option(
        None, "subset of a hub data set that has several, such as main of GSM8K", identity=False
    )
    data_revision: str | None = option(None, "hub revision of the data set", identity=False)
    test_split: str | None = option(
        None, "split of the hub data set used as the test split, as with test_data", identity=False
    )
    data_split: str = option("train", "split of the hub data set to read", identity=False)
    template: str = option("auto", "prompt template: a name or a YAML file; auto: by the columns", identity=False)
    prompt_column: str | None = option(
        None, "column of the instruction, text or question; none: found by common names", identity=False
    )
    input_column: str | None = option(
        None, "column of the optional input or context, or of a pair's second text", identity=False
    )
    response_column: str | None = option(
        None, "column of the response, label, target, caption or transcript", identity=False
    )
    image_column: str | None = option(None, "column of the image", identity=False)
    audio_column: str | None = option(None, "column of the recording", identity=False)
    language: str | None = option(
        None,
        "language of the recordings, by name or code, for a base that knows several; none: that of its processor",
        identity=False,  # its tokens enter it
    )
    max_examples: int | None = option(
        None, "number of examples to use, drawn at random by split_seed; none: all", limits=Limits(low=1)
    )
    on_bad_row: str = option(
        "refuse",
        "rows that cannot be used (empty response, prompt longer than max_tokens, unreadable image or recording): "
        "refuse: stop with an error; skip: leave them out and count them",
        limits=Limits(choices=("refuse", "skip")),
        identity=False,  # the rows left out enter it
    )
    max_tokens: int = option(
        512, "maximum length of prompt plus response; longer responses are cut", unit="tokens", limits=Limits(low=8)
    )
    loss_on: str = option("response", "tokens that the loss is computed on", limits=Limits(choices=("response", "all")))
    validation_share: float = option(0.1, "share of prompts in the validation split", limits=Limits(above=0, high=0.5))
    test_share: float = option(
        0.15,
        "share of prompts in the test split; with folds, each fold is the test split once",
        limits=Limits(above=0, high=0.5),
    )
    split_seed: int = option(0, "seed of the splits; independent of the trials' seeds", limits=SEED)
    folds: int = option(
        1, "number k of folds of k-fold cross-validation; 1: one fixed test split", limits=Limits(low=1)
    )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Optimisation of one trial; equal for all methods."""

    epochs: float = option(3.0, "passes over the training split", limits=Limits(above=0))
    max_steps: int | None = option(None, "stop after this many optimiser steps", unit="steps", limits=Limits(low=1))
    batch_size: int = option(8, "examples per forward pass", limits=Limits(low=1))
    accumulation: int = option(1, "forward passes per optimiser step (gradient accumulation)", limits=Limits(low=1))
    schedule: str = option(
        "cosine", "decay of the learning rate after warm-up", limits=Limits(choices=("cosine", "linear"))
    )
    warmup_share: float = option(
        0.1, "share of the optimiser steps used for linear warm-up", limits=Limits(low=0, high=1)
    )
    weight_decay: float = option(0.0, "AdamW weight decay", limits=Limits(low=0))
    clip_norm: float = option(1.0, "maximum gradient norm; 0: no clipping", limits=Limits(low=0))
    dropout: float = option(0.0, "dropout probability before each adapter's A", limits=Limits(low=0, high=0.9))
    base_dropout: bool = option(
        True,
        "keep the base's own dropout in training; with false, several trials can train together and "
        "packed rows use flash attention on a GPU",
    )
    alpha: float = option(
        DEFAULT_ALPHA,
        "LoRA's alpha (PEFT's lora_alpha), equal at all sites; with scaling constant, that of a site of rank 16",
        limits=Limits(above=0),
    )
    scaling: str = option(
        "standard",
        "factor of the update B·A: standard: alpha / rank; rslora: alpha / sqrt(rank); constant: "
        "alpha / 16 at every rank (the step size then grows with rank)",
        limits=Limits(choices=tuple(Scaling)),
    )
    precision: str = option(
        "auto",
        "number format of forward and backward passes; auto: the best that the device supports natively",
        limits=Limits(choices=("auto", *Precision)),
    )
    batching: str = option(
        "auto",
        "packed: the examples of a batch as one row without padding, by fused kernels (results equal "
        "to about 1e-6); padded: the model's and PEFT's own code; auto: packed where the base allows it",
        limits=Limits(choices=("auto", "packed", "padded")),
    )
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass: less memory, more time")
    max_memory: MemorySize | None = option(  # noqa: RUF009
        None,
        "memory limit such as 6GiB; sets examples per forward pass and gradient_checkpointing so that "
        "the estimated memory stays below it, with the batch unchanged; none: the whole batch at once",
        identity=False,
    )
    validations: int = option(5, "number of validation passes, evenly spaced over the training", limits=Limits(low=1))
    patience: int = option(
        0, "validation passes without improvement after which training stops; 0: never", limits=Limits(low=0)
    )
    max_skipped_steps: int = option(
        5, "steps with a non-finite loss or gradient after which the trial fails", unit="steps", limits=Limits(low=0)
    )


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Scoring of a trained adapter on the test split."""

    generate: str = option(
        "auto",
        "score exact match by greedy generation; auto: where reference responses are short",
        limits=Limits(choices=("auto", "on", "off")),
    )
    short_answer_tokens: int = option(
        16, "maximum length of a reference that counts as short, for generate auto", unit="tokens", limits=Limits(low=1)
    )
    eval_batch_size: int = option(
        32,
        "examples per forward pass without gradients; packed batches take this many times 128 tokens",
        limits=Limits(low=1),
        identity=False,
    )
    retain_data: tuple[str, ...] = option(
        (),
        "other data of the same task, to measure what training makes the base forget: "
        "SOURCE[:option=value,...], read as --data is; given once per source",
        identity=False,  # nothing is trained on it
        repeated=True,
    )


@dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    """Measurement of importance, on training examples only."""

    profile_batches: int = option(4, "number of calibration batches", limits=Limits(low=1))
    profile_batch_size: int = option(8, "examples per calibration batch", limits=Limits(low=1))
    probe_rank: int = option(
        8, "rank of the adapters trained for the metrics ablation and output_energy", limits=Limits(low=1)
    )
    probe_epochs: float = option(1.0, "passes over the training split to train these adapters", limits=Limits(above=0))


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Places where results are written; not part of an experiment's identity."""

    output: str = option("adaptive-lora-out", "folder for reports and adapters", identity=False)
    tracking_uri: str | None = option(
        None, "URI of the MLflow tracking store; none: MLFLOW_TRACKING_URI or sqlite:///mlflow.db", identity=False
    )
    experiment: str | None = option(
        None,
        "name of the MLflow experiment; none: MLFLOW_EXPERIMENT_NAME, MLFLOW_EXPERIMENT_ID or adaptive-lora",
        limits=EXPERIMENT,
        identity=False,
    )
    registered_model: str = option(
        "adaptive-lora",
        "name of the registered model in the model registry",
        limits=Limits(pattern=NAME),
        identity=False,
    )
    checkpoints: str | None = option(
        None,
        "folder for checkpoints of unfinished trials, or URL of a storage that fsspec reaches, such as "
        "s3://bucket/folder, for copies of them; none: inside the output folder",
        identity=False,
    )
    checkpoint_minutes: float = option(
        5.0, "time between two checkpoints of a trial", unit="minutes", limits=Limits(above=0), identity=False
    )
    checkpoint_steps: int | None = option(
        None,
        "optimiser steps between two checkpoints; none: by time alone",
        unit="steps",
        limits=Limits(low=1),
        identity=False,
    )
    lease_minutes: float = option(
        2.0,
        "time without a sign of life after which a study that another machine's command runs is taken over",
        unit="minutes",
        limits=Limits(above=0),
        identity=False,
    )
    wait: bool = option(
        False,
        "wait until another command on the same study has ended, instead of leaving with an error",
        identity=False,
        switch=True,
    )


@dataclass(frozen=True, kw_only=True)
class WorkersConfig:
    """Processes that run the trials, here or in a Ray cluster; not part of an experiment's identity."""

    devices: str = option(
        "one",
        "GPUs of this machine to use: one: the first; all, or numbers such as 0,2: a worker process on each",
        limits=Limits(pattern=r"one|all|\d{1,3}(,\d{1,3})*", says="one, all, or numbers such as 0,2"),
        identity=False,
    )
    workers: int | None = option(
        None,
        "number of worker processes: on a CPU, whose cores they share; with engine ray at most so many in "
        "the cluster; none: no worker process on a CPU, with ray as many as it has room for",
        limits=Limits(low=1, high=10_000),
        identity=False,
    )
    group_size: int | None = option(
        None,
        "maximum number of trials that a process trains together on one base; none: 16 with engine "
        "together, otherwise 1",
        limits=Limits(low=1, high=256),
        identity=False,
    )
    ray_address: str | None = option(
        None,
        "Ray cluster to join: auto, HOST:PORT or ray://HOST:PORT; none: one is started on this machine",
        identity=False,
    )
    gpus_per_trial: float | None = option(
        None,
        "GPUs of a Ray worker; a fraction puts several workers on one GPU without dividing its memory; none: "
        "1 where the cluster has GPUs, otherwise 0",
        limits=Limits(low=0, high=64),
        identity=False,
    )
    cpus_per_trial: int = option(
        1, "CPU cores of a Ray worker, and its number of threads", limits=Limits(low=1, high=1024), identity=False
    )
    worker_minutes: float = option(
        30.0,
        "time without a sign of life (a step, a forward pass) after which a worker is replaced",
        unit="minutes",
        limits=Limits(above=0),
        identity=False,
    )
