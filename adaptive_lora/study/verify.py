"""Proof that a logged adapter, loaded back, equals the one that was trained and tested."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from safetensors.torch import load_file

from adaptive_lora.errors import AdapterError
from adaptive_lora.models.errors import is_bug
from adaptive_lora.results import TrialRecord
from adaptive_lora.serving import load_adapter
from adaptive_lora.study.context import StudyContext
from adaptive_lora.study.trial import PROBE, probe_logits
from adaptive_lora.tracking.registry import adapter_folder, require_own_code

"""Precision -> maximum relative difference: none in fp32, one unit in the last place in lower precision."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Proof:
    """Differences between the trained and the reloaded adapter."""

    max_logit_difference: float
    """Maximum absolute difference over the probe's logits."""
    max_loss_difference: float
    """Maximum absolute difference of a test example's summed negative log-likelihood, in nats."""
    test_loss: float
    """Test loss of the reloaded adapter, in nats per supervised token."""


def prove(context: StudyContext, record: TrialRecord, model_uri: str) -> Proof:
    """Load an adapter as in serving, and compare logits and test loss with the trial's.

    Args:
        context: base and test split of the study.
        record: record of the trial, read from the tracking store.
        model_uri: URI of the trial's MLflow model.

    Raises:
        AdapterError: the base differs, or outputs differ by more than the precision's tolerance.
    """
    assert record.test is not None
    try:
        require_own_code(model_uri)  # so that the loaded code is the served code
        folder = adapter_folder(model_uri)
        trust = context.base.reference.trust_remote_code
        model, _, _ = load_adapter(folder, trust_remote_code=trust)
        trained = load_file(folder / PROBE)["logits"]
    except Exception as error:  # PEFT, transformers and safetensors raise their own types
        if is_bug(error):
            raise
        raise AdapterError(
            f"the adapter of run {record.run_id} cannot be loaded back ({error}). It was not registered."
        ) from error
    again = context.losses(model, context.splits(record.fold).test)
    logits = probe_logits(context, model, record.fold)
    proof = Proof(
        max_logit_difference=float((logits - trained).abs().max()),
        max_loss_difference=float(np.abs(again.nll_E - record.test.nll_E).max()),
        test_loss=again.loss,
    )
    limit = context.runtime.precision.rounding
    scale = float(trained.abs().max())
    if again.example_ids != record.test.example_ids or not (
        proof.max_logit_difference <= limit * scale
        and proof.max_loss_difference <= limit * float(record.test.nll_E.max())
    ):
        raise AdapterError(
            f"the adapter of run {record.run_id} does not reload as it was trained: logits differ "
            f"by up to {proof.max_logit_difference:.3g}, test losses by "
            f"{proof.max_loss_difference:.3g} nats (allowed in {context.runtime.precision}: "
            f"{limit:.3g} relative, on the machine that trained it). It was not registered."
        )
    del model
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return proof
