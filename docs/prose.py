"""Count phrases that sound translated, per 1,000 words of the package, the page and the docs.

Use ``--show N`` to print N of these phrases. The exit status is 1 if a part has more than :data:`MOST` phrases per
1,000 words.
"""

from __future__ import annotations

import ast
import random
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import click

ROOT = Path(__file__).parents[1]
MOST = 2.0
"""Maximum number of phrases per 1,000 words in each part."""
PARTS = {
    "package": ["retrieval_tip/**/*.py"],
    "page": ["retrieval_tip/**/*.html", "retrieval_tip/**/*.js", "retrieval_tip/**/*.j2"],
    "docs": ["*.md", "docs/*.md", "tests/README.md"],
}
PHRASES = {
    "so many": r"\bso (?:many|much)\b(?! as| that)",
    "is none": r"\b(?:is|are|was|were) none\b",
    "what is": r"\bwhat (?:is|was|are|were)\b(?![^.?!\n]*\?)",
    "that of": r"\b(?:that|those) of\b",
    "none that": r"\bnone that\b|\bno \w+ that is\b",
    "whoever": r"\bwhoever\b",
    "is said": r"\b(?:is|are|was|were) said\b",
    "by itself": r"\bby (?:itself|themselves)\b",
    "anew": r"\banew\b",
    "where there is": r"\bwhere (?:there|it|they|that|these) (?:is|are|was|were)\b",
    "is there": r"\b(?:is|are) there\b(?!\?)",
    "but for": r"\bbut for\b",
    "of it": r"\bof (?:it|them)\b",
    "as it is": r"\bas (?:it|they) (?:is|are|was|were)\b",
    "of which": r"\b(?:with|of|by|to|from|in) which\b",
    "docstring that begins with Of": r"\AOf\b",
}
COMPILED = {name: re.compile(pattern, re.IGNORECASE) for name, pattern in PHRASES.items()}


def texts(path: Path) -> Iterator[str]:
    """Yield the comments of a Python file and its strings that contain a space, or the whole text of any other file."""
    source = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        yield source
        return
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            yield node.value
    yield from re.findall(r"# (.*)", source)


@click.command(help=__doc__)
@click.option("--show", default=0, help="Number of phrases to print, which are selected at random.")
def main(show: int) -> None:
    """Print the count of each part, and fail if a count is too high."""
    found: list[str] = []
    highest = 0.0
    for part, patterns in PARTS.items():
        counts, words = Counter[str](), 0
        for path in sorted({path for pattern in patterns for path in ROOT.glob(pattern)}):
            for text in texts(path):
                words += len(re.findall(r"\w+", text))
                for name, phrase in COMPILED.items():
                    for match in phrase.finditer(text):
                        counts[name] += 1
                        around = text[max(0, match.start() - 60) : match.end() + 60]
                        found.append(f"{path.relative_to(ROOT)}: ...{' '.join(around.split())}...")
        rate = 1000 * counts.total() / max(words, 1)
        highest = max(highest, rate)
        listed = ", ".join(f"{name} {count}" for name, count in counts.most_common())
        click.echo(f"{part}: {counts.total()} in {words:,} words, {rate:.1f} per 1,000 ({listed})")
    for line in random.sample(found, min(show, len(found))):
        click.echo(f"  {line}")
    sys.exit(highest > MOST)


if __name__ == "__main__":
    main()
