"""Print the size of the project, and the figures for which CONTRIBUTING.md sets limits."""

from __future__ import annotations

import argparse
import ast
import re
from collections.abc import Iterator
from pathlib import Path

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


def main() -> None:
    """Print the figures for a clone of the repository."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("clone", nargs="?", type=Path, default=Path(__file__).resolve().parent.parent)
    root = parser.parse_args().clone
    package, tests = sources(root / "retrieval_tip"), sources(root / "tests")
    outside = [path for path in package if "lance" not in path.parts]
    benchmarks = [path for path in sorted((root / "benchmarks").iterdir()) if path.suffix in (".py", ".toml")]
    ray = [path for path in package if "distributed" in path.parts or path.stem == "on_ray"]
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    names = [name.rpartition(".")[2] for _, name in spans(package, ast.ClassDef)]
    figures: dict[str, object] = {
        "package, lines": lines(package),
        "tests, lines": lines(tests),
        "benchmarks, lines": lines(benchmarks),
        "Ray, lines": lines(ray),
        "files at the top of the package": len(list((root / "retrieval_tip").glob("*.py"))),
        "modules outside lance/ that name it": sum(1 for p in outside if words([p], r"(?i)lance")),
        "modules outside lance/ that import it": sum(1 for p in outside if words([p], r"(from|import) \S*\blance")),
        "calls of tip.blend": calls(package),
        "uses of Any": words(package, r"\bAny\b"),
        "names of other libraries that begin with _": words(package, FOREIGN),
        "largest class": max(spans(package, ast.ClassDef)),
        "largest function": max(spans(package, functions)),
        "class names that exist twice": sorted({name for name in names if names.count(name) > 1}),
        "monkeypatch.setattr in tests": words(tests, r"\bmonkeypatch\.setattr\b"),
        "mock.patch in tests": words(tests, r"\bmock\.patch\b"),
        "match= in tests": words(tests, r"\bmatch="),
    }
    for name, figure in figures.items():
        print(f"{name:46} {figure}")


def calls(paths: list[Path]) -> int:
    """Return the number of calls to ``tip.blend``."""
    return sum(
        isinstance(node, ast.Call)
        and (
            (isinstance(node.func, ast.Attribute) and ast.unparse(node.func) == "tip.blend")
            or (path.stem == "tip" and ast.unparse(node.func) == "blend")
        )
        for path in paths
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    )


if __name__ == "__main__":
    main()
