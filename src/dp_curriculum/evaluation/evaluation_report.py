"""A folder of results that a person would rather look at: JSON, Markdown, plots, and one page that holds them all."""

from __future__ import annotations

import base64
import html
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dp_curriculum.data.images import PrivateImages, to_unit_range
from dp_curriculum.diffusion.sheets import save_sheet
from dp_curriculum.evaluation.evaluation import Evaluation, Metric
from dp_curriculum.evaluation.metrics import nearest_distances
from dp_curriculum.runtime.checkpointing import appearing_in


_PER_CLASS, _MAX_CLASSES = 8, 10
_SHEET, _PRIVATE_SHEET = "real_beside_generated.png", "PRIVATE_real_beside_generated.png"
_CONFUSION, _COURSE = "confusion.png", "stages.png"
_HTML, _PRIVATE_HTML = "evaluation.html", "PRIVATE_evaluation.html"
_FILTERED = "Images that a classifier of other generated images puts into another class were drawn again."
_NOT_ALWAYS = {
    _SHEET,
    _PRIVATE_SHEET,
    _CONFUSION,
    _COURSE,
    _HTML,
    _PRIVATE_HTML,
}  # files of a report that another may lack


@dataclass(frozen=True)
class StagePoint:
    """State after a stage of the curriculum: epsilon spent so far (or infinity), and how good the images were then."""

    stage: str
    epsilon: float
    accuracy: float
    fd_classifier: float


def save_report(
    folder: Path,
    evaluation: Evaluation,
    reference: PrivateImages,
    *,
    title: str,
    epsilon: str,
    reference_is_private: bool = False,
    reference_is_public: bool = False,
    filter_by_classifier: bool = False,
    stages: Sequence[StagePoint] = (),
    as_html: bool = False,
) -> None:
    """
    Writes `evaluation.json`, `evaluation.md` and plots, and `evaluation.html` if `as_html` is set.

    What shows images that are not public is named, and begins with, PRIVATE. `evaluation.json` and `evaluation.md`
    keep their names, because other commands read them, and say it in their text.

    Args:
        folder (`Path`): Where to; made if needed.
        evaluation ([`Evaluation`]): The numbers.
        reference ([`PrivateImages`]): Real images that are shown beside the generated ones.
        title (`str`): Heading.
        epsilon (`str`): The guarantee of the model, in words.
        reference_is_private (`bool`, *optional*, defaults to `False`): Whether the reference was trained on.
        reference_is_public (`bool`, *optional*, defaults to `False`): Whether anybody may see the reference. If not,
            the sheet and the page that show it are called, and captioned, private.
        filter_by_classifier (`bool`, *optional*, defaults to `False`): Whether the images were chosen by a classifier
            of other generated images, which the report then says.
        stages (`Sequence[StagePoint]`, *optional*): Course of the curriculum.
        as_html (`bool`, *optional*, defaults to `False`): One self-contained page as well.
    """
    with appearing_in(folder) as temporary:
        _write(
            temporary,
            evaluation,
            reference,
            title=title,
            epsilon=epsilon,
            reference_is_private=reference_is_private,
            reference_is_public=reference_is_public and not reference_is_private,
            filter_by_classifier=filter_by_classifier,
            stages=stages,
            as_html=as_html,
        )
        written = {path.name for path in temporary.iterdir()}
    for name in _NOT_ALWAYS - written:  # of an earlier evaluation: they would be taken for those of this one
        (folder / name).unlink(missing_ok=True)


def _write(
    folder: Path,
    evaluation: Evaluation,
    reference: PrivateImages,
    *,
    title: str,
    epsilon: str,
    reference_is_private: bool,
    reference_is_public: bool,
    filter_by_classifier: bool,
    stages: Sequence[StagePoint],
    as_html: bool,
) -> None:
    caption, sheet, page, warning = (
        "Real images (left) beside generated ones (right), one class per row",
        _SHEET,
        _HTML,
        "",
    )
    if not reference_is_public:
        shown = "training images" if reference_is_private else "real images that are not known to be public"
        caption, sheet, page = f"PRIVATE, shows {shown}. {caption}", _PRIVATE_SHEET, _PRIVATE_HTML
        warning = (
            f"PRIVATE: this report shows {shown}, and numbers made of them. No epsilon covers it. Do not share it."
        )
    plots = {caption: sheet}
    save_sheet(_beside(evaluation, reference), folder / sheet, columns=2 * _PER_CLASS + 1)
    if evaluation.confusion is not None:
        plots["Confusion of the last classifier: rows are true classes"] = _CONFUSION
        _plot_confusion(evaluation.confusion, reference.class_names, folder / _CONFUSION)
    if stages:
        plots["Course of the curriculum"] = _COURSE
        _plot_stages(stages, folder / _COURSE)
    numbers: dict[str, Any] = {
        "title": title,
        "private": not reference_is_public,
        **({"warning": warning} if warning else {}),
        "epsilon": epsilon,
        "filter_by_classifier": filter_by_classifier,
        **evaluation.to_dict(),
        "stages": [vars(point) for point in stages],
    }
    text = json.dumps(_finite(numbers), indent=2, allow_nan=False)
    (folder / "evaluation.json").write_text(text + "\n", encoding="utf-8")
    about = f"{epsilon} {_FILTERED}" if filter_by_classifier else epsilon
    (folder / "evaluation.md").write_text(_markdown(title, about, warning, evaluation, plots), encoding="utf-8")
    if as_html:
        (folder / page).write_text(_page(folder, title, about, warning, evaluation, plots), encoding="utf-8")


