"""``rankwise compress``: a model folder in, a smaller one out, scored before and after."""

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from rankwise.cli.main import main
from rankwise.compression import LowRankLinear, load_factorized, perplexity
from tests.cli.complaints import Captured, complaint
from tests.finetuning.tiny_checkpoint import save_tiny_checkpoint, sentences, word_tokenizer, write_csv, write_pairs
from tests.tiny_models import tiny_llama


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders ``llama``, ``bert`` and ``classifier``; ``train.txt``, ``test.txt``, ``pairs.csv`` and ``classes.csv``."""
    folder = tmp_path_factory.mktemp("given")
    tiny_llama(eos_token_id=0, pad_token_id=2, bos_token_id=None).save_pretrained(folder / "llama")
    tokenizer = word_tokenizer(["<end>", "<unk>", "<pad>"], eos_token="<end>", pad_token="<pad>")
    tokenizer.save_pretrained(folder / "llama")
    save_tiny_checkpoint(folder / "bert")
    save_tiny_checkpoint(folder / "classifier", embedding=False)
    for name, seed in (("train.txt", 1), ("test.txt", 2)):
        (folder / name).write_text("\n".join(sentences(80, seed)) + "\n", encoding="utf-8")
    write_pairs(folder / "pairs.csv")
    rows = [(text, ("LABEL_0", "LABEL_1")[len(text) % 2]) for text in sentences(30, 4)]
    write_csv(folder / "classes.csv", ["text", "label"], rows)
    return folder


def compress(given: Path, out: Path, model: str, *more: Any) -> int:
    return main(["compress", "--model", str(given / model), "--out", str(out), *map(str, more)])


def result_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "result.json").read_text(encoding="utf-8"))


def test_a_language_model_is_compressed_and_its_perplexity_is_that_of_the_saved_model(
    given: Path, tmp_path: Path, capsys: Captured
) -> None:
    out = tmp_path / "small"
    more = ("--calibrate", given / "train.txt", "--eval", given / "test.txt", "--max-length", 16)
    assert compress(given, out, "llama", "--target", 0.6, *more) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "layers factorized" in said
    assert "perplexity" in said
    result = result_of(out)
    assert result["share"] <= 0.6
    assert (result["metric"], result["greater_is_better"], result["scored_on"]) == ("perplexity", False, "test.txt")
    loaded = load_factorized(out / "model")
    ranks = {n: m.rank for n, m in loaded.named_modules() if isinstance(m, LowRankLinear)}
    assert ranks == {layer["name"]: layer["rank"] for layer in result["layers"] if layer["rank"] is not None}
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    ids = torch.tensor(tokenizer((given / "test.txt").read_text(encoding="utf-8"))["input_ids"])
    windows = ids[: len(ids) // 16 * 16].reshape(-1, 16)
    assert perplexity(loaded, [windows]) == pytest.approx(result["after"], rel=1e-4)
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert metrics[0] == {"format_version": 1}
    assert [entry["value"] for entry in metrics[1:]] == [result["before"], result["after"]]
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    assert config["settings"]["target"] == 0.6
    assert config["environment"]["packages"]["torch"]
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 2
    assert "lm_head" in page  # left alone, and said so
    assert "<script" not in page


def test_without_held_out_text_a_fifth_of_the_calibration_text_is_scored_on_and_not_calibrated_on(
    given: Path, tmp_path: Path
) -> None:
    out = tmp_path / "small"
    assert compress(given, out, "bert", "--calibrate", given / "train.txt") == 0
    result = result_of(out)
    assert result["scored_on"] == "a fifth of train.txt"
    assert result["calibration_texts"] == 64  # of 80
    assert result["metric"] == "cosine to the original's features"
    assert result["before"] == pytest.approx(1)
    assert 0.5 < result["after"] < 1


def test_the_same_seed_gives_the_same_model_and_another_draws_other_texts(given: Path, tmp_path: Path) -> None:
    weights = []
    for number, seed in enumerate((0, 0, 1)):
        more = ("--calibrate", given / "train.txt", "--calibrate-rows", 10, "--seed", seed)
        assert compress(given, tmp_path / str(number), "bert", *more) == 0
        weights.append((tmp_path / str(number) / "model" / "model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]


def test_tasks_are_scored_with_labels(given: Path, tmp_path: Path) -> None:
    pairs = ("--task", "pair-similarity", "--eval", given / "pairs.csv", "--calibrate", given / "pairs.csv")
    assert compress(given, tmp_path / "pairs", "bert", *pairs) == 0
    assert result_of(tmp_path / "pairs")["metric"] == "spearman"
    classes = ("--task", "classification", "--eval", given / "classes.csv", "--rank", 4)
    assert compress(given, tmp_path / "classes", "classifier", *classes) == 0
    result = result_of(tmp_path / "classes")
    assert result["metric"] == "accuracy"
    assert result["calibration_texts"] == 0
    assert {layer["rank"] for layer in result["layers"]} == {4}


def test_a_model_can_be_compressed_without_any_text_and_without_matplotlib(
    given: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "rankwise.compression_runs.report", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    out = tmp_path / "small"
    more = ("--energy", 0.6, "--include", "attention,intermediate.dense", "--exclude", "layer.1")
    assert compress(given, out, "bert", *more) == 0
    assert "no report" in capsys.readouterr().err
    result = result_of(out)
    assert result["metric"] is None
    assert all("layer.0" in layer["name"] for layer in result["layers"])
    assert (out / "model" / "tokenizer.json").is_file()
    assert not (out / "report.html").exists()


@pytest.fixture(scope="module")
def small(given: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``compress --model llama --include self_attn`` made."""
    out = tmp_path_factory.mktemp("compressed") / "small"
    assert compress(given, out, "llama", "--rank", 4, "--include", "self_attn") == 0
    return out


