"""Draws docs/images/geometry.svg: a block, its patches, and what it donates and receives.

    .venv/bin/python docs/images/geometry.py

It shows one plane of a volume. Every box is computed by ``chunkflow_core.lattice.blocks``, as in
a run. The colours are light tints of the palette of Okabe and Ito, which people with colour
blindness can tell apart.

Source: https://jfly.uni-koeln.de/color/
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from chunkflow_core.lattice.blocks import BlockGrid, Donation
from chunkflow_core.lattice.boxes import Box, Vector, indices

FILE = Path(__file__).with_suffix(".svg")
GRID = BlockGrid(
    roi=Box((0, 0, 0), (1, 304, 304)),
    patch=(1, 64, 64),
    overlap=(0, 16, 16),
    block_size=(1, 96, 96),
    storage_chunk=(1, 32, 32),
)
"""3 × 3 blocks of 2 × 2 patches and 3 × 3 storage chunks."""
BLOCK = GRID.block((0, 1, 1))
"""The block that is drawn; it has neighbours on all sides."""
WINDOW = Box((0, 56, 56), (1, 248, 248))
"""The voxels that are shown: the block and a part of each neighbour."""

WIDTH = 640
"""Of the picture, in SVG units; a phone shows it at about half as many pixels."""
EDGE = 16
LINE = 29
SCALE = (WIDTH - 2 * EDGE) / WINDOW.shape[2]
INK, GREY = "#222222", "#8a8a8a"
PALE = "#eeeeee"
GREEN, BLUE, ORANGE, PURPLE, YELLOW = "#bfe6d8", "#c4e3f6", "#fbdf9d", "#ecc7dd", "#f6f0a0"
BY_DIRECTION = {(0, 0, 0): BLUE, (0, 0, 1): ORANGE, (0, 1, 0): PURPLE, (0, 1, 1): YELLOW}
"""Colour of a donation by the way from its donor to its receiver, in blocks."""


class Panel:
    """A title, lines of text, and below them a drawing of the window."""

    def __init__(self, top: float, title: str, lines: Sequence[str]) -> None:
        """Begin a panel ``top`` units below the picture's upper edge."""
        self.parts: list[str] = []
        self._text(EDGE, top + 34, title, 'font-size="27" font-weight="bold" text-anchor="start"')
        for number, line in enumerate(lines, start=1):
            self._text(EDGE, top + 36 + number * LINE, line, 'text-anchor="start"')
        self.top = top + 54 + len(lines) * LINE
        self.bottom = self.top + WINDOW.shape[1] * SCALE + EDGE

    def x(self, voxel: float) -> float:
        """Position in the picture of a voxel's left face."""
        return EDGE + (voxel - WINDOW.start[2]) * SCALE

    def y(self, voxel: float) -> float:
        """Position in the picture of a voxel's upper face."""
        return self.top + (voxel - WINDOW.start[1]) * SCALE

    def box(self, box: Box, fill: str = "none", line: str = "none", width: float = 1, dashes: str = "none") -> None:
        """Draw what the window shows of a box."""
        seen = box & WINDOW
        if seen:
            _, height, breadth = seen.shape
            self.parts.append(
                f'<rect x="{self.x(seen.start[2]):.1f}" y="{self.y(seen.start[1]):.1f}" '
                f'width="{breadth * SCALE:.1f}" height="{height * SCALE:.1f}" fill="{fill}" stroke="{line}" '
                f'stroke-width="{width}" stroke-dasharray="{dashes}"/>'
            )

    def label(self, y: float, x: float, *lines: str, turned: bool = False) -> None:
        """Write lines around a position in voxels; ``turned`` to be read from below."""
        turn = f'transform="rotate(-90 {self.x(x):.1f} {self.y(y):.1f})"' if turned else ""
        for number, line in enumerate(lines):
            below = self.y(y) + 8 + (number - (len(lines) - 1) / 2) * LINE
            self._text(self.x(x), below, line, turn)

    def donation(self, donation: Donation, text: str) -> None:
        """Draw a donation's arrow from its donor, and ``text`` in its box where there is room."""
        y, x = centre(donation.box)
        _, down, right = way_of(donation)
        if down and right:
            self._arrow((y - 18, x - 18), (y, x))
        elif down:
            self.label(y, x, text)
            self._arrow((y - 18, x + 30), (y, x + 30))
        elif right:
            self.label(y, x, text, turned=True)
            self._arrow((y + 30, x - 18), (y + 30, x))

    def storage_chunks(self) -> None:
        """Draw the block's storage chunks."""
        (_, y0, x0), (_, y1, x1), (_, height, width) = BLOCK.box.start, BLOCK.box.stop, GRID.storage_chunk
        for y in range(y0, y1, height):
            for x in range(x0, x1, width):
                self.box(Box((0, y, x), (1, y + height, x + width)), line=GREY, dashes="2 5")

    def outlines(self) -> None:
        """Draw the outlines of all blocks."""
        for index in GRID.indices():
            self.box(GRID.block(index).box, line=GREY, width=2)
        self.box(BLOCK.box, line=INK, width=4)

    def name_neighbours(self) -> None:
        """Write the name of each neighbour into what is seen of it, beside the overhang."""
        faces = zip(WINDOW.start, BLOCK.box.start, BLOCK.box.stop, BLOCK.reach.stop, WINDOW.stop, strict=True)
        _, y, x = [
            ((first + low) / 2, (low + high) / 2, (beyond + last) / 2) for first, low, high, beyond, last in faces
        ]
        for index in GRID.indices():
            if index != BLOCK.index:
                self.label(y[index[1]], x[index[2]], GRID.block(index).name)

    def _arrow(self, start: tuple[float, float], stop: tuple[float, float]) -> None:
        (y1, x1), (y2, x2) = start, stop
        self.parts.append(
            f'<line x1="{self.x(x1):.1f}" y1="{self.y(y1):.1f}" x2="{self.x(x2):.1f}" y2="{self.y(y2):.1f}" '
            f'stroke="{INK}" stroke-width="2.5" marker-end="url(#head)"/>'
        )

    def _text(self, x: float, y: float, text: str, attributes: str) -> None:
        self.parts.append(f'<text x="{x:.1f}" y="{y:.1f}" {attributes}>{text}</text>')


