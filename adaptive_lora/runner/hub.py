"""A folder as one commit of a repository on the Hugging Face hub, read back afterwards.

Tokens are those that `huggingface_hub` finds (`HF_TOKEN`, `hf auth login`); none is a parameter here, and none is in a
message. Large files are sent first and become visible by the commit alone: a push that is cut off publishes nothing.
"""

from __future__ import annotations

import hashlib
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from adaptive_lora.errors import AdaptiveLoraError, ConfigError, HubError, brief
from adaptive_lora.models.errors import is_bug
from adaptive_lora.redaction import HIDDEN

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import ModelInfo

MAIN = "main"
_LOADED = re.compile(
    r"adapter_(config\.json|model\..+)|adaptive_lora\.json|rank_plan\.json|family\.json|config\.json"
    r"|(trained|model|pytorch_model)[\w.-]*\.(safetensors|bin|json)"
)
"""Pattern of files that loaders of adapters and models read: those of an earlier push that a new one does not have
are deleted with it, or the two would be loaded together."""
_BRANCH = re.compile(r"(?![-/.])(?!.*(//|\.\.|@\{|\.lock$|[/.]$))[\w./-]{1,200}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Repository:
    """A repository on the hub before a push, and the choices of its user."""

    name: str
    """`ORG/NAME`."""
    branch: str
    exists: bool
    private: bool
    """Mark of a repository that its members alone can read; of a new one, the choice for it."""
    new_branch: bool
    """Mark of a branch that the push creates, from the head of `main`."""
    head: str | None
    """Commit that the push follows; None: the first of the repository."""
    files: tuple[str, ...]
    """Names of the files at that commit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pushed:
    """A commit on the hub that was read back."""

    repository: str
    """`ORG/NAME`."""
    branch: str
    url: str
    """Address of the branch."""
    commit: str
    """Hash of the commit."""
    private: bool
    """Mark of a repository that its members alone can read."""
    created: bool
    """Mark of a repository that this push created."""
    unchanged: bool
    """Mark of a push without a commit, because the branch had the same files."""
    sha256: dict[str, str]
    """Name of each file -> SHA-256 of its content, equal on both sides."""
    replaced: tuple[str, ...]
    """Names of files of the repository that have new content."""
    deleted: tuple[str, ...]
    """Names of files of an earlier adapter or model that were deleted."""
    kept: tuple[str, ...]
    """Names of other files of the repository, which are unchanged."""
    left_out: tuple[str, ...] = ()
    """Names of files in the adapter's folder that are not part of an adapter, and were not sent."""

    def lines(self) -> list[str]:
        """Return what happened, in lines for a person."""
        readers = "private: its members alone can read it" if self.private else "public: everybody can read it"
        state = "created" if self.created else "existed, and its visibility is unchanged"
        found = [
            f"pushed     {self.url}",
            f"readers    {readers} ({state})",
            f"commit     {self.commit}{' (no new one: the branch had these files)' if self.unchanged else ''}",
            f"files      {len(self.sha256)}, read back with equal SHA-256: {', '.join(self.sha256)}",
        ]
        for title, names in (("replaced", self.replaced), ("deleted", self.deleted), ("kept", self.kept)):
            if names:
                found.append(f"{title:<10} {len(names)} of the repository: {', '.join(names)}")
        if self.left_out:
            found.append(
                f"not sent   {len(self.left_out)} that are not part of the adapter: {', '.join(self.left_out)}"
            )
        return found


def require_repository_name(name: str) -> None:
    """Raise ConfigError for anything but ORG/NAME as the hub allows it."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
        reason = "" if name.count("/") == 1 else "it has no organisation or user before a slash"
    except HFValidationError as error:
        reason = brief(error).rstrip(".")
    if reason:
        raise ConfigError(
            f"'{name:.200}' is no name of a repository on the hub: {reason}. Required ORG/NAME of letters, digits, "
            "'-', '_' and '.', such as my-team/my-adapter."
        )


def require_branch_name(branch: str) -> None:
    """Raise ConfigError for a name that git does not allow for a branch."""
    if not _BRANCH.fullmatch(branch):
        raise ConfigError(f"'{branch:.200}' is no name of a branch: required such as main, or run-2.")


def find_repository(name: str, *, public: bool, branch: str = MAIN, update: bool = False) -> Repository:
    """Return a repository as it is, once the user's choices are found to allow a push.

    Args:
        name: `ORG/NAME`.
        public: whether everybody may read it.
        branch: branch to commit to.
        update: whether files of a repository that has an adapter, a model or other files may be replaced.

    Raises:
        ConfigError: the choices contradict each other or what exists.
        HubError: there is no token, or the hub does not answer.
    """
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    if constants.is_offline_mode():
        raise ConfigError("HF_HUB_OFFLINE is set, and a push needs the hub; unset it, or export to a folder.")
    with _hub_errors(name, None, "nothing was created or changed"):
        token = get_token()
    if not token:
        raise HubError(
            f"a push to {name} needs a token with write access to it, and none is found: set HF_TOKEN, or run "
            "`hf auth login`. Nothing was created or changed."
        )
    api = HfApi(token=token)
    with _hub_errors(name, token, "nothing was created or changed"):
        try:
            info = api.model_info(name)
        except RepositoryNotFoundError:
            return Repository(
                name=name, branch=branch, exists=False, private=not public,
                new_branch=branch != MAIN, head=None, files=(),
            )  # fmt: skip
        _require_consent(name, bool(info.private), public)
        new_branch = False
        if branch != MAIN:
            try:
                info = api.model_info(name, revision=branch)
            except RevisionNotFoundError:
                new_branch = True
    files = tuple(sorted(sibling.rfilename for sibling in info.siblings or ()))
    mine = [file for file in files if file not in (".gitattributes", ".gitignore")]
    if mine and not update and not new_branch:
        raise ConfigError(
            f"{name} exists, and its branch {branch} has {len(mine)} files ({', '.join(mine[:5])}"
            f"{', ...' if len(mine) > 5 else ''}); nothing was changed. Give --update to replace files of the same "
            "names and those of an earlier adapter or model, where all others stay, or a new branch by --revision."
        )
    return Repository(
        name=name, branch=branch, exists=True, private=bool(info.private),
        new_branch=new_branch, head=info.sha, files=files,
    )  # fmt: skip


def _require_consent(name: str, private: bool, public: bool) -> None:
    """Refuse to publish what was to be private, and the reverse; a push never changes who may read a repository."""
    if public and private:
        raise ConfigError(
            f"{name} exists and is private, and a push leaves it so; leave --public out, or change that on the hub."
        )
    if not public and not private:
        raise ConfigError(
            f"{name} exists and is public, and a push leaves it so: everybody could read the adapter. Give --public "
            "if that is meant, or another name."
        )


def upload(folder: Path, repository: Repository, message: str) -> Pushed:
    """Commit all files of a folder to a repository, and compare what is there with what was sent.

    Args:
        folder: flat folder of the files.
        repository: from `find_repository`; created if it does not exist.
        message: title of the commit.

    Raises:
        HubError: the hub refuses, cannot be reached, or has other files afterwards; the message says what remains.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token

    name, branch = repository.name, repository.branch
    token = get_token()
    api = HfApi(token=token)
    paths = {path.name: path for path in sorted(folder.iterdir())}
    local = {file: _sha256(path) for file, path in paths.items()}
    deleted = tuple(file for file in repository.files if file not in paths and _LOADED.fullmatch(file))
    with _progress():
        _prepare(api, token, repository)
        created = "" if repository.exists else f"; {name} was created and is empty"
        with _hub_errors(name, token, f"no commit was confirmed, so nothing of it is claimed to be there{created}"):
            done = api.create_commit(
                name,
                [
                    *(CommitOperationAdd(path_in_repo=file, path_or_fileobj=path) for file, path in paths.items()),
                    *(CommitOperationDelete(path_in_repo=file) for file in deleted),
                ],
                commit_message=message,
                revision=branch,
                parent_commit=repository.head,
            )
        with _hub_errors(name, token, f"commit {done.oid} was made, but could not be read back"):
            remote = _read_back(api, name, done.oid, local)
    wrong = sorted(file for file in local if remote.get(file) != local[file])
    if wrong:
        raise HubError(
            f"commit {done.oid} of {name} does not hold what was sent: {', '.join(wrong)} "
            f"{'is' if len(wrong) == 1 else 'are'} missing or different. Do not use it; look at "
            f"{api.endpoint}/{name}/commit/{done.oid} (a .gitignore there leaves files out)."
        )
    return Pushed(
        repository=name,
        branch=branch,
        url=f"{api.endpoint}/{name}" + ("" if branch == MAIN else f"/tree/{branch}"),
        commit=done.oid,
        private=repository.private,
        created=not repository.exists,
        unchanged=done.oid == repository.head,
        sha256=local,
        replaced=tuple(file for file in repository.files if file in paths),
        deleted=deleted,
        kept=tuple(file for file in repository.files if file not in paths and file not in deleted),
    )


def _prepare(api: HfApi, token: str | None, repository: Repository) -> None:
    """Create the repository and the branch where they do not exist."""
    name = repository.name
    if not repository.exists:
        with _hub_errors(name, token, "nothing was created"):
            api.create_repo(name, private=repository.private, exist_ok=False)
    if repository.new_branch:
        created = "" if repository.exists else f"{name} was created and is empty; "
        with _hub_errors(name, token, f"{created}no branch was created"):
            api.create_branch(name, branch=repository.branch)


def _read_back(api: HfApi, name: str, commit: str, local: dict[str, str]) -> dict[str, str]:
    """Return file -> SHA-256 at a commit: the hub's own of large files, that of a download of the others."""
    info: ModelInfo = api.model_info(name, revision=commit, files_metadata=True)
    found: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        for sibling in info.siblings or ():
            file = sibling.rfilename
            if file not in local:
                continue
            if sibling.lfs is not None:
                found[file] = sibling.lfs.sha256
            else:
                found[file] = _sha256(Path(api.hf_hub_download(name, file, revision=commit, local_dir=folder)))
    return found


def _sha256(path: Path) -> str:
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


@contextmanager
def _progress() -> Iterator[None]:
    """Show the hub's progress bars on a terminal alone."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    before = are_progress_bars_disabled()
    if not sys.stderr.isatty() and not before:
        disable_progress_bars()
    try:
        yield
    finally:
        if not sys.stderr.isatty() and not before:
            enable_progress_bars()


_STATUS = {
    401: "the hub does not accept the token; log in again by `hf auth login`, or set another HF_TOKEN",
    403: "the token has no permission to write there; required one with write access to it",
    409: "the name is taken, or another change is in progress",
    412: "the branch has changed since this push began; look at it and repeat the command",
    413: "the hub refuses files of this size",
    429: "the hub asks to wait because of too many requests; repeat the command later",
}
"""Status of an answer of the hub -> what it means."""


@contextmanager
def _hub_errors(name: str, token: str | None, state: str) -> Iterator[None]:
    """Convert errors of the hub's client into a HubError that says what has and has not happened.

    Args:
        name: repository.
        token: token in use, which the message is to hide.
        state: what is known to exist when an error occurs in the block.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, HTTPError  # type: ignore[attr-defined]

    try:
        yield
    except AdaptiveLoraError:
        raise
    except Exception as error:  # of huggingface_hub, its HTTP client and its uploader
        if is_bug(error):
            raise
        if isinstance(error, HfHubHTTPError):
            status, said = error.response.status_code, error.server_message or brief(error)
            reason = f"{_STATUS.get(status, 'the hub refuses')} ({status}: {said})"
        elif isinstance(error, HTTPError):  # of the HTTP client: no connection, or one that broke
            reason = f"the hub at {constants.ENDPOINT} is not reached ({brief(error)})"
        else:
            reason = brief(error) + (f" ({brief(error.__cause__)})" if error.__cause__ is not None else "")
        text = f"push to {name}: {reason}. State: {state}."
        raise HubError(text.replace(token, HIDDEN) if token else text) from error
