"""How fast a pipeline of stages is, what binds it, and what it would be if: pure functions of stage times.

Stages belong to sites. A site's servers (worker processes, the graph, the training thread, the GPU, the network) each
take one clip through all stages of the site; sites work side by side with queues between them, and all CPU work shares
the cores. So the rate is the least of servers / milliseconds over the sites and of cores / CPU milliseconds. What binds
is the stage whose removal gains most: differences between two runs mislead where two stages are nearly equal.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

TIE = 1.05  # nearer than 5 %: two stages bind together
CORES = "CPU cores"
CROWDED = (0.6, 1.8)  # ratio of what the cores and the fullest site allow between which servers wait for cores


@dataclass(frozen=True)
class Stage:
    """One stage, measured alone.

    Args:
        name: of it.
        site: where it runs.
        ms: milliseconds of one server of the site for one clip.
        cpu_ms: milliseconds of CPU cores in it for one clip; more than `ms` where threads share the work.
    """

    name: str
    site: str
    ms: float
    cpu_ms: float = 0.0

    def __post_init__(self) -> None:
        if not (0 <= self.ms < math.inf and 0 <= self.cpu_ms < math.inf):
            raise ValueError(f"stage {self.name}: ms ({self.ms}) and cpu_ms ({self.cpu_ms}) must be finite, at least 0")


@dataclass(frozen=True)
class Pipeline:
    """Stages in the order of a clip's path.

    Args:
        stages: with names that differ.
        servers: of each site, at least 1.
        cores: CPU cores that all stages share.
    """

    stages: tuple[Stage, ...]
    servers: Mapping[str, int]
    cores: float

    def __post_init__(self) -> None:
        names = [stage.name for stage in self.stages]
        if len(set(names)) < len(names):
            raise ValueError(f"stages ({', '.join(names)}) must have names that differ")
        for stage in self.stages:
            if self.servers.get(stage.site, 0) < 1:
                raise ValueError(f"site {stage.site!r} of stage {stage.name} must have at least one server")
        if self.cores <= 0:
            raise ValueError(f"cores ({self.cores}) must be more than 0")

    def stage(self, name: str) -> Stage:
        """Return the stage with a name; raises KeyError."""
        found = {stage.name: stage for stage in self.stages}
        return found[name]

    def scaled(self, factors: Mapping[str, float]) -> "Pipeline":
        """Return the pipeline with the times of some stages, by name, multiplied; 0 removes a stage's work."""
        unknown = factors.keys() - {stage.name for stage in self.stages}
        if unknown:
            raise KeyError(f"no stage {sorted(unknown)}")
        return replace(self, stages=tuple(_scaled(stage, factors.get(stage.name, 1.0)) for stage in self.stages))

    def with_servers(self, site: str, number: int) -> "Pipeline":
        """Return the pipeline with another number of servers at a site."""
        return replace(self, servers={**self.servers, site: number})


def _scaled(stage: Stage, factor: float) -> Stage:
    return replace(stage, ms=stage.ms * factor, cpu_ms=stage.cpu_ms * factor)


def ceiling(pipeline: Pipeline, name: str) -> float:
    """Return the clips per second of one stage with its site's servers and all cores to itself; inf without work."""
    stage = pipeline.stage(name)
    load = max(_loads(pipeline, stage))
    return 1e3 / load if load > 0 else math.inf


def _loads(pipeline: Pipeline, stage: Stage) -> tuple[float, float]:
    """Milliseconds a clip that a stage takes of its site and of the cores, each as a whole."""
    return stage.ms / pipeline.servers[stage.site], stage.cpu_ms / pipeline.cores


def limits(pipeline: Pipeline) -> dict[str, float]:
    """Return clips per second that each site and `CORES` allow, least first; those without work are left out."""
    load: dict[str, float] = {CORES: 0.0}
    for stage in pipeline.stages:
        at_site, of_cores = _loads(pipeline, stage)
        load[stage.site] = load.get(stage.site, 0.0) + at_site
        load[CORES] += of_cores
    found = {name: 1e3 / ms for name, ms in load.items() if ms > 0}
    return dict(sorted(found.items(), key=lambda item: item[1]))


