"""The algebra of a projected step where a parameter's rows lie over several processes (FSDP2), and where they do not."""

import math
from typing import Any

import torch
from torch import Tensor

from rankwise.optimizers.matricize import Geometry


class Whole:
    """Everything lies in one process (or in each, as under DDP): nothing to add up."""

    def over_compressed(self, partial: Tensor) -> Tensor:
        """Complete a product that ran over the rows of the oriented matrix."""
        return partial

    def over_other(self, partial: Tensor) -> Tensor:
        """Complete a product that ran over its columns."""
        return partial

    def everywhere(self, numbers: Tensor) -> Tensor:
        """The largest over the processes, entry by entry."""
        return numbers

    def peak(self, values: Tensor) -> Tensor:
        """max |values| over all processes, inf where one of them is not finite, 0 where there is none; no wait for a GPU."""
        found = values.abs().amax() if values.numel() else values.new_zeros(())
        return self.everywhere(torch.where(torch.isfinite(found), found, math.inf))

    def norm(self, A: Tensor) -> float:
        """‖A‖_F of the oriented gradient; in float64, whose squares neither overflow nor vanish."""
        return float(torch.linalg.vector_norm(A, dtype=torch.float64))

    def projected_norm(self, R: Tensor) -> float:
        """‖R‖_F of the projected gradient."""
        return float(self.over_other(torch.linalg.vector_norm(R, dtype=torch.float64).square()).sqrt())

    def orthonormal(self, Y: Tensor) -> Tensor:
        """An orthonormal basis of the columns of Y (c, k); of any where Y has fewer independent columns."""
        return torch.linalg.qr(Y).Q

    def mine(self, rows: Tensor) -> Tensor:
        """This process's rows of a (c, k) matrix."""
        return rows

    def hold_basis(self, basis: Tensor) -> Tensor:
        """The form in which a basis is kept in the optimizer's state."""
        return basis

    def hold_projected(self, values: Tensor) -> Tensor:
        """The form in which what has the shape of a projected gradient is kept there."""
        return values


