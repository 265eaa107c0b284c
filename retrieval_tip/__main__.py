"""Entry point of the program ``retrieval-tip`` and of ``python -m retrieval_tip``."""

from __future__ import annotations

import os


def main() -> None:
    """Run the program. If you press Ctrl+C during the imports, it prints one line and exits with status 130."""
    try:
        import signal

        before = signal.getsignal(signal.SIGINT)
        if before is signal.default_int_handler:
            signal.signal(signal.SIGINT, _end)
    except KeyboardInterrupt:
        _end()
    from retrieval_tip.cli import main as program

    signal.signal(signal.SIGINT, before)
    program(prog_name="retrieval-tip")


def _end(*_: object) -> None:
    """Exit immediately, because a module that is being imported could catch an exception."""
    os.write(2, b"interrupted\n")
    os._exit(130)


if __name__ == "__main__":
    main()
