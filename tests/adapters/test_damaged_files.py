"""Saved adapters that were cut, changed or made up: one error that names the file, or exactly what was saved."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rankwise.adapters import (
    deeplora_from_adapter,
    export_adapter_folder,
    initialize_deeplora_weights,
    save_subspaces,
)
from rankwise.adapters.saved_updates import SavedAdapter, read_adapter_folder
from rankwise.cli.main import main
from tests.adapters.test_export import adapted, mixed, mlp, trained
from tests.cli.complaints import complaint

WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"


def saved(folder: Path, kind: str = "deep") -> Path:
    """A folder with a trained adapter of lin0 and lin1."""
    if kind == "deep":
        trained().save_pretrained(folder)
    else:
        config = LoraConfig(r=4, target_modules=["lin0", "lin1"], init_lora_weights=False)
        get_peft_model(mlp(), config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: saved(tmp_path_factory.mktemp(kind), kind) for kind in ("deep", "lora")}


def changed_updates(one: SavedAdapter, other: SavedAdapter) -> list[str]:
    assert one.updates.keys() == other.updates.keys()
    return [
        name
        for name, update in one.updates.items()
        if not (torch.equal(update.A, other.updates[name].A) and torch.equal(update.B, other.updates[name].B))
    ]


# -- any byte, any length -------------------------------------------------------------------------------------------


def damaged(original: Path, contents: bytes) -> SavedAdapter | str:
    """What our reader makes of it: an adapter, or the message of the one error."""
    folder = original.parent / f"{original.name}-damaged"
    folder.mkdir(exist_ok=True)
    shutil.copy(original / SETTINGS, folder)
    (folder / WEIGHTS).write_bytes(contents)
    try:
        return read_adapter_folder(folder)
    except ValueError as error:
        assert str(folder / WEIGHTS) in str(error)
        return str(error)


@pytest.mark.parametrize("kind", ["deep", "lora"])
@given(data=st.data())
def test_a_file_cut_short_is_refused(originals: dict[str, Path], kind: str, data: st.DataObject) -> None:
    contents = (originals[kind] / WEIGHTS).read_bytes()
    length = data.draw(st.integers(0, len(contents) - 1))
    assert "cut short" in str(damaged(originals[kind], contents[:length]))


@pytest.mark.parametrize("part", ["length", "header", "numbers"])
@pytest.mark.parametrize("kind", ["deep", "lora"])
@given(data=st.data())
def test_a_flipped_bit_is_refused_or_harmless(
    originals: dict[str, Path], kind: str, part: str, data: st.DataObject
) -> None:
    contents = bytearray((originals[kind] / WEIGHTS).read_bytes())
    header = 8 + int.from_bytes(contents[:8], "little")
    first, last = {"length": (0, 7), "header": (8, header - 1), "numbers": (header, len(contents) - 1)}[part]
    contents[data.draw(st.integers(first, last))] ^= 1 << data.draw(st.integers(0, 7))
    found = damaged(originals[kind], bytes(contents))
    if isinstance(found, str):
        return
    changed = changed_updates(found, read_adapter_folder(originals[kind]))
    if part == "numbers":  # the format has no checksum: another finite number is another adapter
        assert len(changed) <= 1  # the last bits may drown in the product
    else:
        assert not changed
    assert all(update.A.isfinite().all() and update.B.isfinite().all() for update in found.updates.values())


@pytest.mark.parametrize("part", ["header", "numbers"])
@given(data=st.data())
def test_peft_never_loads_a_damaged_header_as_something_else(
    originals: dict[str, Path], part: str, data: st.DataObject
) -> None:
    original = originals["deep"]
    contents = bytearray((original / WEIGHTS).read_bytes())
    header = 8 + int.from_bytes(contents[:8], "little")
    first, last = (8, header - 1) if part == "header" else (header, len(contents) - 1)
    contents[data.draw(st.integers(first, last))] ^= 1 << data.draw(st.integers(0, 7))
    folder = original.parent / "loaded"
    folder.mkdir(exist_ok=True)
    shutil.copy(original / SETTINGS, folder)
    (folder / WEIGHTS).write_bytes(bytes(contents))
    try:
        model = PeftModel.from_pretrained(mlp(), folder)
    except (ValueError, SafetensorError, RuntimeError) as error:  # ours, the file format's, and torch's on wrong shapes
        assert str(error)
        return
    wanted = PeftModel.from_pretrained(mlp(), original).state_dict()
    differing = [key for key, value in model.state_dict().items() if not torch.equal(value, wanted[key])]
    assert len(differing) == (1 if part == "numbers" else 0)


# -- made up by hand ------------------------------------------------------------------------------------------------


def file_of(header: Any, numbers: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + numbers


def entry(shape: list[int], first: int, last: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [first, last]}


LEFT, INNER, RIGHT = (f"base_model.model.lin0.deeplora_{side}.weight" for side in ("left", "inner", "right"))
ZEROS = bytes(4096)
MADE_UP: dict[str, bytes] = {
    "empty file": b"",
    "seven bytes": b"1234567",
    "header longer than the file": struct.pack("<Q", 10**6) + b"{}",
    "header of 2⁶³ bytes": struct.pack("<Q", 2**63) + b"{}",
    "header is no JSON": file_of(b"not json"),
    "header is a list": file_of([]),
    "header nested too deeply": file_of(b"[" * 100_000),
    "no tensors": file_of({}),
    "overlapping tensors": file_of({LEFT: entry([1, 1], 0, 4), RIGHT: entry([1, 1], 0, 4)}, bytes(4)),
    "a hole between tensors": file_of({LEFT: entry([1, 1], 0, 4), RIGHT: entry([1, 1], 8, 12)}, bytes(12)),
    "offsets behind the end": file_of({LEFT: entry([8, 8], 0, 256)}, bytes(16)),
    "offsets the wrong way round": file_of({LEFT: entry([1, 1], 4, 0)}, bytes(4)),
    "negative offsets": file_of({LEFT: entry([1, 1], -4, 0)}, bytes(4)),
    "a shape that overflows": file_of({LEFT: entry([2**62, 2**62], 0, 4)}, bytes(4)),
    "a shape that does not fit its bytes": file_of({LEFT: entry([3, 5], 0, 4)}, bytes(4)),
    "a negative size": file_of({LEFT: entry([-1, -1], 0, 4)}, bytes(4)),
    "an unknown dtype": file_of({LEFT: entry([1, 1], 0, 4, "F31")}, bytes(4)),
    "whole numbers": file_of(
        {LEFT: entry([4, 1], 0, 16, "I32"), INNER: entry([1, 1, 1], 16, 20, "I32"), RIGHT: entry([1, 4], 20, 36, "I32")},
        bytes(36),
    ),
    "bytes": file_of({LEFT: entry([4, 1], 0, 4, "U8")}, bytes(4)),
    "no numbers in endless rows": file_of(
        {LEFT: entry([2**40, 0], 0, 0), INNER: entry([3, 0, 0], 0, 0), RIGHT: entry([0, 2**40], 0, 0)}
    ),
    "no inner factors": file_of(
        {LEFT: entry([4, 1], 0, 16), INNER: entry([0, 1, 1], 16, 16), RIGHT: entry([1, 4], 16, 32)}, bytes(32)
    ),
    "a scalar for a factor": file_of(
        {LEFT: entry([], 0, 4), INNER: entry([1, 1, 1], 4, 8), RIGHT: entry([1, 4], 8, 24)}, bytes(24)
    ),
    "factors of two widths": file_of(
        {LEFT: entry([4, 2], 0, 32), INNER: entry([1, 1, 1], 32, 36), RIGHT: entry([1, 4], 36, 52)}, bytes(52)
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MADE_UP)
def test_made_up_weights_are_refused_and_nothing_is_written(
    tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = saved(tmp_path / "deep")
    (folder / WEIGHTS).write_bytes(MADE_UP[case])
    for read in (export_adapter_folder, deeplora_from_adapter):
        with pytest.raises(ValueError, match=WEIGHTS):
            read(folder, tmp_path / "out")
    for to in ("lora", "deep-lora"):
        assert main(["export", str(folder), "--out", str(tmp_path / "out"), "--to", to]) == 2
        assert WEIGHTS in "".join(complaint(capsys).split())
    with pytest.raises((ValueError, SafetensorError, RuntimeError)):
        PeftModel.from_pretrained(mlp(), folder)
    assert [path.name for path in tmp_path.iterdir()] == ["deep"]


@pytest.mark.parametrize("case", MADE_UP)
def test_made_up_subspaces_are_refused_and_the_adapter_stays(tmp_path: Path, case: str) -> None:
    (tmp_path / "frames.safetensors").write_bytes(MADE_UP[case])
    model = trained()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"frames\.safetensors"):
        initialize_deeplora_weights(model, subspaces=tmp_path / "frames.safetensors")
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_subspaces_that_are_no_numbers_are_refused(tmp_path: Path, value: float) -> None:
    model, file = adapted(), tmp_path / "frames.safetensors"
    save_subspaces(model, file)
    tensors = load_file(file)
    tensors["lin1.right"][0, 0] = value
    save_file(tensors, file)
    with pytest.raises(ValueError, match=r"frames\.safetensors.*lin1\.right"):
        initialize_deeplora_weights(model, subspaces=file)


def test_finite_factors_whose_product_is_not_are_refused(tmp_path: Path) -> None:
    """1e30 · 1e30 overflows only when the two sides meet."""
    folder = saved(tmp_path / "lora", "lora")
    tensors = load_file(folder / WEIGHTS)
    save_file({key: value * 1e30 for key, value in tensors.items()}, folder / WEIGHTS)
    with pytest.raises(ValueError, match="overflows"):
        export_adapter_folder(folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["lora"]


# -- settings -------------------------------------------------------------------------------------------------------


def _text(contents: str) -> Callable[[str], str]:
    return lambda _: contents


def _with(**entries: Any) -> Callable[[str], str]:
    return lambda text: json.dumps(json.loads(text) | entries)


BAD_SETTINGS: dict[str, tuple[Callable[[str], str], str]] = {
    "cut short": (lambda text: text[: len(text) // 2], "not valid JSON"),
    "empty": (_text(""), "not valid JSON"),
    "nested too deeply": (_text("[" * 100_000), "not valid JSON"),
    "a number of ten thousand digits": (_text('{"peft_type": "DEEPLORA", "r": ' + "9" * 10_000 + "}"), "not valid JSON"),
    "a text": (_text('"DEEPLORA"'), "only Deep LoRA and LoRA"),
    "newer format": (_with(format_version=99), "saved in format 99, this rankwise reads up to 2; upgrade rankwise"),
    "format is a text": (_with(format_version="new"), "format_version must be a whole number, got 'new'"),
    "r is a text": (_with(r="8"), "r must be a whole number, got '8'"),
    "r is true": (_with(r=True), "r must be a whole number, got True"),
    "r is nothing": (_with(r=None), "r must be a whole number, got None"),
    "r is too small": (_with(r=0), "r must be a whole number of at least 1, got 0"),
    "ε is nothing": (_with(init_scale=None), "init_scale must be a number, got None"),
    "patterns are a list": (_with(rank_pattern=["lin0"]), "rank_pattern must be an object"),
    "layouts are a text": (_with(layouts="conv"), "layouts must be an object, got 'conv'"),
    "a layout is a text": (_with(layouts={"lin0": "conv"}), "layouts says 'conv' of lin0"),
    "an unknown layout": (_with(layouts={"lin0": {"kind": "lattice"}}), "layouts says .* of lin0"),
    "a kernel of another size": (
        _with(layouts={"lin0": {"kind": "convolution", "kernel": [3, 3]}}), "does not fit its factors of 20 columns"
    ),
    "a kernel of texts": (_with(layouts={"lin0": {"kind": "convolution", "kernel": ["20", 1]}}), "layouts says"),
    "padding outside": (_with(layouts={"lin0": {"kind": "embedding", "padding_idx": 20}}), "layouts says"),
    "targets are a number": (_with(target_modules=5), "target_modules must be a list or a text, got 5"),
    "targets are lists": (_with(target_modules=[["lin0"]]), "unhashable"),
    "unknown variant": (_with(variant="shallow"), "variant must be one of"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_SETTINGS)
def test_bad_settings_are_refused_by_name_and_nothing_is_written(
    tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change, says = BAD_SETTINGS[case]
    folder = saved(tmp_path / "deep")
    settings = folder / SETTINGS
    settings.write_text(change(settings.read_text()))
    for read in (export_adapter_folder, deeplora_from_adapter):
        with pytest.raises(ValueError, match=says) as caught:
            read(folder, tmp_path / "out")
        assert str(folder) in str(caught.value)
    assert main(["export", str(folder), "--out", str(tmp_path / "out")]) == 2
    complaint(capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["deep"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_with(lora_alpha=None), "lora_alpha must be a number, got None"),
        (_with(lora_alpha="7"), "lora_alpha must be a number, got '7'"),
        (_with(alpha_pattern={"lin0": "7"}), "lin0 the α '7'"),
        (_with(rank_pattern={"(": 3}), "regular expressions"),
        (_with(r=3), "settings say rank 3 for lin0, its factors have 4"),
    ],
    ids=["no-alpha", "alpha-text", "pattern-text", "no-regex", "another-rank"],
)
def test_bad_settings_of_a_lora_are_refused(tmp_path: Path, change: Callable[[str], str], says: str) -> None:
    folder = saved(tmp_path / "lora", "lora")
    settings = folder / SETTINGS
    settings.write_text(change(settings.read_text()))
    with pytest.raises(ValueError, match=says) as caught:
        deeplora_from_adapter(folder, tmp_path / "out")
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("kind", ["deep", "lora"])
def test_unknown_settings_change_nothing(tmp_path: Path, kind: str) -> None:
    folder = saved(tmp_path / kind, kind)
    before = read_adapter_folder(folder)
    settings = folder / SETTINGS
    settings.write_text(_with(of_a_later_peft={"a": [1]}, another=None)(settings.read_text()))
    assert not changed_updates(read_adapter_folder(folder), before)


# -- the adapter of another model -----------------------------------------------------------------------------------


def loaded(folder: Path, base: nn.Module | None = None) -> PeftModel:
    return PeftModel.from_pretrained(mlp() if base is None else base, folder)


def _without(*parts: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {key: value for key, value in tensors.items() if not any(part in key for part in parts)}


def _as_another_layer(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors | {key.replace("lin1", "lin2"): value.clone() for key, value in tensors.items() if "lin1" in key}


def _not_finite(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value * float("nan") if "lin1.deeplora_inner" in key else value for key, value in tensors.items()}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_without("lin0.deeplora_inner"), r"1 factors are missing \(base_model\.model\.lin0\.deeplora_inner"),
        (_without("lin1"), r"3 factors are missing \(base_model\.model\.lin1"),
        (_as_another_layer, r"3 factors belong to layers that it does not adapt here \(base_model\.model\.lin2"),
        (_not_finite, r"lin1\.deeplora_inner.*NaN"),
    ],
    ids=["factor", "layer", "foreign", "nan"],
)
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_what_peft_would_load_in_silence_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], says: str, low_cpu_mem_usage: bool
) -> None:
    folder = saved(tmp_path / "deep")
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS)
    with pytest.raises(ValueError, match=says):
        PeftModel.from_pretrained(mlp(), folder, low_cpu_mem_usage=low_cpu_mem_usage)
    model = trained()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=says):
        model.load_adapter(folder, "second", low_cpu_mem_usage=low_cpu_mem_usage)
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_a_model_of_other_sizes_or_names_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path / "deep")
    with pytest.raises(RuntimeError, match=r"size mismatch for base_model\.model\.lin0\.deeplora_left"):
        loaded(folder, type(mlp())(hidden=30))
    with pytest.raises(ValueError, match="Target modules"):
        loaded(folder, mixed())


# -- what is there stays --------------------------------------------------------------------------------------------


def test_what_is_there_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, there = saved(tmp_path / "deep"), saved(tmp_path / "there", "lora")
    before = {path.name: path.read_bytes() for path in there.iterdir()}
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-1])
    assert main(["export", str(folder), "--out", str(there)]) == 2
    complaint(capsys)
    saved(tmp_path / "whole")
    assert main(["export", str(tmp_path / "whole"), "--out", str(there)]) == 2
    assert "not empty" in complaint(capsys)
    assert {path.name: path.read_bytes() for path in there.iterdir()} == before
