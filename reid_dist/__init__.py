"""reid_dist: distributed training of person re-identification models. The config defines the mathematics."""

__version__ = "0.1.0"
