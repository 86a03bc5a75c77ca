"""The adapter on disk: PEFT's own folder, plus what is needed to find and check its base."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaptive_lora.adapter_serving import RECORD

if TYPE_CHECKING:
    from peft import PeftModel

    from adaptive_lora.allocation import RankPlan
    from adaptive_lora.models import BaseReference


def save_adapter(
    adapted: PeftModel,
    folder: Path,
    *,
    plan: RankPlan,
    base: BaseReference,
    dtype: str,
    template: Mapping[str, str],
) -> None:
    """Write an adapter folder that stock PEFT loads and `adapter_serving` serves.

    Args:
        adapted: the trained model.
        folder: made where missing.
        plan: written as `rank_plan.json`.
        base: reference and content hash of the base.
        dtype: of the base's weights in training, such as `float32`.
        template: prompt template for serving.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = adapted.peft_config["default"]
    config.base_model_name_or_path = base.name
    config.revision = base.revision
    # Embeddings are never trained here; looking for resized ones would ask the hub for the base.
    adapted.save_pretrained(str(folder), save_embedding_layers=False)
    record: dict[str, Any] = {"base": base.to_dict(), "dtype": dtype, "template": dict(template)}
    (folder / RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")
    (folder / "rank_plan.json").write_text(plan.to_json(), encoding="utf-8")
