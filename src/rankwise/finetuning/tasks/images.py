"""A class for an image."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from rankwise.errors import UserError
from rankwise.finetuning import efficientnet_lite
from rankwise.finetuning.batch_statistics import fix_batch_statistics
from rankwise.finetuning.batching import Batch
from rankwise.finetuning.pixels import PixelReader
from rankwise.finetuning.table import IMAGES
from rankwise.finetuning.tasks.heads import ClassOfRow


class ImageClassification(ClassOfRow):
    """Cross-entropy on the classes of images, with an image classifier of transformers or EfficientNet-lite0.

    ``tokenizer`` is the model's image processor. Images come as it makes them, without augmentation; ``max_length``
    counts for nothing. Batch normalization stays as pretraining left it
    (:class:`~rankwise.finetuning.batch_statistics.FixedBatchNorm2d`).

    Raises:
        UserError: a model that is no image classifier.
    """

    name = "image-classification"
    peft_task_type = None
    table_kind = IMAGES

    def __init__(self, table: Any, tokenizer: Any, max_length: int, **options: Any):
        super().__init__(table, tokenizer, max_length, **options)
        self.pixels = PixelReader(tokenizer)

    def collate(self, positions: Sequence[int]) -> Batch:
        """``pixel_values`` (B, 3, height, width) and ``targets`` (B,)."""
        files = [self.table.rows[position]["file"] for position in positions]
        return {"pixel_values": self.pixels(files), "targets": torch.as_tensor(self.targets[list(positions)])}

    def token_count(self, position: int) -> int:
        return 0

    def load_model(self, source: str, revision: str | None) -> nn.Module:
        if efficientnet_lite.is_weights(source):
            model: nn.Module = efficientnet_lite.load(source, **self._label_names())
        else:
            model = self._load(source, revision)
        fix_batch_statistics(model)
        return model

    def _load(self, source: str, revision: str | None) -> nn.Module:
        from transformers import AutoConfig, AutoModelForImageClassification
        from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

        kind = AutoConfig.from_pretrained(source, revision=revision).model_type
        if kind not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES:
            raise UserError(
                f"image-classification needs an image model such as ViT, ConvNeXt or ResNet, this is {kind}"
            )
        return AutoModelForImageClassification.from_pretrained(
            source,
            revision=revision,
            use_safetensors=True,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,  # a head trained for other classes starts anew
            **self._label_names(),
        )
