"""The pyfunc that MLflow stores with each adapter ("models from code"; nothing is pickled)."""

from __future__ import annotations

import warnings
from pathlib import Path

import mlflow
from mlflow.pyfunc import PythonModel, PythonModelContext

with warnings.catch_warnings(record=True):
    # MLflow recommends type hints on `predict`, which would replace the given signature.

    class ServedAdapter(PythonModel):
        """Model that answers with the adapter on its base."""

        def load_context(self, context: PythonModelContext) -> None:
            """Load base and adapter; the base's content hash must be the recorded one."""
            import adapter_serving  # saved with this file as `code_paths`

            self.serving = adapter_serving
            self.loaded = adapter_serving.load_adapter(Path(context.artifacts["adapter"]))

        def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]
            """Answer rows with the columns of the adapter's task, such as `prompt` or `text`.

            Returns one answer per row; raises ValueError for an invalid row.
            """
            rows = model_input.fillna("").to_dict("records")
            if not len(model_input.columns):  # MLflow drops other columns, and rows without known ones
                known = self.serving.TASKS[self.loaded[2]["task"]["name"]].columns
                raise ValueError(f"required rows with a column of {', '.join(known)}; got none")
            limit = int((params or {}).get("max_new_tokens", 64))
            return self.serving.answer(self.loaded, rows, limit)


mlflow.models.set_model(ServedAdapter())
