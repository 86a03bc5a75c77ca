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

    found = {name: _classes(settings, getattr(transformers, name)) for name in _BY_NAME}
    takes = {name: classes for name, classes in found.items() if classes}
    own = getattr(settings, "auto_map", None) or {}  # classes in the model's own code, if that is run
    first = next((name for name in _WITHOUT_A_NAME if name in takes or name in own), "AutoModel")
    saved = (settings.architectures or [""])[0]
    named = next((name for name, classes in takes.items() if saved in classes), first)
    return getattr(transformers, first if first == "AutoModelForCausalLM" else named)


def _classes(settings: PretrainedConfig, kind: Any) -> list[str]:
    """Return the names of the classes that an Auto class has for a configuration: none, one, or several (DeiT)."""
    if type(settings) not in kind._model_mapping:
        return []
    found = kind._model_mapping[type(settings)]
    return [each.__name__ for each in (found if isinstance(found, list | tuple) else [found])]


def require_one_class(settings: PretrainedConfig, kind: Any, folder: Path) -> None:
    """Raise ModelError if an Auto class has several classes for a configuration that names none."""
    classes = _classes(settings, kind)
    if len(classes) > 1 and not settings.architectures:
        raise ModelError(
            f"{folder / 'config.json'} names no class, and transformers has several for the type "
            f"'{settings.model_type}': required one of {', '.join(classes)}; add for example "
            f'"architectures": ["{classes[0]}"].'
        )


def require_class(settings: PretrainedConfig, kind: Any, task: str, folder: Path) -> None:
    """Raise ModelError if transformers has no class for a task on an architecture.

    A model that sees can be trained on text where transformers has a causal class for it (Gemma 3, Qwen3.5).

    Args:
        settings: configuration of the base.
        kind: `auto_class` of the configuration.
        task: name of the task.
        folder: folder of the base, for the message.
    """
    known = serving.TASKS[task].model_class
    sees = kind is serving.TASKS["vision_language"].model_class and type(settings) in known._model_mapping
    if task == "causal" and kind is not known and not sees:
        raise ModelError(
            f"{folder} is no causal language model (it is one for {kind.__name__}): required for "
            "training; `plan` works for any model, `profile` for encoders."
        )
    if task == "token_classification" and kind is serving.TASKS["causal"].model_class:
        raise ModelError(
            f"{folder} is a causal language model, which does not see the words after the one that it tags; required "
            f"for --task {task}: an encoder, such as BERT."
        )
    own = getattr(settings, "auto_map", None) or {}  # classes in the model's own code, if that is run
    if type(settings) not in known._model_mapping and known.__name__ not in own:
        raise ModelError(
            f"{folder} is a base of the type '{settings.model_type}', for which transformers has "
            f"no {known.__name__}: required for --task {task}; give another base or another task."
        )
    require_one_class(settings, known, folder)


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
