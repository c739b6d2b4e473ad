"""Linear layers whose weights lie as `product_kernel` reads them: on a CPU they take the place of PyTorch's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .crew import run
from .lanes import WIDTH
from .product_kernel import multiply

Floats = npt.NDArray[np.float32]


def kind_of(dtype: torch.dtype) -> type[np.float32 | np.int16]:
    """What numpy keeps numbers of this type as: float32, or int16 that holds bfloat16."""
    return np.int16 if dtype == torch.bfloat16 else np.float32


def numbers_of(parts: Sequence[torch.nn.Linear]) -> int:
    """How many numbers the weights of these layers are as one `PackedLinear`."""
    columns = -(-sum(part.out_features for part in parts) // WIDTH) * WIDTH
    return columns * parts[0].in_features


class PackedLinear(torch.nn.Module):
    """Several linear layers of the same input as one; float32 in and out, weights float32 or bfloat16.

    `weight` is [outputs / 16, inputs, 16]; outputs are padded with zeros. Not for training.
    """

    _strips: npt.NDArray[Any]  # the same memory, flat; numpy's, since numpy asks for large pages

    def __init__(self, *parts: torch.nn.Linear, room: npt.NDArray[Any] | None = None) -> None:
        """`room`: memory to lie in, flat, of as many numbers as there are weights."""
        super().__init__()
        weight = torch.cat([part.weight.detach() for part in parts])
        self.inputs, self.outputs = weight.shape[1], len(weight)
        self.columns = -(-self.outputs // WIDTH) * WIDTH
        weight = torch.nn.functional.pad(weight, (0, 0, 0, self.columns - self.outputs))
        self._strips = np.empty(weight.numel(), kind_of(weight.dtype)) if room is None else room
        strips = torch.from_numpy(self._strips).view(weight.dtype).view(-1, self.inputs, WIDTH)
        strips.copy_(weight.view(-1, WIDTH, self.inputs).transpose(1, 2))
        self.weight = torch.nn.Parameter(strips, requires_grad=False)
        biases = [part.bias.detach().float() for part in parts if part.bias is not None]
        self.bias: Floats | None = None
        if biases:
            self.bias = np.zeros(self.columns, np.float32)
            self.bias[: self.outputs] = torch.cat(biases).numpy()

    def multiply(self, x: Floats, rows: int, out: Floats) -> None:
        """out[rows, columns] = x[rows, inputs] times the weights, plus the bias; both flat."""
        strips = self.columns // WIDTH
        work = rows * self.inputs * self.columns
        run(multiply, strips, work, x, self._strips, out, rows, self.inputs, self.columns)
        if self.bias is not None:
            out[: rows * self.columns].reshape(rows, -1)[:] += self.bias

    def rows(self, x: Floats, rows: Sequence[int]) -> torch.Tensor:
        """[len(rows), outputs] of these rows of `x` [..., inputs], which is flat."""
        picked = x.reshape(-1, self.inputs)[np.asarray(rows, np.int64)]
        out = np.empty(len(rows) * self.columns, np.float32)
        self.multiply(picked.reshape(-1), len(rows), out)
        return torch.from_numpy(out.reshape(-1, self.columns)[:, : self.outputs])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., inputs] to [..., outputs], of the type of `x`."""
        flat = x.float().reshape(-1, self.inputs).contiguous()
        out = np.empty(len(flat) * self.columns, np.float32)
        self.multiply(flat.numpy().reshape(-1), len(flat), out)
        result = torch.from_numpy(out).view(-1, self.columns)[:, : self.outputs]
        return result.to(x.dtype).view(*x.shape[:-1], self.outputs)


def pack_linear(model: torch.nn.Module) -> None:
    """Put a `PackedLinear` in the place of every linear layer of `model`."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, torch.nn.Linear):
                setattr(module, name, PackedLinear(child))
