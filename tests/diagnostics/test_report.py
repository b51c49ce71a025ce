"""The page: whole, self-contained, and deaf to whatever names it is given."""

import json
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from rankwise.diagnostics import write_report
from rankwise.errors import UserError
from tests.diagnostics.run_folders import HOSTILE, finished_run, layer


class Page(HTMLParser):
    """Every tag with its attributes, and the text outside of style."""

    VOID = frozenset({"meta", "link", "br", "img", "hr", "input"})

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.styles = ""
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "style":
            self.styles += data
        else:
            self.text += data

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def read(path: Path) -> tuple[str, Page]:
    text = path.read_text(encoding="utf-8")
    return text, Page(text)


def assert_self_contained(text: str, page: Page) -> None:
    names = {tag for tag, _ in page.tags}
    assert names.isdisjoint(
        {"script", "img", "iframe", "object", "embed", "base", "form", "foreignobject", "a", "image"}
    )
    assert "<script" not in text.lower()
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if not name.startswith("xmlns") and (tag, name) != ("figure", "aria-label"):
                assert "http:" not in (value or ""), (tag, name, value)
                assert "https:" not in (value or ""), (tag, name, value)
            if name in ("href", "xlink:href", "src"):
                assert (value or "").startswith(("#", "data:")), (tag, name, value)
    assert "@import" not in page.styles
    assert "url(" not in page.styles
    policy = [
        a["content"] for tag, a in page.tags if tag == "meta" and a.get("http-equiv") == "Content-Security-Policy"
    ]
    assert len(policy) == 1
    assert "default-src 'none'" in (policy[0] or "")
    assert page.open == []


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are made but not drawn, for tests about words: drawing takes most of a report's time."""
    from rankwise.diagnostics import plots

    monkeypatch.setattr(plots, "as_svg", lambda figure, title: "<svg></svg>")


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    return [finished_run(tmp_path / "deep"), finished_run(tmp_path / "plain", method="lora", after=0.5)]


def test_the_page_holds_everything_and_loads_nothing(two: list[Path], tmp_path: Path) -> None:
    assert write_report(two, tmp_path / "page.html", checks={"loaded": True}) == tmp_path / "page.html"
    text, page = read(tmp_path / "page.html")
    assert_self_contained(text, page)
    assert page.count("svg") == 5
    for shown in (
        "Deep LoRA",
        "0.7500",
        "0.5000",
        "+0.2500",
        "64 labelled rows",
        "encoder.0.query",
        "12,345",
        "loaded",
    ):
        assert shown in page.text
    assert "Highest spearman: Deep LoRA with 0.7500, against LoRA 0.5000" in page.text
    assert not list(tmp_path.glob("*.tmp"))
    assert not list(tmp_path.glob(".*"))


@pytest.mark.usefixtures("undrawn")
def test_the_json_holds_the_same_facts(two: list[Path], tmp_path: Path) -> None:
    write_report(two, tmp_path / "page.html", title="T", checks={"a": 1})
    content = json.loads((tmp_path / "page.json").read_text(encoding="utf-8"))
    assert content["format_version"] == 1
    assert (content["title"], content["checks"]) == ("T", {"a": 1})
    assert [(run["label"], run["before"], run["after"]) for run in content["runs"]] == [
        ("Deep LoRA", 0.25, 0.75),
        ("LoRA", 0.25, 0.5),
    ]
    assert content["runs"][0]["losses"] == [1.0, 0.5, 1 / 3]


HOSTILE_FOLDER = HOSTILE.replace("/", "∕")


def hostile_runs(folder: Path) -> list[Path]:
    more: dict[str, Any] = {
        "settings": {"model": HOSTILE, HOSTILE: HOSTILE},
        "layers": [layer(HOSTILE), layer("</title></style><svg onload=alert(1)>")],
        "precision": HOSTILE,
    }
    return [finished_run(folder / HOSTILE_FOLDER, **more), finished_run(folder / "_$\\frac{", **more)]


def test_hostile_names_stay_names(tmp_path: Path) -> None:
    write_report(hostile_runs(tmp_path), tmp_path / "page.html", title=HOSTILE, checks={HOSTILE: HOSTILE})
    text, page = read(tmp_path / "page.html")
    assert_self_contained(text, page)
    assert page.count("svg") == 5
    assert page.count("title") == 1
    assert "<script>alert(1)" in page.text  # shown, as text
    assert "&amp;amp;" in text  # an ampersand in a name is no entity of ours
    assert HOSTILE in page.text
    assert HOSTILE_FOLDER in page.text
    assert "$x^2$" in page.text
    assert "_$\\frac{" in page.text


