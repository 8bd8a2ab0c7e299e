"""Checkpoints of experts at ZeRO-3, which transformers 5.23 loads and saves the wrong way round.

The published checkpoints have a layer's experts as ``[experts, in, out]``, the model and what it
saves have ``[experts, out, in]``. Transformers tells the two apart by the shape of the model's
parameter, which ZeRO-3 has partitioned: it turns every checkpoint, read or written.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Transpose, WeightConverter

_WEIGHTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")


class TransposeToFit(Transpose):
    """`Transpose` of a tensor whose shape is not the parameter's, partitioned or not."""

    def convert(  # type: ignore[override]
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """See transformers."""
        parameter = kwargs["model"].get_parameter(kwargs["full_layer_name"])
        (given,) = input_dict.values()
        tensor: Tensor = given[0] if isinstance(given, list) else given
        if tensor.shape == getattr(parameter, "ds_shape", parameter.shape):
            return {self.get_target_pattern(input_dict, source_patterns, target_patterns): tensor}
        turned: Any = Transpose(self.dim0, self.dim1)
        found: dict[str, Tensor] = turned.convert(input_dict, source_patterns, target_patterns)
        return found

    @property
    def reverse_op(self) -> Transpose:
        """What saves: as the model has it, whatever was read."""
        return TransposeToFit(self.dim1, self.dim0, check_dims=self.check_dims)


def fit_experts(model_type: str) -> None:
    """Have transformers load and save experts of a type's checkpoints as they fit, also at ZeRO-3.

    Args:
        model_type: of the models.
    """
    operations: list[Any] = [TransposeToFit(1, 2, check_dims=True)]
    converters: list[Any] = [
        WeightConverter(name, name, operations=operations) for name in _WEIGHTS
    ]
    register_checkpoint_conversion_mapping(model_type, converters, overwrite=True)


def fit_loaded_experts(model: nn.Module) -> None:
    """Likewise for saving a model that is loaded already, which keeps how it was read.

    Args:
        model: in which what transformers loaded stands, itself or inside of adapters.
    """
    for module in model.modules():
        for converter in vars(module).get("_weight_conversions") or ():
            if isinstance(converter, WeightConverter):
                converter.operations = [_fitting(each) for each in converter.operations]


def _fitting(operation: Any) -> Any:
    if type(operation) is Transpose and operation.check_dims:
        return TransposeToFit(operation.dim0, operation.dim1, check_dims=True)
    return operation
