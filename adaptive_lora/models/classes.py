"""Which of transformers' classes an architecture is loaded as."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptive_lora import serving
from adaptive_lora.errors import ModelError
from adaptive_lora.serving.safety import named_code

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_WITHOUT_A_NAME = (
    "AutoModelForImageTextToText", "AutoModelForSpeechSeq2Seq", "AutoModelForSeq2SeqLM",
    "AutoModelForMaskedLM", "AutoModelForCausalLM", "AutoModel",
)  # fmt: skip
"""Where config.json names no architecture: the first class that takes it. Encoders come before
causal models, because transformers can turn BERT into a (never trained) causal one."""
_BY_NAME = (
    *_WITHOUT_A_NAME, "AutoModelForPreTraining", "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification", "AutoModelForQuestionAnswering",
    "AutoModelForImageClassification", "AutoModelForAudioClassification",
    "AutoModelForZeroShotImageClassification",
)  # fmt: skip


def auto_class(settings: PretrainedConfig) -> Any:
    """Return the Auto class of a configuration: what its checkpoint was saved from.

    A decoder is always the causal model that this package trains, whatever head it was saved with.
    """
    import transformers

    takes = {
        name: getattr(auto._model_mapping[type(settings)], "__name__", "")  # may be a tuple
        for name in _BY_NAME
        if type(settings) in (auto := getattr(transformers, name))._model_mapping
    }
    own = getattr(settings, "auto_map", None) or {}  # the model's own code, where that is run
    first = next((name for name in _WITHOUT_A_NAME if name in takes or name in own), "AutoModel")
    saved = (settings.architectures or [""])[0]
    named = next((name for name, kind in takes.items() if kind == saved), first)
    return getattr(transformers, first if first == "AutoModelForCausalLM" else named)


def require_class(settings: PretrainedConfig, kind: Any, task: str, folder: Path) -> None:
    """Raise ModelError where transformers has no model of a task on an architecture.

    Args:
        settings: of the base.
        kind: `auto_class` of them.
        task: by name.
        folder: of the base, for the message.
    """
    known = serving.TASKS[task].model_class
    if task == "causal" and kind is not known:
        raise ModelError(
            f"{folder} is no causal language model (it is one for {kind.__name__}): required for "
            "training; `plan` works for any model, `profile` for encoders."
        )
    own = getattr(settings, "auto_map", None) or {}  # the model's own code, where that is run
    if type(settings) not in known._model_mapping and known.__name__ not in own:
        raise ModelError(
            f"{folder} is a base of the type '{settings.model_type}', for which transformers has "
            f"no {known.__name__}: required for --task {task}; take another base or another task."
        )


def warn_of_code(folder: Path, *, trusted: bool) -> None:
    """Log where a base names code of its own that is not trusted, and transformers does without."""
    code = [] if trusted or folder.is_file() else named_code(folder)
    if code:
        logging.getLogger(__name__).warning(
            "%s names Python code of its own (%s), which is not run: classes of transformers take "
            "its place. To run it, read it and give --trust-remote-code true.",
            folder,
            code[0],
        )
