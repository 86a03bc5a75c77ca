"""`planted`: ordinary studies of planted teachers, where the right ranks are known."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptive_lora.allocation import MethodSpec
from adaptive_lora.cli.documents import print_document
from adaptive_lora.cli.group import main
from adaptive_lora.cli.options import make_console, options, own_settings, settings, settings_given
from adaptive_lora.config import StudyConfig, study_from
from adaptive_lora.config.planted import SPECTRA, PlantedTeacher
from adaptive_lora.config.store_place import require_reachable
from adaptive_lora.config.types import Precision
from adaptive_lora.errors import ConfigError
from adaptive_lora.methods.planted import PATTERNS
from adaptive_lora.options import Limits, option, read_options
from adaptive_lora.redaction import shown

if TYPE_CHECKING:
    from adaptive_lora.analysis.comparison import Comparison

_TRACKING = ("tracking_uri", "experiment")
_TEACHER = {field.name: field.default for field in dataclasses.fields(PlantedTeacher)}


@dataclass(frozen=True, kw_only=True)
class PlantedStudies:
    """Teachers, the methods that learn from them, and how long everyone is trained."""

    model: str = option("embedded", "base model: 'embedded', a local folder or a hub id")
    patterns: tuple[str, ...] = option(tuple(PATTERNS), "where rank is planted", limits=Limits(choices=tuple(PATTERNS)))
    spectra: tuple[str, ...] = option(
        ("flat",), "singular values of the planted change", limits=Limits(choices=SPECTRA)
    )
    draws: tuple[int, ...] = option((0,), "seeds of the teachers; with several, they are also compared together")
    tune_draws: tuple[int, ...] = option(
        (), "seeds of other teachers, on which each method's learning rate is chosen for all draws; none: on each draw"
    )
    methods: tuple[str, ...] = option(
        ("empirical", "waterfill", "random:of=waterfill"),
        "NAME[:option=value,...] per method; uniform and the planted ranks always take part",
    )
    budget: str = option(
        _TEACHER["budget"], "parameters of the planted change and of every method: a number or uniform-R"
    )
    min_rank: int = option(_TEACHER["min_rank"], "planted rank of the sites outside a pattern", limits=Limits(low=0))
    seeds: tuple[int, ...] = option(tuple(range(8)), "seeds of initialisation and order")
    distance: float = option(
        _TEACHER["distance"], "KL(teacher || base) that the planted change is scaled to", unit="nats per token"
    )
    examples: int = option(512, "texts of the teacher to learn from", limits=Limits(low=8))
    test_examples: int = option(128, "texts of the teacher to test on", limits=Limits(low=8))
    validation_examples: int = option(128, "texts of the teacher to choose rates on", limits=Limits(low=8))
    length: int = option(_TEACHER["length"], "length of each text", unit="tokens")
    steps: int = option(800, "optimiser steps of each method", limits=Limits(low=1))
    batch_size: int = option(8, "texts per step", limits=Limits(low=1))
    lr: tuple[float, ...] = option(
        (2e-3, 4e-3, 8e-3),
        "learning rates, of which each method's is chosen on validation; of several the grid is extended by a factor "
        "of 2 while a method's is at its end",
    )
    race: bool = option(
        False,
        "stop rates that are behind on the way; with one seed one that would end best may be stopped",
        switch=True,
    )
    precision: str = option("fp32", "compute type", limits=Limits(choices=("auto", *Precision)))
    output: str = option("adaptive-lora-out", "folder for reports and adapters")

    def __post_init__(self) -> None:
        """Refuse empty and repeated teachers, and methods without ranks."""
        for name in ("patterns", "spectra", "draws"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ConfigError(f"{name}: required at least one, each once; got {values}.")
        if len(set(self.tune_draws)) < len(self.tune_draws):
            raise ConfigError(f"tune_draws: required each once; got {self.tune_draws}.")
        if both := sorted(set(self.draws) & set(self.tune_draws)):
            raise ConfigError(f"tune_draws: required other teachers than those of draws; {both[0]} is in both.")
        if self.tune_draws and len(self.lr) < 2:
            raise ConfigError(f"tune_draws: required two learning rates (lr) to choose from; got {self.lr[0]:g} alone.")
        for text in self.methods:
            if not MethodSpec.parse(text).options.gives_ranks:
                raise ConfigError(f"methods: '{text}' gives no ranks; required an allocation.")

    def name_of(self, teacher: PlantedTeacher) -> str:
        """Return the name of a teacher's cell: its pattern, with its spectrum where there are several."""
        return teacher.pattern if len(self.spectra) == 1 else f"{teacher.pattern}, {teacher.spectrum}"

    def studies(
        self, tracking: dict[str, object], draws: Sequence[int]
    ) -> Iterator[list[tuple[PlantedTeacher, StudyConfig]]]:
        """Yield for every pattern and spectrum the teachers of these draws with their studies."""
        for pattern, spectrum in product(self.patterns, self.spectra):
            yield [self._study(tracking, pattern, spectrum, draw) for draw in draws]

    def _study(
        self, tracking: dict[str, object], pattern: str, spectrum: str, draw: int
    ) -> tuple[PlantedTeacher, StudyConfig]:
        """Return a teacher with its study."""
        texts = self.examples + self.test_examples + self.validation_examples
        given = {"pattern": pattern, "spectrum": spectrum, "draw": draw, "texts": texts}
        shared = ("budget", "distance", "length", "min_rank")
        teacher = read_options(PlantedTeacher, {name: getattr(self, name) for name in shared} | given)
        floor = "none" if self.min_rank == 1 else self.min_rank  # as `PlantedTeacher.method` has it
        oracle = f"planted:pattern={pattern},draw={draw},min_rank={floor}"
        methods = [MethodSpec.with_option(text, "budget", self.budget) for text in ("uniform", oracle, *self.methods)]
        settings: dict[str, object] = {
            "study": f"planted-{pattern}-{spectrum}-{draw}",
            "data": str(teacher),
            "methods": methods,
            "test_share": self.test_examples / texts,
            "validation_share": self.validation_examples / texts,
            "max_steps": self.steps,
            "epochs": self.steps,  # more than enough: max_steps ends the training
            "validations": 3,
            "race": self.race and len(self.lr) > 1,
            "registered_model": "adaptive-lora-planted",
        }
        alike = ("model", "seeds", "batch_size", "lr", "precision", "output")
        settings |= {name: getattr(self, name) for name in alike} | tracking
        return teacher, study_from(settings)


