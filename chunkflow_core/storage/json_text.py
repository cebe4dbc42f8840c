"""JSON that somebody else has written."""

from __future__ import annotations

import json
from typing import Any

from chunkflow_core.errors import MissingInputError


def parsed_json(text: bytes, what: str) -> Any:
    """The value that a file holds; ``what`` names the file in the message.

    Raises:
        MissingInputError: It is not JSON.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        page = " It is a web page: check the address" if text.lstrip().startswith(b"<") else ""
        raise MissingInputError(f"{what} is not JSON: {error}.{page}".rstrip(".")) from error
