"""Print the size of the project beside the budgets of pyproject.toml, and the figures that CONTRIBUTING.md limits.

Python is counted in nodes of its syntax tree, and its density in nodes per statement, because no formatter changes
them. Strings that stand alone, such as docstrings, do not count. Neither do the marks of loads, stores and operators,
which other nodes imply.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
MARKS = (ast.expr_context, ast.operator, ast.unaryop, ast.boolop, ast.cmpop)
FOREIGN = re.compile(
    r"\b(torch|openvino|faiss|duckdb|uvicorn|starlette|fastapi|ray|lancedb|obstore|timm|open_clip|transformers"
    r"|PIL|Image|np|pa|pq|pc|click|cloup|huggingface_hub)(\.\w+)*\._[a-z]\w*"
)


class Size(NamedTuple):
    """The numbers of nodes and statements of some Python files."""

    nodes: int
    statements: int

    @property
    def density(self) -> float:
        """The number of nodes per statement."""
        return self.nodes / max(1, self.statements)


def sources(folder: Path) -> list[Path]:
    """Return the Python files in a folder."""
    return sorted(folder.rglob("*.py"))


def stands_alone(node: ast.AST) -> bool:
    """Return whether a node is a string that stands alone: a docstring, or the text below a constant."""
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def size(paths: list[Path]) -> Size:
    """Return the size of files."""
    nodes = 0
    statements = 0
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if stands_alone(node):
                nodes -= 1  # its text is a node of its own
            elif not isinstance(node, MARKS):
                nodes += 1
                statements += isinstance(node, ast.stmt)
    return Size(nodes, statements)


def spans(
    paths: list[Path], kind: type[ast.AST] | tuple[type[ast.AST], ...]
) -> Iterator[tuple[int, str]]:
    """Yield the length and the name of each class or function."""
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, kind):
                yield node.end_lineno - node.lineno + 1, f"{path.stem}.{node.name}"


def words(paths: list[Path], pattern: str | re.Pattern[str]) -> int:
    """Return the number of occurrences of a pattern in files."""
    return sum(len(re.findall(pattern, path.read_text(encoding="utf-8"))) for path in paths)


def project_of(root: Path) -> dict[str, Any]:
    """Return the section ``tool`` of pyproject.toml."""
    tools: dict[str, Any] = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))[
        "tool"
    ]
    return tools


def module_of(path: Path, root: Path) -> str:
    """Return the wing of a file, or the module of a file outside of the wings."""
    name = path.relative_to(root).parts[1]
    return f"retrieval_tip.{name.removesuffix('.py')}"


def faces() -> set[str]:
    """Return the modules and wings that the import contract "the core" keeps out of it, and ``__main__``."""
    contracts = project_of(ROOT)["importlinter"]["contracts"]
    core = next(contract for contract in contracts if contract["name"] == "the core")
    return {*core["forbidden_modules"], "retrieval_tip.__main__"}


def parts(root: Path) -> dict[str, Size]:
    """Return the size of each part that has a budget of nodes.

    The wings of the package are its folders, and so is each plugin. ``top`` stands for the files outside of them.
    ``core`` is what is none of the :func:`faces`.
    """
    package = root / "retrieval_tip"
    wings = {
        folder.name: sources(folder)
        for folder in sorted(package.iterdir())
        if (folder / "__init__.py").exists() and folder.name != "plugins"
    }
    for plugin in sorted((package / "plugins").iterdir()):
        files = sources(plugin) if plugin.is_dir() else [plugin]
        if plugin.name != "__init__.py" and files and plugin.suffix in ("", ".py"):
            wings[f"plugins/{plugin.stem}"] = files
    outside = faces()
    core = [path for path in sources(package) if module_of(path, root) not in outside]
    return {
        "top": size(sorted(package.glob("*.py"))),
        **{name: size(files) for name, files in wings.items()},
        "core": size(core),
        "package": size(sources(package)),
        "tests": size(sources(root / "tests")),
        "benchmarks": size(sources(root / "benchmarks")),
    }


def written(root: Path) -> dict[str, int]:
    """Return the lines of the page, and the words of the docs."""
    server = root / "retrieval_tip" / "server"
    page = [path for path in server.rglob("*") if path.suffix in (".js", ".css", ".html", ".j2")]
    return {
        "page": sum(len(path.read_text(encoding="utf-8").splitlines()) for path in page),
        "words of docs": words([root / "README.md", *sorted((root / "docs").glob("*.md"))], r"\S+"),
    }


def twice(package: list[Path]) -> list[str]:
    """Return the names of classes that exist twice."""
    names = [name.rpartition(".")[2] for _, name in spans(package, ast.ClassDef)]
    return sorted({name for name in names if names.count(name) > 1})


def over(root: Path) -> list[str]:
    """Print each size beside its budget, and return a line for each that is above its budget or has none.

    Every class has its own name.
    """
    limits = project_of(root).get("retrieval-tip", {})
    budgets = limits.get("budget", {})
    densities = limits.get("density", {})
    faults = []

    def check(name: str, number: int) -> None:
        budget = budgets.get(name, 0)
        if number > budget:
            faults.append(f"{name}: {number:,}, but its budget in pyproject.toml is {budget:,}")

    for name, part in parts(root).items():
        budget = budgets.get(name, 0)
        print(f"{name:22} {part.nodes:8,} of {budget:8,} nodes {part.density:6.2f} per statement")
        check(name, part.nodes)
        densest = densities.get(name)
        if densest is not None and part.density > densest:
            faults.append(
                f"{name}: {part.density:.2f} nodes per statement, but at most {densest} are allowed"
            )
    for name, number in written(root).items():
        print(f"{name:22} {number:8,} of {budgets.get(name, 0):8,}")
        check(name, number)
    return faults + [
        f"{name}: two classes have this name" for name in twice(sources(root / "retrieval_tip"))
    ]


def main() -> None:
    """Print the figures for a clone of the repository. With ``--check``, exit with 1 if something is above budget."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("clone", nargs="?", type=Path, default=ROOT)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    root = arguments.clone
    faults = over(root)
    if arguments.check:
        sys.exit("\n".join(faults) or None)
    package = sources(root / "retrieval_tip")
    tests = sources(root / "tests")
    outside = [path for path in package if "plugins" not in path.parts]
    figures: dict[str, object] = {
        "files at the top of the package": len(list((root / "retrieval_tip").glob("*.py"))),
        "modules outside plugins/ that name LanceDB": sum(
            1 for p in outside if words([p], r"(?i)lance")
        ),
        "uses of Any": words(package, r"\bAny\b"),
        "names of other libraries that begin with _": words(package, FOREIGN),
        "largest class": max(spans(package, ast.ClassDef)),
        "largest function": max(spans(package, FUNCTIONS)),
        "class names that exist twice": twice(package),
        "monkeypatch.setattr in tests": words(tests, r"\bmonkeypatch\.setattr\b"),
        "mock.patch in tests": words(tests, r"\bmock\.patch\b"),
        "match= in tests": words(tests, r"\bmatch="),
    }
    for name, figure in figures.items():
        print(f"{name:46} {figure}")


if __name__ == "__main__":
    main()
