"""Why inference of a block is due: one word, from the plan to the stage that does it."""

from __future__ import annotations

from typing import Literal, get_args

Reason = Literal["new", "input", "forced", "donations", "output"]
"""Why inference is due.

There is no valid receipt, the input has changed, it is asked for, donations are needed again, or
storage chunks are no longer what was written.
"""

REASONS: tuple[Reason, ...] = get_args(Reason)
