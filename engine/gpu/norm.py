"""Parameters of a normalization, shared by the PyTorch operations and the Triton kernels."""

from dataclasses import dataclass
from typing import Any, Self

from torch import Tensor


@dataclass(frozen=True)
class Norm:
    """Parameters of a group norm, or of a layer norm (`groups` 1, each token by itself)."""

    weight: Tensor
    bias: Tensor
    eps: float
    groups: int = 1

    @classmethod
    def of(cls, module: Any) -> Self:
        """Return those of a torch.nn.GroupNorm or LayerNorm."""
        return cls(module.weight, module.bias, module.eps, getattr(module, "num_groups", 1))
