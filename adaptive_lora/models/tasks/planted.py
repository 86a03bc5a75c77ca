"""Distillation from a planted teacher: what it has learned is known, so that ranks can be told right from wrong."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from adaptive_lora.allocation import Plan, RankPlan, allocate
from adaptive_lora.allocation.plan import BaseStorage
from adaptive_lora.config import DataConfig, StudyConfig
from adaptive_lora.config.planted import PlantedTeacher
from adaptive_lora.data import Batch, Example, ExampleSet, TokenizedExample, collate
from adaptive_lora.data.conversations import PLAIN
from adaptive_lora.data.examples import content_id
from adaptive_lora.data.reading import separate_test
from adaptive_lora.data.rows import Reading, drawn
from adaptive_lora.errors import ConfigError, DataError
from adaptive_lora.models.base import BaseModel
from adaptive_lora.models.device import Runtime
from adaptive_lora.models.losses import Predictions, predict
from adaptive_lora.models.scoring import ExampleScores
from adaptive_lora.models.sites import find_sites
from adaptive_lora.models.tasks.causal import CausalTask
from adaptive_lora.models.tasks.planted_teacher import (
    make_teacher,
    planted_changes,
    planted_energy,
    token_kl,
    written_by,
)
from adaptive_lora.models.tasks.task import Task
from adaptive_lora.results import EvalResult

_LARGEST_MEMORY = 2**29
"""Bytes of the teacher's predictions that are kept; larger ones are computed again each time."""
_REFERENCE_TEXTS = 64
"""Texts of the base on which the teacher's distance is measured."""


