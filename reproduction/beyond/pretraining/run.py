"""Can a small language model be trained from scratch with a small optimizer state, and what does it cost in loss?

The overview (§3.2.1, §3.3) quotes GaLore and ReLoRA at 60 million to 7 billion parameters; here every method trains 4 million
on equal tokens of two texts, its learning rate tuned alike.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from reproduction.beyond.pretraining.training import Run, measured_run
from reproduction.record import write_json
from reproduction.style import BLUE, GREEN, GREY, ORANGE, PURPLE, figure_style

TITLE = "pretraining a small Llama: AdamW, GaLore, AdaRankGrad, ReLoRA and LoRA at equal tokens"
# "paper" is the most that the study allows itself; GaLore's and ReLoRA's own sizes begin at 60 million parameters
_PAPER: dict[str, Any] = {
    "corpora": ["wikitext2", "tinyshakespeare"],
    # tokens are bytes: of a text in thousands of words the embeddings alone learn most of what so short a run can learn
    "width": 256,
    "inner_width": 688,
    "layers": 5,
    "heads": 4,
    "length": 128,
    "rows": 8,
    "tokens": 2_000_000,
    "seeds": 5,
    "looks": 5,
    "looked_at_rows": 64,
    "max_norm": 1.0,
    # a quarter of the width, as GaLore and ReLoRA do it at 60 million; the most that AdaRankGrad may take
    "rank": 64,
    "lower_rank": 16,
    "lower_ranks_of": ["galore"],
    "refresh_every": 100,
    "energy": 0.9,
    "cycles": 4,
    # tuned on the first corpus's own part, at that many tokens, with a seed of its own: for embeddings, head and norms one
    # rate with AdamW on everything, and with that for every method the rate of the hidden matrices; AdamW's is the warm
    # start's. Where the best is the first or last of these, the next power of two is tried, so many times.
    "tuning_tokens": 1_000_000,
    "other_rates": [4e-3, 8e-3, 1.6e-2],
    "rates": {
        "adamw": [5e-4, 1e-3, 2e-3],
        "galore": [1e-3, 2e-3, 4e-3],
        "adarankgrad": [1e-3, 2e-3, 4e-3],
        "lora": [1e-3, 2e-3, 4e-3],
        "relora": [1e-3, 2e-3, 4e-3],
        "relora_warm": [1e-3, 2e-3, 4e-3],
    },
    "widenings": 3,
    "processes": 2,
}
_DESK: dict[str, Any] = {
    **_PAPER,
    "tokens": 300_000,
    "tuning_tokens": 150_000,
    "seeds": 3,
    # some methods again on the first corpus over more of it, their rates tuned at that length from the short runs' best on
    "longer": {"tokens": 1_000_000, "methods": ["adamw", "galore", "lora", "relora"]},
}
_SMALL: dict[str, Any] = {
    **_DESK,
    "corpora": ["tinyshakespeare"],
    "width": 32,
    "inner_width": 80,
    "layers": 1,
    "heads": 2,
    "length": 32,
    "rows": 8,
    "tokens": 256 * 32,
    "tuning_tokens": 256 * 8,
    "widenings": 0,
    "seeds": 1,
    "looks": 2,
    "looked_at_rows": 32,
    "rank": 8,
    "lower_rank": 4,
    "lower_ranks_of": ["galore"],
    "refresh_every": 10,
    "other_rates": [1e-2, 3e-2],
    "rates": {method: [3e-3, 1e-2] for method in _PAPER["rates"]},
    "longer": {"tokens": 256 * 48, "methods": ["adamw", "lora"]},
    "processes": 0,
}
SCALES = {"paper": _PAPER, "desk": _DESK, "small": _SMALL}
COMMITTED = "desk"
NEEDS_DATA = True  # a folder named by RANKWISE_DATA

_FINISHED = Path("runs") / "reproduction" / "beyond" / "pretraining" / "finished"
_TUNING_SEED = 10_000
# settings that say which runs there are, not what one of them does; what of them concerns a run stands in it
_ELSEWHERE = {
    "corpora",
    "tokens",
    "tuning_tokens",
    "seeds",
    "rates",
    "processes",
    "rank",
    "lower_rank",
    "lower_ranks_of",
    "longer",
}


def measure(settings: dict[str, Any], seed: int) -> dict[str, Any]:
    """Rates first, then every method on every corpus with every seed. What was interrupted goes on where it was."""
    rates, tuning = _tuned(settings, seed)
    results: dict[str, Any] = {"rates": rates}
    curves: dict[str, Any] = {"tuning": tuning}
    wanted = {corpus: _entries(settings, corpus) for corpus in settings["corpora"]}
    for corpus, trained in _trained(wanted, rates, settings["tokens"], settings, seed).items():
        results[corpus], curves[corpus] = trained
    if "longer" in settings:
        longer_rates, curves["longer_tuning"] = _tuned_longer(settings, rates, seed)
        methods, tokens = settings["longer"]["methods"], settings["longer"]["tokens"]
        wanted = {settings["corpora"][0]: [(method, settings["rank"]) for method in methods]}
        ((results["longer"], curves["longer"]),) = _trained(wanted, longer_rates, tokens, settings, seed).values()
        results["longer"]["rates"] = longer_rates
    return {"results": results, "curves": curves}


def _trained(
    wanted: dict[str, list[tuple[str, int]]], rates: dict[str, float], tokens: int, settings: dict[str, Any], seed: int
) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """By corpus, what (method, rank) came to and its curves; all seeds of all of them side by side."""
    trials = range(settings["seeds"])
    cells = {
        (corpus, method, rank, trial): Run(
            corpus,
            method,
            rank,
            rates[method],
            rates["other"],
            1000 * seed + trial,
            tokens,
            "held_out",
            rates["adamw"] if method == "relora_warm" else 0.0,
        )
        for corpus, entries in wanted.items()
        for method, rank in entries
        for trial in trials
    }
    done = dict(zip(cells, _all_of(list(cells.values()), settings), strict=True))
    found: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}
    for corpus, entries in wanted.items():
        summaries, curves = found[corpus] = {}, {}
        full = [done[corpus, "adamw", settings["rank"], trial] for trial in trials]
        for method, rank in entries:
            runs = [done[corpus, method, rank, trial] for trial in trials]
            name = _name(method, rank, settings)
            summaries[name] = _summary(runs, full)
            curves[name] = {"tokens": runs[0]["tokens"], "losses": [run["losses"] for run in runs]}
    return found


def _entries(settings: dict[str, Any], corpus: str) -> list[tuple[str, int]]:
    """(method, rank): all at the rank, and on the first corpus some at the lower one."""
    lower = settings["lower_ranks_of"] if corpus == settings["corpora"][0] else []
    return [(method, settings["rank"]) for method in settings["rates"]] + [
        (method, settings["lower_rank"]) for method in lower
    ]


def _name(method: str, rank: int, settings: dict[str, Any]) -> str:
    return method if rank == settings["rank"] else f"{method}_rank_{rank}"


def _summary(runs: list[dict[str, Any]], full: list[dict[str, Any]]) -> dict[str, Any]:
    """The losses at the end and what they are above AdamW's from the same start on the same batches."""
    ends = np.array([run["losses"][-1] for run in runs])
    above = ends - np.array([run["losses"][-1] for run in full])
    return {
        "loss": float(ends.mean()),
        "loss_range": {"low": float(ends.min()), "high": float(ends.max())},
        "above_adamw": float(above.mean()),
        "above_adamw_range": {"low": float(above.min()), "high": float(above.max())},
        # from the same start and over the same batches nothing but the rank of AdaRankGrad could differ, and it may
        "state_bytes": max(run["state_bytes"] for run in runs),
        "trainable": runs[0]["trainable"],
    }


