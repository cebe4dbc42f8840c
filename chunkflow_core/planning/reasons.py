"""Why inference of a block is due: one word, from the plan to the stage that does it."""

from __future__ import annotations

from typing import Literal, get_args

Reason = Literal["new", "input", "forced", "donations"]
"""Why inference is due: no valid receipt, a changed input, a request, or donations needed again."""

REASONS: tuple[Reason, ...] = get_args(Reason)
