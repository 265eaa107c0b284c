"""Programs of others that check what we write, each in an environment of its own in ``build/referees``."""

import hashlib
import shutil
import subprocess
import sys

import filelock
import pytest
from conftest import ROOT


def referee(*installs, python="python3.11"):
    """Return the Python of an environment in which ``pip install`` ran with these arguments. Skip if it fails."""
    # Tests under Wine share the folder, but cannot run an environment of Linux.
    key = repr((sys.platform, python, installs))
    made = ROOT / "build/referees" / hashlib.sha256(key.encode()).hexdigest()[:12]
    made.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(made / "lock"):
        if not (made / "complete").exists():
            shutil.rmtree(made / "env", ignore_errors=True)
            try:
                subprocess.run(
                    [python, "-m", "venv", made / "env"], check=True, capture_output=True, text=True
                )
                for arguments in installs:
                    pip = [made / "env/bin/pip", "install", "-q", *arguments]
                    subprocess.run(pip, check=True, capture_output=True, text=True)
            except (OSError, subprocess.CalledProcessError) as error:
                reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1]
                pytest.skip(
                    f"SKIPPED: no referee, {python} with {installs[-1][-1]} cannot be installed: {reason}"
                )
            (made / "complete").touch()
    return made / "env/bin/python"
