"""Settings under the names of earlier versions: read, with a warning that gives the present name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from adaptive_lora.allocation.scaling import CONSTANT_AT, DEFAULT_ALPHA, RENAMED

RENAMED_SETTINGS = {"scale": "alpha", "scale_policy": "scaling"}
"""Setting of version 0.1 -> the setting that replaces it."""
EARLIER_NAMES = tuple(RENAMED_SETTINGS)
EARLIER_DEFAULTS = {"scale": 2.0, "scale_policy": "constant_alpha_over_r"}
"""Setting of version 0.1 -> its default."""

_METHOD_SCALING = re.compile(rf"(?<=[:,])(scaling=)({'|'.join(RENAMED)})(?=[\s,]|$)")


def current_settings(settings: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return settings under their present names, and a sentence for each that was renamed.

    Version 0.1 had `scale`, the factor at rank 16, where `alpha` is now, and `scale_policy` where
    `scaling` is. An invalid value is left unchanged, for the parser to refuse.
    """
    found = {name: value for name, value in settings.items() if name not in EARLIER_NAMES}
    said: list[str] = []
    policy = settings.get("scale_policy")
    if policy is not None:
        found["scaling"] = RENAMED.get(str(policy), policy)
        now = "" if found["scaling"] == policy else f": {policy} is {found['scaling']}"
        said.append(f"scale_policy is called scaling now{now}")
    scale = settings.get("scale")
    if scale is None and policy == "rslora" and "alpha" not in settings:
        scale = EARLIER_DEFAULTS["scale"]  # of another alpha than the default of today
    if scale is not None:
        found["alpha"] = _alpha_of(scale, str(found.get("scaling")))
        said.append(f"scale is called alpha now: scale {scale} is alpha {found['alpha']}")
        if "scaling" not in found:
            said.append("scaling is standard by default now; give scaling constant for what scale alone meant before")
    if "methods" in found:
        found["methods"] = _current_methods(found["methods"], said)
    return found, said


def _current_methods(methods: Any, said: list[str]) -> Any:
    """Return methods, a text or a list of texts, with the present names of scaling policies."""
    if isinstance(methods, list | tuple):
        return [_current_methods(method, said) for method in methods]
    if not isinstance(methods, str):
        return methods
    for name in dict.fromkeys(match[2] for match in _METHOD_SCALING.finditer(methods)):
        said.append(f"scaling {name} is called {RENAMED[name]} now")
    return _METHOD_SCALING.sub(lambda match: match[1] + RENAMED[match[2]], methods)


def _alpha_of(scale: object, scaling: str) -> object:
    """Return the alpha whose factor at rank 16 is `scale`; a value that is not a number is returned unchanged."""
    try:
        number = float(scale)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return scale
    if isinstance(scale, bool):
        return scale
    return number * (CONSTANT_AT**0.5 if scaling == "rslora" else CONSTANT_AT)


def earlier_settings(settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the settings of version 0.1 for a study of the same name, one mapping per scaling policy.

    Version 0.1's default policy comes first.
    """
    rest = {name: value for name, value in settings.items() if name not in ("alpha", "scaling")}
    alpha = float(settings.get("alpha", DEFAULT_ALPHA))
    others = [
        {"scale": alpha / CONSTANT_AT, "scale_policy": "constant_alpha_over_r"},
        {"scale": alpha / CONSTANT_AT, "scale_policy": "constant_alpha"},
        {"scale": alpha / CONSTANT_AT**0.5, "scale_policy": "rslora"},
    ]
    return [{**rest, **one} for one in (EARLIER_DEFAULTS, *others)]


def current_label(label: str) -> str:
    """Return a method's label of version 0.1 with the scaling policy's present name."""
    for before, now in RENAMED.items():
        label = re.sub(rf"-{before}(?=[-@]|$)", f"-{now}", label)
    return label
