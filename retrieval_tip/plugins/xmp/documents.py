"""Merge keywords into XMP documents, and keep every other byte.

A library that reads and writes XML would change the quotes, white space and padding of other programs. Instead, expat
finds the lists of keywords, and only their items are cut and added.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat
from xml.sax.saxutils import escape, quoteattr

from retrieval_tip.errors import InputError
from retrieval_tip.wording import one_line

MOST_BYTES = 4 << 20
"""Maximum size of a document in bytes."""
MOST_ELEMENTS = 100_000
"""Maximum number of elements of a document."""

_NAMESPACES = {
    "rdf": "http://www.w3.org/1999/02/22-rdf-syntax-ns#",
    "dc": "http://purl.org/dc/elements/1.1/",
    "lr": "http://ns.adobe.com/lightroom/1.0/",
    "tip": "urn:retrieval-tip:xmp/1.0/",
}
_LISTS = {
    "dc:subject": ("tip:keywords", "tip:keywordsBefore"),
    "lr:hierarchicalSubject": ("tip:hierarchies", "tip:hierarchiesBefore"),
}
"""Each list of keywords, with the list of values that we gave, and the list of these that were there before."""
_RDF = f"{_NAMESPACES['rdf']} "
_ITEM, _BAG, *_OTHERS = (f"{_RDF}{name}" for name in ("li", "Bag", "Seq", "Alt"))
_EMPTY = b"""<?xpacket begin="\xef\xbb\xbf" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/">
 <rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
 </rdf:RDF>
