"""Check the cross-references in the package's docstrings with Sphinx's nitpicky mode.

The docstrings are read without importing the package. This takes a quarter of the time that autodoc would need.
"""

from __future__ import annotations

import ast
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path

DOCS = Path(__file__).parent


def directives(body: list[ast.stmt], member: bool) -> Iterator[str]:
    """Yield a directive for each definition in a module or class."""
    seen: set[str] = set()
    for node, after in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            kind = "method" if member else "function"
            yield from directive(
                kind, f"{node.name}()", ast.get_docstring(node), again=node.name in seen
            )
            seen.add(node.name)  # an overload, or the setter of a property
        elif isinstance(node, ast.ClassDef):
            inside = "\n".join(directives(node.body, member=True))
            yield from directive("class", node.name, f"{ast.get_docstring(node) or ''}\n\n{inside}")
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [
                part.id
                for target in targets
                for part in ast.walk(target)
                if isinstance(part, ast.Name)
            ]
            for name in names:
                yield from directive("attribute" if member else "data", name, None)
            if names and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                yield f"{after.value.value}\n"


def directive(kind: str, name: str, text: str | None, again: bool = False) -> Iterator[str]:
    """Yield the directive for one object."""
    yield f".. py:{kind}:: {name}\n{'   :no-index:' if again else ''}\n"
    yield textwrap.indent(text or "", "   ") + "\n"


def main(package: Path) -> int:
    """Return the exit status of Sphinx, which is 1 if a reference is broken."""
    with tempfile.TemporaryDirectory() as folder:
        for file in package.rglob("*.py"):
            name = ".".join(file.relative_to(package.parent).with_suffix("").parts).removesuffix(
                ".__init__"
            )
            module = ast.parse(file.read_text(encoding="utf-8"))
            head = f":orphan:\n\n.. py:module:: {name}\n\n{ast.get_docstring(module) or ''}\n\n"
            page = Path(folder, f"{name}.rst")
            page.write_text(
                head + "\n".join(directives(module.body, member=False)), encoding="utf-8"
            )
        Path(folder, "index.rst").write_text("Modules\n=======\n")
        command = [
            sys.executable,
            "-m",
            "sphinx",
            "-q",
            "-W",
            "--keep-going",
            "-b",
            "dummy",
            "-c",
            DOCS,
        ]
        # docutils does not support sections such as "Args:"
        command += ["-D", "nitpicky=1", "-D", "suppress_warnings=docutils"]
        return subprocess.run([*command, folder, f"{folder}/out"], check=False).returncode  # noqa: S603 # no input


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else DOCS.parent / "retrieval_tip"))
