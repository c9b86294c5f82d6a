"""An inspection as one picture: the ladder, the error against rank, and how the clients lie."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedgram.flora_na import Inspection
from fedgram.flora_na.weight_space import JUDGES, OUTLIER

from ..console import one_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Colour-blind safe (Okabe and Ito); als and svd often lie on top of each other, so each has a marker of its own.
STYLES = {"fedavg": ("#E69F00", "o"), "flora-na": ("#0072B2", "s"), "als": ("#009E73", "^"), "svd": ("#CC79A7", "D")}
INK, GRID, FAR = "#333333", "#DDDDDD", "#D55E00"
MODULES, LABELS, CURVES = 32, 40, 64
FORMATS = ("png", "svg", "svgz", "pdf", "eps", "ps", "jpg", "jpeg", "webp", "tif", "tiff")
"""Those that matplotlib writes by itself: its pgf, say, needs LaTeX."""


def check(path: Path) -> None:
    """Find out before the work whether the picture can be drawn and written.

    Raises:
        ModuleNotFoundError: matplotlib is not installed; the message has the line that installs it.
        ValueError: the file's ending is none of ``FORMATS``, it is a directory, or its directory does not exist.
        OSError: the file cannot be written.
    """
    try:
        import matplotlib.figure  # noqa: F401 - draws it
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{error}; the picture needs: pip install 'fedgram[plot]'", name=error.name
        ) from error
    if path.suffix.lstrip(".").lower() not in FORMATS:
        raise ValueError(f"{path}: --plot takes a picture's file name, ending in .{', '.join(FORMATS)}")
    if path.is_dir():
        raise ValueError(f"{path}: is a directory: --plot takes a picture's file name")
    if not path.parent.is_dir():
        raise ValueError(f"{path}: no such directory: {path.parent}")
    _write(path, None)


def draw(inspection: Inspection, path: Path) -> None:
    """Write the picture, by rename: whole or not at all.

    Raises:
        ModuleNotFoundError, ValueError: as ``check``.
        OSError: the file cannot be written.
    """
    check(path)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.5, 9), dpi=120, layout="constrained")
    axes = figure.subplots(2, 2)
    _ladder(axes[0, 0], inspection)
    _curves(axes[0, 1], inspection)
    _clients(axes[1, 0], inspection)
    _matrix(axes[1, 1], inspection)
    picture = io.BytesIO()
    figure.savefig(picture, format=path.suffix.lstrip(".").lower())
    _write(path, picture.getvalue())


def _write(path: Path, content: bytes | None) -> None:
    """Write a file beside ``path`` and give it that name; without content, only try whether it can be written.

    Raises:
        OSError: it cannot; the error names ``path``.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_bytes(content or b"")
        if content is not None:
            partial.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        partial.unlink(missing_ok=True)


def _ladder(axis: Axes, inspection: Inspection) -> None:
    """rho of every method, a row per module; of many modules the worst."""
    rows = [(name, m) for name, m in inspection.modules.items() if m.norm > 0]
    rows = sorted(rows, key=lambda row: row[1].rho["svd"], reverse=True)[:MODULES]
    for method, total in inspection.ladder.items():
        color, marker = STYLES[method]
        values = [m.rho[method] for _, m in rows]
        hollow = "none" if method in ("als", "svd") else color
        label = method if math.isnan(total) else f"{method}  {total:.3g} in all"
        axis.plot(values, range(len(rows)), marker, color=color, mfc=hollow, ms=5.5, ls="none", label=label)
    axis.set_yticks(range(len(rows)), [_short(name, 34) for name, _ in rows], fontsize=7)
    axis.invert_yaxis()
    axis.set_xlim(left=0)
    left = len(inspection.modules) - len(rows)
    _dress(axis, "rho by module" + (f" ({left} more, better approximated or zero)" if left else ""))
    axis.legend(frameon=False, fontsize=8)


