"""Records in words: the names of variants, shapes and cases, and a table for a terminal."""

from collections.abc import Mapping, Sequence

from ..text import align_columns

VARIANT_NAMES = {  # in the order of columns and legends
    "frozen": "frozen (floor)",
    "copy": "copy (floor)",
    "deltadiff": "deltadiff",
    "deltadiff-layers": "deltadiff, lean=False",
    "deltadiff-fp32": "deltadiff, fp32 adapters",
    "deltadiff-4bit": "deltadiff, NF4",
    "bnb-4bit": "bitsandbytes, NF4",
    "peft-swapped-4bit": "PEFT, NF4, swapped",
    "peft-4bit": "PEFT, NF4",
    "frozen-fp8": "frozen, torch._scaled_mm",
    "deltadiff-fp8": "deltadiff, FP8",
    "deltadiff-fp8-block": "deltadiff, FP8 in blocks",
    "deltadiff-fp8-decoded": "deltadiff, FP8 decoded",
    "peft-fp8": "PEFT, FP8",
    "eager": "eager",
    "eager-cast": "eager, cast by hand",
    "peft-swapped": "PEFT, swapped",
    "peft": "PEFT",
    "peft-bf16": "PEFT, bf16 adapters",
    "peft-alone": "PEFT, own process",
    "unsloth": "Unsloth",
    "peft-compiled": "torch.compile(PEFT bf16)",
    "naive": "eager formula",
    "addmm": "addmm_",
    "torch-fused": "torch fused",
    "torch-foreach": "torch foreach",
}


def shape_text(fields: Mapping) -> str:
    """8192x4096x11008 r16 (tokens x in x out), or 64 x 4096x4096 r8 (weights x in x out)."""
    shape = fields["shape"]
    sizes = "x".join(str(shape[key]) for key in ("M", "K", "N") if shape.get(key) is not None)
    layers = f"{shape['layers']} x" if shape.get("layers") else ""
    tensors = f"{shape['tensors']} factors of" if shape.get("tensors") else ""
    rank = f"r{shape['r']}" if shape.get("r") else ""
    return " ".join(filter(None, (tensors, layers, fields.get("model"), sizes, rank)))


def case_text(fields: Mapping) -> str:
    """The dtype, mode, rounding and whatever else tells cases of one shape apart."""
    base = fields.get("base")
    words = [fields.get("block"), base or fields["dtype"], fields["mode"], fields.get("targets")]
    words += [fields.get("rounding"), "Liger" * bool(fields.get("liger"))]
    words += ["yields the delta" * bool(fields.get("delta"))]
    words += ["graph" * bool(fields["graph"]), "checkpointing" * bool(fields.get("checkpointing"))]
    words += [f"offloaded by {fields['offload']}" if fields.get("offload") else None]
    return " ".join(word for word in words if word)


def variant_text(r: Mapping) -> str:
    """The variant, and the method where a record has one (op "model")."""
    return " ".join(filter(None, (r["variant"], r.get("method"))))


def format_table(records: Sequence[Mapping]) -> str:
    """The records as text, one per line; below them the notes of variants without figures."""
    head = ("op", "shape", "case", "variant", "p20 ms", "p50 ms", "p80 ms", "x floor", "host ms")
    rows, notes = [(*head, "MiB")], []
    for r in records:
        names = [r["op"], shape_text(r), case_text(r), variant_text(r)]
        numbers = [r[key] for key in ("p20_ms", "p50_ms", "p80_ms")]
        cells = [f"{n:.3f}" if n is not None else "-" for n in numbers]
        for key, spec in (("over_floor", ".2f"), ("host_ms", ".3f"), ("peak_mib", ".1f")):
            cells.append(format(r[key], spec) if r[key] is not None else "-")
        rows.append((*names, *cells))
        if r["note"]:
            notes.append(f"{' '.join(names)}: {r['note']}")
    return "\n".join([align_columns(rows, right=range(4, len(rows[0]))), *notes])
