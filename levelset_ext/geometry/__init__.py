"""Surfaces of level sets: extraction, comparison, pictures."""

from levelset_ext.geometry.compare import compare_meshes
from levelset_ext.geometry.extract import Mesh, extract_mesh
from levelset_ext.geometry.preview import render_preview

__all__ = ["Mesh", "compare_meshes", "extract_mesh", "render_preview"]
