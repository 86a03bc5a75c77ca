"""Refusals to continue a study whose base, data, version or plan of looks is not that of its beginning."""

from __future__ import annotations

from adaptive_lora import __version__
from adaptive_lora.analysis.comparison import SeedPlan
from adaptive_lora.config import StudyConfig
from adaptive_lora.config.planted import PlantedTeacher
from adaptive_lora.config.study import SIGNATURE_VERSION
from adaptive_lora.data.token_cache import asks_for_the_time
from adaptive_lora.errors import ConfigError, DataError, ModelError
from adaptive_lora.runner.context import StudyContext
from adaptive_lora.runner.recorded import recorded_plan, study_settings
from adaptive_lora.tracking import Store, StudyRun
from adaptive_lora.tracking.runs import STUDY_ID, TOKENS


def refuse_changed(context: StudyContext, store: Store) -> None:
    """Refuse a study whose base, data or rendered text changed under the same name since it began.

    Otherwise its finished trials would silently be ignored, and a new study begun under their name.

    Raises:
        DataError, ModelError: data or base changed; the message has both digests.
        ConfigError: the study began before identities included the text, so that a change cannot be
            detected.
    """
    earlier = StudyRun.of_study_key(store, context.study_key)
    if not earlier or any(run.data.tags[STUDY_ID] == context.study_id for run in earlier):
        return
    tags, reference = earlier[0].data.tags, context.base.reference
    way = (
        f"since study {tags[STUDY_ID]} began. Restore it to continue that study, or begin a new "
        "one with another name: --study NAME."
    )
    if not context.base.is_recorded_as(tags["base_hash"]):
        raise ModelError(
            f"base {reference.name} changed (SHA-256 {tags['base_hash'][:16]} then, "
            f"{reference.content_hash[:16]} now) {way}"
        )
    data = context.config.data.data
    if tags["data_digest"] != context.data.digest:
        changed = f"data {data} changed (digest {tags['data_digest']} then, {context.data.digest} now)"
        raise DataError(f"{changed}{_why_other_teacher(data)} {way}")
    if TOKENS not in tags or tags["base_hash"] != reference.content_hash:
        version = tags.get("provenance.adaptive_lora", "0.1")
        raise ConfigError(
            f"study {tags[STUDY_ID]} was begun by adaptive-lora {version} before the identity of a "
            f"trial included chat template and token ids. This is {__version__}, which does not "
            "continue it: begin a new study, --study NAME."
        )
    raise DataError(
        f"the token ids or loss masks of data {data} changed (digest {tags[TOKENS]} "
        f"then, {context.tokens_digest} now){_why_other_tokens(context)} {way}"
    )


def _why_other_teacher(data: str) -> str:
    """Return a possible reason for another planted teacher under the same name, for a message."""
    if PlantedTeacher.parse(data) is None or "min_rank=" in data:
        return ""
    return ", perhaps because a teacher that does not name min_rank has 0 now and had 1 before,"


def _why_other_tokens(context: StudyContext) -> str:
    """Return possible reasons for other tokens of the same data on the same base, for a message."""
    if asks_for_the_time(context.base.tokenizer):
        return ", because the base's chat template writes the date or time,"
    versions = "by another version of transformers or of adaptive-lora"
    if context.data.test is not None:
        return f", {versions}, or because examples moved between data and test data,"
    return f", {versions},"


def refuse_earlier(context: StudyContext, store: Store) -> None:
    """Refuse to continue a study of version 0.1, whose trials had another scaling by default.

    Raises:
        ConfigError: it is such a study; the message has both versions and policies.
    """
    if StudyRun.of_study_key(store, context.study_key):
        return  # restarted by this version
    for study_key in context.earlier_study_keys():
        for run in StudyRun.of_study_key(store, study_key):
            tags, name = run.data.tags, run.data.tags[STUDY_ID]
            version = tags.get("provenance.adaptive_lora", "0.1")
            settings = study_settings(StudyRun.find(store, name))
            raise ConfigError(
                f"study {name} was begun by adaptive-lora {version} with scaling "
                f"{settings.get('scaling', 'constant')} (trial signatures of version 2). This is "
                f"{__version__} with scaling {context.config.train.scaling} (version "
                f"{SIGNATURE_VERSION}), which does not continue it. Begin a new study: --study "
                f"NAME, with --scaling constant for the earlier default. What is stored can be "
                f"compared: `adaptive-lora compare --study-id {name}`."
            )


def require_plan(config: StudyConfig, study: StudyRun) -> None:
    """Refuse a study whose seeds are not those of the looks that it has had: its error rate would not hold.

    Raises:
        ConfigError: the looks recorded are not of this plan, or there was a comparison before any plan.
    """
    recorded = recorded_plan(study)
    way = "Give those settings to continue it, or begin a new study with another name: --study NAME."
    if recorded is None:
        if config.until == "decided" and "verdict" in study.recorded().data.tags:
            raise ConfigError(
                f"until: study {study.study_id} was compared before it had a plan of looks, so that its error rate "
                "cannot be held. Begin a new study with another name: --study NAME."
            )
        return
    looks = config.seeds_by_look()
    if config.until != "decided":
        raise ConfigError(
            f"study {study.study_id} goes on until it is decided (--until decided, {_plan_text(recorded)}). {way}"
        )
    if (recorded.most, *recorded.added) != (config.max_seeds, *looks[: len(recorded.added)]):
        raise ConfigError(
            f"until: study {study.study_id} has the plan {_plan_text(recorded)}, and its error rate holds for that one "
            f"alone; got {_plan_text(SeedPlan(most=config.max_seeds, added=looks))}. {way}"
        )


def _plan_text(plan: SeedPlan) -> str:
    return f"looks at {', '.join(map(str, plan.counts))} seeds, max_seeds {plan.most}"
