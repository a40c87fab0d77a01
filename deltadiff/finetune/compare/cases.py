"""Which runs a comparison has: a case for each method, seed and value of a sweep."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from ..methods.table import METHODS
from ..settings import Settings, make_settings

NO_CHECKPOINTS = 10**9  # steps between checkpoints: a run is short, and if stopped begins anew


@dataclass(frozen=True)
class Sweep:
    """A table of a paper that varies one setting.

    Attributes:
        table: which one it is, for the help text.
        field: the field of `Settings` that takes the values.
        methods: the methods that are run with each value.
        values: a function from the settings of a run to the values.
        reference: the value that the others are compared with.
    """

    table: str
    field: str
    methods: tuple[str, ...]
    values: Callable[[Settings], Sequence[float]]
    reference: float = 0.0


def _start_steps(settings: Settings) -> list[int]:
    """The paper's steps 0 to 1000, or tenths of a run that is too short for them."""
    step = 100 if settings.steps > 1000 else max(1, settings.steps // 10)
    return [i * step for i in range(11) if i * step < settings.steps]


SWEEPS = {
    "lambda": Sweep(
        "Delta-LoRA, table 8", "update_ratio", ("delta-lora", "lora-alpha-control"),
        lambda settings: (0.0, 1.0, 2.0, 3.0, 4.0, 5.0),
    ),
    "k": Sweep("Delta-LoRA, table 9", "start_step", ("delta-lora",), _start_steps),
    "ratio": Sweep(
        "DiffoRA, table 4", "ratio", ("diffora", "diffora-random"),
        lambda settings: (0.2, 0.4, 0.5, 0.7, 0.9), reference=0.5,
    ),
    "sharing": Sweep(
        "DiffoRA, table 5 (0: no sharing)", "share_r", ("diffora",),
        lambda settings: (0, settings.share_r),
    ),
    "warm-start": Sweep(
        "DiffoRA, algorithm 1 starts anew (0); 1 keeps the pairs of the search", "warm_start",
        ("diffora",), lambda settings: (0, 1),
    ),
    "dropout": Sweep(
        "LoRA with the dropout that Delta-LoRA removes (0: none)", "lora_dropout",
        ("lora", "lora-alpha-control"), lambda settings: (0.0, 0.1),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Arm:
    """What is compared: a method, in a sweep with one value of it; else ``sweep`` is None."""

    method: str
    sweep: str | None = None
    x: float | None = None

    def __str__(self) -> str:
        return self.method + ("" if self.sweep is None else f" {self.sweep} {self.x:g}")


@dataclass(frozen=True)
class Case:
    """One run. In a sweep, ``sweep`` is its name and ``x`` the value of its field; else None.

    ``stage`` is None, "tuning" for a run that a learning rate is chosen by, or "final" for one
    with the chosen rate, see `learning_rates`.
    """

    settings: Settings
    sweep: str | None = None
    x: float | None = None
    stage: str | None = None

    @property
    def folder(self) -> Path:
        return Path(self.settings.output)

    @property
    def arm(self) -> Arm:
        return Arm(self.settings.method, self.sweep, self.x)

    def __str__(self) -> str:
        rate = f" lr {self.settings.lr:g}" if self.stage else ""
        return f"{self.arm}{rate} seed {self.settings.seed}"


def cases(
    given: Mapping[str, object],
    output: Path,
    methods: Sequence[str],
    seeds: int,
    sweeps: Sequence[str] = (),
    values: Sequence[float] | None = None,
    own: Sequence[tuple[str, str, object]] = (),
) -> list[Case]:
    """All runs of a comparison, all methods with the first seed before those with the next seed.

    Args:
        given: fields of `Settings` for all runs. What a method's name stands for overrides them.
        output: the folder of the comparison.
        methods: names of METHODS.
        seeds: how many seeds each run has, counted up from the given one.
        sweeps: names of SWEEPS.
        values: instead of those that a sweep has.
        own: (pattern of methods, field, value) for settings of some methods alone.

    Raises:
        ArgumentError: see `make_settings`.
    """

    def make(method: str, seed: int, named: str = "", **swept) -> Settings:
        place = output / "runs" / f"{method}{named}-seed{seed}"
        mine = {k: v for k, v in given.items() if k not in METHODS[method].fixes}
        mine |= {name: value for pattern, name, value in own if fnmatch(method, pattern)}
        mine |= swept | {"method": method, "seed": seed, "output": str(place)}
        return make_settings({"save_every": NO_CHECKPOINTS} | mine)

    first = given.get("seed", Settings.seed)
    found = []
    for seed in range(first, first + seeds):
        found += [Case(make(method, seed)) for method in methods]
        for name in sweeps:
            sweep = SWEEPS[name]
            kind = type(getattr(Settings, sweep.field))
            for method in sweep.methods:
                for x in values or sweep.values(make(method, seed)):
                    settings = make(method, seed, f"-{name}-{x:g}", **{sweep.field: kind(x)})
                    found.append(Case(settings, name, float(x)))
    return found
