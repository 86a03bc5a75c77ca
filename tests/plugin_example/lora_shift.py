"""A type of adapter that PEFT does not have: each site's output is shifted by a trained vector B·a."""

from dataclasses import dataclass

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from adaptive_lora.methods.peft_types.table import PeftType


@dataclass
class ShiftConfig(PeftConfig):
    """Its options; those that do not begin with `r` are expected by PEFT of every type."""

    r: int = 4
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | None = None
    layers_pattern: str | None = None
    bias: str = "none"

    def __post_init__(self):
        """Set the name of the type."""
        super().__post_init__()
        self.peft_type = "SHIFT"


class ShiftLinear(nn.Module, BaseTunerLayer):
    """A linear layer with a shift."""

    adapter_layer_names = ("shift_a", "shift_B")

    def __init__(self, base_layer, adapter_name, r):
        super().__init__()
        self.base_layer, self.merged_adapters = base_layer, []
        self._disable_adapters, self._active_adapter = False, adapter_name
        weight = base_layer.weight
        self.shift_a = nn.ParameterDict({adapter_name: nn.Parameter(weight.new_empty(r).normal_())})
        self.shift_B = nn.ParameterDict({adapter_name: nn.Parameter(weight.new_zeros(len(weight), r))})
        self.set_adapter(self.active_adapters)

    def forward(self, x):
        output = self.base_layer(x)
        if self.disable_adapters:
            return output
        return output + sum(self.shift_B[name] @ self.shift_a[name] for name in self.active_adapters).to(output.dtype)


class ShiftModel(BaseTuner):
    """Puts the layers in place."""

    prefix, tuner_layer_cls, target_module_mapping = "shift_", ShiftLinear, {}

    def _create_and_replace(self, config, adapter_name, target, target_name, parent, current_key, **_):
        if not isinstance(target, nn.Linear):
            raise ValueError(f"{target} is not supported: required torch.nn.Linear")
        self._replace_module(parent, target_name, ShiftLinear(target, adapter_name, config.r), target)


shift = PeftType(size="r", config_class=ShiftConfig, tuner_class=ShiftModel)
