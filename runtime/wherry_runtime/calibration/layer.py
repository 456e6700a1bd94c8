"""One layer of a model that is quantized with what is known of its inputs."""

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import get_args

import torch

from wherry_runtime.calibration.checkpoint import Source
from wherry_runtime.calibration.folds import Fold, folds
from wherry_runtime.calibration.matrices import Matrix, linears, matrices
from wherry_runtime.calibration.states import States, rows
from wherry_runtime.calibration.walk import Reached, Walk
from wherry_runtime.layers.linear import Linear
from wherry_runtime.layers.norm import RMSNorm
from wherry_runtime.loading.errors import ModelError
from wherry_runtime.models.layout import Origin, vector_name
from wherry_runtime.quantization.recipes.base import Recipe, Settings
from wherry_runtime.quantization.solvers.inputs import Inputs
from wherry_runtime.quantization.storage import Role

log = logging.getLogger(__name__)

MOST_SUMS = 1 << 30  # bytes of sums over inputs that are held at once, if one matrix does not take more
Tensors = dict[str, torch.Tensor]
Round = Callable[[Matrix, Inputs], tuple[torch.Tensor, Tensors]]  # → weights [N, K], and what to write


class LayerQuantizer:
    """Rounds a layer's matrices in place.

    Args:
        states: its inputs are there, and its outputs are put there.
        round_: of one matrix.
        origins: of the model's matrices.
    """

    def __init__(
        self,
        walk: Walk,
        index: int,
        states: States,
        source: Source,
        origins: dict[str, Origin],
        recipe: Recipe,
        settings: Settings,
        round_: Round,
    ) -> None:
        self._walk = walk
        self._layer = walk.layer(index)
        self._index = index
        self._states = states
        self._before = states.open(index)
        self._source = source
        self._origins = origins
        self._recipe = recipe
        self._settings = settings
        self._round = round_

    def run(self) -> Tensors:
        """Rounds them, those that come first in the computation first; the tensors to write."""
        tensors: Tensors = {}
        products = list(linears(self._layer))
        if self._recipe.scales is not None:
            found = self._inputs(products)
            tensors |= self._fold(found)
            for product in products:
                tensors |= self._rounded(product, found.pop(product))
            return tensors
        for stage in _stages(products) if self._settings.true_sequential else [products]:
            for product, inputs in self._inputs(stage).items():
                tensors |= self._rounded(product, inputs)
        return tensors

    def pass_on(self) -> None:
        """Writes what comes out of the layer, for the next one."""
        after = self._states.create(self._index + 1)
        for i in range(len(self._before)):
            rows(after, i).copy_(self._walk.through(self._layer, rows(self._before, i)))
        after.flush()

    def _rounded(self, product: Linear, inputs: Inputs) -> Tensors:
        tensors: Tensors = {}
        for matrix in matrices(product, self._origins):
            weights, written = self._round(matrix, inputs)
            matrix.put(weights)
            tensors |= written
        return tensors

    def _inputs(self, wanted: Sequence[Linear]) -> dict[Linear, Inputs]:
        """What goes into some products as the layer is now; where no token gets to, as if nothing was known of it."""
        found = {product: Inputs.empty(product.num_inputs) for product in wanted}
        for i in range(len(self._before)):
            left = set(wanted)

            def watch(linear: Linear, x: torch.Tensor, left: set[Linear] = left) -> None:
                if linear in left:
                    found[linear].add(x)
                    left.discard(linear)
                    if not left:
                        raise Reached

            self._walk.run(self._layer, rows(self._before, i), watch)
        unseen = [product for product in wanted if not found[product].rows]
        if unseen:
            named = ", ".join(next(iter(product.rows)) for product in unseen[:3])
            log.warning(
                "layer %d: no token of the text reaches %d of %d matrices, which are rounded to nearest: %s",
                *(self._index, len(unseen), len(wanted), named + " …" * (len(unseen) > 3)),
            )
        return found | {product: Inputs.unknown(product.num_inputs) for product in unseen}

    def _fold(self, found: dict[Linear, Inputs]) -> Tensors:
        """Scales inputs and weights; the other tensors that this changes."""
        changed: Tensors = {}
        for fold in folds(self._layer):
            if fold.linear.weight is None or self._recipe.scales is None:
                continue
            weights = fold.linear.weight.float()
            scales = self._recipe.scales(weights, found[fold.linear], self._settings, fold.rows)
            tensors, scales = self._folded(fold, scales)
            changed |= tensors
            found[fold.linear] = found[fold.linear].divided(scales)
        return changed

    def _folded(self, fold: Fold, scales: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        """The tensors that change beside matrices, and the scales as they were applied."""
        if isinstance(fold.before, Linear):
            fold.apply(scales)
            bias = fold.before.bias
            own = matrices(fold.before, self._origins)
            return {} if bias is None else {f"{matrix.name}.bias": bias[matrix.rows] for matrix in own}, scales
        held = {vector_name(name, self._walk.model.config): tensor for name, tensor in fold.before.state().items()}
        offset = fold.before.offset if isinstance(fold.before, RMSNorm) else 0.0
        (name, weight), *others = held.items()
        written = self._source.read(name)
        if not torch.equal(written.float() + offset, weight):
            raise ModelError(
                "unsupported_model", f"{name} is not held as it is written, so nothing can be folded into it"
            )
        # What the weights are multiplied with is what is left once the norm is rounded to the type it is written in.
        scaled = (weight / scales - offset).to(written.dtype)
        kept = scaled.float() + offset
        scales = torch.where(kept == 0, scales, weight / kept)
        fold.apply(scales)
        return {name: scaled, **{other: bias.to(written.dtype) for other, bias in others}}, scales


def _stages(products: Sequence[Linear]) -> Iterator[list[Linear]]:
    """In the order of computation, as many at once as read nothing that others of them make, and as memory allows."""
    for role in get_args(Role):
        some: list[Linear] = []
        for product in products:
            if product.role != role:
                continue
            if some and 4 * sum(one.num_inputs**2 for one in (*some, product)) > MOST_SUMS:
                yield some
                some = []
            some.append(product)
        if some:
            yield some
