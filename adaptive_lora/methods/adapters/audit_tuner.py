"""What is trained is exactly what the plan of another family names, and it has learned."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import nn

from adaptive_lora.allocation.architecture import Shape
from adaptive_lora.errors import AdapterError
from adaptive_lora.methods.adapters.head import head_problems, in_head

_WRAPPERS = re.compile(r"^(base_model\.model\.|base\.)")


def trained_tensors(adapted: nn.Module) -> dict[str, nn.Parameter]:
    """Return what is trainable by its name in the base; what PEFT or we wrap around is cut off."""
    return {
        _WRAPPERS.sub("", name): parameter for name, parameter in adapted.named_parameters() if parameter.requires_grad
    }


def audit_tuner(adapted: nn.Module, tensors: Mapping[str, Shape], head: Sequence[str] = ()) -> None:
    """Compare names and shapes of all that is trainable with the plan's, and its type.

    Raises:
        AdapterError: lists every difference.
    """
    found, problems = trained_tensors(adapted), head_problems(adapted, head)
    for name in sorted(found.keys() ^ tensors.keys()):
        if name in found and in_head(name, head):
            continue  # trained beside the plan
        problems.append(f"{name} is {'not planned' if name in found else 'not trainable'}")
    for name in found.keys() & tensors.keys():
        if tuple(found[name].shape) != tuple(tensors[name]):
            problems.append(f"{name}: shape is {tuple(found[name].shape)}, planned {tuple(tensors[name])}")
        if found[name].dtype != torch.float32:
            problems.append(f"{name}: type is {found[name].dtype}, required torch.float32")
    if problems:
        shown = sorted(problems)[:20]
        more = f" and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise AdapterError("the model differs from its plan: " + "; ".join(shown) + more)


def audit_tuner_moved(
    adapted: nn.Module, start: Mapping[str, torch.Tensor], must_move: Callable[[str], bool] = lambda name: False
) -> int:
    """Check that training changed the tensors; return how many it left as they were.

    Some may stay: weights that no loss reaches, such as an unused pooler.

    Args:
        adapted: trained model.
        start: name -> tensor before training.
        must_move: tells by its name whether a tensor that did not move is an error.

    Raises:
        AdapterError: nothing moved, or one that must did not.
    """
    now = trained_tensors(adapted)
    still = [n for n, before in start.items() if torch.equal(before.to(now[n]), now[n].detach())]
    stuck = [name for name in still if must_move(name)]
    if stuck or len(still) == len(start):
        names = stuck or still
        raise AdapterError(
            f"training did not move {len(names)} tensors ({', '.join(names[:4])}"
            f"{', ...' if len(names) > 4 else ''}): no gradient reached them."
        )
    return len(still)
