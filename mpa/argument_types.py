"""Types of command line arguments, for argparse: they raise its error for a value out of range."""

import argparse


def number(least, most=None, kind=int, above: bool = False):
    """An argparse type: an int (or `kind`) from `least`, which `above` leaves out, to `most`."""

    def read(text: str):
        value = kind(text)
        if not (value > least or (value == least and not above)) or (most is not None and value > most):
            limit = f"{'more than' if above else 'at least'} {least}" + (
                f" and at most {most}" if most is not None else ""
            )
            raise argparse.ArgumentTypeError(f"must be {limit}")
        return value

    read.__name__ = kind.__name__  # for argparse's "invalid int value"
    return read


def path_map(text: str) -> tuple[str, str]:
    old, equals, new = text.partition("=")
    if not (old and equals and new):
        raise argparse.ArgumentTypeError("expected OLD=NEW, as in /workspace/data=/mnt/data")
    return old, new
