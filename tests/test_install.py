"""The packages from a folder outside the checkout, under one name, with nothing named `model` for everybody."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration  # starts processes or trains

ROOT = Path(__file__).resolve().parent.parent
BARE = ("pipeline", "model", "kernels", "experiments")


def run(code: str, folder: Path, site: Path) -> str:
    """Run Python code in `folder` with `site` on the path; returns what it prints."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder of packages that holds a link to this one, as an editable installation resolves it."""
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "avslowfast").symlink_to(ROOT / "avslowfast")
    return folder


MODEL = """
import sys
from avslowfast.kernels.modules import GhostBatchNorm
from avslowfast.model.config import ModelConfig
import avslowfast.pipeline.dataset
assert GhostBatchNorm.__module__ == "avslowfast.kernels.modules", GhostBatchNorm.__module__
import avslowfast.model.blocks as blocks
assert blocks.GhostBatchNorm is GhostBatchNorm  # one class, not two
"""


def test_parts_have_one_name_only_and_a_users_own_module_of_that_name_stays_his(tmp_path: Path, site: Path) -> None:
    (tmp_path / "model.py").write_text("MINE = 1\n")
    listing = f"print([name for name in {BARE!r} if name in sys.modules])\n"
    assert run(MODEL + listing + "import model\nprint(model.MINE)", tmp_path, site).split("\n") == ["[]", "1"]


def test_both_names_in_one_process_are_refused(tmp_path: Path, site: Path) -> None:
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import kernels.layout
try:
    import avslowfast.kernels.layout
except ImportError as error:
    print("use one of the two names" in str(error))
"""
    assert run(code, tmp_path, site) == "True"


def test_commands_run_under_that_name(tmp_path: Path, site: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "avslowfast.experiments.train", "--help"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert "usage: " in done.stdout


def readme_blocks() -> tuple[str, str]:
    """Return the first Python block of the README and the block of its output."""
    blocks = re.findall(r"```(\w*)\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    first = next(i for i, (language, _) in enumerate(blocks) if language == "python")
    return blocks[first][1], blocks[first + 1][1]


def test_the_python_of_the_readme_is_ten_lines_of_which_at_most_three_import() -> None:
    lines = [line for line in readme_blocks()[0].splitlines() if line]
    imports = [line for line in lines if re.match(r"(from|import) ", line)]
    assert len(lines) <= 10
    assert 1 <= len(imports) <= 3
    assert all(line.startswith("from avslowfast.") for line in imports)


@pytest.mark.integration
def test_the_python_of_the_readme_gives_what_it_says_from_any_folder(tmp_path: Path, site: Path) -> None:
    code, output = readme_blocks()
    assert run(code, tmp_path, site) == output.strip()
    assert (tmp_path / "data").is_dir()  # made where it ran, not in the checkout


@pytest.mark.integration
@pytest.mark.parametrize("editable", [True, False], ids=["editable", "copied"])
def test_pip_puts_one_name_into_site_packages(tmp_path: Path, editable: bool) -> None:
    environment = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True, timeout=120)
    python = environment / "bin" / "python"
    inner = next((environment / "lib").glob("python*")) / "site-packages"
    # This environment's packages are seen there too: its pip installs, its setuptools builds.
    (inner / "outer.pth").write_text("\n".join(p for p in sys.path if p.endswith("site-packages")))
    words = ["--quiet", "--no-deps", "--no-index", "--no-build-isolation", *(["-e"] if editable else []), str(ROOT)]
    done = subprocess.run(
        [python, "-m", "pip", "install", *words], cwd=tmp_path, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    code = f"""
import importlib.util, os
import avslowfast.kernels.library, avslowfast.model.config
from pathlib import Path
from avslowfast import ROOT
print(ROOT == Path({str(ROOT)!r}), [n for n in {BARE!r} if importlib.util.find_spec(n)])
print((ROOT / "experiments/configs/quickstart.yaml").is_file())
"""
    done = subprocess.run([python, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.stdout.split("\n")[:2] == [f"{editable} []", "True"], done.stdout + done.stderr


@pytest.mark.parametrize(
    ("choice", "index"), [("cuda", ""), ("cpu", "https://download.pytorch.org/whl/cpu"), ("cpu", "https://mirror/cpu")]
)
def test_torch_of_the_environment_is_chosen(tmp_path: Path, choice: str, index: str) -> None:
    words = ["make", "-n", f"VENV={tmp_path / '.venv'}", f"AVSF_TORCH={choice}"]
    words += [f"TORCH_CPU_INDEX={index}"] if "mirror" in index else []
    ran = subprocess.run([*words, "install"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    installs = [line for line in ran.stdout.splitlines() if " -m pip install" in line]
    assert all("-c constraints.txt" in line for line in installs)
    first = [line.split("--index-url ")[1].split(" ||")[0] for line in installs if "--index-url" in line]
    assert first == ([f"{index} torch torchvision torchaudio"] if index else [])


def test_unknown_torch_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    words = ["make", f"VENV={tmp_path / '.venv'}", "AVSF_TORCH=gpu", "install"]
    ran = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 2
    assert "error: AVSF_TORCH (gpu) must be cuda, cpu or auto" in ran.stderr
    assert not (tmp_path / ".venv").exists()
