"""The configuration of a run: its fields, the strict loader, the canonical form. Imports no torch."""

from distvsd.config.cameras import AdaptiveConfig, CamerasConfig
from distvsd.config.canonical import diff, digest, to_dict, to_yaml
from distvsd.config.gaussians import GaussiansConfig
from distvsd.config.load import config_from, load_config
from distvsd.config.objective import ObjectiveConfig
from distvsd.config.occupancy import OccupancyConfig
from distvsd.config.parallel import ParallelConfig
from distvsd.config.particles import HealthConfig, ImageConfig, NerfConfig, ParticlesConfig
from distvsd.config.prior import PriorConfig
from distvsd.config.reference import fields_reference
from distvsd.config.render import RenderConfig
from distvsd.config.run import CheckpointConfig, LogConfig, RunConfig, ScheduleConfig
from distvsd.config.schedule import Schedule
from distvsd.config.schema import Config
from distvsd.config.score import ScoreConfig
from distvsd.config.stages import StageConfig

__all__ = [
    "AdaptiveConfig",
    "CamerasConfig",
    "CheckpointConfig",
    "Config",
    "GaussiansConfig",
    "HealthConfig",
    "ImageConfig",
    "LogConfig",
    "NerfConfig",
    "ObjectiveConfig",
    "OccupancyConfig",
    "ParallelConfig",
    "ParticlesConfig",
    "PriorConfig",
    "RenderConfig",
    "RunConfig",
    "Schedule",
    "ScheduleConfig",
    "ScoreConfig",
    "StageConfig",
    "config_from",
    "diff",
    "digest",
    "fields_reference",
    "load_config",
    "to_dict",
    "to_yaml",
]