def test_a_compressed_model_is_loaded_as_such_and_cut_further(small: Path, tmp_path: Path, capsys: Captured) -> None:
    assert main(["compress", "--model", str(small / "model"), "--out", str(tmp_path / "new"), "--rank", "5"]) == 0
    again, before = load_factorized(tmp_path / "new" / "model"), load_factorized(small / "model")
    ranks = {name.split(".")[-2]: m.rank for name, m in again.named_modules() if isinstance(m, LowRankLinear)}
    ranks |= {name.split(".")[-1]: m.rank for name, m in again.named_modules() if isinstance(m, LowRankLinear)}
    assert (ranks["q_proj"], ranks["up_proj"]) == (4, 5)
    attention, same = (model.model.layers[0].self_attn.q_proj for model in (again, before))
    assert torch.equal(attention.left, same.left)
    arguments = ["compress", "--model", str(tmp_path / "new" / "model"), "--out", str(tmp_path / "third")]
    assert main(arguments) == 2
    assert "low-rank already" in " ".join(complaint(capsys).split())


def test_a_compressed_embedding_model_is_scored_as_it_is(given: Path, tmp_path: Path) -> None:
    assert compress(given, tmp_path / "one", "bert", "--rank", 4, "--include", "attention") == 0
    pairs = ("--task", "pair-similarity", "--eval", given / "pairs.csv", "--rank", 5)
    assert compress(tmp_path, tmp_path / "two", "one/model", *pairs) == 0
    whole, again = (load_factorized(tmp_path / name / "model") for name in ("one", "two"))
    assert torch.equal(
        again.encoder.layer[0].attention.self.query.left, whole.encoder.layer[0].attention.self.query.left
    )
    assert isinstance(again.encoder.layer[0].output.dense, LowRankLinear)


@pytest.fixture(params=["features", "pair-similarity"])
def scored(request: pytest.FixtureRequest, given: Path) -> tuple[Any, ...]:
    task = ("--task", request.param, "--eval", given / "pairs.csv") if request.param == "pair-similarity" else ()
    return ("--rank", 4, *task)


def without(model: Path, *beginnings: str) -> None:
    file = model / "model.safetensors"
    kept = {name: tensor for name, tensor in load_file(file).items() if not name.startswith(beginnings)}
    save_file(kept, file, metadata={"format": "pt"})


