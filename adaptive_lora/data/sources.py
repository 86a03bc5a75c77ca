"""Examples of prompts and responses, from the embedded generator, local files and hub data sets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from adaptive_lora.config import DataConfig
from adaptive_lora.data.conversations import CHAT, CONVERSATIONS, PLAIN, TEXT, Conversations, plain_text
from adaptive_lora.data.examples import Example, ExampleSet, content_id
from adaptive_lora.data.reading import Table, read_table, separate_test
from adaptive_lora.data.rows import BadRow, Reading, left_out, refuse_unread, required_text, text_of, unused_columns
from adaptive_lora.data.templates import load_template
from adaptive_lora.errors import ConfigError, DataError, installed
from adaptive_lora.serving import render

Columns = tuple[tuple[str, str | None, str], ...]
"""Column names: instruction or input, optional context, response."""
_KNOWN_COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("instruction", "input", "output"),  # Alpaca
    ("instruction", "context", "response"),  # Dolly
    ("question", "context", "answer"),  # GSM8K
)
LABELS = ("label", "labels", "class", "target", "score")
"""Names of columns with classes or numbers to predict."""
EMBEDDED_EXAMPLES = 900
"""Number of examples from the embedded generator where max_examples is not given."""
_CHOSEN = ("prompt_column", "input_column", "response_column", "image_column", "audio_column", "language")


@dataclass(frozen=True, kw_only=True, slots=True)
class Reader:
    """Converter of a table's rows to examples."""

    example: Callable[[int], Example]
    """Function from row index to example; raises BadRow for a row without one."""
    columns: Mapping[str, str]
    """Column -> its use."""
    template: Mapping[str, str] = field(default_factory=dict)
    template_name: str = "none"
    options: tuple[str, ...] = ()
    """Names of the column and template options that take effect."""
    notes: Callable[[], list[str]] = list
    """Function that returns remarks for the user after the rows were read."""


def load_examples(config: DataConfig, *, known: Columns = ()) -> ExampleSet:
    """Return the examples of a data configuration with prompts rendered.

    Args:
        config: source, columns and template of the data.
        known: column names to recognise besides the usual ones.

    Raises:
        DataError: the file cannot be read (with line), a column is missing, a text is empty, or no row is left.
        ConfigError: the table has labels, so that the task cannot be determined automatically.
    """
    table = _embedded(config) if config.data == "embedded" else read_table(config)
    test = separate_test(config)
    return example_set(
        config, table, reader_of(config, table, known), test=None if test is None else load_examples(test, known=known)
    )


def example_set(
    config: DataConfig, table: Table, reader: Reader, *, labels: tuple[str, ...] = (), test: ExampleSet | None = None
) -> ExampleSet:
    """Read the chosen rows of a table; bad rows are refused or left out.

    Args:
        config: data settings, including the handling of bad rows.
        table: table of the rows.
        reader: converter of rows to examples.
        labels: names of the classes, for tasks that have them.
        test: the test split, where it has a separate source.

    Raises:
        DataError: there are bad rows, of which up to 20 are named, or no row is left.
    """
    bad: list[BadRow] = []

    def usable() -> Iterator[Example]:
        for index in table.chosen:
            try:
                yield reader.example(index)
            except BadRow as row:
                bad.append(row)

    examples = _kept(usable())
    lost = left_out(bad, config, table.name)
    if not examples:
        raise DataError(f"{table.name}: every row is left out: {bad[0].reason}")
    reading = Reading(
        source=table.name,
        rows=len(table.rows),
        drawn=len(table.chosen) + len(table.left_out),
        columns=reader.columns,
        unused=unused_columns(table.columns, reader.columns),
        left_out=(*table.left_out, *lost),
        notes=(*table.notes, *_unread_options(config, reader), *reader.notes()),
    )
    return ExampleSet(
        examples=examples,
        template=reader.template,
        template_name=reader.template_name,
        source=table.name,
        readings=(reading, *(() if test is None else test.readings)),
        labels=labels,
        test=None if test is None else test.examples,
    )


def _kept(examples: Iterable[Example]) -> Sequence[Example]:
    """Return the examples, in a file where there is pyarrow, else in memory."""
    if not installed("pyarrow"):
        return tuple(examples)
    from adaptive_lora.data.example_columns import StoredExamples

    return StoredExamples(examples)


def _unread_options(config: DataConfig, reader: Reader) -> list[str]:
    given = [name for name in _CHOSEN if getattr(config, name) is not None]
    given += ["template"] if config.template != "auto" else []
    unread = [f"--{name.replace('_', '-')}" for name in given if name not in reader.options]
    return [f"options that these data do not use: {', '.join(unread)}"] if unread else []


def _embedded(config: DataConfig) -> Table:
    from adaptive_lora.data.embedded_tasks import task_examples

    rows = task_examples(config.max_examples or EMBEDDED_EXAMPLES, config.split_seed)
    indices = range(len(rows))
    places = [f"example {index}" for index in indices]
    return Table(rows=rows, chosen=indices, name="embedded", places=places)


