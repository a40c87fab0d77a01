"""Random arguments of the operations, each of which is certainly wrong in its place."""

import random

import torch

F32, BF16 = torch.float32, torch.bfloat16


def no_tensor(t):
    return ["x", 3, 1.5, object(), {"a": t}, b"x", torch.float32, lambda: t]


def other_kinds(t):
    """Tensors of this shape that no operation takes."""
    found = [
        t.detach().float().to_sparse(),
        t.to(torch.complex64),
        t.to(torch.int32),
        t.to("meta"),
        torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)]),
    ]
    if t.dim() == 2:
        found.append(t.detach().float().to_sparse_csr())
        found.append(torch.quantize_per_tensor(t.detach().float(), 0.1, 0, torch.qint8))
    return found


def other_shapes(t):
    found = [t[None], t.new_ones(*t.shape, 2), t.new_ones(0)]
    return found + [t.new_ones(*t.shape[:-1], t.shape[-1] + 1)] if t.dim() else found


def wrong_tensor(t):
    return [*no_tensor(t), *other_kinds(t), *other_shapes(t)]


def without_own_memory(t):
    """Tensors like t that an operation cannot write."""
    with torch.inference_mode():
        inference = t.clone()
    expanded = t[:1].clone().expand(t.shape)
    steps = [1] * t.dim()
    overlapping = t.new_ones(t.numel()).as_strided(t.shape, steps)
    return [inference, expanded, overlapping]


NUMBERS = [True, "1", None, float("nan"), float("inf"), 10**400, -(10**400), 1j, [1.0], object()]
INTS = [True, 1.5, "0", 2**63, 10**5000, -(10**5000), [0], 1j, object()]
BACKENDS = [[], {}, set(), 3, True, b"cpp", "cuda", "", object(), ["cpp"], "hopper"]


class Call:
    """A right call of an operation, and what is wrong for each of its arguments.

    Attributes:
        arguments: of the right call.
        wrong: by argument, values that are wrong in its place.
    """

    def __init__(self, op, arguments, wrong):
        self.op, self.arguments, self.wrong = op, arguments, wrong

    def tensors(self):
        """All tensors of the right call."""
        found = []
        for value in self.arguments.values():
            found += value if isinstance(value, list) else [value]
        return [t for t in found if isinstance(t, torch.Tensor)]


def read(t):
    return [*wrong_tensor(t), None]


def in_list(values, wrong_of, random_):
    """Lists with one entry that is wrong, and what is no list of as many entries."""
    place = random_.randrange(len(values))
    found = [values[:place] + [w] + values[place + 1 :] for w in wrong_of(values[place])]
    return [*found, values[:-1], [*values, values[0]], 3, "ab", iter(values), {"a": 1}, object()]


def lora_linear_call(op, device):
    x, w, a, b = (torch.ones(s, device=device) for s in ((3, 6), (5, 6), (2, 6), (5, 2)))
    arguments = {
        "x": x, "weight": w, "lora_A": a, "lora_B": b, "scaling": 0.5,
        "gate": torch.ones(2, device=device), "bias": torch.ones(5, device=device),
        "dropout": 0.25, "seed": 3, "backend": None,
    }  # fmt: skip
    wrong = {
        name: [*wrong_tensor(arguments[name]), None] for name in ("weight", "lora_A", "lora_B")
    }
    wrong["x"] = [*no_tensor(x), *other_kinds(x), None, x[:, :5], torch.ones((), device=device)]
    wrong |= {name: wrong_tensor(arguments[name]) for name in ("gate", "bias")}
    wrong |= {"scaling": NUMBERS, "dropout": [*NUMBERS, -0.1, 1.0, 2], "backend": BACKENDS}
    wrong["seed"] = [*INTS, None, torch.ones((), device=device), torch.zeros(2, dtype=torch.int64)]
    return Call(op, arguments, wrong)


def decode_4bit_call(op, device):
    """A weight of 5 x 60 numbers, whose absmax is quantised in turn."""
    sizes = {"packed": 150, "absmax": 10, "code": 16, "scale": 1, "scale_code": 256}
    tensors = {name: torch.ones(size, device=device) for name, size in sizes.items()}
    tensors |= {name: tensors[name].to(torch.uint8) for name in ("packed", "absmax")}
    tensors["offset"] = torch.ones((), device=device)
    wrong = {name: [*wrong_tensor(t), None, t.double()] for name, t in tensors.items()}
    for name in ("code", "scale_code"):  # which have gaps
        wrong[name].append(tensors[name].repeat_interleave(2)[::2])
    blocksizes = [*INTS, None, -1, 0, 16, 63, 64.0, 8192]
    wrong |= {"blocksize": [*blocksizes, 128], "scale_blocksize": blocksizes}
    wrong["shape"] = [*INTS, None, (), (5,), (5, 60, 1), (0, 60), (-5, -60), (5, 2**40), "ab"]
    wrong["dtype"] = [torch.int8, torch.complex64, "float32", None, 3, torch.ones(2, 2)]
    wrong["backend"] = BACKENDS
    settings = {"shape": (5, 60), "blocksize": 32, "scale_blocksize": 256}
    arguments = {**tensors, **settings, "dtype": torch.float32, "backend": None}
    return Call(op, arguments, wrong)


