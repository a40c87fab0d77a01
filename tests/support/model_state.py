"""All about a model that a refused call must not change, in a form that can be compared."""

from torch import nn


def model_state(model: nn.Module) -> dict[str, object]:
    """The modules, tensors and notes of a model, by name."""
    found: dict[str, object] = {}
    for name, module in model.named_modules():
        found[f"module {name}"] = type(module), id(module), module.training
        notes = {k: v for k, v in vars(module).items() if k.startswith("_deltadiff")}
        found[f"notes {name}"] = repr(notes)
    for name, t in (*model.named_parameters(), *model.named_buffers()):
        found[name] = id(t), t.requires_grad, t.dtype, repr(t.tolist())  # NaN equals NaN so
    return found
