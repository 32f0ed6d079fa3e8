"""Text of models, datasets and file names for a terminal, and sizes for people."""


def printable(text: str | None, longest: int = 1000) -> str:
    """The text without control characters, which a terminal would obey, and cut at `longest`; "–" for None."""
    return "–" if text is None else "".join(c if c.isprintable() else "\ufffd" for c in str(text)[:longest])


def as_size(n: float) -> str:
    """Bytes with three digits in the unit that suits: "982 kB", "15.2 GB"."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if n < 999.5:
            return f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:.3g} TB"
