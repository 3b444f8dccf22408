"""Singular values of products of two thin matrices, which are never multiplied."""

import numpy as np


def core(left, right):
    """Q1, C, Q2 of left @ right = Q1 @ C @ Q2^T, where C has the rank's size.

    left (..., m, r) and right (..., r, n). The columns of Q1 and of Q2 are
    orthonormal, so that the singular values of C are those of the product.
    """
    q_left, r_left = np.linalg.qr(left.astype("float64"))
    q_right, r_right = np.linalg.qr(transposed(right.astype("float64")))
    return q_left, r_left @ transposed(r_right), q_right


def singular_values(left, right):
    """Of left @ right, the largest first; of a stack of them, those of all."""
    values = np.linalg.svd(core(left, right)[1], compute_uv=False)
    return np.sort(values, axis=None)[::-1]


def effective_rank(values, energy):
    """How many of the largest values hold this share of the sum of squares."""
    sums = np.cumsum(np.square(values))
    if not len(sums) or sums[-1] == 0:
        return 0
    return int(np.searchsorted(sums, energy * sums[-1])) + 1


def cut(left, right, rank):
    """The nearest factors of a lower rank, and the relative error of their product.

    A stack of matrices gets one rank for all of them.

    rank: a function of the singular values; of a stack, of their norms over it.
    """
    q_left, middle, q_right = core(left, right)
    rows, values, columns = np.linalg.svd(middle, full_matrices=False)
    norms = np.linalg.norm(values.reshape(-1, values.shape[-1]), axis=0)
    rank = min(rank(norms), len(norms))  # a small kernel has no more
    root = np.sqrt(values[..., :rank])
    error = np.linalg.norm(norms[rank:]) / (np.linalg.norm(norms) or 1.0)
    new_left = (q_left @ rows[..., :rank]) * root[..., None, :]
    new_right = root[..., None] * columns[..., :rank, :] @ transposed(q_right)
    return new_left, new_right, float(error)


def transposed(matrix):
    return np.swapaxes(matrix, -1, -2)
