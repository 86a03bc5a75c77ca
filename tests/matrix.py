"""What is supported: every method on every task, held by `test_matrix.py`; in docs/methods.md.

`python tests/matrix.py` prints the table for docs/methods.md.
"""

from __future__ import annotations

from collections.abc import Mapping

from adaptive_lora.allocation import METHODS as KNOWN

_SPECIFIED: Mapping[str, str] = {
    "uniform": "uniform:rank=2",
    "uniform, DoRA": "uniform:rank=2,dora=true",
    "uniform, rsLoRA": "uniform:rank=2,scaling=rslora",
    "uniform, LoRA+": "uniform:rank=2,lora_plus=4",
    "uniform, PiSSA": "uniform:rank=2,init=pissa",
    "uniform, CorDA": "uniform:rank=2,init=corda",
    "uniform, LoRA-GA": "uniform:rank=2,init=lora_ga",
    "uniform, LoRA-FA": "uniform:rank=2,lora_fa=true",
    "uniform, attention only": "uniform:rank=2,placement=attention",
    "uniform, feed-forward only": "uniform:rank=2,placement=feed_forward",
    "uniform, 4-bit base (QLoRA)": "uniform:rank=2,base=nf4",
    "linear_decay": "linear_decay:rank=3,low_rank=1",
    "attention_heavy": "attention_heavy:rank=3,feed_forward_rank=1",
    "three_band": "three_band:rank=4",
    "planted": "planted:rank=2",
    "given": "given:ranks=*=2",
    "empirical": "empirical:rank=2",
    "proportional": "proportional:rank=2",
    "waterfill": "waterfill:rank=2",
    "family_uniform": "family_uniform:rank=2",
    "random": "random:of=linear_decay,rank=4,low_rank=1",
    "inverse": "inverse:of=empirical,rank=1",
    "lr_only": "lr_only:of=empirical,rank=1",
    "adalora": "adalora:rank=1",
    "adalora, 4-bit base": "adalora:rank=1,base=nf4",
    "grow_prune": "grow_prune:rank=1",
    "eva": "eva:rank=2",
    "gora": "gora:rank=4",
    "truncate": "truncate:rank=1",
    "truncate_retrain": "truncate_retrain:rank=1",
    "nuclear_retrain": "nuclear_retrain:rank=1,rounds=1",
    "single_site": "single_site:rank=1,candidates=2",
    "prompt_tuning": "prompt_tuning:tokens=3",
    "prefix_tuning": "prefix_tuning:tokens=3",
    "p_tuning": "p_tuning:tokens=3,encoder_width=4",
    "ia3": "ia3",
    "houlsby": "houlsby:width=2",
    "pfeiffer": "pfeiffer:width=2",
    "full": "full",
    "bitfit": "bitfit",
    "ln_tuning": "ln_tuning",
    "head_only": "head_only",
}
"""Name in the table -> a small specification of it, where rank 2 alone is not one."""
METHODS: Mapping[str, str] = _SPECIFIED | {
    name: f"{name}:rank=2" if "rank" in kind.__dataclass_fields__ else name
    for name, kind in KNOWN.items()
    if name not in _SPECIFIED
}
"""Name in the table -> a small specification of it; every method of the catalogue is there."""

_SOFT = ("prompt_tuning", "prefix_tuning", "p_tuning")
_NOT_CAUSAL = (
    "classification", "regression", "token_classification", "seq2seq", "image_classification", "image_text",
    "vision_language", "speech_to_text",
)  # fmt: skip
REFUSED: Mapping[tuple[str, str], str] = {
    **{(method, task): "takes no virtual tokens" for method in _SOFT for task in _NOT_CAUSAL},
    ("bitfit", "seq2seq"): "no bias terms",
    ("head_only", "image_text"): "no output head",
}
"""(method, task) -> words of the error with which it is refused; all others work."""


def table(tasks: tuple[str, ...]) -> str:
    """Return the table of what is supported as Markdown."""
    lines = [f"| method | {' | '.join(task.replace('_', ' ') for task in tasks)} |", f"|---|{'---|' * len(tasks)}"]
    for method in METHODS:
        cells = ["–" if (method, task) in REFUSED else "✓" for task in tasks]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    from task_studies import TASKS

    print(table(TASKS))
