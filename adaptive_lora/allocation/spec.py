"""A method specification, `NAME[:option=value,...]`."""

from __future__ import annotations

import dataclasses
import logging
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from adaptive_lora.allocation.catalogue import METHODS
from adaptive_lora.allocation.plan import BaseStorage
from adaptive_lora.allocation.request import METRICS, RANK
from adaptive_lora.allocation.scaling import RENAMED, Scaling
from adaptive_lora.allocation.site import Placement, Role, SiteChoice, layers_problem
from adaptive_lora.allocation.start import Start, start_problems
from adaptive_lora.errors import ConfigError, unknown_name
from adaptive_lora.options import Limits, option, parse_options

log = logging.getLogger(__name__)

LIMITS: Mapping[str, int | None] = {
    "min_rank": None,
    "max_rank": None,
    "multiple": 1,
    "attention_cap": None,
    "feed_forward_cap": None,
}
"""Option that limits ranks planned before training -> its value for no limit."""
_MARKS = dict(zip(LIMITS, ("min", "max", "x", "att", "ff"), strict=True))
"""Option that limits ranks -> its prefix in labels."""

VARIANTS: Mapping[str, Any] = {
    "dora": False,
    "alpha": None,
    "scaling": None,
    "lora_plus": 1.0,
    "base": BaseStorage.FULL,
    "init": Start.DEFAULT,
    "lora_fa": False,
    "alora": None,
    "experts": False,
}
"""Option of a variant of LoRA that goes with any allocation of ranks -> its value for plain LoRA.

They are options of every method, so that the effects of an allocation and of a variant can be separated:
`waterfill:rank=8` beside `waterfill:rank=8,dora=true` and `uniform:rank=8,dora=true`."""
_JOINED = ("target_names", "roles", "layers", "towers", "profiled_on", "lr")
"""Options that hold several names or numbers, joined by `+`."""


