"""Subpixel ViTs, dHT ViTs and ViTs that drop tokens as timm models; importing this package registers them."""
from . import density_placer as density_placer
from . import dht_zoo as dht_zoo
from . import pruning_zoo as pruning_zoo
from . import spot_mae as spot_mae
from . import spot_retrofit as spot_retrofit
from . import spot_zoo as spot_zoo
from .dht_embed import HierarchicalEmbed as HierarchicalEmbed
from .dht_segmenter import DhtSegmenter as DhtSegmenter
from .dht_tokenizer import HierarchicalTokenizer as HierarchicalTokenizer
from .dht_tokenizer import Regions as Regions
from .dht_vit import DhtVisionTransformer as DhtVisionTransformer
from .spot_checkpoint import checkpoint_filter_fn as checkpoint_filter_fn
from .spot_config import SpotPretrainedCfg as SpotPretrainedCfg
from .spot_mae import Reconstruction as Reconstruction
from .spot_mae import SubpixelMAE as SubpixelMAE
from .spot_vit import SubpixelVisionTransformer as SubpixelVisionTransformer
from .subpixel_embed import SubpixelEmbed as SubpixelEmbed
