"""What products in FP8 cost in accuracy, on a real model and real text: layers, and loss curves.

python benchmarks/fp8_accuracy.py MODEL DATA [--heldout FILE] [--label-column NAME] ...

LoRA is trained as `deltadiff finetune` does, on all linear layers, over each of BASES with each
seed. The seed fixes the head, the pairs and the batches, so runs of one seed differ by the base
alone. On what the first run over bf16 left, the input x and the gradient dy of each layer are taken
in one batch. With them y, dx, dA and dB of each of PRODUCTS are compared with float64 over the
weight before it was quantised.

Products in FP8 are backend "fp8", for sm_90. With --simulate their specification,
`lora_linear_fp8_ref`, computes them anywhere. The records, which say which it was, go to
FOLDER/fp8_accuracy-<model>[-simulated]-<gpu>.json after each run.
"""

import argparse
import math
import re
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from deltadiff import FusedAdamW, lora_linear, quantise_, swap_
from deltadiff.bench.fp8_accuracy import EVERY
from deltadiff.bench.records import write
from deltadiff.errors import ArgumentError
from deltadiff.files import slug
from deltadiff.finetune.inputs import RunInputs, load_inputs, load_run_model
from deltadiff.finetune.measuring import finite
from deltadiff.finetune.models import Model
from deltadiff.finetune.runner import ModelRunner
from deltadiff.finetune.settings import Settings, make_settings
from deltadiff.finetune.training import learning_rate
from deltadiff.layers.lora_layers import swapped_layers
from deltadiff.layers.quantise import GRANULARITIES
from deltadiff.loop import batch_indices
from deltadiff.ops.backends import why_unavailable
from deltadiff.ops.decode_fp8 import Float8
from deltadiff.ops.dispatch import choose_path
from deltadiff.ops.lora_linear import autocast_dtype
from deltadiff.ops.reference_fp8 import lora_linear_fp8_ref, quantise_fp8_ref
from deltadiff.verify.lora_linear import lora_linear_outputs

RESULTS = Path(__file__).parent / "results"
OUTPUTS = ("y", "dx", "dA", "dB")
DY_DTYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


class Base(NamedTuple):
    """A frozen weight, and what multiplies by it.

    Attributes:
        name: in records and tables.
        granularity: of the weight in FP8, see `quantise_`; None for 16 bits.
        in_fp8: whether the activations are taken in FP8 as well.
    """

    name: str
    granularity: str | None = None
    in_fp8: bool = False


BASES = (
    Base("bf16"), Base("FP8 decoded, block", "block"), Base("FP8, tensor", "tensor", True),
    Base("FP8, block", "block", True),
)  # fmt: skip
PRODUCTS = (
    Base("bf16"),
    *(Base(f"FP8 decoded, {name}", name) for name in GRANULARITIES),
    *(Base(f"FP8, {name}", name, True) for name in GRANULARITIES),
)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="folder of a model, or a package that ships one")
    parser.add_argument("data", help="text, as for `deltadiff finetune`")
    for name in ("heldout", "text-column", "label-column", "prompt-column", "device"):
        parser.add_argument(f"--{name}", default=argparse.SUPPRESS)
    for name, count in (("steps", 300), ("batch-size", 32), ("max-length", 128), ("r", 8)):
        parser.add_argument(f"--{name}", type=int, default=count)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seeds", type=int, default=3, help="how many")
    parser.add_argument("--simulate", action="store_true", help="FP8 by its specification")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="FOLDER")
    args = vars(parser.parse_args(argv))
    folder, seeds, simulate = (args.pop(name) for name in ("output", "seeds", "simulate"))
    if seeds < 1:
        parser.error(f"argument --seeds: {seeds}; at least 1 is needed, and 2 for a deviation")
    chosen = {"method": "lora", "alpha": 2.0 * args["r"], "eval_batch_size": 256}
    try:
        inputs = load_inputs(settings := make_settings({**args, **chosen, "dtype": "bfloat16"}))
    except ArgumentError as error:
        parser.error(str(error))
    reason = why_unavailable("fp8", inputs.device, inputs.dtype)
    if reason is not None and not simulate:
        parser.error(f'backend "fp8" is not available: {reason}; --simulate computes in its place')
    stem = f"fp8_accuracy-{slug(Path(settings.model).name)}{'-simulated' * simulate}"
    records: list[dict] = []
    for r in measure(inputs, settings, seeds, simulate):
        records.append(r)
        if r["part"] == "run":  # after every one: an interrupted measurement keeps what it has
            write(records, folder, inputs.device, stem)
            print(in_words(r), flush=True)
    (path,) = write(records, folder, inputs.device, stem)
    print(f"{len(records)} records in {path}")
    return 0


