"""Data files and templates that are wrong."""

from __future__ import annotations

import io
import json

from bad_inputs.case import Bad, in_file, spoken

_GOOD = {"instruction": "Say hi", "output": "hi"}


def _lines(*rows: object) -> str:
    return "\n".join(json.dumps(row) for row in rows)


def _parquet(columns: dict[str, object]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), buffer)
    return buffer.getvalue()


def _twice() -> bytes:
    import pyarrow
    import pyarrow.parquet

    buffer = io.BytesIO()
    names = ["instruction", "output", "output"]
    pyarrow.parquet.write_table(pyarrow.table([["a"], ["b"], ["c"]], names=names), buffer)
    return buffer.getvalue()


_TEN = [{**_GOOD, "instruction": f"Say {n}"} for n in range(10)]
_JSON: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", "is empty"),
    "only a BOM": (b"\xef\xbb\xbf", "no examples"),
    "white space": (" \n \n", "no examples"),
    "no examples": ("[]", "no examples"),
    "a number": ("7", "line 1: required one JSON object"),
    "a word": ("hello", "line 1, column 1: not JSON"),
    "null": ("null", "required one JSON object"),
    "truncated": (json.dumps(_TEN)[:-20], "not JSON"),
    "a comma too many": ('[{"instruction": "a", "output": "b"},]', "not JSON"),
    "a number among the rows": (json.dumps([*_TEN, 7]), "item 10 (line 1): required an object"),
    "a list of lists": ("[[1, 2]]", "item 0 (line 1): required an object"),
    "nested without end": ("[" * 100_000, "nested too deeply"),
    "objects without end": ('{"a":' * 100_000, "nested too deeply"),
    "a table of columns": (json.dumps({"instruction": ["a"], "output": ["b"]}), "must be text"),
    "other columns": (json.dumps([{"a": "b"}]), "found a"),
    "no columns": (json.dumps([{}]), "item 0 (line 1): required an object with columns"),
    "no response": (json.dumps([{"instruction": "a"}]), "required Alpaca columns"),
    "an empty response": (json.dumps([{**_GOOD, "output": ""}]), "column 'output' is empty"),
    "a blank prompt": (json.dumps([{**_GOOD, "instruction": " \t"}]), "'instruction' is empty"),
    "a null response": (json.dumps([{**_GOOD, "output": None}]), "column 'output' is empty"),
    "a response left out later": (json.dumps([*_TEN, {"instruction": "a"}]), "item 10"),
    "a list as response": (json.dumps([{**_GOOD, "output": ["a"]}]), "must be text, got list"),
    "an object": (json.dumps([{**_GOOD, "output": {"a": 1}}]), "must be text, got dict"),
    "mixed types": (json.dumps([_GOOD, {**_GOOD, "output": ["a"]}]), "rows.json"),
    "NaN as response": ('[{"instruction": "a", "output": NaN}]', "not JSON"),
    "infinity as response": ('[{"instruction": "a", "output": -Infinity}]', "not JSON"),
    "a number beyond floats": ('[{"instruction": "a", "output": 1e999}]', "not JSON"),
    "a lone surrogate": ('[{"instruction": "a\\ud800", "output": "b"}]', "surrogate"),
    "not UTF-8": (b'[{"instruction": "\xff", "output": "b"}]', "byte 18 is not"),
    "UTF-16": (json.dumps(_TEN).encode("utf-16"), "required UTF-8"),
    "a NUL byte": (b'[{"instruction": "\0", "output": "b"}]', "not JSON"),
    "a NUL sign": ('[{"instruction": "a\\u0000", "output": "b"}]', "NUL sign"),
    "a column twice": ('[{"instruction": "a", "instruction": "b", "output": "c"}]', "stands twice"),
    "too few rows": (json.dumps([_GOOD]), "split empty"),
    "one prompt only": (json.dumps([_GOOD] * 30), "split empty"),
    "a gigantic prompt": (
        json.dumps([{**row, "instruction": "long " * 4_000 + str(row)} for row in _TEN]),
        "raise max_tokens",
    ),
    "SQL": ("SELECT * FROM users;", "not JSON"),
    "HTML": ("<html><script>alert(1)</script></html>", "not JSON"),
    "a pickle": (b"\x80\x04\x95\x0b\x00\x00\x00\x00\x00\x00\x00\x8c\x07builtins", "required UTF-8"),
    "a gzip": (b"\x1f\x8b\x08\x00\x00\x00\x00\x00", "required UTF-8"),
}  # fmt: skip
_JSONL: dict[str, tuple[str | bytes, str]] = {
    "truncated": (_lines(*_TEN)[:-5], "rows.jsonl line 10"),
    "a list a line": ("[1]\n[2]", "line 1: required one JSON object"),
    "a bad line": (_lines(_GOOD) + "\n{broken\n" + _lines(_GOOD), "line 2, column 2: not JSON"),
    "two objects a line": ('{"a": 1} {"b": 2}', "not JSON"),
    "a word a line": ('"a"\n"b"', "required one JSON object with columns"),
    "carriage returns inside": (b'{"instruction": "a\rb", "output": "c"}', "not JSON"),
    "types that change": (_lines(*_TEN, {"instruction": 1, "output": {"a": [1]}}), "rows.jsonl"),
    "nested without end": ('{"a":' + "[" * 50_000, "nested too deeply"),
}
_CSV: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", "is empty"),
    "only a BOM": (b"\xef\xbb\xbf", "no examples"),
    "a header alone": ("instruction,output\n", "no examples"),
    "newlines alone": ("\n\n\n", "no examples"),
    "a field too many": ("instruction,output\na,b,c\n", "required 2 fields, got 3"),
    "a field too few": ("instruction,output\na\n", "required 2 fields, got 1"),
    "an open quote": ('instruction,output\n"a,b\n', "rows.csv"),
    "other columns": ("a,b\n1,2\n", "found a, b"),
    "a column twice": ("instruction,instruction,output\na,b,c\n", "is given twice"),
    "a column without name": (",output\na,b\n", "a column has no name"),
    "an empty response": ("instruction,output\na,\n", "column 'output' is empty"),
    "not UTF-8": (b"instruction,output\n\xff,b\n", "required UTF-8"),
    "UTF-16": ("instruction,output\na,b\n".encode("utf-16"), "required UTF-8"),
    "NUL bytes": (b"instruction,output\na\0,b\n", "rows.csv"),
    "2,000 columns": (
        ",".join(f"c{n}" for n in range(2_000)) + "\n" + ",".join(["1"] * 2_000), "columns",
    ),
    "semicolons": ("instruction;output\na;b\n", "required Alpaca columns"),
    "lines between two quotes": (
        'instruction,output\n"oh,b\nc,d\ne" f,g\n', "lines 2 to 4: ',' expected after '\"'",
    ),
}  # fmt: skip
_TSV: dict[str, tuple[str | bytes, str]] = {
    "commas": ("instruction,output\na,b\n", "required Alpaca columns"),
    "a field too many": ("instruction\toutput\na\tb\tc\n", "required 2 fields, got 3"),
    "a field over two lines": (
        'instruction\toutput\na\tb\nc\t"d\ne"\n',
        "a field seems to span lines (a quote opens in line 3)",
    ),
}
_PARQUET: dict[str, tuple[str | bytes, str]] = {
    "no Parquet": (b"hello", "cannot be read as parquet"),
    "the magic alone": (b"PAR1PAR1", "cannot be read as parquet"),
    "truncated": (_parquet({"instruction": ["a"] * 50, "output": ["b"] * 50})[:-30], "parquet"),
    "no rows": (_parquet({"instruction": [], "output": []}), "no examples"),
    "nulls": (_parquet({"instruction": ["a", None], "output": ["b", "c"]}), "is empty"),
    "lists": (_parquet({"instruction": [["a"]], "output": ["b"]}), "must be text, got list"),
    "objects": (_parquet({"instruction": [{"x": 1}], "output": ["b"]}), "must be text, got dict"),
    "bytes": (_parquet({"instruction": [b"\xff"], "output": ["b"]}), "must be text, got bytes"),
    "NaN": (_parquet({"instruction": [float("nan")], "output": ["b"]}), "must be text"),
    "other columns": (_parquet({"a": ["b"]}), "found a"),
    "a column twice": (_twice(), "column 'output' is given twice"),
}  # fmt: skip
_TEMPLATES: dict[str, tuple[str | bytes, str]] = {
    "empty": ("", "required the texts"),
    "a list": ("- a", "required the texts"),
    "one text": ("with_input: '{prompt}'", "without_input"),
    "no prompt": ("with_input: a\nwithout_input: b", "each with {prompt}"),
    "numbers": ("with_input: 1\nwithout_input: 2", "required the texts"),
    "an attribute of a field": (
        "with_input: '{prompt.__class__}'\nwithout_input: '{prompt.__class__}'", "with_input",
    ),
    "another field": ("with_input: '{prompt}{secret}'\nwithout_input: '{prompt}'", "{secret}"),
    "an attribute beside": (
        "with_input: '{prompt}{input.__init__.__globals__}'\nwithout_input: '{prompt}'",
        "{input.__init__.__globals__}",
    ),
    "no place for the input": ("with_input: '{prompt}'\nwithout_input: '{prompt}'", "{input}"),
    "jinja": ("with_input: '{{ prompt }}'\nwithout_input: '{% raw %}'", "with_input"),
    "a Python object": ("with_input: !!python/object/apply:os.getcwd []", "cannot be read"),
    "aliases": ("a: &a '{prompt}{input}'\nwith_input: *a\nwithout_input: *a", "anchors"),
    "not UTF-8": (b"with_input: \xff", "cannot be read"),
    "nested without end": ("[" * 20_000, "nested too deeply"),
    "not YAML": ("with_input: [", "cannot be read"),
}  # fmt: skip


