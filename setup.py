"""Build `csrc` into `deltadiff._C`, and name the packages; all else is in pyproject.toml.

The extension is optional: where it cannot be built, the installation goes on without it and says
why.
"""

import os
import shutil
import sys
from pathlib import Path

from setuptools import find_packages, setup

try:
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError as error:
    print(f"deltadiff: no C++ extension, torch cannot be imported ({error})", file=sys.stderr)
    options = {}
else:

    class OptionalBuild(BuildExtension):
        """Puts a module in the place of an extension that failed, whose import says why."""

        def run(self):
            in_sources = self.inplace or getattr(self, "editable_mode", False)
            stand_in = Path("" if in_sources else self.build_lib, "deltadiff", "_C.py")
            stand_in.unlink(missing_ok=True)
            try:
                compiler = os.environ.get("CXX", "c++").split()[0]
                if os.name == "posix" and not shutil.which(compiler):
                    raise RuntimeError(f"there is no C++ compiler ({compiler} is not on the PATH)")
                super().run()
            except Exception as error:
                reason = " ".join(str(error).split())[:400]
                print(
                    f"deltadiff: the C++ extension was not built: {reason}\n"
                    "deltadiff: the CPU path will be pure PyTorch, which is slower.",
                    file=sys.stderr,
                )
                stand_in.parent.mkdir(parents=True, exist_ok=True)
                stand_in.write_text(f"raise ImportError({reason!r})\n")
                self.extensions = self.distribution.ext_modules = []

    extension = CppExtension(
        "deltadiff._C",
        sorted(str(path) for path in Path("csrc").glob("*.cpp")),
        depends=sorted(str(path) for path in Path("csrc").glob("*.h")),
        extra_compile_args=[
            "-O3",
            "-g0",
            "-fopenmp",  # at::parallel_for
            "-fno-math-errno",
            "-fno-trapping-math",
            "-Wno-uninitialized",  # GCC 12 gives these two for its own AVX-512 header
            "-Wno-maybe-uninitialized",
        ],
        extra_link_args=["-fopenmp", "-ldl"],
    )
    options = {"ext_modules": [extension], "cmdclass": {"build_ext": OptionalBuild}}

setup(
    packages=[
        *find_packages(include=["deltadiff", "deltadiff.*"]),
        "deltadiff.kernels",
        *(f"deltadiff.kernels.{name}" for name in find_packages("kernels")),
        "deltadiff.kernels.tuned",  # tables, no code
    ],
    package_dir={"deltadiff.kernels": "kernels"},
    package_data={"deltadiff": ["py.typed"], "deltadiff.kernels.tuned": ["*.json"]},
    **options,
)
