"""A page of HTML as nodes."""

from __future__ import annotations

from html.parser import HTMLParser

VOID = {"br", "hr", "img", "link", "meta"}
"""Elements without an end tag."""
INLINE = {"a", "b", "code", "data", "span"}


class Node:
    """An element of a page, with its attributes and children."""

    def __init__(self, name="", attributes=()):
        self.name = name
        self.attributes = dict(attributes)
        self.inside = []

    def all(self, name=None, **attributes):
        for part in self.inside:
            if isinstance(part, Node):
                if name in (None, part.name) and all(
                    part.attributes.get(k.rstrip("_")) == v for k, v in attributes.items()
                ):
                    yield part
                yield from part.all(name, **attributes)

    def first(self, name=None, **attributes):
        return next(self.all(name, **attributes))

    @property
    def text(self):
        """The text as a reader sees it. Inline elements are joined to the text around them, and others are not."""
        parts = (
            part
            if isinstance(part, str)
            else part.text
            if part.name in INLINE
            else f" {part.text} "
            for part in self.inside
        )
        return " ".join("".join(parts).split())

    def rows(self):
        return [
            [cell.text for cell in row.all() if cell.name in ("td", "th")] for row in self.all("tr")
        ]


class Tree(HTMLParser):
    """A page as nodes. It must be well-formed."""

    def __init__(self, source):
        super().__init__(convert_charrefs=True)
        self.root = Node()
        self.open = [self.root]
        self.feed(source)
        self.close()
        assert len(self.open) == 1, f"<{self.open[-1].name}> has no end"

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), f"<{tag}> has an attribute twice"
        node = Node(tag, attrs)
        self.open[-1].inside.append(node)
        if tag not in VOID:
            self.open.append(node)

    def handle_startendtag(self, tag, attrs):
        self.open[-1].inside.append(Node(tag, attrs))

    def handle_endtag(self, tag):
        assert self.open.pop().name == tag

    def handle_data(self, data):
        self.open[-1].inside.append(data)
