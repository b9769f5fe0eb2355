"""What `import pruning101.TOPIC` adds to `import torch`, in fresh interpreters.

For every module of the package's top level runs in turns `import torch` and
`import torch, pruning101.TOPIC` and takes the difference of the medians. Prints and keeps all; the
goal is 0.3 s or less for each.

    python benchmarks/import_time.py [--repeats 7]
"""

import argparse
import pkgutil
import subprocess
import sys

from common import interleaved, write

import pruning101


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    topics = [m.name for m in pkgutil.iter_modules(pruning101.__path__) if not m.ispkg]
    statements = {
        "torch": "import torch",
        **{name: f"import torch, pruning101.{name}" for name in topics},
    }

    def run(statement: str):
        return lambda: subprocess.run([sys.executable, "-c", statement], check=True)

    found = interleaved(
        {name: run(statement) for name, statement in statements.items()}, repeats=options.repeats
    )
    torch_seconds = found.pop("torch")["median"]
    added = {name: times["median"] - torch_seconds for name, times in found.items()}
    write(
        "import_time",
        {
            "torch_seconds": torch_seconds,
            "added_seconds": added,
            "most_added": max(added, key=added.__getitem__),
            "goal": 0.3,
            "repeats": options.repeats,
        },
    )


if __name__ == "__main__":
    main()
