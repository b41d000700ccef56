"""Draws docs/idea.svg: plan -> graph -> batch, and the three pathways that a batch meets. Run: python docs/draw_idea.py"""

# ruff: noqa: E501  (a line of SVG is a line)

from pathlib import Path

INK, PAPER, SOFT = "#1f2933", "#ffffff", "#52606d"
PLAN, GRAPH, BATCH = "#e3edf9", "#e1f3e8", "#fdf1d9"
SLOW, FAST, AUDIO = "#f7dcd2", "#fbe9b7", "#dcd9f5"
WIDTH, HEIGHT = 1120, 430


def text(
    x: float, y: float, words: str, size: int = 14, colour: str = INK, weight: str = "400", at: str = "middle"
) -> str:
    """One line of text, centred at x unless `at` says otherwise."""
    return f'<text x="{x}" y="{y}" font-size="{size}" fill="{colour}" font-weight="{weight}" text-anchor="{at}">{words}</text>'


def box(x: float, y: float, w: float, h: float, fill: str, title: str, *lines: str) -> str:
    """A rounded box with a bold title and small lines below it."""
    middle = x + w / 2
    parts = [f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="9" fill="{fill}" stroke="{INK}" stroke-width="1.2"/>']
    top = y + 24 if lines else y + h / 2 + 5
    parts.append(text(middle, top, title, 16, weight="600"))
    parts += [text(middle, top + 21 + 17 * i, line, 12, SOFT) for i, line in enumerate(lines)]
    return "".join(parts)


def arrow(x1: float, y1: float, x2: float, y2: float, colour: str = INK, width: float = 1.8) -> str:
    """A straight arrow."""
    return f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{colour}" stroke-width="{width}" marker-end="url(#tip)"/>'


def pathway(y: float, fill: str, name: str, start: str, heights: tuple[int, ...]) -> str:
    """A pathway as a row of stages, res2 to res5, with its input on the left."""
    parts = [text(590, y - 2, name, 16, weight="600", at="end"), text(590, y + 15, start, 12, SOFT, at="end")]
    for i, height in enumerate(heights):
        x = 612 + 88 * i
        parts.append(
            f'<rect x="{x}" y="{y - height / 2}" width="58" height="{height}" rx="6" fill="{fill}" stroke="{INK}"/>'
        )
        parts.append(text(x + 29, y + 4, f"res{i + 2}", 12))
        if i:
            parts.append(arrow(x - 30, y, x - 3, y, SOFT, 1.2))
    return "".join(parts)


def laterals(audio_y: float, fast_y: float, slow_y: float) -> str:
    """After res3 and res4: Fast into Slow by concatenation, audio into both by addition."""
    parts = []
    for x in (612 + 88 + 73, 612 + 2 * 88 + 73):
        parts.append(arrow(x - 6, fast_y, x - 6, slow_y + 8, "#b7791f"))
        parts.append(arrow(x + 6, audio_y, x + 6, slow_y + 8, "#6b5bb5"))
        parts.append(f'<circle cx="{x}" cy="{slow_y}" r="7" fill="{PAPER}" stroke="{INK}"/>')
        parts.append(text(x, slow_y + 4.5, "+", 13, weight="600"))
    parts.append(text(862, slow_y - 46, "Fast is concatenated, audio added", 12, SOFT))
    return "".join(parts)


def picture() -> str:
    """The whole drawing as SVG."""
    slow_y, fast_y, audio_y = 120, 215, 310
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="Helvetica, Arial, sans-serif" role="img" aria-label="plan, graph, batch; Slow, Fast and Audio">',
        f'<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0 L8 4 L0 8 z" fill="{INK}"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="{PAPER}"/>',
        text(235, 34, "pipeline/: from a file to the device", 17, weight="600"),
        box(30, 60, 190, 112, PLAN, "plan", "seed, epoch, position", "-&gt; which clip, which frames,", "crop, flip, audio window", "(pure numbers)"),
        box(30, 222, 190, 92, PLAN, "store", "one fragment a GOP, PCM:", "a clip is a byte range,", "wherever it starts"),
        box(262, 60, 212, 254, GRAPH, "graph", "one DALI graph, no randomness", "", "decode (NVDEC or CPU)", "resize the crop", "normalise, flip", "log-mel spectrogram", "", "on the GPU where there is one,", "the same graph on a CPU"),
        arrow(220, 116, 260, 116),
        arrow(220, 268, 260, 268),
        box(262, 346, 212, 62, BATCH, "batch", "fp16 frames, log-mel, labels"),
        arrow(368, 314, 368, 344),
        f'<path d="M474 377 L505 377 L505 {slow_y} L522 {slow_y}" fill="none" stroke="{INK}" stroke-width="1.8" marker-end="url(#tip)"/>',
        arrow(505, fast_y, 522, fast_y),
        arrow(505, audio_y, 522, audio_y),
        text(800, 34, "model/: three pathways, fused after res3 and res4", 17, weight="600"),
        pathway(slow_y, SLOW, "Slow", "4 frames", (62, 62, 62, 62)),
        pathway(fast_y, FAST, "Fast", "32 frames", (40, 40, 40, 40)),
        pathway(audio_y, AUDIO, "Audio", "128 x 80", (40, 40, 40, 40)),
        laterals(audio_y, fast_y, slow_y),
        box(1000, 190, 96, 52, BATCH, "classes"),
        *(arrow(938, y, 998, 216 + (y - fast_y) * 0.12, SOFT, 1.4) for y in (slow_y, fast_y, audio_y)),
        text(800, 372, "kernels/: BatchNorm over 8 clips, ReLU, residual and both laterals in fused operations,", 13, SOFT),
        text(800, 391, "channels-last; a step is one CUDA graph, with audio or without (DropPathway)", 13, SOFT),
        "</svg>",
    ]  # fmt: skip
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("idea.svg").write_text(picture(), encoding="utf-8")
