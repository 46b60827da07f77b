"""Slides of the lessons, each a single HTML file that opens without a network; `make slides`.

A text cell is a slide, and so is a code cell, whose output appears with the next key, after the
class has predicted it. Of a cell with claims only the lines that it prints are shown. Sections go
to the right, their slides down. The key S opens the speaker's view, with what the instructor's page
says of the section and of each question. The files lie in `build/slides/`.
"""

import base64
import html
import json
import re
import sys
from pathlib import Path

from nbconvert.filters import ansi2html, markdown2html
from pygments import highlight
from pygments.formatters.html import HtmlFormatter
from pygments.lexers.python import PythonLexer

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "build" / "slides"
PARTS = ROOT / ".venv" / "share" / "slides"  # apart from what the lessons use
MATH = re.compile(r"\$\$(.+?)\$\$|(?<![\\$\w])\$([^$\n]+?)\$(?!\w)", re.DOTALL)
CODE = re.compile(r"```.*?```|`[^`\n]*`", re.DOTALL)
FORMATTER = HtmlFormatter(style="default", nowrap=False)

STYLE = """
.reveal { font-size: 24px; }
.reveal .slides { text-align: left; }
.reveal .slides section { height: 100%; overflow-y: auto; padding: 8px 16px;
  box-sizing: border-box; }
.reveal .anchor-link { display: none; }
.reveal h1, .reveal h2, .reveal h3 { text-transform: none; letter-spacing: normal; }
.reveal h1 { font-size: 1.9em; } .reveal h2 { font-size: 1.5em; } .reveal h3 { font-size: 1.2em; }
.reveal pre { width: 100%; box-shadow: none; font-size: 16px; line-height: 1.35; margin: 8px 0;
  white-space: pre-wrap; }
.reveal .highlight pre { background: #f6f6f6; padding: 10px 14px; border-left: 4px solid #0072b2; }
.reveal .output { font-size: 18px; overflow-x: auto; }
.reveal table { font-size: 0.8em; margin: 8px 0; border-collapse: collapse; }
.reveal table th, .reveal table td { padding: 3px 10px; border-bottom: 1px solid #ccc; }
.reveal img { max-height: 560px; background: #fff; }
.reveal blockquote { width: auto; font-style: italic; box-shadow: none; margin: 12px 0;
  padding: 8px 16px; background: #eef4f8; }
.reveal .flow { display: flex; align-items: center; gap: 10px; margin: 8px 0; font-size: 0.85em; }
.reveal .flow b { border: 1.5px solid #0072b2; border-radius: 6px; padding: 6px 12px;
  font-weight: 500; }
"""


def inlined(static: Path) -> tuple[str, str]:
    """reveal.js's styles and programs, without what they would fetch."""
    styles = [static / "dist" / name for name in ("reset.css", "reveal.css", "theme/white.css")]
    css = "\n".join(path.read_text(encoding="utf-8") for path in styles)
    css = re.sub(r"@import url\([^)]*\);?", "", css)
    programs = [static / "dist/reveal.js", static / "plugin/notes/notes.js"]
    return css, "\n".join(path.read_text(encoding="utf-8") for path in programs)


def prose(markdown: str) -> str:
    """Markdown as HTML; formulas as MathML, flow charts as boxes, links into the course as text."""
    if str(PARTS) not in sys.path:
        sys.path.append(str(PARTS))
    from latex2mathml.converter import convert

    kept: list[str] = []

    def keep(text: str) -> str:
        kept.append(text)
        return f"\x02{len(kept) - 1}\x03"

    def formula(match: re.Match) -> str:
        latex = match[1] or match[2]
        return keep(convert(latex.strip(), display="block" if match[1] else "inline"))

    text = re.sub(r"```mermaid\n(.*?)```", lambda m: keep(flow(m[1])), markdown, flags=re.DOTALL)
    text = CODE.sub(lambda m: keep(m[0]), text)
    text = MATH.sub(formula, text)
    # code first, so that Markdown sees it; then what is HTML already
    code = {i for i, one in enumerate(kept) if one.startswith("`")}
    text = re.sub("\x02(\\d+)\x03", lambda m: kept[int(m[1])] if int(m[1]) in code else m[0], text)
    text = re.sub(r"(?<!!)\[([^\]]*)\]\((?!https?:)[^)]*\)", r"\1", text)
    return re.sub("\x02(\\d+)\x03", lambda m: kept[int(m[1])], markdown2html(text))


