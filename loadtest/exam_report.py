"""`slos-serve exam-report`: the exam's results as pictures, and one HTML page that needs nothing else.

Reads the JSON files of `slos-serve exam` (matrix and studies alike) and draws what they hold: a picture whose
data is not there is left out. Needs matplotlib. Nothing is measured here.
"""

from __future__ import annotations

import argparse
import base64
import html
import io
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Final

from .cells import WORLDS
from .exam import ACCEPTANCE, told
from .examine import HEADLINE

Result = Mapping[str, Any]

COLOURS: Final[Mapping[str, str]] = {
    "slos_serve": "#0b6e4f",
    "slos_serve_paper": "#6fb98f",
    "qoserve": "#e08e45",
    "sarathi": "#3a6ea5",
    "vllm": "#8fb8de",
    "distserve": "#9b72aa",
}
OTHER: Final = "#999999"


_ABOUT: Final = (
    *("workload", "arrivals", "profile", "policy", "replicas", "seed", "ttft_floor_ms", "setting", "untuned"),
    *("acceptance", "targets", "rules", "rate", "noise", "prefix_reuse"),
)


@dataclass(frozen=True, slots=True)
class Picture:
    """One figure: its file name, what it is called, and what it shows in a sentence."""

    name: str
    title: str
    caption: str
    png: bytes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`slos-serve exam-report`."""
    parser.add_argument("results", type=Path, nargs="+", help="JSON files of slos-serve exam")
    parser.add_argument("--out", type=Path, required=True, help="folder for index.html and the PNGs")


def run(args: argparse.Namespace) -> int:
    """Draw everything; the HTML page holds its pictures."""
    cells, bursts = read(args.results)
    drawn = pictures(cells, bursts)
    args.out.mkdir(parents=True, exist_ok=True)
    for picture in drawn:
        (args.out / f"{picture.name}.png").write_bytes(picture.png)
    (args.out / "index.html").write_text(page(cells, drawn), encoding="utf-8")
    print(f"{args.out / 'index.html'}: {len(drawn)} pictures of {len(cells)} cells")
    return 0


def read(paths: Iterable[Path]) -> tuple[list[Result], list[Result]]:
    """All cells and burst experiments of the files; of a cell that is in several, the last.

    Raises ValueError naming a file that is none of ours.
    """
    cells: list[Result] = []
    bursts: list[Result] = []
    for path in paths:
        try:
            stored = json.loads(path.read_text())
            cells += stored["cells"]
            bursts += stored.get("bursts", [])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: not a file of exam results ({error!r})") from error
    if not cells and not bursts:
        raise ValueError(f"{', '.join(map(str, paths))}: no results")
    return list({json.dumps([cell.get(name) for name in _ABOUT]): cell for cell in cells}.values()), bursts


def pictures(cells: Sequence[Result], bursts: Sequence[Result]) -> list[Picture]:
    """All that the results allow."""
    special = ("untuned", "acceptance", "prefix_reuse")
    noise = Counter(cell["noise"] for cell in cells).most_common(1)[0][0] if cells else 0.0
    found = [cell for cell in cells if cell["capacity_per_gpu"]]
    usual = [cell for cell in found if cell["noise"] == noise and not any(cell.get(name) for name in special)]
    plain = [cell for cell in usual if not cell["setting"]]
    drawn: list[Picture] = []
    for family, group in grouped(plain, ("profile", "arrivals", "ttft_floor_ms", "replicas")):
        if len({cell["policy"] for cell in group}) > 1:
            drawn += [_capacity_bars(family, group), _distance(family, group)]
    for family, group in grouped(plain, ("workload", "profile", "arrivals", "ttft_floor_ms", "replicas")):
        if family[1:] == ("a100-llama-3-8b", "bursts", 0.0, 1) and len(group) > 1:
            drawn.append(_curves(family, group))
    drawn += [_burst(each) for each in bursts]
    for name, title in (("lengths_", "What knowing output lengths is worth"), ("", "What each part is worth")):
        drawn += _settings(name, title, usual)
    drawn += _limits(found, noise)
    drawn += _scaling(plain)
    drawn += _paper([cell for cell in cells if cell["untuned"]])
    return [picture for picture in drawn if picture.png]


def grouped(cells: Iterable[Result], keys: Sequence[str]) -> list[tuple[tuple[Any, ...], list[Result]]]:
    """Cells that agree in `keys`, in order of appearance."""
    groups: dict[tuple[Any, ...], list[Result]] = {}
    for cell in cells:
        groups.setdefault(tuple(cell[key] for key in keys), []).append(cell)
    return list(groups.items())


def headline(cell: Result) -> float:
    """Capacity per GPU by the cell's first rule and target."""
    rule = HEADLINE if HEADLINE in cell["capacity_per_gpu"] else next(iter(cell["capacity_per_gpu"]))
    return float(next(iter(cell["capacity_per_gpu"][rule].values())))


