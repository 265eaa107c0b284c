"""The rooms and the direction of imports."""

from __future__ import annotations

import subprocess
import sys

from conftest import ROOT


def test_imports_point_downwards():
    # the contract is in pyproject.toml; it is exhaustive, so a new module has to be given its floor
    script = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert "2 kept, 0 broken" in done.stdout, done.stdout + done.stderr
    assert done.returncode == 0


def test_the_method_needs_torch_only():
    others = "{'faiss', 'open_clip', 'pyarrow', 'duckdb'}"
    script = f"import sys, retrieval_tip.tip; print(sorted({others} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_starts_without_the_heavy_libraries():
    script = (
        "import sys; from click.testing import CliRunner; from retrieval_tip.cli import main; "
        "assert CliRunner().invoke(main, ['index', 'build', '--help']).exit_code == 0; "
        "print(sorted({'torch', 'faiss', 'open_clip', 'pyarrow', 'duckdb', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_public_names_are_there_and_documented():
    import retrieval_tip

    for name in retrieval_tip.__all__:
        assert getattr(retrieval_tip, name).__doc__, name
    assert set(retrieval_tip._HOMES) == set(retrieval_tip.__all__)
