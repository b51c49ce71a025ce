"""The model that is to be compressed, whole or not at all."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from rankwise.compression import load_factorized
from rankwise.compression.pretrained import model_class, reason_of, require_all_tensors
from rankwise.compression_runs.settings import PAIRS, CompressionSettings
from rankwise.errors import UserError
from rankwise.finetuning import efficientnet_lite
from rankwise.finetuning.models import load_tokenizer, model_source


@dataclass
class LoadedModel:
    """A model and what belongs to it.

    Attributes:
        model: in eval mode, on a GPU where there is one.
        tokenizer: None where the folder has none and no text is read.
        source: the folder or hub name that it came from.
        predicts_tokens: it is a causal language model.
        unused: layers that the folder has no weights for and nobody calls; to be left alone.
    """

    model: Any
    tokenizer: Any
    source: str
    predicts_tokens: bool
    unused: list[str]


def load_model(settings: CompressionSettings) -> LoadedModel:
    """Load what ``--model`` names.

    Raises:
        UserError: no model folder, one that is damaged or lacks tensors, one with an adapter beside the model.
    """
    source = model_source(settings.model)
    _refuse_other_folders(source)
    tokenizer = _tokenizer(source, settings)
    try:
        config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
        compressed = getattr(config, "rankwise", None) is not None
        if not compressed:
            # an embedding model is scored, and kept, without a head
            named = None if settings.task == PAIRS else model_class(config.architectures)
            model, report = (named or transformers.AutoModel).from_pretrained(
                source, use_safetensors=True, dtype="auto", trust_remote_code=False, output_loading_info=True,
                ignore_mismatched_sizes=True,  # and refused below, by name
            )  # fmt: skip
    except MemoryError:
        raise
    except Exception as error:  # a config may hold anything, and whatever reads it may stumble over it anyhow
        raise UserError(f"cannot load the model {settings.model}: {reason_of(error)}") from None
    unused: list[str] = []
    if compressed and not Path(source).is_dir():
        raise UserError(f"{source} is compressed already; to compress it further, download it and name its folder")
    if compressed:  # its dense layers may be cut as well
        model = load_factorized(source, dtype="auto")
        model = model.base_model if settings.task == PAIRS else model
    else:
        # encoders are often saved without the pooler that their class has and nobody calls; anything else that is missing
        # would be compressed, and saved, as the random numbers it is filled in with
        missing = set(report["missing_keys"])
        poolers = {name for name in missing if "pooler" in name.split(".")}
        unused = sorted({name.partition("pooler")[0] + "pooler" for name in poolers})
        require_all_tensors(source, {**report, "missing_keys": missing - poolers}, left_over=False)
    model.eval()
    if torch.cuda.is_available():
        model.cuda()
    predicts_tokens = bool(model.can_generate()) and not getattr(config, "is_encoder_decoder", False)
    return LoadedModel(model, tokenizer, source, predicts_tokens, unused)


def _refuse_other_folders(source: str) -> None:
    if efficientnet_lite.is_weights(source):
        raise UserError(
            "EfficientNet-lite0 is no model folder of transformers; factorize it in Python with "
            "rankwise.compression.factorize_model"
        )
    if Path(source, "result.json").is_file() and Path(source, "model", "config.json").is_file():
        raise UserError(
            f"{source} is the folder of a run of compress, not of a model; did you mean {Path(source, 'model')}?"
        )
    if Path(source, "adapter_config.json").is_file():
        raise UserError(
            f"{source} holds an adapter; merge it first (merge_and_unload of peft, then save_pretrained) and compress that"
        )


def _tokenizer(source: str, settings: CompressionSettings) -> Any:
    try:
        tokenizer, _ = load_tokenizer(source)
    except UserError:
        if settings.calibrate is not None or settings.eval is not None or not Path(source, "config.json").is_file():
            raise
        return None
    except Exception as error:  # of a config that holds anything
        raise UserError(f"cannot load the model {settings.model}: {reason_of(error)}") from None
    return tokenizer
