"""Draws docs/images/affinities.svg: at which voxel conventions store which edge, in which channel.

    .venv/bin/python docs/images/affinities.py

Each panel shows a voxel and what its channels hold: an arrow for each of them, from the voxel to
the other one of the edge. The offsets are those of ``chunkflow_core.lattice.affinities``. Colours
are of the palette of Okabe and Ito, which people with colour blindness can tell apart.

Source: https://jfly.uni-koeln.de/color/
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from chunkflow_core.lattice.affinities import CONVENTIONS, Offsets
from chunkflow_core.lattice.boxes import AXES, Vector

FILE = Path(__file__).with_suffix(".svg")
WIDTH, HEIGHT = 240, 270
"""Size of a panel in SVG units."""
VOXEL = 60
CENTRE = (WIDTH / 2, 146)
INK, GREY = "#222222", "#b0b0b0"
COLOURS = ("#d55e00", "#009e73", "#0072b2")
"""Colours of edges along z, y, x."""


def place(position: Vector) -> tuple[float, float]:
    """Position in a panel of a voxel's centre, relative to the voxel that is drawn.

    y goes down and x to the right; a higher section is drawn lower and to the left of it.
    """
    z, y, x = position
    return CENTRE[0] + VOXEL * (x - 0.55 * z), CENTRE[1] + VOXEL * (y + 0.55 * z)


def conventions() -> Iterator[tuple[list[str], Offsets]]:
    """Each list of offsets, with all names that it has."""
    for offsets in dict.fromkeys(CONVENTIONS.values()):
        yield [name for name, others in CONVENTIONS.items() if others == offsets], offsets


def panel(names: list[str], offsets: Offsets) -> Iterator[str]:
    """The elements of a panel: names, voxels, and an arrow for each channel."""
    yield text(WIDTH / 2, 24, ", ".join(names), 'font-weight="bold"')
    places = [(0, 0, 0), *offsets]
    for position in sorted(places):
        x, y = place(position)
        fill = "#dddddd" if not any(position) else "none"
        corner = f'x="{x - VOXEL / 2:.1f}" y="{y - VOXEL / 2:.1f}"'
        yield f'<rect {corner} width="{VOXEL}" height="{VOXEL}" fill="{fill}" stroke="{GREY}"/>'
    for number, offset in enumerate(offsets):
        axis = next(axis for axis in range(3) if offset[axis])
        colour, sign = COLOURS[axis], offset[axis]
        (x, y), (here_x, here_y) = place(offset), place((0, 0, 0))
        yield (
            f'<line x1="{here_x:.1f}" y1="{here_y:.1f}" x2="{x:.1f}" y2="{y:.1f}" stroke="{colour}" '
            f'stroke-width="3" marker-end="url(#{AXES[axis]})"/>'
        )
        right, down = ((-sign * 30, sign * 42), (0, sign * 16), (sign * 4, -18))[axis]
        label = f"{number}: {AXES[axis]}{'−' if sign < 0 else '+'}1"
        yield text(x + right, y + 5 + down, label, f'fill="{colour}"')


def text(x: float, y: float, content: str, attributes: str) -> str:
    """A line of text, centred at a position."""
    return f'<text x="{x:.1f}" y="{y:.1f}" {attributes}>{content}</text>'


def picture() -> str:
    """The picture as the text of an SVG file."""
    panels = [list(panel(*each)) for each in conventions()]
    width = WIDTH * len(panels)
    heads = [
        f'<marker id="{axis}" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="4.5" markerHeight="4.5" '
        f'orient="auto"><path d="M0,0 L10,5 L0,10 z" fill="{colour}"/></marker>'
        for axis, colour in zip(AXES, COLOURS, strict=True)
    ]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" viewBox="0 0 {width} {HEIGHT}" font-size="15" '
            f'font-family="Helvetica, Arial, sans-serif" text-anchor="middle" fill="{INK}">',
            "<title>The edges that conventions store at a voxel, and the channel of each</title>",
            *heads,
            f'<rect width="{width}" height="{HEIGHT}" fill="#ffffff"/>',
            *(
                line
                for number, parts in enumerate(panels)
                for line in [f'<g transform="translate({number * WIDTH} 0)">', *parts, "</g>"]
            ),
            "</svg>",
            "",
        ]
    )


if __name__ == "__main__":
    FILE.write_text(picture())
