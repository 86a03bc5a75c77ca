"""JSON of the commands against its schemas."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from adaptive_lora.cli.documents import document_schema


def strict(schema: Any) -> Any:
    """Return a schema that refuses keys which it does not have; the published one lets them be added."""
    if isinstance(schema, list):
        return [strict(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    found = {name: strict(one) for name, one in schema.items()}
    return found | ({"additionalProperties": False} if "properties" in schema else {})


def require_schema(name: str, document: Any) -> None:
    """Fail where a document has not exactly the keys of its schema, or, where there is jsonschema, the types."""
    schema = strict(document_schema(name))
    one, values = (schema["items"], document[0]) if isinstance(document, list) else (schema, document)
    if name == "evaluate":  # the task's scores have their own names
        del one["additionalProperties"]
    assert values["schema"] == one["properties"]["schema"]["const"]
    assert set(one["required"]) <= set(values), set(one["required"]) - set(values)
    assert "additionalProperties" not in one or set(values) <= set(one["properties"]), values.keys()
    if find_spec("jsonschema") is not None:
        from jsonschema import Draft202012Validator

        Draft202012Validator.check_schema(schema)
        found = Draft202012Validator(schema).iter_errors(document)
        problems = [f"{error.json_path}: {error.message}" for error in found]
        assert not problems, problems
