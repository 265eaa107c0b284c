"""``python -m retrieval_tip`` is ``retrieval-tip``."""

from retrieval_tip.cli import main

main(prog_name="retrieval-tip")
