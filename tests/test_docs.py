"""The pages: their code runs, the site is whole and asks no other host, pictures and lists are those of the code."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tomllib
from datetime import date
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType

import mlflow
import nbformat
import peft
import pytest
import torch
import yaml
from nbclient import NotebookClient
from packaging.version import Version
from test_project import ORDER, PACKAGE, PAGES, ROOT
from transformers import AutoModelForCausalLM, GPT2Config

import adaptive_lora
from adaptive_lora.config import load_study


def blocks(page: Path, language: str) -> list[str]:
    """Return the code blocks of a page in one language."""
    return re.findall(rf"(?ms)^```{language}\n(.*?)^```$", page.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def after_the_readme(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the README's Python has run: it holds a store with a champion."""
    folder = tmp_path_factory.mktemp("readme")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for unset in (mlflow.set_tracking_uri, mlflow.set_registry_uri):  # as in a reader's process
            unset(None)  # type: ignore[arg-type]
        run_python(ROOT / "README.md", peft=peft, **of_the_reader())
    return folder


def of_the_reader() -> dict[str, object]:
    """Return what the README takes a reader to have: a model and batches."""
    model = AutoModelForCausalLM.from_config(GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=50))
    ids = torch.arange(96).reshape(4, 2, 12) % 7
    return {
        "model": model,
        "loader": [{"input_ids": x, "attention_mask": torch.ones_like(x), "labels": x} for x in ids],
    }


def run_python(page: Path, **given: object) -> None:
    names: dict[str, object] = {"__name__": page.stem, **given}
    for number, code in enumerate(blocks(page, "python")):
        exec(compile(code, f"{page.name}, block {number + 1}", "exec", dont_inherit=True), names)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.name)
