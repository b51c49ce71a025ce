"""Load, profile, factorize, score before and after, and write all of it at once."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from rankwise.completion_runs.progress import progress, say
from rankwise.compression import (
    RankProfile,
    factorize_model,
    rank_profile,
    save_factorized,
    uniform_ranks,
    welore_ranks,
)
from rankwise.compression_runs.loading import LoadedModel, load_model
from rankwise.compression_runs.scores import score_of
from rankwise.compression_runs.settings import CompressionSettings
from rankwise.compression_runs.texts import Texts
from rankwise.compression_runs.values import finite, shown
from rankwise.environment import environment
from rankwise.errors import UserError
from rankwise.files import replacing_folder, storage_problem, write_json, write_text

_RULES = {None: None, "welore": welore_ranks, "uniform": uniform_ranks}
_PACKAGES = ("torch", "transformers", "numpy")
_FORMAT_VERSION = 1


class CompressionRun:
    """One run of ``rankwise compress``; :meth:`go` does it."""

    def __init__(self, settings: CompressionSettings, console: Console):
        self.settings, self.console = settings, console

    def go(self, out: Path) -> None:
        """Compress the model and fill the folder.

        Raises:
            UserError: a model, a file or a size that will not do; no room for the folder.
            ValueError: of :func:`rankwise.compression.factorize_model`.
        """
        asked = self.settings
        with self.console.status(f"loading {escape(asked.model)}"):
            loaded = load_model(asked)
        texts = Texts(loaded, asked)
        parts = texts.parts()
        score = score_of(texts, parts)
        calibration = texts.batches(parts.calibration) or None
        names: dict[str, Any] = {
            "include": asked.include,
            "exclude": [*(asked.exclude or []), *loaded.unused] or None,
        }
        before = None if score is None else score.of(loaded.model)
        with progress(self.console, "spectra of all layers") as (report, _):
            profile = rank_profile(loaded.model, calibration, progress=report, **names)
        with progress(self.console, "factorizing") as (report, _):
            done = factorize_model(
                loaded.model, asked.target, ranks=asked.rank, energy=asked.energy, rule=_RULES[asked.rule],
                calibration=calibration, profile=profile, progress=report, **names,
            )  # fmt: skip
        if not done.ranks:
            raise UserError(
                "no layer becomes smaller this way: each would need a rank at which a pair is no smaller than the matrix. "
                "Lower --target, --rank or --energy"
            )
        after = None if score is None else score.of(loaded.model)
        result = {
            "format_version": _FORMAT_VERSION,
            "metric": None if score is None else score.name,
            "greater_is_better": None if score is None else score.greater_is_better,
            "scored_on": None if score is None else score.about,
            "before": finite(before),
            "after": finite(after),
            "calibration_texts": len(parts.calibration),
            **done.as_dict(),
        }
        self._write(out, loaded, result, profile)
        say(self.console, str(done))
        if score is not None:
            say(self.console, f"{score.name} {shown(before)} before, {shown(after)} after ({score.about})")
            if finite(before) is None or finite(after) is None:
                say(self.console, f"a {score.name} that is not finite is null in result.json and metrics.jsonl")
        page = out / "report.html"
        say(self.console, f"report: {page}" if page.is_file() else f"model: {out / 'model'}")

    def _write(self, out: Path, loaded: LoadedModel, result: dict[str, Any], profile: RankProfile) -> None:
        """All or nothing: a folder that a killed run leaves behind would look like a model."""
        scores = [{"stage": stage, "metric": result["metric"], "value": result[stage]} for stage in ("before", "after")]
        lines = [{"format_version": _FORMAT_VERSION}, *(scores if result["metric"] else [])]
        config = {
            "format_version": _FORMAT_VERSION, "kind": "compression", "settings": asdict(self.settings),
            "environment": environment(_PACKAGES),
        }  # fmt: skip
        try:
            with self.console.status("saving"), replacing_folder(out) as folder:
                save_factorized(loaded.model.cpu(), folder / "model")
                if loaded.tokenizer is not None:
                    loaded.tokenizer.save_pretrained(folder / "model")
                write_json(folder / "config.json", config)
                write_json(folder / "result.json", result)
                write_text(folder / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
                try:
                    from rankwise.compression_runs.report import compression_page

                    write_text(folder / "report.html", compression_page(self.settings.model, result, profile))
                except ImportError as error:  # the model itself is whole: a missing matplotlib must not fail it
                    self.console.print(
                        f"no report ({error}): pip install 'rankwise[report]'", markup=False, highlight=False
                    )
        except Exception as error:
            problem = storage_problem(error)
            if problem is None:
                raise
            raise UserError(f"cannot write {out}: {problem}; free some space or choose another folder") from None
