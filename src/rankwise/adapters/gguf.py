"""Deep LoRA, or LoRA, → a LoRA adapter in GGUF, the format of llama.cpp and of everything built on it.

A GGUF adapter holds ``<tensor>.lora_a`` (r, n) and ``<tensor>.lora_b`` (m, r) for tensors of the GGUF base model, and one
α for all; the loader adds (α/r)·B·A with the r of each pair's own shape. Two things differ from PEFT. Tensors have
llama.cpp's names, which its Python package knows. And llama's converter re-orders the rows of the query and key weights,
since llama.cpp rotates neighbouring pairs of a head's dimensions where transformers rotates its two halves.

Source: llama.cpp's loader (src/llama-adapter.cpp, src/llama-graph.cpp) and converters (conversion/), read at the commit that
llama-cpp-python 0.3.36 carries.
"""

import os
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoConfig, PretrainedConfig

from rankwise.adapters.export import ExportSummary, export_adapter_folder, save_as_lora
from rankwise.adapters.saved_updates import SavedAdapter, Update, read_adapter_folder
from rankwise.files import FORMAT_VERSION

# transformers' model_type → the name in gguf.MODEL_ARCH. Only families whose linear layers llama.cpp keeps one by one.
_ARCHITECTURES = {
    "gemma": "GEMMA",
    "gemma2": "GEMMA2",
    "gemma3_text": "GEMMA3",
    "gpt2": "GPT2",
    "llama": "LLAMA",
    "mistral": "LLAMA",
    "phi3": "PHI3",
    "qwen2": "QWEN2",
    "qwen3": "QWEN3",
}
_ROTATES_NEIGHBOURS = {"LLAMA"}
_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_TOKENS, _OUTPUT = "token_embd.weight", "output.weight"


def save_as_gguf(
    source: nn.Module | str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    base: PretrainedConfig | str | os.PathLike[str] | None = None,
    rank: int | None = None,
    energy: float | None = None,
    tol: float | None = None,
    adapter_name: str = "default",
    dtype: torch.dtype = torch.float32,
) -> ExportSummary:
    """Save an adapter of a causal language model as the GGUF file that ``llama-cli --lora`` takes.

    Ranks are cut as in :func:`~rankwise.adapters.save_as_lora`. GGUF has one α for all layers and the loader's scale is
    α over a layer's own rank, so α is the largest rank kept, and each B carries rank/α.

    One process calls it. Of a sharded model, give it the folder that ``save_as_lora`` wrote.

    Needs the ``gguf`` package (``pip install "rankwise[gguf]"``) and, of the base model, its configuration only.

    Args:
        source: a model with Deep LoRA layers, or the folder of a saved Deep LoRA or LoRA adapter.
        path: file to create, usually ``….gguf``.
        base: configuration of the base model, or a folder or hub name that has it; by default the model's own, or the
            one that the folder's ``adapter_config.json`` names.
        rank: keep at most this many directions a layer.
        energy: keep the smallest rank with this share of Σσ² in every layer.
        tol: keep singular values above tol·σ₁ of their layer.
        adapter_name: which adapter of a model.
        dtype: of the factors: torch.float32, torch.float16 or torch.bfloat16.

    Returns:
        :class:`~rankwise.adapters.ExportSummary`.

    Raises:
        ValueError: as ``save_as_lora``; the gguf package is missing; the file exists; the architecture is none of those
            listed in docs/interoperability.md; or the adapter has parts that GGUF cannot hold.

    Example:
        >>> import tempfile
        >>> from peft import get_peft_model
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from rankwise.adapters import DeepLoraConfig
        >>> from rankwise.adapters.gguf import save_as_gguf
        >>> llama = LlamaForCausalLM(LlamaConfig(
        ...     vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        ... ))
        >>> model = get_peft_model(llama, DeepLoraConfig(r=4, target_modules=["q_proj"], init_weights=False))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     summary = save_as_gguf(model, folder + "/adapter.gguf")
        >>> summary.layers[0].name
        'model.layers.0.self_attn.q_proj'
    """
    gguf, target = _gguf_package(), Path(path)
    if dtype not in _TYPES:
        raise ValueError(f"GGUF adapters are saved in {', '.join(map(str, _TYPES))}, got {dtype}")
    if target.exists():
        raise ValueError(f"{target} exists; choose another name or remove it first")
    cut: dict[str, Any] = {"rank": rank, "energy": energy, "tol": tol, "dtype": torch.float32}
    with tempfile.TemporaryDirectory() as scratch:
        lora = Path(scratch) / "lora"
        if isinstance(source, nn.Module):
            summary = save_as_lora(source, lora, adapter_name=adapter_name, **cut)
        else:
            summary = export_adapter_folder(source, lora, **cut)
        adapter = read_adapter_folder(lora)
    # PEFT saves the frozen weight of an adapted embedding or output layer along; the GGUF base model has it
    more = sorted(key for key in adapter.others if not key.endswith(".base_layer.weight"))
    if more:
        raise ValueError(
            f"this adapter also holds {', '.join(more[:3])}{', …' if more[3:] else ''}; "
            "a GGUF adapter holds low-rank updates only: merge it (merge_and_unload) and convert the whole model, or train without modules_to_save and biases"
        )
    config = _base_config(base, source, adapter)
    if config.model_type not in _ARCHITECTURES:
        raise ValueError(
            f"rankwise knows llama.cpp's layout of {', '.join(_ARCHITECTURES)}, not of {config.model_type}; write a LoRA with "
            "save_as_lora and convert it with llama.cpp's convert_lora_to_gguf.py, or merge the adapter and convert the model"
        )
    architecture = gguf.MODEL_ARCH[_ARCHITECTURES[config.model_type]]
    alpha = max(update.width for update in adapter.updates.values())
    kind = gguf.GGMLQuantizationType[_TYPES[dtype]]
    arrays = {
        name: gguf.quantize(factor.contiguous().numpy(), kind)
        for name, factor in _factors(gguf, architecture, config, adapter.updates, alpha)
    }
    _write(gguf, target, gguf.MODEL_ARCH_NAMES[architecture], alpha, arrays, kind)
    return replace(summary, path=target, bytes_after=sum(array.nbytes for array in arrays.values()))