@pytest.mark.parametrize("key", ["method", "task", "primary_metric"])
def test_hostile_results(tmp_path: Path, key: str) -> None:
    changes: dict[str, Any] = {key: HOSTILE}
    if key == "primary_metric":
        changes["scores"] = {"before": {HOSTILE: 0.1}, "after": {HOSTILE: 0.2}}
    write_report([finished_run(tmp_path / "run", **changes)], tmp_path / "page.html")
    assert_self_contained(*read(tmp_path / "page.html"))


def test_a_single_run(tmp_path: Path) -> None:
    write_report([finished_run(tmp_path / "run")], tmp_path / "page.html")
    text, page = read(tmp_path / "page.html")
    assert_self_contained(text, page)
    assert page.count("svg") == 5
    assert "Deep LoRA reaches spearman 0.7500. The model started at 0.2500." in page.text
    assert 'class="best"' not in text


@pytest.mark.parametrize(("before", "after"), [(None, None), (0.5, None), (None, 0.5)])
def test_undefined_scores(tmp_path: Path, before: float | None, after: float | None) -> None:
    run = finished_run(tmp_path / "run", before=before, after=after)
    write_report([run], tmp_path / "page.html")
    _, page = read(tmp_path / "page.html")
    assert page.count("svg") == 5
    assert "undefined" in page.text
    assert "None" not in page.text
    assert "nan" not in page.text.lower().split()


@pytest.mark.usefixtures("undrawn")
def test_one_score_of_two_is_undefined(tmp_path: Path) -> None:
    runs = [finished_run(tmp_path / "a"), finished_run(tmp_path / "b", method="lora", after=None)]
    write_report(runs, tmp_path / "page.html")
    _, page = read(tmp_path / "page.html")
    assert "against ." not in page.text


@pytest.mark.usefixtures("undrawn")
def test_a_lowered_score_is_said(tmp_path: Path) -> None:
    write_report([finished_run(tmp_path / "run", before=0.8, after=0.3)], tmp_path / "page.html")
    assert "Training lowered the score" in read(tmp_path / "page.html")[1].text


def labels(path: Path) -> list[str]:
    return [run["label"] for run in json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["runs"]]


@pytest.mark.usefixtures("undrawn")
def test_two_runs_of_one_method_are_told_apart(tmp_path: Path) -> None:
    runs = [
        finished_run(tmp_path / name, method=method)
        for name, method in (("a", "lora"), ("b", "lora"), ("c", "deep-lora"))
    ]
    write_report(runs, tmp_path / "page.html")
    assert labels(tmp_path / "page.html") == ["LoRA (a)", "LoRA (b)", "Deep LoRA"]


@pytest.mark.usefixtures("undrawn")
def test_folders_of_the_same_name_are_told_apart(tmp_path: Path) -> None:
    runs = [finished_run(tmp_path / seed / "run") for seed in ("seed0", "seed1", "seed2")]
    write_report(runs, tmp_path / "page.html")
    assert len(set(labels(tmp_path / "page.html"))) == 3


@pytest.mark.usefixtures("undrawn")
def test_a_folder_given_as_a_dot_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [finished_run(tmp_path / "a"), finished_run(tmp_path / "b")]
    monkeypatch.chdir(runs[0])
    write_report([".", "../b"], tmp_path / "page.html")
    assert labels(tmp_path / "page.html") == ["Deep LoRA (a)", "Deep LoRA (b)"]


def test_many_runs(tmp_path: Path) -> None:
    runs = [finished_run(tmp_path / f"run{i}", after=i / 10) for i in range(9)]
    write_report(runs, tmp_path / "page.html")
    assert read(tmp_path / "page.html")[1].count("svg") == 5


@pytest.mark.parametrize(
    "metrics", [[], [{"step": 1, "loss": 0.5}], [{"step": 1, "loss": 0.0}], [{"step": 1, "note": "x"}]]
)
def test_short_or_empty_loss_curves(tmp_path: Path, metrics: list[dict[str, Any]]) -> None:
    write_report([finished_run(tmp_path / "run", metrics=metrics)], tmp_path / "page.html")
    assert read(tmp_path / "page.html")[1].count("svg") == 5


def test_layers_that_learned_nothing(tmp_path: Path) -> None:
    still = layer("still", rank=0, rank_99=0, stable_rank=0.0, singular_values=[0.0] * 4)
    write_report([finished_run(tmp_path / "run", layers=[still])], tmp_path / "page.html")
    assert read(tmp_path / "page.html")[1].count("svg") == 5


@pytest.mark.usefixtures("undrawn")
def test_numbers_that_are_missing(tmp_path: Path) -> None:
    write_report([finished_run(tmp_path / "run", seconds_per_step=None)], tmp_path / "page.html")
    assert "undefined" in read(tmp_path / "page.html")[1].text