@dataclass(frozen=True, kw_only=True)
class MethodSpec:
    """A method with its own options, and the options that all methods share.

    Of the shared options, methods that give no ranks take those in `Method.takes`.
    """

    options: Any
    """The method with its own options, a `methods.base.Method`."""
    placement: str = option("all", "part of the block that takes adapters", limits=Limits(choices=tuple(Placement)))
    target_names: tuple[str, ...] = option(
        (), "only sites whose module name ends in one of these (as in Selective LoRA)"
    )
    roles: tuple[str, ...] = option(
        (), "only sites of these roles, such as query+value", limits=Limits(choices=tuple(Role))
    )
    layers: tuple[str, ...] = option((), "only these layers of each tower, such as 0-11, 3+7, first-half, last-third")
    towers: tuple[str, ...] = option(
        (), "only these towers of a base with several, matched by a part of the name, such as vision, text, encoder"
    )
    budget: str | None = option(
        None, "maximum number of trainable parameters: a number, or uniform-R for as many as uniform rank R has"
    )
    min_rank: int | None = option(
        None,
        "minimum rank of a site; 0: a site may get no adapter; none: 1, or 0 for methods that find "
        "ranks by a threshold (truncate, eva)",
        limits=Limits(low=0),
    )
    max_rank: int | None = option(None, "maximum rank of a site; none: the smaller side of its weight", limits=RANK)
    multiple: int = option(
        1, "step between ranks: every rank is a multiple of it, such as 8 for GPU kernels", limits=Limits(low=1)
    )
    attention_cap: int | None = option(None, "maximum rank of an attention site", limits=RANK)
    feed_forward_cap: int | None = option(None, "maximum rank of a feed-forward site", limits=RANK)
    profiled_on: tuple[str, ...] = option(
        (),
        "data to measure the importance profile on instead of the study's own; several data sets, "
        "joined by '+', give equally many examples; 'own' means the study's data",
    )
    dora: bool = option(False, "DoRA: also train one magnitude per output; the budget includes them")
    alpha: float | None = option(None, "LoRA's alpha for this method; none: the study's", limits=Limits(above=0))
    scaling: str | None = option(
        None, "scaling policy for this method, such as rslora; none: the study's", limits=Limits(choices=tuple(Scaling))
    )
    lora_plus: float = option(
        1.0, "LoRA+: ratio of B's learning rate to A's, 16 in the paper; 1: equal", limits=Limits(above=0)
    )
    base: str = option(
        BaseStorage.FULL,
        "storage of the frozen base: full as saved, or nf4 (QLoRA: 4 bit with double quantisation)",
        limits=Limits(choices=tuple(BaseStorage)),
    )
    init: str = option(
        Start.DEFAULT,
        "initial A and B: default (A random, B zero), pissa or olora (from the weight), corda or eva (from its "
        "inputs), lora_ga (from its gradient), loftq (from the error of base=nf4), orthogonal (random, B·A = 0)",
        limits=Limits(choices=tuple(Start)),
    )
    lora_fa: bool = option(
        False, "LoRA-FA: A stays as it is drawn; B alone is trained and counted, so that a budget holds more ranks"
    )
    alora: str | None = option(
        None, "aLoRA: text from whose last occurrence on the adapter acts, such as the assistant's special token"
    )
    lr: tuple[float, ...] = option(
        (), "learning rates of this method, joined by +; none: the study's", limits=Limits(above=0)
    )
    experts: bool = option(
        False,
        "also adapt the routed experts of a mixture of experts (PEFT's target_parameters), each at the rank divided by "
        "the number of experts that a token runs through; false: they stay frozen",
    )

    @classmethod
    def parse(cls, text: str) -> MethodSpec:
        """Read `NAME[:option=value,...]`, such as `linear_decay:rank=16,low_rank=4,budget=300000`.

        Several target names are joined by `+`. A method that wraps another, such as a control arm, names
        it with `of` and takes its options beside its own: `random:of=waterfill,rank=8`.

        Raises:
            ConfigError: unknown method or option, or a value out of limits; all problems at once.
        """
        return cls.build(*cls.split(text))

    @staticmethod
    def split(text: str) -> tuple[str, dict[str, object]]:
        """Return the name and the options that `NAME[:option=value,...]` writes.

        Raises:
            ConfigError: it is no text, an item is not `option=value`, or an option is given twice.
        """
        if not isinstance(text, str):
            raise ConfigError(f"method must be text, such as uniform or uniform:rank=8; got {type(text).__name__}.")
        name, _, rest = text.strip().partition(":")
        options: dict[str, object] = {}
        for part in filter(None, rest.split(",")):
            key, equals, value = part.partition("=")
            key = key.strip().replace("-", "_")
            if not equals:
                raise ConfigError(f"method '{text}': required option=value after ':', got '{part}'.")
            if key in options:
                raise ConfigError(f"method '{text}': option '{key}' is given twice.")
            options[key] = value.replace("+", " ") if key in _JOINED else value.strip()
        return name.strip(), options

    @staticmethod
    def with_option(text: str, name: str, value: object) -> str:
        """Return what writes a method with one more option."""
        return f"{text}{',' if ':' in text else ':'}{name}={value}"

    @classmethod
    def build(cls, name: str, options: Mapping[str, object]) -> MethodSpec:
        """Make a specification from a method's name and its options; reads `to_dict` back.

        Raises:
            ConfigError: unknown method or option, or a value out of limits; all problems at once.
        """
        if name not in METHODS:
            raise ConfigError(unknown_name("method", name, METHODS))
        kind, wrapped = METHODS[name], _wrapped_kind(name, options.get("of"))
        owners: dict[str, Any] = {
            field.name: owner
            for owner in (cls, wrapped, kind)
            if owner is not None
            for field in dataclasses.fields(owner)
            if field.name not in ("options", "of", kind.further)
        }
        given = {key: value for key, value in options.items() if not kind.wraps or key != "of"}
        further = {} if kind.further is None else {
            key: given.pop(key) for key in [*given] if owners.get(key, cls) is cls and key not in kind.takes
        }  # fmt: skip
        if (renamed := RENAMED.get(str(given.get("scaling")))) is not None:
            log.warning("%s: scaling %s is called %s now.", name, given["scaling"], renamed)
            given["scaling"] = renamed
        parsed, wrong = parse_options(given, owners, what=f"option of {name}", place=f"{name}: ")
        checks = (
            _budget_problem(parsed.get("budget")),
            _limits_problem(name, kind, parsed),
            _variant_problem(name, kind, parsed),
            layers_problem(parsed.get("layers", ())),
            _tuner_problem(name, kind, _changed(parsed), wrapped),
        )
        problems = [*wrong.values(), *filter(None, checks)]
        if problems:
            raise ConfigError("; ".join(problems))
        if (wrapped or kind).least_rank is not None:
            parsed.setdefault("min_rank", (wrapped or kind).least_rank)

        def of(owner: Any) -> dict[str, Any]:
            return {key: value for key, value in parsed.items() if owners[key] is owner}

        inner = {} if wrapped is None else {"of": wrapped(**of(wrapped))}
        outside = {kind.further: tuple((key, str(value)) for key, value in further.items())} if further else {}
        own = kind(**inner, **of(kind), **outside)
        if problems := start_problems(name, own, of(cls)):
            raise ConfigError("; ".join(problems))
        if parsed.get("profiled_on") and own.metric is None:
            raise ConfigError(
                f"{name} follows no importance profile, so profiled_on has no effect; leave it out "
                "or name a method such as empirical or waterfill."
            )
        return cls(options=own, **of(cls))

    @property
    def name(self) -> str:
        """Name of the method in `METHODS`."""
        return _name(self.options)

    @property
    def is_plain_lora(self) -> bool:
        """Mark of a plan that is trained unchanged as plain LoRA, from A at random and B zero."""
        return bool(self.options.is_plain_lora) and self.init == Start.DEFAULT and not (self.lora_fa or self.alora)

    @property
    def packages(self) -> tuple[str, ...]:
        """Other packages that provide the method or its profiler, as `name==version`."""
        found = [METHODS.package(_name(method)) for method in _chain(self.options)]
        metric = self.options.metric
        found += [] if metric is None else [METRICS.package(metric)]
        found += self.options.further_packages
        return tuple(dict.fromkeys(package for package in found if package is not None))

    @property
    def choice(self) -> SiteChoice:
        """Criteria for the sites that may take adapters."""
        names = ("roles", "layers", "target_names", "towers")
        return SiteChoice(placement=Placement(self.placement), **{name: getattr(self, name) for name in names})

    @property
    def label(self) -> str:
        """Short unique form for tables and run names, such as `linear_decay-r16-4`."""
        names = [_name(method) for method in _chain(self.options)]
        parts = [*names, *filter(None, [self.options.label_under(self.budget)])]
        if self.placement != Placement.ALL:
            parts.append(self.placement)
        parts += [*self.towers, *self.target_names, *self.roles]
        parts += [f"layers{'+'.join(self.layers)}"] if self.layers else []
        limits = {limit: getattr(self, limit) for limit in LIMITS}
        parts += [f"{_MARKS[limit]}{value}" for limit, value in limits.items() if value != LIMITS[limit]]
        parts += _variant_marks(self)
        if self.profiled_on:
            parts += ["on", *(PurePath(name).stem for name in self.profiled_on)]
        if self.budget is not None:
            parts.append(f"@{self.budget}")
        return "-".join(parts).replace("-@", "@")

    def to_dict(self) -> dict[str, Any]:
        """Return every resolved option but `lr`; equal dictionaries mean equal methods.

        An option that was added later is included only where it is used, so that earlier trials
        keep their signatures.
        """
        own: dict[str, Any] = {}
        for method in _chain(self.options):
            for field in dataclasses.fields(method):
                value = getattr(method, field.name)
                if field.name == method.further:
                    own |= dict(value)
                else:
                    own[field.name] = _name(value) if field.name == "of" and value is not None else value
        shared = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("options", "lr")}
        unused = {**VARIANTS, "roles": (), "layers": (), "towers": ()}
        used = {name: value for name, value in shared.items() if name not in unused or value != unused[name]}
        values = {"name": self.name, **own, **used}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def method_options() -> dict[str, tuple[dataclasses.Field[Any], tuple[str, ...]]]:
    """Return every option: name -> (field, methods that have it; empty for all methods)."""
    found: dict[str, tuple[dataclasses.Field[Any], tuple[str, ...]]] = {}
    for name, kind in METHODS.usable():
        for field in (field for field in dataclasses.fields(kind) if field.name != kind.further):
            first, methods = found.get(field.name, (field, ()))
            found[field.name] = (first, (*methods, name))
    shared = (field for field in dataclasses.fields(MethodSpec) if field.name != "options")
    return {**found, **{field.name: (field, ()) for field in shared}}


