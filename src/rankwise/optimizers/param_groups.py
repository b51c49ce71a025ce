"""Which parameters of a model get a low-rank optimizer state, and which do not."""

import math
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

from rankwise.model_structure import Names, conv1d_types, is_called, output_layer
from rankwise.optimizers.matricize import is_matricized
from rankwise.optimizers.setting_checks import is_count, require_not_negative

HIDDEN, EMBEDDING, HEAD = "hidden matrix", "embedding", "output head"
VECTOR, OTHER = "norm or bias", "other"
_NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)


@dataclass(frozen=True, eq=False)
class ModelParameter:
    """A parameter, counted once however many modules share it.

    Attributes:
        kind: HIDDEN, EMBEDDING, HEAD, VECTOR or OTHER.
        places: its names: several where modules share it.
        module: the first module that holds it.
        in_task_head: it belongs to a classifier or the like on top of a pretrained body, with no output layer over tokens.
    """

    name: str
    parameter: nn.Parameter
    kind: str
    places: tuple[str, ...]
    module: nn.Module
    in_task_head: bool = False

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(rows, columns) of the parameter as a matrix, (out, in·k·k) of a convolution's kernel; of two or more dimensions."""
        rows, *rest = self.parameter.shape
        return int(rows), math.prod(rest)

    def is_called(self, pattern: Names) -> bool:
        """Whether PEFT's rule picks it or a module around it: a regex for the whole name, or a list of names or their ends."""
        return any(is_called(place, pattern) for place in self.places)


