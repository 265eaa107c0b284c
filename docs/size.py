"""Print the size of the project beside the budgets of pyproject.toml, and the figures that CONTRIBUTING.md limits."""

from __future__ import annotations

import argparse
import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
FOREIGN = re.compile(
    r"\b(torch|openvino|faiss|duckdb|uvicorn|starlette|fastapi|ray|lancedb|obstore|timm|open_clip|transformers"
    r"|PIL|Image|np|pa|pq|pc|click|cloup|huggingface_hub)(\.\w+)*\._[a-z]\w*"
)


def sources(folder: Path) -> list[Path]:
    """Return the Python files in a folder."""
    return sorted(folder.rglob("*.py"))


def lines(paths: list[Path]) -> int:
    """Return the total number of lines in files."""
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)


def spans(paths: list[Path], kind: type[ast.AST] | tuple[type[ast.AST], ...]) -> Iterator[tuple[int, str]]:
    """Yield the length and the name of each class or function."""
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, kind):
                yield node.end_lineno - node.lineno + 1, f"{path.stem}.{node.name}"


def words(paths: list[Path], pattern: str | re.Pattern[str]) -> int:
    """Return the number of occurrences of a pattern in files."""
    return sum(len(re.findall(pattern, path.read_text(encoding="utf-8"))) for path in paths)


def sizes(root: Path) -> dict[str, int]:
    """Return what pyproject.toml sets budgets for: lines of Python, lines of the page, and words of the docs.

    The wings of the package are its folders. ``top`` stands for the files outside of them.
    """
    package = root / "retrieval_tip"
    wings = sorted(folder for folder in package.iterdir() if (folder / "__init__.py").exists())
    page = [path for path in (package / "server").rglob("*") if path.suffix in (".js", ".css", ".html", ".j2")]
    return {
        "top": lines(list(package.glob("*.py"))),
        **{wing.name: lines(sources(wing)) for wing in wings},
        "package": lines(sources(package)),
        "page": lines(page),
        "tests": lines(sources(root / "tests")),
        "benchmarks": lines(sources(root / "benchmarks")),
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
    budgets = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    budgets = budgets.get("tool", {}).get("retrieval-tip", {}).get("budget", {})
    faults = []
    for name, size in sizes(root).items():
        print(f"{name:46} {size:7,} of {budgets.get(name, 0):7,}")
        if size > budgets.get(name, 0):
            faults.append(f"{name}: {size:,}, but its budget in pyproject.toml is {budgets.get(name, 0):,}")
    return faults + [f"{name}: two classes have this name" for name in twice(sources(root / "retrieval_tip"))]


def main() -> None:
    """Print the figures for a clone of the repository. With ``--check``, exit with 1 if something is above budget."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("clone", nargs="?", type=Path, default=Path(__file__).resolve().parent.parent)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    root = arguments.clone
    faults = over(root)
    if arguments.check:
        sys.exit("\n".join(faults) or None)
    package, tests = sources(root / "retrieval_tip"), sources(root / "tests")
    outside = [path for path in package if "lance" not in path.parts]
    ray = [path for path in package if "distributed" in path.parts or path.stem == "on_ray"]
    figures: dict[str, object] = {
        "Ray, lines": lines(ray),
        "files at the top of the package": len(list((root / "retrieval_tip").glob("*.py"))),
        "modules outside lance/ that name it": sum(1 for p in outside if words([p], r"(?i)lance")),
        "modules outside lance/ that import it": sum(1 for p in outside if words([p], r"(from|import) \S*\blance")),
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
