"""Reports: one HTML file with text, tables, pictures, videos and charts inside it.

The file needs no network, no script and no second file, and follows the light or dark setting of its reader.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from dataengine.charts import Bar, Series, svg_bars, svg_curve
from enerverse.files import atomic_write
from enerverse.media import encode_mp4, encode_png
from enerverse.prose import to_html

__all__ = ["Bar", "Report", "svg_bars", "svg_curve"]

SHOWN = 384  # small pictures and videos are enlarged by a whole factor to at most this width, in CSS pixels
_PNG = b"\x89PNG\r\n\x1a\n"
_STYLE = """
:root {
  color-scheme: light dark;
  --page: #fff; --ink: #24292f; --faint: #656d76; --line: #d8dee4; --soft: #f6f8fa; --link: #2f6db5;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14181d; --ink: #e6edf3; --faint: #9198a1; --line: #3d444d; --soft: #1e242b; --link: #6ea8ea;
  }
}
body {
  background: var(--page); color: var(--ink); max-width: 52rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif;
}
h1 { font-size: 1.75rem; line-height: 1.25; margin: 0 0 1.5rem }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .75rem; padding-top: 1rem; border-top: 1px solid var(--line) }
h3 { font-size: 1.05rem; margin: 1.75rem 0 .5rem }
h4 { font-size: 1rem; margin: 1.25rem 0 .5rem }
a { color: var(--link) }
p, ul { margin: .75rem 0 }
code { font: .875em ui-monospace, Menlo, Consolas, monospace; background: var(--soft); padding: .1em .3em }
pre { background: var(--soft); padding: .75rem 1rem; border-radius: 4px; overflow-x: auto }
pre code { padding: 0; background: none }
figure { margin: 1.25rem 0; max-width: 100% }
figure.inline { display: inline-block; vertical-align: top; margin: .75rem 1rem .75rem 0 }
figcaption { color: var(--faint); font-size: .875rem; margin-top: .4rem; max-width: 40rem }
img, video { display: block; max-width: 100%; height: auto }
.pixels { image-rendering: crisp-edges; image-rendering: pixelated }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums }
th, td { padding: .35rem 1.25rem .35rem 0; text-align: left; border-bottom: 1px solid var(--line) }
th { font-weight: 600 }
.number { text-align: right }
"""


class Report:
    """A report under construction; every part returns the report, so calls can be chained."""

    def __init__(self, title: str) -> None:
        """Start an empty report with its plain-text title."""
        self.title = title
        self._parts: list[str] = []

    def text(self, source: str) -> Report:
        """Add text in the Markdown subset of `enerverse.prose`."""
        self._parts.append(to_html(source))
        return self

    def table(
        self, rows: Sequence[Sequence[Any] | Mapping[str, Any]], columns: Sequence[str], caption: str = ""
    ) -> Report:
        """Add a table; rows are sequences in column order, or mappings by column name (absent: empty cell).

        Floats are shown with four significant digits. Raises ValueError for a row of another length.
        """
        body = "".join(f"<tr>{''.join(map(_cell, _cells(row, columns)))}</tr>" for row in rows)
        numeric = [
            all(_is_number(_cells(row, columns)[index]) for row in rows) for index in range(len(columns))
        ]
        head = "".join(
            f'<th class="number">{escape(name)}</th>' if number and rows else f"<th>{escape(name)}</th>"
            for name, number in zip(columns, numeric, strict=True)
        )
        table = f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        return self._figure(table, caption)

    def figure(self, picture: str | bytes | np.ndarray, caption: str = "") -> Report:
        """Add a picture: SVG text, PNG bytes, or pixels uint8 `[H, W, 3]`.

        Pixels under 384 wide are enlarged by a whole factor, unsmoothed, and stand side by side. Raises
        ValueError for anything else.
        """
        if isinstance(picture, np.ndarray):
            image = f'src="data:image/png;base64,{_base64(encode_png(picture))}" alt="{escape(caption)}"'
            return self._figure(f"<img {_enlarged(picture.shape[1])} {image}>", caption, inline=True)
        if isinstance(picture, bytes) and picture.startswith(_PNG):
            image = f'src="data:image/png;base64,{_base64(picture)}" alt="{escape(caption)}"'
            return self._figure(f"<img {image}>", caption)
        svg = picture.decode("utf-8", errors="replace") if isinstance(picture, bytes) else picture
        start = svg.find("<svg")  # what stands before it, an XML declaration, has no place inside HTML
        if start < 0:
            got = repr(svg[:20])
            raise ValueError(f"picture: expected SVG text, PNG bytes or uint8 pixels [H, W, 3], got {got}")
        return self._figure(svg[start:], caption)

    def video(self, frames: np.ndarray, fps: float, caption: str = "", *, width: int | None = None) -> Report:
        """Add a silent looping H.264 video of frames uint8 `[T, H, W, 3]` at `fps` frames per second.

        Videos under 384 wide are enlarged by a whole factor, unsmoothed, and stand side by side. With `width` in
        CSS pixels, frames (of even sides) are taken as they are and shown that wide. Raises ValueError for other
        shapes or types.
        """
        content = encode_mp4(frames, fps, scale=2 if width is None else 1)
        shown = _enlarged(frames.shape[2]) if width is None else f'width="{width}"'
        source = f"data:video/mp4;base64,{_base64(content)}"
        video = f'<video autoplay loop muted playsinline {shown} src="{source}"></video>'
        return self._figure(video, caption, inline=True)

    def curve(
        self,
        series: Mapping[str, Series],
        xlabel: str,
        ylabel: str,
        caption: str = "",
        *,
        log_y: bool = False,
    ) -> Report:
        """Add a line chart; see `dataengine.charts.svg_curve`."""
        return self._figure(svg_curve(series, xlabel, ylabel, log_y=log_y), caption)

    def bars(
        self,
        rows: Sequence[Bar | tuple[Any, ...]],
        xlabel: str = "",
        caption: str = "",
        *,
        reference: tuple[str, float] | None = None,
    ) -> Report:
        """Add a bar chart with intervals; see `dataengine.charts.svg_bars`."""
        return self._figure(svg_bars(rows, xlabel, reference=reference), caption)

    def html(self) -> str:
        """Return the whole page."""
        title, parts = escape(self.title), "\n".join(self._parts)
        viewport = '<meta name="viewport" content="width=device-width, initial-scale=1">'
        head = f'<meta charset="utf-8">{viewport}<title>{title}</title><style>{_STYLE}</style>'
        body = f"<h1>{title}</h1>\n{parts}"
        return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'

    def write(self, path: str | PathLike[str]) -> Path:
        """Write the page to `path` atomically and return the path."""
        with atomic_write(path) as temporary:
            temporary.write_text(self.html(), encoding="utf-8")
        return Path(path)

    def _figure(self, content: str, caption: str, inline: bool = False) -> Report:
        kind = ' class="inline"' if inline else ""
        note = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
        self._parts.append(f"<figure{kind}>{content}{note}</figure>")
        return self


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")


def _enlarged(width: int) -> str:
    """Return the attributes that show a picture of this width in pixels large enough to see."""
    scale = max(1, SHOWN // width)
    return f'width="{width * scale}"' + (' class="pixels"' if scale > 1 else "")


def _cells(row: Sequence[Any] | Mapping[str, Any], columns: Sequence[str]) -> list[Any]:
    if isinstance(row, Mapping):
        return [row.get(name, "") for name in columns]
    if len(row) != len(columns):
        raise ValueError(f"rows: expected {len(columns)} cells, one per column, got {len(row)}: {row!r}")
    return list(row)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool)


def _cell(value: Any) -> str:
    if isinstance(value, (bool, np.bool_)):
        return f"<td>{'yes' if value else 'no'}</td>"
    if not _is_number(value):
        return f"<td>{escape(str(value))}</td>"
    whole = isinstance(value, (int, np.integer))
    return f'<td class="number">{f"{value:,}" if whole else f"{value:.4g}"}</td>'
