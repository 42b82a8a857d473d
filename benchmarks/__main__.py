"""All that the project is measured with.

python -m benchmarks              what there is
python -m benchmarks NAME [...]   one of them; -h after the name says what it takes
"""

from __future__ import annotations

import ast
import runpy
import sys
from pathlib import Path

from pipeline.errors import nearest

SHARED = {"__init__", "__main__", "figures", "pairs", "pictures", "synthetic"}


def names() -> dict[str, str]:
    """Every benchmark and what it measures, in one sentence."""
    found = {}
    for file in sorted(Path(__file__).parent.glob("*.py")):
        if file.stem not in SHARED:
            text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
            found[file.stem] = " ".join(text.split("\n\n")[0].split())
    return found


def main(arguments: list[str]) -> int:
    known = names()
    if not arguments or arguments[0] in ("-h", "--help"):
        width = max(map(len, known))
        print("python -m benchmarks NAME [...]\n")
        print("\n".join(f"{name:{width}}  {text}" for name, text in known.items()))
        return 0
    name, *rest = arguments
    if name not in known:
        print(f"no benchmark is called '{name}'{nearest(name, known)}", file=sys.stderr)
        return 2
    sys.argv = [f"python -m benchmarks {name}", *rest]
    runpy.run_module(f"benchmarks.{name}", run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
