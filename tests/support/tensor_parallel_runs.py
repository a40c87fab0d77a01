"""torch's tensor parallelism of fsdp_runs' models."""

from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)


def split_up(model, suffix="", **options):
    """Split each MLP by columns, then by rows; ``options`` are those of torch's styles."""
    columns, rows = ColwiseParallel, RowwiseParallel
    styles = {"gate_proj": columns, "up_proj": columns, "down_proj": rows}
    mesh = init_device_mesh(next(model.parameters()).device.type, (2,))
    base = model.base_model.model if suffix else model
    for layer in base.model.layers:
        plan = {f"mlp.{name}{suffix}": style(**options) for name, style in styles.items()}
        parallelize_module(layer, mesh, plan)
    return model
