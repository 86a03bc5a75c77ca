"""The adapter on disk: a folder in PEFT's or the custom tuners' format, with a reference to its base."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Template

from adaptive_lora.allocation import Plan, TunerPlan
from adaptive_lora.methods.adapters.tuners import save_custom_tuner
from adaptive_lora.serving import CAUSAL, RECORD, TASKS
from adaptive_lora.serving.custom_tuner import AdaptedModel

if TYPE_CHECKING:
    from peft import PeftModel

    from adaptive_lora.models.base import BaseReference


def save_adapter(
    adapted: PeftModel | AdaptedModel,
    folder: Path,
    *,
    plan: Plan,
    base: BaseReference,
    dtype: str,
    template: Mapping[str, str],
    task: Mapping[str, Any] = CAUSAL,
    quantisation: Mapping[str, Any] | None = None,
) -> None:
    """Write an adapter folder that `adapter_serving` serves; stock PEFT loads it if it is PEFT's.

    Args:
        adapted: the trained model.
        folder: folder to write to; created if missing.
        plan: plan of the adapter, written as `rank_plan.json`.
        base: reference and content hash of the base.
        dtype: type of the base's weights in training, such as `float32`.
        template: prompt template for serving.
        task: record of the task.
        quantisation: record of a quantised base; its content hash is that of the weights before quantisation.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if isinstance(adapted, AdaptedModel):
        assert isinstance(plan, TunerPlan)
        save_custom_tuner(adapted, folder, plan)
    else:
        config = adapted.peft_config["default"]
        config.base_model_name_or_path = base.name
        config.revision = base.revision
        # Embeddings are never trained here; PEFT's check for resized ones would download the base.
        adapted.save_pretrained(str(folder), save_embedding_layers=False)
    record: dict[str, Any] = {
        "base": base.to_dict(),
        "dtype": dtype,
        "template": dict(template),
        "task": dict(task),
        **({} if quantisation is None else {"quantisation": dict(quantisation)}),
    }
    (folder / RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")
    (folder / "rank_plan.json").write_text(plan.to_json(), encoding="utf-8")
    origin, ranks = {**record, "method": plan.method}, list[int]()
    if isinstance(plan, TunerPlan):
        origin["family"] = plan.family
    else:
        ranks += plan.rank_pattern().values()
    write_card(folder, "trained", origin, ranks=ranks)  # PEFT's own is an empty template


def write_card(folder: Path, kind: str, origin: Mapping[str, Any], **values: Any) -> None:
    """Write the README of an adapter or merged model.

    Args:
        folder: folder to write to.
        kind: `trained`, `uniform` or `merged`.
        origin: record of the adapter, with its method and family where known.
        values: `ranks` as trained, the `rank` of a uniform one, and whether a merged one was `dora`.
    """
    source = Path(__file__).with_name("model_card.md.jinja").read_text(encoding="utf-8")
    template = Template(source, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    text = template.render(
        kind=kind,
        origin=origin,
        auto_class=TASKS[origin.get("task", CAUSAL)["name"]].auto_class,
        gguf_file=repr(Path(origin["base"]["name"]).name),
        **values,
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
