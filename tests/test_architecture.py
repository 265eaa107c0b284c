"""Import contracts, docstring references and public names. ``make lint`` checks the size of the code."""

import ast
import subprocess
import sys
import tomllib
from dataclasses import fields

from conftest import ROOT


def test_each_package_has_an_import_contract():  # make lint checks the contracts
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"][
        "contracts"
    ]
    covered = {
        container
        for contract in contracts
        if contract.get("exhaustive")
        for container in contract["containers"]
    }
    packages = {
        ".".join(init.parent.relative_to(ROOT).parts)
        for init in (ROOT / "retrieval_tip").rglob("__init__.py")
    }
    assert covered == packages


def test_only_the_table_of_hooks_names_plugins():
    package = ROOT / "retrieval_tip"
    naming = {
        file.relative_to(package).as_posix()
        for file in package.rglob("*.py")
        if "retrieval_tip.plugins" in file.read_text()
        and not file.is_relative_to(package / "plugins")
    }
    assert naming == {"hooks.py"}


def test_a_broken_docstring_reference_is_reported(tmp_path):
    (tmp_path / "made").mkdir()
    text = 'class Kind:\n  """As :func:`two.there`, :func:`two.gone`."""\n'
    text += '  def again(self):\n    """A :class:`Kind`."""\n'
    (tmp_path / "made/one.py").write_text(text)
    (tmp_path / "made/two.py").write_text("def there():\n    pass\n")
    command = [sys.executable, ROOT / "docs/crossrefs.py", tmp_path / "made"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert [line.partition("not found: ")[2].split()[0] for line in done.stderr.splitlines()] == [
        "two.gone"
    ]


def test_the_method_only_imports_torch():
    modules = ["__init__", "tip"]
    packages = set()
    for module in modules:  # which grows
        for node in ast.parse((ROOT / "retrieval_tip" / f"{module}.py").read_text()).body:
            names = [name.name for name in node.names] if isinstance(node, ast.Import) else []
            for name in [node.module] if isinstance(node, ast.ImportFrom) else names:
                package, _, own = name.partition(".")
                packages.add(package)
                modules += [own] * (package == "retrieval_tip" and own not in modules)
    assert packages - sys.stdlib_module_names == {"lazy_loader", "retrieval_tip", "torch"}
    assert "errors" in modules


EDITORS = {"model.py", "editing.py"}
"""Modules that may assign to an index, which they have just copied."""
NO_INDEX = {"labelling/sort.py": {"result"}}
"""Variables that hold another object with a field of the same name."""


def assigned(code):
    """Return the line, the object and the name of each attribute that is assigned or deleted, except those of self."""
    for node in ast.walk(ast.parse(code)):
        match node:
            case ast.Attribute(value=owner, attr=name, ctx=ast.Store() | ast.Del()):
                pass
            case ast.Call(
                func=ast.Name("setattr" | "delattr"), args=[owner, ast.Constant(str(name)), *_]
            ):
                pass
            case _:
                continue
        if ast.unparse(owner) != "self":
            yield node.lineno, ast.unparse(owner), name


def test_nobody_assigns_to_an_index_from_outside():
    """An edit returns another index. Names have no types, so any object with a field of an index counts as one."""
    from retrieval_tip import Index

    code = "a.x, (self.b.y, c[0].z) = a.x\na.x += 1\nself.x = a.x\nsetattr(a, 'x', 1)\ndel a.x"
    assert sorted(found[0] for found in assigned(code)) == [1, 1, 1, 2, 4, 5]
    fields_of_index = {field.name for field in fields(Index)}
    package = ROOT / "retrieval_tip"
    places = [
        f"{name}:{line}: {owner}.{attribute}"
        for name in sorted(
            {path.relative_to(package).as_posix() for path in package.rglob("*.py")} - EDITORS
        )
        for line, owner, attribute in assigned((package / name).read_text())
        if attribute in fields_of_index and owner not in NO_INDEX.get(name, ())
    ]
    assert places == []


def test_public_names_exist_and_are_documented():
    import retrieval_tip

    for name in retrieval_tip.__all__:
        assert getattr(retrieval_tip, name).__doc__, name
    assert set(retrieval_tip.__all__) <= set(dir(retrieval_tip))
    assert "Classifier" in retrieval_tip.__all__
