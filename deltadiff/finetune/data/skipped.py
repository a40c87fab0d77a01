"""`Skipped`: what was left out of some text, and why."""


class Skipped:
    """Counts what was left out, by its reason, and remembers where each reason was met first.

    A reason completes the sentence "3 were skipped: they are ...", such as "without a label".
    """

    def __init__(self) -> None:
        self._found: dict[str, tuple[int, str]] = {}

    def add(self, reason: str, place: str, count: int = 1) -> None:
        """Note that something was left out that stands in ``place``, such as "a.csv, line 7"."""
        before, first = self._found.get(reason, (0, place))
        self._found[reason] = before + count, first

    def __add__(self, other: "Skipped") -> "Skipped":
        both = Skipped()
        for part in (self, other):
            for reason, (count, place) in part._found.items():
                both.add(reason, place, count)
        return both

    @property
    def counts(self) -> dict[str, int]:
        """How many were left out for each reason."""
        return {reason: count for reason, (count, _) in self._found.items()}

    def __bool__(self) -> bool:
        return bool(self._found)

    def __str__(self) -> str:
        parts = [f"{n} {why} (first: {place})" for why, (n, place) in self._found.items()]
        return ", ".join(parts)
