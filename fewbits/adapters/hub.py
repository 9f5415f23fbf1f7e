"""Model references: the values of a MODEL argument.

path/to/directory        Hugging Face directory, or a native one
path/to/model.gguf       GGUF
org/name[@revision]      the hub: safetensors, json and tokenizer files only (`upload` writes there)
demo:smollm2             the demo model, made once and cached
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from ..errors import FileError
from ..storage.cache import cache_folder

_HUB_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
_PATTERNS = ("*.safetensors", "*.json", "tokenizer.model", "*.jinja", "merges.txt", "README.md", "LICENSE*")


def resolve(reference: str, cache_dir: Path | None = None) -> Path:
    """A model reference -> a local file or directory, downloaded to `cache_dir` (default: the cache) if
    needed.

    An existing path has priority over a hub name. Raises FileError that says what was tried.
    """
    cache_dir = cache_dir or cache_folder()
    if reference == "demo:smollm2":
        from . import smollm2

        return smollm2.obtain(cache_dir)
    path = Path(reference).expanduser()
    if path.exists() or path.is_symlink():
        return path
    name = _HUB_NAME.fullmatch(reference)
    if name is None or reference.endswith(".gguf"):
        raise FileError(
            f"{reference}: no such file or directory, and no reference of another kind; give a directory, a "
            ".gguf file, a hub name org/name[@revision], or demo:smollm2"
        )
    return _download(name[1], name[2], cache_dir)


def _download(name: str, revision: str | None, cache_dir: Path) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        folder = snapshot_download(
            name, revision=revision, cache_dir=cache_dir / "hub", allow_patterns=list(_PATTERNS)
        )
    except RevisionNotFoundError as error:
        raise FileError(
            f"{name}: the hub has no revision {revision!r}; check it on the model's page"
        ) from error
    except RepositoryNotFoundError as error:
        raise FileError(
            f"{name}: neither a local path nor a model on the hub that you may read; check the name, or log "
            "in (hf auth login) if it is private or gated"
        ) from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise FileError(
            f"{name}: not a local path, and the hub cannot be reached ({type(error).__name__}: {reason}); go "
            "online once, or give a local directory"
        ) from error
    return Path(folder)


def upload(repo: str, files: Mapping[str, Path], private: bool) -> str:
    """Files by their name in the repository -> its address; the repository is created if missing.

    Raises FileError for an invalid name, or if the hub refuses.
    """
    if _HUB_NAME.fullmatch(repo) is None or "@" in repo:
        raise FileError(f"{repo}: is no repository; give org/name")
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    api = HfApi()
    added = [CommitOperationAdd(name, str(path)) for name, path in files.items()]
    try:
        address = api.create_repo(repo, private=private, exist_ok=True)
        api.create_commit(repo, added, commit_message="Quantized by fewbits")
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise FileError(
            f"{repo}: not uploaded ({type(error).__name__}: {reason}); log in (hf auth login), go online, "
            "and run `fewbits push` again: the output is whole"
        ) from error
    return str(address)
