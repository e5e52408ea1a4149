"""Recipes: programs that train what the package ships."""
