"""Surfaces and curves of level sets: extraction, comparison, rays, curvature, integrals."""

from levelset_ext.geometry.compare import compare_meshes
from levelset_ext.geometry.coverage import (
    Coverage,
    CoverageEstimate,
    coverage,
    estimate_coverage,
    sample_level_set,
)
from levelset_ext.geometry.curvature import Curvature, curvature, curvature_penalty
from levelset_ext.geometry.curves import Curve, CurveEnd, CurveTrace, trace_curve
from levelset_ext.geometry.extract import Mesh, extract_mesh
from levelset_ext.geometry.integrals import (
    Estimate,
    level_set_integral,
    level_set_volume,
    surface_area,
)
from levelset_ext.geometry.preview import render_preview
from levelset_ext.geometry.rays import RayCrossings, RayHits, intersect_rays, ray_crossings
from levelset_ext.geometry.render import Camera, render
from levelset_ext.geometry.trim import TrimmedMesh, trim_mesh

__all__ = [
    "Camera",
    "Coverage",
    "CoverageEstimate",
    "Curvature",
    "Curve",
    "CurveEnd",
    "CurveTrace",
    "Estimate",
    "Mesh",
    "RayCrossings",
    "RayHits",
    "TrimmedMesh",
    "compare_meshes",
    "coverage",
    "curvature",
    "curvature_penalty",
    "estimate_coverage",
    "extract_mesh",
    "intersect_rays",
    "level_set_integral",
    "level_set_volume",
    "ray_crossings",
    "render",
    "render_preview",
    "sample_level_set",
    "surface_area",
    "trace_curve",
    "trim_mesh",
]
