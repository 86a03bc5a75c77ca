"""Ranks that are given: by module names, by a plan that another study has found, or by PEFT's `rank_pattern`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, ClassVar

from adaptive_lora.allocation.problem import AllocationProblem, Solution
from adaptive_lora.allocation.request import ProfileSummary, RankRequest
from adaptive_lora.allocation.site import AdapterSite
from adaptive_lora.errors import AllocationError, ConfigError
from adaptive_lora.methods.base import RankMethod
from adaptive_lora.options import option

_READABLE = "a trial's rank_plan.json, what `plan --json` prints, PEFT's adapter_config.json, or {module name: rank}"
_SHOWN = 3
"""Number of names that a message shows."""
_PATTERN = frozenset("*?[")
"""Characters that stand for others in the end of a name."""
_NARROWED = ("layers_to_transform", "layers_pattern", "exclude_modules", "target_parameters")
"""Settings of PEFT by which it adapts other modules than those that the names end."""


@dataclass(frozen=True, kw_only=True)
class Given(RankMethod):
    """The ranks that are given, such as those that a search has found, to be compared on fresh seeds.

    An item ends the names of modules and may hold * for any text; of several that fit one without * counts, and of
    these the longest. Sites that none fits have no adapter. Without a budget ranks are taken as they are, with one
    they are proportions. A file is read when the method is, and its ranks, not its name, identify trials.
    """

    name: ClassVar[str] = "given"
    least_rank: ClassVar[int | None] = 0
    ranks: tuple[str, ...] = option(
        (),
        "END=RANK for modules whose names end in END (* is any text), joined by +, such as c_attn=4+h.0.*=2; or a "
        "file: a trial's rank_plan.json, PEFT's adapter_config.json or a JSON object of name: rank",
    )

    def __post_init__(self) -> None:
        """Read a file, and refuse what gives no ranks."""
        if not self.ranks:
            raise ConfigError(f"given: required ranks, such as ranks=c_attn=4+c_fc=2 or ranks=FILE with {_READABLE}.")
        items = tuple(item for text in self.ranks for item in (text.split("+") if "=" in text else [text]))
        if len(items) == 1 and "=" not in items[0]:
            items = _read(Path(items[0]))
        elif odd := [item for item in items if not _is_item(item)]:
            raise ConfigError(
                f"given: ranks: required END=RANK with a whole number from 0, or one file; got {odd[0]!r}."
            )
        if len({item.rpartition("=")[0] for item in items}) < len(items):
            raise ConfigError("given: ranks: a name is given twice; required each once.")
        object.__setattr__(self, "ranks", tuple(sorted(items)))

    @property
    def rank_label(self) -> str:
        """Return six digits of a digest of the ranks."""
        return hashlib.sha256("+".join(self.ranks).encode()).hexdigest()[:6]

    def demand(self, sites: Sequence[AdapterSite], profile: ProfileSummary | None) -> RankRequest:
        """Return the given rank of every site, 0 where no item fits.

        Raises:
            AllocationError: an item fits no site, or all ranks are 0.
        """
        by_end = {end: int(rank) for end, _, rank in (item.rpartition("=") for item in self.ranks)}
        fitting = {site.name: [end for end in by_end if _fits(end, site.name)] for site in sites}
        if unused := sorted(by_end.keys() - {end for ends in fitting.values() for end in ends}):
            raise AllocationError(
                f"given: {len(unused)} of {len(by_end)} names end the name of no adapter site: "
                f"{', '.join(unused[:_SHOWN])}; sites are called {', '.join(site.name for site in sites[:_SHOWN])}, ..."
            )
        ranks = tuple(float(by_end[max(ends, key=_precision)]) if ends else 0.0 for ends in fitting.values())
        if not any(ranks):
            raise AllocationError("given: required a rank above 0 at one site at least; every rank is 0.")
        return RankRequest(ranks=ranks)

    def solve(self, problem: AllocationProblem) -> Solution:
        """Return the given ranks, or with a budget ranks in their proportions.

        Raises:
            AllocationError: without a budget, a rank is outside the limits.
        """
        wanted = self.demand(problem.sites, problem.profile).ranks
        if problem.budget is not None:
            return problem.granted(RankRequest(ranks=wanted))
        ranks = tuple(int(rank) for rank in wanted)
        for rank, site, low, up in zip(ranks, problem.sites, problem.lower, problem.upper, strict=True):
            if not low <= rank <= up or rank % problem.multiple:
                raise AllocationError(
                    f"given: {site.name} has rank {rank}; required {low} to {up}"
                    f"{f', in steps of {problem.multiple}' if problem.multiple > 1 else ''}. Give a budget to take the "
                    "ranks as proportions, or change min_rank, max_rank or multiple."
                )
        return Solution(ranks=ranks, budget=None)


def _precision(end: str) -> tuple[bool, int]:
    return _PATTERN.isdisjoint(end), len(end)


def _fits(end: str, name: str) -> bool:
    if _PATTERN.isdisjoint(end):
        return f".{name}".endswith(f".{end}")
    return fnmatchcase(f".{name}", f"*.{end}")


def _is_item(text: str) -> bool:
    end, _, rank = text.rpartition("=")
    return bool(end) and rank.isascii() and rank.isdecimal()


def _read(path: Path) -> tuple[str, ...]:
    """Return the items of a file, or of the adapter_config.json in a folder.

    Raises:
        ConfigError: the file cannot be read, or has no ranks by module names.
    """
    file = path / "adapter_config.json" if path.is_dir() else path
    try:
        found = _ranks_of(json.loads(file.read_text(encoding="utf-8-sig")))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(f"given: ranks: {file}: required {_READABLE}; {type(error).__name__}: {error}") from error
    for name, rank in found.items():
        if not name or isinstance(rank, bool) or not isinstance(rank, int) or rank < 0:
            raise ConfigError(
                f"given: ranks: {file}: required a rank that is a whole number from 0; {name} has {rank!r}."
            )
    return tuple(f"{name}={rank}" for name, rank in found.items())


def _ranks_of(content: Any) -> Mapping[str, Any]:
    """Return end of a module's name -> rank."""
    if not isinstance(content, dict) or not content:
        raise TypeError("no object with names")
    if "sites" in content:  # a rank plan
        return {str(row["name"]): row["rank"] for row in content["sites"]}
    if "rank_pattern" not in content:
        return {str(name): rank for name, rank in content.items()}
    return _ranks_of_peft(content)


