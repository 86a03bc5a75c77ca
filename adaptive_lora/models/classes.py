"""Choice of the transformers class that an architecture is loaded as."""

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
"""Classes to try where config.json names no architecture, in order. Encoders precede causal models,
because transformers can load BERT as a (never trained) causal one."""
_BY_NAME = (
    *_WITHOUT_A_NAME, "AutoModelForPreTraining", "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification", "AutoModelForQuestionAnswering",
    "AutoModelForImageClassification", "AutoModelForAudioClassification",
    "AutoModelForZeroShotImageClassification",
)  # fmt: skip


def auto_class(settings: PretrainedConfig) -> Any:
    """Return the Auto class of a configuration: that of its checkpoint.

    A decoder is always loaded as a causal model, with whatever head it was saved.
    """
    import transformers

    takes = {
        name: getattr(auto._model_mapping[type(settings)], "__name__", "")  # may be a tuple
        for name in _BY_NAME
        if type(settings) in (auto := getattr(transformers, name))._model_mapping
    }
    own = getattr(settings, "auto_map", None) or {}  # classes in the model's own code, if that is run
    first = next((name for name in _WITHOUT_A_NAME if name in takes or name in own), "AutoModel")
    saved = (settings.architectures or [""])[0]
    named = next((name for name, kind in takes.items() if kind == saved), first)
    return getattr(transformers, first if first == "AutoModelForCausalLM" else named)


def require_class(settings: PretrainedConfig, kind: Any, task: str, folder: Path) -> None:
    """Raise ModelError if transformers has no class for a task on an architecture.

    Args:
        settings: configuration of the base.
        kind: `auto_class` of the configuration.
        task: name of the task.
        folder: folder of the base, for the message.
    """
    known = serving.TASKS[task].model_class
    if task == "causal" and kind is not known:
        raise ModelError(
            f"{folder} is no causal language model (it is one for {kind.__name__}): required for "
            "training; `plan` works for any model, `profile` for encoders."
        )
    own = getattr(settings, "auto_map", None) or {}  # classes in the model's own code, if that is run
    if type(settings) not in known._model_mapping and known.__name__ not in own:
        raise ModelError(
            f"{folder} is a base of the type '{settings.model_type}', for which transformers has "
            f"no {known.__name__}: required for --task {task}; give another base or another task."
        )


def warn_of_code(folder: Path, *, trusted: bool) -> None:
    """Log a warning if a base has own code that is not trusted and transformers works without it."""
    code = [] if trusted or folder.is_file() else named_code(folder)
    if code:
        logging.getLogger(__name__).warning(
            "%s names Python code of its own (%s), which is not run: classes of transformers are used "
            "instead. To run it, read it and give --trust-remote-code true.",
            folder,
            code[0],
        )