def model_param_groups(
    model: nn.Module,
    rank: int | None = 128,
    *,
    include: Names | None = None,
    exclude: Names | None = None,
    weight_decay: float | None = None,
    **projected_options: Any,
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer whose state is low-rank, such as GaLore.

    Three groups, in this order and without the empty ones, each with "params", "param_names" and "rank":

    - hidden matrices with min(rows, columns) > rank: ``rank``, and ``projected_options``. They are the weights of
      ``nn.Linear``, transformers' ``Conv1D``, ungrouped 2-d and 3-d convolutions (out × in·k·k), ``nn.MultiheadAttention``
      and recurrent layers.
    - all other matrices: rank None. The embeddings (their gradient has as many directions as there are tokens in a batch),
      the output head, also when it shares its weight with an embedding, what lies outside the pretrained body of a
      transformers model (a classifier), matrices that are too small, grouped kernels, and what has three dimensions, such as
      fused experts: a stack of matrices, which no one subspace fits.
    - norms, biases and everything of fewer than two dimensions: rank None and weight decay 0.

    A model that is not from transformers says nowhere what its head is: there the last ``nn.Linear`` is one if it has the
    shape of an embedding table. Name any other in ``exclude``. Parameters without ``requires_grad`` are left out; one that
    modules share is in one group, once. Shapes decide, so that a model on the meta device will do.

    Args:
        model: any module.
        rank: r; None puts all matrices into the second group, for an ordinary optimizer.
        include: project these hidden matrices only. As PEFT's ``target_modules``: a regex that a whole name must match, or a
            list of names or their ends ("q_proj", "layers.0.mlp"); the names are those of the parameter (which may then be
            any matrix of a module of your own), of its module or of a module around that.
        exclude: do not project these; written alike.
        weight_decay: of both groups of matrices; left out, they take the optimizer's.
        projected_options: further keys of the first group, such as ``scale=0.25``. What all groups share goes to the
            optimizer.

    Raises:
        ValueError: a rank below 1, or so high that nothing is left to project; nothing trainable; a name in ``include`` or
            ``exclude`` that the model does not have, or that names nothing that can be projected.

    Source: the choice of layers is that of GaLore (Zhao et al. 2024, §5), and overview §3.3, eq. 18–19.

    Example:
        >>> from torch import nn
        >>> from rankwise.optimizers import model_param_groups
        >>> model = nn.Sequential(nn.Embedding(50, 16), nn.Linear(16, 32), nn.LayerNorm(32), nn.Linear(32, 3))
        >>> for group in model_param_groups(model, rank=4, scale=0.25):
        ...     print(group["rank"], group["param_names"])
        4 ['1.weight']
        None ['0.weight', '3.weight']
        None ['1.bias', '2.weight', '2.bias', '3.bias']
    """
    parameters = [entry for entry in parameters_of(model) if entry.parameter.requires_grad]
    if not parameters:
        raise ValueError("the model has no parameter with requires_grad; there is nothing for an optimizer to do")
    projected = projected_or_error(parameters, rank, include, exclude)
    vectors = [entry for entry in parameters if entry.kind == VECTOR]
    matrices = [entry for entry in parameters if entry.kind != VECTOR and entry not in projected]
    decay = {} if weight_decay is None else {"weight_decay": weight_decay}
    require_not_negative(decay, *decay)
    groups = (
        _group(projected, rank, **decay, **projected_options),
        _group(matrices, None, **decay),
        _group(vectors, None, weight_decay=0.0),
    )
    return [group for group in groups if group["params"]]


def parameters_of(model: nn.Module) -> list[ModelParameter]:
    """Every parameter of the model once, in the model's order, trained or not."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"expected a model, a torch.nn.Module, got {type(model).__name__}")
    owners: dict[int, list[tuple[str, str, nn.Module]]] = {}
    for module_name, module in model.named_modules():
        for attribute, parameter in module.named_parameters(recurse=False):
            name = f"{module_name}.{attribute}" if module_name else attribute
            owners.setdefault(id(parameter), []).append((name, attribute, module))
    output, task = _heads(model)
    entries = []
    for name, parameter in model.named_parameters():
        mine = owners[id(parameter)]
        kind = _kind(parameter, [owner[1:] for owner in mine], id(parameter) in output | task)
        places = tuple(owner[0] for owner in mine)
        entries.append(ModelParameter(name, parameter, kind, places, mine[0][2], id(parameter) in task))
    return entries


def projected_or_error(
    parameters: Sequence[ModelParameter], rank: int | None, include: Names | None = None, exclude: Names | None = None
) -> list[ModelParameter]:
    """The hidden matrices that :func:`model_param_groups` projects; errors as there. None where the rank is None."""
    if rank is None:
        return []
    require_rank(rank)
    hidden = adaptable_parameters(parameters, include, exclude)
    projected = [entry for entry in hidden if min(entry.matrix_shape) > rank]
    if not projected:
        sides = [min(entry.matrix_shape) for entry in hidden]
        raise ValueError(
            f"no hidden matrix is larger than rank={rank}: the smaller side is at most {max(sides)}. Choose a lower rank"
            if sides
            else "the model has no hidden matrix that could be projected; name matrices of your own modules in include, or "
            "pass rank=None"
        )
    return projected


def require_rank(rank: int) -> None:
    """Refuse what is no rank.

    Raises:
        ValueError: not a whole number of at least 1.
    """
    if not is_count(rank, 1):
        raise ValueError(f"rank must be a whole number of at least 1, got {rank!r}")


def adaptable_parameters(
    parameters: Sequence[ModelParameter], include: Names | None = None, exclude: Names | None = None
) -> list[ModelParameter]:
    """The hidden matrices of any size that ``include`` and ``exclude`` leave.

    Raises:
        ValueError: names that are unknown, or that leave none of those there are.
    """
    for option, names in (("include", include), ("exclude", exclude)):
        _check_names(parameters, option, names)
    chosen = [entry for entry in parameters if entry.kind == HIDDEN] if include is None else _named(parameters, include)
    left = chosen if exclude is None else [entry for entry in chosen if not entry.is_called(exclude)]
    if chosen and not left:
        raise ValueError(f"exclude={exclude!r} leaves no hidden matrix to project; name fewer")
    return left


def _named(parameters: Sequence[ModelParameter], include: Names) -> list[ModelParameter]:
    """What include picks; a matrix that a module of the user's own holds is hidden once it is named."""
    named = [entry for entry in parameters if entry.is_called(include)]
    found = [entry for entry in named if entry.kind == HIDDEN or (entry.kind == OTHER and entry.parameter.ndim == 2)]
    if not found:
        kinds = " and ".join(sorted({entry.kind for entry in named}))
        raise ValueError(
            f"include={include!r} names nothing that can be projected (kind: {kinds}); embeddings, output heads, norms, "
            "biases and stacks of matrices keep their full state. Leave include out to project every hidden matrix"
        )
    return found


def _check_names(parameters: Sequence[ModelParameter], option: str, names: Names | None) -> None:
    """Every name must be one of the model's: a misspelt one would silently choose other layers."""
    if names is None:
        return
    if not isinstance(names, str) and not _are_texts(names):
        raise ValueError(f"{option} must be a regular expression or a list of names, got {names!r}")
    patterns: list[Names] = [names] if isinstance(names, str) else [[name] for name in names]
    for pattern in patterns:
        try:
            known = any(entry.is_called(pattern) for entry in parameters)
        except re.error as error:
            raise ValueError(f"{option}={pattern!r} is no regular expression: {error}") from None
        if not known:
            raise ValueError(
                f"{option}={pattern!r} matches no trainable parameter or module; a text is a regular expression for a whole "
                "name, a list holds names or their ends. Trainable are "
                f"{_some(entry.name for entry in parameters)}"
            )


def _are_texts(names: Any) -> bool:
    return isinstance(names, Collection) and all(isinstance(name, str) for name in names)


def _some(names: Iterable[str], shown: int = 6) -> str:
    every = list(names)
    return ", ".join(every[:shown]) + (f" and {len(every) - shown} more" if len(every) > shown else "")


def _group(entries: list[ModelParameter], rank: int | None, **options: Any) -> dict[str, Any]:
    return {
        "params": [entry.parameter for entry in entries],
        "param_names": [entry.name for entry in entries],
        "rank": rank,
        **options,
    }


def _kind(parameter: nn.Parameter, owners: list[tuple[str, nn.Module]], in_head: bool) -> str:
    attributes, modules = zip(*owners, strict=True)
    if parameter.ndim < 2 or any(isinstance(module, _NORMS) for module in modules):
        return VECTOR
    if any(attribute.endswith("bias") for attribute in attributes):  # of fused experts, a bias each: two dimensions
        return VECTOR
    if any(isinstance(module, nn.Embedding | nn.EmbeddingBag) for module in modules):
        return EMBEDDING
    if in_head:
        return HEAD
    hidden = is_matricized(parameter.shape) and all(_is_hidden_matrix(*owner) for owner in owners)
    return HIDDEN if hidden else OTHER


def _is_hidden_matrix(attribute: str, module: nn.Module) -> bool:
    if isinstance(module, nn.MultiheadAttention):
        return attribute.endswith("proj_weight")
    if isinstance(module, nn.RNNBase):
        return attribute.startswith("weight_")
    if isinstance(module, _ConvNd):
        # the kernel of g groups is g small matrices, which no one subspace fits
        return attribute == "weight" and module.groups == 1
    return attribute == "weight" and isinstance(module, (nn.Linear, *conv1d_types()))


def _heads(model: nn.Module) -> tuple[set[int], set[int]]:
    """Ids of the parameters of output layers with what stands around them, and of other heads on a pretrained body.

    Every module is asked, so that wrappers (PEFT's, DistributedDataParallel) change nothing.
    """
    output: set[int] = set()
    task: set[int] = set()
    pretrained = [module for module in model.modules() if hasattr(module, "base_model_prefix")]
    for module in pretrained:
        layer, body = output_layer(module), getattr(module, "base_model", module)
        inside = {id(parameter) for parameter in body.parameters()}
        on_top = {id(parameter) for parameter in module.parameters()} - inside
        if layer is None:
            task |= on_top
        else:
            output |= on_top | {id(parameter) for parameter in layer.parameters()}
    return (output, task - output) if pretrained else (_head_by_shape(model), set())


def _head_by_shape(model: nn.Module) -> set[int]:
    tables = {tuple(module.weight.shape) for module in model.modules() if isinstance(module, nn.Embedding)}
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return {id(linear[-1].weight)} if linear and tuple(linear[-1].weight.shape) in tables else set()
