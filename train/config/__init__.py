"""The run's configuration: typed, checked as a whole before anything starts, and the same for every rank."""

from train.config.check import ConfigError, accumulation, validate
from train.config.compose import explain, load, parse_options, resolve, save, schema_keys
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
    "OptimConfig",
    "RunConfig",
    "StageConfig",
    "TrackingConfig",
    "TrainedParts",
    "accumulation",
    "explain",
    "load",
    "parse_options",
    "resolve",
    "save",
    "schema_keys",
    "validate",
]
