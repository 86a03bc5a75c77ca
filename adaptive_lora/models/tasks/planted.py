"""Distillation from a planted teacher: what it has learned is known, so that ranks can be told right from wrong."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import GenerationConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from adaptive_lora.allocation import Plan, RankPlan, allocate
from adaptive_lora.allocation.plan import BaseStorage
from adaptive_lora.allocation.site import AdapterSite
from adaptive_lora.config import DataConfig, StudyConfig
from adaptive_lora.config.planted import PlantedTeacher
from adaptive_lora.data import Batch, Example, ExampleSet, TokenizedExample, collate
from adaptive_lora.data.conversations import PLAIN
from adaptive_lora.data.examples import content_id
from adaptive_lora.data.reading import separate_test
from adaptive_lora.data.rows import Reading, drawn
from adaptive_lora.errors import ConfigError, DataError, ModelError
from adaptive_lora.models.base import BaseModel
from adaptive_lora.models.device import Runtime
from adaptive_lora.models.losses import Predictions, predict
from adaptive_lora.models.sites import find_sites
from adaptive_lora.models.tasks.causal import CausalTask
from adaptive_lora.models.tasks.scores import ExampleScores
from adaptive_lora.results import FloatArray
from adaptive_lora.seeding import rng_for, torch_stream

_LARGEST_MEMORY = 2**29
"""Bytes of the teacher's predictions that are kept; larger ones are computed again each time."""
_REFERENCE_TEXTS = 64
"""Texts of the base on which the teacher's distance is measured."""
_BISECTIONS, _LARGEST_SCALE, _PRECISION = 40, 16.0, 0.01
_TEXTS_TOGETHER = 64


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
            for prompt in [f"{teacher.known_as}, text {number}"]
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
        """Site name -> planted rank, which may be 0."""
        planted = allocate(self.planted.method(), self.sites).rank_pattern()
        return {site.name: planted.get(site.name, 0) for site in self.sites}

    @cached_property
    def teacher(self) -> PreTrainedModel:
        """Copy of the base with the planted change."""
        base, planted = self.base.model.eval(), self.planted
        changes = planted_changes(base, self.sites, self.ranks, planted.spectrum, planted.draw)
        reference = collate(self._texts(base, _REFERENCE_TEXTS, "base"), self._start).to(self.runtime.device)
        return make_teacher(base, changes, reference, planted.distance)[0]

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
        if any(not example.prompt.startswith(f"{self.planted.known_as}, ") for example in examples):
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

    def generates(self, examples: Sequence[TokenizedExample]) -> bool:
        return False  # the distance to the teacher is the only score

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


def planted_energy(spectrum: str, rank: int, full: int) -> FloatArray:
    """Return the squared singular values of a site's change, scaled so that they add up to its planted rank.

    The largest possible rank is `full`; `spectrum` is one of `SPECTRA`. Rank 0 has none, under `noisy` too.
    """
    squares = np.ones(rank)
    if rank == 0:
        return squares
    if spectrum == "power_law":
        squares = np.arange(1, rank + 1, dtype=np.float64) ** -1.0
    elif spectrum == "noisy":
        squares = np.concatenate([squares, np.full(full - rank, 0.1 * rank / max(full - rank, 1))])
    scaled: FloatArray = squares * (rank / squares.sum())
    return scaled


def planted_changes(
    model: PreTrainedModel, sites: Sequence[AdapterSite], ranks: Mapping[str, int], spectrum: str, seed: int
) -> dict[str, torch.Tensor]:
    """Return site name -> change of its weight, (out, in), before the common scale, of the sites with planted rank.

    Singular vectors are random (Haar, by QR of Gaussian matrices) from a stream of the seed and the
    site's name. A site's energy is its planted rank times the mean squared singular value of its
    weight, so that one planted rank weighs the same against every weight.
    """
    modules = dict(model.named_modules())
    changes = {}
    for site in (site for site in sites if ranks[site.name]):
        rng = rng_for(seed, "planted", site.name)
        energy = planted_energy(spectrum, ranks[site.name], site.max_rank)
        left = np.linalg.qr(rng.standard_normal((site.out_features, energy.size)))[0]
        right = np.linalg.qr(rng.standard_normal((site.in_features, energy.size)))[0]
        unit = float(modules[site.name].weight.detach().float().norm()) / math.sqrt(site.max_rank)
        changes[site.name] = torch.from_numpy((left * np.sqrt(energy) * unit) @ right.T).float()
    return changes


