"""A benchmark by its hub id: what was downloaded, with its archives unpacked, as the folder that a loader reads.

    load_benchmark("worldsense", "honglyhly/WorldSense")
    load_benchmark("video_mme", "lmms-lab/Video-MME@<commit>")

Downloads stay in the hub's own cache. Where a data set keeps its videos in archives, these are unpacked once into the
user's cache folder, beside links to all other files; so the videos are on the disk twice.
"""

from __future__ import annotations

import os
import shutil
import tarfile
import zipfile
from pathlib import Path

from acckv.data.synthetic.clips import default_root
from acckv.errors import InputError
from acckv.io.files import whole_folder
from acckv.io.hub import download, is_hub_id
from acckv.io.progress import Progress

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz")
UNPACKED = "hub"
"""Folder of the user's cache that archives are unpacked to."""


def local_folder(root: str | Path) -> Path:
    """`root` itself if it is a folder; otherwise the hub's data set of that name, `org/name` or `org/name@revision`.

    Raises:
        InputError: neither, the hub cannot be reached, or an archive is broken.
    """
    if Path(root).is_dir():
        return Path(root)
    if not is_hub_id(root):
        raise InputError("no such folder, and no hub id (org/name)", source=root)
    snapshot = download(str(root), "a data set of the hub", repo_type="dataset")
    repository = str(root).partition("@")[0]
    files = sorted(file for file in snapshot.rglob("*") if file.is_file())
    if not any(file.name.endswith(ARCHIVES) for file in files):
        return snapshot
    unpacked = default_root().parent / UNPACKED / repository.replace("/", "--") / snapshot.name
    if not unpacked.is_dir():
        with whole_folder(unpacked) as partial, Progress(f"unpacking {repository}", len(files), "files") as seen:
            for file in files:
                _put(file, partial / file.relative_to(snapshot).parent)
                seen.advance()
    return unpacked


def _put(file: Path, folder: Path) -> None:
    """Put the files of an archive into a folder, or a link to any other file."""
    folder.mkdir(parents=True, exist_ok=True)
    if not file.name.endswith(ARCHIVES):
        (folder / file.name).symlink_to(os.path.abspath(file))
        return
    try:
        if file.name.endswith(".zip"):
            # zipfile itself drops the parts of a member's name that would lead out of the folder.
            shutil.unpack_archive(file, folder, "zip")
        else:
            shutil.unpack_archive(file, folder, "gztar" if file.name.endswith("gz") else "tar", filter="data")
    except (zipfile.BadZipFile, tarfile.TarError, shutil.ReadError, EOFError, OSError) as error:
        raise InputError(f"cannot be unpacked ({error}); is it cut off?", source=file) from error
