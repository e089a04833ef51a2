"""One call per decomposition: plan and apply in one."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from decomp.applying import decompose
from decomp.network.selection import Selector
from decomp.planning.planner import Scope


def tucker(
    model: nn.Module,
    ranks: Any = "vbmf",
    *,
    layers: Selector = None,
    exclude: Selector = (),
    example_inputs: Any = None,
    data: Any = None,
    inputs: Callable[[Any], Any] | None = None,
    finetune: bool | Mapping[str, Any] = False,
    asymmetric: bool = False,
    inplace: bool = False,
    progress: bool | None = None,
    solver: Any = None,
) -> nn.Module:
    """Return the model with smaller layers: Tucker-2 on spatial convolutions, SVD on linear and 1x1 ones.

    K[t, s, i, j] ~= sum_{a, b} U[t, a] C[a, b, i, j] V[s, b] becomes 1x1, k x k and 1x1 convolutions; W ~= B A
    becomes two linear layers or 1x1 convolutions. A layer is replaced only where its parameters and its MACs
    both fall. The result carries its plan as ``decomp_plan``: ``print(small.decomp_plan)``.

    Args:
        model: any ``nn.Module``. It is left as it is, unless ``inplace``.
        ranks: a rule's name ("vbmf"), a rule (``decomp.ranks.energy(0.9)``), an int, a tuple (out, in), a mapping
            from globs of layer names to any of these (the last match wins), or a :class:`Plan`.
        layers: which layers: a glob on names, an exact type, a predicate (name, module) -> bool, or several.
        exclude: which of these stay dense, written likewise.
        example_inputs: a batch as the model is called with, to count MACs at its sizes. Without it MACs are
            compared in the limit of large inputs.
        data: batches as the model is called with, or what :func:`decomp.calibrate` made of them. The factors then
            minimize the error of each layer's output on them, and energy, error and budgets are about that error.
        inputs: what the model is called with, from a batch: ``lambda batch: batch[0]`` where labels come with it.
        finetune: True, or arguments of :func:`decomp.finetune_layerwise` as a mapping: train the factors layer by
            layer on ``data``; the report is the attribute ``decomp_finetuning`` of the result.
        asymmetric: decompose layer after layer, each for the inputs that it gets in the network compressed so far
            and for the outputs of the dense one (Zhang et al. 2016, section 3.3); with ``finetune`` it is trained
            before the next one is decomposed. Takes a pass over ``data`` per layer, several where it is large.
        inplace: change ``model`` itself. Every factor is computed before the first swap.
        progress: show progress bars; by default where there is a terminal.
        solver: takes the place of HOOI: ``tensorly.decomposition.partial_tucker``, or a function like it.

    Raises:
        ValueError: no layer would be replaced (the message says why), a weight is not finite, or ranks do not fit.
        TypeError: the model is compiled, scripted or wrapped, or an argument has the wrong type.

    Source: Kim et al. 2016 (Compression of deep convolutional neural networks for fast and low power mobile
    applications), sections 3.1 and 3.2. An optimizer made before the call knows none of the new parameters:
    make it afterwards.

    >>> import torch
    >>> _ = torch.manual_seed(0)
    >>> small = tucker(nn.Sequential(nn.Conv2d(32, 64, 3), nn.ReLU()), ranks=(16, 8))
    >>> small[0]
    TuckerConv(
      ranks=(16, 8)
      (reduce): Conv2d(32, 8, kernel_size=(1, 1), stride=(1, 1), bias=False)
      (core): Conv2d(8, 16, kernel_size=(3, 3), stride=(1, 1), bias=False)
      (expand): Conv2d(16, 64, kernel_size=(1, 1), stride=(1, 1))
    )
    """
    scope = Scope(layers, exclude, example_inputs, data, inputs, progress)
    return decompose(model, "tucker", {"solver": solver}, ranks, scope, finetune, inplace, asymmetric)


def svd(
    model: nn.Module,
    ranks: Any = "vbmf",
    *,
    layers: Selector = None,
    exclude: Selector = (),
    example_inputs: Any = None,
    data: Any = None,
    inputs: Callable[[Any], Any] | None = None,
    finetune: bool | Mapping[str, Any] = False,
    asymmetric: bool = False,
    inplace: bool = False,
    progress: bool | None = None,
    fold: str = "channel",
) -> nn.Module:
    """Return the model with smaller layers: SVD of matrices, and of kernels folded to matrices.

    W ~= B A for linear layers and 1x1 convolutions; a spatial kernel is folded first. ``fold="channel"``
    (T x S k^2, Zhang et al. 2016) gives k x k and 1x1; ``"input"`` (S x T k^2) 1x1 and k x k; ``"spatial"``
    (S kh x T kw, Jaderberg et al. 2014, scheme 2) k x 1 and 1 x k. The rank is one number r. The other arguments,
    errors and what comes back are those of :func:`tucker`.

    Source: Denton et al. 2014, section 3.2; Girshick 2015, section 3.1.

    >>> small = svd(nn.Sequential(nn.Conv2d(32, 64, 3)), ranks=8, fold="spatial")
    >>> small[0].first.weight.shape, small[0].second.weight.shape
    (torch.Size([8, 32, 3, 1]), torch.Size([64, 8, 1, 3]))
    """
    scope = Scope(layers, exclude, example_inputs, data, inputs, progress)
    return decompose(model, "svd", {"fold": fold}, ranks, scope, finetune, inplace, asymmetric)


def cp(
    model: nn.Module,
    ranks: Any = "vbmf",
    *,
    layers: Selector = None,
    exclude: Selector = (),
    example_inputs: Any = None,
    data: Any = None,
    inputs: Callable[[Any], Any] | None = None,
    finetune: bool | Mapping[str, Any] = False,
    asymmetric: bool = False,
    inplace: bool = False,
    progress: bool | None = None,
    modes: int = 3,
    solver: Any = None,
) -> nn.Module:
    """Return the model with smaller layers: CP on spatial convolutions, SVD on linear and 1x1 ones.

    K[t, s, i, j] ~= sum_r A[t, r] B[s, r] C[i, j, r] becomes 1x1, depthwise k x k, 1x1 (``modes=3``); with
    ``modes=4`` C is split along the axes: 1x1, depthwise k x 1, depthwise 1 x k, 1x1. The rank is one number R.
    Fitted by alternating least squares, then corrected so that terms do not grow against each other; the plan
    notes sum_r ||term r||^2 / ||K||^2. CP has no spectrum: a spectral rule takes the largest R that costs no more
    than the Tucker-2 of that rule. ``solver`` is ``tensorly.decomposition.parafac`` or a function like it. The
    other arguments, errors and what comes back are those of :func:`tucker`.

    Source: Lebedev et al. 2015 (four modes); Phan et al. 2020 (three modes, error-preserving correction).

    >>> small = cp(nn.Sequential(nn.Conv2d(32, 64, 3)), ranks=16)
    >>> [tuple(factor.weight.shape) for factor in small[0].children()]
    [(16, 32, 1, 1), (16, 1, 3, 3), (64, 16, 1, 1)]
    """
    scope = Scope(layers, exclude, example_inputs, data, inputs, progress)
    return decompose(model, "cp", {"modes": modes, "solver": solver}, ranks, scope, finetune, inplace, asymmetric)


def block_term(
    model: nn.Module,
    ranks: Any = "vbmf",
    *,
    layers: Selector = None,
    exclude: Selector = (),
    example_inputs: Any = None,
    data: Any = None,
    inputs: Callable[[Any], Any] | None = None,
    finetune: bool | Mapping[str, Any] = False,
    asymmetric: bool = False,
    inplace: bool = False,
    progress: bool | None = None,
    blocks: int = 4,
) -> nn.Module:
    """Return the model with smaller layers: block-term on spatial convolutions, SVD on linear and 1x1 ones.

    K ~= sum_g C_g x1 U_g x2 V_g, a sum of ``blocks`` Tucker-2 terms, becomes 1x1, k x k in groups, 1x1. Ranks are
    (G, out, in), out and in per block; an int fills these two. One block is Tucker-2, blocks of rank 1 are CP. A
    spectral rule takes the largest ranks that cost no more than its Tucker-2. The other arguments, errors and
    what comes back are those of :func:`tucker`.

    Source: De Lathauwer 2008 (Decompositions of a higher-order tensor in block terms, part II).

    >>> small = block_term(nn.Sequential(nn.Conv2d(32, 64, 3)), ranks=8, blocks=2)
    >>> small[0].ranks, small[0].core.groups
    ((2, 8, 8), 2)
    """
    scope = Scope(layers, exclude, example_inputs, data, inputs, progress)
    return decompose(model, "block_term", {"blocks": blocks}, ranks, scope, finetune, inplace, asymmetric)


def separable(
    model: nn.Module,
    ranks: Any = "vbmf",
    *,
    layers: Selector = None,
    exclude: Selector = (),
    example_inputs: Any = None,
    data: Any = None,
    inputs: Callable[[Any], Any] | None = None,
    finetune: bool | Mapping[str, Any] = False,
    asymmetric: bool = False,
    inplace: bool = False,
    progress: bool | None = None,
    scheme: str = "spatial",
) -> nn.Module:
    """Return the model with smaller layers: separable filters on spatial convolutions, SVD on the others.

    ``scheme`` says which filters are shared: ``"spatial"`` k x 1 and 1 x k over all channels (Jaderberg et al.
    2014, scheme 2); ``"channelwise"`` m separable filters per input channel (their scheme 1);
    ``"depthwise_pointwise"`` and ``"pointwise_depthwise"`` m whole filters per input or output channel (Guo et
    al. 2018); ``"shared_bank"`` m separable filters for all channels (Rigamonti et al. 2013). The rank is that
    number m, or r. The other arguments, errors and what comes back are those of :func:`tucker`.

    >>> small = separable(nn.Sequential(nn.Conv2d(32, 64, 3)), ranks=2, scheme="depthwise_pointwise")
    >>> [tuple(factor.weight.shape) for factor in small[0].children()]
    [(64, 1, 3, 3), (64, 64, 1, 1)]
    """
    scope = Scope(layers, exclude, example_inputs, data, inputs, progress)
    return decompose(model, "separable", {"scheme": scheme}, ranks, scope, finetune, inplace, asymmetric)


def flattened(
    model: nn.Module,
    ranks: Any = "vbmf",
    *,
    layers: Selector = None,
    exclude: Selector = (),
    example_inputs: Any = None,
    data: Any = None,
    inputs: Callable[[Any], Any] | None = None,
    finetune: bool | Mapping[str, Any] = False,
    asymmetric: bool = False,
    inplace: bool = False,
    progress: bool | None = None,
) -> nn.Module:
    """Return the model with smaller layers: flattened filters on spatial convolutions, SVD on the others.

    K[t, s, i, j] ~= sum_m a[t, m, s] v[t, m, i] h[t, m, j] becomes 1x1, depthwise k x 1 and 1 x k with m terms for
    each output channel. The rank is m; the paper trains m = 1. Lossy: fine-tune afterwards. The other arguments,
    errors and what comes back are those of :func:`tucker`.

    Source: Jin, Dundar and Culurciello 2015 (Flattened convolutional neural networks), section 3.

    >>> small = flattened(nn.Sequential(nn.Conv2d(32, 64, 3)), ranks=1)
    >>> [tuple(factor.weight.shape) for factor in small[0].children()]
    [(64, 32, 1, 1), (64, 1, 3, 1), (64, 1, 1, 3)]
    """
    scope = Scope(layers, exclude, example_inputs, data, inputs, progress)
    return decompose(model, "flattened", {}, ranks, scope, finetune, inplace, asymmetric)
