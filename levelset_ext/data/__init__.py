"""Files in and out: point clouds, meshes, and a scan the package makes itself."""

from levelset_ext.data.meshes import read_mesh, read_ply, write_mesh
from levelset_ext.data.scans import (
    CloudSummary,
    Normalization,
    SyntheticScan,
    read_points,
    synthetic_scan,
    validate_cloud,
)

__all__ = [
    "CloudSummary",
    "Normalization",
    "SyntheticScan",
    "read_mesh",
    "read_ply",
    "read_points",
    "synthetic_scan",
    "validate_cloud",
    "write_mesh",
]
