"""Dependencies, the builds of the compiled libraries, and the packages under one name.

The checkout is the import root (`python -m`, `torchrun -m`, pytest): nothing named `model` or `pipeline` is put into
anybody's site-packages; an installation makes them importable as `avslowfast.model` and so on (avslowfast/__init__.py).
`pip install -e . --no-build-isolation` builds the fused operations, the model's and the pipeline's, with what is here.
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
    "pillow",
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


def build_libraries() -> None:
    """Run both builders, which write into the checkout and never fail for lack of a compiler; say what they did.

    pip shows this only with --verbose; `python -m kernels.build --status` says the same at any time, and
    `python -m pipeline.frames.build --status`.
    """
    sys.path.insert(0, str(ROOT))
    from kernels.build import build_if_needed
    from pipeline.frames.build import build_if_needed as build_frames_if_needed

    sys.stderr.write(build_frames_if_needed() + "\n")
    sys.stderr.write(build_if_needed() + "\n")


class BuildKernels(Command):
    """The step of `build` that makes the libraries."""

    def initialize_options(self) -> None:
        """No options."""

    def finalize_options(self) -> None:
        """No options."""

    def run(self) -> None:
        """Build in place."""
        build_libraries()


class Build(build):
    """`build`, with the libraries first; what pip runs, editable or not."""

    sub_commands = [("build_kernels", None), *build.sub_commands]  # noqa: RUF012


class Develop(build_ext):
    """What the old `setup.py develop` runs in place of `build`."""

    def run(self) -> None:
        """Build in place."""
        build_libraries()


setup(
    name="avslowfast-dali",
    version="0.1.0",
    description="AVSlowFast: audiovisual video recognition fed by NVIDIA DALI, with fused CPU and CUDA operations",
    python_requires=">=3.11",
    packages=list(PACKAGES),
    package_dir=PACKAGES,
    package_data={
        "avslowfast.kernels": ["*.so", "*.json", "csrc/*"],
        "avslowfast.pipeline.frames": ["*.so", "csrc/*"],
        "avslowfast.model": ["variant_costs.json"],
        "avslowfast.experiments": ["configs/*.yaml"],
    },
    cmdclass={"build": Build, "build_kernels": BuildKernels, "build_ext": Develop},
    install_requires=REQUIRES,
    extras_require=EXTRAS,
)
