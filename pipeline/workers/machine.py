"""What of the machine this process may really use: CPUs by affinity, quota, other ranks and load; memory by limits.

And what its children get: signals, descriptors.
"""

import fcntl
import math
import os
import resource
import signal
import sys
from pathlib import Path

MOST_WORKERS = 64
HELD_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
CGROUPS, OWN_CGROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def hold_signals() -> None:
    """Block signals in this thread, and so in the children that it starts: the parent decides, from their first moment.

    A Ctrl-C reaches every process of a terminal, also one that is still importing and has no handler.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, HELD_SIGNALS)


def child_environment() -> dict[str, str]:
    """Return what a child needs to import what this process imports, with one thread of its own."""
    paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
    return os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}


def beyond_standard(descriptor: int) -> int:
    """Return a descriptor that a child can be given: not one of 0 to 2, which are its own input and outputs.

    A process that was started with one of these closed gets such numbers for what it opens.
    """
    if descriptor > 2:
        return descriptor
    try:
        return fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 3)
    finally:
        os.close(descriptor)


def lacks_threads(error: BaseException) -> bool:
    """Whether an error says that this process was given no further thread or child: by Python, DALI or the system."""
    words = ("can't start new thread", "Resource temporarily unavailable")
    return isinstance(error, RuntimeError | BlockingIOError) and any(each in str(error) for each in words)


def few_threads() -> OSError:
    """Return the error of a process that is given no further thread or child."""
    soft = resource.getrlimit(resource.RLIMIT_NPROC)[0]
    return OSError(
        f"limit of processes and threads ({'none' if soft == resource.RLIM_INFINITY else soft} by ulimit -u; a "
        "container may have its own, pids.max) must leave room for those of the loader; raise it before the start, or "
        "lower data.num_workers and data.num_threads"
    )


def waits_in_kernel(pid: int) -> bool:
    """Whether the main thread of a process is in a wait that nothing but the end of it ends: mostly for storage."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return text.rpartition(")")[2].split()[0] == "D"


def usable_cpus() -> int:
    """CPUs that the affinity and the quotas of the control groups leave to this process, at least 1."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([affinity, *(math.floor(quota) for quota in cgroup_quotas())]))


def cgroup_quotas(root: Path = CGROUPS, own: Path = OWN_CGROUP) -> list[float]:
    """CPU quotas, in CPUs, of this process's control groups as far as they have any."""
    return [quota for folder, version in control_groups("cpu", root, own) for quota in _quota(folder, version)]


def available_memory(root: Path = CGROUPS, own: Path = OWN_CGROUP, meminfo: Path = Path("/proc/meminfo")) -> int:
    """Bytes that can be had now: of the machine, and of what the control groups allow and do not use yet."""
    try:
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        found = [int(lines["MemAvailable"].split()[0]) * 1024]
    except (OSError, KeyError, ValueError):
        return 1 << 62  # unknown
    for folder, version in control_groups("memory", root, own):
        names = ("max", "current") if version == 2 else ("limit_in_bytes", "usage_in_bytes")
        try:
            most, used = ((folder / f"memory.{name}").read_text().strip() for name in names)
            # "max": no limit
            found += [int(most) - int(used) + _file_cache(folder, version)] if most.isdigit() else []
        except (OSError, ValueError):
            continue
    return max(0, min(found))


def _file_cache(folder: Path, version: int) -> int:
    """Bytes of a control group's use that hold what was read of files: they are given up when memory is wanted."""
    try:
        lines = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return 0
    prefix = "" if version == 2 else "total_"  # with the groups below, as the use is counted
    return sum(int(lines.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))


def control_groups(controller: str, root: Path, own: Path) -> list[tuple[Path, int]]:
    """Return the folders of this process's control groups and those above, with the version (2 or 1) of each.

    Args:
        controller: such as "cpu". root: where control groups are mounted. own: names those of this process.
    """
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return []  # no Linux
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        group = Path(path.strip("/"))
        for folder in (group, *group.parents):  # inside a container the own path may be the host's: the root is ours
            found.append((root / controller / folder, 1) if controllers else (root / folder, 2))
    return found


def _quota(folder: Path, version: int) -> list[float]:
    try:
        if version == 2:
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        return [int(quota) / int(period)] if quota not in ("max", "-1") and int(period) > 0 else []
    except (OSError, ValueError):
        return []  # "max", or no such file: no limit


def free_cpus() -> int:
    """Return this rank's share of the usable CPUs, less what others kept busy in the last minute (half at most)."""
    usable = usable_cpus()
    busy = round(os.getloadavg()[0]) if hasattr(os, "getloadavg") else 0
    free = max(usable - busy, math.ceil(usable / 2))
    return max(1, free // local_ranks())


def local_ranks() -> int:
    """Return how many ranks of a training run on this host."""
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE") or "1"))


def choose_num_workers(configured: int, *, on_gpu: bool, is_confined: bool) -> int:
    """Return how many worker processes decode; 0: threads of this process.

    Args:
        configured: `data.num_workers`; -1 chooses.
        on_gpu: The model computes on a GPU, so that all CPUs but the one that launches may decode; on a CPU, half.
        is_confined: Files of unknown origin (plain folders): one process at least, even on a single CPU, so that
            deadlines and memory limits hold.
    """
    if configured >= 0:
        return configured
    free = free_cpus()
    if usable_cpus() == 1:
        return 1 if is_confined else 0
    return max(1, min(MOST_WORKERS, free - 1 if on_gpu else free // 2))
