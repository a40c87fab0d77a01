"""What a swapped model carries beside its layers, until `unswap_` or `merge_` takes them out.

The notes are plain data in the model's ``__dict__``: they are copied and pickled with the model,
and they are no part of its ``state_dict``.
"""

from torch import nn

_REQUIRED_GRAD = "_deltadiff_required_grad"
_SELECTION = "_deltadiff_selection"


def note_required_grad(model: nn.Module) -> None:
    """Note which parameters require gradients, for those that are not noted yet."""
    noted = model.__dict__.setdefault(_REQUIRED_GRAD, {})
    for name, p in model.named_parameters():
        noted.setdefault(name, p.requires_grad)


def restore_required_grad(model: nn.Module) -> None:
    """Let the parameters require gradients as they did when they were noted."""
    parameters = dict(model.named_parameters())
    for name, required in model.__dict__.get(_REQUIRED_GRAD, {}).items():
        if name in parameters:
            parameters[name].requires_grad = required


def stopped_training(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that required gradients when they were noted and do not now."""
    noted = model.__dict__.get(_REQUIRED_GRAD, {})
    return {n: p for n, p in model.named_parameters() if noted.get(n) and not p.requires_grad}


def note_selection(model: nn.Module, selection: dict) -> None:
    """Note the JSON form of the selection that DiffoRA swapped the model with."""
    model.__dict__[_SELECTION] = selection


def noted_selection(model: nn.Module) -> dict | None:
    """What `note_selection` noted; None where the model was swapped without a selection."""
    return model.__dict__.get(_SELECTION)


def drop_notes(model: nn.Module) -> None:
    """Forget everything that was noted on the model."""
    for key in (_REQUIRED_GRAD, _SELECTION):
        model.__dict__.pop(key, None)
