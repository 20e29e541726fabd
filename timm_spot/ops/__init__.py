"""Pure tensor functions: windows, placements, saliency, position feature, regions. No nn.Module, no timm, no files."""
from .attention import attention_statistics as attention_statistics
from .attention import keep_counts as keep_counts
from .placements import sample_placement as sample_placement
from .placements import sample_positions as sample_positions
from .position_feature import fit_position_weights as fit_position_weights
from .position_feature import position_feature as position_feature
from .regions.features import fit_histogram_weights as fit_histogram_weights
from .saliency import energy as energy
from .saliency import normalize_saliency as normalize_saliency
from .saliency import spectral_residual as spectral_residual
from .samplers import lattice_shape as lattice_shape
from .samplers import list_samplers as list_samplers
from .samplers import register_sampler as register_sampler
from .windows import sample_windows as sample_windows
