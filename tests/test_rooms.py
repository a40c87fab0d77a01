"""The rooms of the house: who may import whom, and what `import deltadiff` loads and needs.

The contracts are in pyproject.toml. `make lint` holds the code to them, on a built tree, because
`deltadiff.kernels` lies elsewhere in a checkout.
"""

import subprocess
import sys
from pathlib import Path

import importlinter.api
import pytest

import deltadiff

ROOT = Path(deltadiff.__file__).resolve().parent.parent

GRAPH = """
import sys
sys.path.insert(0, sys.argv[1])
import grimp
print("\\n".join(sorted(grimp.build_graph("deltadiff", cache_dir=None).modules)))
"""


@pytest.fixture(scope="module")
def modules(tmp_path_factory) -> set[str]:
    """The modules that the contracts are checked on."""
    tree = tmp_path_factory.mktemp("tree")
    build = ["setup.py", "-q", "build_py", "--build-lib", str(tree)]
    subprocess.run([sys.executable, *build], cwd=ROOT, check=True, capture_output=True)
    graph = subprocess.run(
        [sys.executable, "-I", "-c", GRAPH, str(tree)], check=True, capture_output=True, text=True
    )
    return set(graph.stdout.split())


def contracts() -> dict[str, dict]:
    options = importlinter.api.read_configuration(str(ROOT / "pyproject.toml"))
    return {contract["name"]: contract for contract in options["contracts_options"]}


def test_the_graph_holds_the_kernels(modules):
    files = (ROOT / "kernels").rglob("*.py")
    places = (path.relative_to(ROOT).with_suffix("") for path in files)
    names = {".".join(("deltadiff", *place.parts)).removesuffix(".__init__") for place in places}
    assert "deltadiff.kernels.lora_linear.portable" in names and names <= modules


def test_the_graph_holds_every_file(modules):
    files = [path.relative_to(ROOT) for path in (ROOT / "deltadiff").rglob("*.py")]
    names = {".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in files}
    names -= {"deltadiff._C"}  # stands for an extension that could not be built
    assert names <= modules


def test_every_room_has_a_layer():
    layers = contracts()["Imports point down"]["layers"]
    named = {name.strip() for layer in layers for name in layer.replace(":", "|").split("|")}
    folders = {path.parent.name for path in (ROOT / "deltadiff").glob("*/__init__.py")}
    files = {path.stem for path in (ROOT / "deltadiff").glob("*.py")}
    assert named == (folders | files | {"kernels"}) - {"__init__", "_C"}


def test_no_contract_has_an_exception():
    for name, contract in contracts().items():
        assert "ignore_imports" not in contract, name


def test_every_room_says_what_is_in_it():
    for path in (ROOT / "deltadiff").glob("*/__init__.py"):
        assert path.read_text().startswith('"""'), path


# ---------------------------------------------------------------- import deltadiff

ALONE = """
import sys

class OnlyTorchAndSafetensors:
    # Finds no other package, as if none were installed; torch comes with what it requires.
    FOUND = {
        "deltadiff", "safetensors", "torch", "torchgen", "filelock", "fsspec", "jinja2",
        "markupsafe", "mpmath", "networkx", "sympy", "typing_extensions", *sys.stdlib_module_names,
    }

    def __init__(self, finder):
        self.finder = finder

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top in self.FOUND or top.startswith("_"):  # parts of Python have such names
            return self.finder.find_spec(name, path, target)

sys.meta_path[:] = map(OnlyTorchAndSafetensors, sys.meta_path)
import deltadiff
for name in deltadiff.__all__:
    getattr(deltadiff, name)
print(*sys.modules)
"""


def test_import_needs_torch_and_safetensors_alone():
    done = subprocess.run([sys.executable, "-I", "-c", ALONE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = done.stdout.split()
    assert "deltadiff.ops.lora_linear" in loaded
    for room in ("bench", "finetune", "tuning", "verify"):
        assert not [name for name in loaded if name.startswith(f"deltadiff.{room}")], room