def rate(pipeline: Pipeline) -> float:
    """Return clips per second; inf for a pipeline without work."""
    return min(limits(pipeline).values(), default=math.inf)


def crowded(pipeline: Pipeline) -> bool:
    """Whether servers wait for cores so that the rate may be up to a fifth less than `rate` (seen in simulations).

    That is where more servers compute than there are cores, and the cores and the fullest site allow about as much.
    """
    computing = {stage.site for stage in pipeline.stages if stage.cpu_ms > 0}
    found = limits(pipeline)
    cores = found.pop(CORES, math.inf)
    least = min(found.values(), default=math.inf)
    many = sum(pipeline.servers[site] for site in computing) > pipeline.cores
    return many and CROWDED[0] < cores / least < CROWDED[1]


@dataclass(frozen=True)
class Verdict:
    """What binds.

    Args:
        rate: clips per second of the pipeline.
        resource: site that is full, or `CORES`.
        binding: stage whose removal gains most; empty without work.
        next: stage that would bind then; empty where there is none.
        tie: whether the two are nearer than 5 %, so that both must be made faster.
        rate_without: clips per second were the binding stage free.
    """

    rate: float
    resource: str
    binding: str
    next: str
    tie: bool
    rate_without: float


def verdict(pipeline: Pipeline) -> Verdict:
    """Return what binds a pipeline and what binds next."""
    now = rate(pipeline)
    if math.isinf(now):
        return Verdict(now, "", "", "", False, now)
    binding = _binding(pipeline)
    without = pipeline.scaled({binding: 0.0})
    freed = rate(without)
    following = "" if math.isinf(freed) else _binding(without)
    tie = bool(following) and freed < TIE * rate(pipeline.scaled({following: 0.0}))
    return Verdict(now, next(iter(limits(pipeline))), binding, following, tie, freed)


def _binding(pipeline: Pipeline) -> str:
    """Name of the stage whose removal gains most; of equals the one that takes most of what it uses."""
    gains = [
        (rate(pipeline.scaled({stage.name: 0.0})), max(_loads(pipeline, stage)), stage.name)
        for stage in pipeline.stages
        if max(_loads(pipeline, stage)) > 0
    ]
    return max(gains, key=lambda gain: gain[:2])[2]


@dataclass(frozen=True)
class Change:
    """A what-if.

    Args:
        name: as `--verify` takes it.
        factors: of stage times, by name; names that a pipeline does not have are passed over.
        more_servers: by site, added.
        fix: difference of the configuration that brings it, or what else has to be done.
    """

    name: str
    factors: Mapping[str, float]
    more_servers: Mapping[str, int]
    fix: str

    def apply(self, pipeline: Pipeline) -> Pipeline:
        """Return the pipeline as it would be."""
        names = {stage.name for stage in pipeline.stages}
        changed = pipeline.scaled({name: factor for name, factor in self.factors.items() if name in names})
        for site, more in self.more_servers.items():
            if site in changed.servers:
                changed = changed.with_servers(site, max(1, changed.servers[site] + more))
        return changed


@dataclass(frozen=True)
class Prediction:
    """What a change would bring: clips per second, and their ratio to now."""

    change: Change
    rate: float
    gain: float


def predictions(pipeline: Pipeline, changes: Sequence[Change]) -> list[Prediction]:
    """Return what each change alone would bring, the largest gain first."""
    now = rate(pipeline)
    found = [(change, rate(change.apply(pipeline))) for change in changes]
    made = [Prediction(change, then, then / now if math.isfinite(now) else 1.0) for change, then in found]
    return sorted(made, key=lambda prediction: -prediction.gain)


def frames_decoded(window: float, gop: float) -> float:
    """Return how many frames are decoded for a window that begins anywhere: those before it from the last key frame.

    Args:
        window: frames from the first to the last that a clip wants.
        gop: frames from one key frame to the next.
    """
    return window + (gop - 1) / 2