</x:xmpmeta>
<?xpacket end="w"?>
"""
_TAG = re.compile(
    rb"""</?([^\s/>]++)(?:[^>"']++|"[^"]*+"|'[^']*+')*+>"""
)  # possessive, to save memory
_ATTRIBUTE = re.compile(rb"""\s+(?!xmlns[:\s=])[^\s=]+\s*=\s*(?:"[^"]*"|'[^']*')""")


class Keywords(NamedTuple):
    """The keywords of a photo, and hierarchies of keywords, such as ``animal|bird``."""

    flat: Sequence[str]
    hierarchies: Sequence[str] = ()


def merged(data: bytes | None, given: Keywords) -> bytes | None:
    """Return an XMP document with these keywords, or ``None`` if there is neither a document nor a keyword.

    Keywords of an earlier call are removed, unless they were there before it or are given again. Raises InputError if
    the document is not XMP in UTF-8, contains a DOCTYPE, or has too many elements.
    """
    if data is None and not any(given):
        return None
    document = _Document(_EMPTY if data is None else data)
    for (name, (ours, theirs)), keywords in zip(_LISTS.items(), given, strict=True):
        wanted = [one_line(keyword) for keyword in keywords]
        there, written, before = map(document.values, (name, ours, theirs))
        if wanted or written:
            own = {*written} - {*before}
            document.change(name, own - {*wanted}, wanted)
            document.change(ours, {*written} - {*wanted}, wanted)
            kept = [keyword for keyword in wanted if keyword in there and keyword not in own]
            document.change(theirs, {*before} - {*kept}, kept)
    return document.edited()


class _Document:
    """An XMP document, and the offsets of the start, the content and the end of each element."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._edits = list[tuple[int, int, bytes]]()
        self._missing = b""  # lists that the document does not contain
        self._places = dict[Element, tuple[int, int, int]]()
        root = self._read()
        found = [one for one in (root, *root) if one.tag == f"{_RDF}RDF"]
        if len(found) != 1:
            raise InputError("is not XMP, because it has no rdf:RDF")
        self._rdf = found[0]

    def values(self, name: str) -> list[str]:
        """Return the values of a list."""
        own, others = self._find(name)
        return [item.text or "" for bag in own for item in bag] + [
            value for *_, values in others for value in values
        ]

    def change(self, name: str, removed: set[str], added: Sequence[str]) -> None:
        """Remove and add values of a list, which becomes an rdf:Bag, or is cut if it has no values left."""
        own, others = self._find(name)
        items = [item for bag in own for item in bag]
        kept = [value for *_, values in others for value in values]
        without = {item.text for item in items} | removed
        new = [one for one in dict.fromkeys((*kept, *added)) if one not in without]
        cut = [item for item in items if item.text in removed]
        cut = [own] if items and cut == items and not new else cut
        self._edits += [(start, end, b"") for start, end, _ in others]
        self._edits += [(*self._places[one][::2], b"") for one in cut]
        bag = self._tag_at(self._places[own[0]][0])[1] if len(own) else b"rdf:Bag"
        li = bag.removesuffix(b"Bag") + b"li"
        content = b"".join(b"\n     <%s>%s</%s>" % (li, escape(one).encode(), li) for one in new)
        if new and len(own):
            self._append(own[0], content)
        elif new:
            tag = name.encode()
            self._missing += b"\n   <%s>\n    <rdf:Bag>%s\n    </rdf:Bag>\n   </%s>" % (
                tag,
                content,
                tag,
            )

    def edited(self) -> bytes:
        """Return the document with all changes."""
        if self._missing:
            names = (f"{_RDF}about", "about")
            about = [
                value for node in self._rdf for name, value in node.attrib.items() if name in names
            ] or [""]
            declared = "".join(
                f'\n    xmlns:{prefix}="{uri}"' for prefix, uri in _NAMESPACES.items()
            )
            start = f"\n  <rdf:Description rdf:about={quoteattr(about[0])}{declared}>".encode()
            self._append(self._rdf, start + self._missing + b"\n  </rdf:Description>")
        pieces = list[bytes]()
        at = 0
        for begin, end, new in sorted(self._edits):
            before = self._data[at:begin]
            pieces += [before, new] if new else [before.rstrip()]
            at = end
        return b"".join([*pieces, self._data[at:]])

    def _find(self, name: str) -> tuple[Element, list[tuple[int, int, list[str]]]]:
        """Return a list with an rdf:Bag, and the offsets and values of other forms: texts, attributes, rdf:Seq."""
        prefix, _, local = name.partition(":")
        tag = f"{_NAMESPACES[prefix]} {local}"
        own = Element("")
        others = list[tuple[int, int, list[str]]]()
        for node in self._rdf:
            start, inside, _ = self._places[node]
            if tag in node.attrib:
                spans = [found.span() for found in _ATTRIBUTE.finditer(self._data, start, inside)]
                others.append((*spans[[*node.attrib].index(tag)], [node.attrib[tag]]))
        for one in (one for node in self._rdf for one in node if one.tag == tag):
            parts = [*one.iter()]
            (start, _, end) = self._places[one]
            is_plain = not any(part.attrib for part in parts) and not re.search(
                rb"<[!?]", self._data[start:end]
            )
            if (
                not len(own)
                and [bag.tag for bag in one] == [_BAG]
                and {item.tag for item in one[0]} <= {_ITEM}
            ):
                own = one
            elif {part.tag for part in parts} <= {tag, _BAG, *_OTHERS, _ITEM} and is_plain:
                others.append(
                    (start, end, [part.text for part in parts if part.text and part.text.strip()])
                )
            else:
                raise InputError(f"has {name} in another form than a list of keywords")
        return own, others

    def _append(self, element: Element, content: bytes) -> None:
        """Add content behind the last child of an element."""
        start, inside, end = self._places[element]
        at = self._places[element[-1]][2] if len(element) else inside
        if at == end:  # as in <rdf:RDF/>
            self._edits.append((at - 2, at, b">%s</%s>" % (content, self._tag_at(start)[1])))
        else:
            self._edits.append((at, at, content))

    def _tag_at(self, offset: int) -> re.Match[bytes]:
        found = _TAG.match(self._data, offset)
        assert found is not None  # because expat has found it
        return found

    def _read(self) -> Element:
        """Return the root of the document. No entity is ever expanded."""
        if b"\0" in self._data:  # expat would also read UTF-16
            raise InputError("is not XML in UTF-8")
        builder = TreeBuilder()
        parser = expat.ParserCreate("utf-8", " ")

        def refuse_doctype(*_: object) -> None:
            raise InputError("contains a DOCTYPE; remove it")

        def declare(_: str, encoding: str | None, __: int) -> None:
            if encoding and encoding.lower() != "utf-8":
                raise InputError(f"is written in {one_line(encoding)}; convert it to UTF-8")

        def start(name: str, attributes: dict[str, str]) -> None:
            if len(self._places) == MOST_ELEMENTS:
                raise InputError(f"has more than {MOST_ELEMENTS:,} elements")
            at = parser.CurrentByteIndex
            own = builder.start(name, attributes)
            self._places[own] = at, self._tag_at(at).end(), 0

        def end(name: str) -> None:
            own = builder.end(name)
            at = parser.CurrentByteIndex
            begin, inside, _ = self._places[own]
            is_empty = self._data[inside - 2 : inside] == b"/>"
            self._places[own] = begin, inside, inside if is_empty else self._tag_at(at).end()

        parser.StartDoctypeDeclHandler = refuse_doctype
        parser.XmlDeclHandler = declare
        parser.StartElementHandler = start
        parser.EndElementHandler = end
        parser.CharacterDataHandler = builder.data
        try:
            parser.Parse(self._data, True)
        except expat.ExpatError as error:
            raise InputError(f"is not XML in UTF-8 ({error})") from None
        return builder.close()