def decode_fp8_call(op, device):
    """A weight of 5 x 6 numbers in blocks of 2 x 4."""
    data = torch.ones(5, 6, device=device).to(torch.float8_e4m3fn)
    scale = torch.ones(3, 2, device=device)
    wrong = {
        "data": [t for t in wrong_tensor(data) if getattr(t, "dtype", None) != data.dtype],
        "scale": [*wrong_tensor(scale), None, scale.double(), scale.T],
        "block": [*INTS, None, (), (2,), (2, 4, 1), (0, 4), (-2, 4), (2, 2**40), "ab", [2, 4]],
        "dtype": [torch.int8, torch.complex64, "float32", None, 3, torch.ones(2, 2)],
        "backend": BACKENDS,
    }
    wrong["data"] += [
        None,
        data[None],
        data[0],
        data[:, ::2],
        data.T,
        data[:, :0],
        data.view(torch.uint8),
    ]
    arguments = {"data": data, "scale": scale, "block": (2, 4)}
    return Call(op, arguments | {"dtype": torch.float32, "backend": None}, wrong)


def delta_update_call(op, device, random_):
    half = random_.random() < 0.7
    ws = [torch.ones(6, 8, dtype=BF16 if half else F32, device=device) for _ in range(2)]
    lows = [torch.zeros(6, 8, dtype=torch.int16, device=device) for _ in ws] if half else None

    def many(*shape):
        return [torch.ones(shape, device=device) for _ in ws]

    arguments = {
        "weight": ws, "lora_A": many(2, 8), "lora_B": many(6, 2), "delta_A": many(2, 8),
        "delta_B": many(6, 2), "scale": [0.5, 0.25], "rounding": "remainder" if half else None,
        "remainder": lows, "seed": 1, "step": 2, "apply": torch.ones((), device=device),
        "backend": None,
    }  # fmt: skip

    def written(t):
        return [*read(t), *without_own_memory(t)]

    wrong = {
        name: in_list(arguments[name], read, random_)
        for name in ("lora_A", "lora_B", "delta_A", "delta_B")
    }
    for name in ("delta_A", "delta_B"):  # memory that W is written to
        first, second = arguments[name]
        bytes_ = ws[0].view(torch.uint8).flatten()[: 4 * first.numel()]
        wrong[name].append([bytes_.view(F32).view(first.shape), second])
    wrong["weight"] = in_list(ws, written, random_)
    wrong["weight"] += [[ws[0], ws[0]], [ws[1], ws[1]], [ws[0], ws[0][:]]]
    if lows is not None:
        wrong["remainder"] = in_list(lows, written, random_)
        wrong["remainder"] += [[lows[0], lows[0]], [ws[0].view(torch.int16), lows[1]], None, []]
        wrong["rounding"] = ["up", "", 3, True, [], ["remainder"], b"nearest", "none", "None"]
    wrong["scale"] = [*NUMBERS, [0.5], [0.5, None], [0.5, 1e39], [0.5, True], (0.5, "1"), 1e200]
    wrong["seed"] = [*INTS, None, torch.ones(())]
    wrong["step"] = [*INTS, None, -1, torch.ones((), device=device)]
    wrong["apply"] = [w for w in wrong_tensor(arguments["apply"]) if not is_int32(w)]
    wrong["backend"] = BACKENDS
    return Call(op, arguments, wrong)


def is_int32(value):
    return isinstance(value, torch.Tensor) and value.dtype == torch.int32


def adamw_step_call(op, device, random_):
    dtype = random_.choice((F32, BF16))

    def many(d=F32):
        return [torch.ones(3, 4, dtype=d, device=device) for _ in range(2)]

    arguments = {
        "params": many(dtype), "grads": many(dtype), "exp_avgs": many(), "exp_avg_sqs": many(),
        "steps": torch.ones(2, device=device), "lr": 0.1, "betas": (0.9, 0.99), "eps": 1e-8,
        "weight_decay": 0.1, "deltas": many(), "anchors": many(dtype),
        "anchor_now": torch.ones((), device=device), "grad_scale": torch.ones(1, device=device),
        "found_inf": torch.zeros((), device=device), "backend": None,
    }  # fmt: skip

    def written(t):
        return [*wrong_tensor(t), *without_own_memory(t), t.T.contiguous().T]

    def must_be(t):
        return [*written(t), None]

    wrong = {n: in_list(arguments[n], written, random_) for n in ("deltas", "anchors")}
    wrong |= {n: in_list(arguments[n], must_be, random_) for n in ("exp_avgs", "exp_avg_sqs")}
    wrong["params"] = in_list(arguments["params"], must_be, random_)
    wrong["grads"] = in_list(arguments["grads"], read, random_)
    for name in ("params", "exp_avgs", "exp_avg_sqs", "deltas", "anchors"):
        mine = arguments[name]
        wrong[name] += [[mine[0], mine[0]], [mine[1], mine[1]]]
    wrong["exp_avgs"].append(arguments["exp_avg_sqs"])
    wrong["deltas"].append(arguments["exp_avgs"])
    wrong["anchors"].append(arguments["params"])
    steps = arguments["steps"]
    of_moments = arguments["exp_avgs"][0][0, :2]
    wrong["steps"] = [*wrong_tensor(steps), None, steps[:1].expand(2), of_moments]
    for name in ("lr", "eps", "weight_decay"):
        wrong[name] = [*NUMBERS, -1, -0.5]
    wrong["betas"] = [*NUMBERS, (0.9,), (0.9, 1.0), (0.9, -0.1), (0.9, None), "ab", (10**400, 0.9)]
    for name in ("grad_scale", "found_inf"):
        wrong[name] = [*no_tensor(steps), *other_kinds(torch.ones(())), torch.ones(2), True]
    wrong["anchor_now"] = [w for w in wrong["found_inf"] if not is_int32(w)]
    wrong["backend"] = BACKENDS
    return Call(op, arguments, wrong)


def draw(make, random_: random.Random):
    """(call, argument, wrong value)"""
    call = make(random_)
    name = random_.choice(sorted(call.wrong))
    return call, name, random_.choice(call.wrong[name])