# Pictures


def _figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots


def _png(figure: Any) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return stream.getvalue()


def _clean(axes: Any, *, grid: str = "y") -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)


def _slug(*parts: object) -> str:
    return "-".join(f"{part:g}" if isinstance(part, float) else str(part) for part in parts).replace("_", "-")


def _where(profile: str, arrivals: str, floor: float, replicas: int) -> str:
    rule = f", TTFT at least {floor:g} ms" if floor else ""
    return f"{profile}, {arrivals}{rule}" + (f", {replicas} GPUs" if replicas > 1 else "")


def _bars(axes: Any, rows: Sequence[str], columns: Sequence[str], value: Callable[[str, str], float | None]) -> None:
    """Groups of bars, one for each row, a colour for each column; the number above each bar."""
    width = 0.84 / len(columns)
    labelled: set[str] = set()
    for index, column in enumerate(columns):
        for place, row in enumerate(rows):
            height = value(row, column)
            if height is None:
                continue
            at = place + (index - (len(columns) - 1) / 2) * width
            label = None if column in labelled else column
            labelled.add(column)
            axes.bar(at, height, width * 0.92, color=COLOURS.get(column, OTHER), label=label)
            axes.annotate(
                f"{height:.2f}",
                (at, height),
                (0, 2),
                textcoords="offset points",
                ha="center",
                fontsize=6.5,
                rotation=90,
            )
    axes.set_xticks(range(len(rows)), [row.replace("_", " ") for row in rows])


def _policies(group: Iterable[Result]) -> list[str]:
    present = {cell["policy"] for cell in group}
    return [*(name for name in COLOURS if name in present), *sorted(present - COLOURS.keys())]


def _legend(figure: Any, axes: Any, columns: int = 7) -> None:
    handles: dict[str, Any] = {}
    for each in axes if isinstance(axes, Sequence) else [axes]:
        for handle, label in zip(*each.get_legend_handles_labels(), strict=True):
            handles.setdefault(label.replace("_", " "), handle)
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=columns, frameon=False, fontsize=8
    )


def _capacity_bars(family: tuple[Any, ...], group: Sequence[Result]) -> Picture:
    """Relative to our planner, since workloads differ by two orders of magnitude; the rates stand below."""
    figure, subplots = _figure(11, 4.4)
    axes = subplots()
    found = {(cell["workload"], cell["policy"]): headline(cell) for cell in group}
    rows = [row for row in dict.fromkeys(cell["workload"] for cell in group) if found.get((row, "slos_serve"))]
    if not rows:
        return Picture("", "", "", b"")

    def relative(row: str, column: str) -> float | None:
        rate = found.get((row, column))
        return None if rate is None else rate / found[row, "slos_serve"]

    _bars(axes, rows, _policies(group), relative)
    axes.axhline(1.0, color=COLOURS["slos_serve"], linewidth=0.8)
    names = [f"{row.replace('_', ' ')}\n1.00 = {found[row, 'slos_serve']:.3g}/s" for row in rows]
    axes.set_xticks(range(len(rows)), names)
    axes.set_ylabel("capacity of slos serve = 1")
    axes.margins(y=0.12)
    axes.set_title(f"Sessions per second and GPU with 90 % in time: {_where(*family)}", loc="left", fontsize=11)
    _clean(axes)
    _legend(figure, axes)
    return Picture(
        f"capacity-{_slug(*family)}",
        f"Capacity: {_where(*family)}",
        "Highest rate at which 90 % of all sessions have every token in time, relative to slos_serve; each baseline "
        "with the parameters that are best for it in each cell.",
        _png(figure),
    )


