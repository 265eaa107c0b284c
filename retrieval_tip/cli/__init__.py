"""The command line: it parses and prints."""

from retrieval_tip.cli.group import main as main
