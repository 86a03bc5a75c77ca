"""`export --push` against a stand-in of the hub: what is sent, refused and left by a failure; no token in any text."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from hub_server import TOKEN, HubServer, oid_of
from huggingface_hub import constants
from peft import PeftModel
from safetensors.torch import load_file
from servers import free_port
from test_export import IDS, TOLERANCE, trained
from tracked import Finished
from transformers import AutoModelForCausalLM

import adaptive_lora as al
from adaptive_lora.cli import main
from adaptive_lora.errors import AdapterError, ConfigError, HubError
from adaptive_lora.runner.context import StudyContext
from adaptive_lora.runner.hub import find_repository, upload
from adaptive_lora.runner.trial import run_trial
from adaptive_lora.serving import load_adapter

# huggingface_hub 2.4 uploads by Git LFS with an argument that its HTTP client deprecates
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors", "adaptive_lora.json", "rank_plan.json"}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """The stand-in, as the hub of this process; large files go by Git LFS, as HF_HUB_DISABLE_XET has it."""
    server = HubServer()
    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, server.address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", server.address)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def adapter(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of mixed ranks on a local base."""
    folder = tmp_path_factory.mktemp("adapter") / "adapter"
    trained(base_folder, folder, "linear_decay:rank=5,low_rank=2")
    (folder / "notes.py").write_text("raise SystemExit")
    return folder


def export(*words: object) -> Result:
    return CliRunner().invoke(main, ["export", *map(str, words)], catch_exceptions=False)


