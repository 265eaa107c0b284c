"""A package that adds to retrieval-tip: the format ``lines``."""

from dataclasses import dataclass
from typing import ClassVar

from retrieval_tip.errors import UsageError
from retrieval_tip.files import output
from retrieval_tip.hooks import option
from retrieval_tip.writers import Outcome, Wants


@dataclass(frozen=True)
class Lines:
    """One line per photo, with its label.

    Options:
        between: Text between a photo and its label.
    """

    wants: ClassVar[Wants] = Wants()
    between: str = option(default=" ", metavar="TEXT")

    def check(self, out):
        if "\n" in self.between:
            raise UsageError("--between: contains a new line; give a text of one line")

    def write(self, answered, out):
        with output(out) as file:
            for row in answered.rows:
                file.write(f"{row['input']}{self.between}{row['label'] or '-'}\n".encode())
        return Outcome()
