"""The page of a run: what it cost, the spectra, the ranks. Needs matplotlib."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from rankwise.compression import RankProfile
from rankwise.compression_runs.values import shown
from rankwise.diagnostics import page, plots


def compression_page(model: str, result: dict[str, Any], profile: RankProfile) -> str:
    """The report: what it cost, the spectra, the ranks."""
    name = Path(model).name or model
    spectra = [
        {"singular_values": (layer.spectrum / layer.spectrum[0].clamp(min=1e-30)).tolist()} for layer in profile.layers
    ]
    of = "what comes out on the calibration data" if profile.calibrated else "the weights"
    figures = (
        (
            "Spectra",
            f"Singular values of {of}, over the largest, one line a layer. A steep fall means that a low rank will do.",
            plots.spectrum_figure([{"label": name, "layers": spectra}]),
        ),
        (
            "Ranks",
            "Filled: the rank kept. Outline: the highest at which a pair is smaller than the matrix. Grey: kept dense.",
            _ranks_figure(result["layers"], [layer.highest_paying_rank for layer in profile.layers]),
        ),
    )
    rows = [
        [
            layer["name"], f"{layer['shape'][0]} × {layer['shape'][1]}", "dense" if layer["rank"] is None else str(layer["rank"]),
            str(measured.rank_99), f"{measured.effective_rank:.0f}", f"{100 * layer['relative_error']:.1f} %",
        ]
        for layer, measured in zip(result["layers"], profile.layers, strict=True)
    ]  # fmt: skip
    skipped = [[layer, why] for layer, why in result["skipped"].items()]
    sections = [
        page.section(what, page.figure(what, plots.as_svg(figure, what)), note) for what, note, figure in figures
    ]
    table = page.table(["layer", "size", "rank", "99 % energy", "effective rank", "error"], rows)
    sections.append(page.section("Every layer", table, "Error: ‖W − W_k‖/‖W‖, of the outputs where calibrated."))
    if skipped:
        sections.append(page.section("Left alone", page.table([], skipped, of_words=True)))
    return page.page(f"{name}, compressed", _verdict(result), "\n".join(sections))


def _verdict(result: dict[str, Any]) -> str:
    cut = sum(layer["rank"] is not None for layer in result["layers"])
    said = (
        f"{100 * result['share']:.1f} % of the weights of {len(result['layers'])} layers kept, {cut} of them as pairs; "
        f"{result['bytes_before'] / 1e6:.1f} MB of parameters became {result['bytes_after'] / 1e6:.1f} MB. "
    )
    texts = result["calibration_texts"]
    said += f"Calibrated on {texts} texts. " if texts else "Not calibrated: see --calibrate. "
    if result["metric"] is None:
        return said + "Nothing was scored: give --calibrate or --eval."
    before, after = shown(result["before"]), shown(result["after"])
    return said + f"{result['metric']}: {before} before, {after} after, on {result['scored_on']}."


def _ranks_figure(layers: Sequence[dict[str, Any]], highest: Sequence[int]) -> Any:
    figure = Figure(figsize=(7.2, 3.0), layout="constrained")
    axes = figure.add_subplot()
    places = range(len(layers))
    dense = [place for place in places if layers[place]["rank"] is None]
    cut = [place for place in places if layers[place]["rank"] is not None]
    axes.bar(dense, [highest[place] for place in dense], 0.8, color="#dddddd")
    axes.bar(cut, [highest[place] for place in cut], 0.8, facecolor="none", edgecolor="#999999")
    axes.bar(cut, [layers[place]["rank"] for place in cut], 0.8, color=plots.colour(0))
    axes.set_xlabel("layer, input side first")
    axes.set_ylabel("rank")
    return figure
