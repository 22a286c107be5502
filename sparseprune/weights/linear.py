"""`SparseLinear`: a linear layer whose frozen weight is kept sparse and packed for its device's kernels."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sparseprune.kernels import backend, native, ops
from sparseprune.kernels.packing import Packed, packing_code
from sparseprune.models import notes
from sparseprune.models.sites import site_of
from sparseprune.weights.encoding import PLAIN, Encoding
from sparseprune.weights.format import Format
from sparseprune.weights.sparse_weight import SparseWeight, layout_of_codes
from sparseprune.weights.spec import DTYPES, SPEC, WeightSpec

__all__ = ["SparseLinear"]

_linear = torch.ops.sparseprune.linear.default
_linear_undispatched = ops._linear


class SparseLinear(nn.Module):
    """`y = x W^T + b` with `W` `[out_features, in_features]` in 2:4 (any N:M), bitmap or CSR form, or in int8 or int4 codes
    (2:4 or dense).

    Input `[..., in_features]` and output `[..., out_features]` have the weight's dtype (float32, bfloat16, float16);
    sums are kept in float32. Codes meet activations that are rounded to int8, 64 (or 32) columns at a time; their products are
    added exactly, and group by group in float32. The weight is frozen; gradients reach the input and the bias.

    The weight is the non-persistent `uint8` buffer `packed`, in the form that the kernels of its device read (CPU or
    CUDA); `.to(device)` packs it anew. A state dict holds the parts of its canonical form instead, as `weight.values`,
    `weight.mask` and so on (`SparseWeight.parts`, docs/formats.md), and so does a pickle: both move between machines.
    Loading a state dict takes over the format and casts the values to the module's dtype.
    """

    packed: Tensor
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        format: str | Format = "2:4",
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        encoding: str | Encoding = PLAIN,
    ) -> None:
        """An all-zero layer, as a place for a state dict. `from_dense` makes one from a dense layer."""
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if dtype not in DTYPES:
            raise TypeError(f"dtype: must be float32, bfloat16 or float16 for a sparse layer, got {dtype}")
        self.spec = WeightSpec(
            (out_features, in_features), dtype, Format.parse(format), Encoding.parse(encoding)
        )
        self.nnz = 0
        self.packing = self._packing_on_cpu()  # how `packed` is packed (kernels/packing.py)
        self.register_buffer("packed", torch.empty(0, dtype=torch.uint8, device="meta"), persistent=False)
        if device is None or torch.device(device).type != "meta":
            zero = SparseWeight.from_dense(
                torch.zeros(self.spec.shape, dtype=dtype), self.format, self.encoding
            )
            self._set_weight(zero.to(device=device))
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
    def in_place_of(cls, linear: nn.Module, weight: SparseWeight) -> SparseLinear:
        """A layer over what `linear`'s weight has become: it shares the bias, and has its mode and its notes."""
        bias: Any = linear.bias
        layer = cls.from_weight(weight, bias, training=linear.training)
        notes.carry(linear, layer)
        return layer

    @classmethod
    def from_weight(
        cls, weight: SparseWeight, bias: Tensor | None = None, training: bool = False
    ) -> SparseLinear:
        """A layer over a canonical weight; `bias` `[rows]` keeps its `requires_grad` and is not copied."""
        rows, cols = weight.shape
        if bias is not None and tuple(bias.shape) != (rows,):
            raise ValueError(
                f"bias: shape must be ({rows},) for a weight of {rows} x {cols}, got {tuple(bias.shape)}"
            )
        layer = cls(cols, rows, False, weight.format, weight.dtype, "meta", weight.encoding)
        layer._set_weight(weight)
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

    def sparse_weight(self) -> SparseWeight:
        """The canonical weight, a copy."""
        if self.packed.is_meta:
            raise RuntimeError(
                "weight: the layer is on the meta device and has no data; load a state dict first"
            )
        return SparseWeight.unpack(self.packed_weight, self.spec)

    @property
    def packed_weight(self) -> Packed:
        """The weight as the kernels of its device read it."""
        return Packed(self.packed, self.out_features, self.in_features, self.packing)

    @property
    def format(self) -> Format:
        return self.spec.format

    @property
    def encoding(self) -> Encoding:
        return self.spec.encoding

    @property
    def dtype(self) -> torch.dtype:
        """Of activations, bias and output."""
        return self.spec.dtype

    @property
    def weight(self) -> Tensor:
        """The dense weight `[out_features, in_features]`, made anew on every access: costly, and no Parameter."""
        return self.sparse_weight().dense()

    def to_dense(self) -> nn.Linear:
        """The dense twin; it shares the bias."""
        dense = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        dense.weight = nn.Parameter(self.weight, requires_grad=False)
        dense.register_parameter("bias", self.bias)
        if notes.noted(self) is None and self.format.kind == "nm":
            notes.note(site_of(dense), str(self.format))
        notes.carry(self, dense)
        return dense.train(self.training)

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weight in memory (the bias not counted)."""
        return self.packed.numel()

    @property
    def sparsity(self) -> float:
        """Fraction of the weight's entries that are not kept."""
        return 1.0 - self.nnz / max(1, self.out_features * self.in_features)

    def extra_repr(self) -> str:
        dense = max(1, self.out_features * self.in_features * self.dtype.itemsize)
        values = "" if self.encoding == PLAIN else f"values={self.encoding}, "
        kernels = f"isa={native.isa()}" if self.packed.is_cpu else f"device={self.packed.device}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"format={self.format}, {values}sparsity={self.sparsity:.3f}, dtype={str(self.dtype).removeprefix('torch.')}, "
            f"nbytes={self.nbytes} ({self.nbytes / dense:.2f} of dense), {kernels}"
        )

    def _packing_on_cpu(self) -> int:
        """For a layer without data, which need only know its dtype."""
        form, values = self.format, self.encoding
        if values != PLAIN:
            layout = layout_of_codes(form)
            return packing_code(layout, self.dtype, values.kind, values.group_size, values.scale_dtype)
        return packing_code(native.layout_for(form.kind, form.n, form.m, self.dtype), self.dtype)

    def _set_weight(self, weight: SparseWeight) -> None:
        packed = weight.pack()
        self.spec, self.nnz, self.packing = weight.spec, weight.nnz, packed.packing
        self.register_buffer("packed", packed.blob, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseLinear:
        # The blob is bytes to torch, so a cast or a move has to go through the canonical form. What fn does is seen
        # from what it does to a small tensor of the weight's dtype.
        packed = self.packed
        sample = torch.arange(1, 9, dtype=self.dtype, device=packed.device)
        probe = fn(sample)
        if probe.dtype not in DTYPES:
            raise ValueError(
                f"dtype: must be float32, bfloat16 or float16 for a sparse layer, got {probe.dtype}"
            )
        if packed.is_meta or probe.is_meta or (probe.dtype, probe.device) == (self.dtype, packed.device):
            super()._apply(fn, recurse)
            self.spec = replace(self.spec, dtype=probe.dtype)
            if packed.is_meta or probe.is_meta:
                self.packing = self._packing_on_cpu()
            if not probe.is_meta and (packed.is_meta or not torch.equal(probe, sample)):
                # to_empty(): bytes at random must not pass for a packed weight.
                self._buffers["packed"] = self.packed.new_empty(0)
            return self
        weight = self.sparse_weight().to(dtype=probe.dtype, device=probe.device)
        self._buffers["packed"] = torch.empty(0, dtype=torch.uint8, device=probe.device)
        super()._apply(fn, recurse)
        self._set_weight(weight)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for name, part in self.sparse_weight().parts().items():
            destination[f"{prefix}weight.{name}"] = part
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        own = f"{prefix}weight."
        spec = self.spec
        try:
            if own + SPEC in state_dict:  # it says which parts its weight has
                spec = WeightSpec.from_tensor(state_dict[own + SPEC])
            parts = {name: state_dict[own + name] for name in spec.part_names if own + name in state_dict}
            missing_keys += [own + name for name in spec.part_names if name not in parts]
            if len(parts) == len(spec.part_names):
                self._load_weight(parts, bool(local_metadata.get("assign_to_params_buffers", False)))
        except ValueError as error:
            error_msgs.append(f"{own}{error}")
        known = {own + name for name in spec.part_names}
        rest = {key: value for key, value in state_dict.items() if key not in known}
        super()._load_from_state_dict(
            rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _load_weight(self, parts: dict[str, Tensor], assign: bool) -> None:
        weight = SparseWeight.from_parts(parts)
        if weight.shape != self.spec.shape:
            (rows, cols), got = self.spec.shape, weight.shape
            raise ValueError(f"spec: the layer is {rows} x {cols}, got {got[0]} x {got[1]}")
        device = None if assign or self.packed.is_meta else self.packed.device
        self._set_weight(weight.to(dtype=None if assign else self.dtype, device=device))

    def __deepcopy__(self, memo: dict[int, Any]) -> SparseLinear:
        # A copy within the process may keep the packed form; copy would otherwise go through __getstate__.
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        if not self.packed.is_meta:
            state["_buffers"] = {name: part for name, part in self._buffers.items() if name != "packed"}
            state["_parts"] = self.sparse_weight().parts()
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        parts = state.pop("_parts", None)
        super().__setstate__(state)
        if parts is not None:
            self._set_weight(SparseWeight.from_parts(parts))


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
