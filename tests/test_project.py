"""The house holds: import direction, one importer of mlflow, sizes, files that people follow."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from functools import cache
from importlib.metadata import packages_distributions, version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from adaptive_lora.cli import main
from adaptive_lora.config import load_study, option_fields
from adaptive_lora.errors import EXTRAS

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "adaptive_lora"
SOURCES = sorted(PACKAGE.rglob("*.py"))

# Lower ones first; each imports only from those before it in this list and from itself.
MODULES = ("redaction", "errors", "interruption", "options", "plugins", "results", "seeding")
PACKAGES = (
    "serving",
    "allocation",
    "config",
    "data",
    "models",
    "methods",
    "training",
    "analysis",
    "tracking",
    "runner",
    "cli",
)
ORDER = ("redaction", "errors", "options", "plugins", "interruption", "seeding", "serving",
         "allocation", "results", *PACKAGES[2:])  # fmt: skip


@cache
def nodes(path: Path) -> tuple[ast.AST, ...]:
    """Return all nodes of a file's syntax tree; most tests here want those of every file."""
    return tuple(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))


def imports(path: Path) -> set[str]:
    """Return the modules that a file imports anywhere, type-checking blocks included."""
    found: set[str] = set()
    for node in nodes(path):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def part_of(path: Path) -> str:
    """Return the package or module at the root that a source file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_the_root_has_eleven_packages_and_eight_files() -> None:
    assert {part_of(path) for path in SOURCES} == {"__init__", *MODULES, *PACKAGES}
    entries = {path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"}
    # Files without code: adapters that earlier versions registered look for the base there.
    assert {path.name for path in (PACKAGE / "embedded").iterdir()} - {"__pycache__"} == {"base"}
    # py.typed tells type checkers of other projects to read the annotations here.
    assert entries == {"__init__.py", "py.typed", "embedded", *PACKAGES, *(f"{name}.py" for name in MODULES)}
    assert set(ORDER) == {*PACKAGES, *MODULES}


def test_imports_run_one_way() -> None:
    for path in SOURCES:
        part = part_of(path)
        for name in imports(path) if part != "__init__" else ():
            parts = name.split(".")
            if parts[0] == "adaptive_lora" and len(parts) > 1:
                assert ORDER.index(parts[1]) <= ORDER.index(part), f"{path} imports {name}"


def importers(*packages: str, under: str = "") -> set[str]:
    """Return the parts, that import one of these packages."""
    return {
        part_of(path)
        for path in SOURCES
        if path.is_relative_to(PACKAGE / under) and any(name.split(".")[0] in packages for name in imports(path))
    }


def test_only_tracking_imports_mlflow() -> None:
    assert importers("mlflow") == {"tracking"}


def test_the_claim_needs_no_framework() -> None:
    heavy = importers("torch", "transformers", "peft", "mlflow", "accelerate")
    assert not heavy & {"allocation", "config", "errors"}
    assert not importers("torch", "transformers", "peft", "mlflow", "accelerate", under="analysis")


def test_only_the_report_draws() -> None:
    assert importers("matplotlib") == {"analysis"}


def test_nothing_reads_or_writes_pickle() -> None:
    assert not importers("pickle", "cloudpickle", "joblib", "dill")
    assert not [path for path in SOURCES if "torch.load" in path.read_text(encoding="utf-8")]


def test_files_and_functions_stay_small() -> None:
    for path in SOURCES:
        assert len(path.read_text(encoding="utf-8").splitlines()) < 400, path
        for node in nodes(path):
            if isinstance(node, ast.FunctionDef):
                docstring = ast.get_docstring(node, clean=False) or ""
                length = (node.end_lineno or 0) - node.lineno + 1 - docstring.count("\n")
                assert length <= 50, f"{path}: {node.name} has {length} lines"


def test_studies_beside_the_entry_points_are_valid() -> None:
    for path in (ROOT / "entrypoints" / "studies").glob("*.yaml"):
        assert load_study(path, {}).specs


OPTIONAL = {"bench", "fuzz", "schema"}
"""Extras that the tests do without."""


def test_constraints_pin_what_is_installed_and_required() -> None:
    pins = {
        requirement.name.lower().replace("_", "-"): requirement
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
        for requirement in [Requirement(line)]
    }
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extra, lines in {"": project["dependencies"], **project["optional-dependencies"]}.items():
        for line in lines:
            wanted = Requirement(line)
            name = wanted.name.lower().replace("_", "-")
            if name == project["name"]:  # an extra that is several of the others
                continue
            pin = str(pins[name].specifier).removeprefix("==")
            assert wanted.specifier.contains(pin), line
            if extra not in OPTIONAL:
                assert version(name).split("+")[0] == pin, name


NOT_IMPORTED = {"server"}
"""Extras for programs that are started beside the package: drivers of the tracking server."""


def declared(*extras: str) -> set[str]:
    """Return the names of the dependencies, with those of the extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]
    return {canonicalize_name(Requirement(line).name) for line in lines}


