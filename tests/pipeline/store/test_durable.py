"""Files and folders are whole or absent, whatever fails before they have their name; locks go with their processes."""

import errno
import os
import signal
import stat
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.store import durable

KILLED = """
import os, signal, sys
from pathlib import Path
from pipeline.store import durable
wait = int(sys.argv[2])
real = {"fsync": os.fsync, "replace": os.replace, "rename": os.rename}
def counted(name):
    def call(*arguments):
        global wait
        if wait == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        wait -= 1
        return real[name](*arguments)
    return call
for name in real:
    setattr(os, name, counted(name))
target = Path(sys.argv[1])
if sys.argv[3] == "file":
    durable.write_file(target, "new")
else:
    made = durable.beside(target, "partial")
    made.mkdir()
    (made / "f").write_text("new")
    durable.put_folder(made, target)
"""


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of what `os.fsync` flushed and `os.replace` and `os.rename` renamed, in order."""
    seen: list[str] = []
    fsync, replace, rename = os.fsync, os.replace, os.rename

    def flush(descriptor: int) -> None:
        seen.append("fsync " + Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def renamed(real: Callable[[Path, Path], None]) -> Callable[[Path, Path], None]:
        def call(made: Path, path: Path) -> None:
            seen.append(f"rename {made.name} {path.name}")
            real(made, path)

        return call

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(os, "replace", renamed(replace))
    monkeypatch.setattr(os, "rename", renamed(rename))
    return seen


def test_a_file_is_flushed_before_it_gets_its_name_and_its_folder_after(tmp_path: Path, calls: list[str]) -> None:
    durable.write_file(tmp_path / "a.txt", "é")
    wanted = ["fsync .a.txt.partial", "rename .a.txt.partial a.txt", f"fsync {tmp_path.name}"]
    assert calls == wanted
    assert (tmp_path / "a.txt").read_bytes() == "é".encode()
    durable.write_file(tmp_path / "a.txt", b"\0b")
    assert (tmp_path / "a.txt").read_bytes() == b"\0b"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_a_file_has_the_mode_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("x")
    durable.write_file(tmp_path / "a", "x")
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_all_of_a_folder_is_flushed_before_it_gets_its_name(tmp_path: Path, calls: list[str]) -> None:
    for name, content in (("made", "new"), ("s", "old")):
        (tmp_path / name / "deep").mkdir(parents=True)
        (tmp_path / name / "deep" / "f").write_text(content)
        (tmp_path / name / "g").write_text(content)
    durable.put_folder(tmp_path / "made", tmp_path / "s")
    place = calls.index("rename made s")
    assert Counter(calls[:place]) == Counter(["fsync deep", "fsync f", "fsync g", "fsync made", "rename s .s.old"])
    assert calls[place + 1 :] == [f"fsync {tmp_path.name}"]
    assert (tmp_path / "s" / "deep" / "f").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_process_killed_at_any_call_leaves_the_old_or_the_new(tmp_path: Path, kind: str) -> None:
    """Killed before the n-th flush or renaming, n = 0, 1, 2, ..., until it comes to its end."""
    found = []
    for wait in range(12):
        target = tmp_path / str(wait)
        old = durable.beside(target, "old")
        content = target if kind == "file" else target / "f"
        content.parent.mkdir(exist_ok=True)
        content.write_text("old")
        command = [sys.executable, "-c", KILLED, str(target), str(wait), kind]
        status = subprocess.run(command, cwd=Path(__file__).parents[3], check=False).returncode
        if not target.exists():  # only between the two renamings of a folder: the old one is whole, aside
            assert kind == "folder"
            assert (old / "f").read_text() == "old"
            found.append("aside")
        else:
            found.append(content.read_text())
        if status == 0:
            break
        assert status == -signal.SIGKILL
    wanted = ["old", "old", "new", "new"] if kind == "file" else ["old", "old", "old", "aside", "new", "new"]
    assert found == wanted


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    durable.write_file(tmp_path / "a", "old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match="No space left"):
        durable.write_file(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_disk_that_fills_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    """A real limit on the size of files, met inside `write`."""
    code = (
        "import resource, signal, sys; from pathlib import Path; from pipeline.store.durable import write_file\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "write_file(Path(sys.argv[1]), 'x' * 5000)"
    )
    (tmp_path / "a").write_text("old")
    command = [sys.executable, "-c", code, str(tmp_path / "a")]
    done = subprocess.run(command, cwd=Path(__file__).parents[3], capture_output=True, text=True, check=False)
    assert "OSError: [Errno 27] File too large" in done.stderr
    assert (tmp_path / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_folder_that_cannot_get_its_name_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("made", "s"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "f").write_text(name)
    rename = os.rename

    def broken(made: Path, path: Path) -> None:
        if made.name == "made":
            raise OSError(errno.EIO, "Input/output error")
        rename(made, path)

    monkeypatch.setattr(os, "rename", broken)
    with pytest.raises(OSError, match="Input/output error"):
        durable.put_folder(tmp_path / "made", tmp_path / "s")
    assert (tmp_path / "s" / "f").read_text() == "s"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "s"]


def test_a_lock_is_held_by_one_and_goes_with_its_process(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from pipeline.store.durable import take_lock\n"
        "lock = take_lock(Path(sys.argv[1])); print('held', flush=True); time.sleep(60)"
    )
    path = tmp_path / "lock"
    command = [sys.executable, "-c", code, str(path)]
    with subprocess.Popen(command, cwd=Path(__file__).parents[3], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(durable.BusyError, match=f"is locked by process {holder.pid}") as caught:
            durable.take_lock(path)
        assert caught.value.holder == str(holder.pid)
        holder.kill()
    with durable.take_lock(path) as lock:
        assert not lock.closed
        assert path.read_text() == f"{os.getpid()}\n"
    with durable.take_lock(path, wait=True):
        assert path.read_text() == f"{os.getpid()}\n"