def flow(chart: str) -> str:
    """A Mermaid flow chart of simple edges, as rows of boxes."""
    names = dict(re.findall(r"(\w+)\[\"(.+?)\"\]", chart))
    rows = []
    for line in chart.splitlines():
        steps = re.split(r"\s*-->\s*", re.sub(r"\[\".+?\"\]", "", line.strip()))
        if len(steps) < 2:
            continue
        row = []
        for step in steps:
            if not (found := re.fullmatch(r"(?:\|\"?(.*?)\"?\|)?\s*(\w+)", step)):
                raise ValueError(
                    f"Expected a box's name, perhaps behind |a label|, found {step!r}."
                )
            label, name = found.groups()
            row += [f"<span>{label or ''} →</span>"] if row else []
            row.append(f"<b>{names.get(name, name)}</b>")
        rows.append(f'<div class="flow">{" ".join(row)}</div>')
    return "\n".join(rows)


def shown(output: dict) -> str:
    """An output as HTML; of several forms the richest."""
    if output["output_type"] == "stream":
        return f"<pre>{ansi2html(''.join(output['text']))}</pre>"
    if output["output_type"] == "error":
        return f"<pre>{html.escape(output['ename'])}: {html.escape(output['evalue'])}</pre>"
    data = {kind: "".join(value) for kind, value in output["data"].items()}
    plain = html.escape(data.get("text/plain", ""))
    if "image/png" in data:
        picture = data["image/png"].replace("\n", "")
        base64.b64decode(picture, validate=True)
        return f'<img src="data:image/png;base64,{picture}" alt="{plain}">'
    return data.get("text/html") or f"<pre>{plain}</pre>"


def notes_of(page: str) -> dict[str, str]:
    """What the instructor's page says, by section and by the id of the cell that asks."""
    found = {}
    for name, minutes, todo in re.findall(r"^\| (.+?) \| (\d+) \| (.+?) \|$", page, re.MULTILINE):
        found[name] = f"{minutes} minutes. {todo}"
    rows = re.findall(r"^\| (.+?) \| (.+?) \| (.+?) \| (.+?) \|$", page, re.MULTILINE)
    for asked, wrong, truth, say in rows:
        for cell in re.findall(r"\(`([\w-]+)`\)", asked):
            found[cell] = f"Usual wrong answer: {wrong} Truth: {truth}. Say: {say}"
    return found


def slides(cells: list[dict], notes: dict[str, str]) -> list[list[str]]:
    """The slides of each section."""
    found: list[list[str]] = []
    for cell in cells:
        source = "".join(cell["source"])
        said = [notes[cell["id"]]] if cell["id"] in notes else []
        if cell["cell_type"] == "markdown":
            parts = re.split(r"(?m)^(?=## )", source)
            for part in filter(str.strip, parts):
                heading = re.match(r"## (.+)", part)
                if heading or not found:
                    found.append([])
                    said += [notes[heading[1]]] if heading and heading[1] in notes else []
                found[-1].append(slide(prose(part), said))
                said = []
        elif source.strip():
            is_claim = "claim" in cell["metadata"].get("tags", [])
            code = "" if is_claim else highlight(source, PythonLexer(), FORMATTER)
            given = "\n".join(map(shown, cell["outputs"]))
            kind = "output" if is_claim else "output fragment"
            given = f'<div class="{kind}">{given}</div>' if given else ""
            found[-1].append(slide(code + given, said))
    return found


def slide(content: str, said: list[str]) -> str:
    aside = f'<aside class="notes">{"<br>".join(map(prose, said))}</aside>' if said else ""
    return f"<section>{content}{aside}</section>"


def document(notebook: dict, page: str, css: str, programs: str) -> str:
    """The whole file."""
    title = "".join(notebook["cells"][0]["source"]).splitlines()[0].removeprefix("# ")
    stacks = slides(notebook["cells"], notes_of(page))
    body = "\n".join(f"<section>{''.join(stack)}</section>" for stack in stacks)
    colours = FORMATTER.get_style_defs(".highlight")
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>{css}\n{colours}\n{STYLE}</style></head>
<body><div class="reveal"><div class="slides">
{body}
</div></div>
<script>{programs}</script>
<script>Reveal.initialize({{ hash: true, width: 1280, height: 720, margin: 0.03, center: false,
  slideNumber: "c/t", plugins: [RevealNotes] }});</script>
</body></html>
"""


def main(number: str = "") -> int:
    static = PARTS / "sphinx_revealjs" / "_static" / "revealjs"
    if not static.exists():
        print(f"Expected reveal.js in {PARTS}, found none. Run: make slides", file=sys.stderr)
        return 1
    css, programs = inlined(static)
    TARGET.mkdir(parents=True, exist_ok=True)
    for path in sorted((ROOT / "notebooks").glob(f"{number}*_*.ipynb")):
        page = ROOT / "instructor" / f"{path.stem}.md"
        said = page.read_text(encoding="utf-8") if page.exists() else ""
        notebook = json.loads(path.read_text(encoding="utf-8"))
        target = TARGET / f"{path.stem}.html"
        target.write_text(document(notebook, said, css, programs), encoding="utf-8")
        print(target.relative_to(ROOT), f"{target.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
