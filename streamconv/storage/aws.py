"""Where the AWS command line keeps what obstore does not look for: the profiles in ``~/.aws``."""

from __future__ import annotations

import configparser
import contextlib
import os
from pathlib import Path
from typing import Any

_KEYS = (
    "aws_access_key_id",
    "aws_secret_access_key",
    "aws_session_token",
    "region",
    "endpoint_url",
)
_OF_ENVIRONMENT = ("AWS_ACCESS_KEY_ID", "AWS_WEB_IDENTITY_TOKEN_FILE")
_CONTAINER = ("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "AWS_CONTAINER_CREDENTIALS_FULL_URI")


def source() -> str:
    """Return in words where credentials come from; never what they are."""
    if os.environ.get("AWS_SKIP_SIGNATURE", "").lower() in ("1", "true"):
        return "none (AWS_SKIP_SIGNATURE)"
    for name in (*_OF_ENVIRONMENT, *_CONTAINER):
        if os.environ.get(name):
            return name
    profile = os.environ.get("AWS_PROFILE", "default")
    if "aws_access_key_id" in _profile():
        return f"the profile {profile} in ~/.aws"
    return "the machine's role (nothing in the environment or in ~/.aws)"


def settings() -> dict[str, Any]:
    """Return the settings for obstore beyond what it takes by itself."""
    config: dict[str, Any] = {}
    found = _profile()
    if not any(os.environ.get(n) for n in (*_OF_ENVIRONMENT, *_CONTAINER)):
        config = {k: found[k] for k in _KEYS[:3] if k in found}
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if "region" in found and not region:
        config["region"] = found["region"]
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    endpoint = endpoint or found.get("endpoint_url")
    if endpoint:
        config["endpoint"] = endpoint
    return config


def _profile() -> dict[str, str]:
    """Return what the files say of the chosen profile."""
    name = os.environ.get("AWS_PROFILE", "default")
    home = Path(os.environ.get("HOME", "/")) / ".aws"
    found: dict[str, str] = {}
    for variable, file, section in (
        ("AWS_CONFIG_FILE", "config", name if name == "default" else f"profile {name}"),
        ("AWS_SHARED_CREDENTIALS_FILE", "credentials", name),
    ):
        parser = configparser.ConfigParser(interpolation=None)
        with contextlib.suppress(OSError, configparser.Error, UnicodeDecodeError):
            parser.read(os.environ.get(variable) or home / file)
            if parser.has_section(section):
                found |= {k: v for k, v in parser.items(section) if k in _KEYS}
    return found
