"""Speech to text: an encoder hears a recording, a decoder writes its transcript (Whisper)."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from adaptive_lora.config import DataConfig, StudyConfig
from adaptive_lora.data import Batch, Example, ExampleSet
from adaptive_lora.data.audio import load_transcripts
from adaptive_lora.data.batches import IGNORED
from adaptive_lora.data.rows import BadRow
from adaptive_lora.data.sequences import batched
from adaptive_lora.errors import ConfigError, ModelError, require_extra, unknown_name
from adaptive_lora.models.base import BaseModel
from adaptive_lora.models.device import Runtime
from adaptive_lora.models.tasks.scores import word_errors
from adaptive_lora.models.tasks.seq2seq import Seq2SeqTask
from adaptive_lora.models.tasks.task import PreparedExample, marked
from adaptive_lora.results import FloatArray
from adaptive_lora.serving import features_of, longest_seconds, open_recording, transcribe
from adaptive_lora.serving.greedy import filled, mask_of
from adaptive_lora.serving.tokens import encode

_MULTILINGUAL = 51865
"""Size of the vocabulary from which OpenAI's own code takes a Whisper model to know several languages."""


class SpeechTask(Seq2SeqTask):
    """Cross-entropy over the transcript's tokens; greedy transcription for word and character error rates.

    The tokens of language and task before a transcript are given, not learned.
    """

    name = "speech_to_text"
    cuts_served_texts = False

    def __init__(self, config: StudyConfig, runtime: Runtime, base: BaseModel) -> None:
        """Refuse bases other than Whisper's, and a language that is missing or not known to the base."""
        settings: Any = base.model.config
        if settings.model_type != "whisper":
            raise ModelError(
                f"base {base.reference.name} is of the type '{settings.model_type}'; required for --task {self.name}: "
                "a Whisper model."
            )
        super().__init__(config, runtime, base)
        if not getattr(self.tokenizer, "prefix_tokens", None):
            raise ModelError(
                f"the tokenizer of base {base.reference.name} ({type(self.tokenizer).__name__}) puts no token such as "
                "<|startoftranscript|> before a transcript; required the tokenizer of Whisper."
            )
        _require_language(base)
        if settings.apply_spec_augment:
            settings.apply_spec_augment = False
            logging.getLogger(__name__).warning(
                "SpecAugment of base %s is off: its masks do not depend on the seed alone.", base.reference.name
            )

    @classmethod
    def read(cls, config: DataConfig) -> ExampleSet:
        require_extra("audio", f"--task {cls.name}")
        return load_transcripts(config)

    @classmethod
    def record(cls, data: ExampleSet, config: DataConfig) -> dict[str, Any]:
        found = super().record(data, config)
        return found if config.language is None else {**found, "language": _code(config.language)}

    @property
    def made_from(self) -> Mapping[str, Any]:
        return {"seconds": longest_seconds(self.base.tokenizer)}

    def prepare(self, examples: Sequence[Example]) -> Iterator[PreparedExample]:
        """Yield transcripts tokenised, each cut at the maximum length."""
        for items in batched(examples):
            # Whisper's own transcripts begin with a blank, as words inside them do.
            texts = list(encode(self.tokenizer, [f" {item.response.strip()}" for item in items]))
            for item, text in zip(items, texts, strict=True):
                self._require_heard(item)
                prefix, whole = text.ids[: text.start], [*text.ids[text.start : text.stop], self.tokenizer.eos_token_id]
                kept = whole[: max(1, self.longest - len(prefix))]
                numbers = {"prefix_ids": prefix, "target_ids": kept, "cut": [len(whole) - len(kept)]}
                yield PreparedExample.of(item, numbers)

    def _require_heard(self, example: Example) -> None:
        most, found = longest_seconds(self.base.tokenizer), open_recording(example.image or b"").seconds
        if found > most:
            raise BadRow(
                example.where,
                f"its recording has {found:.1f} s, the base hears at most {most:g} s; cut recording and transcript",
                reason=f"recordings longer than the {most:g} s that the base hears",
            )

    def illustrated(self, item: PreparedExample, example: Example) -> str:
        given, learned = self.decoded(item.inputs["prefix_ids"]), self.decoded(self.answer_ids(item))
        return f"{example.prompt}: {given}{marked(learned)}"

    def collate(self, examples: Sequence[PreparedExample]) -> Batch:
        """Return log-mel spectra, and transcripts padded; the decoder's input is shifted by one."""
        pairs = [(each.inputs["prefix_ids"], each.inputs["target_ids"]) for each in examples]
        rows = [[*prefix, *target[:-1]] for prefix, target in pairs]
        return Batch(
            inputs={
                "input_features": features_of(self.base.tokenizer, [open_recording(each.image) for each in examples]),
                "decoder_input_ids": filled(rows, self.pad),
                "decoder_attention_mask": mask_of(rows),
            },
            labels=filled([[*[IGNORED] * (len(prefix) - 1), *target] for prefix, target in pairs], IGNORED),
            padding={"decoder_input_ids": self.pad},
        )

    def outputs(self, model: nn.Module, examples: Sequence[PreparedExample]) -> torch.Tensor:
        """Return the logits of each transcript's first token, each example run alone."""
        rows = []
        for example in examples:
            batch = self.collate([example]).to(self.runtime.device)
            rows.append(self.logits(model, batch)[0, len(example.inputs["prefix_ids"]) - 1].float())
        return torch.stack(rows)

    def generated(self, model: nn.Module, examples: Sequence[PreparedExample]) -> list[str]:
        return transcribe(
            model,
            self.base.tokenizer,
            [open_recording(example.image) for example in examples],
            max_new_tokens=max(example.supervised_tokens for example in examples),
            batch_size=self.config.evaluation.eval_batch_size,
        )

    def text_scores(self, texts: Sequence[str], examples: Sequence[PreparedExample]) -> Mapping[str, FloatArray]:
        return {"wer": word_errors(texts, examples).rates}

    def overall_text_scores(self, texts: Sequence[str], examples: Sequence[PreparedExample]) -> Mapping[str, float]:
        return word_errors(texts, examples).overall


def _code(language: str) -> str:
    """Return Whisper's code of a language, by its name or code; raise ConfigError for an unknown one."""
    from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

    given = language.strip().lower()
    if given in TO_LANGUAGE_CODE.values():
        return given
    if given not in TO_LANGUAGE_CODE:
        raise ConfigError(f"language: {unknown_name('language', language, TO_LANGUAGE_CODE)}.")
    return str(TO_LANGUAGE_CODE[given])


def _require_language(base: BaseModel) -> None:
    """Check that a base that knows several languages was given one, and that another one was not.

    Raises:
        ModelError: a language is missing.
        ConfigError: the base knows one language alone.
    """
    model: Any = base.model
    own = getattr(model.generation_config, "is_multilingual", None)
    several = model.config.vocab_size >= _MULTILINGUAL if own is None else bool(own)
    tokenizer: Any = base.tokenizer
    if not several and "language" in base.task:
        raise ConfigError(f"language: base {base.reference.name} knows English alone; leave --language out.")
    if several and tokenizer.tokenizer.language is None:
        raise ModelError(
            f"base {base.reference.name} knows several languages, and its processor names none; required --language, "
            "such as --language german."
        )
