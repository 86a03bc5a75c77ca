"""Sizes of a type of adapter whose trained parameters come nearest to a budget, found by counting."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from adaptive_lora.allocation.architecture import Architecture, Shape, size
from adaptive_lora.allocation.plan import RankPlan, budget_of
from adaptive_lora.allocation.site import AdapterSite
from adaptive_lora.allocation.tuner_plan import TunerPlan
from adaptive_lora.errors import AllocationError
from adaptive_lora.methods.adapters.peft_build import DoesNotFit, default_of, parsed, trained_shapes
from adaptive_lora.methods.peft_types.table import TYPES, PeftType, Values

if TYPE_CHECKING:
    from adaptive_lora.methods.peft_types import PeftTypeMethod

TOLERANCE = 0.02
"""Largest difference between trained parameters and budget, as a share of the budget."""
_UNITS = 10**8
"""Number of steps between 0 and 1 in the search for a share."""
_LONGEST_VECTOR = 256
"""Maximum length of VB-LoRA's vectors, which divides the features of all sites: PEFT's default."""

Size = int | float | str
Count = Callable[[Any], int]
"""Function from a size to the number of trained parameters; raises DoesNotFit for sizes that cannot be built."""


def one_size(method: PeftTypeMethod, base: Architecture, budget: int | None, label: str) -> TunerPlan:
    """Return the plan of a type with one size at all sites.

    Args:
        method: type and options.
        base: architecture, with the sites to adapt.
        budget: number of parameters to train, or None: the size is that of the options, or PEFT's default.
        label: label of the method.

    Raises:
        AllocationError: the type does not fit the base, or no size meets the budget within `TOLERANCE`.
        ConfigError: the options are not those of the type.
    """
    facts, options = TYPES[method.type], _options(method, base)

    def count(value: Size) -> int:
        return _number(method, base, base.sites, {**options, facts.size: value})

    if budget is not None and facts.size and facts.size not in options:
        try:
            tried = _tried(facts, options, count, budget, base.sites)
        except DoesNotFit as error:
            raise AllocationError(_unbuilt(label, base, error)) from error
        options[facts.size] = min(tried, key=lambda value: abs(tried[value] - budget))
        if not _meets(tried[options[facts.size]], budget):
            raise AllocationError(_unmet(label, facts.size, tried, budget))
    plan = _plan(method, base, base.sites, options, budget, label)
    if budget is not None and facts.size and not _meets(plan.trainable_parameters, budget):
        raise AllocationError(
            f"{label}: {facts.size}={options[facts.size]} trains {plan.trainable_parameters:,} parameters; required "
            f"{budget:,} (the budget) within {TOLERANCE:.0%}. Leave {facts.size} or the budget out."
        )
    return plan


def size_per_site(method: PeftTypeMethod, base: Architecture, ranks: RankPlan, label: str) -> TunerPlan:
    """Return the plan of a type in which every site has about the parameters that a rank plan gives it.

    A site's size is the one whose number of parameters is nearest to the site's share of the rank plan and what the
    sites before it could not spend of theirs.

    Args:
        method: type and options.
        base: architecture, with all sites.
        ranks: rank plan that says how many parameters each site gets.
        label: label of the method.

    Raises:
        AllocationError: the type does not fit the base, or its sizes do not meet the budget within `TOLERANCE`.
        ConfigError: the options are not those of the type.
    """
    facts, options, budget = TYPES[method.type], _options(method, base), budget_of(ranks)
    counts: dict[tuple[int, int, bool], dict[Size, int]] = {}
    sizes, left, sites = dict[str, Size](), 0, [entry.site for entry in ranks.entries]
    for entry, site in zip(ranks.entries, sites, strict=True):
        known = counts.setdefault((site.in_features, site.out_features, site.name in base.transposed), {})

        def count(value: Size, site: AdapterSite = site, known: dict[Size, int] = known) -> int:
            if value not in known:
                known[value] = _number(method, base, [site], {**options, facts.size: value})
            return known[value]

        share = entry.parameters + left
        try:
            _tried(facts, options, count, share, [site])
        except DoesNotFit as error:
            raise AllocationError(_unbuilt(label, base, error)) from error
        sizes[site.name] = min(known, key=lambda value: abs(known[value] - share))
        left = share - known[sizes[site.name]]
    if not _meets(budget - left, budget):
        raise AllocationError(
            f"{label}: the {facts.size} per site nearest to the shares of {ranks.method} trains {budget - left:,} "
            f"parameters; required {budget:,} (the budget) within {TOLERANCE:.0%}. Change the budget or the options of "
            f"{method.type}."
        )
    return _plan(method, base, sites, {**options, facts.pattern: sizes}, budget, label)


def _options(method: PeftTypeMethod, base: Architecture) -> dict[str, Any]:
    """Return the options of a type: those given, else those that differ from PEFT's defaults."""
    options = {**TYPES[method.type].settings, **parsed(method.type, method.configuration)}
    if method.type == "VBLORA":
        blocks = _blocks(base.sites)
        options.setdefault("vector_length", max(block for block in blocks if block <= _LONGEST_VECTOR))
    if method.type == "OFT":
        options.setdefault("r", 0)  # either the number of blocks or their size is given
    return options