def _distance(family: tuple[Any, ...], group: Sequence[Result]) -> Picture:
    bounds = {cell["workload"]: cell["bound"]["least"] for cell in group if cell.get("bound")}
    rows = [row for row, least in bounds.items() if least]
    if not rows:
        return Picture("", "", "", b"")
    figure, subplots = _figure(9, 0.62 * len(rows) + 1.8)
    axes = subplots()
    for place, row in enumerate(rows):
        axes.plot([0, 1], [place, place], color="#dddddd", linewidth=6, solid_capstyle="round", zorder=1)
        for cell in group:
            if cell["workload"] == row:
                colour = COLOURS.get(cell["policy"], OTHER)
                ours = cell["policy"] == "slos_serve"
                share = headline(cell) / bounds[row]
                label = cell["policy"] if not place else None
                axes.scatter(share, place, s=110 if ours else 45, color=colour, label=label, zorder=3 if ours else 2)
                if ours:
                    axes.annotate(
                        f"{share:.2f}", (share, place), (0, 8), textcoords="offset points", ha="center", fontsize=8
                    )
    axes.set_yticks(
        range(len(rows)), [f"{row.replace('_', ' ')}\nbound {bounds[row]:.3g}/s" for row in rows], fontsize=8
    )
    axes.set_xlim(0, 1.04)
    axes.margins(y=0.14)
    axes.invert_yaxis()
    axes.set_xlabel("share of the clairvoyant bound")
    axes.set_title(f"How far from the possible: {_where(*family)}", loc="left", fontsize=11)
    _clean(axes, grid="x")
    _legend(figure, axes, columns=6)
    return Picture(
        f"bound-{_slug(*family)}",
        f"Distance to the bound: {_where(*family)}",
        "The bound knows every length and arrival, has no iterations, and refuses for free: the least of the "
        "stationary and the trace model. Nobody need be able to reach it.",
        _png(figure),
    )


def _curves(family: tuple[Any, ...], group: Sequence[Result]) -> Picture:
    figure, subplots = _figure(8, 4.2)
    axes = subplots()
    for policy in _policies(group):
        for cell in (each for each in group if each["policy"] == policy):
            points = sorted(
                (point["rate"] / cell["replicas"], 100 * point["attainment"][HEADLINE])
                for point in cell["curve"]
                if point["parameters"] == cell["parameters"] and point["complete"]
            )
            if points:
                colour = COLOURS.get(policy, OTHER)
                width = 2.4 if policy == "slos_serve" else 1.3
                axes.plot(
                    *zip(*points, strict=True), marker="o", markersize=3.5, linewidth=width, color=colour, label=policy
                )
    for target in (90, 95, 99):
        axes.axhline(target, color="#aaaaaa", linewidth=0.8, linestyle="--")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_ylim(bottom=max(axes.get_ylim()[0], 70), top=100.6)
    axes.set_xlabel("sessions per second and GPU")
    axes.set_ylabel("sessions in time, %")
    axes.set_title(f"{family[0].replace('_', ' ')}: {_where(*family[1:])}", loc="left", fontsize=11)
    _clean(axes, grid="both")
    _legend(figure, axes, columns=6)
    return Picture(
        f"curve-{_slug(*family)}",
        f"Attainment against rate: {family[0].replace('_', ' ')}",
        "Each policy with its best parameters; points that were played to their end.",
        _png(figure),
    )