def changed(model: Path, **changes: Any) -> None:
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    (model / "config.json").write_text(json.dumps({**config, **changes}), encoding="utf-8")


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        (lambda model: without(model, "encoder.layer.1.output"), "lack encoder.layer.1.output"),
        (lambda model: changed(model, num_hidden_layers=3), "lack encoder.layer.2"),
        (lambda model: changed(model, intermediate_size=40), "in another shape encoder.layer.0"),
        (lambda model: changed(model, hidden_size="x"), "expected int, got str"),
        (lambda model: changed(model, model_type=[]), "cannot load the model"),
    ],
)
def test_weights_that_the_config_does_not_fit_are_refused(
    given: Path, tmp_path: Path, capsys: Captured, scored: tuple[Any, ...], harm: Any, says: str
) -> None:
    harm(Path(shutil.copytree(given / "bert", tmp_path / "bert")))
    assert compress(tmp_path, tmp_path / "new", "bert", *scored) == 2
    assert says in " ".join(complaint(capsys).split())
    assert not (tmp_path / "new").exists()


def test_an_encoder_without_its_pooler_is_compressed_and_the_pooler_left_alone(
    given: Path, tmp_path: Path, scored: tuple[Any, ...]
) -> None:
    without(Path(shutil.copytree(given / "bert", tmp_path / "bert")), "pooler")
    changed(tmp_path / "bert", architectures=["BertConfig"])  # no model: taken as a body
    assert compress(tmp_path, tmp_path / "new", "bert", *scored) == 0
    result = result_of(tmp_path / "new")
    assert "pooler.dense" in result["skipped"]
    assert all("pooler" not in layer["name"] for layer in result["layers"])


def test_a_folder_with_an_adapter_is_refused(given: Path, tmp_path: Path, capsys: Captured) -> None:
    from peft import LoraConfig, get_peft_model

    folder = Path(shutil.copytree(given / "llama", tmp_path / "llama"))
    get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(folder)
    assert compress(tmp_path, tmp_path / "new", "llama") == 2
    assert "holds an adapter; merge it first" in " ".join(complaint(capsys).split())
    assert not (tmp_path / "new").exists()


def test_a_name_that_looks_like_markup_is_a_name(given: Path, tmp_path: Path) -> None:
    shutil.copytree(given / "bert", tmp_path / "[" / "bad]")
    assert main(["compress", "--model", f"{tmp_path}/[/bad]", "--out", str(tmp_path / "new"), "--rank", "4"]) == 0


