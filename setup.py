"""Dependencies, the build of one extension library, and the packages under one name.

The checkout is the import root (`python -m`, `torchrun -m`, pytest): nothing named `model` or `pipeline` is put into
anybody's site-packages; an installation makes them importable as `avslowfast.model` and so on (avslowfast/__init__.py).
`pip install -e . --no-build-isolation` builds the fused operations with what the machine has.
"""

import sys
from pathlib import Path

from setuptools import Command, find_packages, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
REQUIRES = [
    "torch>=2.11",
    "torchvision",
    "torchaudio",
    "nvidia-dali-cuda120",
    "nvidia-cufft-cu12",
    "av",
    "pyarrow",
    "numpy",
    "pyyaml",
    "mlflow",
    "nvidia-ml-py",
    "psutil",
    "rich",
    "matplotlib",
    "safetensors",
    "scikit-learn",
]
EXTRAS = {
    "test": [
        "pytest",
        "pytest-timeout",
        "pytest-xdist",
        "hypothesis",
        "expecttest",
        "ruff",
        "mypy",
        "types-PyYAML",
        "onnx",
        "onnxscript",
        "onnxruntime",
    ],
    "dali13": ["nvidia-dali-cuda130"],
    "nvdec": ["PyNvVideoCodec>=2.2"],  # decoders that live on; Linux with an NVIDIA driver
}
PARTS = ("pipeline", "model", "kernels", "experiments")
# Name in an installation -> folder here.
PACKAGES = {"avslowfast": "avslowfast"} | {
    f"avslowfast.{name}": name.replace(".", "/")
    for part in PARTS
    for name in (part, *(f"{part}.{inner}" for inner in find_packages(str(ROOT / part))))
}


def build_kernels() -> None:
    """Run kernels/build.py, which writes into the checkout and never fails for lack of a compiler; say what it did.

    pip shows this only with --verbose; `python -m kernels.build --status` says the same at any time.
    """
    sys.path.insert(0, str(ROOT))
    from kernels.build import build_if_needed

    sys.stderr.write(build_if_needed() + "\n")


class BuildKernels(Command):
    """The step of `build` that makes the library."""

    def initialize_options(self) -> None:
        """No options."""

    def finalize_options(self) -> None:
        """No options."""

    def run(self) -> None:
        """Build in place."""
        build_kernels()


class Build(build):
    """`build`, with the library first; what pip runs, editable or not."""

    sub_commands = [("build_kernels", None), *build.sub_commands]  # noqa: RUF012


class Develop(build_ext):
    """What the old `setup.py develop` runs in place of `build`."""

    def run(self) -> None:
        """Build in place."""
        build_kernels()


setup(
    name="avslowfast-dali",
    version="0.1.0",
    description="AVSlowFast: audiovisual video recognition fed by NVIDIA DALI, with fused CPU and CUDA operations",
    python_requires=">=3.11",
    packages=list(PACKAGES),
    package_dir=PACKAGES,
    package_data={
        "avslowfast.kernels": ["*.so", "*.json", "csrc/*"],
        "avslowfast.experiments": ["configs/*.yaml"],
    },
    cmdclass={"build": Build, "build_kernels": BuildKernels, "build_ext": Develop},
    install_requires=REQUIRES,
    extras_require=EXTRAS,
)
