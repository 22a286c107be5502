"""Zeros that stay zero while anything trains the weights around them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from sparseprune.kernels import ops
from sparseprune.models.sites import WeightSite, find_sites

__all__ = ["Zeros", "hold_zeros"]

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


class Zeros:
    """Which weights of a model are pruned, and the means to keep them so; once one is, it stays so.

    A parameter without zeros has no mask, and one that several layers share has one. While an optimizer is attached,
    or inside `held`:

    - a gradient is masked as soon as `backward()` has accumulated it, before it is clipped, averaged over processes
      or used. The state that an optimizer keeps of it (momentum, exp_avg, exp_avg_sq) is zero there, too;
    - weights are masked after each step, and so is the state of an optimizer that mixes the entries of a weight.

    Masking sets to +0.0; it does not multiply, which would keep NaN and make -0.0.
    """

    def __init__(self, model: nn.Module, layers: Iterable[WeightSite] | None = None) -> None:
        """Takes down the zeros of `layers`; turns those that are -0.0 into +0.0.

        Args:
            layers: by default all linears, the output head too, that have other weights as well: one that is zero as a
                whole (the second factor of an adapter) has not been pruned, but waits to be trained.

        Raises:
            TypeError: a layer whose weight is not a parameter of the model.
        """
        self.model = model
        self._masks: dict[str, _Mask] = {}
        self._grown: set[str] = set()
        self._handles: list[Any] = []
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        for layer in find_sites(model, lm_head=True) if layers is None else layers:
            name = names.get(id(layer.parameter))
            if name is None:
                raise TypeError(
                    f"layers: {layer.name}.{layer.parameter_name} must be a parameter of the model to be trained, got "
                    f"{type(layer.parameter).__name__}; pass a dense model, and its layers"
                )
            gone = layer.parameter.detach() == 0
            if gone.any() and not (layers is None and gone.all()):
                self._masks[name] = _Mask(gone)
        self.apply()

    def copy(self) -> Zeros:
        """The same zeros, to grow apart from these; attached to nothing."""
        twin = object.__new__(Zeros)
        twin.model, twin._masks, twin._grown, twin._handles = (
            self.model, dict(self._masks), set(self._grown), [],
        )  # fmt: skip
        return twin

    def masks(self) -> dict[str, Tensor]:
        """Parameter name -> bool, as the parameter's shape: True where a weight is pruned. Made anew at each call."""
        return {name: mask.pruned() for name, mask in self._masks.items()}

    def set(self, masks: Mapping[str, Tensor]) -> None:
        """Takes `masks`, as `masks()` gives them, for these parameters, and zeroes what they prune."""
        self._masks.update({name: _Mask(pruned) for name, pruned in masks.items()})
        self._grown.update(masks)
        self.apply()

    @property
    def count(self) -> int:
        """How many weights are held at zero."""
        return sum(mask.zeros for mask in self._masks.values())

    @property
    def weights(self) -> int:
        """How many weights the parameters have that have zeros."""
        return sum(mask.shape.numel() for mask in self._masks.values())

    def count_now(self) -> int:
        """How many of those are zero now, held or not."""
        return sum(int((parameter == 0).sum()) for _, parameter in self._each())

    def fraction(self) -> float:
        """Zeros as a fraction of the parameters in which they became more."""
        masks = [self._masks[name] for name in self._grown if name in self._masks]
        return sum(mask.zeros for mask in masks) / max(sum(mask.shape.numel() for mask in masks), 1)

    def digest(self) -> str:
        """Tells one set of zeros from another."""
        digest = hashlib.sha256()
        for name, mask in self._masks.items():
            digest.update(f"{name} {tuple(mask.shape)}".encode())
            digest.update(mask.bits().numpy().tobytes())
        return digest.hexdigest()[:16]

    @contextmanager
    def growing(self) -> Iterator[None]:
        """What is pruned inside is held from then on, in any parameter of two dimensions or more; what was pruned
        earlier is zero again.
        """
        before = _count_zeros(self.model)
        yield
        self.apply()
        parameters = dict(self.model.named_parameters())
        for name, count in _count_zeros(self.model).items():
            mask = self._masks.get(name)
            if mask is not None and mask.shape != parameters[name].shape:
                mask = None  # rows or columns have been cut out: other weights
                del self._masks[name]
            if count > before.get(name, 0):
                self._grown.add(name)
            if mask is not None or name in self._grown:
                self._masks[name] = _Mask(parameters[name].detach() == 0)

    @torch.no_grad()
    def apply(self) -> None:
        """Sets the weights to +0.0 at the pruned positions."""
        for mask, parameter in self._each():
            mask.apply_(parameter.detach())

    @torch.no_grad()
    def apply_to_gradients(self) -> None:
        """The same for gradients: only for those that no `backward()` has accumulated while these were attached."""
        for mask, parameter in self._each():
            _mask_gradient(mask, parameter)

    @torch.no_grad()
    def apply_to_state(self, optimizer: Optimizer) -> None:
        """The same for each tensor of an optimizer's state that has the shape of its weight."""
        for mask, parameter in self._each():
            for value in optimizer.state.get(parameter, {}).values():
                if isinstance(value, Tensor) and value.shape == mask.shape:
                    mask.apply_(value)

    def attach(self, optimizer: Optimizer | None = None) -> Zeros:
        """From now on weights, gradients and the optimizer's state stay zero, see the class; `detach` ends it.

        A gradient that a program writes by itself, without `backward()`, needs `apply_to_gradients()`.

        Args:
            optimizer: None means any of torch's that makes a step, as long as it lasts. What such a one remembers from
                before moves no weight for longer than its step.
        """

        def after_step(stepped: Optimizer, *_: object) -> None:
            self.apply()
            if not isinstance(stepped, _ELEMENTWISE):
                self.apply_to_state(stepped)

        self.apply()
        self.apply_to_gradients()
        on_step: Callable[..., Any] = register_optimizer_step_post_hook
        if optimizer is not None:
            self.apply_to_state(optimizer)
            on_step = optimizer.register_step_post_hook
            self._handles.append(optimizer.register_load_state_dict_post_hook(self.apply_to_state))
        self._handles.append(on_step(after_step))
        for mask, parameter in self._each():
            if parameter.requires_grad:
                hook = partial(_mask_gradient, mask)
                self._handles.append(parameter.register_post_accumulate_grad_hook(hook))
        return self

    def detach(self) -> None:
        """Lets go of everything attached to: the zeros are free to become weights."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @contextmanager
    def held(self, optimizer: Optimizer | None = None) -> Iterator[Zeros]:
        """`attach` inside, `detach` at the end, where what is pruned is zero however it was changed."""
        self.attach(optimizer)
        try:
            yield self
        finally:
            self.detach()
            self.apply()

    def _each(self) -> Iterator[tuple[_Mask, nn.Parameter]]:
        """Masks and what they are of; a parameter that is gone, or of another shape now, has none."""
        parameters = dict(self.model.named_parameters())
        for name, mask in self._masks.items():
            parameter = parameters.get(name)
            if parameter is not None and parameter.shape == mask.shape:
                yield mask, parameter


@contextmanager
def hold_zeros(
    model: nn.Module, optimizer: Optimizer | None = None, layers: Iterable[WeightSite] | None = None
) -> Iterator[Zeros]:
    """The zeros of the model's linears stay zero inside, whatever loop trains it; see `Zeros`.

    Args:
        optimizer: the loop's; None means any of torch's. A loop that changes weights without one finds the zeros in
            their places when the block ends.
        layers: whose zeros, as `sparseprune.models.sites.find_sites` gives them; by default all.

    Raises:
        ValueError: no linear layer has a zero.
    """
    if optimizer is not None and not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"optimizer: must be a torch.optim.Optimizer, got {optimizer!r}; leave it out for any"
        )
    zeros = Zeros(model, layers)
    if not zeros.count:
        raise ValueError(
            f"model: {type(model).__name__} has no linear layer with zeros to keep; prune it first"
        )
    with zeros.held(optimizer):
        yield zeros


class _Mask:
    """One parameter's zeros; on a CPU a bit for each entry: `masked_fill_` takes 25 times as long, its branches are
    unpredictable. Other devices have no operation on bits.
    """

    def __init__(self, pruned: Tensor) -> None:
        self.shape = pruned.shape
        self.zeros = int(pruned.sum())
        self._pruned = None if pruned.is_cpu else pruned
        self._bits = ops.pack_mask(~_matrix(pruned)) if pruned.is_cpu else None

    def bits(self) -> Tensor:
        """Of what is kept, on the CPU."""
        return ops.pack_mask(~_matrix(self.pruned().cpu())) if self._bits is None else self._bits

    def pruned(self) -> Tensor:
        if self._bits is None:
            assert self._pruned is not None
            return self._pruned
        columns = self.shape[1:].numel() if len(self.shape) > 1 else self.shape.numel()
        return (~ops.unpack_mask(self._bits, columns)).reshape(self.shape)

    def apply_(self, tensor: Tensor) -> None:
        if (
            self._bits is not None
            and tensor.is_cpu
            and tensor.is_contiguous()
            and tensor.dtype in _PACKED_DTYPES
        ):
            ops.mask_apply_packed_(_matrix(tensor), self._bits)
        else:
            tensor.masked_fill_(self.pruned().to(tensor.device), 0)


def _matrix(tensor: Tensor) -> Tensor:
    """[rows, columns], a view where the tensor is contiguous."""
    return tensor.reshape(len(tensor), -1) if tensor.ndim > 1 else tensor.reshape(1, -1)


def _mask_gradient(mask: _Mask, parameter: Tensor) -> None:
    if parameter.grad is not None:
        mask.apply_(parameter.grad)


def _count_zeros(model: nn.Module) -> dict[str, int]:
    """Of each parameter with two dimensions or more."""
    return {
        name: parameter.numel() - int(parameter.detach().count_nonzero())
        for name, parameter in model.named_parameters()
        if parameter.ndim > 1
    }
