"""Deep LoRA and LoRA over several draws of 64 of the demo's rows: what one seed cannot say.

    python benchmarks/demo_seeds.py [--seeds 5] [--steps 150]   # writes results/demo_seeds.json

Same rows, steps, batches and held-out pairs for both methods of a seed; each method at its default learning rate,
nothing tuned on these rows. Finished runs are kept, so an interrupted study goes on where it stopped.
"""

import argparse
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.protocol import write_result
from demo.run import DATA, METHODS, model_folder
from rankwise.diagnostics.report import read_run
from rankwise.finetuning import FinetuneSettings, finetune, resume


def run_once(method: str, seed: int, steps: int, model: Path, root: Path) -> dict[str, object]:
    out = root / f"{method}-seed{seed}-steps{steps}"
    if not (out / "result.json").is_file():
        if (out / "config.json").is_file():
            resume(out)
        else:
            settings = FinetuneSettings(
                model=str(model), data=str(DATA), out=str(out), task="pair-similarity",
                method=method, shots=64, seed=seed, steps=steps,
            )  # fmt: skip
            finetune(settings)
    run = read_run(out)
    return {
        "method": method,
        "seed": seed,
        "before": run["before"],
        "after": run["after"],
        "directions": sum(layer["rank_99"] for layer in run["layers"]),
        "lora_bytes": run["exported_bytes"],
        "seconds_per_step": run["seconds_per_step"],
    }


def draw_picture(runs: list[Path]) -> None:
    """The README's picture: the spectra of the first seed."""
    from rankwise.diagnostics.plots import spectrum_figure

    target = Path(__file__).parent.parent / "docs" / "images" / "spectra.png"
    target.parent.mkdir(exist_ok=True)
    spectrum_figure([read_run(run) for run in runs]).savefig(target, dpi=160)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--root", type=Path, default=Path("runs/demo_seeds"))
    options = parser.parse_args()
    model = model_folder()
    rows = []
    for seed in range(options.seeds):
        for method in METHODS:
            rows.append(run_once(method, seed, options.steps, model, options.root))
            print(rows[-1], flush=True)
    after = {m: [r["after"] for r in rows if r["method"] == m] for m in METHODS}
    differences = [a - b for a, b in zip(*after.values(), strict=True)]
    summary = {
        "mean_before": statistics.mean(r["before"] for r in rows),
        "mean_after": {m: statistics.mean(values) for m, values in after.items()},
        "mean_difference": statistics.mean(differences),
        "deep_lora_wins": sum(d > 0 for d in differences),
    }
    print(summary)
    draw_picture([options.root / f"{m}-seed0-steps{options.steps}" for m in METHODS])
    write_result(
        "demo_seeds",
        f"python benchmarks/demo_seeds.py --seeds {options.seeds} --steps {options.steps}",
        {"metric": "spearman", "summary": summary, "rows": rows},
    )


if __name__ == "__main__":
    main()