def _write(gguf: Any, target: Path, architecture: str, alpha: int, arrays: dict[str, Any], kind: Any) -> None:
    """The metadata that the loader checks, and the tensors; under a temporary name, then renamed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    writer = gguf.GGUFWriter(temporary, architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(alpha))
    writer.add_string("rankwise.format_version", FORMAT_VERSION)
    for name, array in arrays.items():
        writer.add_tensor(name, array, raw_dtype=kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(temporary, target)
    finally:
        writer.close()
        temporary.unlink(missing_ok=True)


def _factors(
    gguf: Any, architecture: Any, config: PretrainedConfig, updates: dict[str, Update], alpha: int
) -> Iterator[tuple[str, Tensor]]:
    """The file's tensors by name, in the axis order of torch (GGUF lists it reversed)."""
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    tied = bool(getattr(config, "tie_word_embeddings", False))
    for name, update in updates.items():
        known = names.get_name(name)
        tensor = f"{known}.weight"
        # of tables that are looked up, llama.cpp adapts the tokens' only; its loader stops at a position's
        if known is None or (update.layout and tensor != _TOKENS):
            raise ValueError(
                f"llama.cpp's {gguf.MODEL_ARCH_NAMES[architecture]} adds no update to {name}; leave that layer out with "
                "exclude_modules, or merge the adapter and convert the whole model"
            )
        if tied and tensor in (_TOKENS, _OUTPUT):
            raise ValueError(
                f"{name} shares its weight with the other end of the model (tie_word_embeddings), and llama.cpp cannot "
                "adapt one of the two alone; leave it out with exclude_modules, or merge the adapter and convert the whole model"
            )
        # the loader multiplies by α over this pair's rank, and every scaling is in B already
        B, A = update.B * (update.width / alpha), update.A
        if architecture.name in _ROTATES_NEIGHBOURS:
            B = _neighbouring_rows(name, B, config)
        # the loader looks rows of A up by token, so A stands transposed there, and only there
        yield tensor + ".lora_a", A.mT if tensor == _TOKENS else A
        yield tensor + ".lora_b", B


def _neighbouring_rows(name: str, B: Float[Tensor, "m r"], config: PretrainedConfig) -> Float[Tensor, "m r"]:
    """Of a query or key layer: each head's rows (0, d/2, 1, d/2 + 1, …), where transformers has (0, 1, 2, …)."""
    layer = name.rpartition(".")[2]
    if layer not in ("q_proj", "k_proj"):
        return B
    heads = config.num_attention_heads if layer == "q_proj" else config.num_key_value_heads
    if B.shape[0] % (2 * heads):
        raise ValueError(
            f"{name} has {B.shape[0]} outputs, which are no {heads} heads of even size as the base model's configuration "
            "says; give the configuration of the adapter's own base model (base=)"
        )
    rows = torch.arange(B.shape[0]).view(heads, 2, -1).mT.flatten()
    return B[rows]


def _base_config(
    base: PretrainedConfig | str | os.PathLike[str] | None,
    source: nn.Module | str | os.PathLike[str],
    adapter: SavedAdapter,
) -> PretrainedConfig:
    own = getattr(source, "config", None) if isinstance(source, nn.Module) else None
    found = base if base is not None else own or adapter.config.base_model_name_or_path
    if isinstance(found, PretrainedConfig):
        return found
    if not isinstance(found, str | os.PathLike) or not os.fspath(found):
        raise ValueError("the adapter does not say what its base model is; give its configuration or folder (base=)")
    try:
        return AutoConfig.from_pretrained(found)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"cannot read the configuration of the base model {os.fspath(found)} ({error}); give its folder (base=)"
        ) from error


def _gguf_package() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise ValueError(
            f"a GGUF file needs the gguf package ({error}); install it with: pip install 'rankwise[gguf]'"
        ) from error
    return gguf
