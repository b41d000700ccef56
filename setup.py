"""Dependencies, and the build of one extension library inside the checkout.

The checkout is the import root (`python -m`, `torchrun -m`, pytest): nothing named `model` or `pipeline` is put into
anybody's site-packages. `pip install -e . --no-build-isolation` builds the fused operations with what the machine has.
"""

import importlib.util
import sys
from pathlib import Path

from setuptools import Extension, setup
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
]
EXTRAS = {
    "test": ["pytest", "pytest-timeout", "hypothesis", "ruff", "mypy", "types-PyYAML"],
    "dali13": ["nvidia-dali-cuda130"],
}


class BuildKernels(build_ext):
    """Hands over to kernels/build.py, which writes into the checkout and never fails for lack of a compiler."""

    def run(self) -> None:
        """Build the library in place and say what was built."""
        spec = importlib.util.spec_from_file_location("avslowfast_kernels_build", ROOT / "kernels" / "build.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.stderr.write(module.build() + "\n")

    def get_outputs(self) -> list[str]:
        """Nothing to install: the library stays in the checkout."""
        return []

    def get_output_mapping(self) -> dict[str, str]:
        """Nothing to link into an editable install."""
        return {}


setup(
    name="avslowfast-dali",
    version="0.1.0",
    description="AVSlowFast: audiovisual video recognition fed by NVIDIA DALI, with fused CPU and CUDA operations",
    python_requires=">=3.11",
    packages=[],
    py_modules=[],
    ext_modules=[Extension("avslowfast_kernels", sources=[])],
    cmdclass={"build_ext": BuildKernels},
    install_requires=REQUIRES,
    extras_require=EXTRAS,
)
