"""A small part of Markdown to HTML, for the text of reports.

Understood: `#` to `####` headings, paragraphs, `-` lists, fenced code, `code`, **bold**, *emphasis*, links.
Everything else is shown as it is written; HTML in the source is escaped.
"""

from __future__ import annotations

import re
from html import escape

_FENCE = re.compile(r"^```[^\n]*\n(.*?)^```[ \t]*$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[([^\]<]+)\]\(((?:https?:|#|\.{0,2}/|[\w-]+[./])[^)\s<]*)\)")


def to_html(source: str) -> str:
    """Return the HTML of a text in the Markdown subset above."""
    parts, end = [], 0
    for fence in _FENCE.finditer(source):
        parts += [_block(block) for block in _blocks(source[end : fence.start()])]
        parts.append(f"<pre><code>{escape(fence.group(1))}</code></pre>")
        end = fence.end()
    parts += [_block(block) for block in _blocks(source[end:])]
    return "\n".join(parts)


def _blocks(source: str) -> list[str]:
    # A heading stands alone even when no empty line follows it.
    apart = re.sub(r"^(#{1,4} .*)$", r"\n\1\n", source, flags=re.MULTILINE)
    return [block.strip() for block in re.split(r"\n\s*\n", apart) if block.strip()]


def _block(block: str) -> str:
    if heading := re.match(r"(#{1,4}) (.*)", block):
        level = max(2, len(heading.group(1)))  # the page's own title is its only h1
        return f"<h{level}>{_inline(heading.group(2))}</h{level}>"
    if block.startswith("- "):
        items = re.split(r"^- ", block, flags=re.MULTILINE)[1:]
        return "<ul>" + "".join(f"<li>{_inline(item.strip())}</li>" for item in items) + "</ul>"
    return f"<p>{_inline(block)}</p>"


def _inline(text: str) -> str:
    """Mark up one run of text; code spans are left out of every other rule."""
    pieces = re.split(r"`([^`]+)`", text)
    marked = [
        _emphasis(piece) if index % 2 == 0 else f"<code>{escape(piece)}</code>"
        for index, piece in enumerate(pieces)
    ]
    return "".join(marked)


def _emphasis(text: str) -> str:
    # No rule reaches across a tag that an earlier one wrote, so tags always close in order.
    html = escape(text)
    html = re.sub(r"\*\*(?=\S)([^<]*?\S)\*\*", r"<strong>\1</strong>", html)
    html = re.sub(r"(?<![\w*])\*(?=\S)([^<*]*?\S)\*(?![\w*])", r"<em>\1</em>", html)
    return _LINK.sub(r'<a href="\2">\1</a>', html)