def _plan(
    method: PeftTypeMethod,
    base: Architecture,
    sites: Sequence[AdapterSite],
    options: Mapping[str, Any],
    budget: int | None,
    label: str,
) -> TunerPlan:
    """Return the plan of a type at these sites with these options.

    Raises:
        AllocationError: PEFT does not build or run it, or it has nothing to train at a site.
    """
    settings, facts = {"type": method.type, "options": dict(options)}, TYPES[method.type]
    if facts.at_least:
        own, least = (options.get(name, default_of(method.type, name)) for name in (facts.size, facts.at_least))
        if own < least:
            raise AllocationError(
                f"{label}: {facts.size}={own} is below {facts.at_least}={least}, with which PEFT does not run. Raise "
                f"{facts.size} or the budget, or lower {facts.at_least}."
            )
    try:
        tensors = trained_shapes(base, sites, settings)
    except DoesNotFit as error:
        raise AllocationError(_unbuilt(label, base, error)) from error
    total = sum(map(size, tensors.values()))
    notes = () if budget in (None, total) else (
        f"{method.type} trains {total:,} parameters, {abs(total - budget):,} {'more' if total > budget else 'fewer'} "
        f"than the budget of {budget:,} ({(total - budget) / budget:+.2%}): the nearest that its "
        f"{TYPES[method.type].size or 'type, which has no size'} allows.",
    )  # fmt: skip
    return TunerPlan(
        method=label,
        family="peft",
        settings={**settings, "targets": [site.name for site in sites]},
        tensors=tensors,
        budget=budget,
        notes=(*notes, *_above_weights(method.type, sites, tensors)),
    )


def _above_weights(kind: str, sites: Sequence[AdapterSite], tensors: Mapping[str, Shape]) -> tuple[str, ...]:
    """Return a remark on sites whose part of the adapter has more parameters than their weight."""
    least = dict[tuple[int, int], int]()  # of sites of one shape: a tensor that sites share is named by one of them
    for site in sites:
        own = sum(size(shape) for name, shape in tensors.items() if name.startswith(f"{site.name}."))
        shape = (site.in_features, site.out_features)
        least[shape] = min(own, least.get(shape, own))
    above = [s for s in sites if least[s.in_features, s.out_features] > s.in_features * s.out_features]
    if not above:
        return ()
    name, rows, columns = above[0].name, above[0].out_features, above[0].in_features
    return (
        f"{kind} trains more parameters than the weight has at {len(above)} of {len(sites)} sites, such as {name} "
        f"({least[columns, rows]:,} for {rows:,} x {columns:,}): "
        "take a smaller size, or the method full.",
    )


def _unbuilt(label: str, base: Architecture, reason: object) -> str:
    return (
        f"{label}: PEFT does not build this on {base.kind}: {str(reason).rstrip('.')}. Take another type, or leave "
        "sites out by placement, roles, layers or target_names."
    )