def _burst(found: Result) -> Picture:
    figure, subplots = _figure(10, 5.6)
    above, below = subplots(2, 1, sharex=True, height_ratios=(3, 2))
    for policy, timeline in found["policies"].items():
        attained = _windowed(timeline["attained_per_second"], timeline["arrived_per_second"], 4)
        colour, width = COLOURS.get(policy, OTHER), 2.2 if policy == "slos_serve" else 1.3
        inside = timeline["attained"]["inside"]
        label = f"{policy} (inside the burst {100 * inside:.0f} %)"
        above.plot(range(len(attained)), attained, color=colour, linewidth=width, label=label)
        queue = timeline["queue_per_second"]
        below.plot(range(len(queue)), queue, color=colour, linewidth=width)
    for axes in (above, below):
        axes.axvspan(found["starts_s"], found["ends_s"], color="#f2e2c4", zorder=0)
        _clean(axes)
    above.set_ylim(0, 103)
    above.set_ylabel("in time, % of arrivals\n(4 s window)")
    below.set_ylabel("no first token yet\n(declined ones too)")
    below.set_yscale("symlog", linthresh=1)
    below.set_ylim(bottom=0)
    below.yaxis.set_major_formatter("{x:g}")
    below.set_xlabel("seconds")
    below.set_xlim(30, 150)
    title = f"{found['workload']} on {found['profile']}: {found['factor']:g}x the arrivals for 12 s (shaded)"
    above.set_title(f"{title}, base {found['base_rate']:.3g}/s", loc="left", fontsize=11)
    _legend(figure, above, columns=2)
    return Picture(
        f"burst-{_slug(found['workload'], found['profile'])}",
        f"A burst: {found['workload']} on {found['profile']}",
        "Half of our Poisson capacity, then five times as much for twelve seconds; mean of five traces. Above: "
        "share of the sessions arriving in each moment that had every token in time. Below: the queue.",
        _png(figure),
    )


def _windowed(part: Sequence[float], whole: Sequence[float], width: int) -> list[float]:
    shares = []
    for end in range(1, len(whole) + 1):
        low = max(0, end - width)
        total = sum(whole[low:end])
        shares.append(100 * sum(part[low:end]) / total if total else math.nan)
    return shares


def _settings(prefix: str, title: str, cells: Sequence[Result]) -> list[Picture]:
    """Capacity in each setting relative to the reference: the planner as shipped, or exact lengths."""
    lengths = bool(prefix)
    own = [c for c in cells if c["policy"] == "slos_serve" and c["replicas"] == 1]
    own = [c for c in own if not c["setting"] or c["setting"].startswith("lengths_") == lengths]
    reference = "lengths_exact" if lengths else ""
    rates: dict[tuple[str, ...], dict[str, list[float]]] = {}
    for cell in own:
        if cell["arrivals"] == "bursts" and not cell["ttft_floor_ms"]:
            where = (cell["workload"], cell["profile"])
            rates.setdefault(where, {}).setdefault(cell["setting"], []).append(headline(cell))
    rates = {where: found for where, found in rates.items() if len(found) > 1 and any(found.get(reference, []))}
    names = [s for s in dict.fromkeys(c["setting"] for c in own) if s != reference and (s or not lengths)]
    if not rates or not names:
        return []
    ratios = [[_ratio(found.get(name), found[reference]) for found in rates.values()] for name in names]
    base = "exact lengths" if lengths else "planner as shipped"
    columns = [f"{workload.replace('_', ' ')}\n{profile.replace('-', ' ', 1)}" for workload, profile in rates]
    rows = [(name or "as shipped").replace("_", " ") for name in names]
    caption = f"Capacity at 90 % under bursts relative to the {base}; below 1 the change costs capacity."
    png = _ratios(f"{title} ({base} = 1)", rows, columns, ratios)
    return [Picture("lengths" if lengths else "ablation", title, caption, png)]


def _limits(cells: Sequence[Result], noise: float) -> list[Picture]:
    """Capacity in worlds that differ in one thing, relative to the world as it is."""

    def world(cell: Result) -> tuple[tuple[str, str, str], str]:
        """Which column it belongs to, and what is different."""
        suffix = next((each for each in WORLDS if cell["profile"].endswith(each)), "")
        changes = [suffix.replace("-", " ").strip(), cell["setting"].replace("_", " ")]
        changes.append("" if cell["noise"] == noise else f"noise {cell['noise']:g}")
        right = cell["acceptance"]
        changes.append("" if right in (0, float(ACCEPTANCE)) else f"guesses right {right:g}")
        guesses = ", drafts" if right else ""
        return (cell["workload"], cell["profile"].removesuffix(suffix), guesses), ", ".join(filter(None, changes))

    own = [c for c in cells if c["policy"] == "slos_serve" and c["replicas"] == 1 and c["arrivals"] == "bursts"]
    settings = ("", "lengths_exact", "lead_whole")
    own = [c for c in own if not c["ttft_floor_ms"] and not c["untuned"] and c["setting"] in settings]
    rates: dict[tuple[str, str, str], dict[str, list[float]]] = {}
    for cell in own:
        where, change = world(cell)
        rates.setdefault(where, {}).setdefault(change, []).append(headline(cell))
    rates = {where: found for where, found in rates.items() if len(found) > 2 and found.get("")}
    names = [name for name in dict.fromkeys(name for found in rates.values() for name in found) if name]
    if not rates:
        return []
    title = "What limits the capacity"
    columns = [f"{w.replace('_', ' ')}\n{p.replace('-', ' ', 1)}{guesses}" for w, p, guesses in rates]
    ratios = [[_ratio(found.get(name), found[""]) for found in rates.values()] for name in names]
    caption = "Our capacity at 90 % under bursts in a world that differs in one thing, relative to the world as it is."
    return [Picture("limits", title, caption, _ratios(f"{title} (as it is = 1)", names, columns, ratios))]


