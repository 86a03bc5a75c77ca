"""What all trials of a study share: the frozen base, tokenised parts, profiles and plans."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from adaptive_lora.adapters import attach, detach
from adaptive_lora.allocation import MethodSpec, RankPlan, allocate
from adaptive_lora.config import StudyConfig, digest
from adaptive_lora.data import (
    Batch,
    Example,
    TokenizedExample,
    collate,
    load_examples,
    split_examples,
    tokenize,
)
from adaptive_lora.evaluation import evaluate, exact_matches, wants_generation
from adaptive_lora.importance import (
    ImportanceProfile,
    ProfileTask,
    TrainedProbe,
    profile_importance,
)
from adaptive_lora.importance.capture import frozen
from adaptive_lora.losses import Loss, causal_loss
from adaptive_lora.models import BaseModel, gradient_checkpointing, load_base
from adaptive_lora.results import EvalResult
from adaptive_lora.runtime import Runtime, start_runtime
from adaptive_lora.seeding import rng_for, torch_stream
from adaptive_lora.sites import find_sites
from adaptive_lora.training import TrainInputs, train


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenizedParts:
    """The three parts of one fold, tokenised."""

    train: tuple[TokenizedExample, ...]
    validation: tuple[TokenizedExample, ...]
    test: tuple[TokenizedExample, ...]


class Bench(ABC):
    """The frozen base, what it is trained on and the loss: all that a method needs to be run."""

    loss: Loss = staticmethod(causal_loss)
    """What training minimises and gradient profiles are taken of."""

    def __init__(self, config: StudyConfig, runtime: Runtime, base: BaseModel) -> None:
        """Put a base on the runtime's device; raises ModelError where it has no site."""
        self.config, self.runtime, self.base = config, runtime, base
        self.base.model.to(self.runtime.device)  # type: ignore[arg-type]
        self.sites = find_sites(self.base.model)
        self._profiles: dict[tuple[str, int, int], ImportanceProfile] = {}

    @property
    def pad_id(self) -> int:
        """Token id for padding; masked everywhere, so end-of-text serves where there is none."""
        tokenizer = self.base.tokenizer
        pad = tokenizer.pad_token_id
        return int(tokenizer.eos_token_id if pad is None else pad)

    @abstractmethod
    def parts(self, fold: int) -> TokenizedParts:
        """Return the tokenised parts of a fold."""

    def profile(self, metric: str, *, seed: int, fold: int) -> ImportanceProfile:
        """Return the importance profile of a seed, measured once on the fold's training part."""
        key = (metric, seed, fold)
        if key not in self._profiles:
            task = self.profile_task(seed=seed, fold=fold)
            self._profiles[key] = profile_importance(task, metric=metric, seed=seed)
        return self._profiles[key]

    def profile_task(self, *, seed: int, fold: int) -> ProfileTask:
        """Return what a seed's profiles are measured on."""
        return ProfileTask(
            model=self.base.model,
            sites=self.sites,
            batches=self.calibration(seed, fold),
            runtime=self.runtime,
            loss=self.loss,
            validation=self._drawn(self.parts(fold).validation, seed, "ablation", fold),
            trained=lambda: self._trained_probe(seed, fold),
        )

    @contextmanager
    def _trained_probe(self, seed: int, fold: int) -> Iterator[TrainedProbe]:
        """Train adapters of one rank on every site for a short while; take them off at the end.

        With the study's settings and the middle one of its learning rates.
        """
        model, settings = self.base.model, self.config.train
        config = dataclasses.replace(
            settings, epochs=min(settings.epochs, self.config.profile.probe_epochs), patience=0
        )
        rank = min(self.config.profile.probe_rank, *(site.max_rank for site in self.sites))
        plan = allocate(
            MethodSpec.build("uniform", {"rank": rank}), self.sites, scale=settings.scale
        )
        rates = sorted(self.config.lr)
        inputs = TrainInputs(
            examples=self.parts(fold).train,
            pad_id=self.pad_id,
            validate=lambda adapted: self.losses(adapted, self.parts(fold).validation).loss,
            loss=self.loss,
        )
        with frozen(model), torch_stream(seed, "probe", fold):
            adapted = attach(model, plan, seed=seed, dropout=settings.dropout)
            try:
                adapted.to(self.runtime.device)
                with gradient_checkpointing(model, config.gradient_checkpointing):
                    result = train(
                        adapted, inputs, config, self.runtime, lr=rates[len(rates) // 2], seed=seed
                    )
                yield TrainedProbe(model=adapted, tokens=result.tokens)
            finally:
                detach(adapted)

    def calibration(self, seed: int, fold: int) -> list[Batch]:
        """Return the calibration batches of a seed, drawn from the fold's training part."""
        return self._drawn(self.parts(fold).train, seed, "calibration", fold)

    def _drawn(
        self, examples: Sequence[TokenizedExample], seed: int, purpose: str, fold: int
    ) -> list[Batch]:
        config = self.config.profile
        size = config.profile_batch_size
        order = rng_for(seed, purpose, fold).permutation(len(examples))
        order = order[: config.profile_batches * size]
        return [
            collate([examples[index] for index in order[start : start + size]], self.pad_id)
            for start in range(0, len(order), size)
        ]

    def plan(self, spec: MethodSpec, *, seed: int, fold: int) -> RankPlan:
        """Return a method's rank plan; data-driven methods are profiled for the seed and fold."""
        metric = spec.allocator.metric
        evidence = None if metric is None else self.profile(metric, seed=seed, fold=fold).evidence()
        return allocate(
            spec,
            self.sites,
            scale=self.config.train.scale,
            scale_policy=self.config.train.scale_policy,
            evidence=evidence,
            seed=seed,
        )

    def losses(self, model: object, examples: Sequence[TokenizedExample]) -> EvalResult:
        """Score a model on examples without generating."""
        return evaluate(
            model,  # type: ignore[arg-type]
            examples,
            runtime=self.runtime,
            pad_id=self.pad_id,
            batch_size=self.config.evaluation.eval_batch_size,
        )


class Workbench(Bench):
    """The bench of a study: loads its base and data once; every trial works on them."""

    def __init__(self, config: StudyConfig) -> None:
        """Read the data, load the base, and find what cannot work before anything is written.

        Raises:
            AdaptiveLoraError: data, model or precision cannot be used.
        """
        self.data = load_examples(config.data)
        runtime = start_runtime(config.train.precision)
        super().__init__(config, runtime, load_base(config.model, runtime.base_dtype))
        self._parts: dict[int, TokenizedParts] = {}
        self._frozen: dict[int, EvalResult] = {}
        for fold in range(config.data.folds):
            self.parts(fold)
        for spec in config.specs:  # ranks and budgets that cannot be met fail before any training
            if spec.allocator.metric is None:
                self.plan(spec, seed=0, fold=0)

    @cached_property
    def surroundings(self) -> Mapping[str, str]:
        """What a trial's identity holds beside its configuration."""
        return {
            "base": self.base.reference.content_hash,
            "data": self.data.digest,
            "precision": self.runtime.precision,
        }

    @cached_property
    def study_id(self) -> str:
        """Name of the study and a digest of what its trials share.

        Methods, seeds and learning rates do not enter: adding some continues the same study.
        """
        shared = {**self.config.identity(), **self.surroundings}
        return f"{self.config.study}-{digest(shared)[:10]}"

    def parts(self, fold: int) -> TokenizedParts:
        """Return the tokenised parts of a fold."""
        if fold not in self._parts:
            parts = split_examples(self.data.examples, self.config.data, fold)
            self._parts[fold] = TokenizedParts(
                train=self._tokenize(parts.train),
                validation=self._tokenize(parts.validation),
                test=self._tokenize(parts.test),
            )
        return self._parts[fold]

    def _tokenize(self, examples: Sequence[Example]) -> tuple[TokenizedExample, ...]:
        longest = self.config.data.max_tokens
        if self.base.max_positions is not None:
            longest = min(longest, self.base.max_positions)
        return tokenize(
            examples, self.base.tokenizer, max_tokens=longest, loss_on=self.config.data.loss_on
        )

    def score(self, model: object, examples: Sequence[TokenizedExample]) -> EvalResult:
        """Score a model on examples, with exact match where the study wants it."""
        batch_size = self.config.evaluation.eval_batch_size
        result = self.losses(model, examples)
        if wants_generation(examples, self.config.evaluation):
            exact = exact_matches(
                model,  # type: ignore[arg-type]
                self.base.tokenizer,
                examples,
                runtime=self.runtime,
                batch_size=batch_size,
            )
            result = dataclasses.replace(result, exact_match_E=exact)
        return result

    def frozen(self, fold: int) -> EvalResult:
        """Return the base's own scores on the fold's test part, without any adapter."""
        if fold not in self._frozen:
            self._frozen[fold] = self.score(self.base.model, self.parts(fold).test)
        return self._frozen[fold]

    def settings(self) -> dict[str, Any]:
        """Return the settings for records; the tracking URI may hold a password and stays out."""
        return {key: value for key, value in self.config.flat().items() if key != "tracking_uri"}
