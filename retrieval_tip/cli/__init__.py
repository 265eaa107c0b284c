"""The command line."""

from retrieval_tip.cli.program import main as main
