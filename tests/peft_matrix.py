"""Which types of adapters of PEFT stand on which tasks and bases, held by `test_peft_types.py`; in docs/peft_types.md.

`python tests/peft_matrix.py` prints the table for docs/peft_types.md.
"""

from __future__ import annotations

from adaptive_lora.methods.peft_types.table import REFUSED, TYPES

SMALL = {
    "BOFT": "boft_block_size=4", "C3A": "block_size=8", "FOURIERFT": "n_frequency=30", "FROD": "sparse_rate=0.05",
    "GRALORA": "r=4", "MISS": "r=4", "OFT": "oft_block_size=8", "OSF": "effective_rank=12", "ROAD": "group_size=8",
    "SUPERTUNING": "sparsity=0.9", "TINYLORA": "u=8", "UNILORA": "theta_d_length=64",
    "VBLORA": "num_vectors=8,vector_length=16", "WAVEFT": "n_frequency=30", "BEFT": "",
}  # fmt: skip
"""Type -> options of a small adapter, where `r=2` is not one."""
OFF_THE_BASE = {"C3A", "FOURIERFT", "UNILORA", "VBLORA"}
"""Types that change the base's function before any training, at PEFT's defaults."""
NO_CONV1D = {
    "BEFT", "BOFT", "C3A", "DELORA", "GLORA", "HRA", "LILY", "LOHA", "LOKR", "MISS", "OFT", "OSF", "PEANUT", "PSOFT",
    "ROAD", "SHIRA", "SUPERTUNING",
}  # fmt: skip
"""Types that PEFT 0.21.2 does not build on GPT-2's Conv1D."""
CONVERTED = {
    "C3A", "DELORA", "FOURIERFT", "GRALORA", "LOHA", "LOKR", "MISS", "PSOFT", "RANDLORA", "TINYLORA", "UNILORA",
    "VBLORA", "VERA", "WAVEFT",
}  # fmt: skip
"""Types whose update is a matrix that PEFT converts to LoRA."""
UNMERGED = {"LILY", "BEFT"}
"""Types that PEFT does not merge into a base without biases."""
EVERY_START = " ".join(
    f"uniform:rank=2,{option}"
    for option in (
        "init=pissa", "init=olora", "init=corda", "init=lora_ga", "init=eva", "init=orthogonal", "lora_fa=true",
        "alora=###", "init=loftq,base=nf4",
    )
)  # fmt: skip
"""Methods with every kind of initial weights, a frozen A and an invocation; loftq needs a base of width 64."""
COLUMNS = {
    "causal": "causal, GPT-2",
    "llama": "causal, Llama",
    "classification": "classification, BERT",
    "regression": "regression, BERT",
    "token_classification": "tags, BERT",
    "seq2seq": "seq2seq, T5",
    "image_classification": "images, ViT",
    "image_text": "image and text, CLIP",
    "vision_language": "vision language, LLaVA",
    "speech_to_text": "speech, Whisper",
}
"""Task, or `llama` for another base of the first one -> heading of its column."""


def spec_of(kind: str) -> str:
    """Return the specification of a small adapter of a type."""
    return ",".join(filter(None, [f"peft:type={kind}", SMALL.get(kind, "r=2")]))


def works(kind: str, column: str) -> bool:
    """Return whether a type stands on a column's base."""
    return column != "causal" or kind not in NO_CONV1D


def table() -> str:
    """Return the table as Markdown."""
    heads = [
        "type",
        "size",
        *COLUMNS.values(),
        "starts as the base",
        "size per site",
        "`base=nf4`",
        "`--merged`",
        "`--uniform`",
    ]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for kind, facts in TYPES.items():
        marks = [works(kind, column) for column in COLUMNS]
        marks += [kind not in OFF_THE_BASE, bool(facts.pattern), facts.packed, kind not in UNMERGED, kind in CONVERTED]
        size = f"`{facts.size}`" if facts.size else "none"
        lines.append(f"| {kind} | {size} | {' | '.join('✓' if mark else '–' for mark in marks)} |")
    return "\n".join(lines)


def refused() -> str:
    """Return the types that are not supported, with their reasons, as a Markdown list."""
    return "\n".join(f"- {kind}: {reason}" for kind, reason in REFUSED.items())


if __name__ == "__main__":
    print(f"{table()}\n\n{refused()}")