class PlantedTask(CausalTask):
    """Causal language modelling under KL(teacher || model), on texts that the teacher wrote.

    The whole distribution of the teacher is the target: with the sampled tokens alone, sampling
    noise would drown the differences between allocations.
    """

    unit = "nats of KL to the teacher per token"
    tokenised = None  # type: ignore[assignment]  # the teacher's texts are not kept

    def __init__(self, config: StudyConfig, runtime: Runtime, base: BaseModel) -> None:
        super().__init__(config, runtime, base)
        teacher = PlantedTeacher.parse(config.data.data)
        assert teacher is not None
        self.planted, self.sites = teacher, find_sites(base.model)  # before any adapter is on the base
        if base.quantisation is not None or any(spec.base != BaseStorage.FULL for spec in config.specs):
            raise ConfigError(f"{teacher}: required base=full, to which a change can be added; got a quantised base.")
        self._known: dict[tuple[int, ...], torch.Tensor] = {}

    @classmethod
    def read(cls, config: DataConfig) -> ExampleSet:
        teacher = PlantedTeacher.parse(config.data)
        if teacher is None:
            raise DataError(f"{config.data}: required a planted teacher, as the study's own data are.")
        if separate_test(config) is not None:
            raise DataError("a planted teacher writes the test part too: leave test_data and test_split out.")
        # A name and a number stand for each text, which only the base's teacher can write.
        seen: dict[str, int] = {}
        examples = tuple(
            Example(id=content_id(prompt, "", seen), prompt=prompt, response="", where=f"text {number}")
            for number in drawn(teacher.texts, config)
            for prompt in [f"{teacher}, text {number}"]
        )
        columns = {"text": "written by the teacher, all of it learned"}
        reading = Reading(source=str(teacher), rows=teacher.texts, drawn=len(examples), columns=columns)
        return ExampleSet(examples=examples, template=PLAIN, source=str(teacher), readings=(reading,))

    def require_usable(self) -> None:
        super().require_usable()
        if self.config.train.batching == "packed":
            raise ConfigError("batching: a planted teacher's texts are not packed. Set batching to auto or padded.")

    @cached_property
    def ranks(self) -> Mapping[str, int]:
        """Site name -> planted rank."""
        return allocate(self.planted.method(), self.sites).rank_pattern()

    @cached_property
    def teacher(self) -> PreTrainedModel:
        """Copy of the base with the planted change."""
        base, planted = self.base.model.eval(), self.planted
        changes = planted_changes(base, self.sites, self.ranks, planted.spectrum, planted.draw)
        reference = collate(self._texts(base, _REFERENCE_TEXTS, "base"), self._start).to(self.runtime.device)
        return make_teacher(base, self.sites, changes, reference, planted.distance)[0]

    @property
    def _start(self) -> int:
        return int(self.tokenizer.eos_token_id)

    def _texts(self, model: PreTrainedModel, count: int, purpose: str) -> tuple[TokenizedExample, ...]:
        planted = self.planted
        purpose = f"{purpose} {planted.pattern} {planted.spectrum}"
        return written_by(
            model, count=count, length=planted.length, start=self._start, seed=planted.draw, purpose=purpose
        )

    def prepare(self, examples: Sequence[Example]) -> tuple[TokenizedExample, ...]:
        if any(not example.prompt.startswith(f"{self.planted}, ") for example in examples):
            raise DataError("profiled_on: a planted study has one teacher; required no other data.")
        texts = self._texts(self.teacher, self.planted.texts, "text")
        numbers = (int(example.where.removeprefix("text ")) for example in examples)
        return tuple(
            dataclasses.replace(texts[number], id=example.id) for number, example in zip(numbers, examples, strict=True)
        )

    def packs(self, model: nn.Module) -> bool:
        return False

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        return self._token_kl(model, batch).sum()

    def losses_by_example(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        return self._token_kl(model, batch).sum(dim=1)

    def scores(self, model: nn.Module, batch: Batch) -> ExampleScores:
        kl = self._token_kl(model, batch).double().sum(dim=1)
        return ExampleScores(nll=kl, units=batch.supervised_by_example, correct=None)

    def _token_kl(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        return token_kl(self._wanted(batch), predict(model, batch))

    def _wanted(self, batch: Batch) -> Predictions:
        """Return the teacher's predictions, each text's computed once where they fit in memory.

        All texts have the same length, so a text's predictions do not depend on its batch.
        """
        rows = [tuple(row) for row in batch.input_ids.tolist()]
        if not all(row in self._known for row in rows):
            with torch.no_grad():
                found = predict(self.teacher, batch)
            if 4 * self.teacher.config.vocab_size * self.planted.texts * self.planted.length > _LARGEST_MEMORY:
                return found
            self._known.update(zip(rows, found.logits, strict=True))
        logits = torch.stack([self._known[row] for row in rows])
        return Predictions(logits=logits, targets=batch.labels[:, 1:])

    def score(self, model: nn.Module, examples: Sequence[TokenizedExample]) -> EvalResult:
        """Score the distance to the teacher alone."""
        return self.losses(model, examples)

    def plan_scores(self, plan: Plan) -> Mapping[str, float]:
        """Return how near a plan's ranks come to the planted ones.

        `planted_rank_correlation` is Spearman's, where both ranks vary; `planted_energy` the share of the planted
        squared singular values that the ranks have room for.
        """
        from scipy.stats import spearmanr

        if not isinstance(plan, RankPlan):
            return {}
        found, full = plan.rank_pattern(), {site.name: site.max_rank for site in self.sites}
        energies = {name: planted_energy(self.planted.spectrum, rank, full[name]) for name, rank in self.ranks.items()}
        room = sum(float(energy[: found.get(name, 0)].sum()) for name, energy in energies.items())
        scores = {"planted_energy": room / sum(float(energy.sum()) for energy in energies.values())}
        mine, truth = [found.get(name, 0) for name in self.ranks], list(self.ranks.values())
        if np.ptp(mine) and np.ptp(truth):
            scores["planted_rank_correlation"] = float(spearmanr(mine, truth).statistic)
        return scores

    def outputs(self, model: Any, examples: Sequence[TokenizedExample]) -> torch.Tensor:
        """Return last-token logits of the whole texts; their prompts are all the same token."""
        whole = [dataclasses.replace(example, prompt_length=example.length) for example in examples]
        return super().outputs(model, whole)

    def metrics(self, result: EvalResult) -> Mapping[str, float]:
        """Return the distance and what `plan_scores` gives."""
        return Task.metrics(self, result)
