"""Zeros that stay zero while any optimizer trains the weights around them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparseprune.kernels import ops
from sparseprune.models.sites import WeightSite, find_sites

__all__ = ["SparsityMasks", "freeze_zeros"]

# Where weight, gradient and state are zero, a step of these leaves all three zero, because each treats a weight on
# its own: their state need not be masked again after every step. The tests hold every one of them to that.
_ELEMENTWISE = (
    torch.optim.SGD,
    torch.optim.Adam,  # and AdamW
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.Adagrad,
    torch.optim.RMSprop,
    torch.optim.Adadelta,
)

_PACKED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class SparsityMasks:
    """The zeros of a model's weights, as they are now, and the means to keep them.

    A layer without zeros has no mask, and a weight that several layers share has one.

    Inside `enforce(optimizer)`:

    - a gradient is masked as soon as `backward()` has accumulated it, before it is clipped, averaged over processes
      or used. The state that an optimizer keeps of it (momentum, exp_avg, exp_avg_sq) is zero there, too;
    - weights are masked after each step, and so is the state of an optimizer that mixes the entries of a weight.

    Masking sets to +0.0; it does not multiply, which would keep NaN and make -0.0.
    """

    def __init__(self, layers: Sequence[WeightSite]) -> None:
        """Takes down the zeros of `layers`; turns those that are -0.0 into +0.0."""
        self._masks: dict[str, _Mask] = {}
        self._parameters: dict[str, nn.Parameter] = {}
        self._handles: list[Any] = []
        for layer in layers:
            parameter = layer.parameter
            if not isinstance(parameter, nn.Parameter):
                raise TypeError(
                    f"layers: {layer.name}.weight must be a Parameter to be trained, got "
                    f"{type(parameter).__name__}; pass a dense model"
                )
            pruned = parameter.detach() == 0
            if pruned.any():
                self._masks[layer.name] = _Mask(pruned)
                self._parameters[layer.name] = parameter
        self.apply()

    @classmethod
    def of(
        cls,
        model: nn.Module,
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        lm_head: bool = False,
    ) -> SparsityMasks:
        """The zeros of a model's linear layers (see `sparseprune.models.sites.find_sites`)."""
        return cls(find_sites(model, include=include, exclude=exclude, lm_head=lm_head))

    @property
    def pruned(self) -> dict[str, Tensor]:
        """Layer name -> bool tensor of its weight's stored shape, True where it is zero. Made anew at each access."""
        return {name: mask.pruned() for name, mask in self._masks.items()}

    @property
    def zeros(self) -> int:
        return sum(mask.zeros for mask in self._masks.values())

    @property
    def weights(self) -> int:
        """Number of weights in the layers that have zeros."""
        return sum(parameter.numel() for parameter in self._parameters.values())

    def count_zeros(self) -> int:
        """How many of them are zero now."""
        return sum(int((parameter == 0).sum()) for parameter in self._parameters.values())

    def digest(self) -> str:
        """Tells one set of zeros from another."""
        digest = hashlib.sha256()
        for name, mask in self._masks.items():
            digest.update(f"{name} {tuple(mask.shape)}".encode())
            digest.update(mask.bits.cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    @torch.no_grad()
    def apply(self) -> None:
        """Sets the weights to +0.0 at the pruned positions."""
        for name, mask in self._masks.items():
            mask.apply_(self._parameters[name].detach())

    @torch.no_grad()
    def apply_to_gradients(self) -> None:
        """The same for gradients: only for those that no `backward()` inside `enforce` has accumulated."""
        for name, mask in self._masks.items():
            _mask_gradient(mask, self._parameters[name])

    @torch.no_grad()
    def apply_to_state(self, optimizer: Optimizer) -> None:
        """The same for each tensor of an optimizer's state that has the shape of its weight."""
        for name, mask in self._masks.items():
            for value in optimizer.state.get(self._parameters[name], {}).values():
                if isinstance(value, Tensor) and value.shape == mask.shape:
                    mask.apply_(value)

    def attach(self, optimizer: Optimizer) -> None:
        """Keeps weights, gradients and the optimizer's state zero from now on; see the class.

        A gradient that a program writes by itself, without `backward()`, needs `apply_to_gradients()`.
        """
        elementwise = isinstance(optimizer, _ELEMENTWISE)

        def after_step(optimizer: Optimizer, *_: object) -> None:
            self.apply()
            if not elementwise:
                self.apply_to_state(optimizer)

        self.apply()
        self.apply_to_gradients()
        self.apply_to_state(optimizer)
        self._handles.append(optimizer.register_step_post_hook(after_step))
        self._handles.append(optimizer.register_load_state_dict_post_hook(self.apply_to_state))
        for name, mask in self._masks.items():
            parameter = self._parameters[name]
            if parameter.requires_grad:
                hook = partial(_mask_gradient, mask)
                self._handles.append(parameter.register_post_accumulate_grad_hook(hook))

    def detach(self) -> None:
        """Lets go of every optimizer attached to: the zeros are free to become weights."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @contextmanager
    def enforce(self, optimizer: Optimizer) -> Iterator[SparsityMasks]:
        """`attach` inside, `detach` at the end."""
        self.attach(optimizer)
        try:
            yield self
        finally:
            self.detach()


class _Mask:
    """One weight's zeros, as a bit an entry: `masked_fill_` takes 25 times as long, its branches are unpredictable."""

    def __init__(self, pruned: Tensor) -> None:
        self.shape = pruned.shape
        self.zeros = int(pruned.sum())
        self.bits = ops.pack_mask(~pruned.cpu())
        # other devices than the CPU have no operation on bits
        self._on_device = None if pruned.is_cpu else pruned

    def pruned(self) -> Tensor:
        return ~ops.unpack_mask(self.bits, self.shape[1]) if self._on_device is None else self._on_device

    def apply_(self, tensor: Tensor) -> None:
        if self._on_device is None and tensor.is_contiguous() and tensor.dtype in _PACKED_DTYPES:
            ops.mask_apply_packed_(tensor, self.bits)
        else:
            tensor.masked_fill_(self.pruned(), 0)


def _mask_gradient(mask: _Mask, parameter: Tensor) -> None:
    if parameter.grad is not None:
        mask.apply_(parameter.grad)


def freeze_zeros(
    model: nn.Module,
    optimizer: Optimizer,
    include: str | Sequence[str] | None = None,
    *,
    exclude: str | Sequence[str] | None = None,
    lm_head: bool = False,
) -> SparsityMasks:
    """From now on `optimizer` trains the model's linear layers around their zeros, in a training loop of your own.

    Args:
        include, exclude, lm_head: which layers, see `sparseprune.models.sites.find_sites`.

    Returns:
        The masks; their `detach()` ends it.

    Raises:
        ValueError: no linear layer has a zero.
    """
    masks = SparsityMasks.of(model, include, exclude, lm_head)
    if not masks.zeros:
        raise ValueError(
            f"model: {type(model).__name__} has no linear layer with zeros to keep; prune it first"
        )
    masks.attach(optimizer)
    return masks
