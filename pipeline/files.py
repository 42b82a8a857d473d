"""Files that are whole or not there, who may read them, and what may be read in a store of several people.

Whoever else may write to a folder can have put a link, a pipe or a device where a file is expected: nothing
is written through a link below the store, and nothing waits for a pipe.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

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


MOST_BYTES = 1 << 30  # of a file that is read whole


def open_regular(path: str | Path, *, follow: bool = True) -> BinaryIO:
    """Open a file for reading; a pipe, which would block, or a device, which may have no end, is refused.

    Args:
        path: of the file.
        follow: whether a link in its place is gone through.

    Raises:
        OSError: there is no such file, it cannot be read, or it is no regular one.
    """
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (0 if follow else os.O_NOFOLLOW)
    number = os.open(path, flags)
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise OSError(errno.EINVAL, "is no regular file", str(path))
    return os.fdopen(number, "rb", buffering=0)


def read_regular(path: str | Path, *, most: int = MOST_BYTES, follow: bool = False) -> bytes:
    """The content of a regular file of at most so many bytes.

    Raises:
        OSError: as :func:`open_regular`, or it is larger.
    """
    with open_regular(path, follow=follow) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise OSError(errno.EFBIG, f"is larger than {most} bytes", str(path))
        return file.read()


def make_folder_below(root: Path, relative: str) -> Path:
    """Make a folder and those above it, below one that may be anywhere, without going through links.

    Args:
        root: is made where missing; links to it are the user's own.
        relative: of the folder, from there.

    Raises:
        UserError: a link, or a file, stands in the place of a folder.
        OSError: it cannot be made.
    """
    root.mkdir(parents=True, exist_ok=True)
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    opened = os.open(root, flags & ~os.O_NOFOLLOW)
    path = root
    try:
        for name in Path(relative).parts:
            path = path / name
            with contextlib.suppress(FileExistsError):
                os.mkdir(name, dir_fd=opened)
            try:
                inner = os.open(name, flags, dir_fd=opened)
            except OSError as error:
                if error.errno not in (errno.ELOOP, errno.ENOTDIR):
                    raise
                what = "a link" if path.is_symlink() else "a file"
                raise UserError(
                    f"{path} is {what}; below the store nothing is written through links: remove it, or put a"
                    " folder in its place"
                ) from None
            os.close(opened)
            opened = inner
    finally:
        os.close(opened)
    return path


def odd_entries(folder: Path) -> Iterator[Path]:
    """What in a folder, at any depth, is neither a regular file nor a folder: links, pipes, devices."""
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.is_dir(follow_symlinks=False):
                yield from odd_entries(Path(entry.path))
            elif not entry.is_file(follow_symlinks=False):
                yield Path(entry.path)


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
