"""Uploading a finished output to the HuggingFace Hub.

The Hub keeps large files by their sha256 and takes none twice, so an upload that was cut off goes on
where it stopped when it is made again. All of it becomes visible in one commit, which also deletes what
loaders would take for weights of this model: those of an earlier upload.

The token comes from where ``hf auth login`` puts it, or from ``HF_TOKEN``; nothing here prints or
stores it.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from streamconv._version import __version__
from streamconv.errors import StreamconvError, UsageError

_REPO = re.compile(r"(?:[\w.-]{1,96}/)?[\w.-]{1,96}", re.ASCII)
_AGAIN = "the same command again goes on: files that are there already are not sent twice"


# What transformers, PEFT, vLLM and their like look for in a repository, or take whatever its name:
# weights in their formats, the indexes of these, adapters, and the quantization of an older upload.
_LOADED = (
    *("*.safetensors", "*.safetensors.index.json"),
    *("pytorch_model*.bin", "pytorch_model*.bin.index.json"),
    *("adapter_model*", "adapter_config.json"),
    *("consolidated*.pth", "consolidated*.pt", "consolidated*.bin"),
    *("tf_model*.h5", "tf_model*.h5.index.json"),
    *("flax_model*.msgpack", "flax_model*.msgpack.index.json"),
    "hf_quant_config.json",
)


def outdated(there: Iterable[str], uploaded: Collection[str]) -> list[str]:
    """Return what lies in a repository and would be loaded beside, or instead of, what is uploaded.

    >>> outdated(["model.safetensors", "README.md"], ["model-00001-of-00002.safetensors"])
    ['model.safetensors']
    """
    return sorted(
        name
        for name in set(there).difference(uploaded)
        if "/" not in name and any(fnmatchcase(name, pattern) for pattern in _LOADED)
    )


def check_upload(repo: str) -> None:
    """Raise what would make :func:`upload` fail, before hours of work: a bad name, no token.

    Raises :class:`UsageError`.
    """
    if not _REPO.fullmatch(repo) or ".." in repo or "--" in repo:
        raise UsageError("not a repository name", found=repo, expected="ORG/NAME")
    # Xet's uploader takes gigabytes for its buffers; plain LFS streams a file. Read on import.
    os.environ.setdefault("HF_HUB_DISABLE_XET", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    with _secrets_kept(repo):
        from huggingface_hub import constants, get_token

        if constants.HF_HUB_OFFLINE:
            raise UsageError("HF_HUB_OFFLINE is set: nothing can be uploaded")
        if not get_token():
            raise UsageError(
                "there is no token for the Hub", hint="`hf auth login`, or set HF_TOKEN; then again"
            )


def upload(
    folder: Path,
    repo: str,
    *,
    private: bool = False,
    before_delete: Callable[[list[str]], None] = lambda _: None,
) -> str:
    """Upload a folder as the model repository ``repo``, made where it does not exist; return its URL.

    With ``private`` a repository that is public already is refused. ``before_delete`` is told which
    files of an earlier upload the commit will delete: see :func:`outdated`. Raises :class:`UsageError`
    for what the user can mend, :class:`StreamconvError` where the Hub or the network fails.
    """
    check_upload(repo)
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    with _secrets_kept(repo):
        api = HfApi(library_name="streamconv", library_version=__version__)
        url = api.create_repo(repo, private=private, repo_type="model", exist_ok=True)
        there = api.model_info(url.repo_id)
        if private and not there.private:
            raise UsageError(
                "the repository is there already, and public",
                where=repo,
                hint="choose another name, or make it private first",
            )
        names = _names(folder)
        old = outdated((file.rfilename for file in there.siblings or ()), names)
        if old:
            before_delete(old)
        additions = [CommitOperationAdd(name, folder / name) for name in names]
        api.preupload_lfs_files(url.repo_id, additions, free_memory=False)
        ignored = [a.path_in_repo for a in additions if getattr(a, "_should_ignore", False)]
        if ignored:
            raise UsageError(
                "the .gitignore of the repository leaves out files of the model",
                where=repo,
                found=", ".join(ignored[:5]),
                hint="remove these lines there, then the same command again",
            )
        api.create_commit(
            url.repo_id,
            [*additions, *(CommitOperationDelete(name, is_folder=False) for name in old)],
            commit_message=f"Upload with streamconv {__version__}",
            # What was looked at is what is replaced: somebody else's commit meanwhile is refused.
            parent_commit=there.sha,
        )
    parts = urlsplit(str(url))
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def _names(folder: Path) -> list[str]:
    """Return the files of an output; what is hidden is not part of it."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(p.as_posix() for p in paths if not any(part[0] == "." for part in p.parts))


@contextmanager
def _secrets_kept(repo: str) -> Iterator[None]:
    """Turn whatever the Hub's client raises into an error that holds no secret, and keep it silent.

    Its messages and its log name URLs: with the password of ``HF_ENDPOINT`` in them, or signed ones.
    So only a status or a type is told, with no cause for a traceback to show.
    """
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import logging as hub_logging

    verbosity = hub_logging.get_verbosity()
    hub_logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code
        hint = _AGAIN
        if status == 412:
            hint = f"somebody else has written there meanwhile; {_AGAIN}"
        if status in (401, 403):
            hint = "the token must be allowed to write there: `hf auth whoami`, `hf auth login`"
        raise StreamconvError(
            "the Hub refused the upload", where=repo, found=f"HTTP {status}", hint=hint
        ) from None
    except UsageError:
        raise
    except Exception as error:  # noqa: BLE001 - the client's HTTP library changes with its release
        raise StreamconvError(
            "the upload was cut off", where=repo, found=type(error).__name__, hint=_AGAIN
        ) from None
    finally:
        hub_logging.set_verbosity(verbosity)
