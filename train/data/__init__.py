"""Prepared splits to batches: deterministic order, exact resume, pixels or cached features."""

from data_prep.store.pixels import PixelPreprocessor, load_preprocessor, most_views
from train.data.collate import Text
from train.data.config import DataConfig, SourceConfig
from train.data.evaluation import EvalBatch, EvalItem, EvalLoader
from train.data.features import FeatureCache, ensure_feature_cache
from train.data.loader import TrainLoader, loader_errors
from train.data.splits import is_prepared, make_text, open_split, open_train_split

__all__ = [
    "DataConfig",
    "EvalBatch",
    "EvalItem",
    "EvalLoader",
    "FeatureCache",
    "PixelPreprocessor",
    "SourceConfig",
    "Text",
    "TrainLoader",
    "ensure_feature_cache",
    "is_prepared",
    "load_preprocessor",
    "loader_errors",
    "make_text",
    "most_views",
    "open_split",
    "open_train_split",
]