def reader_of(config: DataConfig, table: Table, known: Columns = ()) -> Reader:
    """Return the reader of a table's conversations, plain texts, or prompts and responses.

    Raises:
        DataError: the table has the columns of none of them.
        ConfigError: plain texts have labels, so that the task cannot be determined automatically.
    """
    columns = set(table.columns)
    if not config.prompt_column and not config.response_column:
        talks = next((name for name in CONVERSATIONS if name in columns), None)
        if talks is not None:
            reader = Conversations(table, talks)
            return Reader(
                example=reader.example,
                columns=reader.columns,
                template=CHAT,
                template_name="the tokenizer's chat template",
                notes=reader.notes,
            )
        if TEXT in columns and not any({c[0], c[2]} <= columns for c in (*_KNOWN_COLUMNS, *known)):
            _require_task(config, table)
            seen: dict[str, int] = {}
            return Reader(
                example=lambda index: plain_text(table, index, seen),
                columns={TEXT: "plain text, all of it learned"},
                template=PLAIN,
            )
    return _prompts(config, table, known)


def _require_task(config: DataConfig, table: Table) -> None:
    """Require an explicit task for texts with labels, which fit several tasks."""
    named = (name for name in table.columns if name.lower() in LABELS or name in table.classes)
    label = next(named, None)
    if config.task == "auto" and label is not None:
        raise ConfigError(
            f"task: {table.name} has texts with the labels '{label:.80}', which fit several tasks; "
            "required --task: classification or regression to predict them, or causal to learn "
            "the texts without them."
        )


def _prompts(config: DataConfig, table: Table, known: Columns) -> Reader:
    prompt, context, response = _columns(config, table, known)
    name = _template_name(config, (prompt, response))
    template = load_template(name)
    roles = {prompt: "prompt", **({context: "input"} if context else {}), response: "response"}
    seen: dict[str, int] = {}

    def example(index: int) -> Example:
        row, where = table.rows[index], table.where(index)
        refuse_unread(row, roles, where)
        asked = required_text(row, prompt, where)
        shown = render(template, asked, text_of(row, context, where))
        answer = required_text(row, response, where)
        return Example(id=content_id(shown, answer, seen), prompt=shown, response=answer, where=where)

    return Reader(
        example=example,
        columns=roles,
        template=template,
        template_name=name,
        options=("prompt_column", "input_column", "response_column", "template"),
    )


def _template_name(config: DataConfig, columns: tuple[str, str]) -> str:
    if config.template != "auto":
        return config.template
    if config.data == "embedded":
        return "compact"
    known = {(prompt, response) for prompt, _, response in _KNOWN_COLUMNS}
    return "alpaca" if columns in known else "plain"


def _columns(config: DataConfig, table: Table, more: Columns) -> tuple[str, str | None, str]:
    """Decide which columns are instruction, input and response."""
    have = set(table.columns)
    wanted = (config.prompt_column, config.input_column, config.response_column)
    missing = [column for column in wanted if column is not None and column not in have]
    listed = (*_KNOWN_COLUMNS, *more)
    known = next((c for c in listed if {c[0], c[2]} <= have), (None, None, None))
    prompt, response = wanted[0] or known[0], wanted[2] or known[2]
    if missing or prompt is None or response is None:
        if not any(wanted):
            _require_task(config, table)
        lacking = f"missing {', '.join(missing)}; " if missing else ""
        raise DataError(
            f"{table.name}: {lacking}required Alpaca columns (instruction, input, output), Dolly "
            "columns (instruction, context, response), GSM8K's (question, answer), messages, "
            f"conversations, text, or --prompt-column and --response-column; found {_listed(have)}."
        )
    context = wanted[1] or (known[1] if known[1] in have else None)
    return prompt, context, response


def require_columns(config: DataConfig, table: Table, *, prompts: bool) -> None:
    """Find that columns are missing before the rows are looked at.

    Args:
        config: the columns that were named.
        table: the data.
        prompts: whether the task is known to learn responses to prompts; else only columns that
            were named are looked for.

    Raises:
        DataError: with the columns that there are.
        ConfigError: as `reader_of`.
    """
    named = (
        config.prompt_column,
        config.input_column,
        config.response_column,
        config.image_column,
        config.audio_column,
    )
    columns = set(table.columns)
    missing = [name for name in named if name is not None and name not in columns]
    if missing:
        raise DataError(
            f"{table.name}: missing {', '.join(missing)}; found {_listed(columns)}. Name columns that are there."
        )
    if prompts:
        reader_of(config, table)


def _listed(names: Iterable[str], most: int = 20) -> str:
    listed = sorted(f"{name:.80}" for name in names)
    more = f" and {len(listed) - most:,} more columns" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more