def _tuned(settings: dict[str, Any], seed: int) -> tuple[dict[str, float], dict[str, Any]]:
    """The best rates by the loss on the part of the first corpus that is for tuning, and all losses."""
    rates = {method: list(tried) for method, tried in settings["rates"].items()}
    middle = sorted(rates["adamw"])[len(rates["adamw"]) // 2]
    trial = partial(_tuning_run, settings, seed, settings["tuning_tokens"])
    found = _searched({"other": settings["other_rates"]}, lambda _, rate: trial("adamw", middle, rate), settings)
    other = _lowest(found["other"])
    found |= _searched({"adamw": rates.pop("adamw")}, lambda method, rate: trial(method, rate, other), settings)
    warm = {"relora_warm": _lowest(found["adamw"])}
    found |= _searched(rates, lambda method, rate: trial(method, rate, other, warm.get(method, 0.0)), settings)
    return _best(found), _as_curves(found)


def _tuned_longer(
    settings: dict[str, Any], rates: dict[str, float], seed: int
) -> tuple[dict[str, float], dict[str, Any]]:
    """The same for the longer runs, from the short ones' best rates; that of embeddings, head and norms stays."""
    longer, other = settings["longer"], rates["other"]
    trial = partial(_tuning_run, settings, seed, longer["tokens"])
    grids = {method: [rates[method] / 2, rates[method], 2 * rates[method]] for method in longer["methods"]}
    found = _searched(grids, lambda method, rate: trial(method, rate, other), settings)
    return {"other": other, **_best(found)}, _as_curves(found)


def _tuning_run(
    settings: dict[str, Any], seed: int, tokens: int, method: str, rate: float, other: float, warm_rate: float = 0.0
) -> Run:
    corpus = settings["corpora"][0]
    return Run(corpus, method, settings["rank"], rate, other, _TUNING_SEED + seed, tokens, "tuning", warm_rate)


def _best(found: dict[str, dict[float, float]]) -> dict[str, float]:
    best = {name: _lowest(tried) for name, tried in found.items()}
    print("best rates:", best, flush=True)
    return best


def _as_curves(found: dict[str, dict[float, float]]) -> dict[str, dict[str, float]]:
    return {name: {str(rate): tried[rate] for rate in sorted(tried)} for name, tried in found.items()}


def _searched(
    grids: dict[str, list[float]], trial: Callable[[str, float], Run], settings: dict[str, Any]
) -> dict[str, dict[float, float]]:
    """Losses by name and rate; beyond a grid where its best is at an end."""
    found: dict[str, dict[float, float]] = {name: {} for name in grids}
    wanted = [(name, rate) for name, grid in grids.items() for rate in grid]
    for _ in range(settings["widenings"] + 1):
        runs = [trial(name, rate) for name, rate in wanted]
        for (name, rate), done in zip(wanted, _all_of(runs, settings), strict=True):
            found[name][rate] = done["losses"][-1]
        wanted = [(name, beyond) for name, tried in found.items() if (beyond := _beyond(tried)) is not None]
    return found


def _beyond(losses: dict[float, float]) -> float | None:
    best = _lowest(losses)
    if best == max(losses):
        return 2 * best
    return best / 2 if best == min(losses) else None


def _lowest(losses: dict[float, float]) -> float:
    return min(losses, key=losses.__getitem__)


# -- runs side by side, each kept as soon as it is done ----------------------------------------------------------


def _all_of(runs: Sequence[Run], settings: dict[str, Any]) -> list[dict[str, Any]]:
    if not settings["processes"]:
        return [measured_run(run, settings) for run in runs]
    _FINISHED.mkdir(parents=True, exist_ok=True)
    files = {run: _FINISHED / f"{_digest(run, settings)}.json" for run in runs}
    with ProcessPoolExecutor(settings["processes"], mp_context=get_context("spawn")) as pool:
        running = {pool.submit(measured_run, run, settings): run for run in runs if not files[run].is_file()}
        for future in as_completed(running):
            run, done = running[future], future.result()
            write_json(files[run], {"run": run._asdict(), **done})
            print(f"{run}: {done['losses'][-1]:.4f} in {done['seconds']:.0f} s", flush=True)
    return [json.loads(files[run].read_text(encoding="utf-8")) for run in runs]


def _digest(run: Run, settings: dict[str, Any]) -> str:
    """Of everything that a run's numbers depend on."""
    relevant = {name: value for name, value in settings.items() if name not in _ELSEWHERE}
    return hashlib.sha256(json.dumps([run, relevant], sort_keys=True).encode()).hexdigest()[:20]


# -- the picture -------------------------------------------------------------------------------------------------

_LOOKS = {
    "adamw": (GREY, "AdamW"),
    "galore": (BLUE, "GaLore"),
    "adarankgrad": (GREEN, "AdaRankGrad"),
    "relora_warm": (PURPLE, "warm ReLoRA"),
    "relora": (ORANGE, "ReLoRA"),
    "lora": ("#111111", "LoRA"),
}
_BELOW_ITS_POINT = ("relora", "adamw")  # the name, where another's is above
_CORPORA = {"wikitext2": "WikiText-2", "tinyshakespeare": "tiny Shakespeare"}


def draw(record: dict[str, Any]) -> Figure:
    """Loss against tokens for each corpus and for the longer runs, and against the optimizer's bytes for the first corpus."""
    settings, curves, results = record["settings"], record["curves"], record["results"]
    titles = {corpus: f"{_CORPORA[corpus]}: loss against text" for corpus in settings["corpora"]}
    if "longer" in settings:
        titles["longer"] = f"{_CORPORA[settings['corpora'][0]]}, over more text"
    with figure_style():
        lines = len(titles) // 2 + 1  # of two panels
        figure = Figure(figsize=(7.4, 2.8 * lines))
        panels = [figure.add_subplot(lines, 2, place + 1) for place in range(len(titles) + 1)]
        for axes, (name, title) in zip(panels, titles.items(), strict=False):
            _against_tokens(axes, curves[name])
            axes.set_title(title)
        panels[0].legend()
        first = settings["corpora"][0]
        _against_bytes(panels[-1], results[first], settings)
        panels[-1].set_title(f"{_CORPORA[first]}: loss against optimizer state")
        return figure


def _against_tokens(axes: Axes, curves: dict[str, Any]) -> None:
    for method, (colour, label) in _LOOKS.items():
        if method in curves:
            losses = np.array(curves[method]["losses"])[:, 1:]  # the start is the same for all, and far above
            tokens = np.array(curves[method]["tokens"][1:]) / 1e6
            axes.plot(tokens, losses.mean(axis=0), color=colour, label=label)
            axes.vlines(tokens, losses.min(axis=0), losses.max(axis=0), color=colour, linewidth=1.2)
    axes.set(xlabel="million bytes of text", ylabel="held-out loss, nats a byte")


def _against_bytes(axes: Axes, results: dict[str, Any], settings: dict[str, Any]) -> None:
    for method, (colour, label) in _LOOKS.items():
        lower = f"{method}_rank_{settings['lower_rank']}"
        points = [results[name] for name in (method, lower) if name in results]
        sizes = [point["state_bytes"] / 1e6 for point in points]
        axes.plot(sizes, [point["loss"] for point in points], "--", color=colour, linewidth=1)
        for size, point, fill in zip(sizes, points, ("full", "none"), strict=False):
            axes.plot(size, point["loss"], "o", color=colour, markersize=6, fillstyle=fill)
            spread = point["loss_range"]
            axes.plot([size, size], [spread["low"], spread["high"]], color=colour, linewidth=1.2)
        last = sizes[0] == max(point["state_bytes"] for point in results.values()) / 1e6
        offset = (-5 if last else 5, -13 if method in _BELOW_ITS_POINT else 5)
        axes.annotate(
            label, (sizes[0], points[0]["loss"]), xytext=offset, textcoords="offset points", color=colour,
            horizontalalignment="right" if last else "left",
        )  # fmt: skip
    ranks = f"r = {settings['rank']}, open: {settings['lower_rank']}"
    axes.set(xlabel=f"MB of optimizer state ({ranks})", ylabel="held-out loss, nats a byte")
    axes.margins(x=0.25)
