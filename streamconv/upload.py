"""Uploading a finished output to the HuggingFace Hub.

The Hub keeps large files by their sha256 and takes none twice, so an upload that was cut off goes on
where it stopped when it is made again. The token comes from where ``hf auth login`` puts it, or from
``HF_TOKEN``; nothing here prints or stores it.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from streamconv._version import __version__
from streamconv.errors import StreamconvError, UsageError

_REPO = re.compile(r"(?:[\w.-]{1,96}/)?[\w.-]{1,96}", re.ASCII)
_AGAIN = "the same command again goes on: files that are there already are not sent twice"


def check_upload(repo: str) -> None:
    """Raise what would make :func:`upload` fail, before hours of work: a bad name, no token.

    Raises :class:`UsageError`.
    """
    if not _REPO.fullmatch(repo) or ".." in repo or "--" in repo:
        raise UsageError("this is no name of a repository", found=repo, expected="ORG/NAME")
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


def upload(folder: Path, repo: str, *, private: bool = False) -> str:
    """Upload a folder as the model repository ``repo``, made where it does not exist; return its URL.

    With ``private`` a repository that is public already is refused. Raises :class:`UsageError` for
    what the user can mend, :class:`StreamconvError` where the Hub or the network fails.
    """
    check_upload(repo)
    from huggingface_hub import HfApi

    with _secrets_kept(repo):
        api = HfApi(library_name="streamconv", library_version=__version__)
        url = api.create_repo(repo, private=private, repo_type="model", exist_ok=True)
        if private and not api.repo_info(url.repo_id, repo_type="model").private:
            raise UsageError(
                "the repository is there already, and public",
                where=repo,
                hint="choose another name, or make it private first",
            )
        api.upload_folder(
            repo_id=url.repo_id,
            folder_path=folder,
            repo_type="model",
            ignore_patterns=[".*"],
            commit_message=f"Upload with streamconv {__version__}",
        )
    parts = urlsplit(str(url))
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


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