def make_teacher(
    base: PreTrainedModel, changes: Mapping[str, torch.Tensor], batch: Batch, distance: float
) -> tuple[PreTrainedModel, float]:
    """Return a copy of the base with the changes added at the scale that gives a distance, and this scale.

    Args:
        base: base, which is not changed.
        changes: site name -> change of its weight, (out, in).
        batch: text on which the distance is measured.
        distance: KL(teacher || base) in nats per token.

    Raises:
        ModelError: no scale gives the distance.
    """
    teacher = copy.deepcopy(base).eval()
    modules = dict(teacher.named_modules())
    before = {name: modules[name].weight.detach().clone() for name in changes}
    with torch.no_grad():
        student = predict(base, batch)
    low, high = 0.0, _LARGEST_SCALE
    for _ in range(_BISECTIONS):
        scale = (low + high) / 2
        with torch.no_grad():
            for name, weight in before.items():
                change = changes[name].T if isinstance(modules[name], Conv1D) else changes[name]
                modules[name].weight.copy_(weight + scale * change.to(weight))
            found = float(token_kl(predict(teacher, batch), student).sum())
        found /= batch.supervised_tokens
        if math.isclose(found, distance, rel_tol=_PRECISION):
            return teacher, scale
        low, high = (scale, high) if found < distance else (low, scale)
    raise ModelError(
        f"no scale of the planted change up to {_LARGEST_SCALE:g} gives a distance of "
        f"{distance:g} nats per token (last {found:.3g}); choose a smaller distance."
    )


def token_kl(teacher: Predictions, student: Predictions) -> torch.Tensor:
    """Return KL(teacher || student) in nats at every position, (B, K); 0 where not supervised."""
    kl = functional.kl_div(
        functional.log_softmax(student.logits, dim=-1),
        functional.log_softmax(teacher.logits, dim=-1),
        reduction="none",
        log_target=True,
    ).sum(dim=-1)
    return torch.where(student.supervised, kl, torch.zeros_like(kl))


def written_by(
    model: PreTrainedModel, *, count: int, length: int, start: int, seed: int, purpose: str
) -> tuple[TokenizedExample, ...]:
    """Let a model write texts: sampled at temperature 1 from its start token.

    Args:
        model: model that writes.
        count: number of texts.
        length: number of tokens of each, without the start token; the end of a text does not stop it.
        start: id of the start (end-of-text) token.
        seed: seed of the sampling, together with `purpose`.
        purpose: part of the texts' names and of the random stream.
    """
    config = GenerationConfig(
        do_sample=True,
        top_k=0,
        max_new_tokens=length,
        pad_token_id=start,
        eos_token_id=model.config.vocab_size,  # no token has this id: texts do not stop early
    )
    rows: list[list[int]] = []
    with torch_stream(seed, "planted text", purpose), torch.no_grad():
        for begin in range(0, count, _TEXTS_TOGETHER):
            ids = torch.full((min(_TEXTS_TOGETHER, count - begin), 1), start, dtype=torch.long, device=model.device)
            rows += model.generate(  # type: ignore[operator]
                inputs=ids, attention_mask=torch.ones_like(ids), generation_config=config
            ).tolist()
    return tuple(
        TokenizedExample(id=f"{purpose}-{index}", input_ids=tuple(row), first_label=1, prompt_length=1, response="")
        for index, row in enumerate(rows)
    )
