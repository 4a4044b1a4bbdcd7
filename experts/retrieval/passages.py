"""Documents cut into passages, at headings and paragraphs first. Knows no index and no encoder."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from experts.errors import ExpertConfigError

__all__ = ["DEFAULT_CHARACTERS", "SUFFIXES", "Passage", "read_documents", "split_document"]

SUFFIXES = (".md", ".markdown", ".txt")
# Encoders read 256 tokens, of which English has about a thousand characters, German fewer.
DEFAULT_CHARACTERS = 800
# A file larger than this is hardly one that somebody wrote.
MAX_BYTES = 32 << 20

_SENTENCE_END = re.compile(r"(?:[.!?:;]+[\"')\]]*\s|[。！？]+[\"')\]]*)\s*|\n")  # noqa: RUF001


@dataclass(frozen=True, slots=True)
class Passage:
    """A piece of a document.

    Attributes:
        path: The document, relative to the folder that was indexed, with forward slashes.
        number: Its place among the document's passages, from 0.
        title: The headings it stands under, outermost first.
        text: What it says.
    """

    path: str
    number: int
    title: str
    text: str

    @property
    def id(self) -> str:
        """``PATH#NUMBER``, unique in an index."""
        return f"{self.path}#{self.number}"

    @property
    def full_text(self) -> str:
        """What is encoded: the text under its title, which often names what the text is about."""
        return f"{self.title}\n{self.text}"


def read_documents(folder: Path) -> Iterator[tuple[str, str]]:
    """Path and text of each document below a folder, in order; hidden files are left out.

    Raises:
        ExpertConfigError: A file is no UTF-8, or too large.
    """
    for file in sorted(folder.rglob("*")):
        path = file.relative_to(folder)
        if file.suffix.lower() not in SUFFIXES or not file.is_file():
            continue
        if any(part.startswith(".") for part in path.parts):
            continue
        if file.stat().st_size > MAX_BYTES:
            raise ExpertConfigError(
                f"{file} has more than {MAX_BYTES >> 20} MiB; split it, or move it elsewhere"
            )
        try:
            yield path.as_posix(), file.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError:
            raise ExpertConfigError(
                f"{file} is no UTF-8; convert it, or move it elsewhere"
            ) from None


def split_document(path: str, text: str, characters: int = DEFAULT_CHARACTERS) -> list[Passage]:
    """Cut a document into passages of at most so many characters.

    A passage never spans two sections. Within one, whole paragraphs are put together as long as
    they fit; a paragraph that is too long is cut at the ends of sentences, else at spaces.

    Args:
        path: The document's path; its stem is the title of text above the first heading.
        text: Markdown, or plain text, whose paragraphs are separated by empty lines.
        characters: Longest passage; titles come on top.

    Examples:
        >>> [p.title for p in split_document("a.md", "# Tea\\n\\nHot.\\n\\n## Green\\n\\nMild.")]
        ['Tea', 'Tea > Green']
    """
    passages: list[Passage] = []
    for title, paragraphs in _sections(path, text):
        for piece in _packed(paragraphs, characters):
            passages.append(Passage(path, len(passages), title, piece))
    return passages


def _sections(path: str, text: str) -> Iterator[tuple[str, list[str]]]:
    """Title and paragraphs of each section."""
    above: list[tuple[int, str]] = []
    paragraphs: list[str] = []
    held: list[str] = []

    def title() -> str:
        return " > ".join(name for _, name in above) or Path(path).stem

    def end_paragraph() -> None:
        if held:
            paragraphs.append("\n".join(held).rstrip())
            held.clear()

    lines = text.splitlines()
    headings, code = ({}, set()) if path.lower().endswith(".txt") else _marked(lines)
    for number, line in enumerate(lines):
        if number in headings:
            end_paragraph()
            yield title(), paragraphs[:]
            paragraphs.clear()
            depth, _ = headings[number]
            above[:] = [*(one for one in above if one[0] < depth), headings[number]]
        # Code stays in one piece where it fits.
        elif line.strip() or number in code:
            held.append(line)
        else:
            end_paragraph()
    end_paragraph()
    yield title(), paragraphs


def _marked(lines: list[str]) -> tuple[dict[int, tuple[int, str]], set[int]]:
    """Depth and name of headings by their line, and the lines of code, in Markdown."""
    from markdown_it import MarkdownIt

    # Underlined headings are none: what stands between the dashes of front matter would be one.
    parser = MarkdownIt().disable(["lheading", "inline"])
    tokens = parser.parse("\n".join(lines))
    headings = {
        token.map[0]: (int(token.tag[1:]), inside.content)
        for token, inside in pairwise(tokens)
        if token.type == "heading_open" and token.level == 0 and token.map
    }
    code = [token.map for token in tokens if token.type in ("fence", "code_block") and token.map]
    return headings, {number for first, end in code for number in range(first, end)}


def _packed(paragraphs: list[str], characters: int) -> Iterator[str]:
    held = ""
    for paragraph in paragraphs:
        for piece in _cut(paragraph, characters):
            if held and len(held) + 2 + len(piece) > characters:
                yield held
                held = ""
            held = f"{held}\n\n{piece}" if held else piece
    if held:
        yield held


def _cut(paragraph: str, characters: int) -> Iterator[str]:
    while len(paragraph) > characters:
        head = paragraph[:characters]
        ends = [match.end() for match in _SENTENCE_END.finditer(head)]
        # A cut in the first half would leave crumbs.
        at = next((end for end in reversed(ends) if characters // 2 <= end < characters), 0)
        at = at or head.rfind(" ", characters // 2) + 1 or characters
        if piece := paragraph[:at].strip():
            yield piece
        paragraph = paragraph[at:].lstrip()
    if paragraph:
        yield paragraph
