"""Audits of tuners other than LoRA: the trainable tensors are those of the plan, and training has changed them."""

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
    """Return name in the base -> trainable tensor; prefixes and suffixes added by wrappers are removed."""
    return {
        _WRAPPERS.sub("", name): parameter for name, parameter in adapted.named_parameters() if parameter.requires_grad
    }


def audit_tuner(adapted: nn.Module, tensors: Mapping[str, Shape], head: Sequence[str] = ()) -> None:
    """Compare names, shapes and types of all trainable tensors with the plan.

    Raises:
        AdapterError: there are differences; the message lists all of them.
    """
    found, problems = trained_tensors(adapted), head_problems(adapted, head)
    for name in sorted(found.keys() ^ tensors.keys()):
        if name in found and in_head(name, head):
            continue  # trained in addition to the plan
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
    """Check that training changed the tensors; return the number of unchanged ones.

    Some may be unchanged: weights without gradient, such as an unused pooler.

    Args:
        adapted: trained model.
        start: name -> tensor before training.
        must_move: function from a tensor's name to whether it must change.

    Raises:
        AdapterError: no tensor changed, or one that must change did not.
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
