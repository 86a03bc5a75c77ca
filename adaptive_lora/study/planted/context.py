"""The bench of a planted cell: learn what the teacher does, measured as the distance to it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from adaptive_lora.config import StudyConfig
from adaptive_lora.data import Batch, TokenizedExample
from adaptive_lora.models.base import BaseModel
from adaptive_lora.models.device import Runtime
from adaptive_lora.models.kernels import fast_layers
from adaptive_lora.models.losses import Predictions, predict
from adaptive_lora.models.tasks import CausalTask
from adaptive_lora.models.tasks.prepared import PreparedSplits
from adaptive_lora.results import EvalResult
from adaptive_lora.study.base_context import BaseContext
from adaptive_lora.study.planted.teacher import token_kl

LARGEST_MEMORY = 2**29
"""Bytes of the teacher's predictions that are kept; larger ones are computed again each time."""


class PlantedContext(BaseContext):
    """Everything is learned from the teacher's text under KL(teacher || model).

    The whole distribution of the teacher is the target: with the sampled tokens alone, sampling
    noise would drown the differences between allocations.
    """

    def __init__(
        self, config: StudyConfig, runtime: Runtime, base: BaseModel, teacher: PreTrainedModel, splits: PreparedSplits
    ) -> None:
        """Put a teacher and its texts beside the base."""
        super().__init__(CausalTask(config, runtime, base))
        self.teacher, self._splits = teacher, splits
        self.loss = self._distance
        self._known: dict[tuple[int, ...], torch.Tensor] = {}
        vocabulary = int(teacher.config.vocab_size)
        tokens = sum(example.supervised_tokens for example in splits.train)
        self._keeps = 4 * vocabulary * tokens <= LARGEST_MEMORY

    def splits(self, fold: int) -> PreparedSplits:
        """Return the teacher's texts; there is one division."""
        return self._splits

    def running(self, model: nn.Module) -> AbstractContextManager[None]:
        """Return a block of fused layers; the distance is taken over padded batches."""
        return fast_layers(model)

    def _distance(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        return self._token_kl(model, batch).sum()

    def _token_kl(self, model: object, batch: Batch) -> torch.Tensor:
        return token_kl(self._wanted(batch), predict(model, batch))

    def _wanted(self, batch: Batch) -> Predictions:
        """Return the teacher's predictions, each text's computed once where they fit in memory.

        All texts have the same length, so a text's predictions do not depend on its batch.
        """
        rows = [tuple(row) for row in batch.input_ids.tolist()]
        if not all(row in self._known for row in rows):
            with torch.no_grad():
                found = predict(self.teacher, batch)
            if not self._keeps:
                return found
            self._known.update(zip(rows, found.logits, strict=True))
        logits = torch.stack([self._known[row] for row in rows])
        return Predictions(logits=logits, targets=batch.labels[:, 1:])

    def losses(self, model: object, examples: Sequence[TokenizedExample]) -> EvalResult:
        """Return KL(teacher || model) per example in nats, in the place of the likelihood."""
        assert isinstance(model, nn.Module)
        model.eval()
        size = self.config.evaluation.eval_batch_size
        kl: list[float] = []
        for start in range(0, len(examples), size):
            batch = self.task.collate(examples[start : start + size]).to(self.runtime.device)
            with torch.no_grad(), self.runtime.accelerator.autocast():
                kl += self._token_kl(model, batch).double().sum(dim=1).tolist()
        tokens = np.array([example.supervised_tokens for example in examples], dtype=np.int64)
        return EvalResult(
            example_ids=tuple(example.id for example in examples),
            nll_E=np.array(kl),
            tokens_E=tokens,
            correct_E=np.zeros_like(tokens),
        )
