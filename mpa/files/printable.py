"""Text of models, datasets and file names for a terminal."""


def printable(text: str | None, longest: int = 1000) -> str:
    """The text without control characters, which a terminal would obey, and cut at `longest`; "–" for None."""
    return "–" if text is None else "".join(c if c.isprintable() else "\ufffd" for c in str(text)[:longest])
