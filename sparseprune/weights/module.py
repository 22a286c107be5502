"""What all modules over a packed weight share: casts, moves, copies, pickles, state dicts, and one weight for several."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from sparseprune.kernels import native
from sparseprune.kernels.packing import Packed, packing_code
from sparseprune.weights.encoding import PLAIN, Encoding
from sparseprune.weights.format import Format
from sparseprune.weights.sparse_weight import SparseWeight
from sparseprune.weights.spec import DTYPES, SPEC, WeightSpec

__all__ = ["SparseModule"]


class SparseModule(nn.Module):
    """A module whose frozen weight is kept packed for its device's kernels.

    The weight is the non-persistent `uint8` buffer `packed`, in the form that the kernels of its device read (CPU or
    CUDA); `.to(device)` packs it anew. A state dict holds the parts of its canonical form instead, as `weight.values`,
    `weight.mask` and so on (`SparseWeight.parts`, docs/formats.md), and so does a pickle: both move between machines.
    Loading a state dict takes over the format and casts the values to the module's dtype.

    Several modules may have one weight (`share_weight`), packed once, as an embedding and the head tied to it do.
    """

    packed: Tensor

    def __init__(self, spec: WeightSpec, device: torch.device | str | None) -> None:
        """An all-zero weight, as a place for a state dict; on the meta device without data."""
        super().__init__()
        if spec.dtype not in DTYPES:
            raise TypeError(
                f"dtype: must be float32, bfloat16 or float16 for a sparse layer, got {spec.dtype}"
            )
        self.spec = spec
        self.nnz = 0
        self.packing = self._packing_on_cpu()  # how `packed` is packed (kernels/packing.py)
        self._sharing: _Sharing | None = None
        self.register_buffer("packed", torch.empty(0, dtype=torch.uint8, device="meta"), persistent=False)
        if device is None or torch.device(device).type != "meta":
            zero = SparseWeight.from_dense(
                torch.zeros(spec.shape, dtype=spec.dtype), spec.format, spec.encoding
            )
            self._set_weight(zero.to(device=device))

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
        return Packed(self.packed, *self.spec.shape, self.packing)

    @property
    def format(self) -> Format:
        return self.spec.format

    @property
    def encoding(self) -> Encoding:
        return self.spec.encoding

    @property
    def dtype(self) -> torch.dtype:
        """What the weight computes in."""
        return self.spec.dtype

    @property
    def weight(self) -> Tensor:
        """The dense weight `[rows, cols]`, made anew on every access: costly, and no Parameter."""
        return self.sparse_weight().dense()

    @property
    def nbytes(self) -> int:
        """Bytes of the packed weight in memory, whoever else has it."""
        return self.packed.numel()

    @property
    def sparsity(self) -> float:
        """Fraction of the weight's entries that are not kept."""
        rows, cols = self.spec.shape
        return 1.0 - self.nnz / max(1, rows * cols)

    def share_weight(self, other: SparseModule) -> None:
        """Takes the weight of `other` for its own: from now on it is one, packed once, whatever is done to either.

        Casts, moves and state dicts change it for both; both copied or pickled together (in their model) share it still.

        Raises:
            ValueError: `other` is of another shape.
        """
        if other.spec.shape != self.spec.shape:
            raise ValueError(f"weight: {_shape_rule(self.spec.shape, other.spec.shape)}")
        self._require(other.spec)
        if self._sharing is not None:
            self._sharing.modules.discard(self)
        if other._sharing is None:
            other._sharing = _Sharing()
            other._sharing.modules.add(other)
        self._sharing = other._sharing
        self._sharing.join(self)

    @property
    def shares_weight(self) -> bool:
        """Whether another module has this very weight."""
        return self._sharing is not None and len(self._sharing.modules) > 1

    def _weight_repr(self) -> str:
        rows, cols = self.spec.shape
        dense = max(1, rows * cols * self.dtype.itemsize)
        values = "" if self.encoding == PLAIN else f"values={self.encoding}, "
        kernels = f"isa={native.isa()}" if self.packed.is_cpu else f"device={self.packed.device}"
        return (
            f"format={self.format}, {values}sparsity={self.sparsity:.3f}, dtype={str(self.dtype).removeprefix('torch.')}, "
            f"nbytes={self.nbytes} ({self.nbytes / dense:.2f} of dense{', shared' if self.shares_weight else ''}), {kernels}"
        )

    def _require(self, spec: WeightSpec) -> None:
        """ValueError where the module cannot work with such a weight."""

    def _packing_on_cpu(self) -> int:
        """For a layer without data, which need only know its dtype."""
        form, values = self.format, self.encoding
        if values != PLAIN:
            layout = native.layout_of_codes(form.kind, form.n, form.m)
            return packing_code(layout, self.dtype, values.kind, values.group_size, values.scale_dtype)
        return packing_code(native.layout_for(form.kind, form.n, form.m, self.dtype), self.dtype)

    def _set_weight(self, weight: SparseWeight) -> None:
        packed = weight.pack()
        self._hold(packed.blob, weight.spec, weight.nnz, packed.packing)

    def _hold(self, blob: Tensor, spec: WeightSpec, nnz: int, packing: int) -> None:
        for module in (self,) if self._sharing is None else self._sharing.modules:
            module._buffers["packed"] = blob
            module.spec, module.nnz, module.packing = spec, nnz, packing

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseModule:
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
            self._hold(self.packed, self.spec, self.nnz, self.packing)
            return self
        weight = self.sparse_weight().to(dtype=probe.dtype, device=probe.device)
        weight.require_kernels()  # while the layer still has its own
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
            raise ValueError(f"spec: {_shape_rule(self.spec.shape, weight.shape)}")
        self._require(weight.spec)
        device = None if assign or self.packed.is_meta else self.packed.device
        self._set_weight(weight.to(dtype=None if assign else self.dtype, device=device))

    def __deepcopy__(self, memo: dict[int, Any]) -> SparseModule:
        # A copy within the process may keep the packed form; copy would otherwise go through __getstate__.
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        if twin._sharing is not None:
            twin._sharing.modules.add(twin)
        return twin

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        if not self.packed.is_meta:
            state["_buffers"] = {name: part for name, part in self._buffers.items() if name != "packed"}
            if self._sharing is None:
                state["_parts"] = self.sparse_weight().parts()
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        parts = state.pop("_parts", None)
        super().__setstate__(state)
        if self._sharing is not None:
            self._sharing.join(self)
        elif parts is not None:
            self._set_weight(SparseWeight.from_parts(parts))


class _Sharing:
    """The modules that have one weight, all of which have the same `packed`. It keeps none of them alive."""

    def __init__(self, parts: dict[str, Tensor] | None = None) -> None:
        self.modules: WeakSet[SparseModule] = WeakSet()
        self._parts = parts  # from a pickle, until the first of the modules is there

    def join(self, module: SparseModule) -> None:
        first = next((it for it in self.modules if it is not module), None)
        self.modules.add(module)
        if first is not None:
            module._hold(first.packed, first.spec, first.nnz, first.packing)
        elif self._parts is not None:
            parts, self._parts = self._parts, None
            module._set_weight(SparseWeight.from_parts(parts))

    def __deepcopy__(self, memo: dict[int, Any]) -> _Sharing:
        return _Sharing()  # copies of the modules join it as they are made

    def __reduce__(self) -> tuple[type[_Sharing], tuple[dict[str, Tensor] | None]]:
        first = next(iter(self.modules))
        return _Sharing, (None if first.packed.is_meta else first.sparse_weight().parts(),)


def _shape_rule(own: tuple[int, int], got: tuple[int, int]) -> str:
    return f"the layer is {own[0]} x {own[1]}, got {got[0]} x {got[1]}"
