"""Matrices, or stacks of them, as products of two factors.

A kernel is (..., inputs, outputs), in float64; A is (..., inputs, r) and B
(..., r, outputs).
"""

import numpy as np


def pissa(kernel, rank, scaling):
    """The r largest singular values, half of each in A and half in B.

        W = U S V^T    A = U_r sqrt(S_r / scaling)    B = sqrt(S_r / scaling) V_r^T

    scaling * A @ B is the nearest matrix of rank r.

    Reference: [Meng et al., 2024](https://arxiv.org/abs/2404.02948)
    """
    left, values, right = largest(kernel, rank)
    root = np.sqrt(values / scaling)[..., None, :]
    return left * root, np.swapaxes(root, -1, -2) * right


def olora(kernel, rank, scaling):
    """The first r columns of an orthogonal basis of the outputs.

        W^T = Q R    B = (Q[:, :r])^T    A = (R[:r])^T

    Reference: [Büyükakyüz, 2024](https://arxiv.org/abs/2406.01775)
    """
    q, r = np.linalg.qr(np.swapaxes(kernel, -1, -2))
    return tuple(np.swapaxes(x, -1, -2) for x in (r[..., :rank, :], q[..., :rank]))


def orthogonal(kernel, rank, scaling):
    """Factors that span spaces at right angles, so that A @ B is nearly zero.

        A = N(inputs, r/2) @ Q[1::2] / 10    B = Q[0::2]^T @ N(r/2, outputs) / 10

    with a random orthogonal Q (r, r) and N of standard normal values.
    """
    if rank % 2:
        raise ValueError(f"An orthogonal start needs an even rank. Received: {rank}.")
    random = np.random.default_rng(np.random.randint(2**31))  # as Keras is seeded
    *lead, inputs, outputs = kernel.shape
    q, _ = np.linalg.qr(random.standard_normal((*lead, rank, rank)))
    a = random.standard_normal((*lead, inputs, rank // 2)) @ q[..., 1::2, :]
    b = random.standard_normal((*lead, rank // 2, outputs))
    return a / 10, np.swapaxes(q[..., 0::2, :], -1, -2) @ b / 10


KERNEL_STARTS = {"pissa": pissa, "olora": olora, "orthogonal": orthogonal}


def largest(matrix, rank):
    """Left vectors, values and right vectors of the r largest singular values.

    By the eigenvectors of the smaller Gram matrix, in a fifth of a full decomposition's
    time; where a value that is asked for is in the noise of that, by the latter.
    """
    wide = matrix.shape[-2] < matrix.shape[-1]
    tall = np.swapaxes(matrix, -1, -2) if wide else matrix
    squares, vectors = np.linalg.eigh(np.swapaxes(tall, -1, -2) @ tall)
    squares, vectors = squares[..., ::-1][..., :rank], vectors[..., ::-1][..., :rank]
    if (squares[..., -1] <= 1e-10 * squares[..., 0]).any():
        left, values, right = np.linalg.svd(matrix, full_matrices=False)
        return left[..., :rank], values[..., :rank], right[..., :rank, :]
    values = np.sqrt(squares)
    other = tall @ vectors / values[..., None, :]
    left, right = (vectors, other) if wide else (other, vectors)
    return left, values, np.swapaxes(right, -1, -2)
