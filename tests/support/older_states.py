"""States of optimizers as versions without a format number saved them."""

from typing import Any

import torch

from deltadiff.optim.saved_state import PREFIX


def as_older(state_dict: dict[str, Any], optimizer: Any) -> dict[str, Any]:
    """``state_dict`` of ``optimizer`` in that form, in which the run is an entry of "state".

    The entries of "state" and the param groups are new dicts; their tensors are the same.
    """
    if state_dict["param_groups"][0][f"{PREFIX}method"] == "DeltaLoRA":
        state_dict = as_format_2(state_dict, optimizer)
    state = {i: dict(entry) for i, entry in state_dict["state"].items()}
    groups = [dict(group) for group in state_dict["param_groups"]]
    run = {n.removeprefix(PREFIX): v for n, v in groups[0].items() if n.startswith(PREFIX)}
    for group in groups:
        for name in run:
            del group[PREFIX + name]
    method, t = run["method"], torch.tensor(run["iteration"])
    if method == "AdaLoRA":
        names = ("total_step", "target_r", "tinit", "tfinal", "deltaT")
        state["adalora"] = {**{n: run[n] for n in names}, "iteration": t}
    elif method == "DyLoRA":
        state["dylora"] = {name: run[name] for name in ("rank", "generator", "r")}
    elif method == "DeltaLoRA":
        state["delta_lora"] = _older_delta_lora(state, optimizer) | {
            "iteration": t, "w_update": run["w_update"],
        }  # fmt: skip
    return {"state": state, "param_groups": groups}


def as_format_2(state_dict: dict[str, Any], optimizer: Any) -> dict[str, Any]:
    """``state_dict`` of a `DeltaLoRA` in that form.

    There a remainder is int16, (out, in), and each factor of a past update is an entry.
    """
    state = {i: dict(entry) for i, entry in state_dict["state"].items()}
    params = [p for group in optimizer.param_groups for p in group["params"]]
    layers = {m.lora_B: m for update in optimizer.weight_updates for m in update.layers.values()}
    for p, entry in zip(params, state.values(), strict=True):
        if "remainder" in entry:
            low = entry["remainder"].view(torch.int16)
            entry["remainder"] = low.T if layers[p].transposed else low
        if "update" in entry:
            numbers, a, b = (entry.pop(name) for name in ("update", "past_A", "past_B"))
            entry["update"], ranks = numbers[:5], [int(n) for n in numbers[5:]]
            entry |= {f"past_A.{k}": t for k, t in enumerate(a.split(ranks))}
            entry |= {f"past_B.{k}": t for k, t in enumerate(b.split(ranks, dim=1))}
    groups = [{**group, f"{PREFIX}format": 2} for group in state_dict["param_groups"]]
    return {"state": state, "param_groups": groups}


def _older_delta_lora(state: dict[int, dict], optimizer: Any) -> dict[str, Any]:
    """The weights, lambdas and past updates, which the entries of "state" lose."""
    weights, past_updates = {}, {}
    for i, entry in state.items():
        entry.pop("last", None)
        if "weight" in entry:
            weights[i] = entry.pop("weight")
        if "update" in entry:
            _, _, _, count, places = entry.pop("update").tolist()
            past_updates[i] = None if count < 0 else [
                (entry.pop(f"past_B.{k}"), entry.pop(f"past_A.{k}"), bool(int(places) >> k & 1))
                for k in range(int(count))
            ]  # fmt: skip
    ratios = [update.ratio for update in optimizer.weight_updates]
    return {"weights": weights, "update_ratio": ratios, "folded": past_updates}


def as_older_model(state: dict[str, Any]) -> dict[str, Any]:
    """The state of a swapped model as older versions saved it, with "numbers" for "update"."""
    state = dict(state)
    for key in [key for key in state if key.endswith(".update")]:
        prefix = key.removesuffix("update")
        numbers, a, b = (state.pop(f"{prefix}{x}") for x in ("update", "past_A", "past_B"))
        *head, places = numbers[:5].tolist()
        ranks = [int(n) for n in numbers[5:]]
        written = [int(places) >> i & 1 for i in range(len(ranks))]
        state[f"{prefix}numbers"] = torch.tensor([*head, *written], dtype=torch.float64)
        state |= {f"{prefix}past_A.{i}": t for i, t in enumerate(a.split(ranks))}
        state |= {f"{prefix}past_B.{i}": t for i, t in enumerate(b.split(ranks, dim=1))}
    return state