def _number(
    method: PeftTypeMethod, base: Architecture, sites: Sequence[AdapterSite], options: Mapping[str, Any]
) -> int:
    """Return the number of parameters that a type trains at these sites."""
    return sum(map(size, trained_shapes(base, sites, {"type": method.type, "options": options}).values()))


def _meets(number: int, budget: int) -> bool:
    return abs(number - budget) <= TOLERANCE * budget


def _unmet(label: str, what: str, tried: Mapping[Any, int], budget: int) -> str:
    """Return the message on a budget that no size meets, with the nearest on either side."""
    below = max((v for v, n in tried.items() if n < budget), key=lambda v: tried[v], default=None)
    above = min((v for v, n in tried.items() if n > budget), key=lambda v: tried[v], default=None)
    found = [f"{tried[value]:,} ({what}={value})" for value in (below, above) if value is not None]
    near = f"nearest {'are' if len(found) > 1 else 'is'} {' and '.join(found)}"
    return (
        f"{label}: no {what} trains {budget:,} parameters (the budget) within {TOLERANCE:.0%}; the {near}. "
        f"Give {'one of them' if len(found) > 1 else 'it'} as the budget of all methods."
    )


def _tried(
    facts: PeftType, options: Mapping[str, Any], count: Count, budget: int, sites: Sequence[AdapterSite]
) -> dict[Size, int]:
    """Return sizes with their numbers of parameters, among them those next to the budget on either side.

    Raises:
        DoesNotFit: PEFT builds none; the message has its last reason.
    """
    found, reasons = dict[Size, int](), list[DoesNotFit]()

    def tried(value: Size) -> int | None:
        try:
            found[value] = count(value)
        except DoesNotFit as error:
            reasons.append(error)
        return found.get(value)

    match facts.values:
        case Values.VARIANTS:
            for name in facts.variants:
                tried(name)
        case Values.BLOCKS:
            for block in _blocks(sites):
                tried(block)
        case Values.SHARE:
            _search(lambda unit: tried(unit / _UNITS), budget, (1, _UNITS // 2), _UNITS - 1)
        case Values.WHOLE:
            step = int(options.get(facts.multiple_of, facts.step))
            _search(lambda unit: tried(unit * step), budget, (1, 2))
    if not found:
        raise reasons[-1]
    return found


def _blocks(sites: Sequence[AdapterSite]) -> list[int]:
    """Return the common divisors of all features of sites."""
    common = math.gcd(*(side for site in sites for side in (site.in_features, site.out_features)))
    return [block for block in range(1, common + 1) if common % block == 0]


def _search(
    tried: Callable[[int], int | None], budget: int, first_two: tuple[int, int], most: float = math.inf
) -> None:
    """Try whole numbers until two neighbours are on either side of the budget, or one meets it.

    The number of parameters may rise or fall, at any pace: every second attempt is where a line through the last two
    meets the budget; the others double the number or halve the interval.

    Args:
        tried: function from a whole number to its parameters; None where it cannot be built.
        budget: number of parameters to come near to.
        first_two: the first two numbers to try.
        most: largest number to try.
    """
    points = [(unit, number) for unit in first_two if (number := tried(unit)) is not None]
    if len(points) < 2:
        return
    rising = points[1][1] >= points[0][1]

    def passed(number: int) -> bool:
        return number >= budget if rising else number <= budget

    if passed(points[0][1]):
        return
    low, limit = (first_two[0], float(first_two[1])) if passed(points[1][1]) else (first_two[1], math.inf)
    attempt = 0
    while min(limit, most + 1) - low > 1:
        attempt += 1
        (one, first), (other, second) = points[-2:]
        middle: float = 2 * low if limit == math.inf else (low + limit) // 2
        if attempt % 2 and first != second:
            middle = one + (budget - first) * (other - one) / (second - first)
        unit = int(min(max(math.ceil(middle), low + 1), limit - 1, most))
        number = tried(unit)
        stuck = number is not None and (number == second if unit >= 2 * low else (number < second) == rising)
        if number is None or passed(number) or (limit == math.inf and stuck):
            limit = unit
        else:
            low = unit
        if number is not None:
            points.append((unit, number))
        if number == budget:
            return
