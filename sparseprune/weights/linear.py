"""`SparseLinear`: a linear layer whose frozen weight is kept sparse and packed for its device's kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sparseprune.kernels import backend, ops
from sparseprune.models import notes
from sparseprune.models.sites import site_of
from sparseprune.weights.encoding import PLAIN, Encoding
from sparseprune.weights.format import Format
from sparseprune.weights.module import SparseModule
from sparseprune.weights.sparse_weight import SparseWeight
from sparseprune.weights.spec import WeightSpec

__all__ = ["SparseLinear"]

_linear = torch.ops.sparseprune.linear.default
_linear_undispatched = ops._linear


class SparseLinear(SparseModule):
    """`y = x W^T + b` with `W` `[out_features, in_features]` in 2:4 (any N:M), bitmap or CSR form, or in int8 or int4 codes
    (N:M, bitmap or dense).

    Input `[..., in_features]` and output `[..., out_features]` have the weight's dtype (float32, bfloat16, float16);
    sums are kept in float32. On a CPU codes meet activations that are rounded to int8, 64 (or 32) columns at a time; their
    products are added exactly, and group by group in float32. A GPU rounds no activations, and has no kernels for codes that
    compute in float32, or are neither dense nor 2:4. The weight is frozen; gradients reach the input and the bias.

    How the weight is held, moved, copied and saved is in `SparseModule`.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        format: str | Format = "2:4",
        encoding: str | Encoding = PLAIN,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """An all-zero layer, as a place for a state dict. `from_dense` makes one from a dense layer."""
        dtype = torch.get_default_dtype() if dtype is None else dtype
        form, values = Format.parse(format), Encoding.parse(encoding)
        super().__init__(WeightSpec((out_features, in_features), dtype, form, values), device)
        self.in_features = in_features
        self.out_features = out_features
        zeros = nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device)) if bias else None
        self.register_parameter("bias", zeros)

    @classmethod
    def from_dense(
        cls, linear: nn.Module, format: str | Format = "2:4", encoding: str | Encoding = PLAIN
    ) -> SparseLinear:
        """Sparse twin of an `nn.Linear` or a transformers `Conv1D`; ValueError where the weight does not fit.

        encoding: see `SparseWeight.from_dense`.
        """
        return cls.in_place_of(linear, SparseWeight.from_dense(site_of(linear).weight, format, encoding))

    @classmethod
    def in_place_of(cls, linear: nn.Module, weight: SparseWeight | SparseModule) -> SparseLinear:
        """A layer over what `linear`'s weight has become: it shares the bias, and has its mode and its notes.

        weight: or the module that has it, to be `tied_to`.
        """
        bias: Any = linear.bias
        if isinstance(weight, SparseModule):
            layer = cls.tied_to(weight, bias, training=linear.training)
        else:
            layer = cls.from_weight(weight, bias, training=linear.training)
        notes.carry(linear, layer)
        return layer

    @classmethod
    def from_weight(
        cls, weight: SparseWeight, bias: Tensor | None = None, training: bool = False
    ) -> SparseLinear:
        """A layer over a canonical weight; `bias` `[rows]` keeps its `requires_grad` and is not copied."""
        layer = cls._without_weight(weight.spec, bias, training)
        layer._set_weight(weight)
        return layer

    @classmethod
    def tied_to(cls, other: SparseModule, bias: Tensor | None = None, training: bool = False) -> SparseLinear:
        """A layer over the one weight that `other` has and keeps, as a head has that of its model's embedding."""
        layer = cls._without_weight(other.spec, bias, training)
        layer.share_weight(other)
        return layer

    @classmethod
    def _without_weight(cls, spec: WeightSpec, bias: Tensor | None, training: bool) -> SparseLinear:
        rows, cols = spec.shape
        if bias is not None and tuple(bias.shape) != (rows,):
            raise ValueError(
                f"bias: shape must be ({rows},) for a weight of {rows} x {cols}, got {tuple(bias.shape)}"
            )
        layer = cls(cols, rows, False, spec.format, spec.encoding, spec.dtype, "meta")
        if bias is not None:
            layer.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias, bias.requires_grad)
        return layer.train(training)

    def forward(self, input: Tensor) -> Tensor:
        # Straight to the dictionaries: nn.Module.__getattr__ would cost two Python calls more per layer and token.
        packed: Any = self._buffers["packed"]
        bias = self._parameters["bias"]
        out, width, packing = self.out_features, self.in_features, self.packing
        if _needs_dispatcher(input, bias):
            return _linear(input, packed, bias, out, width, packing)
        if bias is None:
            if input.is_cpu and packed.is_cpu:
                return backend.cpu.linear(input, packed, None, out, width, packing)
            if input.is_cuda and input.device == packed.device:
                return backend.cuda.linear(input, packed, None, out, width, packing)
        if input.is_cpu or input.is_cuda:
            return _linear_undispatched(input, packed, bias, out, width, packing)
        return _linear(input, packed, bias, out, width, packing)

    def to_dense(self) -> nn.Linear:
        """The dense twin; it shares the bias."""
        dense = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        dense.weight = nn.Parameter(self.weight, requires_grad=False)
        dense.register_parameter("bias", self.bias)
        if notes.noted(self) is None and self.format.kind == "nm":
            notes.note(site_of(dense), str(self.format))
        notes.carry(self, dense)
        return dense.train(self.training)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{self._weight_repr()}"
        )


def _needs_dispatcher(
    input: Tensor,
    bias: Tensor | None,
    # Bound here, because a look-up of each by name would double the price of this function (0.3 us).
    is_compiling: Callable[[], bool] = torch.compiler.is_compiling,
    is_grad_enabled: Callable[[], bool] = torch.is_grad_enabled,
    dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack,
    functorch: Callable[[], Any] = torch._C._functorch.peek_interpreter_stack,
    jit_tracing: Callable[[], Any] = torch._C._get_tracing_state,
) -> bool:
    """Whether anything but a kernel wants to see a call: autograd, a tracer, a transform, a tensor subclass.

    torch's dispatcher takes 7 us on its way to an op that has a gradient, two calls of `nn.Linear`.
    """
    return bool(
        is_compiling()
        or (is_grad_enabled() and (input.requires_grad or (bias is not None and bias.requires_grad)))
        or type(input) is not Tensor
        or dispatch_modes()
        or functorch() is not None
        or jit_tracing() is not None
    )
