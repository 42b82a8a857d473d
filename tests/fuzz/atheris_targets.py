"""Coverage-guided fuzzing: `python tests/fuzz/atheris_targets.py TARGET [--structured] [libFuzzer options]`.

TARGET is one of fuzz_targets.TARGETS. Its input is any bytes, at first a sound file; with --structured, the
bytes choose what hypothesis changes in a sound file, which leads deeper into JSON and YAML. Options such as
-runs=100000 or -max_total_time=300, and folders of inputs, go to libFuzzer. An input that breaks a reader is
written to crash-HASH in the working directory. Atheris comes with the `dev` extra.
"""

from __future__ import annotations

import random
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["pipeline", "shards", "slurm", "yaml", "PIL", "csv", "tarfile"]):
    from fuzz_targets import TARGETS
    from test_bad_input import holds

WORDS = Path(__file__).with_name("words.dict")


def main(name: str, options: list[str]) -> None:
    """Fuzz one target until told to stop, or until an input breaks it."""
    structured = "--structured" in options
    options = [option for option in options if option != "--structured"]
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as made:
        seeds, folder = Path(made, "seeds"), Path(made, "work")
        seeds.mkdir()
        folder.mkdir()
        if structured:
            for number in range(8):
                (seeds / str(number)).write_bytes(random.Random(number).randbytes(4096))
            run = holds(name, folder, 1).hypothesis.fuzz_one_input  # type: ignore[attr-defined]
        else:
            (seeds / "sound").write_bytes(TARGETS[name].sound())

            def run(data: bytes) -> None:
                (folder / "own").mkdir()
                try:
                    TARGETS[name].run(folder / "own", data)
                finally:
                    shutil.rmtree(folder / "own")

            options = [f"-dict={WORDS}", "-max_len=32768", *options]
        atheris.Setup([sys.argv[0], "-timeout=20", "-rss_limit_mb=2048", *options, str(seeds)], run)
        atheris.Fuzz()


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in TARGETS:
        sys.exit(f"usage: {sys.argv[0]} {'|'.join(TARGETS)} [--structured] [libFuzzer options]")
    main(sys.argv[1], sys.argv[2:])
