"""Files that are whole or not there, and who may read them."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import uuid
from pathlib import Path

from pipeline.errors import UserError

UMASK_VARIABLE = "CASS_UMASK"
UMASK = 0o027  # files 0640 and folders 0750, whatever the caller's own


def chosen_umask() -> int:
    """The umask that CASS_UMASK asks for (``007``: the group may write, as in a shared store), else 027.

    Every process that writes results sets it once, at its start: so all files obey it, those that libraries
    make too.

    Raises:
        UserError: no octal number, one that takes rights from the owner, or one that lets everybody write.
    """
    said = os.environ.get(UMASK_VARIABLE)
    if not said:
        return UMASK
    if not re.fullmatch(r"0?0[0-7][2367]", said):
        raise UserError(
            f"{UMASK_VARIABLE} is {said!r}; expected an octal number such as 027 or 007, which leaves"
            " the owner's rights and takes the right to write from others"
        )
    return int(said, 8)


def write_atomically(path: Path, content: bytes | memoryview, *, sync: bool = True) -> None:
    """Write a file so that a reader sees the old one or the new one, never half of either.

    Args:
        path: its folder must exist.
        sync: whether to wait for the disk, before the file appears under its name and after that.

    Raises:
        OSError: the old file is as it was, and nothing else is left; or, if only the folder could not be put
            on disk, the new one is there.
    """
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.part")
    try:
        with open(part, "xb") as file:
            file.write(content)
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    if sync:
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Wait until a folder's names are on disk, so that a loss of power takes none of them back.

    Raises:
        OSError: they could not be written. (That a file system cannot do this for folders is passed over.)
    """
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(opened)


def look_for_new_files(folder: Path) -> None:
    """Have a network file system ask its server what is in a folder."""
    with contextlib.suppress(OSError):
        os.listdir(folder)
