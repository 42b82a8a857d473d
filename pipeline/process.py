"""What every process of the pipeline does first, be it the launcher, a job or a stage run by hand."""

from __future__ import annotations

import getpass
import os
import pwd

from pipeline.errors import print_whatever_the_locale, redact_uncaught


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
