"""The context of models without a training task: encoders, which can be profiled but not trained.

Metrics without a loss use the checkpoint as it is. Gradients need an objective: for text encoders,
the prediction of masked tokens. If the checkpoint lacks the head for that, there is no substitute.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from adaptive_lora.config import StudyConfig
from adaptive_lora.data import Batch, ExampleSet, load_examples, split_examples
from adaptive_lora.data.batches import IGNORED
from adaptive_lora.data.summary import reading_lines
from adaptive_lora.errors import ModelError
from adaptive_lora.methods.importance import PROFILERS, ImportanceProfile, ProfileTask, profile_importances
from adaptive_lora.methods.importance.weights import WeightProfiler
from adaptive_lora.models.base import locate, read_settings, require_weights
from adaptive_lora.models.classes import auto_class
from adaptive_lora.models.device import start_runtime
from adaptive_lora.models.errors import model_errors
from adaptive_lora.models.losses import masked_loss, no_loss
from adaptive_lora.models.sites import survey_sites, warn_of_sites
from adaptive_lora.models.tasks.catalogue import found_task
from adaptive_lora.models.tasks.encoding import encode_cut
from adaptive_lora.runner.context import StudyContext
from adaptive_lora.runner.profiling import drawn
from adaptive_lora.seeding import rng_for
from adaptive_lora.serving import saved_quantisation
from adaptive_lora.serving.gguf_file import as_transformers_reads
from adaptive_lora.serving.tokens import known_ids, position_limit, unknown_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MASKED_SHARE = 0.15
"""Share of tokens to mask and predict (Devlin et al. 2018, 1810.04805, section 3.1). Departure: all of them
become the mask token, none a random or the same token."""
_DATA_FREE = frozenset(n for n, kind in PROFILERS.usable() if isinstance(kind, WeightProfiler))
_FORWARD = frozenset({"activation_spectrum"})
_TRAINED = frozenset({"ablation", "output_energy"})


def context_for(config: StudyConfig, metrics: Sequence[str]) -> StudyContext | EncoderContext:
    """Return the context for profiling a model: that of its task, if it has one.

    A model whose task is not determined by base and data can still be measured by metrics without a
    loss, and a text encoder by the prediction of masked tokens.
    """
    task = config.data.task if config.data.task != "auto" else found_task(config)
    if task is None or (task != "causal" and config.data.task == "auto" and _DATA_FREE.issuperset(metrics)):
        return EncoderContext(config, metrics)
    return StudyContext(config, trains=False)


class EncoderContext:
    """A model without a training task, and the examples to profile it on."""

    def __init__(self, config: StudyConfig, metrics: Sequence[str]) -> None:
        """Load the model as the metrics need it.

        Raises:
            AdaptiveLoraError: data or model cannot be used, or a metric does not support the model.
        """
        self.config, self.metrics = config, frozenset(metrics)
        self.runtime = start_runtime(config.train.precision)
        _, _, self.folder = locate(config.model)
        self._trust = config.model.trust_remote_code
        if (saved := saved_quantisation(self.folder)) is not None:
            raise ModelError(
                f"{self.folder} is saved in {saved.name}: required weights as trained to profile "
                "a model without a task; give the model that it was quantised from."
            )
        require_weights(self.folder, trust_remote_code=self._trust)
        self.model, missing = self._load()
        self.model.to(self.runtime.device)  # type: ignore[arg-type]
        survey = survey_sites(self.model)
        self.sites = survey.sites
        warn_of_sites(self.model, survey)
        lost = missing & {f"{site.name}.weight" for site in self.sites}
        if lost:
            raise ModelError(
                f"{self.folder} lacks the weights of {len(lost)} sites, such as {min(lost)}; required all of them."
            )

    def profiles(self, metrics: Sequence[str], *, seed: int, fold: int) -> Mapping[str, ImportanceProfile]:
        """Return the importance profiles of a seed, measured on the fold's training split."""
        found: dict[str, ImportanceProfile] = {}
        with model_errors(f"{metrics[0]} cannot be measured on {type(self.model).__name__}", self.model):
            for masked in (False, True):
                chosen = [metric for metric in metrics if (metric not in _DATA_FREE | _FORWARD) == masked]
                task = ProfileTask(
                    model=self.model,
                    sites=self.sites,
                    batches=() if _DATA_FREE.issuperset(chosen) else self._calibration(seed, fold, masked=masked),
                    runtime=self.runtime,
                    loss=masked_loss if masked else no_loss,
                )
                found |= profile_importances(task, metrics=chosen, seed=seed)
        return {metric: found[metric] for metric in metrics}

    @property
    def _forward(self) -> bool:
        """Need of no loss: the metrics look at weights and activations alone."""
        return (_DATA_FREE | _FORWARD).issuperset(self.metrics)

    def _load(self) -> tuple[PreTrainedModel, set[str]]:
        """Return the model, and the names of weights missing in its checkpoint."""
        from transformers import AutoModelForMaskedLM
        from transformers.utils import logging as hf_logging

        hf_logging.disable_progress_bar()

        settings = read_settings(self.folder, trust_remote_code=self._trust)
        kind, without_loss = auto_class(settings), self._forward
        if _TRAINED & self.metrics:
            raise self._refusal("a model that this package can train")
        if not _DATA_FREE.issuperset(self.metrics) and type(settings) not in AutoModelForMaskedLM._model_mapping:
            raise self._refusal("a causal language model or a text encoder")
        try:
            with as_transformers_reads(self.folder) as (where, further):
                model, found = (kind if without_loss else AutoModelForMaskedLM).from_pretrained(
                    where,
                    dtype=self.runtime.base_dtype,
                    output_loading_info=True,
                    use_safetensors=True,
                    trust_remote_code=self._trust,
                    **further,
                )
        except Exception as error:  # a corrupt file can raise anything in transformers
            raise ModelError(f"{self.folder} cannot be loaded: {error}") from error
        if not without_loss and found["missing_keys"]:
            raise self._refusal(
                f"a head that restores masked tokens, which the checkpoint lacks ({min(found['missing_keys'])})"
            )
        return model.eval(), set(found["missing_keys"])

    def _refusal(self, required: str) -> ModelError:
        others = ", ".join(sorted(_DATA_FREE | _FORWARD))
        return ModelError(
            f"{self.folder} cannot be profiled by {', '.join(sorted(self.metrics))}: required {required}. Metrics that "
            f"need no loss: {others}; with a loss of your own, call `profile_importance`."
        )

    @cached_property
    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        try:
            with as_transformers_reads(self.folder) as (where, further):
                tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=self._trust, **further)
        except Exception as error:  # a corrupt file can raise anything in transformers
            raise ModelError(f"{self.folder} has no usable tokenizer: {error}") from error
        if tokenizer.mask_token_id is None or tokenizer.pad_token_id is None:
            raise ModelError(f"the tokenizer in {self.folder} lacks a mask or a pad token.")
        return tokenizer

    @cached_property
    def _data(self) -> ExampleSet:
        return load_examples(self.config.data)

    def data_lines(self) -> list[str]:
        """Return the lines of the data summary; empty for metrics without data."""
        return [] if _DATA_FREE.issuperset(self.metrics) else reading_lines(self._data.readings)

    def _calibration(self, seed: int, fold: int, *, masked: bool = True) -> list[Batch]:
        """Return batches of prompt and response as one text from the training split, with masked tokens or without."""
        data, settings = self.config.data, self.config.profile
        examples = split_examples(self._data.examples, data, fold).train
        batches = drawn(examples, settings, seed=seed, purpose="calibration", fold=fold)
        longest = min(
            data.max_tokens, self._tokenizer.model_max_length, position_limit(self.model.config) or data.max_tokens
        )
        encoded, lost = encode_cut(
            self._tokenizer,
            [f"{example.prompt} {example.response}" for batch in batches for example in batch],
            longest,
            return_special_tokens_mask=True,
        )
        if any(lost):
            logging.getLogger(__name__).warning(
                "%d of %d calibration texts are cut at %d tokens: %d tokens are lost",
                sum(count > 0 for count in lost), len(lost), longest, sum(lost),
            )  # fmt: skip
        problem = unknown_ids(self._tokenizer, encoded["input_ids"], known_ids(self.model))
        if problem is not None:
            raise ModelError(f"{self.folder} cannot be profiled: {problem}.")
        rows = list(zip(encoded["input_ids"], encoded["special_tokens_mask"], strict=True))
        size = settings.profile_batch_size
        return [self._batch(rows[start : start + size], seed, start, masked) for start in range(0, len(rows), size)]

    def _batch(self, rows: Sequence[tuple[list[int], list[int]]], seed: int, start: int, masked: bool) -> Batch:
        """Pad rows of (token ids, 1 for special tokens); mask tokens where the metrics need a loss."""
        import torch

        width = max(len(ids) for ids, _ in rows)
        ids = torch.full((len(rows), width), int(self._tokenizer.pad_token_id))
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
        for row, (tokens, special) in enumerate(rows):
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = 1
            free = [index for index, flag in enumerate(special) if not flag]
            if not (masked and free):
                continue
            rng = rng_for(seed, "mask", start + row)
            chosen = rng.choice(free, math.ceil(MASKED_SHARE * len(free)), replace=False).tolist()
            labels[row, chosen] = ids[row, chosen]
            ids[row, chosen] = int(self._tokenizer.mask_token_id)
        return Batch.of_text(input_ids=ids, attention_mask=mask, labels=labels)