def test_the_champion_is_published(hub: HubServer, finished: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(finished.folder)
    champion = finished.outcome.study_result.champion
    done = export(f"models:/{champion.name}@champion", "--push", "org/champion", "--license", "apache-2.0")
    assert done.exit_code == 0, done.output
    (created,) = hub.sent("/api/repos/create")
    assert created.json == {"name": "champion", "organization": "org", "visibility": "private"}
    assert f"pushed     {hub.address}/org/champion\n" in done.output
    assert "private: its members alone can read it (created)" in done.output
    assert "not sent   1 that are not part of the adapter: probe.safetensors" in done.output

    commit = hub.repos["org/champion"].branches["main"]
    assert set(commit.files) == FILES | {".gitattributes"}
    assert commit.large == {"adapter_model.safetensors"}
    assert commit.oid in done.output
    card = commit.files["README.md"].decode()
    comparison = finished.outcome.study_result.comparison
    plan = json.loads(commit.files["rank_plan.json"])
    for part in (
        "license: apache-2.0\n",
        f"- method: `{plan['method']}`",
        comparison.headline,
        f"Decision: {comparison.decision}.",
        f"{plan['trainable_parameters']:,} trained parameters",
        "| layer | qkv | output | up | down |",
        "logits differed by up to 0.0",
        " training examples, digest `",
        "## Licence\n\napache-2.0",
    ):
        assert part in card
    rows = [line.split(" | ") for line in card.splitlines() if line.startswith("| ") and "layer" not in line]
    assert [int(row[1]) for row in rows] == [site["rank"] for site in plan["sites"] if site["role"] == "qkv"]


def test_every_request_has_the_token_and_no_text_does(
    hub: HubServer,
    adapter: Path,
    finished: Finished,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(finished.folder)
    caplog.set_level(logging.DEBUG)
    shown = export(adapter, "--push", "org/quiet").output
    hub.faults["create"] = 403
    shown += export(adapter, "--push", "org/other").output
    hub.faults = {".": 401}
    shown += export(f"models:/{finished.outcome.study_result.champion.name}@champion", "--push", "org/other").output
    assert "no permission to write there" in shown
    assert "does not accept the token" in shown
    with_token = [request for request in hub.requests if request.headers.get("authorization") == f"Bearer {TOKEN}"]
    others = {request.path.split("/")[1] for request in hub.requests if request not in with_token}
    assert {request.path.split("/")[1] for request in with_token} >= {"api", "org"}
    assert others <= {"storage", "api"}  # signed addresses of the storage; the client's own list of agents
    assert not [r for r in hub.requests if r not in with_token and "/api/models" in r.path]
    written = capfd.readouterr()
    files = {path: path.read_bytes() for path in finished.folder.rglob("*") if path.is_file()}
    assert any(path.name == "mlflow.db" for path in files)
    for text in (shown, caplog.text, written.out, written.err, *map(str, hub.repos["org/quiet"].commits.values())):
        assert TOKEN not in text
    assert not [path for path, content in files.items() if TOKEN.encode() in content]


@pytest.mark.parametrize("form", ["trained", "uniform", "merged"])
def test_what_is_on_the_hub_computes_the_same(
    hub: HubServer, adapter: Path, base_folder: Path, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed = al.push(adapter, "org/forms", form=form)
    files = hub.repos["org/forms"].branches["main"].files
    assert pushed.sha256 == {
        name: hashlib.sha256(content).hexdigest() for name, content in files.items() if name != ".gitattributes"
    }
    assert pushed.private
    assert pushed.left_out == (("notes.py",) if form == "trained" else ())
    for name, content in files.items():
        assert str(base_folder).encode() not in content, name
        (tmp_path / name).write_bytes(content)
    assert not [name for name in files if name.endswith(".py")]
    assert "It was not compared with its training" in files["README.md"].decode()
    with torch.no_grad():
        before = load_adapter(adapter)[0](IDS).logits
        if form == "merged":
            model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
        else:
            base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
            model = PeftModel.from_pretrained(base, str(tmp_path))
            monkeypatch.setenv("ADAPTIVE_LORA_BASE", str(base_folder))
            torch.testing.assert_close(load_adapter(tmp_path)[0](IDS).logits, before, **TOLERANCE)
        torch.testing.assert_close(model.eval()(IDS).logits, before, **TOLERANCE)


def test_a_custom_tuner_is_published_without_code(
    hub: HubServer, make_bench: Callable[..., StudyContext], tmp_path: Path
) -> None:
    context = make_bench(methods="bitfit", max_steps=2, seeds="0")
    run_trial(context, next(context.config.trials()), tmp_path / "adapter")
    pushed = al.push(tmp_path / "adapter", "org/custom")
    assert set(pushed.sha256) == {
        "README.md", "adaptive_lora.json", "family.json", "rank_plan.json", "trained.safetensors",
    }  # fmt: skip
    assert "Adapter of the tuner" in hub.repos["org/custom"].branches["main"].files["README.md"].decode()


def test_what_a_repository_has(hub: HubServer, adapter: Path) -> None:
    repo = hub.repo("org/mine", README__md=b"old", family__json=b"{}", adapter_model__bin=b"pickle", train__log=b"log")
    before = repo.branches["main"]
    with pytest.raises(ConfigError, match=r"branch main has 4 files \(README.md.*--update to replace"):
        al.push(adapter, "org/mine")
    assert hub.sent("/commit/") == []
    pushed = al.push(adapter, "org/mine", update=True, message="Second try")
    after = repo.branches["main"]
    assert after.summary == "Second try"
    assert set(after.files) == FILES | {".gitattributes", "train.log"}
    assert pushed.replaced == ("README.md",)
    assert pushed.deleted == ("adapter_model.bin", "family.json")
    assert pushed.kept == (".gitattributes", "train.log")
    assert not pushed.created
    assert al.push(adapter, "org/mine", update=True).unchanged
    assert repo.branches["main"] is after

    branch = al.push(adapter, "org/mine", revision="try-2", license="mit")
    assert branch.url == f"{hub.address}/org/mine/tree/try-2"
    assert repo.branches["main"] is after
    assert b"license: mit" in repo.branches["try-2"].files["README.md"]
    assert before.files["train.log"] == repo.branches["try-2"].files["train.log"]


def test_nobody_publishes_or_hides_by_mistake(hub: HubServer, adapter: Path) -> None:
    hub.repo("org/open", private=False)
    hub.repo("org/closed")
    with pytest.raises(ConfigError, match="is public, and a push leaves it so: everybody could read"):
        al.push(adapter, "org/open")
    with pytest.raises(ConfigError, match="is private, and a push leaves it so; leave --public out"):
        al.push(adapter, "org/closed", public=True)
    assert hub.sent("/commit/") == []
    assert not al.push(adapter, "org/open", public=True).private  # both are empty, so nothing is replaced
    assert al.push(adapter, "org/closed").private
    done = export(adapter, "--push", "org/new", "--public")
    assert hub.sent("/api/repos/create")[0].json["visibility"] == "public"
    assert "public: everybody can read it (created)" in done.output


@pytest.mark.parametrize(
    ("fault", "reason", "state"),
    [
        ({"GET /api/models": 401}, "does not accept the token", "nothing was created or changed"),
        ({"repos/create": 403}, "no permission to write there", "nothing was created"),
        ({"repos/create": 409}, "the name is taken", "nothing was created"),
        (
            {"PUT /storage": 403},
            "Error while uploading 'adapter_model.safetensors'",
            "org/faulty was created and is empty",
        ),
        ({"/verify$": 404}, "Error while uploading 'adapter_model.safetensors'", "no commit was confirmed"),
        ({"/commit/main": 413}, "refuses files of this size", "org/faulty was created and is empty"),
        ({"blobs=": 403}, "no permission", "was made, but could not be read back"),
    ],
)
def test_failures_say_what_remains(
    hub: HubServer, adapter: Path, fault: dict[str, int], reason: str, state: str
) -> None:
    hub.faults = fault
    with pytest.raises(HubError) as failure:
        al.push(adapter, "org/faulty")
    assert reason in str(failure.value)
    assert state in str(failure.value)
    if "was created and is empty" in state:
        assert set(hub.repos["org/faulty"].branches["main"].files) == {".gitattributes"}
        hub.faults = {}
        assert not al.push(adapter, "org/faulty").created  # the same command again


def test_a_hub_that_is_not_reached(hub: HubServer, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(HubError, match=r"the hub at http://127.0.0.1:\d+ is not reached .*nothing was created"):
        al.push(adapter, "org/far")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE is set"):
        al.push(adapter, "org/far")


def test_changes_by_others_and_files_that_did_not_arrive(hub: HubServer, adapter: Path) -> None:
    repo = hub.repo("org/shared")
    place = find_repository("org/shared", public=False)
    head = repo.branches["main"]
    repo.add("main", dataclasses.replace(head, oid=oid_of("other"), files={**head.files, "theirs.txt": b"new"}))
    with pytest.raises(HubError, match="the branch has changed since this push began"):
        upload(adapter, place, "mine")
    hub.ignored = ("rank_plan.json",)
    with pytest.raises(HubError, match=r"does not hold what was sent: rank_plan.json is missing"):
        al.push(adapter, "org/ignoring")


def test_unsafe_unproven_and_invalid_are_not_pushed(
    hub: HubServer, adapter: Path, llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    for name in ("adapter_config.json", "adaptive_lora.json", "rank_plan.json"):
        (pickled / name).write_bytes((adapter / name).read_bytes())
    torch_weights = load_file(adapter / "adapter_model.safetensors")
    assert torch_weights
    (pickled / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(AdapterError, match=r"pickled weights \(adapter_model.bin\)"):
        al.push(pickled, "org/unsafe")
    with pytest.raises(AdapterError, match="is no adapter folder"):
        al.push(tmp_path / "nowhere", "org/unsafe")
    with pytest.raises(HubError, match=r'"license" must be one of'):
        al.push(adapter, "org/licensed", license="mine")
    monkeypatch.setenv("ADAPTIVE_LORA_BASE", str(llama_folder))
    with pytest.raises(AdapterError, match=r"cannot be loaded on its base .*nothing was pushed"):
        al.push(adapter, "org/unsafe")
    assert set(hub.repos) == {"org/licensed"}


BEFORE_TORCH = """
import sys
from click.testing import CliRunner
from adaptive_lora.cli import main

def told(message, *words):
    done = CliRunner().invoke(main, ["export", "anything", *words])
    assert done.exit_code == 2, done.output
    assert message in done.output, done.output

told("'alone' is no name of a repository on the hub: it has no organisation", "--push", "alone")
told("is no name of a repository on the hub", "--push", "org/name--x")
told("is no name of a repository on the hub", "--push", "a/b/c")
told("is no name of a branch", "--push", "org/x", "--revision", "a..b")
told("is no licence of the hub", "--push", "org/x", "--license", "My Licence")
told("the message of the commit is empty", "--push", "org/x", "--commit-message", " ")
told("needs a token with write access", "--push", "org/x")
told("got the folder out and --push", "out", "--push", "org/x")
told("got --uniform and --merged", "--push", "org/x", "--merged", "--uniform")
told("--public is for --push", "out", "--uniform", "--public")
told("needs a folder OUT, or --push", "--uniform")
assert not {"torch", "mlflow", "transformers"} & set(sys.modules)
"""


def test_wrong_input_is_told_before_torch_is_loaded(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if "TOKEN" not in key} | {"HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", BEFORE_TORCH], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_token_of_a_login(hub: HubServer, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its shape is not that of the hub's own tokens, so that no pattern of them hides it."""
    (tmp_path / "token").write_text("plain-token-of-a-login")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    with pytest.raises(HubError, match="does not accept the token") as failure:
        al.push(adapter, "org/login")
    assert hub.requests[-1].headers["authorization"] == "Bearer plain-token-of-a-login"
    hub.echo = "plain-token-of-a-login"
    with pytest.raises(HubError, match=r"\*\*\*") as failure:
        al.push(adapter, "org/login")
    assert "plain-token-of-a-login" not in str(failure.value)


@pytest.mark.long
def test_a_push_from_a_shell(hub: HubServer, adapter: Path, tmp_path: Path) -> None:
    """Everything by documented variables, in a process of its own; the token is in the file that a login writes."""
    (tmp_path / "token").write_text(TOKEN)
    environment = {key: value for key, value in os.environ.items() if key not in ("HF_TOKEN", "HF_HUB_OFFLINE")}
    environment |= {"HF_HOME": str(tmp_path), "HF_ENDPOINT": hub.address, "HF_HUB_DISABLE_XET": "1"}
    words = [sys.executable, "-m", "adaptive_lora.cli", "export", str(adapter), "--push", "org/shell"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert set(hub.repos["org/shell"].branches["main"].files) > FILES
    assert TOKEN not in done.stdout + done.stderr
