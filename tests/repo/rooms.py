"""Counts the rooms of the package and the imports between them: ``python tests/repo/rooms.py``."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "fst_fast"
KERNELS = ROOT / "kernels"

# A room imports from rooms above it in this list only.
ROOMS = (
    "ops",
    "checkpoints",
    "heads",
    "triggers",
    "methods",
    "data",
    "measure",
    "tuning",
    "lab",
    "bench",
    "sweep",
    "cli",
)
# Files directly in fst_fast/ that hold the public names and start the command line.
DOOR = ("__init__", "__main__")


def package_of(path: Path) -> str:
    """The package whose files ``path`` imports from by dots, for example "fst_fast.ops"."""
    if path.is_relative_to(KERNELS):
        return "fst_fast.kernels"
    return ".".join(path.relative_to(ROOT).parent.parts)


def imports(source: str, package: str) -> list[str]:
    """Every module that the source imports, by its full name; ``package`` resolves the dots."""
    found: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: -node.level + 1 or None] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            # A package's names are modules, or as good as modules; those of a module are not.
            packages = ("fst_fast", *(f"fst_fast.{room}" for room in ROOMS))
            found += [f"{base}.{a.name}" if base in packages else base for a in node.names]
    return found


def room_of(module: str) -> str | None:
    """The room of one of our modules, "" for the door, None for a module of somebody else."""
    first, _, rest = module.partition(".")
    if first != "fst_fast":
        return None
    room = rest.partition(".")[0]
    return "" if room in ("", *DOOR) else room


def files() -> list[Path]:
    return sorted([*PACKAGE.rglob("*.py"), *KERNELS.glob("*.py")])


def arrows() -> dict[tuple[str, str], list[str]]:
    """(room, room it imports from) -> the files that do."""
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for path in files():
        package = package_of(path)
        here = room_of(f"{package}.{path.stem}")
        for module in imports(path.read_text(), package):
            there = room_of(module)
            if here and there is not None and there != here:
                found[here, there].append(str(path.relative_to(ROOT)))
    return dict(found)


def chains(graph: dict[str, set[str]]) -> tuple[int, bool]:
    """Nodes on the longest chain of imports, and whether any of them lies on a cycle."""
    longest: dict[str, int] = {}
    open_nodes: set[str] = set()
    cycle = False

    def length(node: str) -> int:
        nonlocal cycle
        if node in open_nodes:
            cycle = True
            return 0
        if node not in longest:
            open_nodes.add(node)
            longest[node] = 1 + max((length(next_) for next_ in graph.get(node, ())), default=0)
            open_nodes.discard(node)
        return longest[node]

    return max(map(length, list(graph)), default=0), cycle


def entries() -> list[str]:
    """What lies directly in fst_fast/ under version control: rooms and files of the door."""
    found = [path for path in PACKAGE.iterdir() if (path / "__init__.py").exists()]
    # Without an installation fst_fast.kernels is a link, which gpu_bundle.py makes.
    folders = [path.name for path in found if not path.is_symlink()]
    return sorted([*folders, *(path.name for path in PACKAGE.glob("*.py"))])


def lines() -> int:
    return sum(len(path.read_text().splitlines()) for path in files())


def main() -> None:
    found = arrows()
    graph: dict[str, set[str]] = defaultdict(set)
    for here, there in found:
        if there:
            graph[here].add(there)
    longest, cycle = chains(graph)
    print(f"entries in fst_fast/: {len(entries())} ({', '.join(entries())})")
    print(f"rooms: {len(ROOMS)}")
    print(f"arrows between rooms: {sum(bool(there) for _, there in found)}")
    print(f"longest chain of rooms: {longest}")
    print(f"cycle: {'yes' if cycle else 'no'}")
    print(f"lines of Python in fst_fast/ and kernels/: {lines()}")


if __name__ == "__main__":
    main()