def _ratios(title: str, rows: Sequence[str], columns: Sequence[str], ratios: Sequence[Sequence[float]]) -> bytes:
    """A table of ratios, coloured: red below 1, green above."""
    figure, subplots = _figure(max(1.15 * len(columns) + 3.2, 7.0), 0.42 * len(rows) + 1.9)
    axes = subplots()
    axes.imshow(ratios, cmap="RdYlGn", vmin=0.6, vmax=1.4, aspect="auto")
    for y, row in enumerate(ratios):
        for x, ratio in enumerate(row):
            axes.text(x, y, "" if math.isnan(ratio) else f"{ratio:.2f}", ha="center", va="center", fontsize=9)
    axes.set_xticks(range(len(columns)), columns, fontsize=8)
    axes.set_yticks(range(len(rows)), rows, fontsize=9)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(title, loc="left", fontsize=11)
    return _png(figure)


def _ratio(found: Sequence[float] | None, reference: Sequence[float]) -> float:
    return fmean(found) / fmean(reference) if found else math.nan


def _scaling(cells: Sequence[Result]) -> list[Picture]:
    groups = [
        (family, group)
        for family, group in grouped(cells, ("workload", "profile", "arrivals", "ttft_floor_ms"))
        if len({cell["replicas"] for cell in group}) > 2
    ]
    if not groups:
        return []
    figure, subplots = _figure(4.6 * len(groups) + 0.6, 3.8)
    panels = subplots(1, len(groups), squeeze=False)[0].tolist()
    for axes, (family, group) in zip(panels, groups, strict=True):
        for policy in _policies(group):
            points = sorted((cell["replicas"], headline(cell)) for cell in group if cell["policy"] == policy)
            if len(points) > 1:
                axes.plot(*zip(*points, strict=True), marker="o", color=COLOURS.get(policy, OTHER), label=policy)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_ylim(bottom=0)
        axes.set_xlabel("replicas")
        axes.set_ylabel("sessions per second and GPU")
        axes.set_title(f"{family[0].replace('_', ' ')}, {family[1]}, {family[2]}", loc="left", fontsize=10)
        _clean(axes)
    _legend(figure, panels)
    caption = "Capacity per GPU when the load is superposed, not compressed: bursts keep their length. Flat is linear."
    return [Picture("scaling", "Scaling over replicas", caption, _png(figure))]


def _paper(cells: Sequence[Result]) -> list[Picture]:
    """The paper's comparison: its scoring, untuned baselines, linear time model."""
    drawn = []
    for (profile, arrivals), group in grouped(cells, ("profile", "arrivals")):
        found = {(cell["workload"], cell["policy"]): headline(cell) for cell in group}
        rows = [row for row in dict.fromkeys(cell["workload"] for cell in group) if found.get((row, "slos_serve"))]
        classic = [name for name in ("vllm", "sarathi", "distserve") if any((row, name) in found for row in rows)]
        if not rows or not classic:
            continue
        figure, subplots = _figure(10, 4.2)
        axes = subplots()

        def gain(row: str, column: str, found: Mapping[tuple[str, str], float] = found) -> float | None:
            rate = found.get((row, column))
            return found[row, "slos_serve"] / rate if rate else None

        _bars(axes, rows, classic, gain)
        best = [
            min(g for name in classic if (g := gain(row, name)) is not None)
            for row in rows
            if any(gain(row, n) for n in classic)
        ]
        mean = math.exp(fmean(map(math.log, best))) if best else math.nan
        axes.axhline(2.2, color="#a33", linewidth=1, linestyle="--")
        axes.annotate(
            "the paper's average, 2.2",
            (len(rows) - 0.5, 2.2),
            (0, 3),
            textcoords="offset points",
            ha="right",
            fontsize=8,
        )
        axes.margins(y=0.15)
        axes.set_ylabel("our capacity / theirs")
        axes.set_title(
            f"As the paper compares: {profile}, {arrivals}; over the best of them {mean:.2f}x", loc="left", fontsize=11
        )
        _clean(axes)
        _legend(figure, axes)
        caption = (
            "Blocks of ten tokens, baselines with default parameters, a time model without attention terms: the "
            "paper's way of comparing, on our workloads. Mean over the best baseline of each workload: geometric."
        )
        drawn.append(
            Picture(f"paper-{_slug(profile, arrivals)}", f"Paper against us: {arrivals}", caption, _png(figure))
        )
    return drawn


