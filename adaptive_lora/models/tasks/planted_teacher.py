"""The teacher: the base with a planted low-rank change, and the text that it writes."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch.nn import functional
from transformers import GenerationConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from adaptive_lora.allocation.site import AdapterSite
from adaptive_lora.data import Batch, TokenizedExample
from adaptive_lora.errors import ModelError
from adaptive_lora.models.losses import Predictions, predict
from adaptive_lora.results import FloatArray
from adaptive_lora.seeding import rng_for, torch_stream

_BISECTIONS, _LARGEST_SCALE, _PRECISION = 40, 16.0, 0.01
_TEXTS_TOGETHER = 64


def planted_energy(spectrum: str, rank: int, full: int) -> FloatArray:
    """Return the squared singular values of a site's change, scaled so that they add up to its rank.

    Args:
        spectrum: one of `SPECTRA`.
        rank: planted rank.
        full: largest possible rank.
    """
    squares = np.ones(rank)
    if spectrum == "power_law":
        squares = np.arange(1, rank + 1, dtype=np.float64) ** -1.0
    elif spectrum == "noisy":
        squares = np.concatenate([squares, np.full(full - rank, 0.1 * rank / max(full - rank, 1))])
    scaled: FloatArray = squares * (rank / squares.sum())
    return scaled


def planted_changes(
    model: PreTrainedModel, sites: Sequence[AdapterSite], ranks: Mapping[str, int], spectrum: str, seed: int
) -> dict[str, torch.Tensor]:
    """Return site name -> change of its weight, (out, in), before the common scale.

    Singular vectors are random (Haar, by QR of Gaussian matrices) from a stream of the seed and the
    site's name. A site's energy is its planted rank times the mean squared singular value of its
    weight, so that one planted rank weighs the same against every weight.
    """
    modules = dict(model.named_modules())
    changes = {}
    for site in sites:
        rng = rng_for(seed, "planted", site.name)
        energy = planted_energy(spectrum, ranks[site.name], site.max_rank)
        left = np.linalg.qr(rng.standard_normal((site.out_features, energy.size)))[0]
        right = np.linalg.qr(rng.standard_normal((site.in_features, energy.size)))[0]
        unit = float(modules[site.name].weight.detach().float().norm()) / math.sqrt(site.max_rank)
        changes[site.name] = torch.from_numpy((left * np.sqrt(energy) * unit) @ right.T).float()
    return changes


def make_teacher(
    base: PreTrainedModel,
    sites: Sequence[AdapterSite],
    changes: Mapping[str, torch.Tensor],
    batch: Batch,
    distance: float,
) -> tuple[PreTrainedModel, float]:
    """Return a copy of the base with the changes added at the scale that gives a distance.

    Args:
        base: is left as it is.
        sites: where the changes belong.
        changes: of each site's weight, (out, in).
        batch: text on which the distance is measured.
        distance: KL(teacher || base) in nats per token.

    Returns:
        The teacher and the scale.

    Raises:
        ModelError: no scale gives the distance.
    """
    teacher = copy.deepcopy(base).eval()
    modules = dict(teacher.named_modules())
    before = {site.name: modules[site.name].weight.detach().clone() for site in sites}
    with torch.no_grad():
        student = predict(base, batch)
    low, high = 0.0, _LARGEST_SCALE
    for _ in range(_BISECTIONS):
        scale = (low + high) / 2
        with torch.no_grad():
            for name, weight in before.items():
                change = changes[name].T if isinstance(modules[name], Conv1D) else changes[name]
                modules[name].weight.copy_(weight + scale * change.to(weight))
            found = float(token_kl(predict(teacher, batch), student).sum())
        found /= batch.supervised_tokens
        if math.isclose(found, distance, rel_tol=_PRECISION):
            return teacher, scale
        low, high = (scale, high) if found < distance else (low, scale)
    raise ModelError(
        f"no scale of the planted change up to {_LARGEST_SCALE:g} gives a distance of "
        f"{distance:g} nats per token (last {found:.3g}); choose a smaller distance."
    )


def token_kl(teacher: Predictions, student: Predictions) -> torch.Tensor:
    """Return KL(teacher || student) in nats at every position, (B, K); 0 where not supervised."""
    kl = functional.kl_div(
        functional.log_softmax(student.logits, dim=-1),
        functional.log_softmax(teacher.logits, dim=-1),
        reduction="none",
        log_target=True,
    ).sum(dim=-1)
    return torch.where(student.supervised, kl, torch.zeros_like(kl))


def written_by(
    model: PreTrainedModel, *, count: int, length: int, start: int, seed: int, purpose: str
) -> tuple[TokenizedExample, ...]:
    """Let a model write texts: sampled at temperature 1 from its start token.

    Args:
        model: who writes.
        count: how many texts.
        length: tokens each, the start token not counted; the end of a text does not stop it.
        start: id of the start (end-of-text) token.
        seed: of the sampling, with `purpose`.
        purpose: part of the texts' names and of the random stream.
    """
    config = GenerationConfig(
        do_sample=True,
        top_k=0,
        max_new_tokens=length,
        pad_token_id=start,
        eos_token_id=model.config.vocab_size,  # no token has this id: texts do not stop early
    )
    rows: list[list[int]] = []
    with torch_stream(seed, "planted text", purpose), torch.no_grad():
        for begin in range(0, count, _TEXTS_TOGETHER):
            ids = torch.full((min(_TEXTS_TOGETHER, count - begin), 1), start, dtype=torch.long, device=model.device)
            rows += model.generate(  # type: ignore[operator]
                inputs=ids, attention_mask=torch.ones_like(ids), generation_config=config
            ).tolist()
    return tuple(
        TokenizedExample(id=f"{purpose}-{index}", input_ids=tuple(row), first_label=1, prompt_length=1, response="")
        for index, row in enumerate(rows)
    )