def in_words(r: dict) -> str:
    ended = r["note"]
    if ended is None:
        heldout = (f"{name} {value:.4f}" for name, value in r["heldout"].items())
        ended = f"loss {r['final_loss']:.4f}, held out: {', '.join(heldout)}"
    return f"{r['base']}, seed {r['seed']}: {ended}"


def measure(inputs: RunInputs, settings: Settings, seeds: int, simulate: bool) -> Iterator[dict]:
    """The records of all runs, and after the first of them those of the layers."""
    about = {
        "op": "fp8_accuracy", "model": Path(settings.model).name, "data": Path(settings.data).name,
        "simulated": simulate, "steps": settings.steps, "batch": settings.batch_size,
        "lr": settings.lr, "r": settings.r, "lora_alpha": settings.alpha,
    }  # fmt: skip
    for seed in range(seeds):
        for base in BASES:
            own = replace(settings, seed=seed)
            model = load_run_model(own, inputs.model.task, inputs.device)
            runner = adapted(model, base, own, inputs, simulate)
            yield {**about, "part": "run", "base": base.name, **trained(runner, inputs, own)}
            if (seed, base) == (0, BASES[0]):
                yield from ({**about, **r} for r in of_layers(runner, inputs, own, simulate))


# ------------------------------------------------------------------------------- training


def adapted(
    model: Model, base: Base, settings: Settings, inputs: RunInputs, simulate: bool
) -> ModelRunner:
    """The model over this base, with its pairs."""
    module, asked = model.module, base.in_fp8 and not simulate
    if base.granularity is not None:
        quantise_(module, "fp8", granularity=base.granularity)
    swap_(
        module, r=settings.r, lora_alpha=settings.alpha, modules_to_save=model.head,
        seed=settings.seed, backend="fp8" if asked else None, lean=False,
    )  # fmt: skip
    if base.in_fp8 and simulate:
        for layer in swapped_layers(module).values():
            layer.register_forward_hook(specified)
    return ModelRunner(module, model.task, inputs.device, inputs.dtype)


def specified(layer: nn.Module, args: tuple[Tensor], _: Tensor) -> Tensor:
    """What a layer over FP8 gives by the specification; a hook that replaces its own result."""
    x = args[0].to(autocast_dtype(args[0]) or args[0].dtype)
    with torch.autocast(x.device.type, enabled=False):
        y = lora_linear_fp8_ref(
            x.flatten(0, -2), *Float8.of(layer.base_layer), layer.lora_A, layer.lora_B,
            scaling=layer.scaling, bias=layer.bias,
        )  # fmt: skip
    return y.view(*x.shape[:-1], -1)