def _changed(parsed: Mapping[str, Any]) -> list[str]:
    """Return the options of all methods that are not at their defaults."""
    fields = (field for field in dataclasses.fields(MethodSpec) if field.name in parsed)
    return [field.name for field in fields if parsed[field.name] != field.default]


def _name(method: Any) -> str:
    return METHODS.name_of(type(method))


def _chain(method: Any) -> Iterator[Any]:
    """Yield a method and the method that it wraps, if there is one."""
    yield method
    if method.wrapped is not None:
        yield from _chain(method.wrapped)


def _wrapped_kind(name: str, of: object) -> Any:
    """Return the options class of the method that another wraps; None for a method that wraps none.

    Raises:
        ConfigError: the wrapped method is unknown, or is itself a control arm.
    """
    kind = METHODS[name]
    if not kind.wraps:
        return None
    if of is None:
        default = next(field.default for field in dataclasses.fields(kind) if field.name == "of")
        return None if default is None else type(default)
    plain = [
        other
        for other, options in METHODS.usable()
        if options.gives_ranks and not options.is_control and not options.ranks_in_training
    ]
    if of not in plain:
        raise ConfigError(f"{name}: of: {unknown_name('method', str(of), plain)}")
    return METHODS[str(of)]


def _tuner_problem(name: str, kind: Any, changed: Sequence[str], wrapped: Any) -> str | None:
    """Return the problem with rank options on a method that gives no ranks, or None.

    Args:
        name: name of the method.
        kind: its options class.
        changed: names of the shared options that differ from their defaults.
        wrapped: options class of the method that it wraps, or None.
    """
    if kind.takes is None:
        return None
    senseless = sorted(set(changed) - (kind.takes if wrapped is not None else kind.takes - LIMITS.keys()))
    if not senseless:
        return None
    return f"{name} gives no ranks, so it takes no {', '.join(senseless)}; leave that out"


