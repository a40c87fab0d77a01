"""What a swapped model carries beside its layers, until `unswap_` or `merge_` takes them out.

The notes are plain data in the model's ``__dict__``: they are copied and pickled with the model,
and they are no part of its ``state_dict``. They lie on the model itself and are found under every
wrapper that is put around it, such as DistributedDataParallel.
"""

from collections.abc import Iterator

from torch import nn

from .plain_names import unwrapped

_REQUIRED_GRAD = "_deltadiff_required_grad"
_SELECTION = "_deltadiff_selection"


def note_required_grad(model: nn.Module) -> None:
    """Note which parameters require gradients, for those that are not noted yet."""
    model = unwrapped(model)
    earlier: dict[nn.Parameter | None, bool] = {}
    for module in _noted(model, _REQUIRED_GRAD):
        parameters = dict(module.named_parameters())
        for name, required in module.__dict__[_REQUIRED_GRAD].items():
            earlier.setdefault(parameters.get(name), required)
    noted = model.__dict__.setdefault(_REQUIRED_GRAD, {})
    for name, p in model.named_parameters():
        noted.setdefault(name, earlier.get(p, p.requires_grad))


def restore_required_grad(model: nn.Module) -> None:
    """Let the parameters require gradients as they did when they were noted."""
    for module in reversed(list(_noted(model, _REQUIRED_GRAD))):  # an outer note knows the inner
        parameters = dict(module.named_parameters())
        for name, required in module.__dict__[_REQUIRED_GRAD].items():
            if name in parameters:
                parameters[name].requires_grad = required


def stopped_training(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that required gradients when they were noted and do not now."""
    for module in _noted(model, _REQUIRED_GRAD):  # the outermost knows what the others note
        noted, named = module.__dict__[_REQUIRED_GRAD], module.named_parameters()
        return {n: p for n, p in named if noted.get(n) and not p.requires_grad}
    return {}


def note_selection(model: nn.Module, selection: dict) -> None:
    """Note the JSON form of the selection that DiffoRA swapped the model with."""
    unwrapped(model).__dict__[_SELECTION] = selection


def noted_selection(model: nn.Module) -> dict | None:
    """What `note_selection` noted; None where the model was swapped without a selection."""
    return next((module.__dict__[_SELECTION] for module in _noted(model, _SELECTION)), None)


def drop_notes(model: nn.Module) -> None:
    """Forget everything that was noted on the model."""
    for key in (_REQUIRED_GRAD, _SELECTION):
        for module in list(_noted(model, key)):
            del module.__dict__[key]


def _noted(model: nn.Module, key: str) -> Iterator[nn.Module]:
    """The modules that carry a note, an outer one before those inside of it."""
    return (module for module in model.modules() if key in module.__dict__)
