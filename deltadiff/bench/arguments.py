"""Types for argparse: numbers and shapes on a command line."""


def count(text: str) -> int:
    """A whole number of at least 1."""
    number = int(text)
    if number < 1:
        raise ValueError  # argparse words it
    return number


def shape(text: str) -> tuple[int, int, int]:
    """(tokens, in, out), written 8192x4096x11008."""
    m, k, n = map(count, text.split("x"))
    return m, k, n
