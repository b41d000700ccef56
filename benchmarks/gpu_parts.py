"""The parts of a GPU report: what runs, for how long at most, and the same at toy size on a machine without a GPU.

A part takes at most `LONGEST_S` seconds, so that it fits any short visit to a GPU machine. `{rows}` in a command is the
file that result rows are appended to, `{json}` a file for one result, `{runs}` a folder that stays between visits.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

LONGEST_S = 100.0
NVDEC_S = 60.0
NVDEC_STORE = "synthetic-v1-h264-256px-2classes-4x2-150f-30fps-g12-s0"  # what nvdec-loader makes
STEP = ("-m", "benchmarks.step", "--out", "{rows}")
TOY = ("--device", "cpu", "--variants", "small", "--clips", "2", "--pixels", "32", "--repeats", "1")
# Every kernel in small shapes: compute-sanitizer is 10 to 50 times slower. What the model runs comes first.
SANITIZED = (
    "tests/kernels/test_composites.py",
    "tests/kernels/test_pool.py::test_against_the_definition",
    "tests/kernels/test_ops.py::test_lateral_cat",
    "tests/kernels/test_ops.py::test_frame_sum",
    "tests/kernels/test_ops.py::test_running_statistics",
    "tests/kernels/test_ops.py::test_stats_and_finalize",
    "tests/kernels/test_stem.py::test_operations_against_float64",
)
KERNEL_TESTS, MODEL_TESTS = ("tests/kernels",), ("tests/model",)
TRAINING_TESTS = ("tests/experiments", "tests/pipeline")


@dataclass(frozen=True)
class Part:
    """One process of the report.

    Args:
        name: for `--only`.
        command: arguments of python, the same everywhere.
        cuda: what follows on a GPU.
        toy: what follows in a rehearsal without one.
        limit_s: time limit.
        needs: packages without which the part is left out, and said to be.
        resumes: a part that is cut off saves its state when it is told to stop; the next visit goes on.
    """

    name: str
    command: tuple[str, ...]
    cuda: tuple[str, ...] = ()
    toy: tuple[str, ...] = ()
    limit_s: float = LONGEST_S
    needs: tuple[str, ...] = ()
    resumes: bool = False


def _step(
    name: str,
    ways: Sequence[str],
    variants: Sequence[str],
    clips: Sequence[int],
    limit_s: float,
    audio: Sequence[str] = ("kept", "dropped"),
) -> Part:
    cuda = ("--device", "cuda", "--variants", *variants, "--clips", *map(str, clips), "--limit-s", str(limit_s))
    return Part(name, (*STEP, "--ways", *ways, "--audio", *audio), cuda, (*TOY, "--limit-s", "85"))


def _tests(name: str, folders: Sequence[str], workers: int, needs: tuple[str, ...] = ()) -> Part:
    common = ("-m", "pytest", "-q", "-p", "no:benchmark", "-p", "no:cacheprovider", "-m", "needs_cuda and not slow")
    return Part(name, (*common, *folders), ("-n", str(workers)), ("--collect-only",), needs=needs)


def _sanitizer(tool: str) -> Part:
    command = ("-m", "benchmarks.kernel_report", "--sanitizer", tool, "--out", "{json}")
    return Part(
        f"sanitizer-{tool}",
        command,
        ("--limit-s", str(LONGEST_S - 8), "--tests", *SANITIZED),
        ("--limit-s", "60", "--tests", "tests/kernels/test_ops.py::test_frame_sum"),
    )


def _loader(codec: str) -> Part:
    command = ("-m", "benchmarks.loader", "--codec", codec, "--keep", "{runs}/stores", "--out", "{rows}")
    cuda = ("--device", "cuda:0", "--threads", "16", "--clips", "32", "--batches", "30", "--seconds", "4")
    toy = ("--device", "cpu", "--threads", "2", "--clips", "2", "--batches", "3", "--streams", "2", "--frames", "72")
    return Part(f"loader-{codec}", command, cuda, toy, NVDEC_S, needs=("nvidia.dali", "av"))


def _nvdec() -> tuple[Part, ...]:
    """What decoders that live on do: one call, exactness, rates; each at most `NVDEC_S` seconds."""

    def part(name: str, what: str, *cuda: str) -> Part:
        """One question to `benchmarks.nvdec`."""
        toy = ("--device", "cpu", "--pixels", "128", "--repeats", "2", "--clips", "6", "--seconds", "0.2",
               "--threads", "2", "--processes", "1")  # fmt: skip
        command = ("-m", "benchmarks.nvdec", what, "--out", "{rows}")
        return Part(f"nvdec-{name}", command, cuda, toy, NVDEC_S, needs=("av",))

    common = ("-m", "pytest", "-q", "-p", "no:benchmark", "-p", "no:cacheprovider", "-m", "needs_cuda and not slow")
    tests = ("tests/pipeline/nvdec", "tests/pipeline/test_graph.py", "tests/pipeline/test_loader.py")
    return (
        part("calls", "calls"),
        part("exact", "exact"),
        part("rates", "rates", "--processes", "1"),
        part("processes", "rates", "--processes", "2", "--threads", "4", "8"),
        Part("nvdec-graph", (*common, *tests), (), ("--collect-only",), NVDEC_S, needs=("nvidia.dali", "av")),
    )


def _nvdec_loaders() -> tuple[Part, ...]:
    """The loader by decoder and by workers, each row a few seconds."""
    command = ("-m", "benchmarks.loader", "--codec", "h264", "--keep", "{runs}/stores", "--out", "{rows}",
               "--streams", "4", "--what", "all")  # fmt: skip
    cuda = ("--device", "cuda:0", "--frames", "150", "--clips", "32", "--batches", "200", "--seconds", "4")
    toy = ("--device", "cpu", "--frames", "72", "--threads", "2", "--clips", "2", "--batches", "3", "--seconds", "1",
           "--workers", "1", "--decoders", "cpu", "auto")  # fmt: skip
    ways = {
        "loader": ("--decoders", "nvdec", "auto", "cpu", "dali", "--threads", "8"),
        "loader-workers": ("--decoders", "auto", "cpu", "--threads", "8", "--workers", "2", "4", "8", "15"),
        "loader-threads": ("--decoders", "nvdec", "auto", "--threads", "16"),
    }
    needs = ("nvidia.dali", "av")
    return tuple(Part(f"nvdec-{n}", command, (*cuda, *way), toy, NVDEC_S, needs=needs) for n, way in ways.items())


def _short(part: Part) -> Part:
    """The same training as a part of a minute, for its clips/s and data wait.

    The recipe runs for 200 steps.
    """
    name = f"nvdec-{part.name.partition('-')[0]}"

    def words(old: Sequence[str]) -> tuple[str, ...]:
        """The arguments with another length and name."""
        new = {"train.steps=300": "train.steps=200"}
        return tuple(f"{w}-{name}" if w.startswith("name=") else new.get(w, w) for w in old)

    command, cuda, toy = (words(old) for old in (part.command, part.cuda, part.toy))
    return replace(part, name=name, command=command, cuda=cuda, toy=toy, limit_s=NVDEC_S)


def _frames(recipe: Part) -> tuple[Part, ...]:
    """Who makes the frames: exactness, rates beside DALI's operators, and the recipe's short training with the kernel.

    Args:
        recipe: that training with the graph, in whose store the clips are.
    """
    common = ("-m", "pytest", "-q", "-p", "no:benchmark", "-p", "no:cacheprovider", "-m", "needs_cuda and not slow")
    name, needs = "frames-recipe", ("nvidia.dali", "av", "triton")

    def words(given: Sequence[str]) -> tuple[str, ...]:
        """The same training under another name."""
        return tuple(word.replace(recipe.name, name) if word.startswith("name=") else word for word in given)

    cuda, toy = (*words(recipe.cuda), "data.frames=fused"), (*words(recipe.toy), "data.frames=fused")
    return (
        Part("frames-library", ("-m", "pipeline.frames.build", "--if-needed"), limit_s=60),
        Part("frames-exact", (*common, "tests/pipeline/frames"), (), ("--collect-only",), 60, needs),
        Part(
            "frames",
            ("-m", "benchmarks.frames", "--out", "{rows}"),
            ("--device", "cuda:0", "--threads", "8", "--clips", "32"),
            ("--device", "cpu", "--threads", "1", "--clips", "1", "--frames", "2", "--repeats", "1"),
            60,
            needs=("nvidia.dali", "triton"),
        ),
        replace(recipe, name=name, cuda=cuda, toy=toy, needs=needs),
    )


def _training() -> tuple[Part, ...]:
    """Two trainings from their own recipes, on synthetic stores; each is continued by the next visit.

    The recipe's is the H.264 store that `nvdec-loader` leaves, whose pictures NVDEC takes; the quickstart's are 64 px,
    which the CPU decodes.

    Both again as parts of a minute: clips/s and data wait.
    """
    train = ("-m", "experiments.train")
    common = ("tracking.backend=none", "output_dir={runs}")
    cuda = ("runtime.device=cuda", "runtime.precision=bf16", "data.num_threads=16")
    toy = ("runtime.device=cpu", "train.steps=4", "data.num_threads=2", "optim.warmup_steps=0")
    quickstart = Part(
        "quickstart-h264",
        (*train, "experiments/configs/quickstart.yaml", *common),
        ("name=gpu-quickstart", "data.path=synthetic:quickstart-h264", *cuda),
        ("name=toy-quickstart", "data.path=synthetic:quickstart", *toy),
        needs=("nvidia.dali", "av"),
        resumes=True,
    )
    # The recipe as it is but for what one GPU and a data set of two classes ask for: batch, rate, length, evaluation.
    fitted = (
        "train.epochs=0",
        "model.num_classes=2",
        "eval.precise_bn_batches=2",
        "optim.lr=0.05",
    )
    recipe = Part(
        "recipe",
        (*train, "experiments/configs/kinetics/kinetics400_avslowfast_r50_4x16.yaml", *common, *fitted),
        ("name=gpu-recipe", "train.steps=300", "train.clips_per_step=32", "optim.warmup_steps=50",
         "views={num_clips: 1, num_crops: 1}", f"data.path={{runs}}/stores/{NVDEC_STORE}",
         *cuda),
        ("name=toy-recipe", "data.path=synthetic:quickstart",
         "train.clips_per_step=2", "model.variant=small", "model.sync_loss=contrastive",
         "model.num_frames=4", "model.frame_stride=16",
         "eval.clips_per_batch=2", "views={num_clips: 1, num_crops: 1, crop_size_px: 64}", "data.crop_size_px=64",
         "data.jitter_min_px=64", "data.jitter_max_px=72", *toy),
        needs=("nvidia.dali", "av"),
        resumes=True,
    )  # fmt: skip
    loads = tuple(_short(part) for part in (quickstart, recipe))
    return quickstart, recipe, *loads


def parts() -> tuple[Part, ...]:
    """All parts, correctness first."""
    ours, main = ("fused graph", "fused"), ("fused graph", "eager 4-D")
    grouping = ("fused graph", "fused graph, plain convolutions")
    r50, r101 = "avslowfast_r50_4x16", "avslowfast_r101_8x8"
    trainings = _training()
    profiled = ("--profile", "--audio", "kept", "--ways", "fused graph", "eager 4-D")
    return (
        Part("build", ("-m", "kernels.build"), (), ("--if-needed",)),
        _tests("tests-kernels", KERNEL_TESTS, 14),
        _tests("tests-model", MODEL_TESTS, 8),
        Part("rates", ("-m", "benchmarks.rates", "--out", "{rows}"), ("--device", "cuda"), ("--device", "cpu"), 40),
        _step("step", main, [r50], [32, 8], 60),
        Part("profile", (*STEP, *profiled), ("--device", "cuda", "--clips", "32"), TOY),
        Part(
            "norms",
            ("-m", "benchmarks.norm_rates", "--out", "{json}"),
            ("--device", "cuda"),
            ("--device", "cpu", "--clips", "2", "--pixels", "32", "--repeats", "1"),
            needs=("benchmarks.norm_rates",),
        ),
        Part(
            "stem",
            ("-m", "benchmarks.stem", "--out", "{json}"),
            ("--device", "cuda"),
            ("--device", "cpu", "--clips", "1", "--frames", "4", "--pixels", "32"),
            needs=("benchmarks.stem",),
        ),
        Part(
            "fusion",
            ("-m", "benchmarks.fusion", "--out", "{json}", "--dtypes", "bfloat16", "--compiled"),
            ("--device", "cuda", "--clips", "32", "8"),
            ("--device", "cpu", "--clips", "1", "--repeats", "1", "--sites", "slow res3 inner"),
        ),
        Part(
            "narrow",
            ("-m", "benchmarks.pixel_groups", "--out", "{json}"),
            ("--device", "cuda", "--repeats", "5"),
            ("--device", "cpu", "--preset", "small", "--clips", "1", "--repeats", "1", "--sites", "res3"),
        ),
        _step("step-opponents", ["pyslowfast", "eager 4-D graph", "eager 5-D"], [r50], [32, 8], 60, ["kept"]),
        _step("step-launches", ours, [r50], [32, 8], 60),
        _step("step-grouping", grouping, [r50], [32, 8], 60, ["kept"]),
        _step("step-sizes", main, [r50], [16, 64], 60),
        _step("step-r101", main, [r101], [16, 8], 60),
        _step("step-8x8", main, ["avslowfast_r50_8x8"], [32, 8], 60),
        _step("step-visual", [*main, "pyslowfast"], ["slowfast_r50_4x16"], [32, 8], 60),
        Part(
            "inference", ("-m", "benchmarks.inference", "--out", "{rows}"), ("--device", "cuda", "--clips", "64"), TOY
        ),
        _step("compile-eager", ["compile eager"], [r50], [32], 82, ["kept"]),
        _step("compile-fused", ["compile fused"], [r50], [32], 82, ["kept"]),
        _step("compile-overhead", ["compile eager reduce-overhead"], [r50], [32], 82, ["kept"]),
        _step("compile-fused-overhead", ["compile fused reduce-overhead"], [r50], [32], 82, ["kept"]),
        _step("compile-eager-8", ["compile eager", "compile eager reduce-overhead"], [r50], [8], 45, ["kept"]),
        _sanitizer("memcheck"),
        _sanitizer("racecheck"),
        _tests("tests-training", TRAINING_TESTS, 8, ("nvidia.dali", "av")),
        *_nvdec(),
        *_nvdec_loaders(),
        _loader("h264"),
        _loader("vp9"),
        *trainings,
        *_frames(next(part for part in trainings if part.name == "nvdec-recipe")),
    )


# What one visit does, in order: its parts within one total limit.
VISITS = {
    "kernels": ("build", "tests-kernels", "tests-model", "rates", "step", "profile", "norms", "stem", "inference",
                "step-opponents", "compile-eager", "step-r101"),
    "training": ("build", "tests-training", "frames", "nvdec-loader", "recipe", "quickstart-h264", "loader-h264",
                 "loader-vp9"),
    "more": ("build", "narrow", "fusion", "step-launches", "step-grouping", "step-sizes", "step-8x8", "step-visual",
             "sanitizer-memcheck", "sanitizer-racecheck"),
    "compile": ("build", "compile-eager", "compile-fused", "compile-overhead", "compile-fused-overhead",
                "compile-eager-8"),
    "nvdec": ("build", "nvdec-exact", "nvdec-calls", "nvdec-rates", "nvdec-processes", "nvdec-graph", "nvdec-loader",
              "nvdec-recipe", "nvdec-quickstart", "nvdec-loader-workers", "nvdec-loader-threads"),
    "frames": ("build", "frames-library", "frames-exact", "frames", "nvdec-loader", "nvdec-recipe", "frames-recipe"),
    "short": ("build", "tests-kernels", "rates", "step", "nvdec-exact", "nvdec-loader"),
}  # fmt: skip


def chosen_parts(only: Sequence[str] | None, visit: str | None) -> list[Part]:
    """Parts by name, or of a visit; without either all of them.

    Raises:
        ValueError: an unknown name.
    """
    by_name = {part.name: part for part in parts()}
    names = list(only or (VISITS[visit] if visit else by_name))
    unknown = sorted(set(names) - set(by_name))
    if unknown:
        raise ValueError(f"parts ({', '.join(unknown)}) must be of: {', '.join(by_name)}")
    return [by_name[name] for name in names]
