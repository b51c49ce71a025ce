"""Models of a few kilobytes saved as Hugging Face folders, and data for them: a whole run in seconds, no download."""

import csv
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

WORDS = [
    "good",
    "bad",
    "fine",
    "poor",
    "great",
    "awful",
    "red",
    "blue",
    "green",
    "cat",
    "dog",
    "bird",
    "car",
    "road",
    "tree",
    "house",
    "river",
    "stone",
    "cloud",
    "music",
    "happy",
    "sad",
    "quick",
    "slow",
    "bright",
    "dark",
    "warm",
    "cold",
    "old",
    "new",
]


def word_tokenizer(special: Sequence[str], post_processor: Any = None, **names: Any) -> Any:
    """A tokenizer of whole words, the special tokens first; ``names`` says which of them is what."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({word: n for n, word in enumerate([*special, *WORDS])}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    if post_processor is not None:
        words.post_processor = post_processor
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", **names)


def save_tiny_checkpoint(folder: Path, *, embedding: bool = True, dropout: float = 0.1) -> Path:
    """Save a two-layer BertModel (embedding) or BertForSequenceClassification, and a WordPiece tokenizer, in folder.

    Dropout is left on, so that a resumed run reaches the same numbers only if it restores the random state.
    """
    from transformers import BertConfig, BertForSequenceClassification, BertModel, BertTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    pieces = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *pieces, *(f"##{piece}" for piece in pieces)]
    vocabulary_file = folder / "vocab.txt"
    vocabulary_file.write_text("\n".join(vocabulary) + "\n", encoding="utf-8")
    torch.manual_seed(7)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=64, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
    )  # fmt: skip
    model = BertModel(config) if embedding else BertForSequenceClassification(config)
    model.save_pretrained(folder)
    BertTokenizerFast(vocab=str(vocabulary_file), do_lower_case=True).save_pretrained(folder)
    if embedding:
        modules = [
            {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
            {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        ]
        (folder / "modules.json").write_text(json.dumps(modules), encoding="utf-8")
    return folder


def save_tiny_vit(folder: Path, size: int = 16) -> Path:
    """Save a random two-layer ViTForImageClassification of size × size images in four patches, and its processor."""
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

    torch.manual_seed(7)
    config = ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=size,
        patch_size=size // 2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": size, "width": size}).save_pretrained(folder)
    return folder


def stripes(horizontal: bool, seed: int, size: int = 20) -> Any:
    """An RGB image (size, size, 3) of dark and light stripes across or down, of random colours, in noise."""
    draw = np.random.default_rng(seed)
    wave = np.arange(size) // 3 % 2
    colours = np.stack([draw.integers(0, 90, size=3), draw.integers(160, 256, size=3)])
    image = colours[np.broadcast_to(wave[:, None] if horizontal else wave, (size, size))]
    return np.clip(image + draw.normal(0, 8, image.shape), 0, 255).astype(np.uint8)


def write_images(folder: Path, rows: int = 40) -> Path:
    """Stripes in the subfolders ``across`` and ``down``, as PNG and JPEG."""
    from PIL import Image

    for row in range(rows):
        name = "across" if row % 2 else "down"
        (folder / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(stripes(row % 2 == 1, row)).save(folder / name / f"{row:03}.{'png' if row % 3 else 'jpg'}")
    return folder


def write_conll(path: Path, rows: int = 40) -> Path:
    """Sentences in which colours are entities: a "red" or "blue" and the colours that follow it, of one type each."""
    kinds = {"red": "WARM", "blue": "COLD", "green": "COLD"}
    lines = []
    for text in sentences(rows, 6):
        before = None
        for word in text.split():
            kind = kinds.get(word)
            lines.append(f"{word} x {'O' if kind is None else ('I-' if kind == before else 'B-') + kind}")
            before = kind
        lines.append("")
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def sentences(count: int, seed: int = 0) -> list[str]:
    draw = np.random.default_rng(seed)
    return [" ".join(draw.choice(WORDS, size=int(draw.integers(3, 8)))) for _ in range(count)]


def write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[object]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
    return path


def write_pairs(path: Path, rows: int = 40) -> Path:
    """Pairs with random scores in [0, 5]."""
    first, second = sentences(rows, 1), sentences(rows, 2)
    score = np.random.default_rng(3).uniform(0, 5, rows).round(2)
    return write_csv(path, ["sentence1", "sentence2", "score"], list(zip(first, second, score, strict=True)))


def write_classes(path: Path, rows: int = 40) -> Path:
    """Texts whose class is whether they begin with "good"."""
    texts = sentences(rows, 4)
    labelled = [(("good " if i % 2 else "bad ") + text, "pos" if i % 2 else "neg") for i, text in enumerate(texts)]
    return write_csv(path, ["text", "label"], labelled)


def write_ratings(path: Path, rows: int = 40) -> Path:
    """Texts with a real-valued rating."""
    texts = sentences(rows, 5)
    return write_csv(path, ["text", "rating"], [(text, round(0.37 * len(text) + 1, 2)) for text in texts])


def offline_environment() -> dict[str, str]:
    return {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
