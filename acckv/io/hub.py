"""Names of the hub, and downloads under them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from acckv.errors import InputError


def is_hub_id(name: str | Path) -> bool:
    """Whether `name` reads as `org/name` and nothing lies there on this machine."""
    return not Path(name).exists() and not str(name).startswith((".", "/")) and str(name).count("/") == 1


def download(name: str, what: str, **options: Any) -> Path:
    """The folder of a hub repository's snapshot.

    Args:
        name: `org/name`, or `org/name@revision`.
        what: it is, for the message.
        options: of `huggingface_hub.snapshot_download`.

    Raises:
        InputError: there is none, or the hub cannot be reached.
    """
    repository, _, revision = name.partition("@")
    try:
        return Path(snapshot_download(repository, revision=revision or None, **options))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(f"is neither a folder nor {what} that can be reached", source=name) from error
