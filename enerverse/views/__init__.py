"""Views: ray maps and projections that tell the world model where each camera stands."""

from enerverse.views.geometry import commanded_path, path_map, project_points, ray_map

__all__ = ["commanded_path", "path_map", "project_points", "ray_map"]