def picture() -> str:
    """The picture as the text of an SVG file."""
    patches = draw_patches(0)
    stage_1 = draw_inference(patches.bottom)
    stage_2 = draw_blending(stage_1.bottom)
    height = round(stage_2.bottom)
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH * 3 // 4}" viewBox="0 0 {WIDTH} {height}" '
            f'font-size="22" '
            f'font-family="Helvetica, Arial, sans-serif" text-anchor="middle" fill="{INK}">',
            "<title>The patches of a block, and its two stages</title>",
            '<marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="5.5" markerHeight="5.5" '
            f'orient="auto"><path d="M0,0 L10,5 L0,10 z" fill="{INK}"/></marker>',
            f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
            *patches.parts,
            *stage_1.parts,
            *stage_2.parts,
            "</svg>",
            "",
        ]
    )


def draw_patches(top: float) -> Panel:
    """The block's patches, and the names of its neighbours."""
    panel = Panel(
        top,
        "A block and its patches",
        [
            f"Block {BLOCK.name} (thick line) owns {BLOCK.patches} patches. They overlap",
            "each other and those of the neighbouring blocks.",
            "Dashed: its reach, all that its own patches touch.",
        ],
    )
    patches = [GRID.patch_box(position) for position in indices(BLOCK.first_patch, BLOCK.stop_patch)]
    first, second = patches[:2]
    panel.box(first, ORANGE)
    panel.box(second, BLUE)
    panel.box(first & second, GREEN)
    panel.outlines()
    for patch in patches:
        panel.box(patch, line=INK, width=1.5)
    panel.box(BLOCK.reach, line=INK, width=3, dashes="10 7")
    y = (first.start[1] + patches[-1].start[1]) / 2
    panel.label(y, (first.start[2] + second.start[2]) / 2, "patch")
    panel.label(y, (second.start[2] + first.stop[2]) / 2, "overlap", turned=True)
    panel.label(y, (first.stop[2] + BLOCK.box.stop[2]) / 2, "next", "patch")
    panel.name_neighbours()
    return panel


def draw_inference(top: float) -> Panel:
    """What the first stage of the block writes, and what it donates to whom."""
    panel = Panel(
        top,
        "Stage 1: inference and donate",
        [
            "The block runs its patches. It writes its core at once.",
            "It donates the other sums: those in its frame to itself,",
            "those in its overhang to its higher neighbours.",
        ],
    )
    donations = [donation for piece in GRID.pieces(BLOCK) for donation in piece.donations]
    panel.box(BLOCK.core, GREEN)
    for donation in donations:
        panel.box(donation.box, BY_DIRECTION[way_of(donation)], GREY)
    panel.storage_chunks()
    panel.outlines()
    for donation in donations:
        panel.donation(donation, "overhang")
    panel.label(*centre(BLOCK.core), "core:", "written now")
    panel.label(*centre(BLOCK.frame[0]), "frame: donated to itself")
    panel.name_neighbours()
    return panel


def draw_blending(top: float) -> Panel:
    """What the second stage of the block receives and writes."""
    panel = Panel(
        top,
        "Stage 2: receive and blend",
        [
            "Lower neighbours have donated to the block's margin.",
            "The frame is all storage chunks (dotted) that touch it.",
            "The block adds them up, and then writes its frame.",
        ],
    )
    panel.box(BLOCK.core, PALE)
    received = [donation for donor in GRID.donors(BLOCK.index) for donation in GRID.donations(donor, BLOCK.index)]
    for donation in reversed(received):  # the block's own donation, the last, lies below the others
        panel.box(donation.box, BY_DIRECTION[way_of(donation)], GREY)
    panel.storage_chunks()
    panel.outlines()
    for donation in received:
        panel.donation(donation, "margin")
    panel.box(BLOCK.core, line=INK, width=3)
    panel.label(*centre(BLOCK.core), "core:", "already written")
    panel.label((BLOCK.box.start[1] + GRID.overlap[1] + BLOCK.core.start[1]) / 2, centre(BLOCK.core)[1], "frame")
    panel.name_neighbours()
    return panel


def way_of(donation: Donation) -> Vector:
    """The way from a donation's donor to its receiver, in blocks; each number is 0 or 1."""
    (dz, dy, dx), (rz, ry, rx) = donation.donor, donation.receiver
    return (rz - dz, ry - dy, rx - dx)


def centre(box: Box) -> tuple[float, float]:
    """The middle of a box in y and x, in voxels."""
    (_, y0, x0), (_, y1, x1) = box.start, box.stop
    return ((y0 + y1) / 2, (x0 + x1) / 2)


if __name__ == "__main__":
    FILE.write_text(picture())
