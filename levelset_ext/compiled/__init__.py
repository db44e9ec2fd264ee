"""Networks that the compiled module knows how to evaluate from end to end."""

from levelset_ext.compiled.find import compiled_field, compiled_fields
from levelset_ext.compiled.mlp import MLP

__all__ = ["MLP", "compiled_field", "compiled_fields"]