def _limits_problem(name: str, kind: Any, parsed: Mapping[str, Any]) -> str | None:
    """Return the problem with rank limits on a method that cannot keep them, or None."""
    unmet = [limit for limit, default in LIMITS.items() if parsed.get(limit, default) != default]
    held = kind.holds_limits
    if not kind.gives_ranks or not unmet or held:
        return None
    return f"{name} finds its ranks by its own rule, which cannot keep {', '.join(unmet)}; leave that out"


def _budget_problem(budget: str | None) -> str | None:
    """Return the problem with a budget, or None."""
    if budget is None:
        return None
    number = budget.removeprefix("uniform-")
    if number.isdecimal() and len(number) <= 18 and int(number) > 0:
        return None
    return f"budget must be a whole number of parameters or uniform-R; got '{budget:.80}'"


def _variant_problem(name: str, kind: Any, parsed: Mapping[str, Any]) -> str | None:
    """Return the problem with a variant on a method that does not train LoRA layers, or None."""
    refused: Mapping[str, str] = kind.refused_variants
    wrong = [
        f"{name} cannot have {option}: {why}"
        for option, why in refused.items()
        if parsed.get(option, VARIANTS[option]) != VARIANTS[option]
    ]
    if parsed.get("experts") and parsed.get("dora"):
        wrong.append(f"{name}: PEFT has no DoRA for routed experts; leave out dora or experts")
    if parsed.get("experts") and "init" not in refused and parsed.get("init", Start.DEFAULT) != Start.DEFAULT:
        wrong.append(f"{name}: initial weights are those of linear layers, not of experts; leave out init or experts")
    return "; ".join(wrong) or None


def _variant_marks(spec: Any) -> list[str]:
    """Return a method's variants as items of its label."""
    words = {
        "dora": "dora",
        "alpha": f"alpha{spec.alpha or 0:g}",
        "scaling": str(spec.scaling),
        "lora_plus": f"plus{spec.lora_plus:g}",
        "base": spec.base,
        "init": spec.init,
        "lora_fa": "fa",
        "alora": f"alora-{zlib.crc32((spec.alora or '').encode()):08x}",
        "experts": "experts",
    }
    return [word for name, word in words.items() if getattr(spec, name) != VARIANTS[name]]
