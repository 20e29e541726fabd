"""Subpixel ViTs and dHT ViTs as timm models; importing this package registers them."""
from . import relevance_vit as relevance_vit
from . import retrofit as retrofit
from . import spot_mae as spot_mae
from .checkpoint import checkpoint_filter_fn as checkpoint_filter_fn
from .dht_segmenter import DhtSegmenter as DhtSegmenter
from .dht_vit import DhtVisionTransformer as DhtVisionTransformer
from .hierarchical_embed import HierarchicalEmbed as HierarchicalEmbed
from .hierarchical_tokenizer import HierarchicalTokenizer as HierarchicalTokenizer
from .hierarchical_tokenizer import Regions as Regions
from .spot_mae import Reconstruction as Reconstruction
from .spot_mae import SubpixelMAE as SubpixelMAE
from .spot_vit import SpotPretrainedCfg as SpotPretrainedCfg
from .spot_vit import SubpixelVisionTransformer as SubpixelVisionTransformer
from .subpixel_embed import SubpixelEmbed as SubpixelEmbed
