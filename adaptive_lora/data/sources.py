"""Where examples come from: the embedded generator, local files and hub sets through `datasets`."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from adaptive_lora.adapter_serving import render
from adaptive_lora.config import DataConfig
from adaptive_lora.data.examples import Example, ExampleSet, content_id
from adaptive_lora.data.templates import load_template
from adaptive_lora.errors import DataError
from adaptive_lora.seeding import rng_for

_FORMATS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
_KNOWN_COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("instruction", "input", "output"),  # Alpaca
    ("instruction", "context", "response"),  # Dolly
    ("question", "context", "answer"),  # GSM8K
)
EMBEDDED_EXAMPLES = 900
"""How many examples the embedded generator makes where max_examples is not given."""


def load_examples(config: DataConfig) -> ExampleSet:
    """Return the examples of a data configuration with prompts rendered.

    Raises:
        DataError: unreadable file (with line), missing columns, empty text, nothing left.
    """
    if config.data == "embedded":
        from adaptive_lora.embedded import task_examples

        count = config.max_examples or EMBEDDED_EXAMPLES
        rows: Sequence[Mapping[str, Any]] = task_examples(count, config.split_seed)
        name, unit = "embedded", "example"
    else:
        rows, name, unit = _read(config)
    prompt, context, response = _columns(config, rows, name)
    template = load_template(_template_name(config, (prompt, context, response)))
    examples = _build(rows, (prompt, context, response), template, name, unit)
    if config.max_examples is not None and config.max_examples < len(examples):
        chosen = rng_for(config.split_seed, "subset").choice(
            len(examples), config.max_examples, replace=False
        )
        examples = tuple(examples[index] for index in sorted(chosen))
    return ExampleSet(examples=examples, template=template, source=name)


def _template_name(config: DataConfig, columns: tuple[str, str | None, str]) -> str:
    if config.template != "auto":
        return config.template
    if config.data == "embedded":
        return "compact"
    known = {(prompt, response) for prompt, _, response in _KNOWN_COLUMNS}
    return "alpaca" if (columns[0], columns[2]) in known else "plain"


def _read(config: DataConfig) -> tuple[Sequence[Mapping[str, Any]], str, str]:
    path = Path(config.data).expanduser()
    kind = _FORMATS.get(path.suffix.lower())
    if kind is not None or path.is_file():
        return _read_file(path, kind), path.name, "row" if kind != "json" else "item"
    return _read_hub(config), config.data, "row"


def _read_file(path: Path, kind: str | None) -> Sequence[Mapping[str, Any]]:
    import datasets

    if not path.is_file():
        raise DataError(f"data file {path} does not exist; check the path.")
    if kind is None:
        raise DataError(
            f"data file {path}: required one of {', '.join(_FORMATS)}; got '{path.suffix}'."
        )
    if path.stat().st_size == 0:
        raise DataError(f"data file {path} is empty; required at least a few examples.")
    problem = {"json": _json_problem, "csv": _csv_problem}.get(kind, lambda _: None)(path)
    if problem:
        raise DataError(f"data file {path}: {problem}")
    options: dict[str, Any] = {"sep": "\t"} if path.suffix.lower() == ".tsv" else {}
    if kind == "csv":
        options["keep_default_na"] = False  # the text "NA" is text
    datasets.disable_progress_bars()
    try:
        return list(datasets.load_dataset(kind, data_files=str(path), split="train", **options))
    except Exception as error:  # datasets wraps every reader's own error type
        cause = error.__cause__ or error
        raise DataError(f"data file {path} cannot be read as {kind}: {cause}") from error


def _json_problem(path: Path) -> str | None:
    """Find what is wrong with a JSON or JSONL file, with its line; None where nothing is."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        return f"required UTF-8 text; byte {error.start} is not."
    if path.suffix.lower() == ".json" and text.lstrip().startswith("["):
        try:
            items = json.loads(text)
        except json.JSONDecodeError as error:
            return f"line {error.lineno}, column {error.colno}: not JSON ({error.msg})."
        bad = next((i for i, item in enumerate(items) if not isinstance(item, dict)), None)
        return None if bad is None else f"item {bad}: required an object with columns."
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            try:
                if not isinstance(json.loads(line), dict):
                    return f"line {number}: required one JSON object a line."
            except json.JSONDecodeError as error:
                return f"line {number}, column {error.colno}: not JSON ({error.msg})."
    return None