def save_nearest_neighbors(path: Path, images: torch.Tensor, training: PrivateImages, *, count: int = 16) -> None:
    """A sheet of generated images, each above its nearest training image. It shows private images: keep it local."""
    real = to_unit_range(training.images)
    _, index = nearest_distances(images[:count].flatten(1).numpy(), real.flatten(1).numpy())
    save_sheet(torch.cat([images[:count], real[torch.from_numpy(index)]]), path, columns=min(count, len(images)))


def format_value(metric: Metric) -> str:
    """A value with its spread or interval."""
    text = f"{100 * metric.value:.1f} %" if metric.name.startswith("accuracy") else f"{metric.value:.4g}"
    if metric.spread is not None:
        text += f" ± {100 * metric.spread:.1f}" if metric.name.startswith("accuracy") else f" ± {metric.spread:.2g}"
    if metric.interval is not None:
        text += f" [{metric.interval[0]:.3f}, {metric.interval[1]:.3f}]"
    return text


def _finite(value: Any) -> Any:
    """JSON has no infinity, which is the epsilon of a model without noise: null stands for it."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _beside(evaluation: Evaluation, reference: PrivateImages) -> torch.Tensor:
    """Images of a sheet: one row per class, real ones on the left, a gap, generated ones on the right."""
    rows, blank = [], torch.ones(1, *evaluation.images.shape[1:])
    for label in range(min(_MAX_CLASSES, reference.num_classes)):
        real = to_unit_range(reference.images[reference.labels == label][:_PER_CLASS])
        made = evaluation.images[evaluation.labels == label][:_PER_CLASS]
        for part in (real, blank, made):
            missing = (1 if part is blank else _PER_CLASS) - len(part)
            rows.append(torch.cat([part, blank.expand(missing, *blank.shape[1:])]))
    return torch.cat(rows)


def _plot_confusion(confusion: np.ndarray, class_names: Sequence[str], path: Path) -> None:
    import matplotlib.figure

    shares = confusion / confusion.sum(1, keepdims=True).clip(1)
    figure = matplotlib.figure.Figure(figsize=(6, 5.5), layout="tight")
    axes = figure.add_subplot(xlabel="predicted", ylabel="true")
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    ticks = range(len(class_names))
    axes.set_xticks(ticks, class_names, rotation=45, ha="right", fontsize=8)
    axes.set_yticks(ticks, class_names, fontsize=8)
    for row, column in np.argwhere(shares >= 0.005) if len(class_names) <= 20 else ():
        color = "white" if shares[row, column] > 0.5 else "black"
        axes.text(column, row, f"{100 * shares[row, column]:.0f}", ha="center", va="center", color=color, fontsize=8)
    figure.savefig(path, dpi=110)


def _plot_stages(stages: Sequence[StagePoint], path: Path) -> None:
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(8, 3.2), layout="tight")
    places = range(len(stages))
    names = [f"{point.stage}\nepsilon {point.epsilon:.3g}" for point in stages]
    series = (
        ("accuracy of a classifier, %", [100 * point.accuracy for point in stages]),
        ("fd_classifier", [point.fd_classifier for point in stages]),
    )
    for position, (label, values) in enumerate(series, start=1):
        axes = figure.add_subplot(1, 2, position, ylabel=label)
        axes.plot(places, values, "o-", color="tab:blue")
        for place, value in zip(places, values):
            axes.annotate(f"{value:.1f}", (place, value), textcoords="offset points", xytext=(0, 7), ha="center")
        axes.set_xticks(places, names)
        axes.margins(0.2)
    figure.savefig(path, dpi=110)


_HEADS = ("metric", "value", "meaning", "images", "privacy")


def _rows(evaluation: Evaluation) -> list[tuple[str, ...]]:
    return [
        (metric.name, format_value(metric), metric.meaning, metric.data, metric.privacy)
        for metric in evaluation.metrics
    ]


def _markdown(title: str, epsilon: str, warning: str, evaluation: Evaluation, plots: dict[str, str]) -> str:
    table = "\n".join("| " + " | ".join(row) + " |" for row in _rows(evaluation))
    pictures = "\n\n".join(f"![{caption}]({name})\n\n{caption}." for caption, name in plots.items())
    warned = f"**{warning}**\n\n" if warning else ""
    head = f"| {' | '.join(_HEADS)} |\n{'|---' * len(_HEADS)}|"
    return f"# {title}\n\n{warned}{epsilon}\n\n{head}\n{table}\n\n{pictures}\n"


def _page(folder: Path, title: str, epsilon: str, warning: str, evaluation: Evaluation, plots: dict[str, str]) -> str:
    cells = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in _rows(evaluation)
    )
    pictures = "".join(
        f'<figure><img alt="{html.escape(caption)}" src="data:image/png;base64,'
        f'{base64.b64encode((folder / name).read_bytes()).decode()}"><figcaption>{html.escape(caption)}</figcaption>'
        "</figure>"
        for caption, name in plots.items()
    )
    style = (
        "body{font:16px/1.5 system-ui,sans-serif;max-width:960px;margin:2rem auto;padding:0 1rem;color:#222}"
        "table{border-collapse:collapse;width:100%}td,th{border-bottom:1px solid #ddd;padding:.4rem;text-align:left;"
        "vertical-align:top}img{max-width:100%}figure{margin:2rem 0}figcaption{color:#555}"
    )
    heading = "<tr>" + "".join(f"<th>{head}</th>" for head in _HEADS) + "</tr>"
    warned = f"<p><strong>{html.escape(warning)}</strong></p>" if warning else ""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{style}</style></head><body><h1>{html.escape(title)}</h1>{warned}<p>{html.escape(epsilon)}</p>"
        f"<table>{heading}{cells}</table>{pictures}</body></html>\n"
    )
