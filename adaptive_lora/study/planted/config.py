"""Settings of the planted benchmark; the dataclass holds the only defaults."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from adaptive_lora.allocation import MethodSpec
from adaptive_lora.config import StudyConfig, digest, study_from
from adaptive_lora.config.study import SIGNATURE_VERSION
from adaptive_lora.errors import ConfigError
from adaptive_lora.options import Limits, option
from adaptive_lora.study.planted.patterns import PATTERNS, SPECTRA


@dataclass(frozen=True, kw_only=True)
class PlantedConfig:
    """Which changes are planted, who has to find them, and how long everyone is trained."""

    model: str = option("embedded", "base model: 'embedded', a local folder or a hub id")
    patterns: tuple[str, ...] = option(tuple(PATTERNS), "where rank is planted", limits=Limits(choices=tuple(PATTERNS)))
    spectra: tuple[str, ...] = option(
        ("flat",), "singular values of the planted change", limits=Limits(choices=tuple(SPECTRA))
    )
    methods: tuple[str, ...] = option(
        ("empirical", "waterfill", "random:of=waterfill"),
        "NAME[:option=value,...] per method; uniform and the oracle always take part",
    )
    budget: str = option("uniform-2", "parameters of the planted change and of every method: a number or uniform-R")
    seeds: tuple[int, ...] = option(tuple(range(8)), "seeds of teacher, text, initialisation and order")
    distance: float = option(
        0.5, "KL(teacher || base) that the planted change is scaled to", unit="nats per token", limits=Limits(above=0)
    )
    examples: int = option(512, "texts of the teacher to learn from", limits=Limits(low=8))
    test_examples: int = option(128, "texts of the teacher to test on", limits=Limits(low=8))
    length: int = option(16, "length of each text", unit="tokens", limits=Limits(low=2))
    steps: int = option(800, "optimiser steps of each method", limits=Limits(low=1))
    batch_size: int = option(8, "texts per step", limits=Limits(low=1))
    lr: float = option(1e-2, "learning rate of every method", limits=Limits(above=0))
    precision: str = option("fp32", "compute type", limits=Limits(choices=("auto", "fp32", "bf16", "fp16")))
    output: str = option("adaptive-lora-out", "folder for cells, table and figure", identity=False)

    def __post_init__(self) -> None:
        """Refuse empty lists and lists that say a thing twice."""
        for name, items in (
            ("patterns", self.patterns),
            ("spectra", self.spectra),
            ("methods", tuple(MethodSpec.parse(text).label for text in self.methods)),
            ("seeds", self.seeds),
        ):
            if len(set(items)) < len(items):
                raise ConfigError(f"{name}: given more than once in {', '.join(map(str, items))}")
        for text in self.methods:
            if not MethodSpec.parse(text).options.gives_ranks:
                raise ConfigError(f"methods: '{text}' gives no ranks; required an allocation.")
        if not self.patterns or not self.spectra or not self.seeds:
            raise ConfigError("required at least one pattern, spectrum and seed")

    @property
    def arms(self) -> dict[str, MethodSpec]:
        """Label -> method, every one at the benchmark's budget, which the label leaves out."""
        own = [MethodSpec.parse(text) for text in self.methods]
        return {
            dataclasses.replace(spec, budget=None).label: dataclasses.replace(spec, budget=self.budget) for spec in own
        }

    @property
    def uniform(self) -> MethodSpec:
        """The baseline."""
        return MethodSpec.build("uniform", {"budget": self.budget})

    def study(self) -> StudyConfig:
        """Return the settings that recipes and profilers read."""
        return study_from(
            {
                "model": self.model,
                "max_steps": self.steps,
                "epochs": self.steps,  # more than enough: max_steps ends the training
                "batch_size": self.batch_size,
                "validations": 1,
                "precision": self.precision,
                "lr": self.lr,
            }
        )

    def cell_key(self, values: dict[str, Any]) -> str:
        """Return a digest over one cell's own values and all that its numbers depend on."""
        left_out = ("patterns", "spectra", "methods", "seeds", "output")
        shared = {
            field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name not in left_out
        }
        return digest({**shared, **values, "version": SIGNATURE_VERSION})
