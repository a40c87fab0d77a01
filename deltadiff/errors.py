"""What deltadiff raises. Every message names the argument, what was given and what is accepted."""


class ArgumentError(ValueError):
    """A value that cannot be used. Raised before anything is changed.

    Attributes:
        argument: name of the argument (or of the file, for checkpoints).
        given: what was passed, as text.
        accepted: what would have been accepted, as text.
    """

    def __init__(self, argument: str, given: object, accepted: str):
        self.argument = argument
        self.given = str(given)
        self.accepted = accepted
        super().__init__(argument, given, accepted)

    def __str__(self) -> str:
        return f"{self.argument}: got {self.given}; accepted: {self.accepted}"


class ArgumentTypeError(ArgumentError, TypeError):
    """Wrong type, dtype or device."""


class CheckpointError(ArgumentError):
    """An adapter that is truncated, garbled, foreign, or made for another base model."""


class BackendUnavailableError(ArgumentError, RuntimeError):
    """A backend was asked for by name and cannot run here."""


class SwapError(ArgumentError, RuntimeError):
    """A model is not in the state that the call needs (un-swapped, merged, swapped twice)."""


class NonFiniteLossError(ArithmeticError):
    """The loss became inf or NaN; nothing was saved after the step that it names."""


class Interrupted(Exception):
    """The user stopped the run; what was done is saved."""
