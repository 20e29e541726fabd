"""Regions of images: their graph, hierarchy, budget, features, outlines and losses."""