def _csv_problem(path: Path) -> str | None:
    """Find the first row of a CSV or TSV file with more or fewer fields than the header."""
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter=delimiter)
            width = len(next(reader))
            for row in reader:
                if row and len(row) != width:
                    return f"line {reader.line_num}: required {width} fields, got {len(row)}."
    except UnicodeDecodeError as error:
        return f"required UTF-8 text; byte {error.start} is not."
    except csv.Error as error:
        return f"line {reader.line_num}: {error}."
    return None


def _read_hub(config: DataConfig) -> Sequence[Mapping[str, Any]]:
    """Read a hub data set, or a local folder laid out like one."""
    import datasets

    datasets.disable_progress_bars()
    try:
        return list(
            datasets.load_dataset(
                str(Path(config.data).expanduser()) if Path(config.data).is_dir() else config.data,
                split=config.data_split,
                revision=config.data_revision,
            )
        )
    except Exception as error:  # datasets and the hub raise a dozen unrelated types
        raise DataError(
            f"data '{config.data}' is neither a local file nor reachable on the hub "
            f"({type(error).__name__}: {str(error).splitlines()[0]}); give a file "
            f"({', '.join(_FORMATS)}), a hub data set id, or 'embedded'."
        ) from error


def _columns(
    config: DataConfig, rows: Sequence[Mapping[str, Any]], name: str
) -> tuple[str, str | None, str]:
    """Decide which columns are instruction, input and response."""
    if not rows:
        raise DataError(f"{name} has no examples; required at least a few.")
    have = set(rows[0])
    wanted = (config.prompt_column, config.input_column, config.response_column)
    missing = [column for column in wanted if column is not None and column not in have]
    known = next((c for c in _KNOWN_COLUMNS if {c[0], c[2]} <= have), (None, None, None))
    prompt, response = wanted[0] or known[0], wanted[2] or known[2]
    if missing or prompt is None or response is None:
        lacking = f"missing {', '.join(missing)}; " if missing else ""
        raise DataError(
            f"{name}: {lacking}required Alpaca columns (instruction, input, output), Dolly columns "
            "(instruction, context, response), GSM8K's (question, answer), or --prompt-column and "
            "--response-column; "
            f"found {', '.join(sorted(have))}."
        )
    context = wanted[1] or (known[1] if known[1] in have else None)
    return prompt, context, response


def _build(
    rows: Iterable[Mapping[str, Any]],
    columns: tuple[str, str | None, str],
    template: Mapping[str, str],
    name: str,
    unit: str,
) -> tuple[Example, ...]:
    seen: dict[str, int] = {}
    examples = []
    for index, row in enumerate(rows):
        where = f"{name} {unit} {index}"
        texts = [_text(row, column, where) for column in columns]
        for column, text in ((columns[0], texts[0]), (columns[2], texts[2])):
            if not text.strip():
                raise DataError(f"{where}: column '{column}' is empty; fill it or drop the row.")
        prompt = render(template, texts[0], texts[1])
        examples.append(
            Example(
                id=content_id(prompt, texts[2], seen), prompt=prompt, response=texts[2], where=where
            )
        )
    return tuple(examples)


def _text(row: Mapping[str, Any], column: str | None, where: str) -> str:
    value = "" if column is None else row.get(column)
    if value is None:
        return ""
    if isinstance(value, str | int | float):
        return str(value)
    raise DataError(f"{where}: column '{column}' must be text, got {type(value).__name__}.")
