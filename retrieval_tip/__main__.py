"""The program ``retrieval-tip``, which ``python -m retrieval_tip`` is too."""

from __future__ import annotations

import os


def main() -> None:
    """Run the program. Ctrl+C while it is imported ends it as Ctrl+C does later: in one line, with status 130."""
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
    """End the process at once: what is being imported cannot be finished, and may hide or wrap an exception."""
    os.write(2, b"interrupted\n")
    os._exit(130)


if __name__ == "__main__":
    main()
