"""The sections of a study's settings. The dataclass fields hold the only defaults there are."""

from __future__ import annotations

from dataclasses import dataclass

from adaptive_lora.allocation.scaling import DEFAULT_ALPHA, Scaling
from adaptive_lora.config.precision import Precision
from adaptive_lora.config.size import MemorySize
from adaptive_lora.options import Limits, option
from adaptive_lora.serving.tasks import TASKS

NAME = r"(?!\.+$)[\w.\-]{1,200}"
"""Names that become part of paths, tags and registry entries."""
SEED = Limits(low=0, high=2**32 - 1)
EXPERIMENT = Limits(pattern=r"(?!.*(^|/)\.\.(/|$))[^\x00-\x1f\x7f-\x9f]{1,500}", says="1 to 500 signs without '..'")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The frozen base model. A trial's identity holds its content hash, not these names."""

    model: str = option("embedded", "base model: 'embedded', a local folder, a GGUF file or a hub id", identity=False)
    revision: str | None = option(None, "hub revision (branch, tag or commit)", identity=False)
    trust_remote_code: bool = option(
        False,
        "run Python code that comes with the base; read it first (its content enters the identity)",
        identity=False,
    )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which examples, how they become prompts, and how they are divided.

    A trial's identity holds the digest of the rendered examples, not file names and columns.
    """

    data: str = option(
        "embedded",
        "'embedded', a JSON/JSONL/CSV/TSV/Parquet file, a hub data set id, or planted:option=value,... for texts of a "
        "planted teacher",
        identity=False,
    )
    task: str = option(
        "auto",
        "what the base is trained to do; auto: by the base and the data's columns",
        limits=Limits(choices=("auto", *TASKS)),
        identity=False,  # the task that was found is part of it
    )
    test_data: str | None = option(
        None, "file of the test part; data then gives the other parts, without prompts that stand there", identity=False
    )
    data_subset: str | None = option(
        None, "subset of a hub data set that has several, such as main of GSM8K", identity=False
    )
    data_revision: str | None = option(None, "hub revision of the data set", identity=False)
    test_split: str | None = option(None, "split of a hub data set that is the test part, as test_data", identity=False)
    data_split: str = option("train", "split of a hub data set", identity=False)
    template: str = option("auto", "prompt template by name, or a YAML file; 'auto' by columns", identity=False)
    prompt_column: str | None = option(
        None, "column of the instruction, text or question; common names are found", identity=False
    )
    input_column: str | None = option(
        None, "column of the optional input or context, or of a pair's second text", identity=False
    )
    response_column: str | None = option(None, "column of the response, label, target or caption", identity=False)
    image_column: str | None = option(None, "column of the image", identity=False)
    max_examples: int | None = option(
        None, "use this many examples, drawn by split_seed; none: all", limits=Limits(low=1)
    )
    on_bad_row: str = option(
        "refuse",
        "what becomes of rows that cannot be used, such as empty responses, prompts that leave no "
        "room, unreadable images: refuse: none is trained on; skip: they are left out and counted",
        limits=Limits(choices=("refuse", "skip")),
        identity=False,  # what was left out is part of it
    )
    max_tokens: int = option(
        512, "longest prompt plus response; longer responses are cut", unit="tokens", limits=Limits(low=8)
    )
    loss_on: str = option("response", "tokens that are learned", limits=Limits(choices=("response", "all")))
    validation_share: float = option(0.1, "share of prompts kept for validation", limits=Limits(above=0, high=0.5))
    test_share: float = option(
        0.15,
        "share of prompts kept for the test; with folds each fold is the test part once",
        limits=Limits(above=0, high=0.5),
    )
    split_seed: int = option(0, "seed of the division into parts; the same for every trial seed", limits=SEED)
    folds: int = option(1, "k of k-fold cross-validation; 1: one division", limits=Limits(low=1))


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One trial's optimisation; the same for every method."""

    epochs: float = option(3.0, "passes over the training part", limits=Limits(above=0))
    max_steps: int | None = option(None, "stop after this many optimiser steps", unit="steps", limits=Limits(low=1))
    batch_size: int = option(8, "examples per forward pass", limits=Limits(low=1))
    accumulation: int = option(1, "forward passes per optimiser step", limits=Limits(low=1))
    schedule: str = option("cosine", "learning rate after warm-up", limits=Limits(choices=("cosine", "linear")))
    warmup_share: float = option(0.1, "share of the steps in which the rate rises", limits=Limits(low=0, high=1))
    weight_decay: float = option(0.0, "AdamW weight decay", limits=Limits(low=0))
    clip_norm: float = option(1.0, "gradient norm limit; 0: none", limits=Limits(low=0))
    dropout: float = option(0.0, "dropout before each adapter's A", limits=Limits(low=0, high=0.9))
    base_dropout: bool = option(
        True,
        "dropout inside the base while training, as its configuration has it; without, trials can "
        "train together, and packed rows use a GPU's flash attention",
    )
    alpha: float = option(
        DEFAULT_ALPHA,
        "LoRA's alpha, PEFT's lora_alpha, the same at all sites; under scaling constant that of a site of rank 16",
        limits=Limits(above=0),
    )
    scaling: str = option(
        "standard",
        "factor of the update: standard: alpha / rank; rslora: alpha / sqrt(rank); constant: "
        "alpha / 16 at every rank (rank and step size then grow together)",
        limits=Limits(choices=tuple(Scaling)),
    )
    precision: str = option(
        "auto", "compute type; auto: what the device does natively", limits=Limits(choices=("auto", *Precision))
    )
    batching: str = option(
        "auto",
        "packed: a batch's examples run as one row without padding, by fused steps (equal to about "
        "1e-6); padded: the model's and PEFT's own steps; auto: packed where the base can",
        limits=Limits(choices=("auto", "packed", "padded")),
    )
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass: less memory, more time")
    max_memory: MemorySize | None = option(  # noqa: RUF009
        None,
        "limit such as 6GiB: sets examples per forward pass and gradient_checkpointing so that the "
        "memory formula stays within it, with the same batch; none: the whole batch at once",
        identity=False,
    )
    validations: int = option(5, "validation passes spread over the training", limits=Limits(low=1))
    patience: int = option(0, "stop after this many validations without improvement; 0: never", limits=Limits(low=0))
    max_skipped_steps: int = option(
        5, "non-finite steps after which the trial fails", unit="steps", limits=Limits(low=0)
    )


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """How a trained adapter is scored on the test part."""

    generate: str = option(
        "auto",
        "score exact match by greedy generation; auto: where responses are short",
        limits=Limits(choices=("auto", "on", "off")),
    )
    short_answer_tokens: int = option(
        16, "longest reference that counts as a short answer", unit="tokens", limits=Limits(low=1)
    )
    eval_batch_size: int = option(
        32,
        "examples per forward pass without gradients; of packed ones as many as have 128 tokens each on average",
        limits=Limits(low=1),
        identity=False,
    )


@dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    """How importance is measured, on training examples only."""

    profile_batches: int = option(4, "calibration batches", limits=Limits(low=1))
    profile_batch_size: int = option(8, "examples per calibration batch", limits=Limits(low=1))
    probe_rank: int = option(8, "rank of the adapters that ablation and output_energy train", limits=Limits(low=1))
    probe_epochs: float = option(1.0, "passes over the training part of that training", limits=Limits(above=0))


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Where results go; no part of an experiment's identity."""

    output: str = option("adaptive-lora-out", "folder for reports and adapters", identity=False)
    tracking_uri: str | None = option(
        None, "MLflow tracking store; none: MLFLOW_TRACKING_URI or sqlite:///mlflow.db", identity=False
    )
    experiment: str | None = option(
        None,
        "MLflow experiment; none: MLFLOW_EXPERIMENT_NAME, MLFLOW_EXPERIMENT_ID or adaptive-lora",
        limits=EXPERIMENT,
        identity=False,
    )
    registered_model: str = option(
        "adaptive-lora", "name in the model registry", limits=Limits(pattern=NAME), identity=False
    )
    checkpoints: str | None = option(
        None, "folder for checkpoints of unfinished trials; none: in the output", identity=False
    )
    checkpoint_minutes: float = option(
        5.0, "time between two checkpoints of a training", unit="minutes", limits=Limits(above=0), identity=False
    )
    checkpoint_steps: int | None = option(
        None,
        "optimiser steps between two checkpoints; none: by time alone",
        unit="steps",
        limits=Limits(low=1),
        identity=False,
    )
    claim_minutes: float = option(
        2.0,
        "silence after which the trial of another machine's process is taken over",
        unit="minutes",
        limits=Limits(above=0),
        identity=False,
    )