def trained(runner: ModelRunner, inputs: RunInputs, settings: Settings) -> dict:
    """Train the model; its losses, and how it does on the held-out text, for a record."""
    parameters = [p for p in runner.model.parameters() if p.requires_grad]
    optimizer = FusedAdamW(parameters, lr=settings.lr, weight_decay=settings.weight_decay)
    runner.model.train()
    torch.manual_seed(settings.seed)  # for dropout
    found = []
    for step in range(settings.steps):
        rate = learning_rate(settings.lr, step, settings.steps, settings.warmup)
        optimizer.param_groups[0]["lr"] = rate
        loss, _ = runner.loss(one_batch(inputs, settings, step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.detach())
    losses = torch.stack(found).tolist()
    bad = next((step for step, loss in enumerate(losses, 1) if not math.isfinite(loss)), None)
    kept = losses if bad is None else losses[: bad - 1]
    rows = runner.predict(inputs.heldout, settings.measured_at_once)
    return {
        "seed": settings.seed, "every": EVERY,
        "curve": [round(statistics.fmean(part), 5) for part in groups(kept)],
        "final_loss": None if bad else statistics.fmean(losses[-max(1, len(losses) // 10) :]),
        "heldout": {} if bad else finite(runner.task.score(rows, inputs.heldout)[0]),
        "heldout_rows": len(inputs.heldout),
        "note": bad and f"the loss is {losses[bad - 1]} at step {bad}",
    }  # fmt: skip


def one_batch(inputs: RunInputs, settings: Settings, step: int) -> dict[str, Tensor]:
    rows = batch_indices(len(inputs.train), settings.batch_size, settings.seed, step)
    return inputs.train.batch(rows, inputs.device)


def groups(losses: Sequence[float]) -> list[Sequence[float]]:
    return [losses[i : i + EVERY] for i in range(0, len(losses), EVERY)]


# --------------------------------------------------------------------------------- layers


def of_layers(
    runner: ModelRunner, inputs: RunInputs, settings: Settings, simulate: bool
) -> Iterator[dict]:
    """The records of each type of layer: one for each product, and for each format of dy."""
    taken = activations(runner, one_batch(inputs, settings, settings.steps))
    kinds: dict[str, list[str]] = {}
    for name in taken:
        kinds.setdefault(re.sub(r"\.\d+\.", ".*.", name), []).append(name)
    layers = swapped_layers(runner.model)
    for kind, names in kinds.items():
        errors: dict[tuple, list[dict[str, float]]] = {}
        for name in names:
            for case, error in errors_of(layers[name], *taken[name], simulate):
                errors.setdefault(case, []).append(error)
        (n, k), tokens = layers[names[0]].matrix.shape, len(taken[names[0]][0])
        for (part, base, dy_dtype, kernel), found in errors.items():
            yield {
                "part": part, "layer": kind, "layers": len(names),
                "shape": {"M": tokens, "K": k, "N": n}, "base": base, "dy": dy_dtype, "by": kernel,
                "mean": {o: statistics.fmean(e[o] for e in found) for o in found[0]},
                "worst": {o: max(e[o] for e in found) for o in found[0]},
            }  # fmt: skip


def activations(runner: ModelRunner, batch: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """(x, dy) of each swapped layer in a pass over a batch: (tokens, in) and (tokens, out)."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    hooks = []
    for name, layer in swapped_layers(runner.model).items():

        def keep(_, args: tuple[Tensor], y: Tensor, name: str = name) -> None:
            x = args[0].detach().to(y.dtype).flatten(0, -2)
            y.register_hook(lambda dy: found.update({name: (x, dy.detach().flatten(0, -2))}))

        hooks.append(layer.register_forward_hook(keep))
    runner.loss(batch)[0].backward()
    runner.model.zero_grad()
    for hook in hooks:
        hook.remove()
    return found


def errors_of(
    layer: nn.Module, x: Tensor, dy: Tensor, simulate: bool
) -> Iterator[tuple[tuple, dict[str, float]]]:
    """((part, base, format of dy, kernel), relative errors) of a layer over all PRODUCTS."""
    w, bias = layer.matrix.detach(), layer.bias
    rest = layer.lora_A, layer.lora_B, None, None if bias is None else bias.to(x.dtype), dy
    wide = [None if t is None else t.double() for t in (x, w, *rest)]
    truth = lora_linear_outputs(lora_linear, *wide, scaling=layer.scaling, backend="reference")

    def errors(function, weight, x=x, rest=rest, **options) -> dict[str, float]:
        found = lora_linear_outputs(function, x, weight, *rest, scaling=layer.scaling, **options)
        return {name: relative_error(found[name], truth[name]) for name in OUTPUTS}

    def by_specification(x: Tensor, weight: Float8, a: Tensor, b: Tensor, **options) -> Tensor:
        return lora_linear_fp8_ref(x, *weight, a, b, **options)

    for base in PRODUCTS:
        weight = w if base.granularity is None else quantised(w, base.granularity)
        backend = "fp8" if base.in_fp8 else None
        if base.in_fp8 and simulate:
            yield ("layer", base.name, None, "specification"), errors(by_specification, weight)
        else:
            how = {"fp8_block": getattr(weight, "e4m3_block", None)}
            path = choose_path(x.device, x.dtype, backend, (*w.shape, layer.r), **how)
            key = "layer", base.name, None, path.at(len(x)).label
            yield key, errors(lora_linear, weight, backend=backend)
        for name, dtype in DY_DTYPES.items() if base.in_fp8 else ():
            # In float64, so that what tells the formats apart is their rounding alone.
            options = {"x": wide[0], "rest": wide[2:], "dy_dtype": dtype}
            found = errors(by_specification, weight, **options)
            yield ("dy", base.name, name, "specification"), {"dx": found["dx"]}


def quantised(w: Tensor, granularity: str) -> Float8:
    """A weight as `quantise_` leaves it."""
    sides = zip(GRANULARITIES[granularity], w.shape, strict=True)
    block = tuple(side or size for side, size in sides)
    return Float8(*quantise_fp8_ref(w, block), block)


def relative_error(found: Tensor, truth: Tensor) -> float:
    """|found - truth| / |truth| in the Frobenius norm; 0 where both are 0."""
    lost, norm = (found.double() - truth).norm().item(), truth.norm().item()
    return lost / norm if norm else lost


if __name__ == "__main__":
    sys.exit(main())
