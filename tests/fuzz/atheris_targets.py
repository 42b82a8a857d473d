"""Coverage-guided fuzzing of the readers: `python tests/fuzz/atheris_targets.py TARGET [libFuzzer options]`.

TARGET is one of fuzz_targets.TARGETS; options such as -runs=100000 or -max_total_time=300, and folders of
inputs, go to libFuzzer. A sound input is the first seed. An input that breaks a reader is written to
crash-HASH in the working directory. Atheris comes with the `dev` extra.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import warnings
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["pipeline", "shards", "slurm", "yaml", "PIL", "csv", "tarfile"]):
    from fuzz_targets import TARGETS

WORDS = Path(__file__).with_name("words.dict")


def main() -> None:
    """Fuzz one target until told to stop, or until an input breaks it."""
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        sys.exit(f"usage: {sys.argv[0]} {'|'.join(TARGETS)} [libFuzzer options]")
    target = TARGETS[sys.argv.pop(1)]
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as made:
        seeds, folder = Path(made, "seeds"), Path(made, "own")
        seeds.mkdir()
        (seeds / "sound").write_bytes(target.sound())

        def run(data: bytes) -> None:
            folder.mkdir()
            try:
                target.run(folder, data)
            finally:
                shutil.rmtree(folder)

        options = [f"-dict={WORDS}", "-max_len=32768", "-timeout=20", "-rss_limit_mb=2048"]
        atheris.Setup([sys.argv[0], *options, *sys.argv[1:], str(seeds)], run)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
