"""The command line: it parses and prints."""

from retrieval_tip.cli.program import main as main