def _ranks_of_peft(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return end of a module's name -> rank, as PEFT gives it: the first key of `rank_pattern` that ends a target.

    Raises:
        ValueError: PEFT would choose modules or ranks by another rule than the ends of names.
    """
    targets, pattern = config["target_modules"], config["rank_pattern"]
    named = [targets] if isinstance(targets, str) else list(targets)
    if str(config.get("peft_type", "LORA")).rpartition(".")[2] != "LORA":
        raise ValueError(f"its peft_type is {config['peft_type']}, and not LORA")
    if narrowed := [name for name in _NARROWED if config.get(name)]:
        raise ValueError(f"it has {narrowed[0]}, which ends of names do not tell")
    odd = [str(name) for name in (*named, *pattern) if not _plain(name)]
    if isinstance(targets, str) or odd:
        raise ValueError(f"a regular expression or a word for several modules stands for names: {(odd or named)[0]}")
    if wider := [key for key in pattern if not any(_fits(target, key) or _fits(key, target) for target in named)]:
        raise ValueError(f"{wider[0]} of rank_pattern is no target")
    keys = list(pattern)
    if late := [key for at, key in enumerate(keys) if any(_fits(earlier, key) for earlier in keys[:at])]:
        raise ValueError(f"{late[0]} of rank_pattern never counts: PEFT takes a key before it; put it first")
    ends = {target: next((pattern[key] for key in pattern if _fits(key, target)), config["r"]) for target in named}
    return ends | {key: rank for key, rank in pattern.items() if any(_fits(target, key) for target in named)}


def _plain(name: str) -> bool:
    return all(part.replace("_", "").replace("-", "").isalnum() for part in str(name).split("."))