@main.command(extra="study")
@options(*own_settings(PlantedStudies, "teacher"), *settings(only=_TRACKING))
def planted(as_json: bool, **options: Any) -> None:
    """Plant a known low-rank change in a base and see which method finds where it is.

    Runs an ordinary study for every teacher (`study --data planted:...`): every method gets the budget of the
    planted change and is compared with uniform, the planted ranks themselves among them. The same command continues.
    """
    given = settings_given(options)
    tracking = {key: given.pop(key) for key in _TRACKING if key in given}
    config = read_options(PlantedStudies, given)
    cells = [list(config.studies(tracking, draws)) for draws in (config.tune_draws, config.draws)]
    require_reachable(cells[1][0][0][1].tracking)
    from adaptive_lora.analysis.report.figures import draw_cells
    from adaptive_lora.runner.planted import PlantedRuns, print_table, rows_of

    console = make_console()
    runs = PlantedRuns(config.output, console)
    compared = {
        config.name_of(group[0][0]): runs.compared(tuning, group).comparison
        for tuning, group in zip(*cells, strict=True)
    }
    rows = [row for name, comparison in compared.items() for row in rows_of(name, comparison)]
    print_table(rows, next(iter(compared.values())).confidence, console)
    if (figure := draw_cells(list(compared.items()), Path(config.output))) is not None:
        console.print(f"[bold]figure[/]    {shown(figure.resolve())}", highlight=False, soft_wrap=True)
    if as_json:
        studies = [
            {
                "data": data,
                "study_id": result.study_id,
                "recovered": recovered(result.comparison),
                "comparison": result.comparison.to_dict(),
            }
            for data, result in runs.found
        ]
        print_document("planted", {"studies": studies, "table": [dataclasses.asdict(row) for row in rows]})


def recovered(comparison: Comparison) -> dict[str, float]:
    """Return method -> share of what the planted ranks gain over uniform; empty where they are not shown to gain."""
    cell = comparison.headroom
    if cell is None or comparison.method(cell.oracle).verdict.kind != "better":
        return {}
    shares = {row.method: row.recovered for row in cell.methods if row.method != cell.oracle}
    return {method: share for method, share in shares.items() if share is not None}
