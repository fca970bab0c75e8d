"""The run's configuration: typed, checked as a whole before anything starts, and the same for every rank."""

from common.errors import ConfigError
from common.options import parse_options
from model.config import MovedTo
from train.config.check import accumulation, validate
from train.config.compose import check_words, compose_overrides, explain, load, read, resolve, save, schema_keys
from train.config.models import located, missing_models
from train.config.schema import (
    DTYPES,
    EngineConfig,
    EvaluationConfig,
    LearningRates,
    OptimConfig,
    RunConfig,
    StageConfig,
    TrackingConfig,
    TrainedParts,
)

__all__ = [
    "DTYPES",
    "ConfigError",
    "EngineConfig",
    "EvaluationConfig",
    "LearningRates",
    "MovedTo",
    "OptimConfig",
    "RunConfig",
    "StageConfig",
    "TrackingConfig",
    "TrainedParts",
    "accumulation",
    "check_words",
    "compose_overrides",
    "explain",
    "load",
    "located",
    "missing_models",
    "parse_options",
    "read",
    "resolve",
    "save",
    "schema_keys",
    "validate",
]
