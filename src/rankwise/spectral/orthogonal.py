"""Uniformly distributed orthonormal frames."""

import torch
from jaxtyping import Float
from torch import Tensor


def sign_fixed_qr(matrix: Float[Tensor, "m k"]) -> Float[Tensor, "m i"]:
    """The Q of matrix = QR with diag(R) ≥ 0.

    LAPACK leaves the signs of diag(R) free; without fixing them, Q of a Gaussian matrix is not Haar
    (Mezzadri 2007, Notices of the AMS 54).
    """
    Q, R = torch.linalg.qr(matrix)
    signs = torch.sign(torch.diagonal(R))
    return Q * torch.where(signs == 0, torch.ones_like(signs), signs)


def haar_frame(
    rows: int,
    columns: int,
    *,
    scale: float = 1.0,
    complement_of: Float[Tensor, "m j"] | None = None,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Float[Tensor, "m k"]:
    """A uniformly distributed (Haar) frame: ``columns`` orthogonal columns of length ``scale`` in R^rows.

    Args:
        rows: m, the dimension of the space.
        columns: k, the number of columns.
        scale: length of every column (the paper's ε for an initial factor W_l(0) = ε_l Q_l, ICML 2024 eq. 3).
        complement_of: (m, j) with orthonormal columns; the frame is then Haar in their orthogonal complement.
        generator: source of randomness; drawn on the generator's device, so a CPU generator gives the same
            frame on every device.
        dtype: float32 or float64; narrower dtypes are drawn in float32 and rounded.
        device: where the frame goes.

    Returns:
        (m, k) tensor Q with QᵀQ = scale²·I.

    Raises:
        ValueError: more columns than the (complement's) dimension, or a negative size.

    Example:
        >>> import torch
        >>> from rankwise.spectral import haar_frame
        >>> Q = haar_frame(10, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        >>> bool(torch.allclose(Q.T @ Q, torch.eye(3, dtype=torch.float64)))
        True
    """
    taken = 0 if complement_of is None else complement_of.shape[1]
    if complement_of is not None and complement_of.shape[0] != rows:
        raise ValueError(f"complement_of has {complement_of.shape[0]} rows, the frame is to have {rows}")
    if rows < 1 or columns < 0 or columns > rows - taken:
        raise ValueError(
            f"cannot place {columns} orthonormal columns in a space of dimension {rows}"
            + (f" less the {taken} taken" if taken else "")
            + f"; ask for at most {max(rows - taken, 0)}"
        )
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    source = generator.device if generator is not None else torch.device("cpu")
    gaussian = torch.randn(rows, columns, generator=generator, dtype=wide, device=source)
    if device is not None:
        gaussian = gaussian.to(device)
    if complement_of is not None and columns:
        gaussian = project_out(gaussian, complement_of.to(gaussian))
    return (scale * sign_fixed_qr(gaussian)).to(dtype)


def project_out(matrix: Float[Tensor, "m k"], frame: Float[Tensor, "m j"]) -> Float[Tensor, "m k"]:
    """(I − FFᵀ)M for an orthonormal F, twice: once loses orthogonality when M lies almost in span F."""
    for _ in range(2):
        matrix = matrix - frame @ (frame.mT @ matrix)
    return matrix


def residual_frame(frame: Float[Tensor, "m j"], matrix: Float[Tensor, "m k"]) -> Float[Tensor, "m i"]:
    """An orthonormal basis of (I − FFᵀ)M, sign-fixed; i = min(k, m − j) columns.

    From one Householder QR of [F, M], whose Q is orthonormal even where M lies in span F: the columns that the residual
    does not determine are then some directions outside F. Orthonormalizing a vanishing residual would return F again.
    """
    return sign_fixed_qr(torch.cat([frame, matrix], dim=1))[:, frame.shape[1] :]
