"""Build what is distributed, and prove that it is whole: `make package`.

The wheel is built from the source distribution, so one build proves both. It is then installed into
an environment that holds nothing else but what it requires, and `deltadiff` runs there, outside the
checkout.
"""

import os
import subprocess
import sys
import tempfile
import venv
from importlib import metadata
from pathlib import Path
from zipfile import ZipFile

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent

INSTALLED = """
import sys
from pathlib import Path
import deltadiff, deltadiff._C, torch

place = Path(deltadiff.__file__).resolve()
assert place.is_relative_to(Path(sys.prefix).resolve()), f"deltadiff comes from {place}"
assert Path(deltadiff._C.__file__).suffix == ".so", "the C++ extension was not built"

model, fresh = (torch.nn.Sequential(torch.nn.Linear(8, 8)) for _ in range(2))
deltadiff.swap_(model, r=2)
optimizer = deltadiff.DeltaLoRA(model)
model(torch.ones(3, 8)).sum().backward()
optimizer.step()
deltadiff.save_adapter(model, "adapter")
deltadiff.load_adapter(fresh, "adapter")
assert torch.equal(model[0].lora_B, fresh[0].lora_B) and model[0].lora_B.any()
"""


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="deltadiff-package-") as name:
        work = Path(name)
        wheel = build(work / "dist")
        check_files(wheel)
        python = environment(work / "environment")
        pip = [sys.executable, "-I", "-m", "pip", "--disable-pip-version-check"]
        run(*pip, "--python", python, "install", "-q", "--no-deps", "--no-index", wheel)
        run(python, "-I", "-c", INSTALLED, cwd=work)
        run(python.with_name("deltadiff"), "info", cwd=work)
        run(python.with_name("deltadiff"), "verify", "--quick", cwd=work, shown=False)
        print(f"package: {wheel.name} is whole, and its source distribution builds it")


def build(folder: Path) -> Path:
    """Build the source distribution and from it the wheel; returns the wheel."""
    words = [sys.executable, "-I", "-m", "build", "--no-isolation", "--outdir", folder, ROOT]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # ninja is there
    log = subprocess.run(
        list(map(str, words)), cwd=folder.parent, env=os.environ | {"PATH": path},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    if log.returncode:
        sys.exit(f"{log.stdout}\npackage: the build failed, see above")
    (wheel,) = folder.glob("*.whl")
    return wheel


def check_files(wheel: Path) -> None:
    """The wheel holds every file of the library that git knows, and nothing that it does not."""
    git = ["git", "-C", str(ROOT), "ls-files", "deltadiff", "kernels"]
    tracked = subprocess.run(git, check=True, capture_output=True, text=True).stdout.split()
    expected = {f"deltadiff/{f}" if f.startswith("kernels/") else f for f in tracked}
    names = [name for name in ZipFile(wheel).namelist() if ".dist-info/" not in name]
    extensions = {name for name in names if name.startswith("deltadiff/_C")}
    missing, foreign = expected - set(names), set(names) - expected - extensions
    if missing or foreign:
        sys.exit(f"package: the wheel lacks {sorted(missing)} and has {sorted(foreign)} besides")


def environment(folder: Path) -> Path:
    """Make an environment with links to what deltadiff requires; returns its Python."""
    venv.create(folder, symlinks=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    for name in required("deltadiff") - {"deltadiff"}:
        files = metadata.distribution(name).files or []
        for top in {file.parts[0] for file in files} - {"..", "__pycache__"}:
            if not (packages / top).exists():
                (packages / top).symlink_to(Path(metadata.distribution(name).locate_file(top)))
    return folder / "bin" / "python"


def required(name: str) -> set[str]:
    """The installed packages that one needs, and itself."""
    found, todo = set(), [name]
    while todo:
        name = todo.pop()
        if name not in found:
            found.add(name)
            wanted = map(Requirement, metadata.requires(name) or [])
            todo += [r.name for r in wanted if r.marker is None or r.marker.evaluate({"extra": ""})]
    return found


def run(*command, cwd: Path | None = None, shown: bool = True) -> None:
    """Run a command and show what it prints; end here if it fails."""
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    if shown or done.returncode:
        print(done.stdout, flush=True)
    if done.returncode:
        sys.exit(f"package: this failed: {' '.join(map(str, command))[:200]}")


if __name__ == "__main__":
    main()