def test_the_same_runs_give_the_same_bytes(two: list[Path], tmp_path: Path) -> None:
    first, second = (write_report(two, tmp_path / name / "page.html").read_bytes() for name in ("a", "b"))
    assert first == second


@pytest.mark.usefixtures("undrawn")
def test_an_existing_page_is_replaced(two: list[Path], tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text("old", encoding="utf-8")
    write_report(two, tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text(encoding="utf-8").startswith("<!doctype html>")


def test_no_runs() -> None:
    with pytest.raises(UserError, match="at least one"):
        write_report([], "page.html")


@pytest.mark.parametrize("name", ["result.json", "config.json", "metrics.jsonl"])
def test_an_unfinished_run_names_the_missing_file(tmp_path: Path, name: str) -> None:
    run = finished_run(tmp_path / "run")
    (run / name).unlink()
    with pytest.raises(UserError, match=f"no finished run: it has no {name}"):
        write_report([run], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize("content", ["", "{", "[]", "{}"])
@pytest.mark.parametrize("name", ["result.json", "config.json"])
def test_a_damaged_run(tmp_path: Path, name: str, content: str) -> None:
    run = finished_run(tmp_path / "run")
    (run / name).write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=r"damaged|another version"):
        write_report([run], tmp_path / "page.html")


def test_a_file_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="no finished run"):
        write_report([tmp_path / "file"], tmp_path / "page.html")


def test_runs_of_different_tasks(tmp_path: Path) -> None:
    runs = [finished_run(tmp_path / "a"), finished_run(tmp_path / "b", task="regression")]
    with pytest.raises(UserError, match=r"different tasks.*a \(pair-similarity\), b \(regression\)"):
        write_report(runs, tmp_path / "page.html")


def test_without_matplotlib(two: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import rankwise.diagnostics

    monkeypatch.delattr(rankwise.diagnostics, "plots", raising=False)
    monkeypatch.delitem(sys.modules, "rankwise.diagnostics.plots", raising=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"reports need matplotlib .*pip install 'rankwise\[report\]'"):
        write_report(two, tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_what_early_stopping_looked_at_is_drawn(tmp_path: Path) -> None:
    entries = [{"step": s, "loss": 1 / s, "seconds": 0.01} for s in range(1, 7)]
    entries += [{"step": s, "validation": score} for s, score in ((2, 0.5), (4, None), (6, 0.25))]
    kept = {"metric": "spearman", "best_step": 2, "best_score": 0.5, "stopped_early": True}
    run = finished_run(tmp_path / "run", metrics=entries, early_stopping=kept, validation_rows=9)
    write_report([run], tmp_path / "page.html")
    facts = json.loads((tmp_path / "page.json").read_text(encoding="utf-8"))["runs"][0]
    assert (facts["validation_steps"], facts["validation_scores"]) == ([2, 6], [0.5, 0.25])
    assert len(facts["steps"]) == 6
    assert "When to stop" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_without_early_stopping_nothing_is_said_of_it(tmp_path: Path) -> None:
    write_report([finished_run(tmp_path / "run")], tmp_path / "page.html")
    assert "When to stop" not in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_an_error_is_better_lower(tmp_path: Path) -> None:
    runs = [
        finished_run(tmp_path / name, method=name, before=0.9, after=after, greater_is_better=False)
        for name, after in (("lora", 0.5), ("deep-lora", 0.25))
    ]
    text = write_report(runs, tmp_path / "page.html").read_text(encoding="utf-8")
    assert "Lowest spearman: Deep LoRA with 0.2500, against LoRA 0.5000" in text
    assert "do not support" not in text
    worse = finished_run(tmp_path / "worse", before=0.1, after=0.2, greater_is_better=False)
    assert "raised the error" in write_report([worse], tmp_path / "worse.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("alone", [True, False])
def test_a_method_whose_update_is_no_product(tmp_path: Path, alone: bool) -> None:
    runs = [finished_run(tmp_path / "loha", method="loha", layers=[])]
    runs += [] if alone else [finished_run(tmp_path / "lora", method="lora")]
    text = write_report(runs, tmp_path / "page.html").read_text(encoding="utf-8")
    assert ("Singular values of every update" in text) != alone
    assert "no update is a product of two factors" in text


def test_runs_that_look_at_different_metrics(tmp_path: Path) -> None:
    one = finished_run(tmp_path / "one")
    other = finished_run(tmp_path / "other", primary_metric="pearson")
    with pytest.raises(UserError, match="different metrics"):
        write_report([one, other], tmp_path / "page.html")
