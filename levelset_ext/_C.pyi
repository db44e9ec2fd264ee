"""The compiled module. Importing it registers torch.ops.levelset_ext.*"""

from typing import Any

__version__: str
max_outputs: int
rank_tolerance_float32: float
rank_tolerance_float64: float
status_codes: dict[str, int]
bracket_variants: dict[str, int]
bracket_columns: int
bracket_at: int
bracket_value: int
build: dict[str, Any]
mlp_activations: dict[str, int]
mlp_vector_bytes: int
mlp_mixed: str | None

def mlp_packed_size(
    outputs: int, hidden: int, inputs: int, double_precision: bool
) -> tuple[int, int]: ...
def mlp_cuda_plan(shapes: list[tuple[int, int, int]]) -> tuple[int, int, int] | None: ...
def mlp_cuda_room(device: int) -> int: ...
