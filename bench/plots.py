"""Pictures of a result: ratios, curves, roofline. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def draw(results: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write all pictures that the results have figures for; returns their paths.

    Raises:
        ImportError: matplotlib is missing; the message says how to install it.
    """
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise ImportError(f"plots need matplotlib ({error}); pip install 'fedgram[plot]'") from error
    mpl.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    figures = {"ratios": _ratios(results), "roofline": _roofline(results)}
    figures |= {sweep["name"].replace(" ", "-"): _curves(sweep) for sweep in results["sweeps"] if sweep["curves"]}
    paths = []
    for name, figure in figures.items():
        if figure is not None:
            paths.append(folder / f"{name}.png")
            figure.savefig(paths[-1], dpi=130, bbox_inches="tight")
    return paths


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _ratios(results: Mapping[str, Any]) -> Any:
    """Bars: how many times longer each contender takes; only ratios that may be told."""
    bars = [
        (f"{case['entry']}: {row['name']}", row["speed_up"], row["kind"])
        for case in results["cases"]
        for row in case["contenders"]
        if row["speed_up"]
    ]
    if not bars:
        return None
    figure = _figure(9, 1 + 0.28 * len(bars))
    axes = figure.subplots()
    for y, (_, ratio, kind) in enumerate(reversed(bars)):
        axes.barh(y, ratio["median"] - 1, left=1, color={"peer": "tab:blue"}.get(kind, "tab:gray"))
        axes.plot((ratio["q1"], ratio["q3"]), (y, y), color="black", linewidth=1)
        axes.annotate(f" {ratio['median']:.3g}", (max(ratio["median"], 1), y), va="center", fontsize=7)
    axes.set_yticks(range(len(bars)), [name for name, _, _ in reversed(bars)], fontsize=7)
    axes.set_xscale("log")
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xlabel("time / our time (quartiles in black; to the right we are faster)")
    return figure


def _curves(sweep: Mapping[str, Any]) -> Any:
    figure = _figure(6, 4)
    axes = figure.subplots()
    for name, points in sweep["curves"].items():
        slope = sweep["slopes"].get(name)
        rising = sweep["y"] == "seconds" and slope is not None
        axes.plot(*zip(*points, strict=True), marker="o", label=f"{name} (slope {slope:.2f})" if rising else name)
    axes.set(xscale="log", yscale="log", xlabel=sweep["x"], ylabel=sweep["y"], title=sweep["name"])
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def _roofline(results: Mapping[str, Any]) -> Any:
    """Our contenders: operations that the result needs by our time, over those that each byte gets; and their ceilings.

    A point has the colour of the ceiling that bounds it.
    """
    read, rates = results["ceilings"]["read"], results["ceilings"]["flops"]
    cases = [c for c in results["cases"] if c["cost"] and c["contenders"][0]["median_s"]]
    if not cases:
        return None
    intensity = {c["entry"]: c["cost"]["flops"] / c["cost"]["bytes"] for c in cases}
    figure = _figure(8, 5)
    axes = figure.subplots()
    low, high = min(intensity.values()) / 3, max(intensity.values()) * 30
    colors = {name: f"C{i}" for i, name in enumerate(rates)}
    for name, peak in rates.items():
        span = (low, min(max(peak / read, low), high), high)  # the knee may lie beside what is shown
        roof = [min(peak, x * read) for x in span]
        axes.plot(span, roof, label=f"{name} ceiling", linewidth=1, color=colors[name])
    for case in cases:
        x, y = intensity[case["entry"]], case["cost"]["flops"] / case["contenders"][0]["median_s"]
        axes.plot(x, y, marker="o", linestyle="", color=colors.get(case["cost"]["rate"], colors["float32"]))
        axes.annotate(case["entry"], (x, y), fontsize=6, xytext=(4, 0), textcoords="offset points")
    axes.set(xscale="log", yscale="log", xlim=(low, high))
    axes.set(xlabel="needed operations per byte that must move", ylabel="needed operations per second of our time")
    axes.legend(fontsize=7)
    return figure
