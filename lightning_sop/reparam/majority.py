"""Majority Kernels: k kernels per weight, randomly mixed at each step, averaged for inference (arXiv 2402.05033)."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lightning_sop.reparam.base import Method, Site

Draw = Literal["uniform", "dirichlet", "softmax_normal", "one_hot"]
Granularity = Literal["layer", "step", "out_channel"]
Init = Literal["independent", "spread"]


class MajorityKernels(Method):
    """Train each weight as a random convex combination of k kernels; deploy their mean (Mazzawi et al., arXiv 2402.05033).

    With kernels W₁ … W_k and a mix v on the simplex, drawn anew after every optimizer step, W = Σᵢ vᵢ Wᵢ while training and
    W = (1/k) Σᵢ Wᵢ otherwise. The gradient of Wᵢ is s vᵢ ∂L/∂W with s = ``gradient_scale``. With s = k (default), plain SGD
    moves the mean kernel exactly as it would move the plain weight, weight decay included.

    The paper's abstract fixes the mixing and the averaging; the distribution of the mix, what shares one draw, and the
    initialization are this package's choices and therefore options.

    Args:
        factor: k, the number of kernels for one weight; 1 trains exactly the plain network.
        draw: ``"uniform"`` (k uniform numbers divided by their sum), ``"dirichlet"`` (with ``alpha``),
            ``"softmax_normal"`` (softmax of k standard normal numbers) or ``"one_hot"`` (one kernel at a time).
        alpha: concentration of the Dirichlet draw; larger is closer to the mean. Ignored by the other draws.
        granularity: what shares a mix: each ``"layer"`` has its own, all layers of a ``"step"`` share one, or every
            ``"out_channel"`` of every layer has its own.
        init: ``"spread"``: kernels W₀ + ``spread`` r (εᵢ - ε̄) with εᵢ standard normal and r the root mean square of W₀.
            ``"independent"``, not for weights that are trained already: the same with √k instead of ``spread``. For a
            Gaussian W₀ these are k independent Gaussian kernels of k times its variance, so their mean has the variance of
            the plain initialization. Either way the mean of the kernels is W₀, to rounding.
        spread: relative size of the deviations for ``init="spread"``; 0 starts from k equal copies.
        anneal: last part of the training, in [0, 1], over which the mix shrinks linearly to the mean; 0 never does.
        gradient_scale: s above; None means ``factor``.

    Raises:
        ValueError: an argument is outside its range; the message names it.
    """

    def __init__(
        self,
        factor: int = 4,
        draw: Draw = "uniform",
        alpha: float = 1.0,
        granularity: Granularity = "layer",
        init: Init = "spread",
        spread: float = 0.1,
        anneal: float = 1.0,
        gradient_scale: float | None = None,
    ) -> None:
        if isinstance(factor, bool) or not isinstance(factor, int) or factor < 1:
            raise ValueError(f"MajorityKernels: factor must be a whole number of kernels, at least 1, not {factor!r}")
        for name, value, allowed in (
            ("draw", draw, Draw),
            ("granularity", granularity, Granularity),
            ("init", init, Init),
        ):
            if value not in get_args(allowed):
                raise ValueError(f"MajorityKernels: {name} must be one of {', '.join(get_args(allowed))}, not {value!r}")
        if not (math.isfinite(alpha) and alpha > 0):
            raise ValueError(f"MajorityKernels: alpha must be positive, not {alpha!r}")
        if not (math.isfinite(spread) and spread >= 0):
            raise ValueError(f"MajorityKernels: spread must be 0 or positive, not {spread!r}")
        if not 0 <= anneal <= 1:
            raise ValueError(f"MajorityKernels: anneal is a part of the training in [0, 1], not {anneal!r}")
        if gradient_scale is not None and not (math.isfinite(gradient_scale) and gradient_scale > 0):
            raise ValueError(f"MajorityKernels: gradient_scale must be positive or None, not {gradient_scale!r}")
        self.factor = factor
        self.draw_name: Draw = draw
        self.alpha = alpha
        self.granularity: Granularity = granularity
        self.init: Init = init
        self.spread = spread
        self.anneal = anneal
        self.gradient_scale = float(factor) if gradient_scale is None else float(gradient_scale)

    @property
    def settings(self) -> dict[str, Any]:
        """The number of kernels: the only setting that the shape of a checkpoint depends on."""
        return {"factor": self.factor}

    def describe(self) -> str:
        """The factor, and what differs from the defaults."""
        chosen = {"factor": self.factor}
        for name, parameter in inspect.signature(MajorityKernels).parameters.items():
            value = getattr(self, {"draw": "draw_name"}.get(name, name))
            default = float(self.factor) if name == "gradient_scale" else parameter.default
            if name != "factor" and value != default:
                chosen[name] = value
        return f"MajorityKernels({', '.join(f'{name}={value}' for name, value in chosen.items())})"

    def build(self, weight: Tensor, site: Site, generator: torch.Generator, *, near: bool = False) -> list[Tensor]:
        """One tensor of shape ``(k, *weight.shape)`` whose mean over k is the weight."""
        weight = weight.detach()
        stack = _stack_like(weight, self.factor)
        scale = self.spread if near or self.init == "spread" else math.sqrt(self.factor)
        if self.factor == 1 or scale == 0:
            return [stack.copy_(weight)]
        exact = weight.to(torch.promote_types(weight.dtype, torch.float32))
        noise = torch.randn((self.factor, *weight.shape), generator=generator, device="cpu").to(exact)
        noise -= noise.mean(0)
        rms = exact.square().mean().sqrt()
        return [stack.copy_(exact + scale * rms * noise)]

    def parameters(self, storage: Sequence[Tensor]) -> list[Tensor]:
        """The k kernels, each of the weight's own shape, as views of one buffer."""
        return list(storage[0].unbind(0))

    def draw(self, sites: Sequence[Site], generator: torch.Generator, progress: float) -> list[Tensor]:
        """Mixes of shape ``(k,)``, or ``(k, out_channels)`` for ``granularity="out_channel"``; each sums to 1 over k."""
        if self.granularity == "out_channel":
            widths = [site.shape[site.out_axis] for site in sites]
        else:
            widths = [1] if self.granularity == "step" else [1] * len(sites)
        mixes = self._simplex(sum(widths), generator)
        strength = self.strength(progress)
        if strength < 1:
            mixes = 1 / self.factor + strength * (mixes - 1 / self.factor)
        if self.granularity == "out_channel":
            return list(torch.split(mixes, widths, dim=1))
        columns = list(mixes.unbind(1))
        return columns * len(sites) if self.granularity == "step" else columns

    def strength(self, progress: float) -> float:
        """What ``anneal`` leaves of the mix's deviation from the mean, when that part of the training is done."""
        if not self.anneal or progress <= 1 - self.anneal:
            return 1.0
        return max(0.0, (1 - progress) / self.anneal)

    def _simplex(self, count: int, generator: torch.Generator) -> Tensor:
        """``count`` draws as columns of a ``(k, count)`` tensor."""
        shape = (count, self.factor)
        if self.draw_name == "one_hot":
            choice = torch.randint(self.factor, (count,), generator=generator, device="cpu")
            return torch.nn.functional.one_hot(choice, self.factor).double().T
        if self.draw_name == "softmax_normal":
            return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").softmax(1).T
        # in (0, 1]: the sum is never zero
        uniform = 1 - torch.rand(shape, generator=generator, dtype=torch.float64, device="cpu")
        if self.draw_name == "dirichlet":
            # Gamma(a) is Gamma(a + 1) times U^(1/a), here as logarithms: for a small alpha all of them would underflow.
            concentration = torch.full(shape, self.alpha + 1, dtype=torch.float64, device="cpu")
            gamma = torch._standard_gamma(concentration, generator=generator)
            return (gamma.log() + uniform.log() / self.alpha).softmax(1).T
        return (uniform / uniform.sum(1, keepdim=True)).T

    def compose(self, phi: Sequence[Tensor], mix: Tensor, site: Site) -> Tensor:
        """Σ_i v_i W_i."""
        first, *rest = self._factors(mix, phi[0], site)
        total = phi[0] * first
        for factor, kernel in zip(rest, phi[1:], strict=True):
            total = total + kernel * factor
        return total

    def collapse(self, phi: Sequence[Tensor], site: Site) -> Tensor:
        """The mean of the kernels, summed in at least float32."""
        if self.factor == 1:
            return phi[0]
        first, second, *rest = phi
        dtype = torch.promote_types(first.dtype, torch.float32)
        return self._mean(first.to(dtype) + second, rest).to(first.dtype)

    def _mean(self, total: Tensor, rest: Sequence[Tensor]) -> Tensor:
        """In place: the mean of the kernels from the sum of two and the others."""
        for kernel in rest:
            total.add_(kernel)
        return total.div_(self.factor)

    def shift(self, phi: Sequence[Tensor], before: Tensor, after: Tensor, site: Site) -> None:
        """Every kernel moves as the weight did: the differences between kernels stay."""
        if self.factor == 1:
            phi[0].copy_(after)  # exact, where adding the difference would round
            return
        delta = after - before
        for kernel in phi:
            kernel.add_(delta)

    def write(self, weight: Tensor, phi: Sequence[Tensor], mix: Tensor | None, site: Site) -> None:
        """As the default, without temporaries: this runs once per weight and step."""
        low_precision = torch.finfo(weight.dtype).bits < 32
        if low_precision or weight.stride() != phi[0].stride() or (mix is not None and mix.dim() > 1):
            kernels = [kernel.float() for kernel in phi] if low_precision else phi
            weight.copy_(self.collapse(kernels, site) if mix is None else self.compose(kernels, mix, site))
        elif self.factor == 1:
            weight.copy_(phi[0])
        elif mix is None:  # to the same bits as collapse()
            self._mean(torch.add(phi[0], phi[1], out=weight), phi[2:])
        else:
            # Σ v_i W_i with Σ v_i = 1, as a chain of means of two kernels: less traffic than a sum of products.
            mean, (total, *rest) = phi[0], mix.tolist()
            for share, kernel in zip(rest, phi[1:], strict=True):
                total += share
                mean = torch.lerp(mean, kernel, share / total if total else 0.0, out=weight)

    def pull_back(self, phi: Sequence[Tensor], mix: Tensor | None, grad: Tensor, site: Site, out: Sequence[Tensor]) -> None:
        """Closed form: s v_i ∂L/∂W for each kernel (v_i = 1/k where the weight was the mean)."""
        if mix is None:
            mix = torch.full((self.factor,), 1 / self.factor, dtype=torch.float64, device="cpu")
        shares = mix * self.gradient_scale
        if shares.dim() == 1 and grad.device.type == "cpu" and grad.dtype in (torch.float32, torch.float64):
            column = shares.to(grad.dtype).view(-1, *[1] * grad.dim())
            torch.mul(grad.unsqueeze(0), column, out=out[0])  # one pass over the gradient
            return
        for share, target in zip(self._factors(shares, grad, site), out[0], strict=True):
            torch.mul(grad, share, out=target)

    def _factors(self, mix: Tensor, like: Tensor, site: Site) -> Sequence[float | Tensor]:
        """What multiplies each kernel: numbers, or one value per output channel shaped to broadcast."""
        if mix.dim() == 1:
            return list(map(float, mix.tolist()))
        return [site.per_output(row) for row in mix.to(like.device, like.dtype, non_blocking=True)]

    def expanded_numel(self, site: Site) -> int:
        """K times the weight."""
        return self.factor * math.prod(site.shape)


def _stack_like(weight: Tensor, factor: int) -> Tensor:
    """Empty memory for the kernels, each with the weight's own strides (channels_last stays fast)."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    dense = weight.dim() in formats and weight.is_contiguous(memory_format=formats[weight.dim()])
    strides = weight.stride() if dense else torch.empty(weight.shape, device="meta").stride()
    return weight.new_empty_strided((factor, *weight.shape), (weight.numel(), *strides))
