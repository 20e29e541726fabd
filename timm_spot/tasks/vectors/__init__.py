"""Pictures as SVG: flat regions with shared borders, painted one over the other."""
