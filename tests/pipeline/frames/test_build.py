"""The build of the frame library says what it built, and never fails for lack of a compiler; damage is seen."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.frames import build
from pipeline.frames.maker import choose_frames

ROOT = Path(__file__).resolve().parents[3]


def copy_of_build(folder: Path) -> dict[str, str]:
    """The builder and its sources without a library; the environment without what would steer a build."""
    inner = Path("pipeline", "frames")
    shutil.copytree(ROOT / inner, folder / inner, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copy(ROOT / "pipeline" / "__init__.py", folder / "pipeline" / "__init__.py")
    return {k: v for k, v in os.environ.items() if k != "CXX"}


def run(folder: Path, *words: str, **environment: str) -> str:
    """`python -m pipeline.frames.build` in a copy; returns what it prints."""
    clean = copy_of_build(folder) if not (folder / "pipeline").exists() else dict(os.environ)
    command = [sys.executable, "-m", "pipeline.frames.build", *words]
    done = subprocess.run(command, cwd=folder, env=clean | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def compiler_of_words(folder: Path) -> Path:
    """A stand-in that writes its process number to the output."""
    script = folder / "compiler"
    find = 'while [ "$1" != -o ]; do shift; done'
    script.write_text(f'#!/bin/sh\n{find}\nfor i in 1 2 3 4; do echo "$PPID" >> "$2"; sleep 0.02; done\n')
    script.chmod(0o755)
    return script


@pytest.mark.integration
def test_without_a_compiler_it_says_so_and_succeeds(tmp_path: Path) -> None:
    text = run(tmp_path, PATH="/nowhere")
    assert text.startswith(
        "frames: nothing built, no C++ compiler (g++) found; install g++ or set CXX; frames are made"
    )
    assert not list(tmp_path.rglob("*.so"))


@pytest.mark.integration
def test_a_failing_compiler_leaves_the_graph(tmp_path: Path) -> None:
    assert run(tmp_path, CXX="false").startswith("frames: nothing built, the compiler failed (see above); frames are")
    assert "none is built" in run(tmp_path, "--status")


@pytest.mark.integration
def test_built_once_and_anew_when_sources_change(tmp_path: Path) -> None:
    compiler = f"env {compiler_of_words(tmp_path)}"
    assert run(tmp_path, "--if-needed", CXX=compiler).startswith("frames: built libavslowfast_frames_")
    (library,) = tmp_path.rglob("*.so")
    first = library.read_bytes()
    assert run(tmp_path, "--if-needed", CXX="false") == f"frames: built {library.name}\n"
    source = tmp_path / "pipeline" / "frames" / "csrc" / "frames.cpp"
    source.write_text(source.read_text() + "// an edit\n")
    assert "it was made from other sources; run `python -m pipeline.frames.build`" in run(tmp_path, "--status")
    run(tmp_path, "--if-needed", CXX=compiler)
    (other,) = tmp_path.rglob("*.so")  # the old one is gone
    assert other.name != library.name
    other.write_bytes(first[:-3] + bytes(3))
    assert f"{other.name} is damaged" in run(tmp_path, "--status")


@pytest.mark.integration
def test_two_builds_at_once_leave_one_whole_library(tmp_path: Path) -> None:
    environment = copy_of_build(tmp_path) | {"CXX": str(compiler_of_words(tmp_path))}
    command = [sys.executable, "-m", "pipeline.frames.build"]
    both = [subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    (library,) = tmp_path.rglob("*.so")  # nothing temporary stays
    assert build.library_problem(library) == ""
    assert len(set(library.read_bytes()[:-32].split())) == 1


def test_a_changed_byte_is_seen(tmp_path: Path) -> None:
    library = tmp_path / "x.so"
    data = bytes(range(200))
    library.write_bytes(data + build.hashlib.sha256(data).digest())
    assert build.library_problem(library) == ""
    for place in (0, 150, 210):
        changed = bytearray(library.read_bytes())
        changed[place] ^= 1
        damaged = tmp_path / "y.so"
        damaged.write_bytes(changed)
        assert build.library_problem(damaged) == "y.so is damaged; run `python -m pipeline.frames.build`"
    assert "none is built" in build.library_problem(tmp_path / "z.so")


def test_who_makes_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.frames.maker.library_text", lambda: "")
    assert choose_frames("auto", "auto", "cpu") == choose_frames("fused", "cpu", "cpu") == "fused"
    assert choose_frames("graph", "auto", "cpu") == choose_frames("auto", "dali", "cpu") == "graph"
    with pytest.raises(ValueError, match=r"data.decoder \(dali\) hands no planes to the CPU; set data.decoder=cpu"):
        choose_frames("fused", "dali", "cpu")
    monkeypatch.setattr("pipeline.frames.maker.library_text", lambda: "none is built; run X")
    assert choose_frames("auto", "auto", "cpu") == "graph"
    with pytest.raises(ValueError, match=r"no library: none is built; run X, or use data.frames=auto"):
        choose_frames("fused", "auto", "cpu")


def test_who_makes_frames_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph until the kernel has been measured there; the kernel on request, of planes from whoever decodes."""
    monkeypatch.setattr("pipeline.frames.maker.library_text", lambda: "none is built; run X")  # of a CPU's
    monkeypatch.setattr("pipeline.frames.maker.triton_problem", lambda: "")
    for decoder in ("auto", "cpu", "nvdec"):
        assert choose_frames("fused", decoder, "cuda") == "fused"
        assert choose_frames("auto", decoder, "cuda:0") == choose_frames("graph", decoder, "cuda:0") == "graph"
    with pytest.raises(ValueError, match=r"\(dali\) decodes in the graph and hands no planes out; set data.deco"):
        choose_frames("fused", "dali", "cuda")
    monkeypatch.setattr("pipeline.frames.maker.triton_problem", lambda: "package triton (missing) must be installed")
    with pytest.raises(ValueError, match=r"frames \(fused\) cannot be used: package triton \(missing\) .*frames=auto"):
        choose_frames("fused", "auto", "cuda")
    assert choose_frames("auto", "auto", "cuda") == "graph"