def _study(path: str, *more: str) -> tuple[str, ...]:
    return ("study", "--model", "BASE", "--data", path, "--max-tokens", "64", *more)


_T = ("--template", "bad.yaml")
CASES: tuple[Bad, ...] = (
    *in_file(_JSON, "JSON", "rows.json", *_study("rows.json")),
    *in_file(_JSONL, "JSONL", "rows.jsonl", *_study("rows.jsonl")),
    *in_file(_CSV, "CSV", "rows.csv", *_study("rows.csv")),
    *in_file(_TSV, "TSV", "rows.tsv", *_study("rows.tsv")),
    *in_file(_PARQUET, "Parquet", "rows.parquet", *_study("rows.parquet")),
    *in_file(_TEMPLATES, "template", "bad.yaml", *_study("good.json", *_T)),
    *in_file(
        {
            "another ending": ("x", "required one of .json"),
            "a pickle by name": (b"\x80\x04N.", "required one of .json"),
        },
        "data", "rows.pkl", *_study("rows.pkl"),
    ),
    *in_file({"a script": ("print(1)", "required one of")}, "data", "rows.py", *_study("rows.py")),
    *(
        Bad(name=f"data: {kind}", words=_study(path), says=says, files={path: b"{}"})
        for kind, path, says in (
            ("a name with an escape", "a\x1b[31mb.json", "a\\x1b[31mb.json"),
            ("a name with markup", "[red]a[bold].json", "[red]a[bold].json"),
            ("a name with a newline", "a\nb.json", "required one JSON object with columns"),
            ("a name that turns around", "a\u202enosj.json", "a\\u202enosj.json"),
            ("a name with a glob", "a[0-9]*.json", "a[0-9]*.json"),
            ("a name with a dash", "-rf.json", "-rf.json"),
        )
    ),
    *spoken(
        {
            "missing": (_study("nowhere.json"), "does not exist"),
            "a folder upwards": (_study("../nowhere"), "data '../nowhere'"),
            "a URL with a password": (
                _study("https://user:secret-word@example.org/rows.json"), "does not exist",
            ),
            "a device": (_study("/dev/null"), "required one of"),
            "a column that is not there": (
                _study("good.json", "--response-column", "nope"), "missing nope",
            ),
            "a template that is not there": (_study("good.json", "--template", "x.yaml"), "x.yaml"),
            "an unknown template": (_study("good.json", "--template", "nope"), "unknown template"),
            "a template upwards": (
                _study("good.json", "--template", "../../templates"), "unknown template",
            ),
            "no hub id": (_study("../../etc/passwd"), "passwd"),
            "too long for a hub id": (_study("x" * 5000), "data 'xxx"),
            "an empty name": (_study(""), "data ''"),
        },
        "data",
    ),
)  # fmt: skip
