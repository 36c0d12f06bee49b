"""Draws docs/architecture.svg, the data's way.

    python docs/draw_architecture.py

Light and dark by the reader's own setting; no dependency beyond the standard library.
"""

from __future__ import annotations

from html import escape
from pathlib import Path

OUT = Path(__file__).with_name("architecture.svg")
WIDTH, HEIGHT = 1000, 640
STYLE = """
  svg { --paper: #ffffff; --ink: #1b1f24; --soft: #57606a; --line: #8b949e;
        --data: #eef6fc; --code: #f6f8fa; --use: #fff4ea; }
  @media (prefers-color-scheme: dark) {
    svg { --paper: #171b21; --ink: #e6e9ee; --soft: #a7b0bb; --line: #6b7684;
          --data: #16324a; --code: #222831; --use: #432f1d; }
  }
  .paper { fill: var(--paper) } .ink { fill: var(--ink) } .soft { fill: var(--soft) }
  rect.data { fill: var(--data); stroke: #0072b2 } rect.code { fill: var(--code); stroke: var(--line) }
  rect.use { fill: var(--use); stroke: #d55e00 }
  path { fill: none; stroke: var(--line); stroke-width: 1.6 } path.head { fill: var(--line); stroke: none }
  text { font-family: system-ui, -apple-system, 'Segoe UI', sans-serif; text-anchor: middle }
  .name { font-size: 15px; font-weight: 600 } .small { font-size: 12px } .band { font-size: 12px; text-anchor: start }
"""

# key: (x, y, width, kind, name, lines below it); kinds: data, code, use
BOXES = {
    "recordings": (30, 60, 190, "data", "recordings", ("any rate, channels, format", "some of them broken")),
    "manifest": (290, 60, 190, "data", "manifest", ("speech, label, speaker, ...", "corpora, splits, leaks")),
    "audio": (30, 200, 190, "code", "audio", ("the middle 2 s, or windows", "float32 mono at 48 kHz")),
    "features": (290, 200, 190, "code", "features", ("log-mel 64 x 188", "FeatureConfig.fingerprint()")),
    "shards": (550, 200, 190, "data", "shards  [Ray Data]", ("part-*.parquet", "manifest.json last")),
    "fit": (
        780,
        200,
        190,
        "code",
        "training  [Ray Train]",
        ("sampling, augment, losses", "models; checkpoints, resume"),
    ),
    "predictor": (290, 350, 190, "code", "Predictor", ("the one path from audio", "to probabilities")),
    "bundle": (780, 350, 190, "data", "bundle", ("weights, labels in order,", "features, figures, card")),
    "scoring": (30, 490, 190, "code", "scoring  [Ray Data]", ("blocks, ledger, resume", "one row a recording, always")),
    "serve": (290, 490, 190, "code", "serve  [Ray Serve]", ("batches, queues, limits", "problem documents")),
    "report": (550, 490, 190, "use", "report", ("metrics with intervals,", "verdict, figures, one HTML")),
    "clients": (780, 490, 190, "use", "page, client, curl", ("app.py speaks HTTP only", "ser predict")),
}
ARROWS = (
    ("recordings", "audio", "down"),
    ("recordings", "manifest", "right"),
    ("manifest", "shards", "corner"),
    ("audio", "features", "right"),
    ("features", "shards", "right"),
    ("shards", "fit", "right"),
    ("fit", "bundle", "down"),
    ("features", "predictor", "down"),
    ("bundle", "predictor", "left"),
    ("predictor", "scoring", "fork"),
    ("predictor", "serve", "down"),
    ("predictor", "report", "fork"),
    ("serve", "clients", "under"),
)
BOX_HEIGHT = 82


def box(x: int, y: int, width: int, kind: str, name: str, lines: tuple[str, ...]) -> str:
    """One box with its name and what is in it."""
    middle = x + width / 2
    texts = [f'<text class="name ink" x="{middle}" y="{y + 26}">{escape(name)}</text>']
    texts += [
        f'<text class="small soft" x="{middle}" y="{y + 47 + 18 * i}">{escape(t)}</text>' for i, t in enumerate(lines)
    ]
    return f'<rect class="{kind}" x="{x}" y="{y}" width="{width}" height="{BOX_HEIGHT}" rx="8"/>' + "".join(texts)


def arrow(start: str, end: str, way: str) -> str:
    """A line from box to box with a head at its end."""
    x0, y0, w0 = BOXES[start][:3]
    x1, y1, w1 = BOXES[end][:3]
    c0, c1, half = x0 + w0 // 2, x1 + w1 // 2, BOX_HEIGHT // 2
    if way == "right":
        return f'<path d="M{x0 + w0} {y0 + half} H{x1 - 8}"/>' + head(x1, y1 + half, 1, 0)
    if way == "left":
        return f'<path d="M{x0} {y0 + half} H{x1 + w1 + 8}"/>' + head(x1 + w1, y1 + half, -1, 0)
    if way == "corner":
        return f'<path d="M{x0 + w0} {y0 + half} H{c1} V{y1 - 8}"/>' + head(c1, y1, 0, 1)
    if way == "fork":
        turn = y0 + BOX_HEIGHT + 30
        return f'<path d="M{c0} {y0 + BOX_HEIGHT} V{turn} H{c1} V{y1 - 8}"/>' + head(c1, y1, 0, 1)
    if way == "under":
        turn = y0 + BOX_HEIGHT + 26
        return f'<path d="M{c0} {y0 + BOX_HEIGHT} V{turn} H{c1} V{y1 + BOX_HEIGHT + 8}"/>' + head(
            c1, y1 + BOX_HEIGHT, 0, -1
        )
    return f'<path d="M{c0} {y0 + BOX_HEIGHT} V{y1 - 8}"/>' + head(c1, y1, 0, 1)


def head(x: int, y: int, dx: int, dy: int) -> str:
    """The tip of an arrow that arrives at (x, y) in direction (dx, dy)."""
    back_x, back_y = x - 10 * dx, y - 10 * dy
    return (
        f'<path class="head" d="M{x} {y} L{back_x - 5 * dy} {back_y - 5 * dx} L{back_x + 5 * dy} {back_y + 5 * dx} Z"/>'
    )


def picture() -> str:
    """The whole drawing."""
    legend = (("data", "data on disk"), ("code", "code"), ("use", "what people see"))
    keys = "".join(
        f'<rect class="{kind}" x="{560 + 140 * i}" y="20" width="14" height="14" rx="3"/>'
        f'<text class="band soft" x="{580 + 140 * i}" y="32">{text}</text>'
        for i, (kind, text) in enumerate(legend)
    )
    parts = [box(*values) for values in BOXES.values()] + [arrow(*values) for values in ARROWS]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="The way of the data from recordings to reports and answers"><style>{STYLE}</style>'
        f'<rect class="paper" width="{WIDTH}" height="{HEIGHT}"/>{keys}{"".join(parts)}</svg>\n'
    )


if __name__ == "__main__":
    OUT.write_text(picture(), encoding="utf-8")
