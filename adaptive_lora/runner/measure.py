"""`profile`: importance profiles of a study's training examples, written, logged and printed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from rich.console import Console

from adaptive_lora.allocation.site import AdapterSite
from adaptive_lora.config import StudyConfig, study_from
from adaptive_lora.errors import ConfigError, ModelError, installed, unknown_name
from adaptive_lora.methods.importance import PROFILERS, ImportanceProfile
from adaptive_lora.models.base import locate
from adaptive_lora.redaction import shown
from adaptive_lora.runner.context import StudyContext
from adaptive_lora.runner.encoder_context import context_for
from adaptive_lora.runner.progress import say_lines, say_place
from adaptive_lora.serving import saved_quantisation
from adaptive_lora.training import total_steps

if TYPE_CHECKING:
    from adaptive_lora.tracking import Store


def run_profiles(
    config: StudyConfig, metrics: Sequence[str], console: Console, *, experts: bool = False
) -> list[ImportanceProfile]:
    """Measure one profile per metric, write them to the output folder, log them with their figures, and print them.

    Gradient metrics share one pass over the calibration data. Without the packages of the extra `study` nothing is
    logged.

    Args:
        config: settings of base, data and calibration.
        metrics: metrics to measure.
        console: console to print to.
        experts: whether the routed experts of a mixture of experts are measured too.

    Raises:
        ConfigError: a metric is unknown, or there are several seeds or folds.
        ModelError: the base has no routed experts that take adapters.
    """
    for metric in metrics:
        if metric not in PROFILERS:
            raise ConfigError(unknown_name("metric", metric, PROFILERS))
    seed = config.seeds[0]
    context = context_for(as_saved(config), metrics)
    say_lines(console, context.data_lines())
    tracked = config.tracking.tracking_uri is not None or installed("mlflow")
    store = _store(config) if tracked else None
    if isinstance(context, StudyContext):
        profiles = context.profiles(metrics, seed=seed, fold=0, experts=experts)
    elif experts:
        raise ModelError("--experts is for models of a task, such as causal language models. Leave it out.")
    else:
        profiles = context.profiles(metrics, seed=seed, fold=0)
    folder = Path(config.tracking.output)
    folder.mkdir(parents=True, exist_ok=True)
    for metric, profile in profiles.items():
        share = _share_of_training(context, profile)
        path = folder / f"profile_{metric}_seed{seed}.json"
        path.write_text(profile.to_json(), encoding="utf-8")
        if store is not None:
            _log(store, profile, profile.sites, share, path)
        _print_profile(profile, share, path, console)
    if store is None:
        console.print(
            'not logged: that needs mlflow, which is not installed: pip install "adaptive-lora[study]"', markup=False
        )
    else:
        say_place(store, console)
    return list(profiles.values())


def _store(config: StudyConfig) -> Store:
    from adaptive_lora.tracking import connect

    return connect(config.tracking)


def _log(store: Store, profile: ImportanceProfile, sites: Sequence[AdapterSite], share: float, path: Path) -> None:
    """Log a profile and its figures as a run.

    Args:
        store: tracking store.
        profile: the profile.
        sites: sites that it has scores of.
        share: ratio of its tokens to those of one training.
        path: file of the profile, which the artifact is named after.
    """
    from adaptive_lora.analysis.report.profile_figures import profile_figure, spectrum_figure
    from adaptive_lora.tracking.runs import single_run

    metric, seed = profile.metric, profile.seed
    with single_run(store, "profile", f"profile·{metric}·seed{seed}") as run:
        run.params({"profile.metric": metric, "profile.seed": seed})
        run.json(path.name, profile.to_dict())
        run.metric("profile/seconds", profile.seconds)
        run.metric("profile/stability", profile.stability)
        run.metric("profile/tokens", profile.tokens)
        run.metric("profile/processed_tokens", profile.processed_tokens)
        run.metric("profile/share_of_training_tokens", share)
        if profile.visible is not None:
            run.metric("profile/covering_rank", profile.visible.whole.rank)
        run.flush()
        with TemporaryDirectory() as figures:
            profile_figure(sites, profile.scores, metric, Path(figures))
            if profile.spectra is not None:
                spectrum_figure(sites, profile.spectra, metric, Path(figures))
            run.files(Path(figures), "figures")


def as_saved(config: StudyConfig) -> StudyConfig:
    """Return a study's configuration with a method for the base as saved, in 4 bit or not."""
    _, _, folder = locate(config.model)
    saved = saved_quantisation(folder)
    if saved is None or saved.use != "nf4":
        return config
    return study_from({**config.flat(), "methods": "uniform:rank=1,base=nf4", "baseline": None})


def _print_profile(profile: ImportanceProfile, share: float, path: Path, console: Console) -> None:
    shares = sorted(profile.scores.items(), key=lambda item: -item[1])
    total = sum(profile.scores.values())
    for name, score in shares:
        console.print(f"{score / total:7.2%}  {shown(name)}", highlight=False)
    halves = f"rank correlation between halves {profile.stability:.2f}"
    seen = f"{profile.tokens:,} supervised tokens" if profile.tokens else f"{profile.processed_tokens:,} tokens"
    cost = "" if math.isnan(share) else f" ({share:.1%} of the tokens of one training)"
    console.print(
        f"\n{profile.metric} over {seen} in {profile.seconds:.1f} s{cost}; "
        f"{profile.stability_note or halves}{_seen(profile)}\nwritten to {shown(path)}; use it with "
        f"`adaptive-lora plan --method empirical:metric={profile.metric} --profile {shown(path)}`",
        highlight=False,
        soft_wrap=True,
    )


def _seen(profile: ImportanceProfile) -> str:
    """Return lines on what the profile could see, and on the metrics that its time is shared with."""
    further = [name for name in profile.together if name != profile.metric]
    together = f"\nmeasured in one pass with {', '.join(further)}" if further else ""
    return together + ("" if profile.visible is None else f"\n{profile.visible.sentence()}")


def _share_of_training(context: object, profile: ImportanceProfile) -> float:
    """Return the ratio of a profile's processed tokens to those of one training.

    NaN for models that are profiled but not trained. A forward pass counts like one with a backward
    pass, so the cost of forward-only metrics is overestimated.
    """
    if not isinstance(context, StudyContext):
        return math.nan
    config, examples = context.config.train, context.splits(0).train
    steps = total_steps(len(examples), config)
    passes = steps * config.batch_size * config.accumulation / len(examples)
    seen: float = passes * sum(example.length for example in examples)
    return profile.processed_tokens / seen