def _curves(axis: Axes, inspection: Inspection) -> None:
    """rho of the optimum against the output rank: every module thin, all together thick."""
    curves = [m.rank_curve for m in inspection.modules.values() if len(m.rank_curve)]
    for curve in curves[:: max(1, -(-len(curves) // CURVES))]:
        axis.plot(range(1, len(curve) + 1), [_visible(rho) for rho in curve], color="#999999", lw=0.7, alpha=0.7)
    whole = inspection.rank_curve
    ranks, total = range(1, len(whole) + 1), [_visible(rho) for rho in whole]
    axis.plot(
        ranks, total, color=STYLES["svd"][0], marker="D" if len(whole) < 40 else "", ms=5, lw=2, label="all modules"
    )
    used = sorted({m.rank for m in inspection.modules.values()})
    for rank in used[:12]:
        axis.axvline(rank, color=INK, lw=0.8, ls=":")
    if any(rho > 0 for curve in curves for rho in curve):  # else there is nothing that such axes could show
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
    axis.set_xlabel(f"output rank (dotted: {'compared' if len(used) == 1 else 'chosen'} here)", color=INK, fontsize=9)
    _dress(axis, "error of the best pair against its rank")
    if whole:
        axis.xaxis.set_major_formatter("{x:g}")
        axis.legend(frameon=False, fontsize=8)


def _clients(axis: Axes, inspection: Inspection) -> None:
    """Norm against cosine to the mean; outliers and dropped clients marked."""
    columns = tuple(
        x.tolist() for x in (inspection.client_norms, inspection.cosines_to_mean, inspection.outlier_scores)
    )
    screening = inspection.screening
    dropped = set() if screening is None else set(screening.dropped)
    many = len(inspection.names) > LABELS
    for name, norm, cosine, score in zip(inspection.names, *columns, strict=True):
        far = score > OUTLIER and len(inspection.names) >= JUDGES
        axis.plot(cosine, norm, "x" if name in dropped else "o", color=FAR if far else STYLES["flora-na"][0], ms=6)
        if far or name in dropped or not many:
            label = _short(name, 20)
            axis.annotate(label, (cosine, norm), xytext=(5, 3), textcoords="offset points", fontsize=7, color=INK)
    if screening is not None and screening.bound is not None:
        axis.axhline(screening.bound, color=INK, lw=0.8, ls=":")
    if screening is not None and screening.min_cosine is not None:
        axis.axvline(screening.min_cosine, color=INK, lw=0.8, ls=":")
    norms = [norm for norm in columns[0] if norm > 0]
    if norms and max(norms) > 10 * min(norms):
        if len(norms) == len(inspection.names):
            axis.set_yscale("log")
        else:
            axis.set_yscale("symlog", linthresh=min(norms))
    axis.set_xlabel("cosine to the mean update", color=INK, fontsize=9)
    axis.margins(0.12)
    _dress(axis, "norm of the updates (orange: outlier; cross: filtered out)")


def _matrix(axis: Axes, inspection: Inspection) -> None:
    """Cosines between the clients' updates."""
    image = axis.imshow(inspection.cosines.numpy(), cmap="RdBu", vmin=-1, vmax=1)
    axis.figure.colorbar(image, ax=axis, shrink=0.85)
    count = len(inspection.names)
    shown = range(count) if count <= LABELS else []
    axis.set_xticks(list(shown), [_short(inspection.names[u], 20) for u in shown], rotation=90, fontsize=6.5)
    axis.set_yticks(list(shown), [_short(inspection.names[u], 20) for u in shown], fontsize=6.5)
    _dress(axis, "cosines between the clients' updates")
    axis.grid(visible=False)


def _visible(rho: float) -> float:
    """A logarithmic axis has no zero."""
    return rho if rho > 0 else math.nan


def _short(name: str, most: int) -> str:
    """The end of a label, as plain text: names are anybody's, and dollar signs would be read as formulas."""
    text = one_line(name)
    text = text if len(text) <= most else f"…{text[1 - most :]}"
    return text.replace("$", r"\$")


def _dress(axis: Axes, title: str) -> None:
    axis.set_title(title, loc="left", fontsize=10, color=INK)
    axis.grid(color=GRID, lw=0.7)
    axis.set_axisbelow(True)
    axis.tick_params(colors=INK, length=0)
    spines: Sequence[str] = ("top", "right")
    for side in spines:
        axis.spines[side].set_visible(False)