# The page

_STYLE: Final = """body{font:16px/1.5 system-ui,sans-serif;max-width:1100px;margin:2em auto;padding:0 1em;color:#222}
img{max-width:100%;border:1px solid #eee}figure{margin:2.5em 0}figcaption{color:#555;font-size:.9em}
table{border-collapse:collapse;font-size:.8em;display:block;overflow-x:auto}
td,th{padding:.25em .6em;border-bottom:1px solid #ddd;text-align:right;white-space:nowrap}
td:nth-child(-n+5),th:nth-child(-n+5){text-align:left}tr.ours{background:#e8f4ee}"""


def page(cells: Sequence[Result], drawn: Sequence[Picture]) -> str:
    """One HTML file with everything in it."""
    figures = "\n".join(
        f'<figure id="{picture.name}"><h2>{html.escape(picture.title)}</h2>'
        f'<img alt="{html.escape(picture.title)}" src="data:image/png;base64,{base64.b64encode(picture.png).decode()}">'
        f"<figcaption>{html.escape(picture.caption)}</figcaption></figure>"
        for picture in drawn
    )
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>slos-serve: the exam</title>'
        f"<style>{_STYLE}</style><h1>The exam</h1>"
        "<p>Requests per second that each policy serves within its SLOs, in virtual time, on measured GPU timings "
        "with noise. Strict rule unless said otherwise: every token by its due time, refused sessions are misses.</p>"
        f"{figures}<h2>All cells</h2>{_table(cells)}</html>\n"
    )


_COLUMNS: Final = ("workload", "arrivals", "profile", "policy", "parameters", "replicas", "floor ms", "bound")


def _table(cells: Sequence[Result]) -> str:
    rules = list(dict.fromkeys(rule for cell in cells for rule in cell["capacity_per_gpu"]))
    targets = list(dict.fromkeys(t for cell in cells for rates in cell["capacity_per_gpu"].values() for t in rates))
    pairs = [(rule, target) for rule in rules for target in targets]
    heads = [*_COLUMNS, *(f"{rule} {100 * float(target):g} %" for rule, target in pairs), "by tokens", "planner ms p99"]
    lines = ["".join(f"<th>{html.escape(head)}</th>" for head in heads)]
    rows = "".join(_row(cell, pairs) for cell in cells)
    return f"<table><tr>{lines[0]}</tr>{rows}</table>"


def _row(cell: Result, pairs: Sequence[tuple[str, str]]) -> str:
    values = [str(cell[name]) for name in ("workload", "arrivals", "profile", "policy")]
    values += [told(cell), str(cell["replicas"]), f"{cell['ttft_floor_ms']:g}"]
    values.append(f"{cell['bound']['least']:.3g}" if cell.get("bound") else "")
    for rule, target in pairs:
        rate = cell["capacity_per_gpu"].get(rule, {}).get(target)
        values.append("" if rate is None else f"{rate:.3g}")
    values.append(f"{100 * cell['token_weighted_attainment']:.1f} %" if "token_weighted_attainment" in cell else "")
    values.append(f"{cell['planner_ms']['p99']:.2f}" if cell.get("planner_ms") else "")
    kind = ' class="ours"' if cell["policy"] == "slos_serve" else ""
    return f"<tr{kind}>" + "".join(f"<td>{html.escape(value)}</td>" for value in values) + "</tr>"
