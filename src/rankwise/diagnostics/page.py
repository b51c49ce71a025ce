"""The skeleton of every report: one self-contained HTML page that runs no script and trusts no name it is given."""

import html
import math
from collections.abc import Collection, Sequence

# Nothing may be fetched: not by the page, not by anything a data set or a folder name smuggled into it.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_CSS = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1b1b1b; background: #fff; max-width: 60rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.7rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .3rem; }
p.lead { font-size: 1.1rem; margin-top: .3rem; } p.note { color: #555; margin: .2rem 0 .6rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .4rem .6rem; border-bottom: 1px solid #e2e2e2; }
th:first-child, td:first-child { text-align: left; } td { white-space: nowrap; } thead th { border-bottom: 2px solid #999; font-weight: 600; }
tr.best td { font-weight: 600; background: #f3f8fc; }
table.words th, table.words td { text-align: left; } table.words td:last-child { white-space: normal; overflow-wrap: anywhere; min-width: 22rem; }
figure { margin: 0; } figure svg { width: 100%; height: auto; } svg text { font-family: system-ui, sans-serif; }
pre { background: #f6f6f6; padding: .8rem 1rem; overflow-x: auto; border-radius: 4px; }
details { margin: .5rem 0; } summary { cursor: pointer; } .wide { overflow-x: auto; }
"""


def page(title: str, lead: str, body: str) -> str:
    """A whole page. ``title`` and ``lead`` are text and get escaped; ``body`` is HTML made by this module."""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<link rel="icon" href="data:,">
<title>{html.escape(title)}</title>
<style>{_CSS}</style>
</head>
<body>
<h1>{html.escape(title)}</h1>
<p class="lead">{html.escape(lead)}</p>
{body}
</body>
</html>
"""


def section(name: str, content: str, note: str = "") -> str:
    """A heading, a grey line that says how to read what follows, and the content (HTML)."""
    said = f'<p class="note">{html.escape(note)}</p>' if note else ""
    return f"<section><h2>{html.escape(name)}</h2>{said}{content}</section>"


def figure(name: str, svg: str) -> str:
    return f'<figure aria-label="{html.escape(name)}">{svg}</figure>'


def table(
    head: Sequence[str], rows: Sequence[Sequence[str]], *, marked: Collection[int] = (), of_words: bool = False
) -> str:
    """A table that scrolls on its own where it is wider than the page.

    Args:
        head: column headings; none where empty.
        rows: cells, as text.
        marked: numbers of the rows to stand out.
        of_words: set to the left, with line breaks in the last column, instead of to the right as numbers are.
    """
    header = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in head)
    header = f"<thead><tr>{header}</tr></thead>" if head else ""
    body = "".join(
        ('<tr class="best">' if place in marked else "<tr>")
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in row)
        + "</tr>"
        for place, row in enumerate(rows)
    )
    kind = ' class="words"' if of_words else ""
    return f'<div class="wide"><table{kind}>{header}<tbody>{body}</tbody></table></div>'


def folded(summary: str, content: str) -> str:
    """Content (HTML) behind a line of text to click on."""
    return f"<details><summary>{html.escape(summary)}</summary>{content}</details>"


def preformatted(text: str) -> str:
    return f"<pre>{html.escape(text)}</pre>"


def number(value: float | None, spec: str) -> str:
    return "undefined" if value is None or not math.isfinite(value) else format(value, spec)
