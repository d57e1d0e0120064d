"""Files on the Hugging Face hub, by the hub's own client: put one there with a model card, or get one.

Nothing here imports the client before it is used. Without a network, files that were fetched before are found in the
client's cache; ``HF_HUB_OFFLINE=1`` asks for nothing else.
"""

from __future__ import annotations

import contextlib
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

_HTTPS = 443
_CONNECT_SECONDS = 5.0

README = "README.md"


class HubError(OSError):
    """Raised if a file cannot be put on the hub or fetched from it; the message names the fix."""


def answers(name: str) -> bool:
    """Whether the hub can be reached for files of ``name``; without a network, requests would take half a minute.

    True where ``name`` exists here, so that the hub is not needed.
    """
    from huggingface_hub import constants

    hub = urlsplit(constants.ENDPOINT)
    if Path(name).exists() or getproxies() or hub.hostname is None:  # a proxy may reach other hosts
        return True
    return _connects(hub.hostname, hub.port or _HTTPS)


def _connects(host: str, port: int) -> bool:
    """Whether a connection opens within the time limit, all of the host's addresses and looking them up included."""
    opened: list[bool] = []

    def connect() -> None:
        with contextlib.suppress(OSError):
            socket.create_connection((host, port), timeout=_CONNECT_SECONDS).close()
            opened.append(True)

    # neither looking up a name nor the number of addresses that are tried one after another has a limit of its own
    thread = threading.Thread(target=connect, name="moe-route-hub", daemon=True)
    thread.start()
    thread.join(_CONNECT_SECONDS)
    return bool(opened)


def publish(
    save: Callable[[Path], None],
    repo_id: str,
    filename: str,
    readme: str,
    *,
    repo_type: str = "model",
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    commit_message: str | None = None,
) -> str:
    """Save a file and upload it; the repository, and its README, are made if it has none. Returns the file's address.

    Args:
        save: writes the file to a path.
        readme: text of the README.

    Raises ``HubError`` if the hub refuses, or cannot be reached, and ``ImportError`` without ``huggingface_hub``.
    """
    client = _client()
    api = client.HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder, _explained(f"put {filename} into {repo_id!r}"):
        path = Path(folder) / Path(filename).name
        save(path)
        api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True)
        message = commit_message or f"Upload {filename} with moe-route"
        if not api.file_exists(repo_id, README, repo_type=repo_type, revision=revision):
            api.upload_file(
                path_or_fileobj=readme.encode(),
                path_in_repo=README,
                repo_id=repo_id,
                repo_type=repo_type,
                revision=revision,
                commit_message="Describe the files",
            )
        commit = api.upload_file(
            path_or_fileobj=str(path),
            path_in_repo=filename,
            repo_id=repo_id,
            repo_type=repo_type,
            revision=revision,
            commit_message=message,
        )
    return str(commit)


def fetch(
    repo_id: str,
    filename: str,
    *,
    repo_type: str = "model",
    revision: str | None = None,
    token: str | None = None,
    local_files_only: bool = False,
) -> Path:
    """Path of a file of a repository in the client's cache, fetched if it is not there.

    Raises ``HubError`` if it cannot be had, and ``ImportError`` without ``huggingface_hub``.
    """
    client = _client()
    with _explained(f"get {filename} from {repo_id!r}"):
        return Path(
            client.hf_hub_download(
                repo_id,
                filename,
                repo_type=repo_type,
                revision=revision,
                token=token,
                local_files_only=local_files_only,
            )
        )


def card(title: str, content: str, use: str, *, base_model: str | None = None, tags: tuple[str, ...] = ()) -> str:
    """A README for the hub: metadata, a title, what the file holds, and how to use it."""
    lines = ["---", "library_name: moe-route", "tags:", *(f"- {tag}" for tag in ("moe-route", *tags))]
    # a base model is named as on the hub, "owner/name"; anything else would be refused
    lines += [f"base_model: {base_model}"] if base_model and base_model.count("/") == 1 else []
    return "\n".join([*lines, "---", "", f"# {title}", "", "```", content, "```", "", "```python", use, "```", ""])


def _client() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ImportError("the hub needs its client: pip install 'moe-route[hf]'") from error
    return huggingface_hub


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    """Raise ``HubError`` that names the fix, for every error of the client."""
    from huggingface_hub import errors

    transport: Any = errors.HfHubHTTPError.__bases__[0]  # base of the errors of the HTTP library that the client uses
    try:
        yield
    except HubError:
        raise
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        raise HubError(
            f"cannot {what}: the hub cannot be reached, and the file is not in the cache; go online, or fetch it once "
            "on a machine that shares the cache (HF_HOME)"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise HubError(f"cannot {what}: there is no such repository, or it is private: `hf auth login`") from error
    except errors.EntryNotFoundError as error:
        raise HubError(f"cannot {what}: the repository has no such file; pass its name, filename=...") from error
    except errors.RevisionNotFoundError as error:
        raise HubError(f"cannot {what}: there is no such revision; leave revision= out for the main branch") from error
    except errors.HFValidationError as error:
        raise HubError(f"cannot {what}: {error}; a repository is named owner/name") from error
    except (transport, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise HubError(f"cannot {what} ({reason}): check the network and the token, `hf auth login`") from error
