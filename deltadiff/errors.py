"""The exceptions of deltadiff.

The message of an ArgumentError names the argument, what was given and what is accepted.
"""

import signal


class ArgumentError(ValueError):
    """A value that cannot be used. Raised before anything is changed.

    Attributes:
        argument: the name of the argument, or of the file where a file cannot be read.
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
    """A value of the wrong type, or a tensor of the wrong dtype or on the wrong device."""


class CheckpointError(ArgumentError):
    """A file that is truncated, garbled or foreign, or an adapter made for another base model."""


class BackendUnavailableError(ArgumentError, RuntimeError):
    """A backend that was asked for by name cannot run here."""


class SwapError(ArgumentError, RuntimeError):
    """A model is not in the state that the call needs: not swapped, merged, or swapped already."""


class NonFiniteLossError(ArithmeticError):
    """The loss became inf or NaN. The message names the step; nothing was saved after it."""


class Interrupted(Exception):
    """A signal stopped the run, which was saved first.

    Attributes:
        number: that of the signal.
    """

    def __init__(self, place: object = None, number: int = signal.SIGINT):
        super().__init__(place)
        self.number = int(number)


def reason(error: BaseException) -> str:
    """What an error of another library says, in one line; its class where it says nothing."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror  # without the name of the file, which messages have anyway
    return (str(error).strip() or type(error).__name__).splitlines()[0]