def imported(paths: list[Path]) -> dict[str, set[str]]:
    """Return every package that files import from outside -> the distributions that may hold it."""
    own = {"adaptive_lora", "adapter_serving", *sys.stdlib_module_names}
    own |= {path.stem for path in paths} | {path.parent.name for path in paths}
    holders = packages_distributions()
    names = {name.split(".")[0] for path in paths for name in imports(path)} - own
    return {name: {canonicalize_name(one) for one in holders.get(name, [name])} for name in names}


def test_what_the_package_imports_is_declared_and_what_is_declared_is_imported() -> None:
    holders = imported(SOURCES)
    known = declared(*EXTRAS)
    assert {name for name, held_by in holders.items() if not held_by & known} == set()
    assert known - set().union(*holders.values()) == set()


def test_extras_are_the_modules_that_a_missing_one_is_named_by() -> None:
    core = declared()
    holders = {name: {canonicalize_name(one) for one in held_by} for name, held_by in packages_distributions().items()}
    for extra, modules in EXTRAS.items():
        held_by = set().union(*(holders[module] for module in modules))
        assert declared(extra) - core == held_by & declared(extra), extra
        assert all(holders[module] & declared(extra) for module in modules)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["optional-dependencies"]["all"] == [f"{project['name']}[{','.join(EXTRAS)}]"]


def test_what_tests_and_benchmarks_import_is_declared() -> None:
    paths = [
        path for folder in ("tests", "benchmarks", "entrypoints", "supply") for path in (ROOT / folder).rglob("*.py")
    ]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    known = declared(*(project["optional-dependencies"].keys() - NOT_IMPORTED))
    assert {name for name, held_by in imported(paths).items() if not held_by & known} == set()


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PROSE = "".join(page.read_text(encoding="utf-8") for page in PAGES)


def anchors(page: Path) -> set[str]:
    """Return the names of a page's headings as links write them."""
    headings = re.findall(r"(?m)^#+ (.*)$", page.read_text(encoding="utf-8"))
    return {re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-") for text in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?://)([^)#]*)(?:#([^)]*))?\)", page.read_text(encoding="utf-8"))
    for name, anchor in links:
        target = page.parent / name if name else page
        assert target.exists(), name
        assert not anchor or anchor in anchors(target), f"{name}#{anchor}"


def test_every_page_is_linked_from_the_readme() -> None:
    text = PAGES[0].read_text(encoding="utf-8")
    assert [page.name for page in PAGES[1:] if page.name not in text] == []


def test_options_and_commands_of_the_docs_exist() -> None:
    known = {"version", "help"}
    for command in main.commands.values():
        known |= {opt.lstrip("-") for param in command.params for opt in (*param.opts, *param.secondary_opts)}
    known |= {name.replace("_", "-") for name in option_fields()}
    for script in (ROOT / "benchmarks").rglob("*.py"):
        known |= set(re.findall(r'"--([a-z][a-z-]+)"', script.read_text(encoding="utf-8")))
    others = {"env-manager", "dev", "editable", "port", "require-hashes", "no-deps", "merge"}
    others |= {"tasks", "log", "repo-type"}  # of lm_eval and hf
    others |= {"no-wait", "submission-id"}  # of ray job submit
    others |= {"artifact-uri", "dst-path"}  # of mlflow artifacts download
    # Of accelerate launch and torchrun, which write --use_fsdp.
    others |= {"use", "fsdp", "num", "multi", "machine", "main", "cpu", "nproc"}
    for path in (*(ROOT / "entrypoints" / "slurm").iterdir(), *(ROOT / "entrypoints" / "kubernetes").iterdir()):
        others |= set(re.findall(r"--([a-z][a-z-]+)", path.read_text(encoding="utf-8")))
    used = set(re.findall(r"(?<![\w-])--([a-z][a-z-]+)", PROSE))
    assert used - known - others == set()
    for command in re.findall(r"adaptive-lora ([a-z][a-z-]*)", PROSE):
        assert command in main.commands, command


def test_the_docs_projects_parameters_exist() -> None:
    used = set(re.findall(r"-P ([a-z_]+)=", PROSE + (ROOT / "MLproject").read_text()))
    extra = {"method", "seed", "adapter", "study_id", "config", "metric", "fold"}
    assert used <= set(option_fields()) | extra


def test_project_file_names_every_entry_point() -> None:
    project = yaml.safe_load((ROOT / "MLproject").read_text())
    assert set(project["entry_points"]) == {"main", "profile", "train", "evaluate", "compare"}
    for entry in project["entry_points"].values():
        script = entry["command"].split()[1]
        assert (ROOT / script).is_file()
        assert "parameters" not in entry  # defaults stand in the dataclasses alone