def test_an_infinite_perplexity_is_null_and_said(
    given: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rankwise.compression_runs.scores.perplexity", lambda model, windows: math.inf)
    more = ("--eval", given / "test.txt", "--max-length", 16, "--rank", 4)
    assert compress(given, tmp_path / "new", "llama", *more) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "perplexity not finite before" in said
    assert "is null in result.json" in said
    assert result_of(tmp_path / "new")["after"] is None
    assert "not finite after" in (tmp_path / "new" / "report.html").read_text(encoding="utf-8")


def test_tables_to_calibrate_on_need_no_label(given: Path, tmp_path: Path) -> None:
    rows = [(text, text.upper(), "" if number % 2 else "3") for number, text in enumerate(sentences(20, 4))]
    for name, header, count, width in (
        ("one.csv", ["comment"], 16, 1),
        ("pair.csv", ["sentence1", "sentence2"], 32, 2),
        ("half.csv", ["sentence1", "sentence2", "score"], 32, 3),  # rows without a label count as well
    ):
        write_csv(tmp_path / name, header, [row[:width] for row in rows])
        assert compress(given, tmp_path / f"from {name}", "bert", "--rank", 4, "--calibrate", tmp_path / name) == 0
        assert result_of(tmp_path / f"from {name}")["calibration_texts"] == count


def test_the_rule_follows_the_calibration(given: Path, tmp_path: Path) -> None:
    for name, more, rule in (("plain", (), "welore"), ("aware", ("--calibrate", given / "train.txt"), "uniform")):
        ranks = []
        for number, options in enumerate(((), ("--rule", rule))):
            assert compress(given, tmp_path / f"{name} {number}", "bert", *more, *options) == 0
            ranks.append(result_of(tmp_path / f"{name} {number}")["layers"])
        assert ranks[0] == ranks[1]


def test_mistakes_are_named_and_nothing_is_written(given: Path, small: Path, tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine.txt").write_text("mine")
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "latin.txt").write_bytes("très".encode("latin-1"))
    (tmp_path / "short.txt").write_text("good bad\n")
    train, pairs = given / "train.txt", given / "pairs.csv"
    write_csv(tmp_path / "numbers.csv", ["a", "b"], [(1, 2), (3, 4)])
    write_csv(tmp_path / "files.csv", ["image", "label"], [("a.png", "x"), ("b.png", "y")])
    before = sorted(path.name for path in tmp_path.iterdir())
    for out, model, more, says in (
        ("new", "bert", ["--target", 0.5, "--rank", 3], "exclude each other"),
        ("new", "bert", ["--target", 1.5], "must lie in (0, 1]"),
        ("new", "bert", ["--target", 0.0001], "rank 1 in every layer keeps"),
        ("new", "bert", ["--target", 1], "no layer becomes smaller this way"),
        ("new", "bert", ["--rank", 99], "must be a whole number from 1 to"),
        ("new", "bert", ["--rule", "best"], "--rule must be welore or uniform"),
        ("new", "bert", ["--task", "pair-similarity"], "--task needs --eval"),
        ("new", "bert", ["--task", "poetry", "--eval", pairs], "--task must be"),
        ("new", "bert", ["--task", "classification", "--eval", pairs], "is no class of the model"),
        ("new", "bert", ["--include", "nowhere"], "names no layer"),
        ("new", "bert", ["--include", "a,,b"], "comma-separated"),
        ("new", "bert", ["--calibrate", tmp_path / "gone.txt"], "cannot read"),
        ("new", "bert", ["--calibrate", tmp_path / "empty.txt"], "is empty"),
        ("new", "bert", ["--calibrate", tmp_path / "latin.txt"], "is not UTF-8"),
        ("new", "bert", ["--calibrate", tmp_path / "short.txt"], "give at least 5"),
        ("new", "llama", ["--calibrate", tmp_path / "short.txt"], "fewer than a window of"),
        ("new", "bert", ["--calibrate", train, "--max-length", 1], "--max-length must be at least 2"),
        ("new", "bert", ["--calibrate", ""], "--calibrate is empty"),
        ("new", "bert", ["--eval", ""], "--eval is empty"),
        ("new", "bert", ["--model", ""], "--model is empty"),
        ("new", "bert", ["--out", ""], "--out is empty"),
        ("new", "bert", ["--calibrate", train, "--text", "zzz"], "name columns of a table"),
        ("new", "bert", ["--calibrate", pairs, "--text", "zzz"], "has no column 'zzz'"),
        ("new", "bert", ["--calibrate", tmp_path / "numbers.csv"], "cannot find a text column"),
        ("new", "bert", ["--calibrate", tmp_path / "files.csv"], "holds no texts"),
        ("new", "bert", ["--model", small], f"did you mean {small / 'model'}?"),
        ("new", "nowhere", [], "there is no model folder"),
        ("taken", "bert", [], "is in use"),
    ):
        assert compress(given, tmp_path / out, model, *more) == 2, says
        assert says in " ".join(complaint(capsys).split())
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert [path.name for path in (tmp_path / "taken").iterdir()] == ["mine.txt"]


def test_a_damaged_model_is_named(given: Path, tmp_path: Path, capsys: Captured) -> None:
    shutil.copytree(given / "bert", tmp_path / "bert")
    weights = tmp_path / "bert" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    assert main(["compress", "--model", str(tmp_path / "bert"), "--out", str(tmp_path / "new")]) == 2
    assert "cannot load the model" in " ".join(complaint(capsys).split())
    assert not (tmp_path / "new").exists()