def test_python_of_the_pages_runs(page: Path, after_the_readme: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(after_the_readme)
    if page.name != "README.md":  # it ran before the others
        run_python(page)
    assert (after_the_readme / "mlflow.db").is_file()


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    stored, run = (nbformat.read(path, as_version=4) for _ in range(2))
    NotebookClient(run, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    for before, after in zip(stored.cells, run.cells, strict=True):
        shown, made = (
            [output.get("name", output.output_type) for output in cell.get("outputs", [])] for cell in (before, after)
        )
        assert made == shown, after.source  # the outputs that the page shows
        assert "stderr" not in made, after.outputs


def test_study_files_of_the_pages_are_read(tmp_path: Path) -> None:
    found = [block for page in PAGES for block in blocks(page, "yaml") if "methods:" in block]
    assert found
    for number, block in enumerate(found):
        path = tmp_path / f"study{number}.yaml"
        path.write_text(block, encoding="utf-8")
        assert load_study(path, {}).specs


def test_paths_of_the_pages_exist() -> None:
    for page in PAGES:
        for path in re.findall(
            r"`((?:adaptive_lora|benchmarks|entrypoints|tests|supply)/[\w./*-]+)`", page.read_text("utf-8")
        ):
            if "*" not in path and "NAME" not in path:
                assert (ROOT / path).exists(), f"{page.name}: {path}"


def script(name: str) -> ModuleType:
    """Return a script of `docs/site/` as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / "site" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_picture_is_that_of_the_imports() -> None:
    picture = script("picture")
    graph = picture.imports_of_packages()
    assert picture.DRAWN.read_text(encoding="utf-8") == picture.draw(graph), "run docs/site/picture.py"
    levels = {name: level for name, (_, level) in picture.places(picture.arrows(graph)).items()}
    for name, others in graph.items():
        for other in others:
            assert ORDER.index(other) < ORDER.index(name)
            assert levels[other] < levels[name]


def test_the_tree_and_the_order_are_those_of_the_code() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert tuple(re.split(r",\s+", re.search(r"\n    redaction,.*?(?=\n\n)", text, re.S)[0].strip())) == ORDER
    tree = text[text.index("    adaptive_lora/\n") : text.index("    benchmarks/")]
    folders = {path.parent.name for path in PACKAGE.rglob("__init__.py")} | {"embedded"}
    assert set(re.findall(r"(\w+)/", tree)) == folders
    assert set(re.findall(r"(\w+\.py)", tree)) == {path.name for path in PACKAGE.glob("*.py")} - {"__init__.py"}


class Requests(HTMLParser):
    """What a page makes a browser fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note the addresses of everything but links that a person follows."""
        if tag != "a":
            self.found += [value for name, value in attrs if name in ("src", "href", "srcset", "action") and value]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built strictly: broken links, anchors and docstrings end it."""
    pytest.importorskip("mkdocs")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_site_asks_no_other_host(site: Path) -> None:
    pages = [page for page in site.rglob("*.html") if "files" not in page.relative_to(site).parts]
    assert {"index.html", "quickstart.html", "contributing.html"} <= {page.name for page in pages}
    for page in pages:
        requests = Requests()
        requests.feed(page.read_text(encoding="utf-8"))
        assert requests.found
        assert not [address for address in requests.found if re.match(r"(https?:)?//", address)], page
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*[\"']?(https?:)?//", sheet.read_text(encoding="utf-8")), sheet


def test_the_site_has_every_page_and_every_package(site: Path) -> None:
    for page in (ROOT / "docs").glob("*.md"):
        assert (site / f"{page.stem}.html").is_file()
    for name in set(ORDER) - {"cli"}:
        assert f'id="adaptive_lora.{name}' in (site / "reference" / f"{name}.html").read_text(encoding="utf-8")
    commands = (site / "reference" / "commands.html").read_text(encoding="utf-8")
    assert "--max-examples" in commands
    assert "Usage: adaptive-lora compare" in commands


def test_names_of_the_public_api() -> None:
    assert adaptive_lora.__all__ == [
        "AdaptiveLoraError", "AuditCallback", "MethodSpec", "RankCallback", "RankMethod", "RankPlan", "StudyConfig",
        "TunerMethod", "__version__", "allocate", "audit", "compare", "evaluate", "ladder", "load", "load_study",
        "lora_config", "make_plan", "plan", "plan_method", "profile", "push", "run_study", "study", "study_from",
    ]  # fmt: skip
    for name in adaptive_lora.__all__:
        found = getattr(adaptive_lora, name)
        assert name == "__version__" or (found.__name__ == name and found.__doc__)
    with pytest.raises(AttributeError, match="has no attribute 'run_studies'"):
        _ = adaptive_lora.run_studies


def test_importing_the_package_loads_nothing_heavy() -> None:
    heavy = {"torch", "mlflow", "numpy", "scipy", "transformers", "peft", "click", "rich", "yaml"}
    code = f"import adaptive_lora, sys; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_files_of_the_package_that_are_no_code_are_installed() -> None:
    data = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["package-data"]
    installed = {path for pattern in data["adaptive_lora"] for path in PACKAGE.glob(pattern)}
    others = {path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert others == installed


def test_version_changelog_and_citation_agree() -> None:
    version = Version(adaptive_lora.__version__)
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    sections = re.findall(r"(?m)^## \[(.*?)\](?: - (\S+))?$", text)
    released = [(Version(name), date.fromisoformat(day)) for name, day in sections if name != "Unreleased"]
    assert released == sorted(released, reverse=True)
    assert sections[0][0] == ("Unreleased" if version.is_devrelease else adaptive_lora.__version__)
    assert version > released[0][0] or not version.is_devrelease
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert set(re.findall(r"(?m)^### (.*)$", text)) <= kinds
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == adaptive_lora.__version__
    assert citation["license"] == "Apache-2.0"


def test_hooks_before_a_commit_are_what_ci_runs() -> None:
    recipe = re.search(r"(?m)^test:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(encoding="utf-8"))
    assert recipe is not None
    steps = [line.strip().replace("$(BIN)", ".venv/bin") for line in recipe[1].splitlines()]
    settings = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    hooks = [hook for repo in settings["repos"] for hook in repo["hooks"]]
    assert [hook["entry"] for hook in hooks] == steps[:-1]
    assert "pytest" in steps[-1]
    assert not any(hook["pass_filenames"] for hook in hooks)


def test_forms_of_issues_are_valid() -> None:
    folder = ROOT / ".github" / "ISSUE_TEMPLATE"
    forms = {path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in folder.glob("*.yml")}
    assert set(forms) == {"config", "new_method", "wrong_number"}
    for name in set(forms) - {"config"}:
        assert {"name", "description", "body"} <= set(forms[name])
        ids = [field["id"] for field in forms[name]["body"]]
        assert len(ids) == len(set(ids))
        assert any(field.get("validations", {}).get("required") for field in forms[name]["body"])
