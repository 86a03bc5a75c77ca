"""Data whose forgetting is measured, `--retain-data SOURCE[:option=value,...]`."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from adaptive_lora.config.planted import PlantedTeacher
from adaptive_lora.config.sections import DataConfig
from adaptive_lora.errors import ConfigError
from adaptive_lora.options import parse_options

if TYPE_CHECKING:
    from adaptive_lora.config.study import StudyConfig

_FORM = re.compile(r"(?P<data>.+?)(:(?P<options>\w+=.*))?", re.DOTALL)
_ITS_OWN: Mapping[str, Any] = {"data_subset": None, "data_revision": None, "data_split": "train", "max_examples": None}
"""Option that is never that of the study's data -> its value where the source does not give it."""
_OPTIONS = (
    *_ITS_OWN,
    *("template", "prompt_column", "input_column", "response_column", "image_column", "audio_column", "on_bad_row"),
)
"""Settings of data that a source can have of its own."""


@dataclass(frozen=True, kw_only=True)
class RetainedSource:
    """A source of data that a study does not train on, with the settings that differ from the study's."""

    data: str
    """Source, as in `DataConfig.data`."""
    options: Mapping[str, Any]
    """Name of a setting -> its value for this source."""

    @classmethod
    def parse(cls, text: str) -> RetainedSource:
        """Read `SOURCE[:option=value,...]`.

        Raises:
            ConfigError: there is no source, an option is unknown or given twice, or a value is not valid.
        """
        found = _FORM.fullmatch(text.strip())
        if found is None:
            raise ConfigError("retain_data: required a source of data, got an empty text.")
        if PlantedTeacher.parse(found["data"]) is not None:
            raise ConfigError(
                "retain_data: a planted teacher has no texts that its base has learned; required a file, a folder, a "
                "hub data set or 'embedded'."
            )
        given: dict[str, object] = {}
        for item in (found["options"] or "").split(",") if found["options"] else ():
            name, equals, value = (part.strip() for part in item.partition("="))
            if not equals or name in given:
                problem = "given twice" if equals else "required option=value"
                raise ConfigError(f"retain_data '{found['data']:.200}': '{item:.80}': {problem}.")
            given[name] = value
        owners = dict.fromkeys(_OPTIONS, DataConfig)
        parsed, problems = parse_options(given, owners, what="option", place=f"retain_data '{found['data']:.200}': ")
        if problems:
            raise ConfigError("\n".join(problems.values()))
        return cls(data=found["data"], options=parsed)

    def settings(self, study: DataConfig) -> DataConfig:
        """Return the settings to read it with: those of the study's data, but all rows, and its own options."""
        changes = {**_ITS_OWN, **self.options}
        return dataclasses.replace(study, data=self.data, test_data=None, test_split=None, **changes)


def require_retained(study: StudyConfig) -> None:
    """Raise ConfigError for a bound on forgetting without data to measure it on."""
    for name in ("max_forgetting", "max_forgetting_percent"):
        if getattr(study, name) is not None and not study.evaluation.retain_data:
            raise ConfigError(
                f"{name}: required --retain-data SOURCE, on which forgetting is measured; none was given."
            )
