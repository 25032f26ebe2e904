"""The structure of an HTML page, for the tests of pages."""

from __future__ import annotations

import re
from html.parser import HTMLParser


class Structure(HTMLParser):
    """Fails on tags that are not closed in order, and collects what a page refers to."""

    VOID = frozenset({"meta", "img", "br", "path", "use"})

    def __init__(self) -> None:
        super().__init__()
        self.open, self.ids, self.references, self.alts = [], [], [], []
        self.metas: dict[str | None, str | None] = {}
        self.texts: dict[str, list[str]] = {}
        """By tag, of those without tags within."""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "img":
            self.alts.append(dict(attributes).get("alt"))
        if tag == "meta":
            self.metas[dict(attributes).get("name")] = dict(attributes).get("content")
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            if name in ("src", "href", "xlink:href", "srcset", "data", "action"):
                self.references.append(value)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts.setdefault(self.open[-1], []).append(data)


def structure_of(page: str) -> Structure:
    """Of a page, or a part of one, that is well formed and refers to nothing outside."""
    structure = Structure()
    structure.feed(page)
    assert structure.open == []
    assert len(structure.ids) == len(set(structure.ids))
    outside = [r for r in structure.references if not r.startswith(("#", "data:image/png;base64,"))]
    assert outside == []
    assert {r[1:] for r in structure.references if r.startswith("#")} <= set(structure.ids)
    assert "@import" not in page
    assert set(re.findall(r"url\((.)", page)) <= {"#"}
    return structure
