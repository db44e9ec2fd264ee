"""Networks for implicit curves and surfaces."""

from levelset_ext.networks.implicit import ImplicitMLP, fc1, fc2

__all__ = ["ImplicitMLP", "fc1", "fc2"]
