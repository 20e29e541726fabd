"""Pure tensor functions: windows, placements, saliency, position feature, regions. No nn.Module, no timm, no files."""
from .position_feature import fit_position_weights as fit_position_weights
from .position_feature import position_feature as position_feature
from .region_features import fit_histogram_weights as fit_histogram_weights
from .relevance import attention_statistics as attention_statistics
from .relevance import keep_counts as keep_counts
from .saliency import normalize_saliency as normalize_saliency
from .saliency import spectral_residual as spectral_residual
from .samplers import lattice_shape as lattice_shape
from .samplers import list_samplers as list_samplers
from .samplers import register_sampler as register_sampler
from .samplers import sample_positions as sample_positions
from .windows import sample_windows as sample_windows
