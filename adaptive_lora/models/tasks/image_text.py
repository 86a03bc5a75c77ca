"""Image and text: contrastive matching of images and captions (CLIP, SigLIP)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from adaptive_lora.config import DataConfig, StudyConfig
from adaptive_lora.data import Batch, Example, ExampleSet
from adaptive_lora.data.images import load_captions
from adaptive_lora.data.sequences import batched
from adaptive_lora.errors import ConfigError
from adaptive_lora.models.base import BaseModel
from adaptive_lora.models.device import Runtime
from adaptive_lora.models.tasks.encoding import encode_cut
from adaptive_lora.models.tasks.scores import ExampleScores
from adaptive_lora.models.tasks.task import PreparedExample, Task, marked
from adaptive_lora.results import EvalResult
from adaptive_lora.serving import open_image
from adaptive_lora.serving.images import pair_inputs

_RECALLS = (1, 5)


class ImageTextTask(Task):
    """Prediction of each image's caption among those of the batch, and of each caption's image.

    The loss is the mean of both cross-entropies (Radford et al. 2021, 2103.00020, figure 3). In
    training, candidates are those of the batch; in validation and test, those of the whole split, so
    that its size sets the scale of the loss and the batch size has no effect. SigLIP is trained by this
    loss too, not by its own of single pairs.
    """

    name = "image_text"
    tokenised = PreparedExample
    unit = "nats per pair"
    cuts_served_texts = True

    def __init__(self, config: StudyConfig, runtime: Runtime, base: BaseModel) -> None:
        """Refuse batches of one pair, which have no loss."""
        super().__init__(config, runtime, base)
        if config.train.batch_size < 2:
            raise ConfigError("batch_size must be at least 2: pairs are compared within a batch.")

    @classmethod
    def read(cls, config: DataConfig) -> ExampleSet:
        return load_captions(config)

    def prepare(self, examples: Sequence[Example]) -> Iterator[PreparedExample]:
        for items in batched(examples):
            captions, lost = encode_cut(self.base.tokenizer.tokenizer, [item.response for item in items], self.longest)
            for item, ids, gone in zip(items, captions["input_ids"], lost, strict=True):
                yield PreparedExample.of(item, {"input_ids": ids, "cut": [gone]})

    def illustrated(self, item: PreparedExample, example: Example) -> str:
        return f"{example.prompt}: {marked(self.decoded(item.input_ids))}"

    def collate(self, examples: Sequence[PreparedExample]) -> Batch:
        pad = {"input_ids": int(self.base.tokenizer.tokenizer.pad_token_id)}
        images = [open_image(example.image) for example in examples]
        captions = [example.input_ids for example in examples]
        return Batch(
            inputs=pair_inputs(self.base.model.config, self.base.tokenizer, captions, images),
            labels=torch.zeros(len(examples), dtype=torch.long),
            padding=pad,
            whole=True,
        )

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        found: Any = model(**batch.inputs)
        return pair_losses(found.logits_per_image.float()).sum()

    def scores(self, model: nn.Module, batch: Batch) -> ExampleScores:
        found: Any = model(**batch.inputs)
        logits = found.logits_per_image.float()
        hits = logits.argmax(dim=1) == torch.arange(len(logits), device=logits.device)
        ones = torch.ones_like(hits, dtype=torch.long)
        return ExampleScores(nll=pair_losses(logits), units=ones, correct=hits.long())

    def outputs(self, model: nn.Module, examples: Sequence[PreparedExample]) -> torch.Tensor:
        images, texts, _ = self._embedded(model, examples)
        return torch.stack([images, texts])

    def losses(self, model: nn.Module, examples: Sequence[PreparedExample]) -> EvalResult:
        """Score every image against every caption of the split."""
        model.eval()
        size = self.config.evaluation.eval_batch_size
        parts = []
        with torch.no_grad(), self.runtime.autocast():
            for start in range(0, len(examples), size):
                parts.append(self._embedded(model, examples[start : start + size]))
        images, texts = (torch.cat([part[side] for part in parts]).float() for side in (0, 1))
        logits = parts[0][2].float() * images @ texts.T
        same = _same(examples).to(logits.device)
        count = np.ones(len(examples), dtype=np.int64)
        first = recall(logits, same, 1)
        return EvalResult(
            example_ids=tuple(example.id for example in examples),
            nll_E=pair_losses(logits).double().cpu().numpy(),
            tokens_E=count,
            correct_E=first.astype(np.int64),
            further_E={
                f"{way}_recall_at_{k}": recall(matrix, same, k)
                for way, matrix in (("image_to_text", logits), ("text_to_image", logits.T))
                for k in _RECALLS
            },
            unit=self.unit,
        )

    def _embedded(
        self, model: Any, examples: Sequence[PreparedExample]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return normalised embeddings of images and captions, and the scale of their product."""
        found = model(**self.collate(examples).to(self.runtime.device).inputs)
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        return found.image_embeds, found.text_embeds, base.logit_scale.exp()


def pair_losses(logits: torch.Tensor) -> torch.Tensor:
    """Return the mean of both cross-entropies of each pair, shape (N,).

    Args:
        logits: images by captions, shape (N, N), with matching pairs on the diagonal.
    """
    wanted = torch.arange(len(logits), device=logits.device)
    rows = functional.cross_entropy(logits, wanted, reduction="none")
    columns = functional.cross_entropy(logits.T, wanted, reduction="none")
    return (rows + columns) / 2


def _same(examples: Sequence[PreparedExample]) -> torch.Tensor:
    """Return the mask (N, N) of captions that are right for an image, including those of equal images."""
    images = [example.media for example in examples]
    texts = [example.input_ids for example in examples]
    rows = [[images[i] == images[j] or texts[i] == texts[j] for j in range(len(images))] for i in range(len(images))]
    return torch.tensor(rows)


def recall(logits: torch.Tensor, same: torch.Tensor, k: int) -> np.ndarray[Any, np.dtype[Any]]:
    """Return 1 where one of the k best candidates of a row is right, else 0, shape (N,)."""
    best = logits.topk(min(k, logits.shape[1]), dim=1).indices
    found: np.ndarray[Any, np.dtype[Any]] = same.gather(1, best).any(dim=1).double().cpu().numpy()
    return found