class Shards(Whole):
    """The parameter's rows lie over the processes of one mesh dimension.

    Projected on the right (the columns), a step needs no communication, the moments are sharded like the rows, and a refresh
    adds up n × k numbers. On the left a step adds up the r × n projected gradient, every process keeps all of the moments,
    and a refresh gathers m × k numbers for the QR. The gradient itself is never gathered.
    """

    def __init__(self, parameter: Any, geometry: Geometry):
        from torch.distributed.tensor import Replicate, Shard

        mesh, placements = parameter.device_mesh, parameter.placements
        sharded = [place for place, placement in enumerate(placements) if not isinstance(placement, Replicate)]
        # a strided shard (tensor parallelism below FSDP) is a subclass with other rows
        if len(sharded) > 1 or any(type(placements[k]) is not Shard or placements[k].dim != 0 for k in sharded):
            raise ValueError(
                f"a parameter of shape {tuple(parameter.shape)} is laid out as {placements}; projected optimizers take "
                "parameters whole or sharded along their first dimension by one mesh dimension, as fully_shard does: give it "
                "to a group with rank=None"
            )
        self.mesh, self.placements, self.geometry = mesh, placements, geometry
        self.dimension = sharded[0] if sharded else None
        self.left = geometry.side == "left"

    def _sum(self, partial: Tensor) -> Tensor:
        if self.dimension is None:
            return partial
        total = partial.contiguous()
        torch.distributed.all_reduce(total, group=self.mesh.get_group(self.dimension))
        return total

    def over_compressed(self, partial: Tensor) -> Tensor:
        return self._sum(partial) if self.left else partial

    def over_other(self, partial: Tensor) -> Tensor:
        return partial if self.left else self._sum(partial)

    def norm(self, A: Tensor) -> float:
        return float(self._sum(torch.linalg.vector_norm(A, dtype=torch.float64).square()).sqrt())

    def everywhere(self, numbers: Tensor) -> Tensor:
        if self.dimension is not None:
            numbers = numbers.clone()
            group = self.mesh.get_group(self.dimension)
            torch.distributed.all_reduce(numbers, torch.distributed.ReduceOp.MAX, group=group)
        return numbers

    def orthonormal(self, Y: Tensor) -> Tensor:
        if not self.left or self.dimension is None:
            return super().orthonormal(Y)
        return self.mine(super().orthonormal(self.hold_basis(Y).full_tensor()))  # type: ignore[attr-defined]

    def mine(self, rows: Tensor) -> Tensor:
        if not self.left or self.dimension is None:
            return rows
        # as torch.chunk divides
        size = -(-rows.shape[0] // self.mesh.size(self.dimension))
        first = self.mesh.get_local_rank(self.dimension) * size
        return rows[first : first + size]

    def _held(self, values: Tensor, dim: int, length: int) -> Tensor:
        """A DTensor, so that what saves sharded states knows these as pieces; ``dim`` is sharded and ``length`` in all."""
        from torch.distributed.tensor import DTensor, Shard

        places = [Shard(dim) if isinstance(p, Shard) else p for p in self.placements]
        shape = torch.Size(length if k == dim else size for k, size in enumerate(values.shape))
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(values.contiguous(), self.mesh, places, run_check=False, shape=shape, stride=stride)

    def _held_whole(self, values: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor, Replicate

        return DTensor.from_local(values, self.mesh, [Replicate()] * self.mesh.ndim, run_check=False)

    def hold_basis(self, basis: Tensor) -> Tensor:
        return self._held(basis, 0, self.geometry.compressed) if self.left else self._held_whole(basis)

    def hold_projected(self, values: Tensor) -> Tensor:
        return self._held_whole(values) if self.left else self._held(values, 1, self.geometry.other)


class FullSize(Whole):
    """A sharded parameter that is not projected: its state is laid out as itself, and entries are worked on one by one."""

    def __init__(self, parameter: Any):
        self.parameter = parameter

    def everywhere(self, numbers: Tensor) -> Tensor:
        from torch.distributed.tensor import Replicate

        numbers = numbers.clone()
        for place, placement in enumerate(self.parameter.placements):
            if not isinstance(placement, Replicate):
                group = self.parameter.device_mesh.get_group(place)
                torch.distributed.all_reduce(numbers, torch.distributed.ReduceOp.MAX, group=group)
        return numbers

    def hold_projected(self, values: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor

        like = self.parameter
        return DTensor.from_local(
            values, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
        )


def is_distributed(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor, asked without importing them."""
    return hasattr(tensor, "placements") and hasattr(tensor, "device_mesh")


def local(tensor: Tensor) -> Tensor:
    """The piece of a DTensor that lies here, writable in place; any other tensor itself."""
    return tensor.to_local() if is_distributed(tensor) else tensor  # type: ignore[attr-defined]


def pieces_of(parameter: Tensor, geometry: Geometry | None) -> Whole:
    """How a parameter lies, decided once.

    Raises:
        ValueError: a layout that cannot be projected.
    """
    if not is_distributed(parameter):
        return Whole()
    return FullSize(parameter) if geometry is None else Shards(parameter, geometry)


def refuse_flattened(parameter: Tensor) -> None:
    """Refuse FSDP1's flat parameters and ZeRO-3's emptied ones: they have lost the shape of the matrix.

    Raises:
        ValueError: one of them. Asked only of what is to be projected: entry by entry they can be stepped as ever.
    """
    if getattr(parameter, "_is_flat_param", False) or hasattr(parameter, "_fsdp_flattened"):
        raise ValueError("FSDP1 flattens parameters, so there is no matrix left to project; use FSDP2 (fully_shard)")
    if hasattr(parameter, "ds_shape") and parameter.numel() == 0:
        raise ValueError(
            "ZeRO-3 empties parameters, so there is no matrix to project; use ZeRO-1, DDP or FSDP2 (fully_shard)"
        )
