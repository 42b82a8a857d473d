"""What every process of the pipeline does first, be it the launcher, a job or a stage run by hand."""

from __future__ import annotations

import getpass
import os
import pwd
import sys

from pipeline.errors import print_whatever_the_locale, redact_uncaught


def require_utf8() -> None:
    """Start this program again in Python's UTF-8 mode where the locale has file names in another encoding.

    Names are UTF-8 on every disk that this meets; in an ISO-8859-1 locale they would be read as other ones,
    and become classes, keys and tables. What is printed stays in the terminal's encoding.
    """
    if sys.getfilesystemencoding().lower().replace("-", "") == "utf8" or sys.flags.utf8_mode:
        return
    encoding = sys.stdout.encoding if sys.stdout else "utf-8"
    os.environ["PYTHONUTF8"] = "1"
    os.environ.setdefault("PYTHONIOENCODING", f"{encoding}:backslashreplace")
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def set_up_process() -> None:
    """Print in any locale, hide secrets in tracebacks, and give a user without a passwd entry a name.

    Containers run under user ids that /etc/passwd lacks; libraries (torch among them) ask for the user's name
    to name a cache folder, and fail there.
    """
    redact_uncaught()
    print_whatever_the_locale()
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["LOGNAME"] = user_name()


def user_name() -> str:
    """Who runs this process, by the user database; ``uid54321`` where that lacks the user id."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return f"uid{os.getuid()}"
